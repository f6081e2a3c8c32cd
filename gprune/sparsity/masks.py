"""Masks of a run as a function of the budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import pad

from gprune.calibration.statistics import CorpusStatistics, pool_statistics
from gprune.importance.scores import Scores
from gprune.models.masks import Masks
from gprune.partition.modules import ModuleRanks, Modules
from gprune.sparsity.allocation import allocate, module_thresholds
from gprune.sparsity.budget import Budget
from gprune.sparsity.thresholds import ModuleSparsity


@dataclass(frozen=True)
class MaskFunction:
    """Masks for any budget, unless a learner returned masks for one.

    Sparsity is allocated to blocks by scores. If there are modules, their thresholds follow from the resulting masks,
    unless the sparsity of modules is learned.
    """

    allocation: str  # allocation to blocks
    options: Mapping[str, float]  # of the allocation
    layers: Sequence[nn.Module]
    scores: Scores
    statistics: Sequence[CorpusStatistics]  # of the corpora of the scores
    errors: Tensor | None = None  # `CorpusStatistics.errors`, if the allocation reads them
    modules: Modules | None = None
    module_allocation: str = ""  # allocation to modules
    learned: ModuleSparsity | None = None
    # `Budget.key` -> masks; a copy with the same scores of neurons and KV groups shares it
    _allocated: dict[tuple[Any, ...], Masks] = field(default_factory=dict)

    def __call__(self, budget: Budget) -> Masks:
        """Return the masks for a budget. The scores choose which experts are removed as a whole."""
        budget = budget.ranked_by(self.scores)
        if self.modules is None:
            return self.allocated(budget)
        return self.module_sparsity(budget).masks(self.modules.ranks, budget)

    def allocated(self, budget: Budget) -> Masks:
        """Return the masks without modules for a budget that is ranked by the scores, computed once per budget."""
        key = budget.key
        if key not in self._allocated:
            # Statistics are pooled in each call and not kept, because of the size of their Gram matrices.
            statistics = replace(pool_statistics(self.statistics), errors=self.errors)
            masks = allocate(self.allocation, self.scores, statistics, self.layers, budget, **self.options)
            self._allocated[key] = masks
        return self._allocated[key]

    @property
    def for_one_budget(self) -> bool:
        """Whether the masks are those of a learner, whatever the budget."""
        return self.learned is not None and self.learned.fixed_masks is not None

    def module_sparsity(self, budget: Budget) -> ModuleSparsity:
        """Return the sparsity of modules: the learned one, or thresholds for a budget that is ranked by the scores."""
        if self.learned is not None:
            return self.learned
        masks, ranks = Masks(budget.of_kept_experts(self.allocated(budget))), self.modules.ranks
        kept = ModuleRanks(budget.of_kept_experts(ranks.p), budget.of_kept_experts(ranks.labels))
        thresholds = module_thresholds(self.module_allocation, masks, kept)
        # The last modules of a block may have only neurons that are removed as a whole.
        return ModuleSparsity({key: pad(t, (0, ranks.modules[key] - len(t))) for key, t in thresholds.items()})
