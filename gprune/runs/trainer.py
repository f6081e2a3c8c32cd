"""Lightning's Trainer, fit for people: settings refused before anything is computed, and a Ctrl-C that stays one."""

from __future__ import annotations

import logging
import os
import pickle
import signal
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ProgressBar

from gprune.console import quieted
from gprune.errors import UserError
from gprune.screen import Advance, Screen
from gprune.storage.files import replacing

log = logging.getLogger("gprune")


def check_trainer(
    *, accelerator: str, devices: int, num_nodes: int, strategy: str, precision: str = "32-true"
) -> torch.device:
    """Build a Trainer and throw it away: whether this machine can do what is asked for, Lightning knows best.

    Returns:
        The device of this process.

    Raises:
        UserError: for an accelerator that is not there, too many devices, an unknown strategy, or a precision that the
            device lacks.
    """
    _check_processes(accelerator, devices, num_nodes)
    try:
        with warnings.catch_warnings(action="ignore"), quieted("lightning.pytorch.utilities.rank_zero"):
            trainer = L.Trainer(
                accelerator=accelerator, devices=devices, num_nodes=num_nodes, strategy=strategy, precision=precision,
                logger=False, enable_checkpointing=False, enable_model_summary=False,
                enable_progress_bar=False,
            )  # fmt: skip
    except (MisconfigurationException, ValueError, RuntimeError, ImportError) as error:
        reason = " ".join(str(error).split()).split(". ")[0].rstrip(".!")
        raise UserError(
            f"--trainer: cannot use accelerator '{accelerator}' with {devices} device(s), strategy '{strategy}' and "
            f"precision '{precision}' here: {reason}. Expected e.g. --trainer.accelerator auto --trainer.strategy auto."
        ) from error
    device = trainer.strategy.root_device
    if device.type == "mps":
        raise UserError(
            "--trainer.accelerator: Apple's GPU has no float64, which statistics are summed in; use "
            "--trainer.accelerator cpu."
        )
    return device


def _check_processes(accelerator: str, devices: int, num_nodes: int) -> None:
    """Raise UserError for more processes than this machine can start, and for nodes that nobody starts."""
    most = max(8, 4 * (os.cpu_count() or 1))
    if devices > most and (accelerator == "cpu" or not torch.cuda.is_available()):
        raise UserError(f"--trainer.devices: expected at most {most} processes on this machine's cores, got {devices}.")
    launched = {"SLURM_NTASKS", "TORCHELASTIC_RUN_ID", "NODE_RANK", "GROUP_RANK", "OMPI_COMM_WORLD_SIZE", "LSB_JOBID"}
    if num_nodes > 1 and not launched & os.environ.keys():
        raise UserError(
            f"--trainer.num_nodes: expected a launcher that starts a process on each of {num_nodes} nodes (srun, "
            f"torchrun), or $NODE_RANK and $MASTER_ADDR on each; got none."
        )


@contextmanager
def multiplying(precision: str) -> Iterator[None]:
    """torch's `float32_matmul_precision` while the context lasts: `highest`, `high` (TF32) or `medium`."""
    before = torch.get_float32_matmul_precision()
    if precision != before:
        log.info("Products of float32 matrices in precision '%s', before '%s'", precision, before)
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def plain_interrupts() -> Iterator[None]:
    """Ctrl-C inside a Trainer stays a KeyboardInterrupt.

    Lightning makes it `sys.exit(1)`, which a notebook reports as a crash, and leaves Ctrl-C ignored from then on.
    """
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit as error:
        if not isinstance(error.__context__, KeyboardInterrupt):
            raise
        signal.signal(signal.SIGINT, handler)
        raise KeyboardInterrupt from None


class Meeting(L.LightningModule):
    """`trainer.test(meeting)` brings all processes together; `lacking` then says what any of them lacks.

    What each process sees for itself on a disk may be there a moment later: decided alone, one would compute what
    others wait for elsewhere.

    Args:
        key: of the run that this process is at.

    Raises:
        UserError: in `setup`, if another process is at another run.
    """

    def __init__(self, key: str | None, lacking: Sequence[bool]):
        super().__init__()
        self.key, self.lacking = key, list(lacking)

    def setup(self, stage: str) -> None:
        strategy = self.trainer.strategy
        elsewhere, *self.lacking = (
            strategy.reduce_boolean_decision(mine, all=False)
            for mine in (strategy.broadcast(self.key) != self.key, *self.lacking)
        )
        if elsewhere:
            raise UserError("The processes of this run are at different runs of a list; run the same command again.")

    def test_dataloader(self) -> list[Any]:
        return []

    def test_step(self) -> None:
        """Never called: nothing is tested."""


class StageBar(ProgressBar):
    """The bar of a stage on a screen: how far all of its epochs are, its loss, and the tokens that all devices take."""

    def __init__(self, screen: Screen, what: str):
        super().__init__()
        self.screen, self.what = screen, what
        self.advance: Advance = lambda *_: None

    def enable(self) -> None:
        """Nothing to do: a screen knows which process it belongs to."""

    def disable(self) -> None:
        """As `enable`."""

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


class Checkpoints(L.Callback):
    """Keeps a checkpoint of a stage that learns, so that a killed one goes on from there, to the same bits.

    A checkpoint holds what learns (a stage registers nothing else), optimizer, schedule, the place in the text, the
    states of callbacks and of torch's random generator; and a mark that binds it to one stage of one run.

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

    def found(self) -> Path | None:
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
