"""Steps 2, 7 and 8: scores, masks of the base metric, learned thresholds, and the masks that meet the budget."""

from __future__ import annotations

import functools
from collections.abc import Mapping

from torch import Tensor

from gprune.calibration.statistics import CorpusStatistics, pooled
from gprune.importance.scores import Scores, score_units
from gprune.models.masks import Masks
from gprune.partition.modules import Modules
from gprune.pipeline.run import Run
from gprune.sparsity.allocation import ALLOCATION, allocate, module_thresholds
from gprune.sparsity.thresholds import (
    Thresholds,
    masks_from_thresholds,
    named_thresholds,
    start_thresholds,
    thresholds_from_named,
)
from gprune.stages.callbacks import ApplyMasks, PerplexityCurve, log_modules
from gprune.stages.threshold_learning import ThresholdLearning


def score(run: Run, statistics: Mapping[str, CorpusStatistics]) -> Scores:
    """Step 2: importance of every unit by the base metric, on `corpora.score`."""
    run.step(2, "Scoring")
    return _scored(run, statistics[run.cfg.corpora.score])


def _scored(run: Run, statistics: CorpusStatistics) -> Scores:
    cfg = run.cfg
    return score_units(cfg.importance, run.blocks, statistics, seed=cfg.run.seed, attention=cfg.attention)


def base_masks(run: Run, statistics: Mapping[str, CorpusStatistics], scores: Scores) -> dict[str, Masks]:
    """Masks of the base metric alone, its sparsity spread over blocks by `--sparsity.allocation` (or `.start`).

    Returns:
        `base`, by `scores`; and `averaged`, where it is a row of the table: by the same metric on all drift
        corpora together.
    """
    cfg = run.cfg
    allocated = functools.partial(allocate, cfg.base_allocation, **cfg.sparsity.options)
    masks = {"base": allocated(scores, statistics[cfg.corpora.score], run.blocks, run.budget)}
    if "averaged" in dict(cfg.stages):
        pool = pooled(statistics[corpus] for corpus in cfg.corpora.drift)
        masks["averaged"] = allocated(_scored(run, pool), pool, run.blocks, run.budget)
    return masks


def learn_sparsity(run: Run, modules: Modules, base: Masks) -> tuple[Thresholds, Masks]:
    """Steps 7 and 8: thresholds per module, and the masks that meet the budget with them.

    Args:
        base: masks of the base metric. Where the allocation is no rule for modules, every module keeps as much as they
            keep of it; learning starts there too.
    """
    name, ranks = run.cfg.sparsity.allocation, modules.ranks
    rule = ALLOCATION[name]
    run.step(7, "Learning sparsity" if rule.learned else "Allocating sparsity")

    def compute() -> dict[str, Tensor]:
        start = module_thresholds(name, base, ranks) if rule.modules else start_thresholds(base, ranks)
        return fit_thresholds(run, modules, start) if rule.learned else named_thresholds(start)

    tensors = run.folder.tensors("thresholds", compute)
    run.step(8, "Meeting the budget")
    thresholds = thresholds_from_named(tensors)
    if "offsets.0" in tensors:
        ranks = ranks.moved([tensors[f"offsets.{b}"] for b in range(len(ranks.ffn))])
    masks = masks_from_thresholds(ranks, thresholds, run.budget)
    log_modules(run.loggers, modules, masks)
    return thresholds, masks


def fit_thresholds(run: Run, modules: Modules, start: Thresholds) -> dict[str, Tensor]:
    """Step 7, computed: fit ThresholdLearning under the callbacks that mask and measure.

    Returns:
        Thresholds, and offsets where they were learned, by the names under which they are saved.
    """
    cfg, s = run.cfg, run.cfg.sparsity
    stage = ThresholdLearning(run.model, modules.ranks, start, run.budget, s, shard=cfg.model.shard)
    budgets = {v: run.budget.at(v) for v in cfg.evaluation.curve} | {s.target: run.budget}
    curve = PerplexityCurve(run.text.development, budgets=budgets, batch_size=cfg.corpora.batch_size)
    numbers = sum(p.numel() for p in stage.parameters() if p.requires_grad)
    what = f"Learning {numbers} {'thresholds' if s.learn == 'thresholds' else 'numbers'}"
    trainer = run.fit("thresholds", what, stage, run.text.learn, max_epochs=s.epochs, callbacks=[ApplyMasks(), curve])
    run.folder.update_manifest(
        learning={
            "steps": trainer.global_step,
            "development_perplexity_by_epoch": curve.by_epoch,
            "development_perplexity_by_sparsity": {f"{k:g}": v for k, v in sorted(curve.by_sparsity.items())},
        }
    )
    offsets = {f"offsets.{b}": o.detach().cpu() for b, o in enumerate(stage.offsets or ())}
    return named_thresholds(stage.thresholds) | offsets
