"""Steps 2, 7 and 8: scores, masks of the base metric, learned thresholds, and masks that meet the budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache

import torch
from lightning import LightningModule
from lightning.pytorch.loggers import Logger
from torch import Tensor

from gprune.calibration.block_errors import block_errors, error_corpora, error_windows
from gprune.calibration.statistics import CorpusStatistics, pool_statistics
from gprune.checks import select_options, typed_options
from gprune.evaluation.perplexity import perplexity
from gprune.importance.scores import Scores, score_units
from gprune.models.gating import bypassed
from gprune.models.masks import Masks
from gprune.partition.modules import ModuleRanks, Modules, module_means
from gprune.pipeline.quality import with_learning_budget
from gprune.pipeline.run import Run
from gprune.registry import LEARNER
from gprune.runs.tracking import log_scalars
from gprune.sparsity.allocation import ALLOCATION, checked_masks, checked_pair
from gprune.sparsity.budget import Budget
from gprune.sparsity.masks import StageMasks
from gprune.sparsity.thresholds import ModuleSparsity, Thresholds
from gprune.sparsity.whole_blocks import choose_blocks, removed_layers
from gprune.stages.callbacks import ApplyMasks, PerplexityCurve


def score(run: Run, statistics: Mapping[str, CorpusStatistics]) -> dict[str, Scores]:
    """Step 2: stage -> importance of every unit by the base metric, on the corpora of `RunConfig.scored_on`."""
    run.step(2, "Scoring")
    cfg = run.cfg

    @cache
    def score_on(*corpora: str) -> Scores:
        pooled = pool_statistics(statistics[corpus] for corpus in corpora)
        return score_units(cfg.importance, run.blocks, pooled, seed=cfg.run.seed, attention=cfg.attention)

    return {stage: score_on(*corpora) for stage, corpora in cfg.scored_on.items()}


def remove_blocks(run: Run, statistics: Mapping[str, CorpusStatistics]) -> Run:
    """Return the run with a budget in which whole blocks are removed; the same run if blocks are not in scope."""
    cfg, s = run.cfg, run.cfg.sparsity
    if "blocks" not in s.scope:
        return run

    def loss_without(blocks: list[int]) -> float:
        """Return the loss of the model without these blocks: the sum over drift corpora, on one window each."""
        text = (run.text.train[corpus] for corpus in cfg.corpora.drift)
        with bypassed(run.model, blocks):
            return sum(perplexity(run.model, replace(w, tokens=w.tokens[:1])).nll for w in text)

    def choose() -> dict[str, Tensor]:
        """Return blocks in the order of their removal."""
        if s.block_choice == "influence":
            return {"gone": statistics[cfg.corpora.scored[0]].influence.argsort(stable=True)}
        return {"gone": torch.tensor(choose_blocks(run.budget, loss_without), dtype=torch.long)}

    budget = run.budget.without(run.folder.tensors("blocks", choose)["gone"].tolist())
    layers = ", ".join(map(str, removed_layers(budget))) or "none, as a block is more than --sparsity.block_share"
    run.step(2, f"Removing whole blocks: {layers}")
    return run.with_budget(budget)


def base_masks(
    run: Run, statistics: Mapping[str, CorpusStatistics], scores: Mapping[str, Scores]
) -> dict[str, StageMasks]:
    """Return stage -> masks of the base metric, with sparsity allocated by `--sparsity.allocation` (or `.start`)."""
    cfg, masks_of = run.cfg, {}
    for stage, corpora in cfg.scored_on.items():
        if stage != "gprune" and (not cfg.measures_errors or stage in error_corpora(cfg)):
            masks_of[stage] = allocated_masks(run, stage, scores[stage], statistics, corpora)
    return masks_of


def allocated_masks(
    run: Run, name: str, scores: Scores, statistics: Mapping[str, CorpusStatistics], corpora: Sequence[str]
) -> StageMasks:
    """Return masks by scores, with sparsity allocated to blocks by `--sparsity.allocation` (or `.start`)."""
    cfg = run.cfg
    of_corpora = [statistics[corpus] for corpus in corpora]
    return StageMasks(
        allocation=cfg.base_allocation,
        options=typed_options(ALLOCATION[cfg.base_allocation], cfg.sparsity.options),
        blocks=run.blocks,
        scores=scores,
        statistics=of_corpora,
        errors=measured_errors(run, name, scores, pool_statistics(of_corpora)) if cfg.measures_errors else None,
    )


def measured_errors(run: Run, name: str, scores: Scores, statistics: CorpusStatistics) -> Tensor:
    """Return the `block_errors` of neurons in the order of scores, computed once per run and `name`.

    The text is `error_windows` windows of each corpus of `error_corpora`. A float32 model is computed in the
    precision of learning, which is part of the run's key.
    """
    cfg, windows, corpora = run.cfg, error_windows(run.cfg), error_corpora(run.cfg)[name]
    bfloat16 = cfg.model.dtype == "float32" and cfg.trainer.precision == "bf16-mixed"
    batches = [
        ids for corpus in corpora for ids in run.text.train[corpus].tokens[:windows].split(cfg.corpora.batch_size)
    ]

    def compute() -> dict[str, Tensor]:
        step, tokens = 7 if name == "modules" else 2, len(corpora) * windows * cfg.corpora.seq_len
        run.step(step, f"Measuring the loss caused by errors of {name} on {tokens:,} tokens")
        errors = block_errors(run.model, scores.ffn, statistics, batches, ridge=cfg.ridge, bfloat16=bfloat16)
        return {"errors": errors}

    return run.folder.tensors(f"errors_{name}", compute)["errors"]


def learn_sparsity(
    run: Run, statistics: Mapping[str, CorpusStatistics], scores: Scores, modules: Modules,
    masks_of: Mapping[str, StageMasks],
) -> StageMasks:  # fmt: skip
    """Step 7: compute or learn thresholds per module, which give masks for any budget."""
    run = with_learning_budget(run, statistics, masks_of)
    name = run.cfg.sparsity.allocation
    learns = ALLOCATION[name].learned
    run.step(7, "Learning sparsity" if learns else "Allocating sparsity")
    if run.cfg.measures_errors:
        scores_in_modules = replace(scores, ffn=modules.ranks.ffn)
        start = allocated_masks(run, "modules", scores_in_modules, statistics, run.cfg.corpora.drift)
    else:
        start = masks_of["base"]
    masks = replace(start, modules=modules, module_allocation=name)
    if not learns:
        return masks
    tensors = run.folder.tensors("thresholds", lambda: fit_thresholds(run, masks).tensors())
    return replace(masks, learned=ModuleSparsity.from_tensors(tensors))


def meet_budget(run: Run, masks_of: Mapping[str, StageMasks]) -> tuple[Thresholds | None, dict[str, Masks]]:
    """Step 8: return the thresholds of modules, if there are any, and masks of all stages that meet the budget."""
    run.step(8, "Meeting the budget")
    masks = {stage: masks_at(run.budget) for stage, masks_at in masks_of.items()}
    if "gprune" not in masks_of:
        return None, masks
    of_modules = masks_of["gprune"]
    tensors = run.folder.tensors("thresholds", lambda: of_modules.module_sparsity(run.budget).tensors())
    log_modules(run.loggers, of_modules.modules, masks["gprune"])
    return ModuleSparsity.from_tensors(tensors).thresholds, masks


def fit_thresholds(run: Run, masks: StageMasks) -> ModuleSparsity:
    """Fit the learner of step 7. Its masks are applied whenever development perplexity is measured."""
    ranks, start = masks.modules.ranks, masks.module_sparsity(run.budget).thresholds
    cfg, s = run.cfg, run.cfg.sparsity
    _set_removed_to_mean(start, run.budget)
    learner, settings = LEARNER[s.learner], dict(s) | {"shard": cfg.model.shard}
    options = cfg.options.get(s.learner, {})
    stage = learner(run.model, ranks, start, run.budget, **select_options(learner, settings) | options)

    def masks_at(budget: Budget) -> Masks:
        """Return the learner's masks for a budget. Raise UserError if they are invalid."""
        return checked_masks(LEARNER, s.learner, stage.masks(budget), budget)

    curve = PerplexityCurve()
    callbacks = [curve, ApplyMasks(lambda: masks_at(run.budget))]
    num_learned = sum(p.numel() for p in stage.parameters() if p.requires_grad)
    what = f"Learning {num_learned} {'thresholds' if s.learn == 'thresholds' else 'numbers'}"
    trainer, data = run.fit(
        "thresholds", what, stage, run.text.learn, role="learn", max_epochs=s.epochs, callbacks=callbacks
    )
    if curve.by_step:
        budgets = {run.budget.sparsity: run.budget}
        budgets |= {sparsity: run.budget.at(sparsity) for sparsity in cfg.evaluation.curve if sparsity != s.target}
        masks_by_sparsity = {0.0: None} | {sparsity: masks_at(budget) for sparsity, budget in budgets.items()}
        with run.folder.part("curve against sparsity", shared=True):
            curve.against_sparsity(trainer, stage, data, masks_by_sparsity)
    perplexity_by_sparsity = {f"{sparsity:g}": by_corpus for sparsity, by_corpus in sorted(curve.by_sparsity.items())}
    run.folder.update_manifest(
        learning={
            "steps": trainer.global_step,
            "development_perplexity_by_epoch": list(curve.by_step.values()),
            "development_perplexity_by_sparsity": perplexity_by_sparsity,
        }
    )
    return _learned_sparsity(stage, s.learner, ranks, masks_at(run.budget), run.budget)


def _set_removed_to_mean(thresholds: Thresholds, budget: Budget) -> None:
    """Give blocks that the budget removes the mean threshold, in place. Other sparsities of the curve may keep them."""
    for by_block in thresholds:  # of neurons, then of KV groups
        mean = torch.cat([by_block[b] for b in budget.kept]).mean()
        for b in budget.removed:
            by_block[b] = torch.full_like(by_block[b], mean)


def _learned_sparsity(
    stage: LightningModule, learner: str, ranks: ModuleRanks, masks: Masks, budget: Budget
) -> ModuleSparsity:
    """Return what a learner has learned: thresholds and offsets if they give its masks, otherwise its masks too."""
    thresholds = getattr(stage, "thresholds", None)
    if thresholds is None:
        return ModuleSparsity(None, fixed_masks=masks)
    sizes = [ranks.modules, [1] * len(ranks.ffn)]
    offsets = getattr(stage, "offsets", None)
    learned = ModuleSparsity(
        checked_pair(LEARNER, learner, "thresholds", thresholds, sizes),
        [of_block.detach().cpu() for of_block in offsets] if offsets else None,
    )
    return learned if learned.masks(ranks, budget) == masks else replace(learned, fixed_masks=masks)


def log_modules(loggers: Sequence[Logger], modules: Modules, masks: Masks) -> None:
    """Log the measurements of each module, and its sparsity, which is the share of its neurons that masks remove."""
    sparsity = [module_means(~mask, block_labels) for mask, block_labels in zip(masks.ffn, modules.labels, strict=True)]
    names = ("sensitivity", "noise_floor", "agreement", "sparsity")
    for step, row in enumerate(modules.rows()):
        row["sparsity"] = float(sparsity[row["block"]][row["module"]])
        scalars = {f"modules/{name}": float(row[name]) for name in names if row[name] is not None}
        log_scalars(loggers, {"modules/index": float(step)} | scalars, step=step)
