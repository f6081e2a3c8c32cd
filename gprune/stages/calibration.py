"""Calibration: one pass of the frozen decoder over each corpus, with statistics summed over devices."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import ExitStack

import lightning as L
from torch import Tensor
from transformers import PreTrainedModel

from gprune.calibration.collector import Collector
from gprune.calibration.statistics import CorpusStatistics
from gprune.stages.base import FrozenLMStage


class _RemoveHooks(L.Callback):
    """Remove hooks after an exception. Lightning calls `on_exception` of callbacks only, not of the module."""

    def on_exception(self, trainer: L.Trainer, pl_module: CalibrationStage, exception: BaseException) -> None:
        pl_module.hooks.close()


class CalibrationStage(FrozenLMStage):
    """Stage that collects statistics: after `trainer.test(stage, loaders)` `statistics` has one entry per corpus.

    Args:
        model: the frozen language model.
        corpora: names of the corpora, in the order of the loaders.
        gram: whether to collect Gram matrices.
        saliency: scopes (`ffn`, `attention`) whose gradients are collected. This needs a backward pass, so the Trainer
            must not be in inference mode.
        routing: whether to collect sums over the tokens of each expert.
        blocks: numbers of the blocks of a range of layers, whose statistics are collected alone; by default all.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        corpora: list[str],
        gram: bool = False,
        saliency: Collection[str] = (),
        routing: bool = False,
        blocks: Sequence[int] | None = None,
    ):
        super().__init__(model)
        self.corpora = corpora
        self.gram = gram
        self.saliency = saliency
        self.routing = routing
        self.blocks = blocks
        self.statistics: dict[str, CorpusStatistics] = {}
        self.hooks = ExitStack()  # hooks on the model for the current corpus
        self._sums: Collector | None = None  # sums of the current corpus
        self._current_corpus: str | None = None

    def configure_callbacks(self) -> list[L.Callback]:
        return [_RemoveHooks()]

    def test_step(self, batch: dict[str, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Process a batch. If it is the first one of its corpus, first finish the statistics of the previous corpus."""
        if self.corpora[dataloader_idx] != self._current_corpus:
            self._finish_corpus()
            self._current_corpus = self.corpora[dataloader_idx]
            collector = Collector(
                self.lm, gram=self.gram, saliency=self.saliency, routing=self.routing, blocks=self.blocks
            )
            self._sums = self.hooks.enter_context(collector)
        self._sums.observe(batch["input_ids"], batch["half"], batch["weight"])

    def on_test_epoch_end(self) -> None:
        self._finish_corpus()

    def _finish_corpus(self) -> None:
        """Compute the statistics of the current corpus, if there is one, and free its sums."""
        self.hooks.close()
        if self._sums is not None:
            self.statistics[self._current_corpus] = self._sums.compute()
        self._sums = None
