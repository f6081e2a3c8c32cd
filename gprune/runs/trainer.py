"""Lightning's Trainer, fit for people: settings refused before anything is computed, and a Ctrl-C that stays one."""

from __future__ import annotations

import logging
import os
import signal
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import lightning as L
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.profilers import AdvancedProfiler, Profiler, PyTorchProfiler, SimpleProfiler

from gprune.console import quieted
from gprune.errors import UserError

log = logging.getLogger("gprune")


def check_trainer(
    *, accelerator: str, devices: int, num_nodes: int, strategy: str, precision: str = "32-true",
    callbacks: Sequence[L.Callback] = (),
) -> torch.device:  # fmt: skip
    """Build a Trainer and throw it away: whether this machine can do what is asked for, Lightning knows best.

    Returns:
        The device of this process.

    Raises:
        UserError: for an accelerator that is not there, too many devices, an unknown strategy, or a precision that the
            device lacks; for callbacks that cannot be together.
    """
    _check_processes(accelerator, devices, num_nodes)
    try:
        with warnings.catch_warnings(action="ignore"), quieted("lightning.pytorch.utilities.rank_zero"):
            trainer = L.Trainer(
                accelerator=accelerator, devices=devices, num_nodes=num_nodes, strategy=strategy, precision=precision,
                logger=False, enable_checkpointing=checkpoints(callbacks), enable_model_summary=False,
                enable_progress_bar=False, callbacks=list(callbacks),
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


def checkpoints(callbacks: Sequence[L.Callback]) -> bool:
    """Whether there are some that write checkpoints; where there are none Lightning would bring its own."""
    return any(isinstance(callback, Checkpoint) for callback in callbacks)


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


def profiler(kind: str | None, folder: Path, name: str) -> Profiler | None:
    """Lightning's profiler of this kind for one stage, whose report is a file in the folder."""
    kinds = {"simple": SimpleProfiler, "advanced": AdvancedProfiler, "pytorch": PyTorchProfiler}
    return None if kind is None else kinds[kind](folder, name.replace("/", "-"))


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
def algorithms(*, deterministic: bool) -> Iterator[None]:
    """torch's deterministic algorithms while the context lasts, if asked for."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(deterministic or before)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


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
