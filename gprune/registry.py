"""One small registry, used for metrics, corpora and recoveries.

IMPORTANCE = Registry("importance metric")

@IMPORTANCE.register("my_metric")
def my_metric(...): ...

IMPORTANCE["my_metric"]     # an unknown name lists what there is
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from gprune.errors import UserError

T = TypeVar("T")


class Registry(Generic[T]):
    """Names to values. `kind` is the word used in messages, such as "corpus"."""

    def __init__(self, kind: str):
        self.kind = kind
        self._entries: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator that files the decorated object under `name`.

        Raises:
            ValueError: if the name is taken (by another object; re-running a notebook cell is no error).
        """

        def file(entry: T) -> T:
            taken = self._entries.get(name)
            if taken is not None and _origin(taken) != _origin(entry):
                raise ValueError(f"{self.kind} '{name}' is registered already, as {taken!r}; choose another name.")
            self._entries[name] = entry
            return entry

        return file

    def __getitem__(self, name: str) -> T:
        if name not in self._entries:
            near = difflib.get_close_matches(str(name), self._entries, n=1)
            hint = f" Did you mean '{near[0]}'?" if near else ""
            raise UserError(f"Unknown {self.kind} '{name}'.{hint} Available: {', '.join(self)}.")
        return self._entries[name]

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)


def _origin(entry: object) -> tuple[str, str]:
    return getattr(entry, "__module__", ""), getattr(entry, "__qualname__", repr(entry))
