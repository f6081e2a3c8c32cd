"""Report of one or several runs: tables, figures and files.

from gprune import report
made = report.make(["runs/a", "runs/b"])
made.to_markdown(), made.tables[0].rows, made.figures()["ratios"]
made.write("report")

Runs that differ only in the seed become one row, with mean and interval over seeds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_args

from matplotlib.figure import Figure

from gprune.errors import one_line
from gprune.report.benchmark_table import evaluation_table
from gprune.report.comparison_figures import learning_figure, ratio_figure, sparsity_lines
from gprune.report.curves import read_curves
from gprune.report.grouping import (
    SeedGroup,
    groups,
    named_by_difference,
    read_runs,
    settings_table,
    with_distinct_names,
)
from gprune.report.perplexity_tables import comparison_table, distance_table, perplexity_table, summary_table
from gprune.report.records import caption, quality_table
from gprune.report.run_figures import write_figures
from gprune.report.style import FORMATS, save, titled
from gprune.report.table import Table, TableName, in_markdown
from gprune.runs.results import FinishedRun, read_run
from gprune.storage.files import replacing
from gprune.storage.reading import expanded

FIGURES = ("ratios", "learning", "sparsity", "perplexity", "heterogeneity", "speed")
TITLE = 80  # characters
SIDE_BY_SIDE = 40  # largest number of runs for pairs and figures, which would take minutes and be unreadable


@dataclass(frozen=True)
class Report:
    """Tables and figures of runs."""

    runs: list[FinishedRun]
    groups: list[SeedGroup]
    tables: list[Table]
    base: FinishedRun | None

    def to_markdown(self) -> str:
        """Format tables with titles and notes, and the protocols, as Markdown."""
        return self._text(Table.to_text, in_markdown)

    def shown(self) -> str:
        """Format tables for the terminal's width; without a terminal, as Markdown."""
        return self._text(Table.shown, str)

    def _text(self, text: Callable[[Table], str], line: Callable[[str], str]) -> str:
        parts = [f"## {t.title}\n\n{text(t)}\n" for t in self.read_tables]
        if self.many:
            parts.append(f"More than {SIDE_BY_SIDE} runs: pairs and figures are left out.\n")
        lines = [
            f"{run.name}: {run.summary[name]['said']}"
            for name in ("speed", "quality", "tolerated") for run in self.runs if name in run.summary
        ]  # fmt: skip
        return "\n".join([*parts, *(f"{line(said)}\n" for said in (*lines, *self.protocols()))])

    @property
    def read_tables(self) -> list[Table]:
        """Tables that are not empty; the settings in which runs differ come first."""
        return sorted((t for t in self.tables if t.rows), key=lambda table: table.name != "settings")

    @property
    def title(self) -> str:
        """Title: names of a few runs, or the number of runs and the flags in which they differ."""
        names = [one_line(group.name) for group in self.groups]
        flags = [str(row[0]) for table in self.tables if table.name == "settings" for row in table.rows]
        if not flags or len(", ".join(names)) <= TITLE:
            return ", ".join(names) if len(", ".join(names)) <= TITLE else f"{len(names)} runs"
        more = f" and {len(flags) - 3} more flags" if len(flags) > 3 else ""
        return f"{len(names)} runs that differ in {', '.join(flags[:3])}{more}"

    @property
    def _divisor(self) -> str:
        """Name of the denominator of ratios in the summary."""
        words = self.tables[0].columns[-1].removeprefix("unseen / ")
        return f"{words} of {self.base.name}" if self.base is not None and self.base.name != "base" else words

    @property
    def many(self) -> bool:
        """Whether there are too many runs for pairwise comparisons and figures."""
        return len(self.runs) > SIDE_BY_SIDE

    @property
    def named_runs(self) -> list[FinishedRun]:
        """Runs with distinct names."""
        return with_distinct_names(self.runs)

    def protocols(self) -> list[str]:
        """Return one line per evaluation protocol, and one with the precision of training."""
        measured = sorted({
            f"Protocol: {r['model']}; windows of {r['seq_len']} tokens, stride {r['stride']}, "
            f"{'with' if r['bos'] else 'no'} BOS, {r['dtype']}, {r['split']} text, scope {r['scope']}."
            for run in self.runs for r in run.records
        })  # fmt: skip
        trained: dict[str, list[str]] = {}
        for group in self.groups:
            precision = group.runs[0].settings.get("trainer", {}).get("precision", "unknown")
            trained.setdefault(precision, []).append(group.name)
        usual, *others = sorted(trained, key=lambda precision: -len(trained[precision]))
        named = (f"; {precision}: {', '.join(trained[precision])}" for precision in others)
        return [*measured, f"Precision of training: {usual}{''.join(named)}."]

    def figures(self) -> dict[str, Figure]:
        """Make figures over all runs, by name; empty if there are too many runs."""
        if self.many:
            return {}
        runs = self.named_runs
        figures = {}
        # Columns of the summary: run, stage, seeds, seen, unseen, gap, unseen / dense, ratio to base.
        if ratios := [(_label(*row[:2]), row[-1]) for row in self.tables[0].rows if row[-1] is not None]:
            figures["ratios"] = ratio_figure(ratios, base=self._divisor)
        curves = {run.name: read_curves(run.path) for run in runs}
        if len(runs) > 1 and (learned := learning_figure(curves)) is not None:
            figures["learning"] = learned
        masks = {run.name: run.masks for run in runs if run.masks is not None}
        if len(runs) > 1 and masks:
            figures["sparsity"] = sparsity_lines(masks)
        about = caption([r for run in self.runs for r in run.records])
        return {name: titled(figure, about) for name, figure in figures.items()}

    def write(self, folder: Path | str, formats: Sequence[str] = FORMATS) -> list[Path]:
        """Write `report.md`, `tables/*.csv` and `figures/*`, and return the paths, with the Markdown file first.

        Tables and figures of an earlier report in the folder are removed.

        Raises:
            UserError: if the folder cannot be written.
        """
        folder = expanded(folder)
        texts = {folder / "report.md": f"# {in_markdown(self.title)}\n\n{self.to_markdown()}"}
        texts |= {folder / "tables" / f"{t.name}.csv": t.to_csv() for t in self.tables if t.rows}
        for path, text in texts.items():
            with replacing(path) as temporary:
                temporary.write_text(text, encoding="utf-8")
        drawn = self.draw(folder / "figures", formats)
        if len(self.runs) == 1 and (run := self.runs[0]).masks is not None:  # otherwise they are in the run folders
            about = run.records, run.modules, run.masks, run.summary
            drawn += write_figures(folder / "figures", *about, formats=formats)
        ours = {folder / "tables" / f"{name}.csv" for name in get_args(TableName)}
        ours |= {folder / "figures" / f"{name}.{suffix}" for name in FIGURES for suffix in FORMATS}
        for path in ours - {*texts, *drawn}:
            path.unlink(missing_ok=True)
        return [*texts, *drawn]

    def draw(self, folder: Path, formats: Sequence[str] = FORMATS, *, prefix: str = "") -> list[Path]:
        """Write the figures over all runs, and return their paths."""
        return [p for name, figure in self.figures().items() for p in save(figure, folder, prefix + name, formats)]


def _label(run: str, stage: str) -> str:
    """Label of a row in a figure; only the run's name if it equals the stage."""
    return run if run == stage else f"{run}: {stage}"


def make(
    paths: Sequence[Path | str | FinishedRun],
    *, base: Path | str | FinishedRun | Mapping[Path, FinishedRun] | None = None,
) -> Report:  # fmt: skip
    """Read runs and make the report.

    Args:
        paths: folders of runs, or runs that are already read.
        base: a run whose stage `base` is the denominator of ratios, or path of a run -> such a run. By default each
            run's own base.

    Raises:
        UserError: if a folder is not a finished run.
    """
    runs = named_by_difference(read_runs(paths))
    if base is None or isinstance(base, Mapping):
        return of_runs(runs, bases=base)
    divisor = base if isinstance(base, FinishedRun) else read_run(base)
    return of_runs(runs, bases=dict.fromkeys((run.path for run in runs), divisor))


def of_runs(
    runs: Sequence[FinishedRun], *, bases: Mapping[Path, FinishedRun] | None = None, seen: Sequence[str] | None = None
) -> Report:
    """Make the report of runs that are already read.

    Args:
        runs: the runs.
        bases: path of a run -> the run whose stage `base` is the denominator. A missing run has no ratio. By default
            each run's own base.
        seen: corpora that count as seen in every row; by default those that each run has seen.
    """
    if seen is not None:
        runs = [replace(run, records=[r | {"seen": r["corpus"] in seen} for r in run.records]) for run in runs]
    rows = groups(runs)
    tables = [summary_table(rows, bases, seen=seen), perplexity_table(rows, seen=seen), distance_table(rows)]
    tables.append(quality_table({run.name: run.summary for run in with_distinct_names(runs)}))
    if 1 < len(runs) <= SIDE_BY_SIDE:
        tables += [comparison_table(rows), settings_table(rows)]
    if evaluated := [r | {"run": run.name} for run in with_distinct_names(runs) for r in run.evaluation]:
        tables.append(evaluation_table(evaluated))
    of_rows = {base.name: base for base in (bases or {}).values()}  # rows of different budgets have different bases
    return Report(list(runs), rows, tables, *of_rows.values() if len(of_rows) == 1 else (None,))
