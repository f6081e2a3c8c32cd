"""Lightning callbacks that the caller of a run brings: made, handed to every stage, named where they fail."""

from __future__ import annotations

import copy
import inspect
import logging
import traceback
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from types import CodeType
from typing import Any, TypeVar

import lightning as L
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import Logger
from pydantic import ValidationError, validate_call

from gprune.checks import refusal, require, shown
from gprune.config.running import ClassPath
from gprune.errors import UserError, first_line
from gprune.imports import loaded

log = logging.getLogger("gprune")
LIGHTNING = {L.Callback: "lightning.pytorch.callbacks", Logger: "lightning.pytorch.loggers"}  # where bare names are
B = TypeVar("B")
PREFIXES = ("partition", "learn", "distill", "development")  # of the names that our stages log


class UserCallbacks:
    """The caller's Lightning callbacks, for the Trainer of every stage.

    An object of the caller's own class is the same in all stages. An object that inherits from a callback of
    Lightning's (EarlyStopping, ...) holds the state of one fit: each stage gets a copy of it as it was given, and the
    object takes over the state of the last of the run's own stages, such as `best_model_path`.

    Args:
        given: from Python.
        paths: `--trainer.callbacks`, made anew for each stage.

    Raises:
        UserError: for an object that is no callback, and as `made`.
    """

    def __init__(self, given: Sequence[L.Callback] = (), paths: Sequence[ClassPath] = ()):
        for one in given:
            require(one, L.Callback, "Callbacks must be objects of lightning.pytorch.Callback")
        self.given, self.paths = list(given), list(paths)
        for one in self.given:
            if _is_of_lightning(one):
                try:
                    _AS_GIVEN.setdefault(one, copy.deepcopy(one))
                except Exception as error:  # a lock, an open file
                    kind = type(one).__name__
                    raise UserError(
                        f"callbacks: {kind} cannot be copied for each stage: {first_line(error)}"
                    ) from error
        self._used: list[tuple[L.Callback, L.Callback]] = []  # given, and what the last stage had in its place
        self.stage = ""  # class of the last stage
        self.made = self.of_stage(None)  # also refuses what cannot be made

    @property
    def names(self) -> str:
        """Names of all callbacks, for errors; empty if there are none."""
        return ", ".join(
            [f"--trainer.callbacks {path.class_path}" for path in self.paths]
            + [type(one).__name__ for one in self.given]
        )

    def of_stage(self, stage: L.LightningModule | None, role: str = "", folder: Path = Path()) -> list[L.Callback]:
        """The callbacks for one stage, which may take the place of our stage that logs under the prefix `role`.

        A ModelCheckpoint without a folder of its own writes into `folder`.

        A callback that monitors a name of another stage, such as `learn/loss`, is left out.
        """
        self.stage = type(stage).__name__
        pairs = [(one, copy.deepcopy(_AS_GIVEN[one]) if one in _AS_GIVEN else one) for one in self.given]
        pairs += [(one, one) for one in map(made, self.paths)]
        self._used = [(one, used) for one, used in pairs if stage is None or _is_logged(used, stage, role)]
        for _, used in self._used:
            if isinstance(used, ModelCheckpoint) and used.dirpath is None:
                used.dirpath = str(folder)
        return [used for _, used in self._used]

    def keep_state(self) -> None:
        """Give the caller's objects the state that their copies have at the end of a stage."""
        for one, used in self._used:
            vars(one).update(vars(used))

    def hook_of(self, code: CodeType) -> str | None:
        """Name the callback, and its hook, that this code belongs to: "Timer in on_fit_end"; None if no one's."""
        for one in self.made:
            for owner in (one, *(kind for kind in type(one).__mro__ if kind not in (L.Callback, object))):
                for hook, part in vars(owner).items():
                    if getattr(part, "__code__", None) is code:
                        return f"{type(one).__name__} in {hook}"
        return None


# Callbacks of Lightning's classes as the caller gave them, without the state of a run.
_AS_GIVEN: weakref.WeakKeyDictionary[L.Callback, L.Callback] = weakref.WeakKeyDictionary()


def _is_of_lightning(callback: L.Callback) -> bool:
    return any(c.__module__.startswith(LIGHTNING[L.Callback]) for c in type(callback).__mro__ if c is not L.Callback)


def _is_logged(callback: L.Callback, stage: L.LightningModule, role: str) -> bool:
    """Whether a stage may log the name that a callback monitors; a name of another built-in stage it does not."""
    prefix = (getattr(callback, "monitor", None) or "").partition("/")[0]
    own = (role, getattr(stage, "curves", role))
    return prefix not in PREFIXES or prefix in own or (prefix == "development" and "partition" not in own)


def class_of(described: ClassPath, flag: str, base: type) -> type:
    """The class that a class path names; a bare name is one of Lightning's. Nothing is imported.

    Raises:
        UserError: for a path that is not a subclass of `base` in a loaded module.
    """
    name = described.class_path
    try:
        kind = loaded(name if "." in name else f"{LIGHTNING[base]}.{name}")
    except UserError as error:
        raise UserError(f"{flag}: {error}") from error
    if not (isinstance(kind, type) and issubclass(kind, base)):
        raise UserError(f"{flag}: {name}: TypeError: expected a subclass of lightning.pytorch.{base.__name__}.")
    return kind


def made(described: ClassPath, flag: str = "--trainer.callbacks", base: type[B] = L.Callback) -> B:
    """Make an object from its class path and arguments, which are converted to the types of their annotations.

    Args:
        flag: for errors.
        base: the class that it has to be an object of, `Callback` or `Logger`.

    Raises:
        UserError: as `class_of`; for arguments that do not fit, and for whatever the constructor raises, SystemExit
            included.
    """
    kind, where = class_of(described, flag, base), f"{flag}: {described.class_path}"
    try:
        if inspect.isfunction(kind.__init__):
            one = kind.__new__(kind)
            validate_call(kind.__init__, config={"arbitrary_types_allowed": True})(one, **described.init_args)
        else:  # the class has no constructor of its own
            one = kind(**described.init_args)
        if not isinstance(one, base):
            raise TypeError(f"expected an object of lightning.pytorch.{base.__name__}, got {shown(one)}")
        return one
    except ValidationError as error:
        raise UserError(f"{where}, {refusal(error, 'init_args.')}.") from error
    except (Exception, SystemExit) as error:  # whatever the class raises
        raise UserError(f"{where}: {type(error).__name__}: {first_line(error)}") from error


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
        if stage != "validate":  # the fit before or after it is checked
            self.check_weights(type(pl_module).__name__)


def retell(error: Exception | SystemExit, callbacks: UserCallbacks) -> None:
    """Raise UserError for what one of the caller's callbacks has raised, with its class, or what a Trainer refuses.

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
    for frame, line in frames:
        if (hook := callbacks.hook_of(frame.f_code)) is not None:
            what = f"{type(error).__name__}: {first_line(error)} ({Path(frame.f_code.co_filename).name}, line {line})"
            raise UserError(
                f"Callback {hook} of {callbacks.stage}: {what}. The same command resumes the run."
            ) from error
    if isinstance(error, MisconfigurationException):
        raise UserError(f"--trainer: Lightning refuses it: {first_line(error)}") from error
    if isinstance(error, SystemExit):
        where, line = frames[-1][0].f_code.co_filename, frames[-1][1]
        raise UserError(f"SystemExit: {first_line(error)} ({where}, line {line}) ended the run.") from error
