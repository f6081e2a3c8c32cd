"""Tables: of one run's records, and of anything with estimates and intervals, as Markdown and CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from gprune.evaluation.intervals import generalisation_gap, geometric_mean, paired_bootstrap_ratio
from gprune.runs.results import Record


def row_name(stage: str, recovery: str) -> str:
    return stage if recovery == "none" else f"{stage} + {recovery}"


def by_stage(records: Sequence[Record]) -> dict[tuple[str, str], dict[str, float]]:
    """(stage, recovery) -> corpus -> perplexity, in the order of the records."""
    table: dict[tuple[str, str], dict[str, float]] = {}
    for r in records:
        table.setdefault((r["stage"], r["recovery"]), {})[r["corpus"]] = r["perplexity"]
    return table


def unseen_ratios(records: Sequence[Record]) -> dict[str, dict[str, float]]:
    """Unseen geometric mean of each stage over `base` with the same recovery, with a 95 % interval over windows."""
    unseen = [r for r in records if not r["seen"]]
    nll: dict[tuple[str, str], dict[str, list[float]]] = {}
    for r in unseen:
        nll.setdefault((r["stage"], r["recovery"]), {})[r["corpus"]] = r["window_nll"]
    ratios = {}
    for (stage, recovery), values in nll.items():
        base = nll.get(("base", recovery))
        if stage in ("dense", "base") or base is None:
            continue
        ratio, low, high = paired_bootstrap_ratio(values, base, unseen[0]["seq_len"] - 1)
        ratios[row_name(stage, recovery)] = {
            "ratio": ratio,
            "low": low,
            "high": high,
        }
    return ratios


def result_table(records: Sequence[Record]) -> str:
    """Markdown: a row per stage; a column per corpus (seen ones marked), geometric means and the gap."""
    table = by_stage(records)
    seen = {r["corpus"]: r["seen"] for r in records}
    corpora = sorted(seen, key=lambda c: not seen[c])
    dense = table[("dense", "none")]
    ratios = unseen_ratios(records)
    rows = [["", *(f"{c}*" if seen[c] else c for c in corpora), "seen", "unseen", "gap", "unseen / base"]]
    for (stage, recovery), values in table.items():
        name = row_name(stage, recovery)
        means = [geometric_mean(v for c, v in values.items() if seen[c] == flag) for flag in (True, False)]
        gap = float("nan") if stage == "dense" else generalisation_gap(values, dense, seen)
        r = ratios.get(name)
        ratio = f"{r['ratio']:.3f} [{r['low']:.3f}, {r['high']:.3f}]" if r else ""
        cells = [*(f"{values[c]:.2f}" for c in corpora), *(f"{m:.2f}" for m in means), f"{gap:.3f}"]
        rows.append([name, *("" if cell == "nan" else cell for cell in cells), ratio])
    return (
        markdown(rows) + "\n\\* seen: the corpus, in other documents, was used by the run. Perplexity, lower is better."
    )


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table with aligned columns; the first row is the header, the first column text."""
    width = [max(len(row[c]) for row in rows) for c in range(len(rows[0]))]

    def line(row: Sequence[str]) -> str:
        first, *rest = (cell.ljust(w) if c == 0 else cell.rjust(w) for c, (cell, w) in enumerate(zip(row, width)))  # noqa: B905
        return "| " + " | ".join([first, *rest]) + " |"

    rule = "|" + "|".join("-" * (w + 2) if c == 0 else "-" * (w + 1) + ":" for c, w in enumerate(width)) + "|"
    return "\n".join([line(rows[0]), rule, *(line(row) for row in rows[1:])])


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

    def to_csv(self) -> str:
        """One column per column, and `_low` and `_high` beside those with intervals."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        wide = [any(isinstance(row[c], Estimate) for row in self.rows) for c in range(len(self.columns))]
        header = [
            [name, f"{name}_low", f"{name}_high"] if w else [name] for name, w in zip(self.columns, wide, strict=True)
        ]
        writer.writerow([name or "row" for part in header for name in part])
        for row in self.rows:
            parts = [
                list(cell) if isinstance(cell, Estimate) else [cell, *([None, None] if w else [])]
                for cell, w in zip(row, wide, strict=True)
            ]
            writer.writerow([value for part in parts for value in part])
        return out.getvalue()

    def _text(self, cell: Cell, column: str) -> str:
        digits = self.digits.get(column, 2)
        if cell is None:
            return ""
        if isinstance(cell, Estimate):
            text = f"{cell.value:.{digits}f}"
            return text if cell.low is None else f"{text} [{cell.low:.{digits}f}, {cell.high:.{digits}f}]"
        return f"{cell:.{digits}f}" if isinstance(cell, float) else str(cell)
