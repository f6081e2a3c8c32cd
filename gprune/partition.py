"""Partition of a block's neurons into modules: parameter embedding, first modules, soft-assignment mathematics.

A *module* is a set of neurons of one block that behave alike; neurons compete for survival only inside it. The
partition starts from k-means on a joint view of data-free parameter similarity and rank drift, and is refined by a
differentiable objective over soft assignments (`partition_objective`, driven by `stages/assignment.py`).
Formulas are our reading of GPrune-LLM (arXiv 2603.13418).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from sklearn.cluster import KMeans
from torch import Tensor

from gprune.importance import UnitWeights


def parameter_embedding(weights: UnitWeights, *, dim: int = 8, seed: int = 0) -> Tensor:
    """A few dimensions of data-free parameter similarity: (N, dim) float32, mean 0, total variance 1.

    Each neuron's gate row, up row and down column are normalised to length 1 (direction only: size is importance,
    not likeness), concatenated to 3H numbers and projected onto the leading principal directions (randomised SVD).
    """
    parts = [F.normalize(rows, dim=1) for rows in (*weights.inputs, weights.output.T)]
    features = torch.cat(parts, dim=1)
    features = features - features.mean(0)
    dim = min(dim, *features.shape)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        U, S, _ = torch.svd_lowrank(features, q=min(dim + 8, *features.shape), niter=2)
    embedding = U[:, :dim] * S[:dim]
    return embedding / embedding.square().sum(1).mean().sqrt().clamp_min(1e-12)


def behaviour_features(ranks: Tensor) -> Tensor:
    """Rank shifts per corpus, (D, N) -> (N, D): the rank of a neuron on each corpus, its own mean taken out."""
    return (ranks - ranks.mean(0)).T.contiguous()


def standardised(x: Tensor) -> Tensor:
    """Centre columns and scale so that the total variance is 1; constant input becomes 0. (N, d) -> (N, d)."""
    x = x - x.mean(0)
    return x / x.square().sum(1).mean().sqrt().clamp_min(1e-12)


def minimum_size(neurons: int, num_modules: int) -> int:
    """max(32, N / 4K): smaller modules give ranks too coarse to compare."""
    return max(32, neurons // (4 * num_modules))


def merge_small(labels: Tensor, features: Tensor, *, min_size: int) -> Tensor:
    """Merge modules below `min_size`, smallest first, into the module with the nearest centroid.

    Args:
        labels: (N,) int64, any labels.
        features: (N, d), the space of the centroids.

    Returns:
        (N,) int64 labels 0..K'-1 in order of first appearance, so that equal partitions have equal labels.
    """
    labels = labels.clone()
    while True:
        names, sizes = labels.unique(return_counts=True)
        if len(names) == 1 or int(sizes.min()) >= min_size:
            break
        small = names[sizes.argmin()]
        centroids = torch.stack([features[labels == name].mean(0) for name in names])
        distance = (centroids - centroids[sizes.argmin()]).norm(dim=1)
        distance[sizes.argmin()] = torch.inf
        labels[labels == small] = names[distance.argmin()]
    order: dict[int, int] = {}
    return torch.tensor([order.setdefault(int(label), len(order)) for label in labels])


def initial_partition(
    embedding: Tensor,
    drift: Tensor,
    *,
    num_modules: int = 8,
    similarity_weight: float = 1.0,
    drift_weight: float = 1.0,
    seed: int = 0,
) -> Tensor:
    """k-means on [similarity_weight * embedding, drift_weight * standardised drift] -> (N,) labels.

    Args:
        embedding: (N, d) from `parameter_embedding`.
        drift: (N,) rank drift.
        num_modules: modules to start from; fewer remain if some fall below `minimum_size`.
    """
    N = len(drift)
    num_modules = max(1, min(num_modules, N // 2))
    joint = torch.cat(
        [
            similarity_weight * standardised(embedding.double()),
            drift_weight * standardised(drift[:, None].double()),
        ],
        1,
    )
    if num_modules == 1:
        return torch.zeros(N, dtype=torch.long)
    found = KMeans(num_modules, n_init=4, random_state=seed).fit_predict(joint.numpy())
    return merge_small(torch.from_numpy(found).long(), joint, min_size=min(minimum_size(N, num_modules), N))


def shuffled_partition(labels: Tensor, *, seed: int) -> Tensor:
    """The same module sizes with random members: the control for every claim about modules."""
    return labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))]


def same_sizes_by_drift(labels: Tensor, drift: Tensor) -> Tensor:
    """A drift-only partition with the sizes of `labels`: neurons sorted by drift, cut into runs of those sizes."""
    out = torch.empty_like(labels)
    out[drift.argsort(stable=True)] = labels.sort().values
    return out


@dataclass(frozen=True)
class RefinementInputs:
    """What the objective sees of B blocks, padded to N neurons; float32."""

    embedding: Tensor  # (B, N, E) parameter similarity, total variance 1
    drift: Tensor  # (B, N, 1) standardised rank drift
    shifts: Tensor  # (B, N, D) rank per corpus with the neuron's own mean rank taken out
    valid: Tensor  # (B, N) 1 for a neuron, 0 for padding


@dataclass(frozen=True)
class ObjectiveWeights:
    """Weights of the terms of `partition_objective`, all >= 0."""

    similarity: float = 1.0
    drift: float = 1.0
    consistency: float = 2.0
    balance: float = 0.1
    entropy: float = 0.1


def dispersion(P: Tensor, x: Tensor) -> Tensor:
    """Share of the total variance of x that lies inside modules: P (B, N, K), x (B, N, d) -> (B,) in [0, 1].

    sum_ik P_ik ||x_i - c_k||^2 / sum_i ||x_i - c||^2 with c_k the P-weighted mean; since sum_k P_ik = 1 the
    numerator is sum_i ||x_i||^2 - sum_k n_k ||c_k||^2, which needs no (N, K, d) tensor. x must be centred and 0
    where padded. 0/0 (nothing varies) counts as 0.
    """
    n = reduce(P, "b n k -> b k", "sum").clamp_min(1e-6)
    c = torch.einsum("bnk,bnd->bkd", P, x) / rearrange(n, "b k -> b k 1")
    total = reduce(x.square(), "b n d -> b", "sum")
    inside = total - torch.einsum("bk,bkd->b", n, c.square())
    return inside / total.clamp_min(1e-12)


def entropy(p: Tensor) -> Tensor:
    """-p log p, elementwise, with a finite gradient at 0 (torch.special.entr's is infinite, and 0 * inf is NaN)."""
    return -p * p.clamp_min(1e-9).log()


def partition_objective(
    logits: Tensor, tau: float, inputs: RefinementInputs, weights: ObjectiveWeights
) -> dict[str, Tensor]:
    """The refinement objective, each term (B,), and their weighted sum under `total`.

    P = softmax(A / tau) over K modules, and

        L = w_s S(P) + w_d V(P) - w_c C(P) + w_b B(P) + w_e H(P)

    S in [0, 1]: within-module share of the parameter embedding's variance (`dispersion`).
    V in [0, 1]: the same for rank drift.
    C <= 1: rank consistency. delta_i^(d) = r_i^(d) - mean_d r_i^(d); neurons whose ranks move together between
        corpora keep their order. C = 1 - dispersion(P, delta) - (n_eff - 1)/(N - 1): what modules explain of the
        shifts beyond what a random partition would, with n_eff = exp(entropy of the module sizes), K for equal ones.
        Because the mean rank is taken out, mixing weak and strong neurons earns nothing. 0 when no rank shifts.
    B in [0, 1]: 1 - entropy of the module sizes / log K; 0 when all are equally large.
    H in [0, 1]: mean entropy of P_i / log K; 0 when every neuron has made up its mind.

    Args:
        logits: A, (B, N, K).
        tau: temperature > 0, annealed by the caller.
    """
    K = logits.shape[-1]
    P = (logits / tau).softmax(-1) * rearrange(inputs.valid, "b n -> b n 1")
    N = inputs.valid.sum(1)
    log_k = torch.tensor(float(max(K, 2))).log()
    size = reduce(P, "b n k -> b k", "sum") / rearrange(N, "b -> b 1")
    size_entropy = entropy(size).sum(-1)
    shifting = inputs.shifts.square().sum((1, 2)) > 0  # one corpus: nothing shifts, nothing to reward
    terms = {
        "similarity": dispersion(P, inputs.embedding),
        "drift": dispersion(P, inputs.drift),
        "consistency": shifting * (1 - dispersion(P, inputs.shifts) - (size_entropy.exp() - 1) / (N - 1).clamp_min(1)),
        "balance": 1 - size_entropy / log_k,
        "entropy": entropy(P).sum((1, 2)) / (N * log_k),
    }
    sign = {"consistency": -1.0}
    terms["total"] = sum(getattr(weights, name) * sign.get(name, 1.0) * value for name, value in terms.items())
    return terms


def pad_blocks(features: list[Tensor], width: int) -> Tensor:
    """(N_b, d) per block -> (B, width, d) float32, zeros where padded."""
    return torch.stack([F.pad(x.float(), (0, 0, 0, width - len(x))) for x in features])


def refinement_inputs(embeddings: list[Tensor], drifts: list[Tensor], ranks: list[Tensor]) -> RefinementInputs:
    """Stack blocks of possibly unequal width: embeddings (N, E), drifts (N,), ranks (D, N) each."""
    width = max(len(d) for d in drifts)
    shifts = [standardised(behaviour_features(r)) for r in ranks]
    return RefinementInputs(
        embedding=pad_blocks([standardised(e) for e in embeddings], width),
        drift=pad_blocks([standardised(d[:, None]) for d in drifts], width),
        shifts=pad_blocks(shifts, width),
        valid=pad_blocks([torch.ones(len(d), 1) for d in drifts], width)[..., 0],
    )
