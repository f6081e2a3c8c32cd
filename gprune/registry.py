"""Code of users: functions that are registered by name, and checks of what they return.

IMPORTANCE = Registry("importance metric")

@IMPORTANCE.register("my_metric")
def my_metric(...): ...

IMPORTANCE["my_metric"]     # for an unknown name the error lists all names
with IMPORTANCE.unchanged("my_metric", weight):
    scores = IMPORTANCE.checked("my_metric", "scores", my_metric(weight), (48,))
"""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from gprune.checks import check_options
from gprune.errors import UnregisteredError, UserError, closest_name
from gprune.user_code import code_of

if TYPE_CHECKING:  # flags are checked by what is registered, which should not wait for PyTorch
    from torch import Tensor

T = TypeVar("T")
FLOATS = ("float64", "float32", "float16", "bfloat16")
INTEGERS = ("int64", "int32", "int16", "int8", "uint8")
# Word for the content of a tensor in messages -> dtypes that are allowed.
DTYPES = {"numbers": FLOATS + INTEGERS, "floats": FLOATS, "whole numbers": INTEGERS, "bool": ("bool",)}
Stage = Any  # a LightningModule class, or a functools.partial of one with keyword arguments
STAGES = {"calibrator": "test_step", "refiner": "labels", "learner": "masks"}  # kind -> method that its class must have
NAME = re.compile(r"\w[\w.-]{0,99}")


class UserCode:
    """Checks of functions and classes of users. Errors name them by their kind, such as "Corpus 'mine'"."""

    def __init__(self, kind: str):
        self.kind = kind  # the word for an entry in messages, such as "corpus"

    @contextmanager
    def unchanged(self, name: str, *inputs: Tensor) -> Iterator[None]:
        """Context for a call of the entry `name`. Raise UserError if the entry has changed an input in place."""
        versions = [tensor._version for tensor in inputs]
        yield
        if versions != [tensor._version for tensor in inputs]:
            subject = f"{self.kind.capitalize()} '{name}'"
            raise UserError(f"{subject} must not change its inputs in place. Use abs() instead of abs_(), for example.")

    def checked(self, name: str, what: str, value: Any, *shapes: tuple[int, ...], of: str = "finite numbers") -> Tensor:
        """Return the tensor `value`, detached, that the entry `name` returned as `what`, such as "scores".

        Raise UserError unless it has one of the shapes and a dtype of `DTYPES[of]`. With `finite ` before the key of
        `DTYPES`, values are checked too, which waits for the device.
        """
        import torch

        received = type(value).__name__  # description for the error
        if isinstance(value, torch.Tensor):
            dtype = str(value.dtype).removeprefix("torch.")
            received = f"{tuple(value.shape)} of {dtype}"
            if value.shape in shapes and dtype in DTYPES[of.removeprefix("finite ")]:
                not_finite = int((~value.isfinite()).sum()) if "finite" in of else 0
                if not not_finite:
                    return value.detach()
                received = f"{not_finite} of {value.numel()} that are not finite"
        shape = " or ".join(map(str, shapes))
        subject = f"{self.kind.capitalize()} '{name}'"
        raise UserError(f"{subject} must give {what} {shape} as a tensor of {of}; got {received}.")


class Registry(UserCode, Generic[T]):
    """Map names to registered functions or classes. `others` are names that gprune gives a meaning without an entry."""

    def __init__(self, kind: str, others: Collection[str] = ()):
        super().__init__(kind)
        self.others = others
        self._entries: dict[str, T] = {}
        self._registered_in: dict[str, str] = {}  # name -> the module that registers it

    def register(self, name: str) -> Callable[[T], T]:
        """Return a decorator that registers an object under `name`.

        Raises:
            ValueError: if another object has the name (running a notebook cell again is allowed), or it is in `others`.
            UserError: if the name has characters that are special in paths, or separate names in chains and lists.
        """
        if not (isinstance(name, str) and NAME.fullmatch(name)):
            raise UserError(f"The name of a {self.kind} must have letters, digits, _, - and dots; got {name!r:.100}.")
        if name in self.others:
            raise ValueError(f"{self.kind} '{name}' has a meaning already; choose another name.")
        registered_in = _calling_module()

        def decorate(entry: T) -> T:
            """Register the entry under `name`, and return it unchanged."""
            existing = self._entries.setdefault(name, entry)
            if _origin(existing) != _origin(entry):
                raise ValueError(f"{self.kind} '{name}' is already registered as {existing!r}; choose another name.")
            self._entries[name] = entry
            self._registered_in[name] = registered_in
            self.code(name)  # reads the module's file now, because it may be changed later
            return entry

        return decorate

    def code(self, name: str) -> dict[str, str | None]:
        """Return the hashes of the user's code of an entry, by module; empty for an entry of gprune.

        The hash is None if the code cannot be read, or if the name is not registered.
        """
        if name not in self._entries:
            return {f"{self.kind} {name}": None}
        entry = self._entries[name]
        definition = getattr(entry, "registered", entry)  # of a recovery, whose entry is made from it
        return code_of(definition, self._registered_in.get(name, ""))

    def check(self, name: str) -> None:
        """Raise UserError if the name is not registered."""
        if name not in self._entries:
            known = [*self, *self.others]
            closest = closest_name(name, known)
            hint = f" Did you mean '{closest}'?" if closest else ""
            own = "one of your own needs --import MODULE"
            raise UnregisteredError(f"Unknown {self.kind} '{name}'.{hint} Available: {', '.join(known)}; {own}.")

    def __getitem__(self, name: str) -> T:
        """Return the entry. Raise UserError if the name is not registered."""
        self.check(name)
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)


def stages_of(module: str) -> dict[str, Stage]:
    """Return the stages that a module of `--import` names, by kind. Raise UserError if there are none."""
    if module not in sys.modules:
        raise UnregisteredError(f"--stages must be a module of --import; got '{module}'. Add --import {module}.")
    names = vars(sys.modules[module])
    if not (stages := {kind: names[kind] for kind in STAGES if kind in names}):
        raise UserError(f"--stages must be a module that sets {', '.join(STAGES)}, or some of them; got '{module}'.")
    return stages


def class_and_arguments(stage: Stage) -> tuple[Any, dict[str, Any]]:
    """Return the class of a stage and the keyword arguments of its partial."""
    return (stage.func, stage.keywords) if isinstance(stage, functools.partial) else (stage, {})


def check_stage(kind: str, stage: Stage) -> dict[str, Any]:
    """Return the path of a stage's class and its arguments, as plain data for the settings. UserError if invalid."""
    cls, arguments = class_and_arguments(stage)
    # By name, because this module must not import Lightning.
    is_module = isinstance(cls, type) and any(base.__name__ == "LightningModule" for base in cls.__mro__)
    if not (is_module and callable(getattr(cls, STAGES[kind], None))) or getattr(stage, "args", ()):
        needed = f"a LightningModule class with the method {STAGES[kind]}, or a functools.partial with keywords"
        raise UserError(f"A {kind} must be {needed}; got {stage!r:.100}.")
    check_options(f"The arguments of {kind}", cls.__qualname__, cls, arguments)
    return {"class": f"{cls.__module__}.{cls.__qualname__}", "arguments": dict(arguments)}


def _calling_module() -> str:
    """Return the name of the module outside gprune that called gprune, the innermost of several; empty without one."""
    frame = sys._getframe()
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] == "gprune":
        frame = frame.f_back
    return "" if frame is None else frame.f_globals.get("__name__", "")


def _origin(entry: object) -> tuple[str, str]:
    """Return the module and the name of an object, which are the same after a notebook cell has been run again."""
    return getattr(entry, "__module__", ""), getattr(entry, "__qualname__", repr(entry))
