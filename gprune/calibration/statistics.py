"""Statistics of the inputs of down projections (neurons) and output projections (attention channels).

They are collected by one pass per corpus through the frozen decoder, without the language-model head:

- count, sum and sum of squares of each channel in each half of the corpus, in float64. The halves are needed for the
  noise floor of rank drift;
- the mean angle between input and output of each block;
- on demand, Gram matrices for recovery, Taylor saliency, which needs a backward pass, and sums over the tokens that are
  routed to each expert.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gprune.calibration import EXTRAS
from gprune.errors import UserError
from gprune.storage.files import Cache, key_of, read_tensors
from gprune.units.structure import Units, current_name

SUMS = ("count", "sum", "sum_sq")
CACHE = Cache("statistics", tensors=True)  # shared between runs


@dataclass(frozen=True)
class StoredGram:
    """A Gram matrix in files, read again on each access. With several files it is the sum of theirs, added in order."""

    paths: tuple[Path, ...]  # each file has one tensor, `gram`
    expert: int | None = None  # index into a stack of matrices; None: all of them

    def read(self) -> Tensor:
        """Return the matrix, (C, C) float32, or (E, C / E, C / E) for E experts."""
        total: Tensor | None = None
        for path in self.paths:
            tensors = read_tensors(path)
            if tensors is None or "gram" not in tensors:
                remedy = "Remove it, and run again. Processes on several machines need a shared $GPRUNE_CACHE."
                raise UserError(f"Cannot read a Gram matrix: {path} is missing or incomplete. {remedy}")
            total = tensors["gram"] if total is None else total.add_(tensors["gram"])
        return total if self.expert is None else total[self.expert]

    def __add__(self, other: StoredGram) -> StoredGram:
        """Return the sum of two matrices, which are added when they are read."""
        return StoredGram(self.paths + other.paths)


@dataclass(frozen=True)
class Moments:
    """Sums over tokens for C channels, float64. `gram` and `saliency` are None unless they were collected."""

    count: Tensor  # number of tokens, (); (C,) for experts, which see different tokens
    sum: Tensor  # (C,)
    sum_sq: Tensor  # (C,)
    gram_source: Tensor | StoredGram | None = None  # only for the whole corpus
    saliency: Tensor | None = None  # (C,), see `ChannelStatistics`

    @property
    def gram(self) -> Tensor | None:
        """Sum over tokens of x x^T, (C, C) float32, or (E, C / E, C / E) for E experts; None if not collected.

        A stored matrix is read from its file on each access.

        Raises:
            UserError: if the file is missing or invalid.
        """
        return self.gram_source.read() if isinstance(self.gram_source, StoredGram) else self.gram_source

    @property
    def mean(self) -> Tensor:
        """Mean of x, (C,) float64."""
        return self.sum / self.count.clamp_min(1)  # 0 without tokens

    @property
    def mean_sq(self) -> Tensor:
        """Mean of x^2, (C,) float64."""
        return self.sum_sq / self.count.clamp_min(1)

    @property
    def variance(self) -> Tensor:
        """Population variance over tokens, (C,), clamped at 0 because of rounding."""
        return (self.mean_sq - self.mean.square()).clamp_min(0)

    def of_expert(self, index: int, experts: int) -> Moments:
        """Return the moments of expert number `index` of `experts`, without saliency."""
        count, total, total_sq = (getattr(self, name).view(experts, -1)[index] for name in SUMS)
        gram = self.gram_source
        if isinstance(gram, StoredGram):
            gram = replace(gram, expert=index)
        elif gram is not None:
            gram = gram[index]
        return Moments(count, total, total_sq, gram)

    def copy(self) -> Moments:
        """Return a copy that may be changed. The Gram matrix is shared."""
        return copy.deepcopy(self, {id(self.gram_source): self.gram_source})  # `deepcopy` shares what is in its memo

    def __add__(self, other: Moments) -> Moments:
        """Return the moments of two texts together, without Gram matrix and saliency."""
        return Moments(*(getattr(self, name) + getattr(other, name) for name in SUMS))


@dataclass(frozen=True)
class Routing:
    """Sums over the tokens that a router sends to each of E experts, float64, (E,) each.

    The weight of a token is the factor by which the model multiplies the expert's output y before it adds the outputs
    of the chosen experts; the norm is the Euclidean norm of y.
    """

    count: Tensor  # number of tokens
    weight: Tensor  # sum of weights
    norm: Tensor  # sum of norms
    weighted_norm: Tensor  # sum of weight x norm

    def mean(self, name: str) -> Tensor:
        """Return a sum, such as `norm`, divided by the number of tokens, (E,); 0 for experts without tokens."""
        return getattr(self, name) / self.count.clamp_min(1)


@dataclass(frozen=True)
class ChannelStatistics:
    """Moments of both halves of a corpus and, if collected, the Gram matrix, saliency and routing."""

    halves: tuple[Moments, Moments]
    gram: Tensor | StoredGram | None = None  # of the whole corpus
    # Taylor saliency, (C,) float64, of half 0, half 1 and the whole corpus (not the sum of the halves): sum_k |w_k g_k|
    # over a channel's weights, where g is the mean over windows of the gradient of a window's mean next-token
    # cross-entropy (nats). Weights of a neuron are the rows of gate and up and the column of down. Weights of an
    # attention channel are the rows of query, key and value and the column of the output projection; terms of a
    # key/value head are divided equally among its query heads.
    saliency: tuple[Tensor, Tensor, Tensor] | None = None
    routing: Tensor | None = None  # (4, E) float64, the sums of `Routing` over the whole corpus

    @property
    def total(self) -> Moments:
        """Moments of the whole corpus."""
        saliency = None if self.saliency is None else self.saliency[2]
        return replace(self.halves[0] + self.halves[1], gram_source=self.gram, saliency=saliency)

    def half(self, index: int) -> Moments:
        """Return the moments of half 0 or 1 of the corpus, without a Gram matrix."""
        return replace(self.halves[index], saliency=None if self.saliency is None else self.saliency[index])

    def tensors(self) -> dict[str, Tensor]:
        """Return tensors by flat names."""
        flat = {f"{half}.{name}": getattr(m, name) for half, m in enumerate(self.halves) for name in SUMS}
        if self.gram is not None:
            flat["gram"] = self.gram
        if self.saliency is not None:
            flat |= {f"saliency.{part}": saliency for part, saliency in enumerate(self.saliency)}
        if self.routing is not None:
            flat["routing"] = self.routing
        return flat

    @classmethod
    def from_tensors(cls, flat: dict[str, Tensor]) -> ChannelStatistics:
        """Return statistics from the result of `tensors`."""
        halves = tuple(Moments(*(flat[f"{half}.{name}"] for name in SUMS)) for half in (0, 1))
        # The parts are half 0, half 1 and the whole corpus.
        saliency = tuple(flat[f"saliency.{part}"] for part in range(3)) if "saliency.0" in flat else None
        return cls(halves, flat.get("gram"), saliency, flat.get("routing"))


@dataclass(frozen=True)
class CorpusStatistics:
    """Statistics of one corpus."""

    channels: Mapping[str, ChannelStatistics]  # by key of the units: of neurons, or of attention channels
    turned: Tensor  # (blocks,) float64: sum over tokens of 1 - cos(input of the block, output of the block)
    errors: Tensor | None = None  # (blocks, widths) float64, from `calibration.block_errors`; for rules that need it

    @property
    def influence(self) -> Tensor:
        """(blocks,) float64 in [0, 2]: mean over tokens of 1 - cos(x_b, x_b+1), the block influence of ShortGPT."""
        return self.turned / self.channels["kv_groups.0"].total.count

    def tensors(self) -> dict[str, Tensor]:
        """Return tensors by flat names, as in safetensors files."""
        flat = {"turned": self.turned}
        for key, channels in self.channels.items():
            flat |= {f"{key}.{name}": tensor for name, tensor in channels.tensors().items()}
        return flat

    def only(self, kinds: Collection[str]) -> CorpusStatistics:
        """Return the statistics of some kinds (`kind_of`), which include `moments`."""
        return self.from_tensors({name: t for name, t in self.tensors().items() if kind_of(name) in kinds})

    @classmethod
    def of_ranges(cls, ranges: Sequence[CorpusStatistics]) -> CorpusStatistics:
        """Return the statistics of all blocks from those of consecutive ranges of blocks."""
        channels = {key: of_key for of_range in ranges for key, of_key in of_range.channels.items()}
        return cls(channels, turned=torch.cat([of_range.turned for of_range in ranges]))

    def copy(self) -> CorpusStatistics:
        """Return a copy that may be changed. Gram matrices are shared."""
        return copy.deepcopy(self, {id(c.gram): c.gram for c in self.channels.values()})

    @classmethod
    def from_tensors(cls, flat: Mapping[str, Tensor]) -> CorpusStatistics:
        """Return statistics from the result of `tensors`, in any order; extras may be missing."""
        by_key: dict[str, dict[str, Tensor]] = {}
        for name, tensor in flat.items():
            if name != "turned":
                kind, number, rest = current_name(name).split(".", 2)
                by_key.setdefault(f"{kind}.{number}", {})[rest] = tensor
        return cls({key: ChannelStatistics.from_tensors(t) for key, t in by_key.items()}, turned=flat["turned"])


def kind_of(name: str) -> str:
    """Return the kind of a tensor of `CorpusStatistics.tensors`: `moments`, or the one of `EXTRAS` in its name.

    Each kind is stored in a file of its own.
    """
    return next((extra for extra in EXTRAS if f".{extra}" in name), "moments")


def pool_statistics(statistics: Iterable[CorpusStatistics]) -> CorpusStatistics:
    """Pool statistics of several corpora, weighted by their numbers of tokens.

    Moments, Gram matrices and routing are exact for the joined text. Saliency is averaged over corpora, because
    absolute values of gradient sums cannot be added. Errors of blocks are left out.
    """
    statistics = list(statistics)
    channels = {key: _pool_channels([s.channels[key] for s in statistics]) for key in statistics[0].channels}
    return CorpusStatistics(channels, torch.stack([s.turned for s in statistics]).sum(0))


def _pool_channels(corpora: Sequence[ChannelStatistics]) -> ChannelStatistics:
    """Pool the statistics of one block over corpora; see `pool_statistics`.

    A Gram matrix, saliency or routing that one corpus lacks is None.
    """
    halves = tuple(_sum([corpus.halves[h] for corpus in corpora]) for h in (0, 1))
    gram = _sum([corpus.gram for corpus in corpora])
    routing = _sum([corpus.routing for corpus in corpora])
    saliency = None
    if all(corpus.saliency is not None for corpus in corpora):
        by_part = zip(*(corpus.saliency for corpus in corpora), strict=True)
        saliency = tuple(_sum(of_part) / len(corpora) for of_part in by_part)
    return ChannelStatistics(halves, gram, saliency, routing)


def _sum(terms: Sequence[Any]) -> Any:
    """Add moments, Gram matrices or tensors; None if a term is None."""
    return None if any(term is None for term in terms) else sum(terms[1:], start=terms[0])


def gram_bytes(units: Iterable[Units]) -> int:
    """Return the size of one corpus's Gram matrices in bytes: 4 E C^2 for C channels that read units, of E experts.

    A block of Llama-2-7B needs 485 MB for neurons and 67 MB for attention.
    """
    return sum(4 * u.rows * len(u.slices[-1].unit) ** 2 for u in units if u.reads and u.kind != "experts")


def ranges_in_memory(units: Sequence[Units], limit: float) -> list[list[int]]:
    """Divide a model into ranges of layers whose Gram matrices have at most `limit` bytes, or into single layers.

    Returns the numbers of the blocks of each range.
    """
    ranges: list[list[Units]] = [[]]
    for _, of_layer in groupby(units, key=lambda u: u.layer):
        of_layer = list(of_layer)
        if ranges[-1] and gram_bytes([*ranges[-1], *of_layer]) > limit:
            ranges.append([])
        ranges[-1] += of_layer
    return [[u.number for u in of_range if u.kind == "neurons"] for of_range in ranges]


@dataclass(frozen=True)
class StatisticsCache:
    """Cached statistics of one model on several corpora, in one file per corpus and kind.

    Kinds have separate files, because moments are the same bits whatever else was collected in the same pass. Gram
    matrices beyond memory have a file per block, and are read from it on access.
    """

    texts: Mapping[str, str]  # corpus -> content hash of its windows
    bits: Mapping[str, Any]  # everything else that determines the numbers to the last bit
    scopes: Collection[str]  # scopes (`ffn`, `attention`) whose saliency is collected
    stored: Collection[str] = ()  # keys of units whose Gram matrices stay in files; empty: they fit into memory
    gram_bits: Mapping[str, Any] = field(default_factory=dict)  # like `bits`, but only for Gram matrices

    def read(self, corpus: str, kinds: Collection[str]) -> CorpusStatistics | None:
        """Return the statistics of a corpus, or None unless all kinds are cached and valid."""
        flat: dict[str, Tensor | StoredGram] = {}  # by the names of `CorpusStatistics.tensors`
        for kind in kinds:
            is_stored = kind == "gram" and self.stored
            tensors = self._stored_grams(corpus) if is_stored else CACHE.read(self._key(corpus, kind))
            if tensors is None:
                return None
            flat |= tensors
        return CorpusStatistics.from_tensors(flat)

    def write(self, corpus: str, statistics: CorpusStatistics, kinds: Collection[str]) -> None:
        """Write kinds of statistics, except Gram matrices that `store` writes."""
        tensors = statistics.tensors()
        for kind in kinds:
            if kind != "gram" or not self.stored:
                of_kind = {name: tensor for name, tensor in tensors.items() if kind_of(name) == kind}
                CACHE.write(self._key(corpus, kind), of_kind)

    def store(self, corpus: str, statistics: CorpusStatistics) -> CorpusStatistics:
        """Write the Gram matrices of a range of blocks. Return its statistics with references to the files."""
        channels = {}
        for units, of_units in statistics.channels.items():
            key = self._key(corpus, "gram", units)
            CACHE.write(key, {"gram": of_units.gram})
            channels[units] = replace(of_units, gram=StoredGram((CACHE.file(key),)))
        return replace(statistics, channels=channels)

    def _stored_grams(self, corpus: str) -> dict[str, StoredGram] | None:
        """Return references to the Gram matrices of all units, or None if a file is missing."""
        files = {units: CACHE.file(self._key(corpus, "gram", units)) for units in self.stored}
        if not all(file.is_file() for file in files.values()):
            return None
        return {f"{units}.gram": StoredGram((file,)) for units, file in files.items()}

    def _key(self, corpus: str, kind: str, *part: str) -> str:
        """Return the key of a kind of statistics or, with `part`, of the Gram matrix of units."""
        bits = self.bits | self.gram_bits if kind == "gram" else self.bits
        if kind == "saliency":  # the content of the file depends on the scopes; keys name this kind `taylor`
            kind, part = "taylor", tuple(self.scopes)
        return key_of(text=self.texts[corpus], kind=[kind, *part] if part else kind, **bits)
