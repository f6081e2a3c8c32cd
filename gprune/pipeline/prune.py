"""prune(cfg): generalization-aware structured pruning, one call per step of the method.

 1 statistics   one pass per corpus: what enters every down and output projection
 2 importance   a score per unit and corpus
 3 drift        how much ranks vary between corpora, beside what sampling alone would do
 4 partition    neurons of a block into modules: parameter similarity and drift
 5 refinement   soft assignments under a differentiable objective (a LightningModule)
 6 reliability  sensitive, weakly activated modules rank by an activation-free metric
 7 sparsity     one threshold per module, learned around the frozen model (a LightningModule)
 8 budget       keep masks that remove exactly what was asked for
 9 pruning      smaller weights; recovery if asked for
10 evaluation   dense, controls and gprune, on seen and unseen text
"""

from __future__ import annotations

from lightning.pytorch.utilities import rank_zero_only

from gprune.config import RunConfig
from gprune.importance.scores import score_units
from gprune.models.blocks import blocks_of
from gprune.pipeline.calibrate import calibrate
from gprune.pipeline.evaluate import evaluate, summarise
from gprune.pipeline.inputs import load, prepare_text
from gprune.pipeline.partition import measure_drift, partition_neurons, rank_inside_modules
from gprune.pipeline.plan import check
from gprune.pipeline.recover import shrink
from gprune.pipeline.run import opened
from gprune.pipeline.save import save_and_check
from gprune.pipeline.sparsity import base_candidates, learn_sparsity
from gprune.runs.results import PruningResult


def prune(cfg: RunConfig) -> PruningResult:
    """Run the whole method, or take up where an earlier run of the same settings stopped.

    Args:
        cfg: every setting; `RunConfig()` prunes half of SmolLM2-135M's FFN neurons.

    Returns:
        Masks, modules, thresholds, statistics, records and the pruned model.

    Raises:
        UserError: one line that says what was expected, what came and what to do.
    """
    plan = check(cfg)
    costs, target = plan.costs, plan.target
    model, tokenizer = load(cfg, plan.device)
    text = prepare_text(cfg, tokenizer)
    with opened(cfg, model, text) as run:
        blocks = blocks_of(model)

        # 1, 2
        statistics = calibrate(cfg, run, model, text)
        source = statistics[cfg.corpora.score]
        scores = score_units(cfg.importance, blocks, source, seed=cfg.run.seed, attention=costs.attention)
        candidates = base_candidates(cfg, blocks, statistics, scores, costs, target)

        modules = thresholds = None
        if cfg.gprune:
            # 3
            drift = measure_drift(cfg, blocks, statistics)
            # 4, 5
            labels = partition_neurons(cfg, run, blocks, drift)
            # 6
            modules, ranks = rank_inside_modules(cfg, run, blocks, statistics, scores, drift, labels)
            # 7, 8
            thresholds, candidates["gprune"] = learn_sparsity(
                cfg, run, model, text, statistics, modules, ranks, candidates["base"], costs, target
            )

        # 9
        final = "gprune" if cfg.gprune else "base"
        with run.folder.step("shrink"):
            pruned = shrink(cfg, run, model, text, candidates[final], statistics, recovery=cfg.recovery)
        records, summary = [], {}
        if rank_zero_only.rank == 0:  # perplexity from one process is exact; the others are done
            save_and_check(cfg, run, model, pruned, tokenizer, candidates, final, text)
            # 10
            ready = {(final, cfg.recovery): pruned}
            records = evaluate(cfg, run, model, candidates, statistics, text, tokenizer, ready=ready)
            summary = summarise(cfg, run, records, candidates, costs, model, pruned, modules)
    return PruningResult(
        path=run.folder.path,
        config=cfg,
        masks=candidates[final],
        modules=modules,
        thresholds=thresholds,
        statistics=statistics,
        records=records,
        summary=summary,
        model=pruned,
        tokenizer=tokenizer,
    )
