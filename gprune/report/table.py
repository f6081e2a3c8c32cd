"""Tables with estimates and intervals, as Markdown, CSV and terminal output."""

from __future__ import annotations

import csv
import io
import os
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table as Grid
from rich.text import Text

from gprune.errors import one_line, printable
from gprune.evaluation.estimate import Estimate

TableName = Literal[
    "comparison", "distance", "evaluation", "perplexity", "quality", "settings", "summary"
]  # names of the tables of a report


# Characters that Markdown would interpret. A `*` at the end of a name, `_` inside it and most brackets are plain text.
MARKUP = re.compile(r"^\*|[\\`<|~$]|&(?=#?\w+;)|\*(?=[^\s)])|(?<![^\W_])_|_(?![^\W_])|\[(?=[^\]]*\][(\[])")
Cell = str | int | float | Estimate | None


@dataclass(frozen=True)
class Table:
    """A table for people (Markdown) and for programs (CSV), from the same cells.

    Attributes:
        name: name of files.
        title: title of the section.
        columns: headers; the first column is text.
        rows: cells; None is an empty cell.
        digits: column -> decimal places in Markdown, by default 2. CSV has all digits.
        note: a paragraph of plain text below the table.
    """

    name: str
    title: str
    columns: list[str]
    rows: list[list[Cell]]
    digits: Mapping[str, int] = field(default_factory=dict)
    note: str = ""

    def to_markdown(self) -> str:
        """Format the table, without the note, as aligned Markdown."""
        return markdown([list(map(in_markdown, row)) for row in (map(one_line, self.columns), *self.texts())])

    def texts(self) -> list[list[str]]:
        """Cells as formatted text."""
        return [[self._text(cell, column) for cell, column in zip(row, self.columns, strict=True)] for row in self.rows]

    def shown(self) -> str:
        """Format for the terminal's width; without a terminal, as Markdown with the note as plain text."""
        if sys.stdout.isatty():
            return self.to_terminal(shutil.get_terminal_size().columns)
        return f"{self.to_markdown()}\n\n{self.note}".strip()

    def to_terminal(self, width: int) -> str:
        """Format the table and its note for a terminal. A table that is too wide is split into several parts.

        Cells are plain text, not rich markup. Headers are bold if stdout is a terminal and `$NO_COLOR` is not set.

        Args:
            width: characters per line.
        """
        plain = [list(map(one_line, self.columns)), *self.texts()]
        names, parts = _layout(plain, width)
        colours = None if os.environ.get("NO_COLOR") else "auto"  # rich alone would keep bold text
        console = Console(color_system=colours, width=width, file=io.StringIO(), force_terminal=sys.stdout.isatty())
        for part in parts:
            grid = Grid(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False, pad_edge=False, header_style="bold")
            for column, size in enumerate(names):
                grid.add_column(Text(plain[0][column]), width=size, overflow="fold")
            for column in part:
                least = min(max(len(row[column]) for row in plain), width // 3)
                grid.add_column(Text(plain[0][column]), justify="right", min_width=least)
            for row in plain[1:]:
                grid.add_row(*(Text(row[column]) for column in (*range(len(names)), *part)))
            console.print(grid)
            console.print()
        console.print(Text(printable(self.note)))
        return console.file.getvalue().strip("\n")

    def to_text(self) -> str:
        """Format the table and its note as Markdown."""
        return f"{self.to_markdown()}\n\n{in_markdown(self.note)}".strip()

    def to_csv(self) -> str:
        """Format `wide` as CSV."""
        out = io.StringIO()
        csv.writer(out, lineterminator="\n").writerows(self.wide())
        return out.getvalue()

    def wide(self) -> list[list[str | int | float | None]]:
        """Header and rows, with additional columns `_low` and `_high` for columns with intervals."""
        wide = [any(isinstance(row[c], Estimate) for row in self.rows) for c in range(len(self.columns))]
        header = [(name or "row", f"{name}_low", f"{name}_high") for name in self.columns]
        rows = [[cell if isinstance(cell, Estimate) else Estimate(cell) for cell in row] for row in self.rows]
        return [
            [v for cell, w in zip(row, wide, strict=True) for v in (cell if w else cell[:1])] for row in (header, *rows)
        ]

    def _text(self, cell: Cell, column: str) -> str:
        digits = self.digits.get(column, 2)
        if cell is None:
            return ""
        if isinstance(cell, Estimate):
            text = f"{cell.value:.{digits}f}"
            return text if cell.low is None else f"{text} [{cell.low:.{digits}f}, {cell.high:.{digits}f}]"
        return f"{cell:.{digits}f}" if isinstance(cell, float) else one_line(str(cell))


def _layout(rows: Sequence[Sequence[str]], width: int) -> tuple[list[int], list[list[int]]]:
    """Split a wide table into parts: return widths of the first columns, which are repeated in each part, and parts.

    There is one part if the table fits after folding the first column to a fifth of the width (at least 12 characters).
    Otherwise every part begins with the columns that identify a row, as many as leave a third of the width.

    Args:
        rows: header and cells.
        width: characters per line.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    beside = width - sum(w + 2 for w in widths[1:])
    if beside >= min(widths[0], max(width // 5, 12)):
        return [min(beside, widths[0])], [list(range(1, len(widths)))]
    keys = next((n for n in range(1, len(widths)) if len({tuple(row[:n]) for row in rows}) == len(rows)), 1)
    for n in range(keys, 0, -1):
        names = [min(w, max(width // (n + 2), 12)) for w in widths[:n]]
        room = width + 2 - sum(w + 2 for w in names)
        if room >= width // 3:
            break
    parts: list[list[int]] = [[]]
    for column in range(n, len(widths)):  # as many columns per part as fit, with a gap of two characters
        if parts[-1] and sum(widths[c] + 2 for c in (*parts[-1], column)) > room:
            parts.append([])
        parts[-1].append(column)
    return names, parts


def in_markdown(text: str) -> str:
    """Escape text for Markdown."""
    return MARKUP.sub(r"\\\g<0>", text)


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """Format rows as a Markdown table with aligned columns; the first row is the header, the first column text."""
    width = [max(len(row[c]) for row in rows) for c in range(len(rows[0]))]

    def line(row: Sequence[str]) -> str:
        cells = (cell.rjust(w) if c else cell.ljust(w) for c, (cell, w) in enumerate(zip(row, width)))  # noqa: B905
        return f"| {' | '.join(cells)} |"

    rule = "|" + "|".join("-" * (w + 2) if c == 0 else "-" * (w + 1) + ":" for c, w in enumerate(width)) + "|"
    return "\n".join([line(rows[0]), rule, *(line(row) for row in rows[1:])])
