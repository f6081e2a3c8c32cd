"""Streaming statistics of what enters `down_proj` (neurons) and `o_proj` (attention channels).

One pass per corpus over the frozen decoder, without the language-model head. Per channel and for each of two
halves of the corpus: count, sum and sum of squares, in float64. The halves give rank drift its noise floor. Per block:
how far the block turns the hidden state. Optionally the Gram matrix, for recovery and output-aware metrics, and the
Taylor saliency, which takes a backward pass.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from gprune.calibration.saliency import Saliency
from gprune.errors import UserError
from gprune.models.blocks import Block
from gprune.storage.files import read_tensors

SUMS = ("count", "sum", "sum_sq")
KINDS = (("ffn", "down"), ("attention", "output"))
EXTRAS = ("gram", "saliency")  # what is collected only where something needs it


@dataclass(frozen=True)
class StoredGram:
    """A Gram matrix that lies in files: read when it is looked at, and never kept.

    With several sources it is their sum, in that order.
    """

    sources: tuple[tuple[Path, str], ...]  # file and tensor
    expert: int | None = None  # of stacked ones

    def read(self) -> Tensor:
        """(C, C) float32, or (E, C / E, C / E) of E experts."""
        total: Tensor | None = None
        for path, name in self.sources:
            gram = _stored_tensor(path, name)
            total = gram if total is None else total.add_(gram)
        return total if self.expert is None else total[self.expert]


def _stored_tensor(path: Path, name: str) -> Tensor:
    found = read_tensors(path)
    if found is None or name not in found:
        raise UserError(
            f"{path} is missing or not whole: a Gram matrix that a calibration pass left there. Start again to have it "
            f"computed anew; processes on several machines need one $GPRUNE_CACHE between them."
        )
    return found[name]


@dataclass(frozen=True)
class Moments:
    """Sums over tokens for C channels. All float64; `count` is a 0-d tensor, or (C,) for experts, each of which sees
    tokens of its own.

    `gram` and `saliency` are there where a metric says that it needs them.
    """

    count: Tensor  # () or (C,), tokens
    sum: Tensor  # (C,)
    sum_sq: Tensor  # (C,)
    gram_source: Tensor | StoredGram | None = None  # of the whole corpus only
    saliency: Saliency | None = None

    @property
    def gram(self) -> Tensor | None:
        """Sum over tokens of x x^T, (C, C) float32, or (E, C / E, C / E) of E experts; read anew where it is stored."""
        return self.gram_source.read() if isinstance(self.gram_source, StoredGram) else self.gram_source

    @property
    def mean(self) -> Tensor:
        return self.sum / self.count.clamp_min(1)  # 0 where no token came by

    @property
    def mean_sq(self) -> Tensor:
        return self.sum_sq / self.count.clamp_min(1)

    @property
    def variance(self) -> Tensor:
        """Population variance over tokens, (C,); clamped at 0, where float rounding would leave -1e-20."""
        return (self.mean_sq - self.mean.square()).clamp_min(0)

    def of_expert(self, index: int, experts: int) -> Moments:
        """The channels of one of E experts."""
        sums = (getattr(self, name).view(experts, -1)[index] for name in SUMS)
        gram = self.gram_source
        if isinstance(gram, StoredGram):
            return Moments(*sums, replace(gram, expert=index))
        return Moments(*sums, None if gram is None else gram[index])

    def __add__(self, other: Moments) -> Moments:
        return Moments(*(getattr(self, name) + getattr(other, name) for name in SUMS))


@dataclass(frozen=True)
class ChannelStatistics:
    """Moments of the two halves of a corpus; where collected, the Gram matrix and the saliency of halves and whole.

    Saliency does not add up over halves, since it takes absolute values of sums over windows.
    """

    halves: tuple[Moments, Moments]
    gram: Tensor | StoredGram | None = None
    saliency: tuple[Saliency, Saliency, Saliency] | None = None

    @property
    def total(self) -> Moments:
        return replace(
            self.halves[0] + self.halves[1],
            gram_source=self.gram,
            saliency=None if self.saliency is None else self.saliency[2],
        )

    def half(self, index: int) -> Moments:
        """Moments of half 0 or 1 of the corpus, without a Gram matrix."""
        return replace(self.halves[index], saliency=None if self.saliency is None else self.saliency[index])

    def tensors(self) -> dict[str, Tensor]:
        """Flat names to tensors."""
        flat = {f"{half}.{name}": getattr(m, name) for half, m in enumerate(self.halves) for name in SUMS}
        if self.gram is not None:
            flat["gram"] = self.gram
        for part, saliency in enumerate(self.saliency or ()):
            flat |= {f"saliency.{part}.{name}": value for name, value in vars(saliency).items()}
        return flat

    @classmethod
    def from_tensors(cls, flat: dict[str, Tensor]) -> ChannelStatistics:
        """What `tensors` gave."""
        halves = tuple(Moments(*(flat[f"{half}.{name}"] for name in SUMS)) for half in (0, 1))
        saliency = None
        if "saliency.0.first" in flat:
            names = Saliency.__dataclass_fields__
            saliency = tuple(Saliency(*(flat[f"saliency.{part}.{name}"] for name in names)) for part in range(3))
        return cls(halves, flat.get("gram"), saliency)


@dataclass(frozen=True)
class CorpusStatistics:
    """Statistics of one corpus: one entry per block for neurons and one for attention channels."""

    ffn: list[ChannelStatistics]
    attention: list[ChannelStatistics]
    turned: Tensor  # (blocks,) float64: sum over tokens of 1 - cos(what enters a block, what leaves it)

    @property
    def influence(self) -> Tensor:
        """(blocks,) float64 in [0, 2]: mean over tokens of 1 - cos(x_b, x_b+1), the block influence of ShortGPT."""
        return self.turned / self.attention[0].total.count

    def tensors(self) -> dict[str, Tensor]:
        """Flat names to tensors, as saved in safetensors."""
        flat = {"turned": self.turned}
        for kind, _ in KINDS:
            for index, channel in enumerate(getattr(self, kind)):
                flat |= {f"{kind}.{index}.{name}": value for name, value in channel.tensors().items()}
        return flat

    @classmethod
    def from_tensors(cls, flat: dict[str, Tensor]) -> CorpusStatistics:
        """What `tensors` gave, in any order; extras may be left out."""
        nested: dict[tuple[str, int], dict[str, Tensor]] = {}
        for name, value in flat.items():
            if name != "turned":
                kind, index, rest = name.split(".", 2)
                nested.setdefault((kind, int(index)), {})[rest] = value
        depth = len(flat["turned"])
        return cls(
            *([ChannelStatistics.from_tensors(nested[kind, b]) for b in range(depth)] for kind, _ in KINDS),
            turned=flat["turned"],
        )


def kind_of(name: str) -> str:
    """Which of `moments` and `EXTRAS` a tensor of `CorpusStatistics.tensors` belongs to: each is cached by itself."""
    return next((extra for extra in EXTRAS if f".{extra}" in name), "moments")


def pooled(statistics: Iterable[CorpusStatistics], *, gram: bool = True) -> CorpusStatistics:
    """The statistics of several corpora read as one text (equal tokens each: the corpora averaged).

    Moments and Gram matrices are exactly those of the joined text. Saliency is the mean of the corpora's, since it
    takes absolute values after each one's sum. `gram=False` leaves Gram matrices out.
    """

    def pool(parts: list[ChannelStatistics]) -> ChannelStatistics:
        halves = tuple(sum((part.halves[h] for part in parts[1:]), start=parts[0].halves[h]) for h in (0, 1))
        grams = [part.gram for part in parts if gram and part.gram is not None]
        salient = [part.saliency for part in parts if part.saliency is not None]
        return ChannelStatistics(
            halves,
            _sum(grams) if len(grams) == len(parts) else None,
            tuple(sum(same[1:], start=same[0]) / len(parts) for same in zip(*salient, strict=True))
            if len(salient) == len(parts)
            else None,
        )

    statistics = list(statistics)
    return CorpusStatistics(
        *(
            [pool(list(parts)) for parts in zip(*(getattr(s, kind) for s in statistics), strict=True)]
            for kind, _ in KINDS
        ),
        turned=torch.stack([s.turned for s in statistics]).sum(0),
    )


def _sum(grams: Sequence[Tensor | StoredGram]) -> Tensor | StoredGram:
    if isinstance(grams[0], StoredGram):
        return StoredGram(tuple(source for gram in grams for source in gram.sources))
    return sum(grams[1:], start=grams[0])


def gram_bytes(blocks: Sequence[Block]) -> int:
    """Bytes of the Gram matrices of one corpus: 4 (E N^2 + C^2) per block of E experts of N neurons (E = 1 if dense)
    and C attention channels; 485 MB + 67 MB for a block of Llama-2-7B.
    """
    return sum(4 * (b.experts * b.neurons**2 + b.output.in_features**2) for b in blocks)
