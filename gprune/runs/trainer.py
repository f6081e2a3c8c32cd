"""Lightning's Trainer: settings refused before anything is computed, Ctrl-C as KeyboardInterrupt, a progress bar."""

from __future__ import annotations

import logging
import os
import signal
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import lightning as L
import torch
from lightning.fabric import Fabric
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Checkpoint, ProgressBar
from lightning.pytorch.profilers import AdvancedProfiler, PyTorchProfiler, SimpleProfiler

from gprune.config.running import TrainerConfig
from gprune.console import quieted
from gprune.errors import UserError
from gprune.screen import Screen

log = logging.getLogger("gprune")
PROFILERS = {"simple": SimpleProfiler, "advanced": AdvancedProfiler, "pytorch": PyTorchProfiler}
RANKS = ("LOCAL_RANK", "RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK", "NODE_RANK")  # of a process, by its launcher


def check_trainer(*, callbacks: Sequence[L.Callback] = (), **asked: Any) -> torch.device:
    """Build a Trainer and throw it away: whether this machine can do what is asked for, Lightning knows best.

    Args:
        asked: `TrainerConfig.lightning`.

    Returns:
        The device of this process.

    Raises:
        UserError: for an accelerator that is not there, too many devices, an unknown strategy, or a precision that the
            device lacks; for callbacks that cannot be together.
    """
    _check_processes(asked["accelerator"], asked["devices"], asked["num_nodes"])
    try:
        with warnings.catch_warnings(action="ignore"), quieted("lightning.pytorch.utilities.rank_zero"):
            saving = any(isinstance(one, Checkpoint) for one in callbacks)
            quiet = {"logger": False, "enable_model_summary": False, "enable_progress_bar": False}
            trainer = L.Trainer(callbacks=list(callbacks), enable_checkpointing=saving, **quiet, **asked)
    except (MisconfigurationException, ValueError, RuntimeError, ImportError) as error:
        reason = " ".join(str(error).split()).split(". ")[0].rstrip(".!")
        settings = ", ".join(f"{name} {value!r}" for name, value in asked.items())
        raise UserError(f"--trainer: cannot use {settings} here: {reason}.") from error
    device = trainer.strategy.root_device
    if device.type == "mps":
        raise UserError("--trainer.accelerator: expected cpu, as statistics are float64, which Apple's GPU lacks.")
    return device


def _check_processes(accelerator: str, devices: int, num_nodes: int) -> None:
    """Raise UserError for more processes than this machine can start, and for nodes that nobody starts."""
    most = max(8, 4 * (os.cpu_count() or 1))
    if devices > most and (accelerator == "cpu" or not torch.cuda.is_available()):
        raise UserError(f"--trainer.devices: expected at most {most} processes on this machine's cores, got {devices}.")
    launched = {"SLURM_NTASKS", "TORCHELASTIC_RUN_ID", "NODE_RANK", "GROUP_RANK", "OMPI_COMM_WORLD_SIZE", "LSB_JOBID"}
    if num_nodes > 1 and not launched & os.environ.keys():
        raise UserError("--trainer.num_nodes: expected srun, torchrun, or $NODE_RANK and $MASTER_ADDR; got none.")
    if why := _alone(devices * num_nodes):
        instead = f"expected {devices * num_nodes} (--trainer.devices x --trainer.num_nodes)"
        raise UserError(f"{why}; {instead}: unset the variable if no launcher has set it.", alone=True)


def _alone(processes: int) -> str | None:
    """What says that this process is one of several, where not as many work together; a shell may have it left over."""
    env = os.environ
    numbered = [name for name in RANKS if env.get(name, "0") != "0"]
    if processes > 1 and "TORCHELASTIC_RUN_ID" not in env and SLURMEnvironment.detect():
        return None if env["SLURM_NTASKS"] == str(processes) else f"SLURM_NTASKS is {env['SLURM_NTASKS']}"
    if processes > 1:  # Lightning starts no others where a process has a LOCAL_RANK, even 0, and would wait for them
        met = {"TORCHELASTIC_RUN_ID", "MASTER_ADDR"} & env.keys()
        numbered = [] if met else numbered + [name for name in RANKS[:1] if name in env]
    return f"{numbered[0]}={env[numbered[0]]} says that this process is one of several" if numbered else None


def launched(trainer: TrainerConfig) -> Fabric:
    """Launch the processes of a run, unless they are, and return what they communicate with."""
    t = trainer
    fabric = Fabric(accelerator=t.accelerator, devices=t.devices, num_nodes=t.num_nodes, strategy=t.strategy)
    fabric.launch()
    return fabric


@contextmanager
def multiplying(precision: str) -> Iterator[None]:
    """torch's `float32_matmul_precision` while the context lasts; `deterministic` of Trainers ends with it."""
    before, algorithms = torch.get_float32_matmul_precision(), torch.are_deterministic_algorithms_enabled()
    if precision != before:
        log.info("Products of float32 matrices in precision '%s', before '%s'", precision, before)
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
        torch.use_deterministic_algorithms(algorithms)


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


class StageBar(ProgressBar):
    """Shows the batches of a stage, and its loss, on the screen of the run."""

    def __init__(self, screen: Screen, what: str):
        super().__init__()
        self.screen, self.what = screen, what

    def disable(self) -> None:
        """No-op: a screen shows nothing on other ranks than 0."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self.screen.begin(self.what)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, *_: Any
    ) -> None:
        """Show the tokens of the batch over all ranks; a batch of the refinement has none."""
        is_text = isinstance(batch, dict) and "input_ids" in batch
        tokens = batch["input_ids"].numel() * trainer.world_size if is_text else 0
        self.screen.advance(
            tokens, ", ".join(f"{name} {value:.3f}" for name, value in trainer.progress_bar_metrics.items())
        )

    on_test_batch_end = on_validation_batch_end = on_train_batch_end
