"""Statistics in the cache, by content: one file per corpus and kind, shared between runs.

Each kind by itself: moments are the same bits whatever else was collected in their pass. Gram matrices that are
collected block by block (`gprune.calibration.layerwise`) lie in a file per block, and are read when they are looked at.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from gprune.calibration.statistics import KINDS, CorpusStatistics, StoredGram, kind_of
from gprune.models.blocks import Block
from gprune.storage.cache import cache_dir
from gprune.storage.files import key_of, read_tensors, write_tensors


@dataclass(frozen=True)
class StatisticsCache:
    """Where the statistics of one model and some corpora lie."""

    texts: Mapping[str, str]  # corpus -> content hash of its windows
    bits: Mapping[str, Any]  # what else determines the numbers, down to their last bits
    scopes: Collection[str]  # whose saliency is meant
    walked_blocks: int | None  # how many, where Gram matrices lie block by block

    def read(self, corpus: str, kinds: Collection[str]) -> CorpusStatistics | None:
        """What is there of a corpus; None unless all kinds are, and whole."""
        parts = [self._read(corpus, kind) for kind in kinds]
        if any(part is None for part in parts):
            return None
        return CorpusStatistics.from_tensors({name: t for part in parts for name, t in part.items()})

    def write(self, corpus: str, statistics: CorpusStatistics, kinds: Collection[str]) -> None:
        """Leave the kinds; Gram matrices block by block are there already, by `store`."""
        tensors = statistics.tensors()
        for kind in kinds:
            if kind != "gram" or self.walked_blocks is None:
                write_tensors(self._path(corpus, kind), {n: t for n, t in tensors.items() if kind_of(n) == kind})

    def store(self, corpus: str, block: Block, grams: dict[str, Tensor]) -> dict[str, StoredGram]:
        """Leave a block's Gram matrices, `ffn` and `attention`, and say where."""
        for kind, gram in grams.items():
            write_tensors(self._path(corpus, ["gram", kind, block.index]), {"gram": gram})
        return {kind: self._gram(corpus, kind, block.index) for kind in grams}

    def _read(self, corpus: str, kind: str) -> dict[str, Tensor | StoredGram] | None:
        if kind != "gram" or self.walked_blocks is None:
            return read_tensors(self._path(corpus, kind))
        places = [(k, b) for b in range(self.walked_blocks) for k, _ in KINDS]
        if any(read_tensors(self._path(corpus, ["gram", k, b])) is None for k, b in places):  # each read and let go
            return None
        return {f"{k}.{b}.gram": self._gram(corpus, k, b) for k, b in places}

    def _gram(self, corpus: str, kind: str, block: int) -> StoredGram:
        return StoredGram(((self._path(corpus, ["gram", kind, block]), "gram"),))

    def _path(self, corpus: str, kind: str | list[str | int]) -> Path:
        kind = [kind, *self.scopes] if kind == "saliency" else kind
        return cache_dir() / "statistics" / f"{key_of(text=self.texts[corpus], kind=kind, **self.bits)}.safetensors"
