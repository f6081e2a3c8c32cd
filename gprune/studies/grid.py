"""Grids: every row of a list once for each combination of values, `grid: {sparsity.target: [0.2, 0.5]}`."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any

Point = dict[str, Any]  # settings by dotted name


def points(grid: Mapping[Any, Sequence[Any]] | None) -> list[Point]:
    """All combinations, the last setting's values running fastest; one without settings where there is no grid."""
    names = [str(name) for name in grid or {}]
    return [dict(zip(names, values, strict=True)) for values in itertools.product(*(grid or {}).values())]


def named(row: str, point: Point) -> str:
    """What a row is called at a point: 'base, target 0.2'."""
    said = (f"{name.rpartition('.')[2]} {_written(value)}" for name, value in point.items())
    return ", ".join([row, *said])


def _written(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)
