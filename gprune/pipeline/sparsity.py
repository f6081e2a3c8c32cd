"""Steps 2, 7 and 8: scores, masks of the base metric, learned thresholds, and the masks that meet the budget."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from lightning.pytorch.loggers import Logger
from torch import Tensor

from gprune.calibration.errors import block_errors
from gprune.calibration.statistics import CorpusStatistics, pooled
from gprune.checks import accepted
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
from gprune.sparsity.budget import Budget, least_missed
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

MasksOf = Callable[[Budget], Masks]  # the masks of a stage, as a function of the budget


def score(run: Run, statistics: Mapping[str, CorpusStatistics]) -> Scores:
    """Step 2: importance of every unit by the base metric, on `corpora.score`."""
    run.step(2, "Scoring")
    return _scored(run, statistics[run.cfg.corpora.score])


def _scored(run: Run, statistics: CorpusStatistics) -> Scores:
    cfg = run.cfg
    return score_units(cfg.importance, run.blocks, statistics, seed=cfg.run.seed, attention=cfg.attention)


def without_blocks(run: Run, statistics: Mapping[str, CorpusStatistics]) -> Run:
    """The run whose budget knows the blocks that go as a whole; the same run where none may."""
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
        return {"gone": torch.tensor(least_missed(run.budget, loss), dtype=torch.long)}

    budget = run.budget.without(run.folder.tensors("blocks", chosen)["gone"].tolist())
    run.step(2, f"Whole blocks that go: {', '.join(map(str, budget.costs.gone_layers)) or 'none fits its share'}")
    return run.within(budget)


def base_masks(run: Run, statistics: Mapping[str, CorpusStatistics], scores: Scores) -> dict[str, MasksOf]:
    """Masks of the base metric alone, its sparsity spread over blocks by `--sparsity.allocation` (or `.start`).

    Returns:
        Functions of a budget: `base`, by `scores`, unless errors of blocks would be measured for it alone; and
        `averaged`, where it is a row of the table: by the same metric on all drift corpora together.
    """
    cfg, masks_of = run.cfg, {}
    if not cfg.measures_errors or "base" in measured_for(cfg):
        masks_of["base"] = allocated(run, "base", scores, statistics, [cfg.corpora.score])
    if "averaged" in dict(cfg.stages):
        averaged = _scored(run, pooled(statistics[corpus] for corpus in cfg.corpora.drift))
        masks_of["averaged"] = allocated(run, "averaged", averaged, statistics, cfg.corpora.drift)
    return masks_of


def allocated(
    run: Run, name: str, scores: Scores, statistics: Mapping[str, CorpusStatistics], corpora: Sequence[str]
) -> MasksOf:
    """Masks by scores, their sparsity spread over blocks by `--sparsity.allocation` (or `.start`).

    Args:
        name: `base`, `averaged` or `modules`, for errors that the allocation may read.
        corpora: whose statistics, pooled, the allocation reads.
    """
    cfg, made = run.cfg, {}

    def pool() -> CorpusStatistics:
        """Anew each time: its Gram matrices are as large as those of a corpus."""
        return pooled(statistics[corpus] for corpus in corpora)

    errors = errors_of(run, name, scores, pool()) if cfg.measures_errors else None

    def masks(budget: Budget) -> Masks:
        if budget.target not in made:
            read = replace(pool(), errors=errors)
            made[budget.target] = allocate(
                cfg.base_allocation, scores, read, run.blocks, budget, **cfg.sparsity.options
            )
        return made[budget.target]

    return masks


def errors_of(run: Run, name: str, scores: Scores, statistics: CorpusStatistics) -> Tensor:
    """`calibration.errors.block_errors` of the neurons in the order of these scores, once for each run and `name`.

    The text is that of `cost.measured_for`, `error_windows` windows of each corpus. A float32 model computes in the
    precision of learning, which is part of the run's key.
    """
    cfg, windows, corpora = run.cfg, error_windows(run.cfg), measured_for(run.cfg)[name]
    size, length = cfg.corpora.batch_size, cfg.corpora.seq_len
    bfloat16 = cfg.model.dtype == "float32" and cfg.trainer.precision == "bf16-mixed"
    batches = [ids for corpus in corpora for ids in run.text.train[corpus].tokens[:windows].split(size)]

    def compute() -> dict[str, Tensor]:
        step = 7 if name == "modules" else 2
        run.step(step, f"Measuring what errors of {name} cost, on {len(corpora) * windows * length:,} tokens")
        errors = block_errors(run.model, scores.ffn, statistics, batches, ridge=cfg.ridge, bfloat16=bfloat16)
        return {"errors": errors}

    return run.folder.tensors(f"errors_{name}", compute)["errors"]


@dataclass(frozen=True)
class ModuleMasks:
    """The masks of modules as a function of a budget: what step 7 has found.

    Attributes:
        modules: the modules.
        thresholds: by budget, thresholds, offsets and masks by the names under which they are saved.
    """

    modules: Modules
    thresholds: Callable[[Budget], dict[str, Tensor]]

    def __call__(self, budget: Budget) -> Masks:
        """The masks of the thresholds at this budget, unless the learner's own are kept beside them."""
        return saved_masks(self.modules.ranks, self.thresholds(budget), budget)


def learn_sparsity(
    run: Run, statistics: Mapping[str, CorpusStatistics], scores: Scores, modules: Modules, base: MasksOf | None
) -> ModuleMasks:
    """Step 7: thresholds per module, which give masks for any budget; learned at the budget of the run, if they are.

    Args:
        scores: of the base metric.
        base: its masks. Where the allocation is no rule for modules, every module keeps as much as they keep of it;
            learning starts there too. An allocation that reads errors gets those of modules in place of these masks,
            since neurons of modules leave in another order.

    Raises:
        UserError: where the target is a quality, for a learner whose masks do not follow from its thresholds.
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
        raise UserError(
            "--sparsity.target: the learner's masks do not follow from its thresholds, so they cannot be cut at the "
            "share that keeps a quality; expected a share, such as 0.3."
        )
    return ModuleMasks(modules, lambda _: tensors)


def meet_budget(run: Run, masks_of: Mapping[str, MasksOf]) -> tuple[Thresholds | None, dict[str, Masks]]:
    """Step 8: the thresholds of modules, if there are any, and the masks of every stage that meet the budget."""
    run.step(8, "Meeting the budget")
    masks = {stage: of(run.budget) for stage, of in masks_of.items()}
    if not isinstance(ours := masks_of.get("gprune"), ModuleMasks):
        return None, masks
    tensors = run.folder.tensors("thresholds", lambda: ours.thresholds(run.budget))
    log_modules(run.loggers, ours.modules, masks["gprune"])
    return thresholds_from_named(tensors), masks


def saved_masks(ranks: ModuleRanks, tensors: Mapping[str, Tensor], budget: Budget) -> Masks:
    """The masks that step 7 has found: those of its thresholds and offsets, unless its own are kept beside them."""
    if own := {name.removeprefix("masks."): t for name, t in tensors.items() if name.startswith("masks.")}:
        return Masks.from_tensors(own)
    if "offsets.0" in tensors:
        ranks = ranks.moved([tensors[f"offsets.{b}"] for b in range(len(ranks.ffn))])
    return masks_from_thresholds(ranks, thresholds_from_named(tensors), budget)


def fit_thresholds(run: Run, modules: Modules, start: Thresholds) -> dict[str, Tensor]:
    """Step 7, computed: fit the learner, with its masks applied whenever development text is measured.

    Returns:
        Thresholds, and offsets where they were learned, by the names under which they are saved; of a learner whose
        masks are others than these give, its masks.
    """
    cfg, s = run.cfg, run.cfg.sparsity
    options = cfg.options.get(s.learner, {})
    for kind in start:  # a block that is gone, and that a point of the curve keeps, is as sparse there as others are
        mean = torch.cat([kind[b] for b in run.budget.costs.stay]).mean()
        for b in run.budget.costs.gone:
            kind[b] = torch.full_like(kind[b], mean)
    learner, settings = LEARNER[s.learner], dict(s) | {"shard": cfg.model.shard}
    stage = learner(run.model, modules.ranks, start, run.budget, **accepted(learner, settings) | options)
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
    """Log what was measured of each module, and its sparsity, the fraction of its neurons that the masks remove."""
    removed = [module_means(~keep, y) for keep, y in zip(masks.ffn, modules.labels, strict=True)]
    names = ("sensitivity", "noise_floor", "agreement", "sparsity")
    for step, row in enumerate(modules.rows()):
        row["sparsity"] = float(removed[row["block"]][row["module"]])
        scalars = {f"modules/{name}": float(row[name]) for name in names if row[name] is not None}
        log_scalars(loggers, {"modules/index": float(step)} | scalars, step=step)
