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

from gprune.evaluation.estimate import Estimate

# Names of the tables of a report.
TableName = Literal["comparison", "distance", "evaluation", "perplexity", "quality", "settings", "summary"]
# Characters that Markdown would interpret. A `*` at the end of a name, `_` inside it and most brackets are plain text.
MARKUP = re.compile(r"^\*|[\\`<|~$]|&(?=#?\w+;)|\*(?=[^\s)])|(?<![^\W_])_|_(?![^\W_])|\[(?=[^\]]*\][(\[])")
Cell = str | int | float | Estimate | None
GAP = 2  # characters between columns in a terminal
MIN_KEY_WIDTH = 12  # characters; a narrower first column is hard to read


@dataclass(frozen=True)
class Table:
    """A table that is formatted for readers (Markdown, terminal) and for programs (CSV).

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
        rows = [self.columns, *self.texts()]
        return markdown([list(map(in_markdown, row)) for row in rows])

    def texts(self) -> list[list[str]]:
        """Return the rows with cells as formatted text."""
        return [
            [self._format_cell(cell, column) for cell, column in zip(row, self.columns, strict=True)]
            for row in self.rows
        ]

    def for_stdout(self) -> str:
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
        header, rows = self.columns, self.texts()
        key_widths, parts = _layout([header, *rows], width)
        colours = None if os.environ.get("NO_COLOR") else "auto"  # rich alone would keep bold text
        console = Console(color_system=colours, width=width, file=io.StringIO(), force_terminal=sys.stdout.isatty())
        for part in parts:
            grid = Grid(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False, pad_edge=False, header_style="bold")
            for column, key_width in enumerate(key_widths):
                grid.add_column(Text(header[column]), width=key_width, overflow="fold")
            for column in part:
                longest = max(len(row[column]) for row in (header, *rows))
                grid.add_column(Text(header[column]), justify="right", min_width=min(longest, width // 3))
            for row in rows:
                grid.add_row(*(Text(row[column]) for column in (*range(len(key_widths)), *part)))
            console.print(grid)
            console.print()
        console.print(Text(self.note))
        return console.file.getvalue().strip("\n")

    def to_text(self) -> str:
        """Format the table and its note as Markdown."""
        return f"{self.to_markdown()}\n\n{in_markdown(self.note)}".strip()

    def to_csv(self) -> str:
        """Format `rows_with_bounds` as CSV."""
        file = io.StringIO()
        csv.writer(file, lineterminator="\n").writerows(self.rows_with_bounds())
        return file.getvalue()

    def rows_with_bounds(self) -> list[list[str | int | float | None]]:
        """Return header and rows, with additional columns `_low` and `_high` after columns with intervals."""
        has_bounds = [any(isinstance(row[c], Estimate) for row in self.rows) for c in range(len(self.columns))]
        header: list[str | int | float | None] = []
        for name, with_bounds in zip(self.columns, has_bounds, strict=True):
            header += [name or "row", f"{name}_low", f"{name}_high"] if with_bounds else [name or "row"]
        rows = []
        for row in self.rows:
            values: list[str | int | float | None] = []
            for cell, with_bounds in zip(row, has_bounds, strict=True):
                estimate = cell if isinstance(cell, Estimate) else Estimate(cell)
                values += estimate if with_bounds else [estimate.value]
            rows.append(values)
        return [header, *rows]

    def _format_cell(self, cell: Cell, column: str) -> str:
        """Format a cell: numbers with the digits of the column, and intervals in brackets."""
        digits = self.digits.get(column, 2)
        if cell is None:
            return ""
        if isinstance(cell, Estimate):
            return format_estimate(cell, digits)
        return f"{cell:.{digits}f}" if isinstance(cell, float) else str(cell)


def format_estimate(estimate: Estimate, digits: int = 2) -> str:
    """Format a number and, if there is one, its interval in brackets: 1.23 [1.20, 1.26]."""
    text = f"{estimate.value:.{digits}f}"
    return text if estimate.low is None else f"{text} [{estimate.low:.{digits}f}, {estimate.high:.{digits}f}]"


def _layout(rows: Sequence[Sequence[str]], width: int) -> tuple[list[int], list[list[int]]]:
    """Split the columns of a wide table into parts.

    There is one part if the table fits after folding the first column to a fifth of the width (at least 12 characters).
    Otherwise every part begins with the key columns, which are those that identify a row, or as many of them as leave a
    third of the width.

    Args:
        rows: header and cells.
        width: characters per line.

    Returns:
        key_widths: widths of the key columns, which are the first columns.
        parts: indices of the other columns of each part.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    available = width - sum(w + GAP for w in widths[1:])
    if available >= min(widths[0], max(width // 5, MIN_KEY_WIDTH)):
        return [min(available, widths[0])], [list(range(1, len(widths)))]
    num_identifying = next((n for n in range(1, len(widths)) if len({tuple(row[:n]) for row in rows}) == len(rows)), 1)
    for num_keys in range(num_identifying, 0, -1):
        key_widths = [min(w, max(width // (num_keys + 2), MIN_KEY_WIDTH)) for w in widths[:num_keys]]
        available = width + GAP - sum(w + GAP for w in key_widths)
        if available >= width // 3:
            break
    parts: list[list[int]] = [[]]
    for column in range(num_keys, len(widths)):  # as many columns per part as fit
        if parts[-1] and sum(widths[c] + GAP for c in (*parts[-1], column)) > available:
            parts.append([])
        parts[-1].append(column)
    return key_widths, parts


def in_markdown(text: str) -> str:
    """Escape text for Markdown."""
    return MARKUP.sub(r"\\\g<0>", text)


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """Format rows as an aligned Markdown table.

    The first row is the header. The first column is aligned to the left, and the others to the right.
    """
    widths = [max(len(row[c]) for row in rows) for c in range(len(rows[0]))]

    def to_line(row: Sequence[str]) -> str:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:])]  # noqa: B905
        return f"| {' | '.join(cells)} |"

    rule = ["-" * (widths[0] + 2), *("-" * (width + 1) + ":" for width in widths[1:])]
    return "\n".join([to_line(rows[0]), f"|{'|'.join(rule)}|", *(to_line(row) for row in rows[1:])])
