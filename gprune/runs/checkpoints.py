"""Checkpoints of a stage that learns, from which a killed run goes on."""

from __future__ import annotations

import logging
import pickle
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Checkpoint

from gprune.storage.files import replacing

log = logging.getLogger("gprune")


class Checkpoints(Checkpoint):
    """Keeps a checkpoint of a stage that learns, so that a killed one goes on from there, to the same bits.

    A checkpoint holds what learns (a stage registers nothing else), optimizer, schedule, the place in the text, the
    states of callbacks and of torch's random generator; and a mark that binds it to one stage of one run. Lightning
    calls a Checkpoint behind all other callbacks, whose states are then those after the step.

    Args:
        path: of the file, which is replaced each time; `RunFolder.write` removes it when what was learned is there.
        mark: of the stage and its run.
        seconds: between two checkpoints; 0: one after every step.
        saved: is called when one is there.
    """

    def __init__(self, path: Path, mark: str, seconds: float, saved: Callable[[], None] = lambda: None):
        self.path, self.mark, self.seconds, self.saved = path, mark, seconds, saved
        self._last = time.monotonic()
        self._place: dict[str, int] = {}  # in the text, where it goes on

    def usable(self) -> Path | None:
        """The checkpoint to go on from; None, with a warning unless there is none, if it is not whole, or foreign."""
        if not self.path.is_file():
            return None
        try:
            content = torch.load(self.path, map_location="cpu", weights_only=True)
            reason = None if content["gprune"] == self.mark else "it belongs to another run"
        except (OSError, RuntimeError, EOFError, KeyError, TypeError, ValueError, pickle.UnpicklingError) as error:
            reason = (str(error).splitlines() or ["not whole"])[0]
        if reason is None:
            return self.path
        log.warning("%s is not usable (%s); going on without it.", self.path, reason)
        return None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # Lightning forgets the place where a schedule has asked for the number of steps before it was loaded.
        if self._place:
            trainer.train_dataloader.load_state_dict(self._place)
        self._last = time.monotonic()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save a checkpoint behind a whole step, once `seconds` have passed."""
        stepped = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        if not stepped or trainer.is_last_batch:  # half a sum of gradients is in no checkpoint
            return
        due = time.monotonic() - self._last >= self.seconds
        if trainer.strategy.reduce_boolean_decision(due, all=False):  # processes have clocks of their own
            self._save(trainer)
            self._last = time.monotonic()

    def _save(self, trainer: L.Trainer) -> None:
        if not trainer.is_global_zero:
            trainer.save_checkpoint(self.path)  # takes part, and writes nothing
            return
        with replacing(self.path) as temporary:
            trainer.save_checkpoint(temporary)
        self.saved()

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["gprune"] = self.mark
        checkpoint["place"] = trainer.train_dataloader.state_dict()
        checkpoint["random"] = torch.get_rng_state()

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        self._place = checkpoint["place"]
        torch.set_rng_state(checkpoint["random"])
