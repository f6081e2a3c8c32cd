"""Tables with estimates and intervals, as Markdown, CSV, HTML, LaTeX and terminal output: all by pandas."""

from __future__ import annotations

import os
import re
import shutil
import sys
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from gprune.evaluation.estimate import Estimate

if TYPE_CHECKING:
    import pandas

# Names of the tables of a report.
TableName = Literal["comparison", "distance", "evaluation", "perplexity", "quality", "settings", "summary"]
# Characters that Markdown would interpret. A `*` at the end of a name, `_` inside it and most brackets are plain text.
MARKUP = re.compile(r"^\*|[\\`<|~$]|&(?=#?\w+;)|\*(?=[^\s)])|(?<![^\W_])_|_(?![^\W_])|\[(?=[^\]]*\][(\[])")
LATEX = str.maketrans(
    {c: f"\\{c}" for c in "&%$#_{}"}
    | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
)  # fmt: skip
CONTINUED = re.compile(r" *\\?$", re.MULTILINE)  # pandas marks lines that are continued in the next part
HEADER = re.compile(r"(?:\A|(?<=\n\n)).+")  # of each part in a terminal
INTERVAL = re.compile(r" (\[[^\[\]<]*\])</td>")  # in HTML
Cell = str | int | float | Estimate | None


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

    def formatted(self) -> pandas.DataFrame:
        """Return the cells as text of one line, in a frame that all writers for readers use."""
        import pandas

        texts = [
            [self._format_cell(cell, column) for cell, column in zip(row, self.columns, strict=True)]
            for row in self.rows
        ]
        return pandas.DataFrame(texts, columns=list(self.columns), dtype=object)

    def values(self) -> pandas.DataFrame:
        """Return the numbers with all digits, and columns `_low` and `_high` after columns with intervals."""
        import pandas

        columns: dict[str, list[str | int | float | None]] = {}
        for place, name in enumerate(self.columns):
            cells = [row[place] for row in self.rows]
            estimates = [cell if isinstance(cell, Estimate) else Estimate(cell) for cell in cells]
            columns[name or "row"] = [estimate.value for estimate in estimates]
            if any(isinstance(cell, Estimate) for cell in cells):
                columns[f"{name}_low"] = [estimate.low for estimate in estimates]
                columns[f"{name}_high"] = [estimate.high for estimate in estimates]
        return pandas.DataFrame(columns, dtype=object)

    def to_csv(self) -> str:
        """Format `values` as CSV."""
        return self.values().to_csv(index=False, lineterminator="\n")

    def to_markdown(self) -> str:
        """Format the table, without the note, as aligned Markdown."""
        texts = self.formatted().map(in_markdown).rename(columns=in_markdown)
        alignment = ["left"] + ["right"] * (len(texts.columns) - 1)
        return texts.to_markdown(index=False, disable_numparse=True, colalign=alignment)

    def to_text(self) -> str:
        """Format the table and its note as Markdown."""
        return f"{self.to_markdown()}\n\n{in_markdown(self.note)}".strip()

    def for_stdout(self) -> str:
        """Format for the terminal's width; without a terminal, as Markdown with the note as plain text."""
        if sys.stdout.isatty():
            return self.to_terminal(shutil.get_terminal_size().columns)
        return f"{self.to_markdown()}\n\n{self.note}".strip()

    def to_terminal(self, width: int) -> str:
        """Format the table and its note as plain text for a terminal with `width` characters per line.

        A table that is too wide is split into several parts. Each begins with the columns that identify a row, which
        are the index of the frame. Headers are bold if stdout is a terminal and `$NO_COLOR` is not set.
        """
        texts = self.formatted()
        num_keys = next((n for n in range(1, len(texts.columns)) if not texts.iloc[:, :n].duplicated().any()), 1)
        lines = [texts.columns.to_list(), *texts.to_numpy().tolist()]
        key_widths = [max(len(line[column]) for line in lines) for column in range(num_keys)]
        header, *keys = ["  ".join(map(str.ljust, line, key_widths)) for line in lines]
        others = texts.iloc[:, num_keys:].set_axis(keys, axis="index").rename_axis(columns=header)
        text = CONTINUED.sub("", others.to_string(line_width=width))
        if sys.stdout.isatty() and not os.environ.get("NO_COLOR"):
            text = HEADER.sub("\x1b[1m\\g<0>\x1b[0m", text)
        return f"{text}\n\n{textwrap.fill(self.note, width)}".strip("\n")

    def to_html(self) -> str:
        """Format the table, without the note, as an HTML table with a row header and with intervals in `<small>`."""
        texts = self.formatted()
        name = texts.columns[0]
        frame = texts.set_index(name).rename_axis(index=None, columns=name or "row")
        return INTERVAL.sub(r" <small>\1</small></td>", frame.to_html(border=0))

    def to_latex(self, label: str) -> str:
        """Format the table and its note as a LaTeX table environment, which needs the package booktabs."""
        caption = " ".join(filter(None, [f"{self.title}.", self.note])).translate(LATEX)
        alignment = "l" + "r" * (len(self.columns) - 1)
        return self.formatted().to_latex(
            index=False, escape=True, caption=caption, label=label, column_format=alignment
        )

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


def in_markdown(text: str) -> str:
    """Escape text for Markdown."""
    return MARKUP.sub(r"\\\g<0>", text)
