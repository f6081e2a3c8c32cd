"""Lightning callbacks that the caller of a run brings: made, handed to every stage, named where they fail."""

from __future__ import annotations

import copy
import inspect
import itertools
import logging
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from pydantic import ValidationError, validate_call

from gprune.checks import refusal, require, shown
from gprune.config.running import ClassPath
from gprune.errors import UserError, first_line
from gprune.imports import loaded

log = logging.getLogger("gprune")
LIGHTNING = "lightning.pytorch.callbacks"


def callbacks_of_stage(given: Sequence[L.Callback], paths: Sequence[ClassPath], folder: Path) -> list[L.Callback]:
    """The callbacks of one Trainer; a ModelCheckpoint that was told no folder writes into this one.

    An object is the same in all stages, so that what it has noted can be read afterwards; but of what inherits from one
    of Lightning's (EarlyStopping, ...), which holds the state of one fit, each stage gets a copy.

    Args:
        given: from Python.
        paths: `--trainer.callbacks`, made anew for each stage.

    Raises:
        UserError: for an object that is no callback, and as `made`.
    """
    for one in given:
        require(one, L.Callback, "callbacks: expected objects of lightning.pytorch.Callback")
    callbacks = [copy.deepcopy(one) if _is_of_lightning(one) else one for one in given]
    callbacks += map(made, paths)
    for one in callbacks:
        if isinstance(one, ModelCheckpoint) and one.dirpath is None:
            one.dirpath = str(folder)
    return callbacks


def _is_of_lightning(callback: L.Callback) -> bool:
    return any(c.__module__.startswith(LIGHTNING) for c in type(callback).__mro__ if c is not L.Callback)


def made(described: ClassPath) -> L.Callback:
    """Make a callback from its class path and arguments, which are converted to the types of their annotations.

    Raises:
        UserError: for a path that is not a callback class of a loaded module (a file of flags imports no code), for
            arguments that do not fit, and for whatever the constructor raises, SystemExit included.
    """
    flag = f"--trainer.callbacks: {described.class_path}"
    name = described.class_path
    try:
        kind = loaded(name if "." in name else f"{LIGHTNING}.{name}")
    except UserError as error:
        raise UserError(f"--trainer.callbacks: {error}") from error
    try:
        if not (isinstance(kind, type) and issubclass(kind, L.Callback)):
            raise TypeError("expected a subclass of lightning.pytorch.Callback")
        if inspect.isfunction(kind.__init__):
            callback = kind.__new__(kind)
            validate_call(kind.__init__, config={"arbitrary_types_allowed": True})(callback, **described.init_args)
        else:  # the class has no constructor of its own
            callback = kind(**described.init_args)
        if not isinstance(callback, L.Callback):
            raise TypeError(f"expected an object of lightning.pytorch.Callback, got {shown(callback)}")
        return callback
    except ValidationError as error:
        raise UserError(f"{flag}, {refusal(error, 'init_args.')}.") from error
    except (Exception, SystemExit) as error:  # whatever the class raises
        raise UserError(f"{flag}: {type(error).__name__}: {first_line(error)}") from error


class Witness(L.Callback):
    """Placed after the caller's callbacks: records a stopped stage, and refuses changed text or weights.

    Args:
        note: called with the number of batches done and planned of a stage that was stopped early.
        check_weights: called with the name of a stage after all other callbacks have finished with it. It raises
            UserError if the frozen model was changed.
    """

    def __init__(self, note: Callable[[dict[str, int]], None], check_weights: Callable[[str], None]):
        self.note, self.check_weights = note, check_weights

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        done, planned = trainer.fit_loop.total_batch_idx + 1, int(trainer.num_training_batches * trainer.max_epochs)
        if trainer.should_stop and done < planned:
            log.info("%s was stopped after %d of %d batches", type(pl_module).__name__, done, planned)
            self.note({"batches": done, "planned": planned})

    def on_test_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        tokens = trainer.test_dataloaders[dataloader_idx].dataset.tokens
        if not torch.equal(batch["input_ids"].cpu(), tokens[batch["index"].cpu()]):
            raise UserError("A callback has changed a batch of calibration, whose statistics other runs share.")
        if batch_idx == 0:  # of each corpus: a change may be undone when the stage ends
            self.check_weights(type(pl_module).__name__)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self.check_weights(type(pl_module).__name__)


def retell(error: Exception | SystemExit) -> None:
    """Raise UserError for what a callback not of ours has raised, with its class, or what a Trainer refuses.

    SystemExit is an error like any other here, because a run that ends without a word looks finished; except for
    signals and Ctrl-C, which the command line reports.
    """
    if isinstance(error, SystemExit) and (
        error.code in (129, 143)
        or type(error).__name__ == "SIGTERMException"  # Lightning's
        or isinstance(error.__context__, KeyboardInterrupt)
    ):
        return
    frames = [] if isinstance(error, UserError) else list(traceback.walk_tb(error.__traceback__))
    for (caller, _), (hook, line) in itertools.pairwise(frames):
        callback, trainer = caller.f_locals.get("callback"), caller.f_locals.get("trainer")
        ours = type(callback).__module__.startswith("gprune.")
        if isinstance(callback, L.Callback) and isinstance(trainer, L.Trainer) and not ours:
            who, stage = type(callback).__name__, type(trainer.lightning_module).__name__
            when, where = caller.f_locals.get("hook_name", caller.f_code.co_name), Path(hook.f_code.co_filename).name
            what = f"{type(error).__name__}: {first_line(error)} ({where}, line {line})"
            raise UserError(f"Callback {who} in {when} of {stage}: {what}. The same command goes on.") from error
    if isinstance(error, MisconfigurationException):
        raise UserError(f"--trainer: Lightning refuses it: {first_line(error)}") from error
    if isinstance(error, SystemExit):
        where, line = frames[-1][0].f_code.co_filename, frames[-1][1]
        raise UserError(f"SystemExit: {first_line(error)} ({where}, line {line}) ended the run.") from error
