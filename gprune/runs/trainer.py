"""Lightning's Trainer and the user's callbacks: checks before a run, precision, Ctrl-C, progress, names in errors."""

from __future__ import annotations

import copy
import inspect
import logging
import math
import os
import re
import signal
import sys
import traceback
import warnings
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import CodeType
from typing import Any, Literal, TypeVar, get_args

import lightning as L
import torch
from lightning.fabric import Fabric
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from lightning.pytorch.loggers import Logger
from lightning.pytorch.profilers import AdvancedProfiler, PyTorchProfiler, SimpleProfiler
from pydantic import TypeAdapter, ValidationError, validate_call

from gprune.checks import format_value, require, validation_message
from gprune.config import RunConfig
from gprune.config.running import ClassPath, TrainerConfig
from gprune.console import is_ending, quieted
from gprune.errors import UserError, closest_name, first_line
from gprune.models.products import float32_by_onednn, multiplies_bfloat16
from gprune.runs.folder import RunFolder
from gprune.screen import Screen
from gprune.user_code import find_loaded

log = logging.getLogger("gprune")
# Arguments of Lightning's Trainer that would cut calibration and refinement too.
ONLY_ON_TEXT = ("fast_dev_run", "max_steps", "min_steps", "min_epochs")
PROFILERS = {"simple": SimpleProfiler, "advanced": AdvancedProfiler, "pytorch": PyTorchProfiler}
RANKS = ("LOCAL_RANK", "RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK", "NODE_RANK")  # rank variables of launchers
# Variables that show that a launcher, or the user, starts the processes of several nodes.
LAUNCHER_VARIABLES = {
    "SLURM_NTASKS", "TORCHELASTIC_RUN_ID", "NODE_RANK", "GROUP_RANK", "OMPI_COMM_WORLD_SIZE", "LSB_JOBID",
}  # fmt: skip
Precision = Literal["32-true", "bf16-mixed"]
GIVEN = "--trainer.precision"  # reason for a precision that is not `auto`


LIGHTNING = {L.Callback: "lightning.pytorch.callbacks", Logger: "lightning.pytorch.loggers"}  # modules of bare names
Base = TypeVar("Base")
PREFIXES = ("partition", "learn", "distill", "development")  # prefixes of metrics that built-in stages log


class UserCallbacks:
    """Lightning callbacks of the user for the Trainers of all stages.

    An object of a user's class is shared by all stages. An object that inherits from a callback of Lightning
    (EarlyStopping, ...) holds the state of one fit, so each stage gets a copy of the original object. At the end the
    object gets the state, such as `best_model_path`, of the copy in the run's last main stage.
    """

    def __init__(self, given: Sequence[L.Callback] = (), paths: Sequence[ClassPath] = ()):
        for callback in given:
            require(callback, L.Callback, "Callbacks must be objects of lightning.pytorch.Callback")
        self.given, self.paths = list(given), list(paths)
        for callback in self.given:
            if _is_of_lightning(callback):
                try:
                    _ORIGINALS.setdefault(callback, copy.deepcopy(callback))
                except Exception as error:  # for instance because of a lock or an open file
                    name = type(callback).__name__
                    raise UserError(f"Cannot copy callback {name} for each stage: {first_line(error)}.") from error
        self._last_used: list[tuple[L.Callback, L.Callback]] = []  # (given object, object used in the last stage)
        self.stage = ""  # class of the last stage
        self.made = self.of_stage(None)  # also raises for callbacks that cannot be constructed

    def of_stage(self, stage: L.LightningModule | None, role: str = "", folder: Path = Path()) -> list[L.Callback]:
        """Return the callbacks for one stage.

        A callback that monitors a metric of another stage, such as `learn/loss`, is left out.
        """
        self.stage = type(stage).__name__
        pairs = []
        for given in self.given:
            pairs.append((given, copy.deepcopy(_ORIGINALS[given]) if given in _ORIGINALS else given))
        for path in self.paths:
            constructed = instantiate(path)
            pairs.append((constructed, constructed))
        if stage is not None:
            pairs = [(given, used) for given, used in pairs if _monitors_stage(used, stage, role)]
        self._last_used = pairs
        callbacks = [used for _, used in self._last_used]
        for callback in callbacks:
            if isinstance(callback, ModelCheckpoint) and callback.dirpath is None:
                callback.dirpath = str(folder)
        return callbacks

    def keep_state(self) -> None:
        """Copy the state of the copies at the end of a stage to the user's objects."""
        for given, used in self._last_used:
            vars(given).update(vars(used))

    def hook_of(self, code: CodeType) -> str | None:
        """Return the callback and the hook that the code belongs to, such as "Timer in on_fit_end"; otherwise None."""
        for callback in self.made:
            user_classes = [cls for cls in type(callback).__mro__ if cls not in (L.Callback, object)]
            for owner in (callback, *user_classes):  # a hook may be an attribute of the object
                for hook, attribute in vars(owner).items():
                    if getattr(attribute, "__code__", None) is code:
                        return f"{type(callback).__name__} in {hook}"
        return None


# User's object of a Lightning class -> copy of its original state, before any run.
_ORIGINALS: weakref.WeakKeyDictionary[L.Callback, L.Callback] = weakref.WeakKeyDictionary()


def _is_of_lightning(callback: L.Callback) -> bool:
    """Return whether a callback inherits from a built-in callback of Lightning."""
    return any(c.__module__.startswith(LIGHTNING[L.Callback]) for c in type(callback).__mro__ if c is not L.Callback)


def _monitors_stage(callback: L.Callback, stage: L.LightningModule, role: str) -> bool:
    """Return whether a callback is used in a stage: not if it monitors a metric that only other stages log.

    All stages that train, except refinement (`partition`), log `development/...`. A metric with an unknown prefix may
    be the user's.
    """
    prefix = (getattr(callback, "monitor", None) or "").partition("/")[0]
    stage_prefixes = (role, getattr(stage, "curves", role))
    if prefix == "development":
        return "partition" not in stage_prefixes
    return prefix not in PREFIXES or prefix in stage_prefixes


def class_of(described: ClassPath, flag: str, base: type) -> type:
    """Return the class of a class path; a bare name is a class of Lightning. Nothing is imported."""
    name = described.class_path
    cls = find_loaded(name if "." in name else f"{LIGHTNING[base]}.{name}", flag)
    if not (isinstance(cls, type) and issubclass(cls, base)):
        raise UserError(f"{flag}: {name} must be a subclass of lightning.pytorch.{base.__name__}.")
    return cls


def instantiate(described: ClassPath, flag: str = "--trainer.callbacks", base: type[Base] = L.Callback) -> Base:
    """Construct an object from its class path and arguments, which are converted to the annotated types."""
    cls = class_of(described, flag, base)
    subject = f"{flag}: {described.class_path}"
    try:
        if not inspect.isfunction(cls.__init__):  # the class does not define a constructor
            return cls(**described.init_args)
        instance = cls.__new__(cls)
        constructor = validate_call(cls.__init__, config={"arbitrary_types_allowed": True})
        constructor(instance, **described.init_args)
        return instance
    except ValidationError as error:
        raise UserError(f"{subject}: {validation_message(error, 'init_args.')}.") from error
    except Exception as error:
        raise UserError(f"{subject}: Cannot construct it: {type(error).__name__}: {first_line(error)}.") from error


class RecordStop(L.Callback):
    """Callback after the user's callbacks that records early stopping."""

    def __init__(self, folder: RunFolder, name: str):
        self.folder, self.name = folder, name

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Record that a callback has stopped the stage before its last batch."""
        done, planned = trainer.fit_loop.total_batch_idx + 1, int(trainer.num_training_batches * trainer.max_epochs)
        if trainer.should_stop and done < planned:
            log.info("%s was stopped after %d of %d batches", type(pl_module).__name__, done, planned)
            self.folder.update_manifest(stopped={self.name: {"batches": done, "planned": planned}})


def raise_as_user_error(error: Exception, callbacks: UserCallbacks) -> None:
    """Raise UserError if an exception comes from a callback of the user, or is a misconfiguration of the Trainer."""
    frames = [] if isinstance(error, UserError) else traceback.walk_tb(error.__traceback__)
    for frame, line in frames:
        if (hook := callbacks.hook_of(frame.f_code)) is not None:
            file = Path(frame.f_code.co_filename).name
            cause = f"{type(error).__name__}: {first_line(error)} ({file}, line {line})"
            raise UserError(
                f"Cannot finish {callbacks.stage}, callback {hook}: {cause}. The same command resumes the run."
            ) from error
    if isinstance(error, MisconfigurationException):
        raise UserError(f"--trainer: Cannot use the settings: {first_line(error)}.") from error


def placement(t: TrainerConfig) -> dict[str, Any]:
    """Return the arguments of Lightning's Trainer and Fabric for devices, of a stage that does not shard its models.

    On a Mac, `auto` is cpu, because statistics are float64, which Apple's GPU does not support.
    """
    accelerator = "cpu" if t.accelerator == "auto" and sys.platform == "darwin" else t.accelerator
    strategy = "ddp" if t.strategy == "fsdp" else t.strategy
    return {"accelerator": accelerator, "devices": t.devices, "num_nodes": t.num_nodes, "strategy": strategy}


def arguments_of_user(t: TrainerConfig, *, on_text: bool = True) -> dict[str, Any]:
    """Return the arguments of the user for Lightning's Trainer, checked against its signature, without those of fields.

    Arguments that cut training short are left out unless the stage trains `on_text`.
    """
    annotations = {p.name: p.annotation for p in inspect.signature(L.Trainer).parameters.values()}
    arguments = {}
    for name, value in t.other_arguments.items():
        if name not in annotations:
            closest = closest_name(name, [*annotations, *TrainerConfig.model_fields])
            hint = f" Did you mean '{closest}'?" if closest else ""
            raise UserError(
                f"Unknown setting '{TrainerConfig.prefix}{name}'.{hint} It must be an argument of lightning.Trainer."
            )
        try:
            argument = TypeAdapter(annotations[name], config={"arbitrary_types_allowed": True}).validate_python(value)
        except ValidationError as error:
            expected = re.sub(r"\b\w+\.", "", inspect.formatannotation(annotations[name]))  # names without modules
            raise UserError(f"--trainer.{name} must be {expected}; got {format_value(value)}.") from error
        if on_text or name not in ONLY_ON_TEXT:
            arguments[name] = argument
    return arguments


def check_trainer(*, callbacks: Sequence[L.Callback] = (), **settings: Any) -> torch.device:
    """Check settings of the Trainer by constructing one, and return its device."""
    _check_processes(settings["accelerator"], settings["devices"], settings["num_nodes"])
    try:
        with warnings.catch_warnings(action="ignore"), quieted("lightning.pytorch.utilities.rank_zero"):
            saves_checkpoints = any(isinstance(callback, Checkpoint) for callback in callbacks)
            silent = {"logger": False, "enable_model_summary": False, "enable_progress_bar": False}
            trainer = L.Trainer(callbacks=list(callbacks), enable_checkpointing=saves_checkpoints, **silent | settings)
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
    """Raise UserError for more processes than 4 per core (or 8) without GPUs, and if a launcher is missing or wrong."""
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
    fabric = Fabric(**placement(trainer))
    fabric.launch()
    return fabric


def validation_interval(
    t: TrainerConfig, windows: int, batch_size: int, share: float = 1.0, *, accumulate: int = 1
) -> tuple[int, int]:
    """Return the number of batches in an epoch, and the number of batches between two development measurements.

    The interval is `--trainer.val_check_interval`, by default `share` of the epoch, rounded up to whole optimizer
    steps. Raise UserError if the flag is more than an epoch, or `--trainer.limit_train_batches` leaves no batch.
    """
    all_batches = math.ceil(windows / batch_size)
    batches = all_batches
    if limit := t.limit_train_batches:  # a number of batches, or a share below 1
        batches = min(all_batches, int(limit)) if limit >= 1 else int(all_batches * limit)
        if not batches:
            raise UserError(
                f"--trainer.limit_train_batches must leave at least 1 of the {all_batches} batches in an epoch of "
                f"each training stage; got {limit:g}."
            )
    interval = t.val_check_interval or share
    if isinstance(interval, float):
        rounding_error = 1e-9  # of the product, which would otherwise add a batch
        interval = math.ceil(batches * interval - rounding_error)
    if interval > batches:
        raise UserError(
            f"--trainer.val_check_interval must be {batches} or less, the batches in an epoch of a training stage, "
            f"or a share from 0 to 1; got {interval}."
        )
    whole_steps = accumulate * math.ceil(interval / accumulate)
    return batches, min(batches, whole_steps)


def measurements(
    t: TrainerConfig, windows: int, batch_size: int, share: float = 1.0, *, accumulate: int = 1, epochs: int = 1
) -> int:
    """Return the number of measurements of development perplexity before, during and after training.

    Arguments as for `validation_interval`. The last measurement is after the last step, also if the interval does
    not divide the batches of an epoch.
    """
    batches, interval = validation_interval(t, windows, batch_size, share, accumulate=accumulate)
    after_last_step = int(batches % interval > 0)
    return 1 + epochs * (batches // interval) + after_last_step


@contextmanager
def matmul_precision(precision: str, fastest_on: torch.device | None = None) -> Iterator[None]:
    """Context with a `float32_matmul_precision` of torch. It also restores torch's deterministic mode at the end.

    On the device `fastest_on`, float32 products use the faster library, and a change of the precision is logged.
    """
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


class StopTogether(L.Callback):
    """Callback that ends all processes after the same training step if SIGTERM has reached one of them.

    Lightning's own handler broadcasts inside the handler. That waits forever if the signal reaches the processes at
    different points, because another process then waits for the reduction of gradients. Here the handler only notes the
    signal while a stage trains, and the processes agree after each step. At other times it ends the process at once.
    """

    def __init__(self) -> None:
        self.noted = self.trains = False

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        trainer._signal_connector._sigterm_notifier_fn = self._note

    def _note(self, number: int, _: object) -> None:
        self.noted = True
        if not (self.trains or is_ending(sys.exception())):
            raise SystemExit(128 + number)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.trains = True

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        """Set Lightning's flag in all processes. Lightning then stops, after callbacks have saved checkpoints."""
        if trainer.strategy.reduce_boolean_decision(self.noted, all=False):
            trainer._signal_connector.received_sigterm = True

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """End the process if the signal came after the last step."""
        self.trains = False
        if self.noted:
            raise SystemExit(128 + signal.SIGTERM)


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
    three bits of precision less. The default name of the run does not depend on the hardware. With `together`
    the processes of several nodes are launched, and agree.
    """
    if cfg.trainer.precision != "auto":
        return cfg, GIVEN
    stored = RunFolder(cfg.folder).manifest.get("settings", {}).get("trainer", {}).get("precision")
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
