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

from gprune.report.benchmark_table import evaluation_table
from gprune.report.comparison_figures import learning_figure, ratio_figure, sparsity_lines
from gprune.report.curves import read_curves
from gprune.report.grouping import (
    SeedGroup,
    group_by_seed,
    named_by_difference,
    read_runs,
    settings_table,
    with_distinct_names,
)
from gprune.report.perplexity_tables import (
    comparison_table,
    distance_table,
    group_frame,
    perplexity_table,
    summary_table,
)
from gprune.report.records import caption, quality_table
from gprune.report.run_figures import write_figures
from gprune.report.style import FORMATS, add_title, save
from gprune.report.table import Table, TableName, in_markdown
from gprune.runs.numbers import Record
from gprune.runs.results import FinishedRun, read_run
from gprune.storage.files import replacing
from gprune.storage.reading import expanded

FIGURES = ("ratios", "learning", "sparsity", "perplexity", "heterogeneity", "speed")
MAX_TITLE = 80  # characters
# Largest number of runs for pairwise comparisons and figures. With more they would take minutes and be unreadable.
SIDE_BY_SIDE = 40


@dataclass(frozen=True)
class Report:
    """Tables and figures of runs.

    Attributes:
        runs: all runs, in the order of the report.
        groups: the runs, grouped by all settings except the seed.
        tables: all tables; some may be empty.
        base: the run whose stage `base` is the denominator of all ratios; None if there is no such run.
    """

    runs: list[FinishedRun]
    groups: list[SeedGroup]
    tables: list[Table]
    base: FinishedRun | None

    def to_markdown(self) -> str:
        """Format tables with titles and notes, and the protocols, as Markdown."""
        return self._text(Table.to_text, in_markdown)

    def for_stdout(self) -> str:
        """Format tables for the terminal's width; without a terminal, as Markdown."""
        return self._text(Table.for_stdout, str)

    def _text(self, format_table: Callable[[Table], str], format_line: Callable[[str], str]) -> str:
        """Format tables, the sentences of runs on their targets, and the protocols."""
        paragraphs = [f"## {table.title}\n\n{format_table(table)}\n" for table in self.nonempty_tables]
        if self.has_too_many_runs:
            paragraphs.append(f"More than {SIDE_BY_SIDE} runs: pairs and figures are left out.\n")
        paragraphs += [f"{format_line(line)}\n" for line in (*self.sentences(), *self.protocols())]
        return "\n".join(paragraphs)

    def sentences(self) -> list[str]:
        """Return the sentences of runs on their targets in speed and quality, with warnings."""
        sentences = []
        for name in ("speed", "quality", "tolerated"):
            for run in self.runs:
                if entry := run.summary.get(name):
                    lines = (entry["said"], *entry.get("warnings", ()))
                    sentences += [f"{run.name}: {line}" for line in lines]
        return sentences

    @property
    def nonempty_tables(self) -> list[Table]:
        """Tables that are not empty; the settings in which runs differ come first."""
        tables = [table for table in self.tables if table.rows]
        return sorted(tables, key=lambda table: table.name != "settings")

    @property
    def title(self) -> str:
        """Title: names of a few runs, or the number of runs and the flags in which they differ."""
        names = ", ".join(group.name for group in self.groups)
        if len(names) <= MAX_TITLE:
            return names
        flags = [str(row[0]) for table in self.tables if table.name == "settings" for row in table.rows]
        if not flags:
            return f"{len(self.groups)} runs"
        more = f" and {len(flags) - 3} more flags" if len(flags) > 3 else ""
        return f"{len(self.groups)} runs that differ in {', '.join(flags[:3])}{more}"

    @property
    def _divisor(self) -> str:
        """Name of the denominator of ratios in the summary."""
        denominator = self.tables[0].columns[-1].removeprefix("unseen / ")
        if self.base is None or self.base.name == "base":
            return denominator
        return f"{denominator} of {self.base.name}"

    @property
    def has_too_many_runs(self) -> bool:
        """Whether there are too many runs for pairwise comparisons and figures."""
        return len(self.runs) > SIDE_BY_SIDE

    @property
    def named_runs(self) -> list[FinishedRun]:
        """Runs with distinct names."""
        return with_distinct_names(self.runs)

    def protocols(self) -> list[str]:
        """Return one line per evaluation protocol, and one with the precision of training.

        The most frequent precision comes first; groups with another precision are named. A last line names groups with
        a tokenizer that differs from the dense model's, if there are any.
        """
        protocols = {_describe_protocol(r) for run in self.runs for r in run.records}
        groups_by_precision: dict[str, list[str]] = {}
        for group in self.groups:
            precision = group.runs[0].settings.get("trainer", {}).get("precision", "unknown")
            groups_by_precision.setdefault(precision, []).append(group.name)
        most_frequent, *others = sorted(groups_by_precision, key=lambda name: -len(groups_by_precision[name]))
        exceptions = [f"; {precision}: {', '.join(groups_by_precision[precision])}" for precision in others]
        lines = [*sorted(protocols), f"Precision of training: {most_frequent}{''.join(exceptions)}."]
        if names := [group.name for group in self.groups if any(run.has_another_tokenizer for run in group.runs)]:
            what = "so no KL, agreement, gap or ratio, and a perplexity of other tokens"
            lines.append(f"Another tokenizer, {what}: {', '.join(names)}.")
        return lines

    def figures(self) -> dict[str, Figure]:
        """Make figures over all runs, by name; none if there are too many runs."""
        if self.has_too_many_runs:
            return {}
        runs = self.named_runs
        figures = {}
        # Columns of the summary: run, stage, seeds, seen, unseen, gap, unseen / dense, ratio to base.
        ratios = [(_label(*row[:2]), row[-1]) for row in self.tables[0].rows if row[-1] is not None]
        if ratios:
            figures["ratios"] = ratio_figure(ratios, base=self._divisor)
        curves = {run.name: read_curves(run.path) for run in runs}
        if len(runs) > 1:
            learning = learning_figure(curves)
            if learning is not None:
                figures["learning"] = learning
            masks = {run.name: run.masks for run in runs if run.masks is not None}
            if masks:
                figures["sparsity"] = sparsity_lines(masks)
        title = caption([r for run in self.runs for r in run.records])
        return {name: add_title(figure, title) for name, figure in figures.items()}

    def write(self, folder: Path | str, formats: Sequence[str] = FORMATS) -> list[Path]:
        """Write `report.md`, `tables/*.csv` and `figures/*`, and return the paths, with the Markdown file first.

        Tables and figures of an earlier report in the folder are removed.
        """
        folder = expanded(folder)
        texts = {folder / "report.md": f"# {in_markdown(self.title)}\n\n{self.to_markdown()}"}
        texts |= {folder / "tables" / f"{table.name}.csv": table.to_csv() for table in self.tables if table.rows}
        for path, text in texts.items():
            with replacing(path) as temporary:
                temporary.write_text(text, encoding="utf-8")
        figures = self.draw(folder / "figures", formats)
        run = self.runs[0]
        if len(self.runs) == 1 and run.masks is not None:  # figures of several runs are in their folders
            figures += write_figures(
                folder / "figures", run.records, run.modules, run.masks, run.summary, formats=formats
            )
        possible = {folder / "tables" / f"{name}.csv" for name in get_args(TableName)}
        possible |= {folder / "figures" / f"{name}.{suffix}" for name in FIGURES for suffix in FORMATS}
        for path in possible - {*texts, *figures}:
            path.unlink(missing_ok=True)
        return [*texts, *figures]

    def draw(self, folder: Path, formats: Sequence[str] = FORMATS, *, prefix: str = "") -> list[Path]:
        """Write the figures over all runs, and return their paths."""
        paths = []
        for name, figure in self.figures().items():
            paths += save(figure, folder, prefix + name, formats)
        return paths


def _label(run: str, stage: str) -> str:
    """Return the label of a row in a figure: the name of the run and, if it has another name, of the stage."""
    return run if run == stage else f"{run}: {stage}"


def _describe_protocol(r: Record) -> str:
    """Return the evaluation protocol of a record as a sentence."""
    bos = "with" if r["bos"] else "no"
    return (
        f"Protocol: {r['model']}; windows of {r['seq_len']} tokens, stride {r['stride']}, {bos} BOS, {r['dtype']}, "
        f"{r['split']} text, scope {r['scope']}."
    )


def make(
    paths: Sequence[Path | str | FinishedRun],
    *, base: Path | str | FinishedRun | Mapping[Path, FinishedRun] | None = None, seen: Sequence[str] | None = None,
) -> Report:  # fmt: skip
    """Read runs and make the report."""
    runs = named_by_difference(read_runs(paths))
    if base is None or isinstance(base, Mapping):
        return of_runs(runs, bases=base, seen=seen)
    divisor = base if isinstance(base, FinishedRun) else read_run(base)
    return of_runs(runs, bases=dict.fromkeys((run.path for run in runs), divisor), seen=seen)


def of_runs(
    runs: Sequence[FinishedRun], *, bases: Mapping[Path, FinishedRun] | None = None, seen: Sequence[str] | None = None
) -> Report:
    """Make the report of runs that are already read."""
    if seen is not None:
        runs = [replace(run, records=[r | {"seen": r["corpus"] in seen} for r in run.records]) for run in runs]
    groups = group_by_seed(runs)
    named_runs = with_distinct_names(runs)
    numbers = group_frame(groups, bases)
    tables = [
        summary_table(groups, numbers, bases, seen=seen),
        perplexity_table(groups, numbers, seen=seen),
        distance_table(groups, numbers),
        quality_table({run.name: run.summary for run in named_runs}),
    ]
    if 1 < len(runs) <= SIDE_BY_SIDE:
        tables += [comparison_table(groups), settings_table(groups)]
    if evaluated := [r | {"run": run.name} for run in named_runs for r in run.evaluation]:
        tables.append(evaluation_table(evaluated))
    bases_by_name = {base.name: base for base in (bases or {}).values()}  # several if rows have different budgets
    (base,) = bases_by_name.values() if len(bases_by_name) == 1 else (None,)
    return Report(list(runs), groups, tables, base)
