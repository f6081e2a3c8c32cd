"""Cache of statistics, shared between runs: one file per corpus and kind of statistics.

Kinds have separate files, because moments are the same bits whatever else was collected in the same pass. Gram matrices
that are collected block by block (`gprune.calibration.layerwise`) have a file per block, which is read on each access.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from gprune.calibration.projections import OUTPUT_PROJECTIONS
from gprune.calibration.statistics import CorpusStatistics, StoredGram, kind_of
from gprune.models.blocks import Block
from gprune.storage.cache import cache_dir
from gprune.storage.files import key_of, read_tensors, write_tensors


@dataclass(frozen=True)
class StatisticsCache:
    """Cached statistics of one model on several corpora."""

    texts: Mapping[str, str]  # corpus -> content hash of its windows
    bits: Mapping[str, Any]  # everything else that determines the numbers to the last bit
    scopes: Collection[str]  # scopes (`ffn`, `attention`) whose saliency is collected
    walked_blocks: int | None  # number of blocks if Gram matrices are collected block by block, else None
    gram_bits: Mapping[str, Any] = field(default_factory=dict)  # like `bits`, but only for Gram matrices

    def read(self, corpus: str, kinds: Collection[str]) -> CorpusStatistics | None:
        """Return the statistics of a corpus, or None unless all kinds are cached and valid."""
        parts = [self._read(corpus, kind) for kind in kinds]
        if any(part is None for part in parts):
            return None
        return CorpusStatistics.from_tensors({name: t for part in parts for name, t in part.items()})

    def write(self, corpus: str, statistics: CorpusStatistics, kinds: Collection[str]) -> None:
        """Write kinds of statistics, except Gram matrices that `store` writes block by block."""
        tensors = statistics.tensors()
        for kind in kinds:
            if kind != "gram" or self.walked_blocks is None:
                write_tensors(self._path(corpus, kind), {n: t for n, t in tensors.items() if kind_of(n) == kind})

    def store(self, corpus: str, block: Block, grams: dict[str, Tensor]) -> dict[str, StoredGram]:
        """Write the Gram matrices of a block by kind, `ffn` and `attention`, and return references to the files."""
        for kind, gram in grams.items():
            write_tensors(self._path(corpus, ["gram", kind, block.index]), {"gram": gram})
        return {kind: self._gram(corpus, kind, block.index) for kind in grams}

    def _read(self, corpus: str, kind: str) -> dict[str, Tensor | StoredGram] | None:
        if kind != "gram" or self.walked_blocks is None:
            return read_tensors(self._path(corpus, kind))
        places = [(k, b) for b in range(self.walked_blocks) for k in OUTPUT_PROJECTIONS]
        if any(read_tensors(self._path(corpus, ["gram", k, b]), once=True) is None for k, b in places):  # one at a time
            return None
        return {f"{k}.{b}.gram": self._gram(corpus, k, b) for k, b in places}

    def _gram(self, corpus: str, kind: str, block: int) -> StoredGram:
        return StoredGram(((self._path(corpus, ["gram", kind, block]), "gram"),))

    def _path(self, corpus: str, kind: str | list[str | int]) -> Path:
        own = self.gram_bits if kind == "gram" or kind[0] == "gram" else {}
        kind = ["taylor", *self.scopes] if kind == "saliency" else kind
        key = key_of(text=self.texts[corpus], kind=kind, **self.bits, **own)
        return cache_dir() / "statistics" / f"{key}.safetensors"
