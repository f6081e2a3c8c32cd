"""Results of a study, read from records: `gprune.load_study("mine.yaml").to_frame()`, tables, and files."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from html import escape
from itertools import chain
from pathlib import Path
from typing import Any

import pandas as pd

from gprune.benchmarks.subjects import task_numbers
from gprune.config import effective_settings
from gprune.corpora.load import corpus_labels
from gprune.errors import UserError
from gprune.report.grouping import format_setting
from gprune.report.page import Report, of_runs
from gprune.report.tables import (
    Estimate,
    Table,
    corpora_table,
    group_frame,
    in_markdown,
    pool_estimates,
    ratio_to,
    result_rows,
)
from gprune.report.task_tables import compare_means, compare_records
from gprune.runs.numbers import Line, Record, ResultRow, by_row, line_frame, number_columns, row_lines, row_name
from gprune.runs.results import FinishedRun
from gprune.storage.files import write_text
from gprune.studies.archive import Found, find_records, row_to_run, task_results
from gprune.studies.listing import Listing, Row, split_name

log = logging.getLogger("gprune")
FinishedRows = Sequence[tuple[Row, dict[str, Any]]]  # finished rows with their records
PAGE = """<!DOCTYPE html>
<html lang="en">
<head><meta charset="utf-8"><title>{title}</title></head>
<body>
<h1>{title}</h1>
{body}
</body>
</html>
"""


@dataclass(frozen=True, repr=False)
class StudyResult:
    """Rows of a list, with the records of finished rows.

    Attributes:
        listing: the parsed list.
        found: the records of the selected rows, one entry per name and seed.
    """

    listing: Listing
    found: list[Found]

    def __repr__(self) -> str:
        return f"StudyResult({str(self.listing.path)!r}, {len(self.done)} of {len(self.found)} rows and seeds)"

    @property
    def rows(self) -> list[Row]:
        """The selected rows."""
        return [found.row for found in self.found]

    @property
    def done(self) -> list[tuple[Row, dict[str, Any]]]:
        """Finished rows with their records."""
        return [(found.row, record) for found in self.found if (record := found.finished) is not None]

    @property
    def missing(self) -> list[Row]:
        """Rows without a record, or with a record that lacks tasks or masks of the list."""
        return [found.row for found in self.found if found.finished is None]

    @property
    def missing_in_words(self) -> str:
        """A line with the rows and seeds in `missing`; empty if there are none."""
        missing = self.missing
        if not missing:
            return ""
        seeds_by_name: dict[str, list[str]] = {}
        for row in missing:
            seeds_by_name.setdefault(row.name, []).append(str(row.seed))
        rows = []
        for name, seeds in seeds_by_name.items():
            noun = "seed" if len(seeds) == 1 else "seeds"
            rows.append(f"{name} ({noun} {', '.join(seeds)})")
        return f"Without a record, so left out: {len(missing)} of {len(self.rows)} rows and seeds: {'; '.join(rows)}."

    @property
    def warnings(self) -> list[str]:
        """Lines on rows without a record, and those of `code_warnings`."""
        return [*filter(None, [self.missing_in_words]), *self.code_warnings]

    @property
    def code_warnings(self) -> list[str]:
        """A line on records that were made by other code and are not used, and one on records of unknown code."""
        finished = [found for found in self.found if found.finished is not None]
        lines = [describe_outdated([found for found in self.found if found.finished is None])]
        if unchecked := [f"{found.row.name} (seed {found.row.seed})" for found in finished if not found.is_checked]:
            reason = "the code of the row or of its record is not known"
            lines.append(f"Not checked, because {reason}: {', '.join(unchecked)}.")
        return [line for line in lines if line]

    @cached_property
    def report(self) -> Report:
        """Report of the finished rows; seeds of a row are combined."""
        return make_report(self.listing, self.done)

    @property
    def runs(self) -> list[FinishedRun]:
        """Finished rows as `FinishedRun`, in the order of the list."""
        by_name = {(run.name, run.seed): run for group in self.report.groups for run in group.runs}
        return [by_name[row.name, row.seed] for row, _ in self.done]

    @cached_property
    def tables(self) -> list[Table]:
        """Tables of the list that have rows."""
        return study_tables(self.listing, self.report)

    def files(self) -> Table:
        """Table of the dtype, the training precision, the record's file and its commit for each row and seed."""
        cells = []
        for found in self.found:
            row, record = found.row, found.finished
            path = "none" if record is None else str(record["path"])
            environment = {} if record is None else record.get("environment") or {}
            commit = environment.get("git_revision")
            cells.append([row.name, row.seed, row.config.model.dtype, row.config.trainer.precision, path, commit])
        columns = ["row", "seed", "weights", "precision of training", "record", "commit"]
        return Table("files", "Records", columns, cells)

    def to_frame(self, *, stages: bool = False, means: bool = False) -> pd.DataFrame:
        """Return the results with 95 % intervals as a DataFrame, one line per finished row and seed.

        The columns are `COLUMNS`, columns of corpora, settings in which rows of the list differ (by flag, such
        as `sparsity.target`), numbers of tasks (`tasks/piqa/acc`), and `record`, the record's file. Except for corpora
        and tasks, the columns do not depend on which rows are finished.

        Args:
            stages: whether to add a line for each other stage of the model: `dense`, and `pruned` if it was measured.
            means: whether to add a line for each row with several seeds, whose `seed` is `mean`: means over seeds with
                intervals over seeds, as in the tables, and other values if all seeds have them.
        """
        runs = self.runs
        labels = corpus_labels({r["corpus"] for run in runs for r in run.records})
        differing = self._differing_settings()
        all_lines = []
        for run, (row, record) in zip(runs, self.done, strict=True):
            lines = row_lines(run.records, run.settings, run.summary, run.steps, labels=labels)
            tasks = task_numbers(task_results(row, record))
            for line, prefix in ((lines[0], "dense/"), (lines[-1], "final/")):
                of_line = {name: value for name, value in tasks.items() if name.startswith(prefix)}
                line.update({f"tasks/{name.removeprefix(prefix)}": value for name, value in of_line.items()})
            identity = {"row": row.name, "record": str(run.path)}
            selected = lines if stages else lines[-1:]
            # A line's own recovery and metric are those of its stage.
            of_row = {flag: value for flag, value in differing[row.name].items() if flag not in lines[0]}
            all_lines += [identity | line | of_row for line in selected]
        if means:
            all_lines += self._mean_lines(all_lines, labels)
        return line_frame(all_lines)

    def _mean_lines(self, lines: Sequence[Line], labels: Mapping[str, str]) -> list[Line]:
        """Return a line with the means over seeds of the final model of each row with several seeds."""
        groups = self.report.groups
        numbers = group_frame(groups)
        mean_lines = []
        for place, group in enumerate(groups):
            if len(group.runs) == 1:
                continue
            name, final = group.runs[0].name, result_rows(group.runs[0])[-1]
            of_seeds = [line for line in lines if line["row"] == name and (line["stage"], line["recovery"]) == final]
            first = of_seeds[0]
            common = {
                column: first[column] for column in first if len({str(line.get(column)) for line in of_seeds}) == 1
            }
            of_row = numbers[(numbers["group"] == place) & (numbers["row"] == row_name(*final))]
            mean_lines.append(common | number_columns(of_row, labels) | {"seed": "mean"})
        return mean_lines

    def _differing_settings(self) -> dict[str, dict[str, Any]]:
        """Return row name -> settings by flag, for all flags except the seed in which rows of the list differ."""
        by_row = {}
        for row in self.listing.rows:
            settings = {name: value for name, value in row.identity.items() if name != "code"}
            by_row[row.name] = effective_settings(settings)
        flags = [flag for flag in dict.fromkeys(chain(*by_row.values())) if flag != "run.seed"]
        first = next(iter(by_row.values()))
        different = [
            flag for flag in flags if any(settings.get(flag) != first.get(flag) for settings in by_row.values())
        ]
        return {name: {flag: _to_cell(settings.get(flag)) for flag in different} for name, settings in by_row.items()}


def _to_cell(value: Any) -> str | int | float | bool | None:
    """Convert a setting to a cell of a DataFrame."""
    return value if isinstance(value, str | int | float | None) else format_setting(value)


def load_study(
    path: Path | str, *, seeds: Sequence[int] | None = None, rows: Iterable[str] | None = None,
    records: Path | str | None = None, flags: Sequence[str] = (),
) -> StudyResult:  # fmt: skip
    """Load the results of a study from its records. Nothing is run, and no model is loaded.

    A warning lists rows and seeds without a record.

    Args:
        path: the list, a YAML file.
        seeds: seeds of all rows; by default those of the list.
        rows: names of the rows to read; by default all.
        records: the folder of records; by default that of `gprune study`.
        flags: flags of `train.py`, such as `["--sparsity.target=0.3"]`, as after `--` of `gprune study`.

    Raises:
        UserError: if the list cannot be read, or a row is unknown.
    """
    listing = Listing.read(path, seeds=seeds, flags=flags, records=records)
    study = read_study(listing, select_rows(listing, rows))
    for line in study.warnings:
        log.warning("%s", line)
    return study


def describe_outdated(found_records: Iterable[Found]) -> str:
    """Return a line that names the records of rows that were made by other code; empty if there are none."""
    records = []
    for found in found_records:
        for path, changes in found.outdated:
            records.append(f"{path} (row {found.row.name}, seed {found.row.seed}: {', '.join(changes)})")
    return f"Made by other code, so not used: {'; '.join(records)}." if records else ""


def select_rows(listing: Listing, names: Iterable[str] | None, *, what: str = "The rows") -> list[Row]:
    """Select rows of a list by name, by default all."""
    all_names = dict.fromkeys(row.name for row in listing.rows)
    selected = list(all_names if names is None else names)
    if unknown := [name for name in selected if name not in all_names]:
        raise UserError(f"{what} must name rows of {listing.path} ({', '.join(all_names)}); got '{unknown[0]}'.")
    return [row for row in listing.rows if row.name in selected]


def read_study(listing: Listing, rows: Sequence[Row]) -> StudyResult:
    """Read the records of selected rows."""
    return StudyResult(listing, [find_records(row) for row in rows])


def make_report(listing: Listing, done: FinishedRows) -> Report:
    """Make the report of finished rows. Seeds of a row are combined."""
    content = listing.content
    runs = [row_to_run(row, record, content.seen) for row, record in done]
    _check_text(done)
    return of_runs(runs, seen=content.seen)


def _check_text(done: FinishedRows) -> None:
    """Raise UserError if rows with the same corpus settings have read different text.

    Mirrors, and the text of the Python interpreter, may differ between machines.
    """
    # Model, seed, role and amount of text -> the first row with them, its record, and the hash of its text.
    first_read: dict[tuple[Any, ...], tuple[Row, Path, str]] = {}
    for row, record in done:
        settings, inputs = record["settings"], record["inputs"]
        corpora, evaluation = settings["corpora"], settings["evaluation"]
        amount = [corpora.get(name) for name in ("num_samples", "learn_samples", "seq_len", "bos")]
        amount += [len(corpora.get("recover", ())), settings.get("distill", {}).get("tokens")]
        amount += [evaluation.get(name) for name in ("num_samples", "seq_len", "split", "development_samples")]
        for role, digest in inputs["text"].items():
            key = (inputs["model"], row.seed, role, *amount)
            first_row, first_path, first_digest = first_read.setdefault(key, (row, record["path"], digest))
            if first_digest != digest:
                files = f"{first_path.name} or {record['path'].name}"
                raise UserError(
                    f"Cannot compare rows '{first_row.name}' and '{row.name}': they have read different text as "
                    f"{role}. Remove the outdated record ({files}) and its run folder, and run it again."
                )


def study_tables(listing: Listing, report: Report) -> list[Table]:
    """Return the tables that have rows: those of the report that the list selects, and comparisons."""
    tables = [corpora_table(report.groups), final_table(report), *report.tables]
    tables = [table for table in tables if table.name in listing.content.tables]
    tables += [compare_table(listing, report.runs), task_table(listing, report.runs)]
    return [table for table in tables if table.rows]


def final_table(report: Report) -> Table:
    """Table with the lines of the summary that have the final models of rows, without other stages."""
    summary = report.tables[0]
    final = {(group.name, row_name(*result_rows(group.runs[0])[-1])) for group in report.groups}
    rows = [row for row in summary.rows if (row[0], row[1]) in final]
    return replace(summary, name="final", title="Final models", rows=rows)


def compare_table(listing: Listing, runs: Sequence[FinishedRun]) -> Table:
    """Table of ratios: one line per pair of models that the list compares, if both are finished."""
    rows = []
    for pair in dict.fromkeys(map(tuple, listing.content.compare)):
        ratios = pair_ratios(runs, *pair)
        if ratios is not None:
            ratios_of_kl = pair_ratios(runs, *pair, "kl")
            rows.append([" / ".join(pair), len(ratios), pool_estimates(ratios), pool_estimates(ratios_of_kl)])
    columns = ["unseen perplexity of", "seeds", "ratio", "of exp(KL)"]
    notes = []
    if any(seeds == 0 for _, seeds, *_ in rows):
        notes.append("No ratio: the two have no seed in common, or were evaluated on other windows.")
    if all(ratio_of_kl is None for *_, ratio_of_kl in rows):
        columns, rows = columns[:-1], [row[:-1] for row in rows]
    else:
        notes.append("exp(KL): of KL(dense || row) per token on the same windows.")
    return Table("compare", "Comparisons", columns, rows, dict.fromkeys(columns[2:], 3), " ".join(notes))


def task_table(listing: Listing, runs: Sequence[FinishedRun]) -> Table:
    """Table of paired comparisons on tasks: one column per task.

    There is one row per compared pair and per seed for which both have task results.
    """
    results: list[tuple[str, int, dict[str, str]]] = []  # pair, seed, and task -> formatted difference or ratio
    for first, second in listing.content.compare:
        first_runs, first_row = _find_row(runs, first)
        second_runs, second_row = _find_row(runs, second)
        second_records = {run.seed: select_row(run.evaluation, second_row) for run in second_runs}
        for run in first_runs:
            first_records = select_row(run.evaluation, first_row)
            references = second_records.get(run.seed, [])
            differences = compare_records(first_records, references) | compare_means(first_records, references)
            if differences:
                results.append((f"{first} - {second}", run.seed, differences))
    tasks = list(dict.fromkeys(task for *_, differences in results for task in differences))
    note = "Paired over questions or windows: difference of accuracies +- standard error; x ratio of perplexities with "
    note += "a 95 % interval (columns name the tokens per window)."
    if any(task.endswith(", acc") for task in tasks):
        note += " Differences of means over tasks have a 95 % interval."
    rows = [[pair, seed, *(differences.get(task) for task in tasks)] for pair, seed, differences in results]
    return Table("compare_tasks", "Comparisons on tasks", ["first - second", "seed", *tasks], rows, note=note)


def select_row(records: Sequence[Record], row: ResultRow) -> list[Record]:
    """Select the records of a row of the result table."""
    return [r for r in records if (r["stage"], r.get("recovery") or "none") == row]


def pair_ratios(runs: Sequence[FinishedRun], first: str, second: str, number: str = "nll") -> list[Estimate] | None:
    """Compute `unseen_ratio` of two rows for every common seed; None without runs of both, [] if one is undefined."""
    first_runs, first_row = _find_row(runs, first)
    second_runs, second_row = _find_row(runs, second)
    if not first_runs or not second_runs:
        return None
    by_seed = {run.seed: run for run in second_runs}
    ratios = [
        ratio_to(run, first_row, by_seed[run.seed], second_row, number) for run in first_runs if run.seed in by_seed
    ]
    return [] if any(ratio is None for ratio in ratios) else ratios


def _find_row(runs: Sequence[FinishedRun], name: str) -> tuple[list[FinishedRun], ResultRow]:
    """Find the runs and the row of their result table that a name of `compare` refers to.

    `ours` is the final model of the list's row `ours`, and `ours: pruned` the one before recovery.
    """
    row, model = split_name(name, {run.name for run in runs})
    runs_of_row = [run for run in runs if run.name == row]
    if not runs_of_row:
        return [], ("", "")
    if model is None:
        return runs_of_row, result_rows(runs_of_row[0])[-1]
    keys = {row_name(*key): key for run in runs_of_row for key in by_row(run.records)}
    if model not in keys:
        raise UserError(f"The key compare must name a stage of '{row}' ({', '.join(keys)}); got '{model}'.")
    return runs_of_row, keys[model]


def write_results(study: StudyResult, path: Path) -> None:
    """Write a file atomically in the format of its suffix."""
    write_text(path, WRITERS[path.suffix.lower()](study))


def title_of(study: StudyResult) -> str:
    """Return the title of a list: its key `about`, or the name of the file."""
    return study.listing.content.about or study.listing.path.stem


def notes_of(study: StudyResult) -> list[str]:
    """Return the notes below the tables: protocols, rows with another tokenizer, and rows without a valid record."""
    return [*study.report.protocols(), *study.warnings]


def _csv(study: StudyResult) -> str:
    return study.to_frame(means=True).to_csv(index=False, lineterminator="\n")


def _json(study: StudyResult) -> str:
    return study.to_frame(means=True).to_json(orient="records", indent=1, double_precision=15, force_ascii=False) + "\n"


def _markdown(study: StudyResult) -> str:
    tables = (f"## {table.title}\n\n{table.to_text()}" for table in study.tables)
    return "\n\n".join([f"# {in_markdown(title_of(study))}", *tables, *map(in_markdown, notes_of(study))]) + "\n"


def _latex(study: StudyResult) -> str:
    comments = (f"% {note}\n" for note in (title_of(study), *notes_of(study)))
    head = "".join(" ".join(comment.splitlines()) + "\n" for comment in comments)
    tables = (table.to_latex(f"tab:{study.listing.path.stem}-{table.name}") for table in study.tables)
    return head + "\n" + "\n".join(tables)


def _html(study: StudyResult) -> str:
    body = []
    for table in study.tables:
        body += [f"<h2>{escape(table.title)}</h2>", table.to_html()]
        body += [f"<p>{escape(table.note)}</p>"] if table.note else []
    body += [f"<p>{escape(note)}</p>" for note in notes_of(study)]
    return PAGE.format(title=escape(title_of(study)), body="\n".join(body))


WRITERS: dict[str, Callable[[StudyResult], str]] = {
    ".csv": _csv, ".json": _json, ".md": _markdown, ".tex": _latex, ".html": _html,
}  # fmt: skip
