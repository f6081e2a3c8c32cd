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
        by_kind = [self._read(corpus, kind) for kind in kinds]
        if any(tensors is None for tensors in by_kind):
            return None
        flat: dict[str, Tensor | StoredGram] = {}  # by the names of `CorpusStatistics.tensors`
        for tensors in by_kind:
            flat |= tensors
        return CorpusStatistics.from_tensors(flat)

    def write(self, corpus: str, statistics: CorpusStatistics, kinds: Collection[str]) -> None:
        """Write kinds of statistics, except Gram matrices that `store` writes block by block."""
        tensors = statistics.tensors()
        for kind in kinds:
            if kind != "gram" or self.walked_blocks is None:
                of_kind = {name: tensor for name, tensor in tensors.items() if kind_of(name) == kind}
                write_tensors(self._path(corpus, kind), of_kind)

    def store(self, corpus: str, block: Block, grams: dict[str, Tensor]) -> dict[str, StoredGram]:
        """Write the Gram matrices of a block by scope, `ffn` and `attention`, and return references to the files."""
        for scope, gram in grams.items():
            write_tensors(self._path(corpus, ["gram", scope, block.index]), {"gram": gram})
        return {scope: self._gram(corpus, scope, block.index) for scope in grams}

    def _read(self, corpus: str, kind: str) -> dict[str, Tensor | StoredGram] | None:
        """Return the tensors of one kind by their names in `CorpusStatistics.tensors`, or None if any is missing."""
        if kind != "gram" or self.walked_blocks is None:
            return read_tensors(self._path(corpus, kind))
        grams: dict[str, StoredGram] = {}
        for block_index in range(self.walked_blocks):
            for scope in OUTPUT_PROJECTIONS:
                # Read only to verify the file's hash, once per process; the matrix is loaded again on access.
                if read_tensors(self._path(corpus, ["gram", scope, block_index]), once=True) is None:
                    return None
                grams[f"{scope}.{block_index}.gram"] = self._gram(corpus, scope, block_index)
        return grams

    def _gram(self, corpus: str, scope: str, block_index: int) -> StoredGram:
        """Return a reference to the Gram matrix of a block, which has a file of its own."""
        return StoredGram(((self._path(corpus, ["gram", scope, block_index]), "gram"),))

    def _path(self, corpus: str, kind: str | list[str | int]) -> Path:
        """Return the path of a file."""
        bits = dict(self.bits)
        if kind == "gram" or kind[0] == "gram":
            bits |= self.gram_bits
        kind_in_key = kind
        if kind == "saliency":  # the content of the file depends on the scopes
            kind_in_key = ["taylor", *self.scopes]
        key = key_of(text=self.texts[corpus], kind=kind_in_key, **bits)
        return cache_dir() / "statistics" / f"{key}.safetensors"
