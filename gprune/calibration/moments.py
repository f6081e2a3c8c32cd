"""Streaming sums over inputs of output projections, as torchmetrics states that are summed over processes."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric

from gprune.calibration.statistics import SUMS, ChannelStatistics, Moments
from gprune.errors import require_finite
from gprune.models.products import fast_products

PANEL_WIDTH = 192  # channels in a panel of a Gram matrix: narrow, so that little below the diagonal is computed


def _panels(channels: int) -> list[slice]:
    """Return slices of `PANEL_WIDTH` consecutive channels that together have all channels."""
    return [slice(start, min(start + PANEL_WIDTH, channels)) for start in range(0, channels, PANEL_WIDTH)]


def add_gram(gram: Tensor, x: Tensor) -> None:
    """Add x^T x of rows x (n, C) to the upper triangle of `gram` (C, C), 1.5 times faster than the full product."""
    for columns in _panels(len(gram)):
        gram[columns, columns.start :].addmm_(x[:, columns].T, x[:, columns.start :])


def fill_gram(gram: Tensor) -> None:
    """Mirror the upper triangle of a matrix (C, C) from `add_gram`, in place."""
    for rows in _panels(len(gram)):
        gram[rows.stop :, rows] = gram[rows, rows.stop :].T


def add_large_state(metric: Metric, name: str, *shape: int) -> None:
    """Add a float32 state of zeros to a metric, summed over processes.

    The default value, to which torchmetrics resets the state, is one expanded number, which needs no memory.
    """
    metric.add_state(name, torch.zeros(()), dist_reduce_fx="sum")
    setattr(metric, name, torch.zeros(shape))
    metric._defaults[name] = torch.zeros(()).expand(shape)


def sum_of_processes(tensor: Tensor, group: Any = None) -> list[Tensor]:
    """Add a state over processes; a `dist_sync_fn` for torchmetrics that does not gather a copy from each process."""
    total = tensor.clone()
    torch.distributed.all_reduce(total, group=group)
    return [total]


class _Sums(Metric):
    """Metric with the states `count`, `sum` and `sum_sq` of a projection's input channels by half of a corpus.

    `sizes` are the number of channels or, for experts, their number and that of the neurons of each.
    """

    full_state_update = False

    def __init__(self, *sizes: int, gram: bool = False):
        # A cache would be a second copy of the sums.
        super().__init__(compute_with_cache=False, dist_sync_fn=sum_of_processes)
        # float64, because sum_sq - sum^2/n loses half of the digits with 10^6 tokens
        for name in SUMS:
            shape = sizes[:-1] if name == "count" else sizes
            self.add_state(name, torch.zeros(2, *shape, dtype=torch.float64), dist_reduce_fx="sum")
        self.with_gram = gram
        if gram:
            add_large_state(self, "gram", *sizes, sizes[-1])


class StreamingMoments(_Sums):
    """Sums of one projection's input with C channels."""

    def update(self, x: Tensor, half: Tensor, weight: Tensor) -> None:
        """Add activations (B, T, C) of windows to their halves, (B,) in {0, 1}; weights (B,) of 0 ignore windows."""
        values = x.float()
        # The column of each window has its weight in the row of its half, and 0 in the other row.
        weight_by_half = torch.zeros(2, len(x), dtype=torch.float64, device=x.device)  # (half, window)
        weight_by_half[half, torch.arange(len(x), device=x.device)] = weight.double()
        self.count += weight_by_half.sum(1) * x.shape[1]
        self.sum += weight_by_half @ values.sum(1).double()
        # On a CPU an einsum or a vector norm over the middle dimension is ten times slower.
        self.sum_sq += weight_by_half @ values.square().sum(1).double()
        if self.with_gram:
            with fast_products(x):
                add_gram(self.gram, (values * weight[:, None, None]).flatten(0, 1))

    def compute(self) -> dict[str, Tensor]:
        """Return the sums by name: `count` (2,), others (2, C), and `gram` (C, C) if enabled."""
        sums = {name: getattr(self, name) for name in SUMS}
        if self.with_gram:
            fill_gram(self.gram)
            sums["gram"] = self.gram
        return sums


class StreamingExpertMoments(_Sums):
    """Sums of inputs of the down projections of E experts with N neurons each."""

    def update(self, x: Tensor, expert: int, half: Tensor, weight: Tensor) -> None:
        """Add activations (n, N) of the tokens that are routed to an expert; halves and weights in {0, 1} are (n,)."""
        values = x.float()
        weight_by_half = torch.stack([(half == h) * weight for h in (0, 1)]).double()  # (half, token)
        self.count[:, expert] += weight_by_half.sum(1)
        self.sum[:, expert] += weight_by_half @ values.double()
        self.sum_sq[:, expert] += weight_by_half @ values.square().double()
        if self.with_gram:
            weighted = values * weight[:, None]
            self.gram[expert].addmm_(weighted.T, weighted)

    def compute(self) -> dict[str, Tensor]:
        """Return the sums by name, with experts concatenated: each (2, E x N), and `gram` (E, N, N) if enabled."""
        sums = {
            "count": self.count[..., None].expand_as(self.sum).flatten(1),
            "sum": self.sum.flatten(1),
            "sum_sq": self.sum_sq.flatten(1),
        }
        if self.with_gram:
            sums["gram"] = self.gram
        return sums


class StreamingRouting(Metric):
    """Metric of one block: the sums of `statistics.Routing` over the tokens that are routed to each of E experts."""

    full_state_update = False

    def __init__(self, experts: int):
        super().__init__(compute_with_cache=False, dist_sync_fn=sum_of_processes)
        self.add_state("sums", torch.zeros(4, experts, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, expert: int, outputs: Tensor, router_weight: Tensor, weight: Tensor) -> None:
        """Add outputs (n, H) of an expert with router weights (n,); weights (n,) of 0 ignore tokens."""
        norm = torch.linalg.vector_norm(outputs, dim=1, dtype=torch.float64)
        router_weight, weight = router_weight.double(), weight.double()
        terms = torch.stack([torch.ones_like(norm), router_weight, norm, router_weight * norm])
        self.sums[:, expert] += terms @ weight

    def compute(self) -> Tensor:
        """Return the sums, (4, E) float64, in the order of the fields of `Routing`."""
        return self.sums


class StreamingCosineChange(Metric):
    """Metric of one block: the sum over tokens of 1 - cos(input of the block, output of the block)."""

    full_state_update = False

    def __init__(self):
        super().__init__()
        self.add_state("sum", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, before: Tensor, after: Tensor, weight: Tensor) -> None:
        """Add a block's inputs and outputs, (B, T, H), with weights (B,) in {0, 1}.

        With S residual streams, as in deepseek_v4, they are (B, T, S, H), and the streams of a token are one vector.
        """
        change = 1 - F.cosine_similarity(before.flatten(2).float(), after.flatten(2).float(), dim=-1)
        self.sum += (change.sum(1).double() * weight).sum()

    def compute(self) -> Tensor:
        """Return the sum, () float64."""
        return self.sum


def channel_statistics(sums: dict[str, Tensor]) -> ChannelStatistics:
    """Convert sums of `StreamingMoments.compute` to statistics on the CPU. A Gram matrix on the CPU is not copied."""
    sums = {name: total.cpu() for name, total in sums.items()}
    require_finite("activation came up during calibration", sums["sum_sq"])
    halves = tuple(Moments(*(sums[name][h].clone() for name in SUMS)) for h in (0, 1))
    gram = sums.get("gram")
    if gram is not None and gram.dim() == 0:  # torchmetrics squeezes tensors with one element
        gram = gram.reshape(1, 1)
    return ChannelStatistics(halves, gram)
