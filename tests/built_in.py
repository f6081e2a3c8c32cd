"""What the registries hold by themselves: names taken when tests begin, before any test registers something of its own.

`conftest.py` imports this module before it collects anything. Tests over "every metric" take their names from here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from gprune.importance import IMPORTANCE
from gprune.registry import Registry

METRICS = tuple(IMPORTANCE)

assert "wanda_sp" in METRICS


@contextmanager
def scratch(*registries: Registry) -> Iterator[None]:
    """What is registered inside is forgotten afterwards.

    It reaches for the private dictionary, as a registry has no public way to take an entry out: users need none.
    """
    with pytest.MonkeyPatch.context() as patch:
        for registry in registries:
            patch.setattr(registry, "_entries", dict(registry._entries))
        yield
