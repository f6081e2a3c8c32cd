"""Calibration: one pass of the frozen decoder over each corpus, statistics summed over devices."""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import ExitStack
from functools import partial

import lightning as L
from torch import Tensor
from transformers import PreTrainedModel

from gprune.calibration.collector import Collector
from gprune.calibration.layerwise import Walk
from gprune.calibration.statistics import CorpusStatistics, StoredGram
from gprune.models.blocks import Block
from gprune.stages.base import FrozenLMStage

Store = Callable[[str, Block, dict[str, Tensor]], dict[str, StoredGram]]


class _RemoveHooks(L.Callback):
    """After an exception Lightning calls hooks of callbacks, and none of the module."""

    def on_exception(self, trainer: L.Trainer, pl_module: CalibrationStage, exception: BaseException) -> None:
        pl_module.hooks.close()


class CalibrationStage(FrozenLMStage):
    """`trainer.test(stage, loaders)` with one loader per corpus; `statistics` then holds one entry per corpus.

    With `saliency` the pass goes backward too: the trainer must not be in inference mode. With `walk` a corpus goes
    through the model block by block (`gprune.calibration.layerwise`), to the same bits, once its last batch has come;
    `store(corpus, block, matrices by kind)` then writes each block's Gram matrices and returns their places.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        corpora: list[str],
        gram: bool = False,
        saliency: Collection[str] = (),
        walk: bool = False,
        store: Store | None = None,
        shard: bool = False,
    ):
        super().__init__(model, shard=shard)
        self.hooks = ExitStack()  # on the model, for the corpus whose batches are coming
        assert not (walk and saliency), "no gradient goes block by block"
        self.corpora, self.gram, self.saliency, self.walk, self.store = corpora, gram, saliency, walk, store
        self.statistics: dict[str, CorpusStatistics] = {}
        self._sums: Collector | Walk | None = None  # of the corpus whose batches are coming
        self._current: str | None = None

    def configure_callbacks(self) -> list[L.Callback]:
        return [_RemoveHooks()]

    def test_step(self, batch: dict[str, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Take a batch through the model, or into the walk; a corpus that is over is closed first."""
        if self.corpora[dataloader_idx] != self._current:
            self._close()
            self._current = self.corpora[dataloader_idx]
            if self.walk:
                self._sums = Walk(self.lm)
            else:
                collector = Collector(self.lm, gram=self.gram, saliency=self.saliency)
                self._sums = self.hooks.enter_context(collector)
        take = self._sums.add if self.walk else self._sums.observe
        take(batch["input_ids"], batch["half"], batch["weight"])

    def on_test_epoch_end(self) -> None:
        self._close()

    def _close(self) -> None:
        """Compute the statistics of the corpus whose batches have all come, if there is one."""
        self.hooks.close()
        corpus, sums, self._sums = self._current, self._sums, None
        if isinstance(sums, Walk):
            store = None if self.store is None else partial(self.store, corpus)
            self.statistics[corpus] = sums.statistics(gram=self.gram, store=store)
            self.trainer.strategy.barrier()  # the first process writes what all will read
        elif sums is not None:
            self.statistics[corpus] = sums.compute()
            sums.release()
