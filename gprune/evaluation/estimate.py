"""A number with its interval; without numpy and scipy, so that what only names it is imported at once."""

from __future__ import annotations

from typing import NamedTuple


class Estimate(NamedTuple):
    """A number with its 95 % interval, if it has one."""

    value: float
    low: float | None = None
    high: float | None = None
