"""Checkpoints of a stage that learns, from which a killed run goes on."""

from __future__ import annotations

import hashlib
import logging
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.trainer.states import TrainerFn

from gprune.runs.folder import RunFolder
from gprune.storage.files import UNUSABLE, key_of, replacing

log = logging.getLogger("gprune")


class Checkpoints(Checkpoint):
    """Keeps a checkpoint of a stage that learns, so that a killed one goes on from there, to the same bits.

    A checkpoint holds what learns (a stage registers nothing else), optimizer, schedule, the place in the text, the
    states of callbacks and of torch's random generator, and the tokens that the stage has taken. Its hash, over what
    it belongs to as well, stands in the run's manifest: a file that is not what this stage left is never unpickled.
    Lightning calls a Checkpoint behind all other callbacks, whose states are then those after the step.

    Args:
        folder: of the run; `write` removes the checkpoint when what was learned is there.
        name: of the stage in the folder.
        stage: whose class, and names and shapes of what learns, have to be those of the checkpoint.
        meter: the run's `TokenMeter`.
        seconds: between two checkpoints; 0: one after every step.
    """

    def __init__(self, folder: RunFolder, name: str, stage: L.LightningModule, meter: Any, seconds: float):
        self.folder, self.name, self.meter, self.seconds = folder, name, meter, seconds
        self.path, self._before = folder.checkpoint(name), meter.counts()
        shapes = {learns: list(value.shape) for learns, value in stage.state_dict().items()}
        versions = [torch.__version__, L.__version__]
        of = f"{type(stage).__module__}.{type(stage).__qualname__}"
        self._mark = key_of(run=folder.key, fit=name, stage=of, shapes=shapes, versions=versions)
        self._hashes: list[str] = []  # of the file that is there, if any
        self._last = time.monotonic()
        self._place: dict[str, int] = {}  # in the text, where it goes on

    def usable(self) -> Path | None:
        """The checkpoint to go on from; None, with a warning unless there is none, if it is not whole, or foreign."""
        if not self.path.is_file():
            return None
        self._hashes = [self._hash(self.path)]
        if self._hashes[0] in self.folder.manifest.get("checkpoints", {}).get(self.name, []):
            return self.path
        log.warning(UNUSABLE, self.path, "not what this stage of this run has left")
        return None

    def _hash(self, file: Path) -> str:
        with file.open("rb") as content:
            return hashlib.file_digest(content, lambda: hashlib.sha256(self._mark.encode())).hexdigest()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # Lightning forgets the place where a schedule has asked for the number of steps before it was loaded.
        if self._place:
            trainer.train_dataloader.load_state_dict(self._place)
        self._last = time.monotonic()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save a checkpoint behind a whole step, once `seconds` have passed.

        A step that validation follows is saved behind the validation: Lightning does not make up for one that a resumed
        run has left out.
        """
        self._stepped = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        validates = trainer.enable_validation and (batch_idx + 1) % trainer.val_check_batch == 0
        if not validates:
            self._save_if_due(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self._save_if_due(trainer)

    def _save_if_due(self, trainer: L.Trainer) -> None:
        # No checkpoint holds half a sum of gradients, or a stage that has been told to stop: Lightning would go on.
        if not self._stepped or trainer.should_stop or trainer.is_last_batch or trainer.fast_dev_run:
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
            new = self._hash(temporary)
            # With that of the file there, which stays until the new one has its name.
            self.folder.update_manifest(checkpoints={self.name: [*self._hashes, new]})
        self._hashes = [new]
        self.folder.note()

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        now = self.meter.counts()
        checkpoint["tokens"] = {kind: count - self._before[kind] for kind, count in now.items()}
        checkpoint["place"] = trainer.train_dataloader.state_dict()
        checkpoint["random"] = torch.get_rng_state()

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        self._place = checkpoint["place"]
        self.meter.take_up(checkpoint["tokens"])
        torch.set_rng_state(checkpoint["random"])
