"""Report of one or several runs: one frame, its tables and figures, files, and an HTML page without external resources.

from gprune import report
made = report.make(["runs/a", "runs/b"])
made.frame, made.to_markdown(), made.figures["loss"]
made.write("report")

Runs that differ only in the seed become one row of tables, with mean and interval over seeds.
"""

from __future__ import annotations

import base64
import io
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import combinations
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib.figure import Figure

from gprune.config.elsewhere import made_elsewhere
from gprune.corpora.load import corpus_labels
from gprune.models.embedded import model_label
from gprune.report import prune_command
from gprune.report.card import RESULTS, loading_code, write_card
from gprune.report.figures import read_curves, run_figures, save, style
from gprune.report.grouping import differing_settings, group_by_seed, read_runs, with_distinct_names
from gprune.report.sentences import describe_sizes, describe_stages
from gprune.report.tables import (
    Table,
    caption,
    corpora_table,
    cost_table,
    entry_tables,
    in_markdown,
    lines_of_rows,
    perplexity_table,
    result_table,
    summary_table,
)
from gprune.report.task_tables import evaluation_tables
from gprune.runs.folder import RunFolder
from gprune.runs.numbers import Record, entries, final, pool_estimates, unseen_ratio
from gprune.runs.results import FinishedRun, config_of
from gprune.storage.files import write_text
from gprune.storage.paths import expanded
from gprune.storage.yaml_text import to_yaml

# Largest number of runs for pairwise comparisons and figures. With more they would take minutes and be unreadable.
SIDE_BY_SIDE = 40
CAPTIONS = {
    "loss": "Perplexity divided by that of the dense model, by corpus, with paired 95 % intervals. Lower is better.",
    "removed": "Share of the neurons that each layer loses; in a single run also each module (area: its neurons).",
    "learning": "Training curves over tokens; losses are running means.",
}


@dataclass(frozen=True, repr=False)
class Report:
    """Tables and figures of runs.

    Attributes:
        runs: all runs; those that differ only in the seed have the same name.
        seen: corpora that count as seen in every row; None: those of each run.
    """

    runs: list[FinishedRun]
    seen: Sequence[str] | None = None

    def __repr__(self) -> str:
        return f"Report({self.title!r}, {len(self.runs)} runs, {len(self.tables)} tables)"

    @cached_property
    def frame(self) -> pd.DataFrame:
        """All numbers of all runs, one per line (`runs.numbers.run_frame`)."""
        labels = corpus_labels({r["corpus"] for run in self.runs for r in run.records})
        return pd.concat([run.frame(labels) for run in self.runs], ignore_index=True)

    @cached_property
    def rows(self) -> pd.DataFrame:
        """Lines of dense models and of the final model of each row, with seeds pooled."""
        return lines_of_rows(self.frame)

    @property
    def names(self) -> list[str]:
        """Names of the rows."""
        return list(dict.fromkeys(run.name for run in self.runs))

    @property
    def title(self) -> str:
        """Title: names of a few rows, or their number."""
        names = ", ".join(self.names)
        return names if len(names) <= 80 else f"{len(self.names)} runs"

    @cached_property
    def tables(self) -> list[Table]:
        """The tables that have rows."""
        if len(self.runs) == 1:
            tables = [result_table(self.frame), *self.entry_tables, *self.task_tables, cost_table(self.frame)]
        else:
            tables = [self.settings, self.summary, self.perplexity, *self.entry_tables]
            tables += [compare_table(self.runs, combinations(self.names, 2))] if self.has_few_runs else []
            tables += self.task_tables
        return [table for table in tables if table.rows]

    @property
    def has_few_runs(self) -> bool:
        """Whether there are few enough runs for pairwise comparisons and figures."""
        return len(self.runs) <= SIDE_BY_SIDE

    @property
    def summary(self) -> Table:
        """Table of rows with their means over corpora."""
        return summary_table(self.rows, self._about_seen)

    @property
    def perplexity(self) -> Table:
        """Table of rows with their perplexities by corpus."""
        return perplexity_table(self.rows, self._about_seen)

    @property
    def corpora(self) -> Table:
        """Table of rows over many corpora."""
        return corpora_table(self.rows)

    @property
    def entry_tables(self) -> list[Table]:
        """Tables of entries of the summaries."""
        return entry_tables({run.name: run.summary for run in with_distinct_names(self.runs)})

    @property
    def task_tables(self) -> list[Table]:
        """Tables of `gprune evaluate`, if there are results."""
        records = [r | {"run": run.name} for run in with_distinct_names(self.runs) for r in run.evaluation]
        return evaluation_tables(records) if records else []

    @property
    def settings(self) -> Table:
        """Table of the settings in which runs differ, with a row per flag."""
        by_row = pd.DataFrame(differing_settings({run.name: run.settings for run in self.runs}), dtype=object)
        rows = [[flag, *map(str, values)] for flag, values in zip(by_row.index, by_row.to_numpy(), strict=True)]
        return Table("settings", "Settings that differ", ["flag", *by_row.columns], rows)

    @property
    def _about_seen(self) -> str:
        """Sentence on the corpora that count as seen."""
        if self.seen is None:
            return "Seen and unseen are each run's own."
        if not self.seen:
            return "All text is unseen in every row."
        return (
            f"In every row {', '.join(corpus_labels(self.seen).values())} count as seen, and all other text as unseen."
        )

    def to_markdown(self) -> str:
        """Format tables with titles and notes, and the sentences, as Markdown."""
        return self._text(Table.to_text, in_markdown)

    def for_stdout(self) -> str:
        """Format tables for the terminal's width; without a terminal, as Markdown."""
        return self._text(Table.for_stdout, str)

    def _text(self, format_table: Callable[[Table], str], format_line: Callable[[str], str]) -> str:
        paragraphs = [f"## {table.title}\n\n{format_table(table)}\n" for table in self.tables]
        return "\n".join([*paragraphs, *(f"{format_line(line)}\n" for line in self.sentences())])

    def sentences(self) -> list[str]:
        """Return the sentences and warnings of entries, what is left out, and the protocols."""
        lines = []
        for run in self.runs:
            for entry in entries(run.summary).values():
                lines += [f"{run.name}: {line}" for line in (entry["said"], *entry.get("warnings", ()))]
        if not self.has_few_runs:
            lines.append(f"More than {SIDE_BY_SIDE} runs: pairs and figures are left out.")
        return [*lines, *self.protocols()]

    def protocols(self) -> list[str]:
        """Return a line per evaluation protocol, one with the precision of training, and one on other tokenizers.

        The most frequent precision comes first; rows with another precision are named.
        """
        rows_by_precision: dict[str, list[str]] = {}
        for run in self.runs:
            precision = run.settings.get("trainer", {}).get("precision", "unknown")
            rows_by_precision.setdefault(precision, []).append(run.name)
        most_frequent, *others = sorted(rows_by_precision, key=lambda name: -len(rows_by_precision[name]))
        exceptions = [f"; {name}: {', '.join(dict.fromkeys(rows_by_precision[name]))}" for name in others]
        lines = sorted({_describe_protocol(r) for run in self.runs for r in run.records})
        lines.append(f"Precision of training: {most_frequent}{''.join(exceptions)}.")
        if names := dict.fromkeys(run.name for run in self.runs if run.has_another_tokenizer):
            what = "so no KL, agreement, gap or ratio, and a perplexity of other tokens"
            lines.append(f"Another tokenizer, {what}: {', '.join(names)}.")
        return lines

    @cached_property
    def figures(self) -> dict[str, Figure]:
        """The figures by name; none if there are too many runs."""
        if not self.has_few_runs:
            return {}
        runs = with_distinct_names(self.runs)
        masks = {run.name: run.masks for run in runs if run.masks is not None}
        curves = {run.name: read_curves(run.path) for run in runs}
        lines, modules = (self.frame, runs[0].modules) if len(runs) == 1 else (self.rows, None)
        return run_figures(lines, masks, curves, caption([r for run in runs for r in run.records]), modules)

    def write(self, folder: Path | str) -> list[Path]:
        """Write `report.md`, `numbers.csv` (the frame) and `figures/*.png`, and return the paths."""
        folder = expanded(folder)
        write_text(folder / "report.md", f"# {in_markdown(self.title)}\n\n{self.to_markdown()}")
        write_text(folder / "numbers.csv", self.frame.to_csv(index=False, lineterminator="\n"))
        for name in CAPTIONS:  # of an earlier report
            (folder / "figures" / f"{name}.png").unlink(missing_ok=True)
        return [folder / "report.md", folder / "numbers.csv", *self.draw(folder / "figures")]

    def draw(self, folder: Path, *, prefix: str = "") -> list[Path]:
        """Write the figures as PNG, and return their paths."""
        return [path for name, figure in self.figures.items() for path in save(figure, folder, prefix + name)]

    def to_html(
        self, title: str | None = None, *, tables: Sequence[Table] | None = None, lines: Sequence[str] | None = None
    ) -> str:
        """Return the page; by default with the title, tables and sentences of the report."""
        templates = Environment(
            loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined,
            trim_blocks=True, lstrip_blocks=True,
        )  # fmt: skip
        about = describe_run(self.runs[0]) if len(self.runs) == 1 else {"title": self.title, "done": [], "run": None}
        figures = [(CAPTIONS[name], _png(figure)) for name, figure in self.figures.items()]
        content = about | {"title": title or about["title"]}
        return templates.get_template("page.html").render(
            tables=self.tables if tables is None else tables,
            lines=self.sentences() if lines is None else lines,
            figures=figures,
            **content,
        )


def make(paths: Sequence[Path | str | FinishedRun], *, seen: Sequence[str] | None = None) -> Report:
    """Read runs and make the report.

    Args:
        paths: folders of runs, or runs that are already read.
        seen: corpora that count as seen in every row. By default those of each run.
    """
    return make_named(group_by_seed(read_runs(paths)), seen=seen)


def make_named(runs: Sequence[FinishedRun], *, seen: Sequence[str] | None = None) -> Report:
    """Make the report of runs that are already read; the seeds of a row have the same name.

    A corpus that one seed of a row has seen counts as seen in all of them, so that means over seeds are over the same
    corpora.
    """
    of_rows: dict[str, set[str]] = {run.name: set(seen or ()) for run in runs}
    for run in runs if seen is None else ():
        of_rows[run.name] |= {r["corpus"] for r in run.records if r["seen"]}
    marked = [
        replace(run, records=[r | {"seen": r["corpus"] in of_rows[run.name]} for r in run.records]) for run in runs
    ]
    return Report(marked, seen)


def compare_table(runs: Sequence[FinishedRun], pairs: Sequence[tuple[str, str]]) -> Table:
    """Table of ratios of the unseen perplexities of the final models of pairs of rows, paired over windows.

    Pairs of which a row has no run are left out.
    """
    rows = []
    for pair in pairs:
        ratios = pair_ratios(runs, *pair)
        if ratios is not None:
            ratios_of_kl = pair_ratios(runs, *pair, "kl")
            rows.append([" / ".join(pair), len(ratios), pool_estimates(ratios), pool_estimates(ratios_of_kl)])
    columns = ["unseen perplexity of", "seeds", "ratio", "of exp(KL)"]
    notes = ["Over text unseen by both, paired over windows; over several seeds an interval over seeds."]
    if any(seeds == 0 for _, seeds, *_ in rows):
        notes.append("No ratio: the two have no seed in common, or were evaluated on other windows.")
    if all(ratio_of_kl is None for *_, ratio_of_kl in rows):
        columns, rows = columns[:-1], [row[:-1] for row in rows]
    else:
        notes.append("exp(KL): of KL(dense || row) per token on the same windows.")
    return Table("compare", "Comparisons", columns, rows, dict.fromkeys(columns[2:], 3), " ".join(notes))


def pair_ratios(runs: Sequence[FinishedRun], first: str, second: str, number: str = "nll") -> list[Any] | None:
    """Compute `unseen_ratio` of two rows for every common seed; None without runs of both, [] if one is undefined."""
    by_seed, others = ({run.seed: final(run.records) for run in runs if run.name == name} for name in (first, second))
    if not by_seed or not others:
        return None
    ratios = [unseen_ratio(by_seed[seed], others[seed], number) for seed in by_seed if seed in others]
    return [] if None in ratios else ratios


def write_report(report: Report, path: Path | str) -> Path:
    """Write the page of a report atomically, and return its path."""
    path = expanded(path)
    write_text(path, report.to_html())
    return path


def write_missing(report: Report) -> None:
    """Write those of figures, model card and HTML page that are missing from a run's folder."""
    (run,) = report.runs
    if not any(run.path.glob("figures/*.png")):
        report.draw(run.path / "figures")
    card = run.path / "model/README.md"
    if card.is_file() and RESULTS not in card.read_text(encoding="utf-8"):
        write_card(RunFolder(run.path), config_of(run), run)
    if not (run.path / "report.html").exists():
        write_report(report, run.path / "report.html")


def describe_run(run: FinishedRun) -> dict[str, Any]:
    """Return the values of the template `page.html` that a single run has."""
    model, settings, summary = run.path / "model", run.settings, run.summary
    label = model_label(settings["model"]["name"])
    exported = RunFolder(run.path).manifest.get("exported_dtype") if run.path.is_dir() else None
    done = describe_stages(run.frame(), settings["recovery"])
    if (other := made_elsewhere(settings)) is not None:
        title = f"{model_label(other)} beside {label}"
    else:
        share, scope = summary["sparsity_of_scope"], settings["sparsity"]["scope"]
        title = f"{share:.0%} of {scope} removed from {label}"
        method = "gprune" if settings["gprune"] else "the base metric alone"
        method += f", importance {run.records[-1]['importance']}, recovery {settings['recovery']}, seed {run.seed}"
        done.insert(0, f"{describe_sizes(summary, scope, exported or settings['model']['dtype'])} By {method}.")
    of_run = {
        "load": loading_code(model) if model.is_dir() else "",
        "here": shlex.quote(str(run.path)) if run.path.is_dir() else "",  # empty for a record
        "prune": shlex.join(prune_command()),
        "settings": to_yaml({name: value for name, value in settings.items() if name not in ("inputs", "code")}),
        "environment": to_yaml(dict(run.environment)) if run.environment else "",
    }
    return {"title": title, "done": done, "run": of_run}


def _describe_protocol(r: Record) -> str:
    """Return the evaluation protocol of a record as a sentence."""
    bos = "with" if r["bos"] else "no"
    return (
        f"Protocol: {r['model']}; windows of {r['seq_len']} tokens, stride {r['stride']}, {bos} BOS, {r['dtype']}, "
        f"{r['split']} text, scope {r['scope']}."
    )


@style()
def _png(figure: Figure) -> str:
    """Return a figure as PNG in base64."""
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return base64.b64encode(file.getvalue()).decode()
