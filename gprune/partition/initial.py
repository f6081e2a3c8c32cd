"""Initial partition of a block's neurons into modules, and control partitions.

A *module* is a set of neurons of one block that behave alike; neurons are ranked only inside their module. The initial
partition is k-means on data-free parameter similarity and rank drift together. Our reading of GPrune-LLM
(arXiv 2603.13418).
"""

from __future__ import annotations

import torch
from sklearn.cluster import KMeans
from torch import Tensor

from gprune.importance.weights import UnitWeights


def parameter_embedding(weights: UnitWeights, *, dim: int = 8, seed: int = 0) -> Tensor:
    """Embed neurons by parameter similarity, without data: (N, dim) float32 with mean 0 and total variance 1.

    Each neuron's gate row, up row and down column are normalised to length 1, because their length is importance rather
    than similarity. They are concatenated to 3H numbers and projected onto the leading principal components (randomised
    SVD).
    """
    inputs, output = weights.inputs, weights.output.T
    features = inputs[0].new_empty(len(output), sum(rows.shape[1] for rows in (*inputs, output)))
    places = features.split([rows.shape[1] for rows in (*inputs, output)], 1)
    for rows, place in zip((*inputs, output), places, strict=True):
        lengths = _lengths(rows).clamp_min(1e-12)
        torch.div(rows.contiguous(), lengths[:, None], out=place)
    features -= features.mean(0)
    dim = min(dim, *features.shape)
    with torch.random.fork_rng(devices=[features.device] if features.is_cuda else []):
        torch.manual_seed(seed)
        U, S, _ = torch.svd_lowrank(features, q=min(dim + 8, *features.shape), niter=2)
    return _unit_variance(U[:, :dim] * S[:dim]).cpu()


def _lengths(rows: Tensor) -> Tensor:
    """Euclidean length of each row, (N, H) -> (N,).

    Rows of a transposed matrix are copied 32 at a time, because the elements of a row are in different cache lines.
    """
    if rows.stride(1) == 1:
        return rows.norm(dim=1)
    return torch.cat([few.T.contiguous().T.norm(dim=1) for few in rows.split(32)])


def unit_variance(x: Tensor) -> Tensor:
    """Centre columns and scale all of them so that the total variance is 1, (N, d) -> (N, d); a constant becomes 0."""
    return _unit_variance(x - x.mean(0))


def _unit_variance(x: Tensor) -> Tensor:
    return x / x.square().sum(1).mean().sqrt().clamp_min(1e-12)


def minimum_size(neurons: int, num_modules: int) -> int:
    """Smallest module size in neurons, max(32, N / 4K). Ranks in smaller modules are too coarse to compare."""
    return max(32, neurons // (4 * num_modules))


def merge_small(labels: Tensor, features: Tensor, *, min_size: int) -> Tensor:
    """Merge modules below `min_size`, smallest first, into the module with the nearest centroid.

    Args:
        labels: (N,) int64.
        features: (N, d), for the centroids.

    Returns:
        (N,) labels 0..K'-1 in order of first appearance, so that equal partitions have equal labels.
    """
    labels = labels.clone()
    while True:
        names, sizes = labels.unique(return_counts=True)
        small = sizes.argmin()
        if len(names) == 1 or int(sizes[small]) >= min_size:
            break
        centroids = torch.stack([features[labels == name].mean(0) for name in names])
        distance = (centroids - centroids[small]).norm(dim=1)
        distance[small] = torch.inf
        labels[labels == names[small]] = names[distance.argmin()]
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
    """Cluster neurons by k-means on [similarity_weight * embedding (N, d), drift_weight * standardised drift (N,)].

    Returns:
        (N,) labels. There are fewer than `num_modules` modules if some were below `minimum_size` and were merged.
    """
    N = len(drift)
    num_modules = max(1, min(num_modules, N // 2))
    joint = torch.cat(
        [similarity_weight * unit_variance(embedding.double()), drift_weight * unit_variance(drift[:, None].double())],
        1,
    )
    if num_modules == 1:
        return torch.zeros(N, dtype=torch.long)
    labels = KMeans(num_modules, n_init=4, random_state=seed).fit_predict(joint.numpy())
    return merge_small(torch.from_numpy(labels).long(), joint, min_size=min(minimum_size(N, num_modules), N))


def shuffled_partition(labels: Tensor, *, seed: int) -> Tensor:
    """Partition with the same module sizes and random members, the control for every claim about modules."""
    return labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))]


def same_sizes_by_drift(labels: Tensor, drift: Tensor) -> Tensor:
    """Partition by drift alone with the module sizes of `labels`: neurons are sorted by drift and cut by size."""
    out = torch.empty_like(labels)
    out[drift.argsort(stable=True)] = labels.sort().values
    return out
