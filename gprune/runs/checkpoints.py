"""Checkpoints inside a training stage, from which a killed run resumes."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.trainer.states import TrainerFn

from gprune.errors import first_line
from gprune.evaluation.perplexity import rank_and_world_size
from gprune.runs.folder import RunFolder, broadcast, sum_over_ranks
from gprune.storage.files import UNUSABLE, key_of, replacing

log = logging.getLogger("gprune")


class Checkpoints(Checkpoint):
    """Callback that saves checkpoints of a training stage. A killed stage resumes from them with the same bits.

    A checkpoint contains the trained tensors (the only tensors that a stage registers), the states of optimizer,
    schedule and callbacks, the position in the text, torch's random state, and the tokens of the stage.

    A checkpoint of another stage, or of other versions of torch or Lightning, is ignored. Loading one executes no code.

    Lightning calls a `Checkpoint` callback after all other callbacks. So the stored states of the others are those
    after the step.
    """

    def __init__(self, folder: RunFolder, name: str, stage: L.LightningModule, meter: Any, seconds: float):
        self.folder, self.name, self.meter, self.seconds = folder, name, meter, seconds
        self.path = folder.checkpoint(name)
        self._counts_before_stage = meter.counts()
        self._stage_key = key_of(
            run=folder.key, fit=name, stage=f"{type(stage).__module__}.{type(stage).__qualname__}",
            shapes={tensor_name: list(tensor.shape) for tensor_name, tensor in stage.state_dict().items()},
            versions=[torch.__version__, L.__version__],
        )  # fmt: skip
        self._last_saved = time.monotonic()
        self._resumed_position: dict[str, int] = {}  # position in the text after resuming
        self._step_completed = False  # whether the last batch completed an optimizer step

    def usable(self) -> Path | None:
        """Return the checkpoint from which all ranks resume. Return None if it is missing or, with a warning, invalid.

        Rank 0 decides, because other ranks may not yet see the file on a network file system.
        """
        return broadcast(self._usable() if rank_and_world_size()[0] == 0 else None)

    def _usable(self) -> Path | None:
        if not self.path.is_file():
            return None
        try:
            checkpoint = torch.load(self.path, map_location="cpu", weights_only=True, mmap=True)
        except UnpicklingError:  # objects other than tensors, numbers, text, lists and dictionaries
            reason = "the state of a callback or the stage has objects that torch.load refuses with weights_only=True"
            log.warning(UNUSABLE, self.path, reason)
            return None
        except (RuntimeError, EOFError) as error:
            log.warning(UNUSABLE, self.path, first_line(error))
            return None
        if checkpoint.get("stage_key") != self._stage_key:
            log.warning(UNUSABLE, self.path, "the file is not the checkpoint that this stage saved")
            return None
        return self.path

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Restore the position in the text, and start the clock."""
        # Lightning loses the position if a schedule asks for the number of steps before the checkpoint is loaded.
        if self._resumed_position:
            trainer.train_dataloader.load_state_dict(self._resumed_position)
        self._last_saved = time.monotonic()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save a checkpoint after a complete optimizer step if `seconds` have passed.

        If validation follows the step, the checkpoint is saved after validation, because a resumed Trainer would skip
        that validation.
        """
        self._step_completed = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        validates = trainer.enable_validation and (batch_idx + 1) % trainer.val_check_batch == 0
        if not validates:
            self._save_if_due(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self._save_if_due(trainer)

    def _save_if_due(self, trainer: L.Trainer) -> None:
        """Save a checkpoint if a step is complete and `seconds` have passed on any rank, or the run was terminated.

        Nothing is saved if the stage was told to stop, because a resumed Trainer would continue the stage.
        """
        if not self._step_completed or trainer.should_stop or trainer.is_last_batch or trainer.fast_dev_run:
            return
        due = trainer.received_sigterm or time.monotonic() - self._last_saved >= self.seconds
        if trainer.strategy.reduce_boolean_decision(due, all=False):  # clocks of processes differ
            self._save(trainer)
            self._last_saved = time.monotonic()

    def _save(self, trainer: L.Trainer) -> None:
        """Replace the checkpoint by a new one. At every moment the existing file is complete."""
        if not trainer.is_global_zero:
            trainer.save_checkpoint(self.path)  # a collective call; only rank 0 writes
            return
        with replacing(self.path) as temporary:
            trainer.save_checkpoint(temporary)
        self.folder.update_manifest()

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add the stage's key and tokens, the position in the text, and torch's random state to the checkpoint."""
        counts = self.meter.counts()
        of_stage = {kind: count - self._counts_before_stage[kind] for kind, count in counts.items()}
        checkpoint["stage_key"] = self._stage_key
        checkpoint["tokens"] = sum_over_ranks(of_stage)
        checkpoint["place"] = trainer.train_dataloader.state_dict()
        checkpoint["random"] = torch.get_rng_state()

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Restore what `on_save_checkpoint` added. The position in the text is set when training starts."""
        self._resumed_position = checkpoint["place"]
        if trainer.is_global_zero:  # once, because the tokens are those of all ranks
            self.meter.add_earlier(checkpoint["tokens"])
        torch.set_rng_state(checkpoint["random"])
