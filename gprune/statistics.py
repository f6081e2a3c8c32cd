"""Streaming statistics of what enters `down_proj` (neurons) and `o_proj` (attention channels).

One pass per corpus over the frozen decoder, without the language-model head. Per channel and for each of two
halves of the corpus (windows with an even and with an odd index): count, sum, sum of squares and sum of absolute
values, in float64. The halves give rank drift its noise floor. Optionally the Gram matrix, for recovery.

    with Collector(model) as collector:
        for batch in loader:
            collector.observe(batch["input_ids"], batch["index"] % 2)
    statistics = collector.compute()        # CorpusStatistics
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torchmetrics import Metric
from transformers import PreTrainedModel

from gprune.architectures import blocks_of
from gprune.errors import UserError


@dataclass(frozen=True)
class Moments:
    """Sums over tokens for C channels. All float64; `count` is a 0-d tensor (tokens)."""

    count: Tensor  # ()
    sum: Tensor  # (C,)
    sum_sq: Tensor  # (C,)
    sum_abs: Tensor  # (C,)

    @property
    def mean(self) -> Tensor:
        return self.sum / self.count

    @property
    def mean_sq(self) -> Tensor:
        return self.sum_sq / self.count

    @property
    def variance(self) -> Tensor:
        """Population variance over tokens, (C,); clamped at 0, where float rounding would leave -1e-20."""
        return (self.mean_sq - self.mean.square()).clamp_min(0)

    def __add__(self, other: Moments) -> Moments:
        return Moments(
            self.count + other.count,
            self.sum + other.sum,
            self.sum_sq + other.sum_sq,
            self.sum_abs + other.sum_abs,
        )


@dataclass(frozen=True)
class ChannelStatistics:
    """Moments of the two halves of a corpus, and the Gram matrix sum over tokens of x x^T, (C, C) float32, or None."""

    halves: tuple[Moments, Moments]
    gram: Tensor | None = None

    @property
    def total(self) -> Moments:
        return self.halves[0] + self.halves[1]


@dataclass(frozen=True)
class CorpusStatistics:
    """Statistics of one corpus: one entry per block for neurons and one for attention channels."""

    ffn: list[ChannelStatistics]
    attention: list[ChannelStatistics]

    def tensors(self) -> dict[str, Tensor]:
        """Flat names to tensors, as saved in safetensors."""
        flat = {}
        for kind in ("ffn", "attention"):
            for index, channel in enumerate(getattr(self, kind)):
                for half, moments in enumerate(channel.halves):
                    flat |= {f"{kind}.{index}.{half}.{name}": value for name, value in vars(moments).items()}
                if channel.gram is not None:
                    flat[f"{kind}.{index}.gram"] = channel.gram
        return flat

    @classmethod
    def from_tensors(cls, flat: dict[str, Tensor]) -> CorpusStatistics:
        def channel(kind: str, index: int) -> ChannelStatistics:
            halves = tuple(
                Moments(*(flat[f"{kind}.{index}.{half}.{name}"] for name in Moments.__dataclass_fields__))
                for half in (0, 1)
            )
            return ChannelStatistics(halves, flat.get(f"{kind}.{index}.gram"))

        depth = 1 + max(int(name.split(".")[1]) for name in flat)
        return cls(*([channel(kind, index) for index in range(depth)] for kind in ("ffn", "attention")))


def pooled(statistics: Iterable[CorpusStatistics], *, gram: bool = True) -> CorpusStatistics:
    """The statistics of several corpora read as one text (equal tokens each: the corpora averaged).

    `gram=False` leaves Gram matrices out, which only recovery reads.
    """

    def pool(parts: list[ChannelStatistics]) -> ChannelStatistics:
        halves = tuple(sum((part.halves[h] for part in parts[1:]), start=parts[0].halves[h]) for h in (0, 1))
        grams = [part.gram for part in parts if gram and part.gram is not None]
        return ChannelStatistics(halves, sum(grams[1:], start=grams[0]) if len(grams) == len(parts) else None)

    statistics = list(statistics)
    return CorpusStatistics(
        *(
            [pool(list(parts)) for parts in zip(*(getattr(s, kind) for s in statistics), strict=True)]
            for kind in ("ffn", "attention")
        )
    )


class StreamingMoments(Metric):
    """torchmetrics state of one projection's input; sums over devices are sums over tokens."""

    full_state_update = False

    def __init__(self, channels: int, *, gram: bool = False):
        super().__init__()
        # float64: a corpus has some 10^6 tokens, and sum_sq - sum^2/n loses half the digits
        self.add_state("count", torch.zeros(2, dtype=torch.float64), dist_reduce_fx="sum")
        for name in ("sum", "sum_sq", "sum_abs"):
            self.add_state(name, torch.zeros(2, channels, dtype=torch.float64), dist_reduce_fx="sum")
        self.with_gram = gram
        if gram:
            self.add_state("gram", torch.zeros(channels, channels), dist_reduce_fx="sum")

    def update(self, x: Tensor, half: Tensor, weight: Tensor) -> None:
        """Add activations x (B, T, C) of windows that belong to `half` (B,) in {0, 1}; `weight` (B,) in {0, 1}."""
        x = x.float()
        assign = torch.zeros(2, len(x), dtype=torch.float64, device=x.device)  # (half, window)
        assign[half, torch.arange(len(x), device=x.device)] = weight.double()
        self.count += assign.sum(1) * x.shape[1]
        self.sum += assign @ x.sum(1).double()
        self.sum_sq += assign @ torch.einsum("btc,btc->bc", x, x).double()
        self.sum_abs += assign @ torch.linalg.vector_norm(x, ord=1, dim=1).double()
        if self.with_gram:
            flat = (x * weight[:, None, None]).flatten(0, 1)
            self.gram.addmm_(flat.T, flat)

    def compute(self) -> dict[str, Tensor]:
        """The accumulated sums by name: `count` (2,), the others (2, C), and `gram` (C, C) if asked for."""
        names = (*Moments.__dataclass_fields__, *(("gram",) if self.with_gram else ()))
        return {name: getattr(self, name) for name in names}


def channel_statistics(sums: dict[str, Tensor]) -> ChannelStatistics:
    """What `StreamingMoments.compute` returned, on the CPU, halves apart.

    Raises:
        UserError: if an activation was not finite.
    """
    if not bool(torch.isfinite(sums["sum_sq"]).all()):
        raise UserError(
            "A non-finite activation came up during calibration; expected finite numbers. Check the model's "
            "weights, or use --model.dtype float32 instead of a 16-bit type."
        )
    halves = tuple(Moments(*(sums[name][h].cpu().clone() for name in Moments.__dataclass_fields__)) for h in (0, 1))
    return ChannelStatistics(halves, sums["gram"].cpu().clone() if "gram" in sums else None)


class Collector:
    """Context manager that watches the inputs of every `down_proj` and `o_proj`; leaving removes the hooks."""

    def __init__(self, model: PreTrainedModel, *, gram: bool = False):
        self.model = model
        self.blocks = blocks_of(model)
        device = next(model.parameters()).device
        self.metrics = {
            kind: [StreamingMoments(getattr(b, part).in_features, gram=gram).to(device) for b in self.blocks]
            for kind, part in (("ffn", "down"), ("attention", "output"))
        }
        self._half = self._weight = torch.empty(0)
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> Collector:
        for kind, part in (("ffn", "down"), ("attention", "output")):
            for block, metric in zip(self.blocks, self.metrics[kind], strict=True):
                self._handles.append(getattr(block, part).register_forward_pre_hook(self._hook(metric)))
        return self

    def __exit__(self, *exception: object) -> None:
        while self._handles:
            self._handles.pop().remove()

    def _hook(self, metric: StreamingMoments) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _module, inputs: metric.update(inputs[0], self._half, self._weight)

    @torch.no_grad()
    def observe(self, input_ids: Tensor, half: Tensor, weight: Tensor | None = None) -> None:
        """Run the decoder on (B, T) token ids; `half` (B,) in {0, 1}; `weight` (B,), 0 leaves a window out."""
        self._half = half
        self._weight = torch.ones(len(half), device=half.device) if weight is None else weight
        self.model.get_decoder()(input_ids=input_ids, use_cache=False)

    def compute(self) -> CorpusStatistics:
        """Statistics so far, summed over devices when distributed."""
        return CorpusStatistics(
            *([channel_statistics(metric.compute()) for metric in self.metrics[kind]] for kind in ("ffn", "attention"))
        )


def collect(model: PreTrainedModel, batches: Iterable[dict[str, Tensor]], *, gram: bool = False) -> CorpusStatistics:
    """One pass over batches with `input_ids` (B, T) and `index` (B,), the windows' positions in the corpus."""
    with Collector(model, gram=gram) as collector:
        for batch in batches:
            collector.observe(batch["input_ids"], batch["index"] % 2, batch.get("weight"))
    return collector.compute()
