"""Lightning callbacks of the user: construct them, pass them to every stage, and name them in errors."""

from __future__ import annotations

import copy
import inspect
import logging
import traceback
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from types import CodeType
from typing import TypeVar

import lightning as L
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import Logger
from pydantic import ValidationError, validate_call

from gprune.checks import require, validation_message
from gprune.config.running import ClassPath
from gprune.errors import UserError, first_line
from gprune.user_code import find_loaded

log = logging.getLogger("gprune")
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

    @property
    def names(self) -> str:
        """Names of all callbacks, for errors; empty if there are none."""
        from_flags = [f"--trainer.callbacks {path.class_path}" for path in self.paths]
        return ", ".join([*from_flags, *(type(callback).__name__ for callback in self.given)])

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

    All stages except refinement (`partition`) log `development/...`. A metric with an unknown prefix may be the user's.
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


class CallbackChecks(L.Callback):
    """Callback after the user's callbacks that records early stopping, and checks that weights are unchanged."""

    def __init__(self, record_stop: Callable[[dict[str, int]], None], check_weights: Callable[[str], None]):
        self.record_stop, self.check_weights = record_stop, check_weights

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Record that a callback has stopped the stage before its last batch."""
        done, planned = trainer.fit_loop.total_batch_idx + 1, int(trainer.num_training_batches * trainer.max_epochs)
        if trainer.should_stop and done < planned:
            log.info("%s was stopped after %d of %d batches", type(pl_module).__name__, done, planned)
            self.record_stop({"batches": done, "planned": planned})

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self.check_weights(type(pl_module).__name__)


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
