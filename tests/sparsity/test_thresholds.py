"""Sparsity of modules: what is stored of learning, and masks for other budgets."""

from __future__ import annotations

import pytest
import torch

from gprune.models.masks import Masks
from gprune.partition.modules import ModuleRanks
from gprune.sparsity.budget import BlockUnits, Budget
from gprune.sparsity.cost import BlockCosts
from gprune.sparsity.thresholds import ModuleSparsity

COSTS = BlockCosts.by_unit(2, 9, 100, neurons=12, groups=2)
BUDGET = Budget([BlockUnits(COSTS, COSTS, layer=b) for b in range(2)], target=20)  # ten of 24 neurons


def random_numbers(*sizes: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(sum(sizes))
    return [torch.rand(size, generator=generator, dtype=torch.float64) for size in sizes]


RANKS = ModuleRanks(random_numbers(12, 12), [torch.arange(12) % 3, torch.arange(12) % 2], random_numbers(2, 2))
THRESHOLDS = random_numbers(3, 2), random_numbers(1, 1)
OTHER_MASKS = Masks([torch.arange(12) < 7] * 2, [torch.ones(2, dtype=torch.bool)] * 2)


@pytest.mark.parametrize(
    ("sparsity", "kinds"),
    [
        (ModuleSparsity(THRESHOLDS), {"ffn", "attention"}),
        (ModuleSparsity(THRESHOLDS, random_numbers(12, 12)), {"ffn", "attention", "offsets"}),
        (ModuleSparsity(None, fixed_masks=OTHER_MASKS), {"masks"}),
        (ModuleSparsity(THRESHOLDS, fixed_masks=OTHER_MASKS), {"ffn", "attention", "masks"}),
    ],
    ids=["thresholds", "and offsets", "masks", "thresholds and masks"],
)
def test_stored_sparsity_of_modules_gives_the_same_masks(sparsity, kinds):
    tensors = sparsity.tensors()
    assert {name.partition(".")[0] for name in tensors} == kinds
    stored = ModuleSparsity.from_tensors({name: tensors[name] for name in sorted(tensors)})
    masks = stored.masks(RANKS, BUDGET)
    assert masks == sparsity.masks(RANKS, BUDGET)
    assert (masks == OTHER_MASKS) == ("masks" in kinds)
    assert sum(int((~mask).sum()) for mask in masks.ffn) == 10
    assert stored.tensors().keys() == tensors.keys()


def test_offsets_shift_ranks():
    offsets = [3 * numbers.flip(0) for numbers in random_numbers(12, 12)]
    shifted = ModuleSparsity(THRESHOLDS, offsets).masks(RANKS, BUDGET)
    assert shifted == ModuleSparsity(THRESHOLDS).masks(RANKS.with_offsets(offsets), BUDGET)
    assert shifted != ModuleSparsity(THRESHOLDS).masks(RANKS, BUDGET)
