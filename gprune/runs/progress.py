"""The progress bar of a stage."""

from __future__ import annotations

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ProgressBar

from gprune.screen import Advance, Screen


class StageBar(ProgressBar):
    """The bar of a stage on a screen: how far all of its epochs are, its loss, and the tokens that all devices take."""

    def __init__(self, screen: Screen, what: str):
        super().__init__()
        self.screen, self.what = screen, what
        self.advance: Advance = lambda *_: None

    def disable(self) -> None:
        """Nothing to do in other processes than the first: a screen knows which process it belongs to."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        batches = int(trainer.num_training_batches * trainer.max_epochs)
        self.advance = self.screen.bar(self.what, batches, done=trainer.fit_loop.total_batch_idx + 1)

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.advance = self.screen.bar(self.what, int(sum(trainer.num_test_batches)))

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        shown = trainer.progress_bar_metrics.items()
        self.advance(_tokens(batch, trainer), ", ".join(f"{name} {value:.3f}" for name, value in shown))

    def on_test_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, *_: Any
    ) -> None:
        self.advance(_tokens(batch, trainer))


def _tokens(batch: Any, trainer: L.Trainer) -> int:
    """Of a batch of text over all processes; 0 for a batch of anything else."""
    return batch["input_ids"].numel() * trainer.world_size if isinstance(batch, dict) and "input_ids" in batch else 0
