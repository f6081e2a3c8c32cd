"""One small registry, used for metrics, corpora, recoveries and stages; and what every entry of one is held to.

IMPORTANCE = Registry("importance metric")

@IMPORTANCE.register("my_metric")
def my_metric(...): ...

IMPORTANCE["my_metric"]     # an unknown name lists what there is
with IMPORTANCE.running("my_metric", weight):
    scores = IMPORTANCE.checked("my_metric", "scores", my_metric(weight), (48,))
"""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from gprune.errors import UnregisteredError, UserError, nearest

if TYPE_CHECKING:  # flags are checked by what is registered, which should not wait for PyTorch
    from torch import Tensor

T = TypeVar("T")
FLOATS, WHOLE = ("float64", "float32", "float16", "bfloat16"), ("int64", "int32", "int16", "int8", "uint8")
DTYPES = {"numbers": FLOATS + WHOLE, "floats": FLOATS, "whole numbers": WHOLE, "bool": ("bool",)}
NAME = re.compile(r"\w[\w.-]{0,99}")


class Registry(Generic[T]):
    """Names to values. `kind` is the word used in messages, such as "corpus"; entries have the method `asked`."""

    def __init__(self, kind: str, asked: str | None = None):
        self.kind, self.asked = kind, asked
        self._entries: dict[str, T | str] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator that files the decorated object under `name`; or its place, "module:name", until it is asked for.

        Raises:
            ValueError: if the name is taken (by another object; re-running a notebook cell is no error).
            UserError: for a name that could lead out of a folder, or that chains and lists would cut in two.
        """
        if not (isinstance(name, str) and NAME.fullmatch(name)):
            raise UserError(f"A name of {self.kind}: expected letters, digits, _, - and dots, got {name!r:.100}.")

        def file(entry: T) -> T:
            if self.asked and not isinstance(entry, str) and not callable(getattr(entry, self.asked, None)):
                raise UserError(f"{self.kind} '{name}': expected a class with the method {self.asked}, got {entry!r}.")
            taken = self._entries.setdefault(name, entry)
            if _origin(taken) != _origin(entry):
                raise ValueError(f"{self.kind} '{name}' is registered already, as {taken!r}; choose another name.")
            self._entries[name] = entry
            return entry

        return file

    def check(self, name: str) -> None:
        """Raise UserError for a name that is not there, without importing what is."""
        if name not in self._entries:
            hint = f" Did you mean '{near}'?" if (near := nearest(name, self._entries)) else ""
            raise UnregisteredError(f"Unknown {self.kind} '{name}'.{hint} Available: {', '.join(self)}.")

    def __getitem__(self, name: str) -> T:
        self.check(name)
        entry = self._entries[name]
        if isinstance(entry, str):
            module, _, origin = entry.partition(":")
            entry = self._entries[name] = getattr(importlib.import_module(module), origin)
        return entry

    @contextmanager
    def running(self, name: str, *inputs: Tensor) -> Iterator[None]:
        """Around a call of the entry `name`: working folder and default dtype are as before when it returns.

        Raises:
            UserError: if it has changed one of the inputs, which it shares with others, in place.
        """
        import torch

        folder, dtype, versions = os.getcwd(), torch.get_default_dtype(), [t._version for t in inputs]
        try:
            yield
        finally:
            os.chdir(folder)
            torch.set_default_dtype(dtype)
        if versions != [t._version for t in inputs]:
            raise UserError(f"{self.kind.capitalize()} '{name}' changes inputs in place; expected abs() for abs_().")

    def checked(self, name: str, what: str, value: Any, *shapes: tuple[int, ...], of: str = "finite numbers") -> Tensor:
        """What the entry `name` returned, detached, where it is a dense tensor of one of the shapes.

        Args:
            what: the word for it, such as "scores".
            of: what the tensor holds, of `DTYPES`; `finite` before it is looked at, and waits for a device.

        Raises:
            UserError: for anything else; it names the entry, what was expected and what came.
        """
        import torch

        got = type(value).__name__
        if isinstance(value, torch.Tensor):
            dtype, layout = (str(part).removeprefix("torch.") for part in (value.dtype, value.layout))
            got = f"{tuple(value.shape)} of {dtype}, {'without values (meta)' if value.is_meta else layout}"
            known = dtype in DTYPES[of.removeprefix("finite ")]
            if value.shape in shapes and known and layout == "strided" and not value.is_meta:
                bad = int((~value.isfinite()).sum()) if "finite" in of else 0
                if not bad:
                    return value.detach()
                got = f"{bad} of {value.numel()} that are not finite"
        shape = " or ".join(map(str, shapes))
        raise UserError(f"{self.kind.capitalize()} '{name}': expected {what} {shape}, dense, of {of}; got {got}.")

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)


def _origin(entry: object) -> tuple[str, str]:
    return getattr(entry, "__module__", ""), getattr(entry, "__qualname__", repr(entry))


# Stages, and the method of each that the pipeline asks for.
REFINER: Registry[Any] = Registry("refiner", "labels")  # --partition.refiner
LEARNER: Registry[Any] = Registry("learner", "masks")  # --sparsity.learner
CALIBRATOR: Registry[Any] = Registry("calibrator", "test_step")  # --corpora.calibrator
