"""Steps 2, 7 and 8: scores, masks of the base metric, learned thresholds, and masks that meet the budget."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from lightning.pytorch.loggers import Logger
from torch import Tensor

from gprune.calibration.errors import block_errors
from gprune.calibration.statistics import CorpusStatistics, pool_statistics
from gprune.checks import select_options
from gprune.errors import UserError
from gprune.evaluation.perplexity import perplexity
from gprune.importance.scores import Scores, score_units
from gprune.models.masks import Masks
from gprune.partition.modules import ModuleRanks, Modules
from gprune.partition.reliability import module_means
from gprune.pipeline.cost import error_windows, measured_for
from gprune.pipeline.run import Run
from gprune.registry import LEARNER
from gprune.runs.tracking import log_scalars
from gprune.sparsity.allocation import ALLOCATION, allocate, module_thresholds
from gprune.sparsity.budget import Budget, choose_blocks
from gprune.sparsity.gates import bypassed
from gprune.sparsity.returned import checked_masks, checked_pair
from gprune.sparsity.thresholds import (
    Thresholds,
    masks_from_thresholds,
    named_thresholds,
    start_thresholds,
    thresholds_from_named,
)
from gprune.stages.callbacks import ApplyMasks, PerplexityCurve

MasksOf = Callable[[Budget], Masks]  # masks of a stage as a function of the budget


def score(run: Run, statistics: Mapping[str, CorpusStatistics]) -> Scores:
    """Step 2: importance of every unit by the base metric, on `corpora.score`."""
    run.step(2, "Scoring")
    return _scored(run, statistics[run.cfg.corpora.score])


def _scored(run: Run, statistics: CorpusStatistics) -> Scores:
    cfg = run.cfg
    return score_units(cfg.importance, run.blocks, statistics, seed=cfg.run.seed, attention=cfg.attention)


def without_blocks(run: Run, statistics: Mapping[str, CorpusStatistics]) -> Run:
    """Return the run with a budget in which whole blocks are removed; the same run if blocks are not in scope."""
    cfg, s = run.cfg, run.cfg.sparsity
    if "blocks" not in s.scope:
        return run

    def loss(gone: list[int]) -> float:
        texts = (run.text.train[corpus] for corpus in cfg.corpora.drift)
        with bypassed(run.model, gone):
            return sum(perplexity(run.model, replace(w, tokens=w.tokens[:1])).nll for w in texts)

    def chosen() -> dict[str, Tensor]:
        if s.block_choice == "influence":
            return {"gone": statistics[cfg.corpora.score].influence.argsort(stable=True)}
        return {"gone": torch.tensor(choose_blocks(run.budget, loss), dtype=torch.long)}

    budget = run.budget.without(run.folder.tensors("blocks", chosen)["gone"].tolist())
    gone = ", ".join(map(str, budget.costs.removed_layers)) or "none, as a block is more than --sparsity.block_share"
    run.step(2, f"Removing whole blocks: {gone}")
    return run.within(budget)


def base_masks(run: Run, statistics: Mapping[str, CorpusStatistics], scores: Scores) -> dict[str, MasksOf]:
    """Return masks of the base metric, with sparsity allocated to blocks by `--sparsity.allocation` (or `.start`).

    Returns:
        Functions of a budget: `base`, by `scores`, unless errors of blocks would be measured for these masks only; and
        `averaged`, if it is a row of the result table, by the same metric on pooled statistics of all drift corpora.
    """
    cfg, masks_of = run.cfg, {}
    if not cfg.measures_errors or "base" in measured_for(cfg):
        masks_of["base"] = allocated(run, "base", scores, statistics, [cfg.corpora.score])
    if "averaged" in dict(cfg.stages):
        averaged = _scored(run, pool_statistics(statistics[corpus] for corpus in cfg.corpora.drift))
        masks_of["averaged"] = allocated(run, "averaged", averaged, statistics, cfg.corpora.drift)
    return masks_of


def allocated(
    run: Run, name: str, scores: Scores, statistics: Mapping[str, CorpusStatistics], corpora: Sequence[str]
) -> MasksOf:
    """Return masks by scores, with sparsity allocated to blocks by `--sparsity.allocation` (or `.start`).

    Args:
        run: the run.
        name: `base`, `averaged` or `modules`, for allocations that need errors of blocks.
        scores: of all units.
        statistics: by corpus.
        corpora: the corpora whose pooled statistics the allocation reads.
    """
    cfg = run.cfg
    cached: dict[int, Masks] = {}

    def pool() -> CorpusStatistics:
        """Pool the statistics in each call. They are not kept, because of the size of their Gram matrices."""
        return pool_statistics(statistics[corpus] for corpus in corpora)

    errors = errors_of(run, name, scores, pool()) if cfg.measures_errors else None

    def masks(budget: Budget) -> Masks:
        if budget.target not in cached:
            read = replace(pool(), errors=errors)
            cached[budget.target] = allocate(
                cfg.base_allocation, scores, read, run.blocks, budget, **cfg.sparsity.options
            )
        return cached[budget.target]

    return masks


def errors_of(run: Run, name: str, scores: Scores, statistics: CorpusStatistics) -> Tensor:
    """Return `calibration.errors.block_errors` for neurons in the order of scores, computed once per run and `name`.

    The text is `error_windows` windows of each corpus of `cost.measured_for`. A float32 model is computed in the
    precision of learning, which is part of the run's key.
    """
    cfg, windows, corpora = run.cfg, error_windows(run.cfg), measured_for(run.cfg)[name]
    size, length = cfg.corpora.batch_size, cfg.corpora.seq_len
    bfloat16 = cfg.model.dtype == "float32" and cfg.trainer.precision == "bf16-mixed"
    batches = [ids for corpus in corpora for ids in run.text.train[corpus].tokens[:windows].split(size)]

    def compute() -> dict[str, Tensor]:
        step = 7 if name == "modules" else 2
        run.step(step, f"Measuring the loss caused by errors of {name} on {len(corpora) * windows * length:,} tokens")
        errors = block_errors(run.model, scores.ffn, statistics, batches, ridge=cfg.ridge, bfloat16=bfloat16)
        return {"errors": errors}

    return run.folder.tensors(f"errors_{name}", compute)["errors"]


@dataclass(frozen=True)
class ModuleMasks:
    """Masks of modules as a function of the budget, the result of step 7.

    Attributes:
        modules: the modules.
        thresholds: returns thresholds, offsets and masks for a budget, by the names under which they are saved.
    """

    modules: Modules
    thresholds: Callable[[Budget], dict[str, Tensor]]

    def __call__(self, budget: Budget) -> Masks:
        """Return the masks for a budget (see `saved_masks`)."""
        return saved_masks(self.modules.ranks, self.thresholds(budget), budget)


def learn_sparsity(
    run: Run, statistics: Mapping[str, CorpusStatistics], scores: Scores, modules: Modules, base: MasksOf | None
) -> ModuleMasks:
    """Step 7: compute or learn thresholds per module, which give masks for any budget.

    Args:
        run: the run; thresholds are learned at its budget.
        statistics: by corpus.
        scores: of the base metric.
        modules: the modules.
        base: masks of the base metric. Unless the allocation is a rule for modules, every module keeps as many neurons
            as these masks keep of it. Learning starts there too. An allocation that needs errors of blocks measures
            those of the modules instead, whose neurons are removed in another order.

    Raises:
        UserError: if the target is a quality, and the learner's masks do not follow from its thresholds.
    """
    name, ranks = run.cfg.sparsity.allocation, modules.ranks
    rule = ALLOCATION[name]
    run.step(7, "Learning sparsity" if rule.learned else "Allocating sparsity")
    if run.cfg.measures_errors:
        base = allocated(run, "modules", replace(scores, ffn=ranks.ffn), statistics, run.cfg.corpora.drift)

    def start(budget: Budget) -> Thresholds:
        return module_thresholds(name, base(budget), ranks) if rule.modules else start_thresholds(base(budget), ranks)

    if not rule.learned:
        return ModuleMasks(modules, lambda budget: named_thresholds(start(budget)))
    tensors = run.folder.tensors("thresholds", lambda: fit_thresholds(run, modules, start(run.budget)))
    if run.cfg.sparsity.quality and "masks.ffn.0" in tensors:
        reason = "the masks of a quality target must follow from its thresholds"
        raise UserError(f"--sparsity.learner {run.cfg.sparsity.learner} needs a share such as 0.3 as target: {reason}.")
    return ModuleMasks(modules, lambda _: tensors)


def meet_budget(run: Run, masks_of: Mapping[str, MasksOf]) -> tuple[Thresholds | None, dict[str, Masks]]:
    """Step 8: return the thresholds of modules, if there are any, and masks of all stages that meet the budget."""
    run.step(8, "Meeting the budget")
    masks = {stage: of(run.budget) for stage, of in masks_of.items()}
    if not isinstance(ours := masks_of.get("gprune"), ModuleMasks):
        return None, masks
    tensors = run.folder.tensors("thresholds", lambda: ours.thresholds(run.budget))
    log_modules(run.loggers, ours.modules, masks["gprune"])
    return thresholds_from_named(tensors), masks


def saved_masks(ranks: ModuleRanks, tensors: Mapping[str, Tensor], budget: Budget) -> Masks:
    """Return the masks of step 7: the learner's masks if they were saved, otherwise masks of thresholds and offsets."""
    if own := {name.removeprefix("masks."): t for name, t in tensors.items() if name.startswith("masks.")}:
        return Masks.from_tensors(own)
    if "offsets.0" in tensors:
        ranks = ranks.with_offsets([tensors[f"offsets.{b}"] for b in range(len(ranks.ffn))])
    return masks_from_thresholds(ranks, thresholds_from_named(tensors), budget)


def fit_thresholds(run: Run, modules: Modules, start: Thresholds) -> dict[str, Tensor]:
    """Fit the learner of step 7. Its masks are applied whenever development perplexity is measured.

    Returns:
        Thresholds and, if they were learned, offsets, by the names under which they are saved. The masks are included
        if they do not follow from thresholds and offsets.
    """
    cfg, s = run.cfg, run.cfg.sparsity
    options = cfg.options.get(s.learner, {})
    for kind in start:  # removed blocks get mean thresholds, as other sparsities of the curve may keep them
        mean = torch.cat([kind[b] for b in run.budget.costs.remaining_blocks]).mean()
        for b in run.budget.costs.removed_blocks:
            kind[b] = torch.full_like(kind[b], mean)
    learner, settings = LEARNER[s.learner], dict(s) | {"shard": cfg.model.shard}
    stage = learner(run.model, modules.ranks, start, run.budget, **select_options(learner, settings) | options)
    budgets = {run.budget.sparsity: run.budget} | {v: run.budget.at(v) for v in cfg.evaluation.curve if v != s.target}

    def masks_at(budget: Budget) -> Masks:
        return checked_masks(LEARNER, s.learner, stage.masks(budget), budget)

    curve, apply = PerplexityCurve(), ApplyMasks(lambda: masks_at(run.budget))
    numbers = sum(p.numel() for p in stage.parameters() if p.requires_grad)
    what = f"Learning {numbers} {'thresholds' if s.learn == 'thresholds' else 'numbers'}"
    trainer, data = run.fit(
        "thresholds", what, stage, run.text.learn, role="learn", max_epochs=s.epochs, callbacks=[curve, apply]
    )
    if curve.by_step:
        masks_by_sparsity = {0.0: None} | {sparsity: masks_at(budget) for sparsity, budget in budgets.items()}
        curve.against_sparsity(trainer, stage, data, masks_by_sparsity)
        run.check_weights(type(stage).__name__)
    run.folder.update_manifest(
        learning={
            "steps": trainer.global_step,
            "development_perplexity_by_epoch": list(curve.by_step.values()),
            "development_perplexity_by_sparsity": {f"{k:g}": v for k, v in sorted(curve.by_sparsity.items())},
        }
    )
    masks = masks_at(run.budget)
    kept = {f"masks.{name}": mask for name, mask in masks.tensors().items()}
    if (thresholds := getattr(stage, "thresholds", None)) is None:
        return kept
    sizes = [modules.ranks.modules, [1] * len(run.blocks)]
    tensors = named_thresholds(checked_pair(LEARNER, s.learner, "thresholds", thresholds, sizes))
    tensors |= {f"offsets.{b}": o.detach().cpu() for b, o in enumerate(getattr(stage, "offsets", None) or ())}
    return tensors if saved_masks(modules.ranks, tensors, run.budget) == masks else tensors | kept


def log_modules(loggers: Sequence[Logger], modules: Modules, masks: Masks) -> None:
    """Log the measurements of each module, and its sparsity, which is the share of its neurons that masks remove."""
    removed = [module_means(~keep, y) for keep, y in zip(masks.ffn, modules.labels, strict=True)]
    names = ("sensitivity", "noise_floor", "agreement", "sparsity")
    for step, row in enumerate(modules.rows()):
        row["sparsity"] = float(removed[row["block"]][row["module"]])
        scalars = {f"modules/{name}": float(row[name]) for name in names if row[name] is not None}
        log_scalars(loggers, {"modules/index": float(step)} | scalars, step=step)
