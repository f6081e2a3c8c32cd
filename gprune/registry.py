"""One small registry, used for metrics, corpora and recoveries; and what every entry of one is held to.

IMPORTANCE = Registry("importance metric")

@IMPORTANCE.register("my_metric")
def my_metric(...): ...

IMPORTANCE["my_metric"]     # an unknown name lists what there is
with IMPORTANCE.running("my_metric", weight):
    scores = IMPORTANCE.checked("my_metric", "scores", my_metric(weight), (48,))
"""

from __future__ import annotations

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
DTYPES = {"finite numbers": FLOATS + WHOLE, "finite floats": FLOATS, "whole numbers": WHOLE, "bool": ("bool",)}
NAME = re.compile(r"\w[\w.-]{0,99}")


class Registry(Generic[T]):
    """Names to values. `kind` is the word used in messages, such as "corpus"."""

    def __init__(self, kind: str):
        self.kind = kind
        self._entries: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator that files the decorated object under `name`.

        Raises:
            ValueError: if the name is taken (by another object; re-running a notebook cell is no error).
            UserError: for a name that could lead out of a folder, or that chains and lists would cut in two.
        """
        if not (isinstance(name, str) and NAME.fullmatch(name)):
            raise UserError(f"A name of {self.kind}: expected letters, digits, _, - and dots, got {name!r:.100}.")

        def file(entry: T) -> T:
            taken = self._entries.setdefault(name, entry)
            if _origin(taken) != _origin(entry):
                raise ValueError(f"{self.kind} '{name}' is registered already, as {taken!r}; choose another name.")
            self._entries[name] = entry
            return entry

        return file

    def __getitem__(self, name: str) -> T:
        if name not in self._entries:
            hint = f" Did you mean '{near}'?" if (near := nearest(name, self._entries)) else ""
            raise UnregisteredError(f"Unknown {self.kind} '{name}'.{hint} Available: {', '.join(self)}.")
        return self._entries[name]

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
            raise UserError(
                f"{self.kind.capitalize()} '{name}' changes its inputs in place; expected abs() for abs_()."
            )

    def checked(self, name: str, what: str, value: Any, *shapes: tuple[int, ...], of: str = "finite numbers") -> Tensor:
        """What the entry `name` returned, detached, where it is a dense tensor of one of the shapes.

        Args:
            what: the word for it, such as "scores".
            of: what the tensor holds, of `DTYPES`.

        Raises:
            UserError: for anything else; it names the entry, what was expected and what came.
        """
        import torch

        got = type(value).__name__
        if isinstance(value, torch.Tensor):
            dtype, layout = (str(part).removeprefix("torch.") for part in (value.dtype, value.layout))
            got = f"{tuple(value.shape)} of {dtype}, {'without values (meta)' if value.is_meta else layout}"
            if value.shape in shapes and dtype in DTYPES[of] and layout == "strided" and not value.is_meta:
                bad = int((~value.isfinite()).sum())
                if not bad:
                    return value.detach()
                got = f"{bad} of {value.numel()} that are not finite"
        shape = " or ".join(map(str, shapes))
        raise UserError(f"{self.kind.capitalize()} '{name}': expected {what} {shape}, dense, of {of}; got {got}.")

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)


def _origin(entry: object) -> tuple[str, str]:
    return getattr(entry, "__module__", ""), getattr(entry, "__qualname__", repr(entry))
