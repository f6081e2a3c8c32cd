"""Code of users: functions that are registered by name, stages that are named by the path of their class, and checks.

IMPORTANCE = Registry("importance metric")

@IMPORTANCE.register("my_metric")
def my_metric(...): ...

IMPORTANCE["my_metric"]     # for an unknown name the error lists all names
with IMPORTANCE.unchanged("my_metric", weight):
    scores = IMPORTANCE.checked("my_metric", "scores", my_metric(weight), (48,))

LEARNER["my_module.MyLearner"]     # a class in a module that is already imported
"""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from gprune.errors import UnregisteredError, UserError, closest_name
from gprune.user_code import code_at, code_of, find_loaded, path_of

if TYPE_CHECKING:  # flags are checked by what is registered, which should not wait for PyTorch
    from torch import Tensor

T = TypeVar("T")
FLOATS = ("float64", "float32", "float16", "bfloat16")
INTEGERS = ("int64", "int32", "int16", "int8", "uint8")
# Word for the content of a tensor in messages -> dtypes that are allowed.
DTYPES = {"numbers": FLOATS + INTEGERS, "floats": FLOATS, "whole numbers": INTEGERS, "bool": ("bool",)}
NAME = re.compile(r"\w[\w.-]{0,99}")


class UserCode:
    """Checks of functions and classes of users. Errors name them by their kind, such as "Corpus 'mine'"."""

    kind: str

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
    """Map names to registered functions or classes."""

    def __init__(self, kind: str):
        self.kind = kind  # the word for an entry in messages, such as "corpus"
        self._entries: dict[str, T] = {}
        self._registered_in: dict[str, str] = {}  # name -> the module that registers it

    def register(self, name: str) -> Callable[[T], T]:
        """Return a decorator that registers an object under `name`.

        Raises:
            ValueError: if another object has the name (running a notebook cell again is allowed).
            UserError: if the name has characters that are special in paths, or separate names in chains and lists.
        """
        if not (isinstance(name, str) and NAME.fullmatch(name)):
            raise UserError(f"The name of a {self.kind} must have letters, digits, _, - and dots; got {name!r:.100}.")
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
            closest = closest_name(name, self._entries)
            hint = f" Did you mean '{closest}'?" if closest else ""
            own = "one of your own needs --import MODULE"
            raise UnregisteredError(f"Unknown {self.kind} '{name}'.{hint} Available: {', '.join(self)}; {own}.")

    def __getitem__(self, name: str) -> T:
        """Return the entry. Raise UserError if the name is not registered."""
        self.check(name)
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)


class StageClass(UserCode):
    """The class of a stage, which a flag names: the built-in one, or the path of a class of the user.

    As for `--trainer.callbacks`, the path names a class in a module that is already imported (`--import`), because it
    may come from a file of somebody else.

    Args:
        flag: the flag, such as "--sparsity.learner".
        method: a method that every class must have.
        built_in: name of the built-in class, and its path.
    """

    def __init__(self, flag: str, method: str, built_in: tuple[str, str]):
        self.flag, self.method, self.built_in = flag, method, built_in
        self.kind = flag.rpartition(".")[2]

    def check(self, name: str) -> None:
        """Raise UserError unless the name is the built-in one, or the path of a loaded class with the method."""
        if name != self.built_in[0]:  # its file imports PyTorch
            _ = self[name]

    def __getitem__(self, name: str) -> type:
        """Return the class of a name. Raise UserError for a name that `check` refuses."""
        if name == self.built_in[0]:
            module, _, attribute = self.built_in[1].rpartition(".")
            return getattr(importlib.import_module(module), attribute)
        if "." not in name:
            known = f"{self.built_in[0]}, or the path of a class such as my_module.MyClass, with --import my_module"
            raise UnregisteredError(f"Unknown {self.kind} '{name}'. Available: {known}.")
        found = find_loaded(name, self.flag)
        # By name, because this module must not import Lightning.
        is_stage = isinstance(found, type) and any(cls.__name__ == "LightningModule" for cls in found.__mro__)
        if not (is_stage and callable(getattr(found, self.method, None))):
            needed = f"the path of a LightningModule with the method {self.method}"
            raise UserError(f"{self.flag} must be {needed}; got '{name}'.")
        return found

    def name_of(self, cls: type) -> str:
        """Return the name of a class: the built-in name, or its path."""
        path = path_of(cls)
        return self.built_in[0] if path == self.built_in[1] else path

    def code(self, name: str) -> dict[str, str | None]:
        """Return the hashes of the user's code of a class, by module; empty for the built-in one."""
        return {} if name == self.built_in[0] else code_at(name)


def _calling_module() -> str:
    """Return the name of the module outside gprune that called gprune, the innermost of several; empty without one."""
    frame = sys._getframe()
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] == "gprune":
        frame = frame.f_back
    return "" if frame is None else frame.f_globals.get("__name__", "")


def _origin(entry: object) -> tuple[str, str]:
    """Return the module and the name of an object, which are the same after a notebook cell has been run again."""
    return getattr(entry, "__module__", ""), getattr(entry, "__qualname__", repr(entry))


REFINER = StageClass(
    "--partition.refiner", "labels", ("soft_assignment", "gprune.stages.refinement.AssignmentRefinement")
)
LEARNER = StageClass(
    "--sparsity.learner", "masks", ("straight_through", "gprune.stages.threshold_learning.ThresholdLearning")
)
CALIBRATOR = StageClass(
    "--corpora.calibrator", "test_step", ("streaming", "gprune.stages.calibration.CalibrationStage")
)
