"""Calibration: one pass of the frozen decoder over each corpus, statistics summed over devices."""

from __future__ import annotations

import gc
from collections.abc import Collection

from torch import Tensor
from transformers import PreTrainedModel

from gprune.stages.base import FrozenLMStage
from gprune.statistics import Collector, CorpusStatistics


class CalibrationStage(FrozenLMStage):
    """`trainer.test(stage, loaders)` with one loader per corpus; `statistics` then holds one entry per loader.

    With `saliency` the pass goes backward too: the trainer must not be in inference mode.
    """

    def __init__(
        self, model: PreTrainedModel, corpora: list[str], *, gram: bool = False, saliency: Collection[str] = ()
    ):
        super().__init__(model)
        self.corpora = corpora
        self.gram, self.saliency = gram, saliency
        self.statistics: dict[str, CorpusStatistics] = {}
        self._collector: Collector | None = None
        self._current: str | None = None

    def test_step(self, batch: dict[str, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        if self.corpora[dataloader_idx] != self._current:
            self._close()
            self._current = self.corpora[dataloader_idx]
            self._collector = Collector(self.lm, gram=self.gram, saliency=self.saliency).__enter__()
        self._collector.observe(batch["input_ids"], batch["index"] % 2, batch["weight"])

    def on_test_epoch_end(self) -> None:
        self._close()

    def teardown(self, stage: str) -> None:
        if self._collector is not None:  # an exception came by
            self._collector.__exit__()
            self._collector = None

    def _close(self) -> None:
        if self._collector is not None:
            self._collector.__exit__()
            self.statistics[self._current] = self._collector.compute()
            self._collector = None
            gc.collect()  # torchmetrics refer to themselves: gigabytes of sums would wait for the collector's next turn
