"""prune(cfg): generalization-aware structured pruning, step by step.

 1 statistics   one pass per corpus over the inputs of all down and output projections
 2 importance   a score per unit and corpus; the choice of whole blocks, if they are in scope
 3 drift        the variation of ranks between corpora, and its noise floor
 4 partition    neurons of a block into modules by parameter similarity and drift
 5 refinement   soft assignments optimised under a differentiable objective (a LightningModule)
 6 reliability  sensitive, weakly activated modules are ranked by an activation-free metric
 7 sparsity     one threshold per module, learned with the model frozen (a LightningModule)
 8 budget       keep masks that meet the target exactly, or the largest sparsity for a quality target
 9 pruning      smaller weight matrices; recovery
10 evaluation   dense, controls and gprune, on seen and unseen text
"""

from __future__ import annotations

from collections.abc import Sequence

from lightning import Callback
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from gprune.checks import require
from gprune.config import RunConfig
from gprune.errors import UserError, optional_output
from gprune.export.hf import to_portable
from gprune.pipeline.calibrate import calibrate
from gprune.pipeline.evaluate import evaluate
from gprune.pipeline.partition import assess, measure_drift, partition
from gprune.pipeline.quality import with_quality_budget
from gprune.pipeline.recover import shrink
from gprune.pipeline.run import open_run
from gprune.pipeline.save import check_discovered_structure, save
from gprune.pipeline.sparsity import base_masks, learn_sparsity, meet_budget, remove_blocks, score
from gprune.pipeline.summary import summarise, write_pages
from gprune.runs.results import PruningResult


def prune(
    cfg: RunConfig, callbacks: Sequence[Callback] = (), logger: Logger | Sequence[Logger] = (), *,
    refiner: type | None = None, learner: type | None = None, calibrator: type | None = None,
) -> PruningResult:  # fmt: skip
    """Run the whole method, or resume an earlier run of the same settings.

    Args:
        cfg: all settings; `RunConfig()` prunes half of SmolLM2-135M's FFN neurons.
        callbacks: Lightning callbacks for the Trainers of all stages, in addition to `--trainer.callbacks`. An object
            of your own class is shared by all stages. A built-in callback of Lightning, or a subclass of one, is
            copied for each stage. After the run, your object has the state (such as `best_model_path`) of the copy
            in the last stage of the run's own model; stages of controls do not count.
        logger: Lightning loggers for all stages, in addition to CSV and W&B.
        refiner: class of your own (docs/extend.md) instead of `--partition.refiner`.
        learner: class of your own instead of `--sparsity.learner`.
        calibrator: class of your own instead of `--corpora.calibrator`.

    Returns:
        Masks, modules, thresholds, statistics, records and the pruned model.

    Raises:
        UserError: if a setting, the model, a corpus or a file is invalid.
    """
    require(cfg, RunConfig, "The configuration must be a RunConfig, such as gprune.RunConfig(importance='wifv')")
    if cfg.dry_run:
        raise UserError("--dry_run must be false for gprune.prune; got true. Use `python train.py --dry_run true`.")
    cfg = cfg.with_stages(refiner=refiner, learner=learner, calibrator=calibrator)
    with open_run(cfg, callbacks, logger) as run:  # plan, model, tokenizer, text, blocks, budget
        modules = None
        check_discovered_structure(run)
        statistics = calibrate(run)  # 1
        scores = score(run, statistics)  # 2
        run = remove_blocks(run, statistics)
        masks_of = base_masks(run, statistics, scores)  # stage -> masks as a function of the budget
        if cfg.gprune:
            drift = measure_drift(run, statistics)  # 3
            labels = partition(run, drift)  # 4, 5
            modules = assess(run, statistics, scores["gprune"], drift, labels)  # 6
            masks_of["gprune"] = learn_sparsity(run, statistics, scores["gprune"], modules, masks_of)  # 7
        run = with_quality_budget(run, statistics, masks_of)  # no-op unless the target is a quality
        thresholds, masks = meet_budget(run, masks_of)  # 8
        if cfg.evaluates_early:
            evaluate(run, statistics, masks)  # all rows without recovery
        final_masks = masks[cfg.final]
        run.step(9, "Pruning" if cfg.recovery == "none" else "Pruning and recovering")
        with run.folder.step("shrink"):
            pruned = shrink(run, final_masks, statistics)
        is_rank_zero, summary = rank_zero_only.rank == 0, {}
        if is_rank_zero:
            save(run, pruned, masks)
        records = evaluate(run, statistics, masks, pruned)  # 10
        if is_rank_zero:
            summary = summarise(run, records, final_masks, pruned, modules)
            with optional_output("report.html", f"`gprune report {run.folder.path}` writes it"):
                write_pages(run)
        return PruningResult(
            path=run.folder.path, config=run.cfg, masks=final_masks, modules=modules, thresholds=thresholds,
            statistics=statistics, records=records, summary=summary,
            model=to_portable(pruned), tokenizer=run.tokenizer,
        )  # fmt: skip
