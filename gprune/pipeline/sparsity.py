"""Steps 2, 7 and 8: masks of the base metric, learned thresholds, and the masks that meet the budget."""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from gprune.calibration.statistics import KINDS, CorpusStatistics, pooled
from gprune.config import RunConfig
from gprune.corpora.loaders import CorpusDataModule
from gprune.importance.scores import Scores, score_units
from gprune.models.blocks import Block, blocks_of
from gprune.models.masks import Masks
from gprune.partition.record import Modules
from gprune.pipeline.inputs import Text
from gprune.pipeline.run import Run
from gprune.recovery.projection import least_squares_correction
from gprune.sparsity.allocation import allocate, depth_masks
from gprune.sparsity.budget import UnitCosts, check_budget
from gprune.sparsity.masks import keep_masks
from gprune.sparsity.thresholds import ModuleRanks, masks_from_thresholds, start_thresholds
from gprune.stages.callbacks import ApplyMasks, ModuleReport, PerplexityCurve, log_modules
from gprune.stages.thresholds import Corrections, Recover, ThresholdLearning

log = logging.getLogger("gprune")


def base_masks(
    cfg: RunConfig,
    blocks: Sequence[Block],
    scores: Scores,
    statistics: CorpusStatistics,
    costs: UnitCosts,
    target: int,
) -> Masks:
    """The base metric alone, its sparsity spread over blocks by `--sparsity.allocation` (or `.start`).

    Args:
        scores: of the metric; statistics: of the text they come from.
    """
    s, name = cfg.sparsity, cfg.base_allocation
    if name == "depth":
        return depth_masks(
            scores, statistics, blocks, target=target, width_multiple=s.width_multiple, protected=costs.protected
        )
    options = {"multiple": s.owl_multiple, "spread": s.owl_spread} if name == "owl" else {}
    neurons, groups = allocate(name, scores, statistics, blocks, s.target, **options)
    return keep_masks(costs, neurons, groups, target=target, width_multiple=s.width_multiple)


def base_candidates(
    cfg: RunConfig,
    blocks: Sequence[Block],
    statistics: Mapping[str, CorpusStatistics],
    scores: Scores,
    costs: UnitCosts,
    target: int,
) -> dict[str, Masks]:
    """Masks of the base metric: `base` by `scores`, those of `corpora.score`; `base_averaged`, where it is a row of the
    table, by the same metric on all drift corpora together.
    """
    found = {"base": base_masks(cfg, blocks, scores, statistics[cfg.corpora.score], costs, target)}
    if "base_averaged" in dict(cfg.stages):
        pool = pooled(statistics[corpus] for corpus in cfg.corpora.drift)
        averaged = score_units(cfg.importance, blocks, pool, seed=cfg.run.seed, attention=costs.attention)
        found["base_averaged"] = base_masks(cfg, blocks, averaged, pool, costs, target)
    return found


def learn_sparsity(
    cfg: RunConfig,
    run: Run,
    model: PreTrainedModel,
    text: Text,
    statistics: Mapping[str, CorpusStatistics],
    modules: Modules,
    ranks: ModuleRanks,
    base: Masks,
    costs: UnitCosts,
    target: int,
) -> tuple[tuple[list[Tensor], list[Tensor]], Masks]:
    """Steps 7 and 8: thresholds per module, and the masks that meet the budget with them.

    Without learning, thresholds are equal everywhere (`equal`) or those that learning would start from: every module
    keeps as much as the base metric keeps of it under its own allocation.
    """
    s = cfg.sparsity
    if s.allocation == "learned":
        compute = functools.partial(
            fit_thresholds, cfg, run, model, text, statistics, modules, ranks, base, costs, target
        )
    elif s.allocation == "equal":
        compute = functools.partial(equal_thresholds, ranks)
    else:
        compute = functools.partial(named_thresholds, start_thresholds(base, ranks))
    taken_up = run.folder.read("thresholds") is not None
    tensors = run.folder.tensors("thresholds", compute)
    thresholds = tuple([tensors[f"{kind}.{b}"] for b in range(len(ranks.ffn))] for kind in ("ffn", "attention"))
    if "offsets.0" in tensors:
        ranks = ranks.moved([tensors[f"offsets.{b}"] for b in range(len(ranks.ffn))])
    masks = masks_from_thresholds(ranks, thresholds, costs, target=target, width_multiple=s.width_multiple)
    if taken_up or not cfg.learns:  # else the ModuleReport of the fit has done it
        log_modules(run.loggers, modules.rows(), masks, modules.labels)
    return thresholds, masks


def make_corrections(cfg: RunConfig, model: PreTrainedModel, statistics: Mapping[str, CorpusStatistics]) -> Recover:
    """A function of masks: what `least_squares` on the recovery corpora adds to the frozen model's projections."""
    pool = pooled(statistics[c] for c in cfg.corpora.recover)

    def corrections(masks: Masks) -> Corrections:
        found: Corrections = ([], [])
        for block in blocks_of(model):
            keeps = masks.channels(block)
            for added, (kind, part) in zip(found, KINDS, strict=True):
                if bool((keep := keeps[kind]).all()):
                    added.append(None)
                    continue
                weight, moments = block.parts[part].weight.detach(), getattr(pool, kind)[block.index].total
                correction = least_squares_correction(weight.cpu(), keep, moments, ridge=cfg.ridge)
                added.append(correction.to(weight.device))  # once, and not at each forward pass
        return found

    return corrections


def equal_thresholds(ranks: ModuleRanks) -> dict[str, Tensor]:
    """The same threshold everywhere: every module loses the same fraction."""
    ffn = [torch.zeros(k, dtype=torch.float64) for k in ranks.modules]
    return named_thresholds((ffn, [torch.zeros(1, dtype=torch.float64) for _ in ranks.attention]))


def named_thresholds(thresholds: tuple[Sequence[Tensor], Sequence[Tensor]]) -> dict[str, Tensor]:
    """Thresholds per block of neurons and of KV groups, as saved in safetensors."""
    pairs = zip(("ffn", "attention"), thresholds, strict=True)
    return {f"{kind}.{b}": t.detach().cpu() for kind, group in pairs for b, t in enumerate(group)}


def fit_thresholds(
    cfg: RunConfig,
    run: Run,
    model: PreTrainedModel,
    text: Text,
    statistics: Mapping[str, CorpusStatistics],
    modules: Modules,
    ranks: ModuleRanks,
    base: Masks,
    costs: UnitCosts,
    target: int,
) -> dict[str, Tensor]:
    """Step 7, computed: fit ThresholdLearning under the callbacks that mask, measure and report."""
    s = cfg.sparsity
    stage = ThresholdLearning(
        model, ranks, start_thresholds(base, ranks), costs,
        target=target, width_multiple=s.width_multiple, learning_rate=s.learning_rate, learn=s.learn, loss=s.loss,
        objective=s.objective, worst_step=s.worst_step, corpora=cfg.corpora.learn, shard=cfg.model.shard,
        offset_learning_rate=s.offset_learning_rate, offset_limit=s.offset_limit,
        recover=make_corrections(cfg, model, statistics) if cfg.learns_recovered else None,
    )  # fmt: skip
    multiple = s.width_multiple
    budgets = {
        v: check_budget(costs, v, width_multiple=multiple, flag="evaluation.curve") for v in cfg.evaluation.curve
    }
    budgets[s.target] = target
    # Only the first process computes these, and a sharded model needs all.
    development = [] if cfg.model.shard else text.development
    curve = PerplexityCurve(development, targets=budgets, batch_size=cfg.corpora.batch_size)
    report = ModuleReport(modules.rows())
    data = CorpusDataModule(train=text.learn, batch_size=cfg.corpora.batch_size, seed=cfg.run.seed)
    numbers = sum(p.numel() for p in stage.parameters() if p.requires_grad)
    trainer = run.trainer(
        f"Learning {numbers} thresholds" if s.learn == "thresholds" else f"Learning {numbers} numbers",
        max_epochs=s.epochs, log_every_n_steps=1, callbacks=[ApplyMasks(), curve, report],
    )  # fmt: skip
    trainer.fit(stage, data)
    run.folder.update_manifest(
        learning={
            "steps": trainer.global_step,
            "development_perplexity_by_epoch": curve.by_epoch,
            "development_perplexity_by_sparsity": {f"{k:g}": v for k, v in sorted(curve.by_sparsity.items())},
        }
    )
    offsets = {f"offsets.{b}": o.detach().cpu() for b, o in enumerate(stage.offsets or ())}
    return named_thresholds(stage.thresholds) | offsets
