"""One small registry, used for metrics, corpora and recoveries.

IMPORTANCE = Registry("importance metric")

@IMPORTANCE.register("my_metric")
def my_metric(...): ...

IMPORTANCE["my_metric"]     # an unknown name lists what there is
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from gprune.errors import UserError, nearest

T = TypeVar("T")
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
            raise UserError(f"Unknown {self.kind} '{name}'.{hint} Available: {', '.join(self)}.")
        return self._entries[name]

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)


def _origin(entry: object) -> tuple[str, str]:
    return getattr(entry, "__module__", ""), getattr(entry, "__qualname__", repr(entry))
