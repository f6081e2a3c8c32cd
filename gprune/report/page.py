"""Report of one or several runs: tables, figures, files, and one HTML page without external resources.

from gprune import report
made = report.make(["runs/a", "runs/b"])
made.to_markdown(), made.tables[0].rows, made.figures()["ratios"]
made.write("report")

Runs that differ only in the seed become one row, with mean and interval over seeds.
"""

from __future__ import annotations

import io
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import matplotlib
import torch
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure

from gprune.config.elsewhere import made_elsewhere
from gprune.features import FIGURES
from gprune.models.embedded import model_label
from gprune.report import TableName, prune_command
from gprune.report.card import RESULTS, loading_code, write_card
from gprune.report.figures import (
    FORMATS,
    add_title,
    curve_figures,
    learning_figure,
    ratio_figure,
    read_curves,
    run_figures,
    save,
    sparsity_lines,
    style,
    write_figures,
)
from gprune.report.grouping import (
    SeedGroup,
    group_by_seed,
    named_by_difference,
    read_runs,
    with_distinct_names,
)
from gprune.report.tables import (
    Table,
    caption,
    comparison_table,
    cost_table,
    distance_table,
    entry_tables,
    group_frame,
    in_markdown,
    perplexity_table,
    settings_table,
    summary_table,
)
from gprune.report.task_tables import compare_records, evaluation_tables
from gprune.runs.folder import RunFolder
from gprune.runs.numbers import Record, entries
from gprune.runs.results import FinishedRun, config_of
from gprune.storage.files import write_text
from gprune.storage.paths import expanded
from gprune.storage.yaml_text import to_yaml

MAX_TITLE = 80  # characters
# Largest number of runs for pairwise comparisons and figures. With more they would take minutes and be unreadable.
SIDE_BY_SIDE = 40
# Colours of figures -> CSS of the page's theme (light or dark).
THEME = {"#000000": "currentColor", "#ffffff": "var(--paper)", "#dddddd": "var(--line)", "#555555": "var(--soft)"}
CAPTIONS = {
    "perplexity": "Perplexity by corpus and row.",
    "heterogeneity": "How far the ranks of each module's neurons drift between corpora, and how far corpora agree.",
    "sparsity": "Share of the neurons that each block, and each of its modules, loses.",
    "ratios": "Unseen perplexity of each model over that of the dense model.",
    "learning": "Each run's model over the tokens that it has learned from; losses are running means.",
} | {name: figure.caption for name, figure in FIGURES.items()}
WIDE = 2.2  # width / height of a figure above which it is shown in the full width of the page


@dataclass(frozen=True, repr=False)
class Report:
    """Tables and figures of runs.

    Attributes:
        runs: all runs, in the order of the report.
        groups: the runs, grouped by all settings except the seed.
        tables: all tables; some may be empty.
    """

    runs: list[FinishedRun]
    groups: list[SeedGroup]
    tables: list[Table]

    def __repr__(self) -> str:
        return f"Report({self.title!r}, {len(self.runs)} runs, {len(self.nonempty_tables)} tables)"

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
        """Return the sentences and warnings of the entries in the summaries of runs, by entry."""
        sentences: dict[str, list[str]] = {}  # by entry
        for run in self.runs:
            for name, entry in entries(run.summary).items():
                lines = (entry["said"], *entry.get("warnings", ()))
                sentences.setdefault(name, []).extend(f"{run.name}: {line}" for line in lines)
        return [line for lines in sentences.values() for line in lines]

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
        # Columns of the summary: run, stage, seeds, seen, unseen, gap, unseen / dense.
        ratios = [(_label(*row[:2]), row[-1]) for row in self.tables[0].rows if row[-1] is not None]
        if ratios:
            figures["ratios"] = ratio_figure(ratios, base="dense")
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
            write_text(path, text)
        figures = self.draw(folder / "figures", formats)
        run = self.runs[0]
        if len(self.runs) == 1 and run.masks is not None:  # figures of several runs are in their folders
            figures += write_figures(
                folder / "figures", run.records, run.modules, run.masks, run.summary, formats=formats
            )
        possible = {folder / "tables" / f"{name}.csv" for name in get_args(TableName)}
        possible |= {folder / "figures" / f"{name}.{suffix}" for name in CAPTIONS for suffix in FORMATS}
        for path in possible - {*texts, *figures}:
            path.unlink(missing_ok=True)
        return [*texts, *figures]

    def draw(self, folder: Path, formats: Sequence[str] = FORMATS, *, prefix: str = "") -> list[Path]:
        """Write the figures over all runs, and return their paths."""
        paths = []
        for name, figure in self.figures().items():
            paths += save(figure, folder, prefix + name, formats)
        return paths


def _label(run: str, row: str) -> str:
    """Return the label of a row of a run in a figure: the name of the run and, if it has another name, of the row."""
    return run if run == row else f"{run}: {row}"


def _describe_protocol(r: Record) -> str:
    """Return the evaluation protocol of a record as a sentence."""
    bos = "with" if r["bos"] else "no"
    return (
        f"Protocol: {r['model']}; windows of {r['seq_len']} tokens, stride {r['stride']}, {bos} BOS, {r['dtype']}, "
        f"{r['split']} text, scope {r['scope']}."
    )


def make(paths: Sequence[Path | str | FinishedRun], *, seen: Sequence[str] | None = None) -> Report:
    """Read runs and make the report.

    Args:
        paths: folders of runs, or runs that are already read.
        seen: corpora that count as seen in every row. By default those of each run.
    """
    return of_runs(named_by_difference(read_runs(paths)), seen=seen)


def of_runs(runs: Sequence[FinishedRun], *, seen: Sequence[str] | None = None) -> Report:
    """Make the report of runs that are already read, with `seen` as for `tables.summary_table`."""
    if seen is not None:
        runs = [replace(run, records=[r | {"seen": r["corpus"] in seen} for r in run.records]) for run in runs]
    groups = group_by_seed(runs)
    named_runs = with_distinct_names(runs)
    numbers = group_frame(groups)
    tables = [
        summary_table(groups, numbers, seen=seen),
        perplexity_table(groups, numbers, seen=seen),
        distance_table(groups, numbers),
        *entry_tables({run.name: run.summary for run in named_runs}),
    ]
    if 1 < len(runs) <= SIDE_BY_SIDE:
        tables += [comparison_table(groups), settings_table(groups)]
    if evaluated := [r | {"run": run.name} for run in named_runs for r in run.evaluation]:
        tables += evaluation_tables(evaluated)
    return Report(list(runs), groups, tables)


def write_report(report: Report, path: Path | str) -> Path:
    """Write the page of a report atomically, and return its path."""
    path = expanded(path)
    write_text(path, render(report))
    return path


def write_missing(report: Report) -> None:
    """Write those of figures, model card and HTML page that are missing from a run's folder."""
    (run,) = report.runs
    if not any(run.path.glob("figures/*.png")):
        write_figures(run.path / "figures", run.records, run.modules, run.masks, run.summary)
    card = run.path / "model/README.md"
    if card.is_file() and RESULTS not in card.read_text(encoding="utf-8"):
        write_card(RunFolder(run.path), config_of(run), run.records)
    if not (run.path / "report.html").exists():
        write_report(report, run.path / "report.html")


def render(report: Report) -> str:
    """Render a report as HTML: tables and figures of all runs, and a section for each run."""
    templates = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    has_several_runs = len(report.runs) > 1
    sections = [run_section(run) for run in report.named_runs]
    return templates.get_template("page.html").render(
        title=report.title if has_several_runs else sections[0]["title"],
        tables=report.nonempty_tables,
        figures=render_figures(report.figures(), "all") if has_several_runs else [],
        lines=[*report.sentences(), *report.protocols()],
        runs=sections,
    )


def run_section(run: FinishedRun) -> dict[str, Any]:
    """Return the values for a run's section of the template `page.html`."""
    model = run.path / "model"
    title, about = _describe_run(run)
    figures = run_figures(run.records, run.modules, run.masks, run.summary) if run.masks else {}
    settings = {name: value for name, value in run.settings.items() if name not in ("inputs", "code")}
    return {
        "name": run.name,
        "title": title,
        "about": about,
        "figures": render_figures(figures, run.name),
        "curves": render_figures(curve_figures(read_curves(run.path)), f"{run.name} curves"),
        "settings": to_yaml(settings),
        "cost": cost_table(run.steps),
        "environment": run.environment,
        "load": loading_code(model) if model.is_dir() else "",
        "here": shlex.quote(str(run.path)),
        "prune": shlex.join(prune_command()),
        "folder": run.path.is_dir(),  # false for a record
    }


def _describe_run(run: FinishedRun) -> tuple[str, list[str]]:
    """Return the title of a run, and sentences on its method, sizes and cost."""
    settings, summary = run.settings, run.summary
    label = model_label(settings["model"]["name"])
    other = made_elsewhere(settings)
    seconds = sum(step.get("seconds", 0) for step in run.steps.values())
    cost = (
        f"{summary['sparsity_of_model']:.1%} of the model removed: {summary['parameters_after']:,} of "
        f"{summary['parameters_before']:,} parameters are left."
    )
    if summary["forward_tokens"] is not None:  # of a record that was split, the costs are those of several rows
        cost += f" Cost: {summary['forward_tokens']:,} tokens forward, {summary['forward_backward_tokens']:,} forward "
        cost += f"and backward, {seconds:,.0f} seconds of all steps."
    if other is not None:
        about = f"Made elsewhere, recovery {settings['recovery']}, seed {run.seed}."
        return f"{model_label(other)} beside {label}", [about, cost]
    share, scope = summary["sparsity_of_scope"], settings["sparsity"]["scope"]
    method = "gprune" if settings["gprune"] else "the base metric alone"
    importance, recovery = run.records[-1]["importance"], settings["recovery"]
    about = (
        f"{share:.2%} of {scope} removed by {method}, importance {importance}, recovery {recovery}, seed {run.seed}."
    )
    return f"{share:.0%} of {scope} removed from {label}", [about, cost, _describe_sizes(run)]


def _describe_sizes(run: FinishedRun) -> str:
    """Return a sentence on the size of the weights and on measured speed."""
    summary = run.summary
    exported = RunFolder(run.path).manifest.get("exported_dtype") if run.path.is_dir() else None
    dtype = exported or run.settings["model"]["dtype"]
    megabytes = getattr(torch, dtype).itemsize / 1e6
    after, before = (summary[f"parameters_{when}"] * megabytes for when in ("after", "before"))
    sizes = f"Weights in {dtype}: {after:,.1f} MB, dense {before:,.1f} MB."
    comparisons = compare_records(
        [r for r in run.evaluation if r["kind"] == "speed" and r["stage"] != "dense"],
        [r for r in run.evaluation if r["kind"] == "speed" and r["stage"] == "dense"],
    )
    if not comparisons:
        return f"{sizes} Speed was not measured."
    return f"{sizes} Tokens per second beside dense: {', '.join(f'{task} {by}' for task, by in comparisons.items())}."


def render_figures(figures: Mapping[str, Figure], name: str) -> list[tuple[str, Markup, bool]]:
    """Return (caption, SVG, whether it needs the full width of the page) for each figure."""
    rendered = []
    for title, figure in figures.items():
        is_wide = figure.get_figwidth() > WIDE * figure.get_figheight()
        rendered.append((CAPTIONS.get(title, title), figure_to_svg(figure, f"{name} {title}"), is_wide))
    return rendered


@style()
def figure_to_svg(figure: Figure, name: str) -> Markup:
    """Convert a figure to inline SVG with text elements, and with black, white and grey replaced by theme colours."""
    file = io.StringIO()
    no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with matplotlib.rc_context({"svg.hashsalt": name, "svg.fonttype": "none"}):
        figure.savefig(file, format="svg", transparent=True, metadata=no_metadata)
    text = re.sub('<g id="[^"]*"', "<g", file.getvalue())  # ids such as axes_1 would be repeated on the page
    text = re.sub("|".join(THEME), lambda match: THEME[match[0].lower()], text, flags=re.IGNORECASE)
    return Markup(text[text.index("<svg") :])
