"""Partition: embeddings, initial modules, controls, and the objective against NumPy loops and documented ranges."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import adjusted_rand_score

from gprune.importance.metrics import UnitWeights
from gprune.partition.initial import (
    initial_partition,
    merge_small,
    minimum_size,
    parameter_embedding,
    same_sizes_by_drift,
    shuffled_partition,
)
from gprune.partition.objective import (
    RefinementInputs,
    partition_objective,
    refinement_inputs,
)

WEIGHTS = {"similarity": 1.0, "drift": 1.0, "consistency": 2.0, "balance": 0.1, "entropy": 0.1}


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def weights(N: int = 120, H: int = 16, seed: int = 0) -> UnitWeights:
    gate, up, down = normal(3, N, H, seed=seed)
    return UnitWeights((gate, up), down.T.contiguous())


def test_the_embedding_is_standardized_seeded_and_keeps_the_global_random_state():
    state = torch.random.get_rng_state()
    embedding = parameter_embedding(weights(), dim=8, seed=3)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(99)
    assert torch.equal(parameter_embedding(weights(), dim=8, seed=3), embedding)
    assert embedding.shape == (120, 8)
    assert embedding.mean(0).abs().max() < 1e-5
    assert float(embedding.square().sum(1).mean()) == pytest.approx(1, rel=1e-5)
    assert parameter_embedding(weights(N=5), dim=8).shape == (5, 5)  # at most one direction per neuron


def test_the_embedding_depends_on_the_direction_of_weights_and_not_on_their_norm():
    w = weights()
    scale = normal(4, 120, seed=5).exp()
    scaled = UnitWeights((w.inputs[0] * scale[0][:, None], w.inputs[1] * scale[1][:, None]), w.output * scale[2])
    torch.testing.assert_close(parameter_embedding(scaled), parameter_embedding(w), atol=1e-4, rtol=0)
    changed = UnitWeights((w.inputs[0].flip(1), w.inputs[1]), w.output)
    assert (parameter_embedding(changed) - parameter_embedding(w)).abs().max() > 0.01


def planted_weights() -> tuple[UnitWeights, torch.Tensor]:
    """Weights of neurons around three directions, and the direction of each neuron."""
    w, truth = weights(), torch.arange(120) % 3
    centres = 2 * normal(3, 3, 16, seed=8)
    gate, up = w.inputs
    return UnitWeights((gate + centres[0, truth], up + centres[1, truth]), w.output + centres[2, truth].T), truth


def test_the_embedding_has_the_leading_singular_directions():
    """Compared with an exact SVD in float64, by inner products, which do not depend on signs."""
    w, _ = planted_weights()
    parts = [t.double().numpy() for t in (*w.inputs, w.output.T)]
    features = np.concatenate([p / np.linalg.norm(p, axis=1, keepdims=True) for p in parts], axis=1)
    features -= features.mean(0)
    U, S, _ = np.linalg.svd(features, full_matrices=False)
    exact = U[:, :2] * S[:2]
    exact /= np.sqrt((exact**2).sum(1).mean())
    embedding = parameter_embedding(w, dim=2).double().numpy()
    np.testing.assert_allclose(embedding @ embedding.T, exact @ exact.T, atol=2e-3)


@pytest.mark.parametrize(("neurons", "modules", "expected"), [(1536, 8, 48), (11008, 8, 344), (48, 8, 32), (0, 1, 32)])
def test_the_minimum_size_of_modules_is_a_quarter_of_the_mean_but_at_least_32(neurons, modules, expected):
    assert minimum_size(neurons, modules) == expected


@pytest.mark.parametrize("seed", range(2))
def test_initial_modules_are_deterministic_large_enough_and_numbered_by_first_member(seed):
    N, K = 640, 8
    embedding, drift = normal(N, 8, seed=seed), normal(N, seed=seed + 100).abs()
    embedding[:5] += 100  # outliers, which are a module of k-means
    labels = initial_partition(embedding, drift, num_modules=K, seed=seed)
    np.random.seed(seed + 1)  # k-means must not depend on the global random state
    assert torch.equal(initial_partition(embedding, drift, num_modules=K, seed=seed), labels)
    sizes = torch.bincount(labels)
    assert 1 < len(sizes) <= K
    assert int(sizes.min()) >= minimum_size(N, K) == 32
    first_members = [int((labels == k).nonzero()[0]) for k in range(len(sizes))]
    assert first_members == sorted(first_members)


def test_initial_modules_follow_parameters_or_drift_by_their_weights():
    truth_similar, truth_drift = torch.arange(200) % 2, (torch.arange(200) >= 100).long()
    embedding = normal(2, 4, seed=1)[truth_similar] * 5 + 0.1 * normal(200, 4)
    drift = truth_drift + 0.05 * normal(200, seed=2)
    by_parameters = initial_partition(embedding, drift, num_modules=2, drift_weight=0.0)
    by_drift = initial_partition(embedding, drift, num_modules=2, similarity_weight=0.0)
    assert adjusted_rand_score(truth_similar, by_parameters) == 1
    assert adjusted_rand_score(truth_drift, by_drift) == 1


@pytest.mark.parametrize("N", [1, 2, 3, 48])
def test_blocks_with_few_neurons_have_one_module(N):
    assert torch.equal(initial_partition(normal(N, 4), normal(N, seed=1), num_modules=8), torch.zeros(N).long())


def test_merge_small_merges_the_smallest_module_first_into_its_nearest():
    #          a: 40 at 0      b: 35 at 10      c: 5 at 7 (nearest b)     d: 2 at 3.6 (nearest c before c is merged)
    positions = [0.0] * 40 + [10.0] * 35 + [7.0] * 5 + [3.6] * 2
    labels = torch.tensor([9] * 40 + [4] * 35 + [7] * 5 + [2] * 2)
    features = torch.tensor(positions)[:, None]
    merged = merge_small(labels, features, min_size=6)
    # d is merged into c (distance 3.4, and 3.6 to a), which then has 7 neurons and is kept.
    assert torch.equal(merged, torch.tensor([0] * 40 + [1] * 35 + [2] * 7))
    # With a larger minimum size, c (whose centre is then 6.03) is merged into b.
    assert torch.equal(merge_small(labels, features, min_size=8), torch.tensor([0] * 40 + [1] * 42))
    assert torch.equal(merge_small(labels, features, min_size=1), torch.tensor([0] * 40 + [1] * 35 + [2] * 5 + [3] * 2))
    assert torch.equal(merge_small(labels, features, min_size=1000), torch.zeros(82).long())
    assert torch.equal(labels[:3], torch.tensor([9, 9, 9]))  # the argument is unchanged


def test_partition_controls_keep_module_sizes_and_change_members():
    labels, drift = torch.tensor([0] * 50 + [1] * 30 + [2] * 20), normal(100).abs()
    shuffled, by_drift = shuffled_partition(labels, seed=1), same_sizes_by_drift(labels, drift)
    assert torch.bincount(shuffled).tolist() == torch.bincount(by_drift).tolist() == [50, 30, 20]
    assert torch.equal(shuffled, shuffled_partition(labels, seed=1))
    assert not torch.equal(shuffled, shuffled_partition(labels, seed=2))
    assert abs(adjusted_rand_score(labels, shuffled)) < 0.1
    assert (by_drift[drift.argsort()].diff() >= 0).all()  # modules are intervals of drift


def naive_dispersion(P: np.ndarray, x: np.ndarray) -> float:
    """sum_ik P_ik ||x_i - c_k||^2 / sum_i ||x_i - mean||^2 by loops in float64."""
    N, K = P.shape
    inside = 0.0
    for k in range(K):
        centre = sum(P[i, k] * x[i] for i in range(N)) / sum(P[i, k] for i in range(N))
        inside += sum(P[i, k] * ((x[i] - centre) ** 2).sum() for i in range(N))
    mean = x.mean(0)
    return inside / sum(((x[i] - mean) ** 2).sum() for i in range(N))


def random_inputs(sizes: list[int], seed: int = 0) -> RefinementInputs:
    """Random embeddings, drifts and ranks on three corpora for blocks of these numbers of neurons."""
    return refinement_inputs(
        [normal(n, 6, seed=seed + i) for i, n in enumerate(sizes)],
        [normal(n, seed=seed + 50 + i).abs() for i, n in enumerate(sizes)],
        [torch.rand(3, n, generator=torch.Generator().manual_seed(seed + 90 + i)) for i, n in enumerate(sizes)],
    )


def test_terms_of_the_objective_equal_float64_loops():
    logits, inputs, tau = normal(1, 50, 3), random_inputs([50]), 0.6
    terms = partition_objective(logits, tau, inputs, WEIGHTS)
    A = logits[0].double().numpy() / tau
    P = np.exp(A - A.max(1, keepdims=True))
    P /= P.sum(1, keepdims=True)
    size = P.sum(0) / 50
    size_entropy = -(size * np.log(size)).sum()
    expected = {
        "similarity": naive_dispersion(P, inputs.embedding[0].double().numpy()),
        "drift": naive_dispersion(P, inputs.drift[0].double().numpy()),
        "consistency": 1 - naive_dispersion(P, inputs.shifts[0].double().numpy()) - (np.exp(size_entropy) - 1) / 49,
        "balance": 1 - size_entropy / np.log(3),
        "entropy": -(P * np.log(P)).sum() / (50 * np.log(3)),
    }
    for name, value in expected.items():
        assert float(terms[name]) == pytest.approx(value, abs=2e-5), name


@pytest.mark.parametrize("tau", [1.0, 0.2])
def test_gradients_are_finite_if_probabilities_underflow_and_zero_at_padding(tau):
    logits = 3 * normal(2, 90, 4)
    logits[:, :, 3] = -20.0  # AssignmentRefinement disables a module this way
    logits[0, :10, 0] = 200.0  # the others underflow to 0
    logits.requires_grad_()
    partition_objective(logits, tau, random_inputs([90, 61]), WEIGHTS)["total"].sum().backward()
    assert bool(torch.isfinite(logits.grad).all())
    assert torch.equal(logits.grad[1, 61:], torch.zeros(29, 4))
    assert logits.grad[1, :61].abs().sum() > 0


def test_padding_does_not_change_the_objective():
    wide, narrow = random_inputs([90, 61]), random_inputs([90, 61])
    alone = RefinementInputs(
        narrow.embedding[1:, :61], narrow.drift[1:, :61], narrow.shifts[1:, :61], narrow.valid[1:, :61]
    )
    logits = normal(2, 90, 4)
    batched = partition_objective(logits, 0.5, wide, WEIGHTS)
    single = partition_objective(logits[1:, :61], 0.5, alone, WEIGHTS)
    for name in batched:
        assert float(batched[name][1]) == pytest.approx(float(single[name][0]), abs=1e-6), name
