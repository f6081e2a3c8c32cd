"""Jaccard index of masks, and its expectation by chance, compared with enumeration and sampling."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch

from experiments.stability import chance_jaccard, jaccard, pairs, stability, tables
from gprune.models.masks import Masks
from gprune.runs.results import FinishedRun


def draw(units: int, kept: int, seed: int) -> torch.Tensor:
    """Return a random mask (units,) that keeps `kept` units."""
    mask = torch.zeros(units, dtype=torch.bool)
    mask[torch.randperm(units, generator=torch.Generator().manual_seed(seed))[:kept]] = True
    return mask


def run_of(seed: int, *ffn: torch.Tensor, model: str = "m") -> FinishedRun:
    """Return a run named `a` with the given masks of its FFNs. No KV group is removed."""
    masks = Masks.of_blocks(list(ffn), [torch.ones(2, dtype=torch.bool)] * len(ffn))
    settings = {"run": {"seed": seed}, "inputs": {"model": model}, "gprune": True}
    return FinishedRun(Path(f"{seed}"), "a", settings, [], {}, masks)


@pytest.mark.parametrize("seed", range(5))
def test_the_jaccard_index_of_masks_is_that_of_the_sets_of_kept_units(seed):
    a, b = draw(30, 12, seed), draw(30, 17, seed + 100)
    first, second = (set(m.nonzero().flatten().tolist()) for m in (a, b))
    assert jaccard(a, b) == len(first & second) / len(first | second) == jaccard(b, a)
    assert jaccard(a, a) == 1
    assert jaccard(a, ~a) == 0
    empty = torch.zeros(8, dtype=torch.bool)
    assert jaccard(empty, empty) == chance_jaccard(8, 0, 0) == 1


@pytest.mark.parametrize(("units", "a", "b"), [(6, 3, 3), (6, 2, 4), (7, 5, 6), (5, 0, 3), (5, 5, 2), (4, 4, 4)])
def test_chance_jaccard_is_the_mean_over_all_pairs_of_sets(units, a, b):
    indices = [
        len(set(x) & set(y)) / len(set(x) | set(y))
        for x in combinations(range(units), a)
        for y in combinations(range(units), b)
    ]
    assert chance_jaccard(units, a, b) == pytest.approx(np.mean(indices), abs=1e-12)
    assert chance_jaccard(units, b, a) == pytest.approx(chance_jaccard(units, a, b), abs=1e-12)


def test_the_stability_of_independent_masks_is_near_0_and_of_equal_masks_1():
    widths = [40, 100, 160]
    a, b = ([draw(200, w, seed + i) for i, w in enumerate(widths)] for seed in (0, 50))
    index, chance, beyond = stability(a, b)
    assert index == pytest.approx(np.mean([jaccard(x, y) for x, y in zip(a, b, strict=True)]))
    assert chance == pytest.approx(np.mean([chance_jaccard(200, w, w) for w in widths]))
    assert abs(beyond) < 0.08
    assert stability(a, a)[2] == pytest.approx(1)
    independent = [stability([draw(50, 20, s)], [draw(50, 20, 10_000 + s)])[2] for s in range(400)]
    assert abs(np.mean(independent)) < 0.015  # unbiased


def test_full_and_empty_blocks_are_excluded():
    """A block counts only if both masks of the block keep some units and remove some."""
    full, empty = torch.ones(20, dtype=torch.bool), torch.zeros(20, dtype=torch.bool)
    a, b = draw(20, 8, 0), draw(20, 8, 1)
    index, chance, _ = stability([full, a, empty, full, empty], [full, b, empty, a, b])
    assert (index, chance) == (jaccard(a, b), pytest.approx(chance_jaccard(20, 8, 8)))
    assert stability([full], [full]) is None


def test_every_pair_of_runs_with_the_same_model_is_compared_once_and_is_a_row_of_the_table():
    """Runs without masks are excluded. No attention is removed, so only the FFN has a stability."""
    runs = [run_of(i, draw(20, 8, i), draw(20, 12, i)) for i in range(3)]
    excluded = [run_of(3, draw(24, 8, 0), model="another"), replace(runs[0], masks=None)]
    comparisons = list(pairs([*runs, *excluded]))
    names = [f"a, seed {i}" for i in range(3)]
    assert [comparison[:3] for comparison in comparisons] == [(a, b, "ffn") for a, b in combinations(names, 2)]
    assert comparisons[1][3:] == stability(runs[0].masks.ffn, runs[2].masks.ffn)
    pair_table, seed_table = tables(runs, of_pairs=True)
    assert len(pair_table.rows) == 3
    beyond = np.mean([comparison[-1] for comparison in comparisons])
    assert [(row[0], row[1], row[-1]) for row in seed_table.rows] == [("a", "ffn", pytest.approx(beyond))]
