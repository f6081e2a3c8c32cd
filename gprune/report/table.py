"""A table of anything, with estimates and intervals, as Markdown and CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple


class Estimate(NamedTuple):
    """A number with its 95 % interval, if it has one."""

    value: float
    low: float | None = None
    high: float | None = None


Cell = str | int | float | Estimate | None


@dataclass(frozen=True)
class Table:
    """A table for people (Markdown) and for programs (CSV), from the same cells.

    Attributes:
        name: of the files.
        title: of the section.
        columns: headers; the first column is text.
        rows: None is an empty cell.
        digits: by column, digits after the point in Markdown; 2 where nothing is said. CSV has all of them.
        note: a paragraph under the Markdown table.
    """

    name: str
    title: str
    columns: list[str]
    rows: list[list[Cell]]
    digits: Mapping[str, int] = field(default_factory=dict)
    note: str = ""

    def to_markdown(self) -> str:
        """The table alone, aligned."""
        cells = [
            [self._text(cell, column) for cell, column in zip(row, self.columns, strict=True)] for row in self.rows
        ]
        return markdown([self.columns, *cells])

    def to_text(self) -> str:
        """The Markdown table, and its note below."""
        return self.to_markdown() + (f"\n\n{self.note}" if self.note else "")

    def to_csv(self) -> str:
        """One column per column, and `_low` and `_high` beside those with intervals."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        wide = [any(isinstance(row[c], Estimate) for row in self.rows) for c in range(len(self.columns))]
        header = [(name or "row", f"{name}_low", f"{name}_high") for name in self.columns]
        rows = [[cell if isinstance(cell, Estimate) else Estimate(cell) for cell in row] for row in self.rows]
        for row in (header, *rows):
            writer.writerow([v for cell, w in zip(row, wide, strict=True) for v in (cell if w else cell[:1])])
        return out.getvalue()

    def _text(self, cell: Cell, column: str) -> str:
        digits = self.digits.get(column, 2)
        if cell is None:
            return ""
        if isinstance(cell, Estimate):
            text = f"{cell.value:.{digits}f}"
            return text if cell.low is None else f"{text} [{cell.low:.{digits}f}, {cell.high:.{digits}f}]"
        return f"{cell:.{digits}f}" if isinstance(cell, float) else str(cell)


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table with aligned columns; the first row is the header, the first column text."""
    width = [max(len(row[c]) for row in rows) for c in range(len(rows[0]))]

    def line(row: Sequence[str]) -> str:
        cells = (cell.rjust(w) if c else cell.ljust(w) for c, (cell, w) in enumerate(zip(row, width)))  # noqa: B905
        return f"| {' | '.join(cells)} |"

    rule = "|" + "|".join("-" * (w + 2) if c == 0 else "-" * (w + 1) + ":" for c, w in enumerate(width)) + "|"
    return "\n".join([line(rows[0]), rule, *(line(row) for row in rows[1:])])
