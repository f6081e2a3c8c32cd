"""Jaccard index of masks against sets, and its expectation under chance against enumeration and drawing."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import torch

from gprune.errors import UserError
from gprune.evaluation.stability import chance_jaccard, jaccard, pairwise_stability, stability
from gprune.models.masks import Masks


def draw(units: int, kept: int, seed: int) -> torch.Tensor:
    mask = torch.zeros(units, dtype=torch.bool)
    mask[torch.randperm(units, generator=torch.Generator().manual_seed(seed))[:kept]] = True
    return mask


def masks_of(*ffn: torch.Tensor, groups: int = 2) -> Masks:
    return Masks(list(ffn), [torch.ones(groups, dtype=torch.bool)] * len(ffn))


@pytest.mark.parametrize("seed", range(5))
def test_jaccard_is_that_of_sets(seed):
    a, b = draw(30, 12, seed), draw(30, 17, seed + 100)
    first, second = (set(m.nonzero().flatten().tolist()) for m in (a, b))
    assert jaccard(a, b) == len(first & second) / len(first | second) == jaccard(b, a)
    assert jaccard(a, a) == 1
    assert jaccard(a, ~a) == 0


@pytest.mark.parametrize(("units", "a", "b"), [(6, 3, 3), (6, 2, 4), (7, 5, 6), (5, 0, 3), (5, 5, 2), (4, 4, 4)])
def test_chance_is_the_mean_over_all_pairs_of_sets(units, a, b):
    found = [
        len(set(x) & set(y)) / len(set(x) | set(y))
        for x in combinations(range(units), a)
        for y in combinations(range(units), b)
    ]
    assert chance_jaccard(units, a, b) == pytest.approx(np.mean(found), abs=1e-12)
    assert chance_jaccard(units, b, a) == pytest.approx(chance_jaccard(units, a, b), abs=1e-12)


def test_empty_masks():
    assert chance_jaccard(8, 0, 0) == 1
    assert jaccard(torch.zeros(8, dtype=torch.bool), torch.zeros(8, dtype=torch.bool)) == 1


def test_independent_masks_are_at_chance_and_equal_ones_far_above():
    widths = [40, 100, 160]
    a, b = ([draw(200, w, seed + i) for i, w in enumerate(widths)] for seed in (0, 50))
    found = stability(a, b)
    assert found.jaccard == pytest.approx(np.mean([jaccard(x, y) for x, y in zip(a, b, strict=True)]))
    assert found.chance == pytest.approx(np.mean([chance_jaccard(200, w, w) for w in widths]))
    assert abs(found.beyond_chance) < 0.08
    assert stability(a, a).beyond_chance == pytest.approx(1)
    drawn = [stability([draw(50, 20, s)], [draw(50, 20, 10_000 + s)]).beyond_chance for s in range(400)]
    assert abs(np.mean(drawn)) < 0.015  # unbiased


def test_agreement_on_widths_alone_is_no_stability():
    # both runs prune block 0 hard and block 1 little, and agree on nothing else
    a, b = ([draw(100, 10, s), draw(100, 90, s + 1)] for s in (0, 7))
    assert stability(a, b).beyond_chance < 0.1


def test_blocks_that_say_nothing_are_left_out():
    whole, none = torch.ones(20, dtype=torch.bool), torch.zeros(20, dtype=torch.bool)
    a, b = draw(20, 8, 0), draw(20, 8, 1)
    agreement = stability([whole, a, none, whole, none], [whole, b, none, a, b])
    assert agreement == (jaccard(a, b), pytest.approx(chance_jaccard(20, 8, 8)))
    assert stability([whole], [whole]) is None


def test_every_pair_of_runs_once():
    runs = {name: masks_of(draw(20, 8, i), draw(20, 12, i)) for i, name in enumerate("abc")}
    found = pairwise_stability(runs)
    assert list(found) == [("a", "b"), ("a", "c"), ("b", "c")]
    assert found["a", "c"]["ffn"] == stability(runs["a"].ffn, runs["c"].ffn)
    assert "attention" not in found["a", "c"]  # out of scope: nothing was chosen
    assert pairwise_stability({"a": runs["a"]}) == {}


def test_masks_of_other_shapes_cannot_be_compared():
    with pytest.raises(UserError, match="a and b are of models of different shapes"):
        pairwise_stability({"a": masks_of(draw(20, 8, 0)), "b": masks_of(draw(24, 8, 0))})
