"""Ranks, drift, its noise floor, and Kendall agreement, against loops, NumPy and simulations with known results."""

from __future__ import annotations

import math
from itertools import combinations

import numpy as np
import pytest
import torch

from gprune.importance.scores import fractional_ranks
from gprune.partition.drift import (
    half_agreement,
    kendall_agreement,
    module_agreements,
    noise_floor,
    rank_drift,
)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def tau_b(x: np.ndarray, y: np.ndarray) -> float:
    """Kendall's tau-b by the signs of all pairs."""
    signs = [(np.sign(x[i] - x[j]), np.sign(y[i] - y[j])) for i, j in combinations(range(len(x)), 2)]
    different_x, different_y = (sum(pair[side] != 0 for pair in signs) for side in (0, 1))
    return sum(of_x * of_y for of_x, of_y in signs) / math.sqrt(different_x * different_y)


@pytest.mark.parametrize("shape", [(1,), (3, 40), (2, 3, 25)])
def test_fractional_ranks_count_the_smaller_scores_of_the_row_and_half_of_the_equal_ones(shape):
    scores = normal(*shape).mul(2).round()  # with ties
    ranks = fractional_ranks(scores)
    assert ranks.dtype == torch.float64
    assert ranks.shape == scores.shape
    N = shape[-1]
    for mine, row in zip(ranks.reshape(-1, N).tolist(), scores.reshape(-1, N).tolist(), strict=True):
        expected = [(sum(s < score for s in row) + sum(s == score for s in row) / 2) / N for score in row]
        np.testing.assert_allclose(mine, expected, rtol=1e-15)


def test_fractional_ranks_equal_values_computed_by_hand():
    expected = torch.tensor([0.125, 0.5, 0.5, 0.875], dtype=torch.float64)
    assert torch.equal(fractional_ranks(torch.tensor([-1.0, 2.0, 2.0, 5.0])), expected)
    assert fractional_ranks(torch.tensor([3.0, 3.0, 1.0, 2.0]), groups=2).tolist() == [0.5, 0.5, 0.25, 0.75]
    assert fractional_ranks(torch.tensor([3.0, 3.0]), ties="ordinal").tolist() == [0.25, 0.75]
    # Scores that are equal only in float32 are not tied.
    assert fractional_ranks(torch.tensor([1.0, 1.0 + 1e-12], dtype=torch.float64)).tolist() == [0.25, 0.75]


def test_rank_drift_is_the_population_standard_deviation():
    ranks = fractional_ranks(normal(4, 100))
    np.testing.assert_allclose(rank_drift(ranks).numpy(), ranks.numpy().std(axis=0), rtol=1e-12)
    assert rank_drift(torch.tensor([[0.1, 0.4], [0.5, 0.4]], dtype=torch.float64)).tolist() == pytest.approx([0.2, 0])
    assert torch.equal(rank_drift(ranks[:1]), torch.zeros(100, dtype=torch.float64))  # a single corpus has no drift


@pytest.mark.parametrize("D", [2, 3, 6])
def test_the_noise_floor_equals_the_drift_caused_by_noise(D):
    """Noise is small relative to the spread of scores, so ranks are linear in scores, as the estimate assumes."""
    half = normal(20000, seed=1) + 0.1 * normal(D, 2, 20000, seed=3)  # the mean of halves is the full-sample score
    drift, floor = rank_drift(fractional_ranks(half.mean(1))), noise_floor(fractional_ranks(half))
    assert drift.mean() > 0.01
    assert float(drift.square().mean() / floor.square().mean()) == pytest.approx(1, abs=0.05)


def test_the_noise_floor_equals_a_value_computed_by_hand():
    half_ranks = torch.tensor([[[0.5], [0.9]], [[0.2], [0.2]], [[0.4], [0.2]]], dtype=torch.float64)
    expected = math.sqrt((2 / 3) * (0.2**2 + 0 + 0.1**2) / 3)
    assert float(noise_floor(half_ranks)) == pytest.approx(expected, rel=1e-12)
    assert float(noise_floor(half_ranks[:1])) == 0  # a single corpus has no drift and no noise floor


@pytest.mark.parametrize("ties", [False, True])
def test_kendall_agreement_is_the_mean_over_pairs_of_corpora(ties):
    scores = normal(4, 60) + 2 * normal(60, seed=9)
    if ties:
        scores = scores.round()
    pairs = [tau_b(scores[a].numpy(), scores[b].numpy()) for a, b in combinations(range(4), 2)]
    assert kendall_agreement(scores) == pytest.approx(np.mean(pairs), rel=1e-12)


def test_kendall_agreement_is_nan_for_few_neurons_one_corpus_or_constant_scores():
    scores = normal(3, 16)
    assert not math.isnan(kendall_agreement(scores))
    assert math.isnan(kendall_agreement(scores[:, :15]))  # too few neurons
    assert math.isnan(kendall_agreement(scores[:1]))  # no pair of corpora
    scores[1] = 4.0
    assert math.isnan(kendall_agreement(scores))  # constant


def test_module_agreements_compare_neurons_of_the_same_module_only():
    labels = torch.arange(70) % 3
    labels[labels == 2] = torch.where(torch.arange(int((labels == 2).sum())) < 10, 2, 0)  # module 2 is too small
    scores = normal(3, 70)
    scores[:, labels == 1] = normal(int((labels == 1).sum()), seed=4)  # equal on all corpora
    agreements = module_agreements(scores, labels)
    assert agreements.shape == (3,)
    assert float(agreements[0]) == pytest.approx(kendall_agreement(scores[:, labels == 0]))
    assert float(agreements[1]) == pytest.approx(1)
    assert math.isnan(agreements[2])


def test_half_agreement_is_the_mean_over_corpora():
    halves = normal(3, 2, 40)
    halves[:, 1] += halves[:, 0]
    taus = [tau_b(a, b) for a, b in halves.numpy()]
    assert 0.3 < np.mean(taus) < 0.9
    assert float(half_agreement(fractional_ranks(halves))) == pytest.approx(np.mean(taus), rel=1e-12)
    assert float(half_agreement(fractional_ranks(halves[:1]))) == pytest.approx(taus[0], rel=1e-12)
