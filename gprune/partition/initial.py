"""Initial partition of a block's neurons into modules, and control partitions.

A *module* is a set of neurons of one block that behave alike; neurons are ranked only inside their module. The initial
partition is k-means on data-free parameter similarity and rank drift together. Our reading of GPrune-LLM
(arXiv 2603.13418).
"""

from __future__ import annotations

import torch
from sklearn.cluster import KMeans
from torch import Tensor

from gprune.importance.metrics import UnitWeights

OVERSAMPLING = 8  # additional components that make the randomised SVD more accurate


def parameter_embedding(weights: UnitWeights, *, dim: int = 8, seed: int = 0) -> Tensor:
    """Embed neurons by parameter similarity, without data: (N, dim) float32 with mean 0 and total variance 1.

    Each neuron's gate row, up row and down column are normalised to length 1, because their length is importance rather
    than similarity. They are concatenated to 3H numbers and projected onto the leading principal components (randomised
    SVD).
    """
    matrices = [*weights.inputs, weights.output.T]  # gate and up rows and down columns, (N, H) each
    widths = [matrix.shape[1] for matrix in matrices]
    features = matrices[0].new_empty(len(matrices[0]), sum(widths))
    for matrix, columns in zip(matrices, features.split(widths, 1), strict=True):
        lengths = _row_lengths(matrix).clamp_min(1e-12)
        torch.div(matrix.contiguous(), lengths[:, None], out=columns)
    features -= features.mean(0)
    dim = min(dim, *features.shape)
    rank = min(dim + OVERSAMPLING, *features.shape)
    with torch.random.fork_rng(devices=[features.device] if features.is_cuda else []):
        torch.manual_seed(seed)
        U, S, _ = torch.svd_lowrank(features, q=rank, niter=2)
    return _scale_to_unit_variance(U[:, :dim] * S[:dim]).cpu()


def _row_lengths(matrix: Tensor) -> Tensor:
    """Return the Euclidean length of each row, (N, H) -> (N,).

    Rows of a transposed matrix are copied 32 at a time to a compact matrix, because in the whole matrix every element
    of a row is in another cache line.
    """
    if matrix.stride(1) == 1:
        return matrix.norm(dim=1)
    return torch.cat([rows.T.contiguous().T.norm(dim=1) for rows in matrix.split(32)])


def unit_variance(x: Tensor) -> Tensor:
    """Centre columns and scale all of them so that the total variance is 1, (N, d) -> (N, d); a constant becomes 0."""
    return _scale_to_unit_variance(x - x.mean(0))


def _scale_to_unit_variance(centred: Tensor) -> Tensor:
    """Scale columns with mean 0 so that the total variance is 1, (N, d) -> (N, d)."""
    return centred / centred.square().sum(1).mean().sqrt().clamp_min(1e-12)


def minimum_size(neurons: int, num_modules: int) -> int:
    """Return the smallest module size in neurons, max(32, N / 4K). Ranks in smaller modules are too coarse."""
    return max(32, neurons // (4 * num_modules))


def merge_small(labels: Tensor, features: Tensor, *, min_size: int) -> Tensor:
    """Merge modules below `min_size`, smallest first, into the module with the nearest centroid of features (N, d).

    Labels are (N,) int64. The result has labels 0..K'-1 in order of first appearance, so that equal partitions have
    equal labels.
    """
    labels = labels.clone()
    while True:
        modules, sizes = labels.unique(return_counts=True)
        smallest = sizes.argmin()
        if len(modules) == 1 or int(sizes[smallest]) >= min_size:
            break
        centroids = torch.stack([features[labels == module].mean(0) for module in modules])
        distance = (centroids - centroids[smallest]).norm(dim=1)
        distance[smallest] = torch.inf
        labels[labels == modules[smallest]] = modules[distance.argmin()]
    new_labels: dict[int, int] = {}  # old label -> new label
    return torch.tensor([new_labels.setdefault(int(label), len(new_labels)) for label in labels])


def initial_partition(
    embedding: Tensor,
    drift: Tensor,
    *,
    num_modules: int = 8,
    similarity_weight: float = 1.0,
    drift_weight: float = 1.0,
    seed: int = 0,
) -> Tensor:
    """Cluster neurons by k-means on [similarity_weight * embedding, drift_weight * standardised drift].

    The embedding is (N, d), and drift and the resulting labels are (N,). There are fewer than `num_modules` modules if
    some were below `minimum_size` and were merged, or a block has fewer than two neurons per module.
    """
    N = len(drift)
    num_modules = max(1, min(num_modules, N // 2))
    if num_modules == 1:
        return torch.zeros(N, dtype=torch.long)
    scaled_embedding = similarity_weight * unit_variance(embedding.double())
    scaled_drift = drift_weight * unit_variance(drift[:, None].double())
    features = torch.cat([scaled_embedding, scaled_drift], 1)
    labels = KMeans(num_modules, n_init=4, random_state=seed).fit_predict(features.numpy())
    min_size = min(minimum_size(N, num_modules), N)
    return merge_small(torch.from_numpy(labels).long(), features, min_size=min_size)


def shuffled_partition(labels: Tensor, *, seed: int) -> Tensor:
    """Return a partition with the same module sizes and random members: the control for every claim about modules."""
    generator = torch.Generator().manual_seed(seed)
    return labels[torch.randperm(len(labels), generator=generator)]


def same_sizes_by_drift(labels: Tensor, drift: Tensor) -> Tensor:
    """Return a partition by drift alone, with the module sizes of `labels`.

    Neurons are sorted by drift; the first ones are module 0, the next ones module 1, and so on.
    """
    by_drift = torch.empty_like(labels)
    by_drift[drift.argsort(stable=True)] = labels.sort().values
    return by_drift
