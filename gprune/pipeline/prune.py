"""prune(cfg): generalization-aware structured pruning, step by step.

 1 statistics   one pass per corpus: what enters every down and output projection
 2 importance   a score per unit and corpus; which blocks go as a whole, if any may
 3 drift        how much ranks vary between corpora, beside what sampling alone would do
 4 partition    neurons of a block into modules: parameter similarity and drift
 5 refinement   soft assignments under a differentiable objective (a LightningModule)
 6 reliability  sensitive, weakly activated modules rank by an activation-free metric
 7 sparsity     one threshold per module, learned around the frozen model (a LightningModule)
 8 budget       keep masks that remove exactly what was asked for, or as much as keeps a quality
 9 pruning      smaller weights; recovery if asked for
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
from gprune.export.hf import portable
from gprune.models.masks import Masks
from gprune.pipeline.calibrate import calibrate
from gprune.pipeline.evaluate import evaluate, summarise, write_pages
from gprune.pipeline.partition import assess, measure_drift, partition
from gprune.pipeline.quality import at_first_share, at_share_found, quality_entries
from gprune.pipeline.recover import shrink
from gprune.pipeline.run import opened
from gprune.pipeline.save import save
from gprune.pipeline.sparsity import base_masks, learn_sparsity, meet_budget, score, without_blocks
from gprune.runs.results import PruningResult


def prune(cfg: RunConfig, callbacks: Sequence[Callback] = (), logger: Logger | Sequence[Logger] = ()) -> PruningResult:
    """Run the whole method, or resume an earlier run of the same settings.

    Args:
        cfg: every setting; `RunConfig()` prunes half of SmolLM2-135M's FFN neurons.
        callbacks: Lightning callbacks for the Trainers of all stages, beside those of `--trainer.callbacks`. An object
            of your own class is the same in each. Of an object that inherits from one of Lightning's each stage has a
            copy; the object ends with the state of the last of the run's own stages (`best_model_path`).
        logger: Lightning loggers for all stages, beside CSV and W&B.

    Returns:
        Masks, modules, thresholds, statistics, records and the pruned model.

    Raises:
        UserError: one line that says what was expected, what came and what to do.
    """
    require(cfg, RunConfig, "The configuration must be a RunConfig, such as gprune.RunConfig(importance='wifv')")
    if cfg.dry_run:
        raise UserError("dry_run: expected false where a run is asked for; `python train.py --dry_run true` plans it.")
    with opened(cfg, callbacks, logger) as run:  # plan, model, tokenizer, text, blocks, budget
        modules = thresholds = None
        if cfg.final == "model":  # made elsewhere: measured, and perhaps distilled
            statistics, masks = {}, {"model": Masks([], [])}
        else:
            statistics = calibrate(run)  # 1
            scores = score(run, statistics)  # 2
            run = without_blocks(run, statistics)
            masks_of = base_masks(run, statistics, scores)  # by stage: `base`, `averaged` and `gprune`
            if cfg.gprune:
                drift = measure_drift(run, statistics)  # 3
                labels = partition(run, drift)  # 4, 5
                modules = assess(run, statistics, scores, drift, labels)  # 6
                learning = at_first_share(run, statistics, masks_of)
                masks_of["gprune"] = learn_sparsity(learning, modules, masks_of["base"])  # 7
            run = at_share_found(run, statistics, masks_of)  # the same run, unless the target is a quality
            thresholds, masks = meet_budget(run, masks_of)  # 8
        if cfg.evaluates_early:
            evaluate(run, statistics, masks)  # the method alone, and its controls
        final = masks[run.cfg.final]
        own_masks = None if cfg.final == "model" else final
        made = "Pruning" if own_masks else f"Reading {cfg.model.made_elsewhere}"
        run.step(9, made if cfg.recovery == "none" else f"{made} and recovering")
        with run.folder.step("shrink"):
            pruned = shrink(run, final, statistics)
        first, summary = rank_zero_only.rank == 0, {}
        if first:
            save(run, pruned, masks)
        records = evaluate(run, statistics, masks, pruned)  # 10
        if first:
            summary = summarise(run, records, own_masks, pruned, modules, quality_entries(run, records))
            with optional_output("a page", f"`gprune report {run.folder.path}` writes it"):
                write_pages(run)
        known = run.cfg.own_row == ("model", "none")  # the model, and its tokenizer, are in a folder of their own
        small, tokenizer = (None, None) if known else (portable(pruned), run.tokenizer)
        return PruningResult(
            path=run.folder.path, config=run.cfg, masks=own_masks, modules=modules, thresholds=thresholds,
            statistics=statistics, records=records, summary=summary, model=small, tokenizer=tokenizer,
        )  # fmt: skip
