"""Names of the built-in metrics, and a context manager that restores registries.

`conftest.py` imports this module before collection, so before any test registers a metric. Tests of every metric use
these names.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from gprune.importance import IMPORTANCE
from gprune.registry import Registry

BUILT_IN_METRICS = tuple(IMPORTANCE)

assert "wanda_sp" in BUILT_IN_METRICS


@contextmanager
def restored(*registries: Registry) -> Iterator[None]:
    """Restore the entries of registries at the end of the context.

    Uses the private dictionary, because users do not need a way to remove an entry.
    """
    with pytest.MonkeyPatch.context() as patch:
        for registry in registries:
            patch.setattr(registry, "_entries", dict(registry._entries))
        yield
