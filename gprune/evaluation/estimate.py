"""A number with its confidence interval. This file does not import numpy or scipy, so that importing it is fast."""

from __future__ import annotations

from typing import NamedTuple


class Estimate(NamedTuple):
    """A number with an optional 95 % confidence interval."""

    value: float
    low: float | None = None
    high: float | None = None
