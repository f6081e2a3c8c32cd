"""Calibration: one pass of the frozen decoder over each corpus, with statistics summed over devices."""

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
        walk: whether to run a corpus through the model block by block (`gprune.calibration.layerwise`) after its last
            batch. The results have the same bits.
        store: with `walk`, `store(corpus, block, matrices by scope)` writes the Gram matrices of a block and returns
            references to the files.
        routing: whether to collect sums over the tokens of each expert.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        corpora: list[str],
        gram: bool = False,
        saliency: Collection[str] = (),
        walk: bool = False,
        store: Store | None = None,
        routing: bool = False,
    ):
        super().__init__(model)
        assert not (walk and saliency), "gradients cannot be collected block by block"
        self.corpora = corpora
        self.gram = gram
        self.saliency = saliency
        self.walk = walk
        self.routing = routing
        self.store = store
        self.statistics: dict[str, CorpusStatistics] = {}
        self.hooks = ExitStack()  # hooks on the model for the current corpus
        self._sums: Collector | Walk | None = None  # sums of the current corpus
        self._current_corpus: str | None = None

    def configure_callbacks(self) -> list[L.Callback]:
        return [_RemoveHooks()]

    def test_step(self, batch: dict[str, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Process a batch. If it is the first one of its corpus, first finish the statistics of the previous corpus."""
        if self.corpora[dataloader_idx] != self._current_corpus:
            self._finish_corpus()
            self._current_corpus = self.corpora[dataloader_idx]
            if self.walk:
                self._sums = Walk(self.lm)
            else:
                collector = Collector(self.lm, gram=self.gram, saliency=self.saliency, routing=self.routing)
                self._sums = self.hooks.enter_context(collector)
        add_batch = self._sums.add if self.walk else self._sums.observe
        add_batch(batch["input_ids"], batch["half"], batch["weight"])

    def on_test_epoch_end(self) -> None:
        self._finish_corpus()

    def _finish_corpus(self) -> None:
        """Compute the statistics of the current corpus, if there is one, and free its sums."""
        self.hooks.close()
        corpus = self._current_corpus
        sums = self._sums
        self._sums = None
        if isinstance(sums, Walk):
            store = None if self.store is None else partial(self.store, corpus)
            self.statistics[corpus] = sums.statistics(gram=self.gram, routing=self.routing, store=store)
            self.trainer.strategy.barrier()  # rank 0 writes files that all ranks read
        elif sums is not None:
            self.statistics[corpus] = sums.compute()
