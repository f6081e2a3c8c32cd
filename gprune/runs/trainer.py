"""Lightning's Trainer: check its settings early, choose its precision, keep Ctrl-C an interrupt, show progress."""

from __future__ import annotations

import logging
import os
import signal
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, get_args

import lightning as L
import torch
from lightning.fabric import Fabric
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.profilers import AdvancedProfiler, PyTorchProfiler, SimpleProfiler

from gprune.config import RunConfig
from gprune.config.running import TrainerConfig
from gprune.console import quieted
from gprune.errors import UserError
from gprune.models.products import float32_by_onednn, multiplies_bfloat16
from gprune.runs.folder import check_manifest
from gprune.screen import Screen
from gprune.storage.files import read_json

log = logging.getLogger("gprune")
PROFILERS = {"simple": SimpleProfiler, "advanced": AdvancedProfiler, "pytorch": PyTorchProfiler}
RANKS = ("LOCAL_RANK", "RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK", "NODE_RANK")  # rank variables of launchers
# Variables that show that a launcher, or the user, starts the processes of several nodes.
LAUNCHER_VARIABLES = {
    "SLURM_NTASKS", "TORCHELASTIC_RUN_ID", "NODE_RANK", "GROUP_RANK", "OMPI_COMM_WORLD_SIZE", "LSB_JOBID",
}  # fmt: skip
Precision = Literal["32-true", "bf16-mixed"]


def check_trainer(*, callbacks: Sequence[L.Callback] = (), **settings: Any) -> torch.device:
    """Check settings of the Trainer by constructing one, and return its device."""
    _check_processes(settings["accelerator"], settings["devices"], settings["num_nodes"])
    try:
        with warnings.catch_warnings(action="ignore"), quieted("lightning.pytorch.utilities.rank_zero"):
            saves_checkpoints = any(isinstance(callback, Checkpoint) for callback in callbacks)
            trainer = L.Trainer(
                callbacks=list(callbacks), enable_checkpointing=saves_checkpoints, logger=False,
                enable_model_summary=False, enable_progress_bar=False, **settings,
            )  # fmt: skip
    except (MisconfigurationException, ValueError, RuntimeError, ImportError) as error:
        first_sentence = " ".join(str(error).split()).split(". ")[0].rstrip(".!")
        in_words = ", ".join(f"{name} {value!r}" for name, value in settings.items())
        raise UserError(f"--trainer: Cannot use {in_words}: {first_sentence}.") from error
    device = trainer.strategy.root_device
    if device.type == "mps":
        reason = "Statistics are float64, which Apple's GPU does not support"
        raise UserError(f"--trainer.accelerator must be cpu on this machine; got {settings['accelerator']}. {reason}.")
    return device


def _check_processes(accelerator: str, devices: int, num_nodes: int) -> None:
    """Raise UserError for too many processes on this machine, and for several nodes without a launcher."""
    max_processes = max(8, 4 * (os.cpu_count() or 1))
    if devices > max_processes and (accelerator == "cpu" or not torch.cuda.is_available()):
        raise UserError(f"--trainer.devices must be {max_processes} or less on the CPU of this machine; got {devices}.")
    if num_nodes > 1 and not LAUNCHER_VARIABLES & os.environ.keys():
        raise UserError("--trainer.num_nodes needs a launcher (srun or torchrun), or $NODE_RANK and $MASTER_ADDR.")
    if variable := _wrong_rank_variable(devices * num_nodes):
        expected = f"{devices * num_nodes} (--trainer.devices x --trainer.num_nodes)"
        remedy = "Unset the variable if no launcher has set it"
        raise UserError(f"The number of processes must be {expected}; got {variable}. {remedy}.", rank_local=True)


def _wrong_rank_variable(processes: int) -> str | None:
    """Return an environment variable, with its value, that contradicts the number of processes; otherwise None.

    Such a variable may be left over from an earlier launcher.
    """
    env = os.environ
    if processes > 1 and "TORCHELASTIC_RUN_ID" not in env and SLURMEnvironment.detect():
        return None if env["SLURM_NTASKS"] == str(processes) else f"SLURM_NTASKS={env['SLURM_NTASKS']}"
    if processes > 1 and {"TORCHELASTIC_RUN_ID", "MASTER_ADDR"} & env.keys():  # a launcher has started the processes
        return None
    wrong = [name for name in RANKS if env.get(name, "0") != "0"]
    if processes > 1 and "LOCAL_RANK" in env:  # even with rank 0 Lightning starts no processes, and would wait forever
        wrong.append("LOCAL_RANK")
    return f"{wrong[0]}={env[wrong[0]]}, which is set for one of several processes" if wrong else None


def launch_processes(trainer: TrainerConfig) -> Fabric:
    """Launch the processes of a run unless they are running, and return the Fabric for communication."""
    t = trainer
    fabric = Fabric(accelerator=t.lightning_accelerator, devices=t.devices, num_nodes=t.num_nodes, strategy=t.strategy)
    fabric.launch()
    return fabric


@contextmanager
def matmul_precision(precision: str, fastest_on: torch.device | None = None) -> Iterator[None]:
    """Context with a `float32_matmul_precision` of torch. It also restores torch's deterministic mode at the end."""
    before, deterministic = torch.get_float32_matmul_precision(), torch.are_deterministic_algorithms_enabled()
    if precision != before and fastest_on is not None:
        log.info("float32 matrix products in precision '%s' instead of '%s'", precision, before)
    if precision == "highest" and fastest_on is not None and float32_by_onednn(fastest_on):
        precision = "medium"  # torch's way to select oneDNN
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
        torch.use_deterministic_algorithms(deterministic)


@contextmanager
def plain_interrupts() -> Iterator[None]:
    """Context in which Ctrl-C inside a Trainer raises KeyboardInterrupt.

    Lightning calls `sys.exit(1)`, which a notebook reports as a crash, and ignores Ctrl-C afterwards.
    """
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit as error:
        if not isinstance(error.__context__, KeyboardInterrupt):
            raise
        signal.signal(signal.SIGINT, handler)
        raise KeyboardInterrupt from None


class StageBar(L.Callback):
    """Callback that shows batches and loss of a stage on the run's `Screen`."""

    def __init__(self, screen: Screen, what: str):
        self.screen, self.what = screen, what

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self.screen.begin_part(self.what)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, *_: Any
    ) -> None:
        """Show the tokens of the batch over all ranks. A batch of the refinement has no tokens."""
        is_text = isinstance(batch, dict) and "input_ids" in batch
        tokens = batch["input_ids"].numel() * trainer.world_size if is_text else 0
        metrics = ", ".join(f"{name} {value:.3f}" for name, value in trainer.progress_bar_metrics.items())
        self.screen.add_batch(tokens, metrics)

    on_test_batch_end = on_validation_batch_end = on_train_batch_end


def resolve_precision(cfg: RunConfig, device: torch.device, *, together: bool = False) -> tuple[RunConfig, str]:
    """Replace the precision `auto` in a configuration, and return the reason for the choice.

    A resumed run keeps its precision on any hardware. With float16 weights, training uses float32, because bfloat16 has
    three bits of precision less. The default name of the run does not depend on the hardware.
    """
    if cfg.trainer.precision != "auto":
        return cfg, "--trainer.precision"
    manifest = read_json(Path(cfg.folder) / "manifest.json", check=check_manifest) or {}
    stored = manifest.get("settings", {}).get("trainer", {}).get("precision")
    uses_bfloat16, reason = multiplies_bfloat16(device)
    if cfg.model.dtype == "float16":
        uses_bfloat16, reason = False, "bfloat16 has fewer digits than --model.dtype float16"
    if together and cfg.trainer.num_nodes > 1:
        fabric = launch_processes(cfg.trainer)
        stored = fabric.broadcast(stored)
        if fabric.strategy.reduce_boolean_decision(not uses_bfloat16, all=False) and uses_bfloat16:
            uses_bfloat16, reason = False, "another process has hardware without bfloat16"
    precision = "bf16-mixed" if uses_bfloat16 else "32-true"
    if stored in get_args(Precision):
        precision, reason = stored, "the resumed run has this precision"
    trainer = cfg.trainer.model_copy(update={"precision": precision})
    run = cfg.run.model_copy(update={"name": cfg.run_name})
    return cfg.model_copy(update={"trainer": trainer, "run": run}), reason
