"""Calibration: one pass of the frozen decoder over each corpus, statistics summed over devices."""

from __future__ import annotations

import gc
from collections.abc import Callable, Collection

import lightning as L
from lightning.pytorch.callbacks import LambdaCallback
from torch import Tensor
from transformers import PreTrainedModel

from gprune.calibration.collector import Collector
from gprune.calibration.layerwise import Walk
from gprune.calibration.statistics import CorpusStatistics, StoredGram
from gprune.models.blocks import Block
from gprune.stages.base import FrozenLMStage

Store = Callable[[str, Block, dict[str, Tensor]], dict[str, StoredGram]]


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
        *,
        gram: bool = False,
        saliency: Collection[str] = (),
        walk: bool = False,
        store: Store | None = None,
        shard: bool = False,
    ):
        super().__init__(model, shard=shard)
        assert not (walk and saliency), "no gradient goes block by block"
        self.corpora, self.gram, self.saliency, self.walk, self.store = corpora, gram, saliency, walk, store
        self.statistics: dict[str, CorpusStatistics] = {}
        self._collector: Collector | None = None
        self._walk: Walk | None = None
        self._current: str | None = None

    def test_step(self, batch: dict[str, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Take a batch through the model, or into the walk; a corpus that is over is closed first."""
        if self.corpora[dataloader_idx] != self._current:
            self._close()
            self._current = self.corpora[dataloader_idx]
            if self.walk:
                self._walk = Walk(self.lm)
            else:
                self._collector = Collector(self.lm, gram=self.gram, saliency=self.saliency).__enter__()
        windows = batch["input_ids"], batch["half"], batch["weight"]
        if self._walk is not None:
            self._walk.add(*windows)
        else:
            self._collector.observe(*windows)

    def on_test_epoch_end(self) -> None:
        self._close()

    def configure_callbacks(self) -> list[L.Callback]:
        """After an exception Lightning tells callbacks, and no stage: the model is to be left without hooks."""
        return [LambdaCallback(on_exception=lambda *_: self._let_go())]

    def _let_go(self) -> None:
        if self._collector is not None:
            self._collector.__exit__()
            self._collector = None

    def _close(self) -> None:
        """Compute the statistics of the corpus whose batches have all come, if there is one."""
        if self._walk is not None:
            walk, corpus, self._walk = self._walk, self._current, None
            store = None if self.store is None else lambda block, grams: self.store(corpus, block, grams)
            self.statistics[corpus] = walk.statistics(gram=self.gram, store=store)
            self.trainer.strategy.barrier()  # the first process writes what all will read
        if self._collector is not None:
            self._collector.__exit__()
            self.statistics[self._current] = self._collector.compute()
            self._collector = None
            gc.collect()  # torchmetrics refer to themselves: otherwise gigabytes of sums would stay for a while
