"""Pruning in steps: `--sparsity.schedule` prunes, recovers, and scores again what is left, before the target is met."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from gprune.calibration.statistics import CorpusStatistics
from gprune.corpora.windows import Windows
from gprune.models.blocks import blocks_of
from gprune.models.loading import fingerprint
from gprune.models.masks import Masks
from gprune.partition.modules import Modules
from gprune.pipeline.recover import shrink
from gprune.pipeline.run import Run
from gprune.sparsity.budget import Budget, unit_costs
from gprune.sparsity.thresholds import Thresholds

log = logging.getLogger("gprune")


@dataclass(frozen=True)
class Chosen:
    """What steps 1 to 8 found on a model."""

    statistics: Mapping[str, CorpusStatistics]
    masks: Mapping[str, Masks]  # by stage: `base`, `averaged` and `gprune`
    modules: Modules | None
    thresholds: Thresholds | None


@dataclass(frozen=True)
class LastStep:
    """The run on what the earlier steps of a schedule have left of the dense model."""

    run: Run
    left: Masks | None  # units of the dense model that are left; None: all of them

    def of_dense(self, masks: Masks) -> Masks:
        """Masks of the dense model, from those of what is left of it."""
        return masks if self.left is None else self.left.within(masks)


def prune_earlier_steps(run: Run, choose: Callable[[Run], Chosen]) -> LastStep:
    """Take all steps of `--sparsity.schedule` but the last: choose, prune, recover, and go on with what is left.

    Each step has its own part of the text that recoveries learn from, so that `--distill.tokens` are those of the run.

    Args:
        choose: steps 1 to 8.
    """
    whole, left, steps = run.budget, None, run.cfg.sparsity.steps
    if steps == 1:
        return LastStep(run, None)
    last = replace(run, text=replace(run.text, fresh=share(run.text.fresh, steps - 1, steps)))
    for number, sparsity in enumerate(run.cfg.sparsity.schedule):
        log.info("Step %d of %d: %.0f%% of the scope", number + 1, steps, 100 * sparsity)
        part = replace(
            last,
            folder=run.folder.inside(f"steps/{number + 1}-{sparsity:g}"),
            plan=replace(run.plan, budget=remaining(whole, last, sparsity)),
            text=replace(run.text, fresh=share(run.text.fresh, number, steps)),
        )
        chosen = choose(part)
        masks = chosen.masks[run.cfg.final]
        run.step(9, "Pruning and recovering")
        with part.folder.step("shrink"):
            model = shrink(part, masks, chosen.statistics)
        left = masks if left is None else left.within(masks)
        run.meter.watch(model)
        last = replace(last, model=model, teacher=run.model, fingerprint=fingerprint(model))
    return LastStep(replace(last, plan=replace(run.plan, budget=remaining(whole, last))), left)


def remaining(whole: Budget, run: Run, sparsity: float | None = None) -> Budget:
    """The budget of a run's model.

    Args:
        whole: of the dense model, for the run's target.
        sparsity: of the dense model's scope after this step; None: the run's target.
    """
    s, goal = run.cfg.sparsity, whole
    if sparsity is not None:
        goal = Budget.of(whole.costs, sparsity, whole.width_multiple, flag="sparsity.schedule")
    if run.teacher is None:
        return goal
    costs = unit_costs(blocks_of(run.model), scope=s.scope, protect=s.protect, uniform=s.uniform_width)
    return Budget(costs, goal.target - (whole.costs.total - costs.total), whole.width_multiple)


def share(windows: list[Windows], number: int, of: int) -> list[Windows]:
    """Every `of`-th window of each corpus, from `number` on."""
    return [replace(w, tokens=w.tokens[number::of]) for w in windows]
