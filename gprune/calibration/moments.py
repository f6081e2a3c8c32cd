"""Streaming sums of what enters the output projections, as torchmetrics states: over devices they add up."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric

from gprune.calibration.statistics import SUMS, ChannelStatistics, Moments
from gprune.errors import UserError


def _panels(channels: int, width: int = 192) -> list[slice]:
    """Stretches of channels, small enough that what lies below the diagonal of each costs little."""
    return [slice(start, min(start + width, channels)) for start in range(0, channels, width)]


def add_gram(gram: Tensor, x: Tensor) -> None:
    """Add x^T x of rows x (n, C) to the upper triangle of `gram` (C, C): two thirds of the time of all of it."""
    for columns in _panels(len(gram)):
        gram[columns, columns.start :].addmm_(x[:, columns].T, x[:, columns.start :])


def fill_gram(gram: Tensor) -> None:
    """Make a matrix (C, C) whole again of which only the upper triangle was summed up."""
    for rows in _panels(len(gram)):
        gram[rows.stop :, rows] = gram[rows, rows.stop :].T


class _Sums(Metric):
    """torchmetrics state of the channels that enter a projection, of `stacks` such as (E,) experts or () of one."""

    full_state_update = False

    def __init__(self, *stacks: int, channels: int, gram: bool = False, **options: Any):
        super().__init__(**options)
        # float64: a corpus has some 10^6 tokens, and sum_sq - sum^2/n loses half the digits
        self.add_state("count", torch.zeros(2, *stacks, dtype=torch.float64), dist_reduce_fx="sum")
        for name in SUMS[1:]:
            self.add_state(name, torch.zeros(2, *stacks, channels, dtype=torch.float64), dist_reduce_fx="sum")
        self.with_gram = gram
        if gram:  # of the zeros to reset it with, which torchmetrics keeps, there is one number
            shape = (*stacks, channels, channels)
            self.add_state("gram", torch.zeros(()), dist_reduce_fx="sum")
            self.gram, self._defaults["gram"] = torch.zeros(shape), torch.zeros(()).expand(shape)


class StreamingMoments(_Sums):
    """The state of one projection's input; sums over devices are sums over tokens."""

    def __init__(self, channels: int, *, gram: bool = False, **options: Any):
        super().__init__(channels=channels, gram=gram, **options)

    def update(self, x: Tensor, half: Tensor, weight: Tensor) -> None:
        """Add activations x (B, T, C) of windows that belong to `half` (B,) in {0, 1}; `weight` (B,) in {0, 1}."""
        x = x.float()
        assign = torch.zeros(2, len(x), dtype=torch.float64, device=x.device)  # (half, window)
        assign[half, torch.arange(len(x), device=x.device)] = weight.double()
        self.count += assign.sum(1) * x.shape[1]
        self.sum += assign @ x.sum(1).double()
        # Plain sums: an einsum or a vector norm over the middle dimension takes ten times as long on a CPU.
        self.sum_sq += assign @ x.square().sum(1).double()
        if self.with_gram:
            add_gram(self.gram, (x * weight[:, None, None]).flatten(0, 1))

    def compute(self) -> dict[str, Tensor]:
        """The accumulated sums by name: `count` (2,), the others (2, C), and `gram` (C, C) if asked for."""
        if self.with_gram:
            fill_gram(self.gram)
        names = (*SUMS, *(("gram",) if self.with_gram else ()))
        return {name: getattr(self, name) for name in names}


class StreamingExpertMoments(_Sums):
    """The state of what enters the down projections of E experts with N neurons each."""

    def __init__(self, experts: int, neurons: int, *, gram: bool = False, **options: Any):
        super().__init__(experts, channels=neurons, gram=gram, **options)

    def update(self, x: Tensor, expert: int, half: Tensor, weight: Tensor) -> None:
        """Add activations x (n, N) of tokens that are routed to `expert` and belong to `half` (n,) in {0, 1}."""
        x = x.float()
        assign = torch.stack([(half == h) * weight for h in (0, 1)]).double()  # (half, token)
        self.count[:, expert] += assign.sum(1)
        self.sum[:, expert] += assign @ x.double()
        self.sum_sq[:, expert] += assign @ x.square().double()
        if self.with_gram:
            weighted = x * weight[:, None]
            self.gram[expert].addmm_(weighted.T, weighted)

    def compute(self) -> dict[str, Tensor]:
        """As `StreamingMoments.compute`, expert by expert: all (2, E x N), and `gram` (E, N, N) if asked for."""
        count = self.count[..., None].expand_as(self.sum)
        sums = {"count": count} | {name: getattr(self, name) for name in SUMS[1:]}
        return {n: t.flatten(1) for n, t in sums.items()} | ({"gram": self.gram} if self.with_gram else {})


class StreamingTurn(Metric):
    """torchmetrics state of one block: the sum over tokens of 1 - cos(what enters it, what leaves it)."""

    full_state_update = False

    def __init__(self):
        super().__init__()
        self.add_state("sum", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, before: Tensor, after: Tensor, weight: Tensor) -> None:
        """Add hidden states (B, T, H); `weight` (B,), 0 leaves a window out."""
        turned = 1 - F.cosine_similarity(before.float(), after.float(), dim=-1)
        self.sum += (turned.sum(1).double() * weight).sum()

    def compute(self) -> Tensor:
        """() float64."""
        return self.sum


def channel_statistics(sums: dict[str, Tensor], *, copy: bool = True) -> ChannelStatistics:
    """What `StreamingMoments.compute` returned, on the CPU, halves apart; without `copy` it shares its Gram matrix."""
    if not bool(torch.isfinite(sums["sum_sq"]).all()):
        raise UserError(
            "A non-finite activation came up during calibration; expected finite numbers. Check the model's "
            "weights, or use --model.dtype float32 instead of a 16-bit type."
        )
    halves = tuple(Moments(*(sums[name][h].cpu().clone() for name in SUMS)) for h in (0, 1))
    gram = sums["gram"].cpu() if "gram" in sums else None
    return ChannelStatistics(halves, gram.clone() if copy and gram is not None else gram)
