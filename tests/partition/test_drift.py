"""Ranks, drift and its noise floor, Kendall agreement: against scipy, NumPy and simulations with a known answer."""

from __future__ import annotations

import math
from itertools import combinations

import numpy as np
import pytest
import torch
from scipy.stats import kendalltau, rankdata

from gprune.partition.drift import (
    above_noise,
    fractional_ranks,
    half_agreement,
    kendall_agreement,
    module_agreements,
    noise_floor,
    pair_weighted_mean,
    rank_drift,
)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("shape", [(1,), (7,), (3, 40), (2, 3, 25)])
@pytest.mark.parametrize("ties", [False, True])
def test_fractional_ranks_against_scipy_row_by_row(shape, ties):
    scores = normal(*shape)
    if ties:
        scores = scores.round()
    ranks = fractional_ranks(scores)
    assert ranks.dtype == torch.float64
    assert ranks.shape == scores.shape
    N = shape[-1]
    for mine, row in zip(ranks.reshape(-1, N), scores.reshape(-1, N), strict=True):
        from_zero = rankdata(row.numpy(), method="average") - 1
        np.testing.assert_allclose(mine.numpy(), (from_zero + 0.5) / N, rtol=1e-15)
    assert ranks.min() > 0
    assert ranks.max() < 1


def test_fractional_ranks_by_hand():
    expected = torch.tensor([0.125, 0.5, 0.5, 0.875], dtype=torch.float64)
    assert torch.equal(fractional_ranks(torch.tensor([-1.0, 2.0, 2.0, 5.0])), expected)
    # scores that float32 cannot tell apart are not tied
    assert fractional_ranks(torch.tensor([1.0, 1.0 + 1e-12], dtype=torch.float64)).tolist() == [0.25, 0.75]


def test_rank_drift_is_the_population_standard_deviation():
    ranks = fractional_ranks(normal(4, 100))
    np.testing.assert_allclose(rank_drift(ranks).numpy(), ranks.numpy().std(axis=0), rtol=1e-12)
    assert rank_drift(torch.tensor([[0.1, 0.4], [0.5, 0.4]], dtype=torch.float64)).tolist() == pytest.approx([0.2, 0])
    assert torch.equal(rank_drift(ranks[:1]), torch.zeros(100, dtype=torch.float64))  # one corpus has no drift


def simulate(shift: float, *, D: int, N: int = 20000, noise: float = 0.1) -> tuple[torch.Tensor, torch.Tensor]:
    """Drift and floor of scores from two halves whose mean is the full-sample score; `shift` differs by corpus.

    The noise is small beside the spread of scores: there ranks are linear in scores, as the estimate assumes.
    """
    level = normal(N, seed=1)
    half = level + shift * normal(D, 1, N, seed=2) + noise * normal(D, 2, N, seed=3)
    return rank_drift(fractional_ranks(half.mean(1))), noise_floor(fractional_ranks(half))


@pytest.mark.parametrize("D", [2, 3, 6])
def test_the_noise_floor_is_the_drift_of_noise_alone(D):
    drift, floor = simulate(0.0, D=D)
    assert drift.mean() > 0.01
    assert float(drift.square().mean() / floor.square().mean()) == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("D", [2, 3])
def test_a_real_difference_lies_above_the_floor(D):
    drift, floor = simulate(0.5, D=D)
    assert drift.mean() > 2 * floor.mean()
    # and what is left after subtraction is about the drift without noise
    clean, _ = simulate(0.5, D=D, noise=0.0)
    left = (drift.square() - floor.square()).mean()
    assert float(left / clean.square().mean()) == pytest.approx(1, abs=0.05)


def test_noise_floor_by_hand():
    half_ranks = torch.tensor([[[0.5], [0.9]], [[0.2], [0.2]], [[0.4], [0.2]]], dtype=torch.float64)
    expected = math.sqrt((2 / 3) * (0.2**2 + 0 + 0.1**2) / 3)
    assert float(noise_floor(half_ranks)) == pytest.approx(expected, rel=1e-12)
    assert float(noise_floor(half_ranks[:1])) == 0  # one corpus shows no drift, noise or not


def test_above_noise_subtracts_variances_and_stops_at_zero():
    result = above_noise(torch.tensor([0.5, 0.3, 0.0]), torch.tensor([0.3, 0.4, 0.0]))
    np.testing.assert_allclose(result.numpy(), [0.4, 0, 0], rtol=1e-6)


@pytest.mark.parametrize("ties", [False, True])
def test_kendall_agreement_is_the_mean_over_pairs(ties):
    scores = normal(4, 60) + 2 * normal(60, seed=9)
    if ties:
        scores = scores.round()
    pairs = [kendalltau(scores[a].numpy(), scores[b].numpy()).statistic for a, b in combinations(range(4), 2)]
    assert kendall_agreement(scores) == pytest.approx(np.mean(pairs), rel=1e-12)
    if not ties:  # by definition: concordant minus discordant pairs
        i, j = np.triu_indices(60, 1)
        signs = np.sign(scores.numpy()[:, i] - scores.numpy()[:, j])
        naive = np.mean([(signs[a] * signs[b]).mean() for a, b in combinations(range(4), 2)])
        assert kendall_agreement(scores) == pytest.approx(naive, rel=1e-12)


def test_kendall_agreement_where_it_is_undefined():
    scores = normal(3, 16)
    assert not math.isnan(kendall_agreement(scores))
    assert math.isnan(kendall_agreement(scores[:, :15]))  # too few neurons
    assert math.isnan(kendall_agreement(scores[:1]))  # no pair of corpora
    scores[1] = 4.0
    assert math.isnan(kendall_agreement(scores))  # constant


def test_module_agreements_look_inside_modules_only():
    labels = torch.arange(70) % 3
    labels[labels == 2] = torch.where(torch.arange(int((labels == 2).sum())) < 10, 2, 0)  # a module too small
    scores = normal(3, 70)
    scores[:, labels == 1] = normal(int((labels == 1).sum()), seed=4)  # the same on all corpora
    agreements = module_agreements(scores, labels)
    assert agreements.shape == (3,)
    assert float(agreements[0]) == pytest.approx(kendall_agreement(scores[:, labels == 0]))
    assert float(agreements[1]) == pytest.approx(1)
    assert math.isnan(agreements[2])


def test_modules_weigh_by_their_pairs():
    values = torch.tensor([0.5, float("nan"), 0.1], dtype=torch.float64)
    sizes = torch.tensor([20, 500, 100])
    expected = (0.5 * 190 + 0.1 * 4950) / (190 + 4950)
    assert pair_weighted_mean(values, sizes) == pytest.approx(expected, rel=1e-12)
    assert math.isnan(pair_weighted_mean(values[1:2], sizes[1:2]))


def range_matched_agreement(scores: torch.Tensor, labels: torch.Tensor, *, bins: int = 32) -> float:
    """Agreement inside modules beyond what the spread of ranks gives away: 0 for a random partition.

    Two neurons far apart in mean rank hardly ever swap, so a partition that mixes weak and strong neurons shows a
    high tau without any likeness of behaviour. Here each within-module pair is compared with all pairs of the block
    whose mean ranks are as far apart (`bins` quantile classes of that distance): the mean of
    (concordance of the pair - mean concordance of its class), concordance in [-1, 1] averaged over corpus pairs.

    Args:
        scores: (D, N) importance per corpus; D >= 2.
        labels: (N,) module of each neuron.

    Returns:
        Mean excess concordance over within-module pairs, in [-2, 2]. Our own control, not the paper's.
    """
    ranks = fractional_ranks(scores)
    D, N = ranks.shape
    i, j = torch.triu_indices(N, N, 1)
    if len(i) > 3_000_000:  # a sample is plenty, and 11008 neurons would need gigabytes
        pick = torch.randint(len(i), (3_000_000,), generator=torch.Generator().manual_seed(0))
        i, j = i[pick], j[pick]
    order = (ranks[:, i] - ranks[:, j]).sign()
    concordance = torch.stack([order[a] * order[b] for a, b in combinations(range(D), 2)]).mean(0)
    mean_rank = ranks.mean(0)
    gap = (mean_rank[i] - mean_rank[j]).abs()
    edges = torch.from_numpy(np.quantile(gap.numpy(), np.linspace(0, 1, bins + 1)[1:-1]))
    group = torch.bucketize(gap, edges)
    expected = torch.zeros(bins, dtype=torch.float64).scatter_reduce_(0, group, concordance, "mean", include_self=False)
    inside = labels[i] == labels[j]
    return float((concordance - expected[group])[inside].mean())


def naive_agreement(scores: np.ndarray, labels: np.ndarray, bins: int) -> float:
    """The definition, pair by pair in Python."""
    D, N = scores.shape
    ranks = np.stack([(rankdata(row) - 0.5) / N for row in scores])
    mean = ranks.mean(0)
    pairs = [(i, j) for i in range(N) for j in range(i + 1, N)]
    concordance = [
        np.mean([np.sign(ranks[a, i] - ranks[a, j]) * np.sign(ranks[b, i] - ranks[b, j])
                 for a, b in combinations(range(D), 2)])
        for i, j in pairs
    ]  # fmt: skip
    gaps = [abs(mean[i] - mean[j]) for i, j in pairs]
    edges = np.quantile(gaps, np.linspace(0, 1, bins + 1)[1:-1])
    classes = [int((edges < gap).sum()) for gap in gaps]
    expected = {c: np.mean([v for v, k in zip(concordance, classes, strict=True) if k == c]) for c in set(classes)}
    inside = [
        v - expected[c]
        for (i, j), v, c in zip(pairs, concordance, classes, strict=True)
        if labels[i] == labels[j]
    ]  # fmt: skip
    return float(np.mean(inside))


@pytest.mark.parametrize("bins", [4, 32])
def test_range_matched_agreement_against_the_definition(bins):
    scores, labels = normal(3, 50) + normal(50, seed=5), torch.arange(50) % 3
    expected = naive_agreement(scores.numpy(), labels.numpy(), bins)
    assert range_matched_agreement(scores, labels, bins=bins) == pytest.approx(expected, abs=1e-12)


def planted(N: int = 600, K: int = 4, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Neurons of a module move together between corpora: scores (3, N), labels (N,)."""
    labels = torch.randint(K, (N,), generator=torch.Generator().manual_seed(seed))
    together = normal(3, K, seed=seed + 1)[:, labels]
    return normal(N, seed=seed + 2) + together + 0.3 * normal(3, N, seed=seed + 3), labels


def test_range_matched_agreement_is_zero_for_random_partitions():
    scores, labels = planted()
    values = [
        range_matched_agreement(scores, labels[torch.randperm(600, generator=torch.Generator().manual_seed(s))])
        for s in range(10)
    ]
    assert abs(np.mean(values)) < 0.01
    assert max(map(abs, values)) < 0.03


@pytest.mark.parametrize("seed", [0, 10, 20])
def test_range_matched_agreement_finds_planted_modules(seed):
    scores, labels = planted(seed=seed)
    assert range_matched_agreement(scores, labels) > 0.1


def plain(scores: torch.Tensor, labels: torch.Tensor) -> float:
    return pair_weighted_mean(module_agreements(scores, labels), torch.bincount(labels))


def test_range_alone_misleads_plain_tau_but_not_the_matched_one():
    # Nothing but a level and independent noise: no module behaves alike.
    scores = normal(600, seed=1) + 0.7 * normal(3, 600, seed=2)
    rank = fractional_ranks(fractional_ranks(scores).mean(0))
    similar = (rank * 4).long()  # neighbours in mean rank: a small range inside modules
    mixed = (rank * 8).long()
    mixed = torch.minimum(mixed, 7 - mixed)  # the weakest with the strongest: a large range
    random = torch.arange(600)[torch.randperm(600, generator=torch.Generator().manual_seed(3))] % 4
    assert plain(scores, similar) < plain(scores, random) - 0.4
    assert kendall_agreement(scores[:, mixed == 0]) > plain(scores, similar) + 0.2
    # Ranks are squeezed at both ends, which the gap alone does not see: hence a residue, a tenth of plain tau's error.
    assert abs(range_matched_agreement(scores, similar)) < 0.08
    for labels in (mixed, random):
        assert abs(range_matched_agreement(scores, labels)) < 0.02


def test_agreement_of_halves_is_the_mean_over_corpora():
    halves = torch.randn(3, 2, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    halves[:, 1] += halves[:, 0]
    expected = np.mean([kendalltau(a, b).statistic for a, b in halves.numpy()])
    found = half_agreement(fractional_ranks(halves))
    assert found.dtype == torch.float64
    assert float(found) == pytest.approx(expected, rel=1e-12)
    assert 0.3 < expected < 0.9
    assert float(half_agreement(fractional_ranks(halves[:1, :, :]))) == pytest.approx(
        kendalltau(*halves[0].numpy()).statistic, rel=1e-12
    )  # one corpus has halves, if no drift
