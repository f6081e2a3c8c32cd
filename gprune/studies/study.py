"""Results of a study, read from records: `gprune.load_study("mine.yaml").to_frame()`, tables, and files."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from gprune.errors import UserError
from gprune.report.grouping import differing_settings
from gprune.report.page import Report, compare_table, make_named
from gprune.report.tables import Table, in_markdown
from gprune.report.task_tables import compare_means, compare_records
from gprune.runs.numbers import COLUMNS, pool_seeds
from gprune.runs.results import FinishedRun
from gprune.storage.files import write_text
from gprune.studies.archive import Found, find_record, row_to_run
from gprune.studies.listing import Listing, Row

log = logging.getLogger("gprune")
FinishedRows = Sequence[tuple[Row, dict[str, Any]]]  # finished rows with their records


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
        return [found.row for found in self.found if found.finished is None and not found.problem]

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
        """Lines on rows without a record, and those of `record_warnings`."""
        return [*filter(None, [self.missing_in_words]), *self.record_warnings]

    @property
    def record_warnings(self) -> list[str]:
        """A line on each record that is not used, and one on records of unknown code."""
        lines = [
            f"{found.problem}. It is not used; --again runs the row again." for found in self.found if found.problem
        ]
        if unchecked := [f"{found.row.name} (seed {found.row.seed})" for found in self.found if not found.is_checked]:
            reason = "the code of the row or of its record is not known"
            lines.append(f"Not checked, because {reason}: {', '.join(unchecked)}.")
        return lines

    @cached_property
    def report(self) -> Report:
        """Report of the finished rows, in the order of the list."""
        return make_report(self.listing, self.done)

    @property
    def runs(self) -> list[FinishedRun]:
        """Finished rows as `FinishedRun`, in the order of the list."""
        return self.report.runs

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

    def to_frame(self, *, means: bool = False) -> pd.DataFrame:
        """Return all numbers of all finished rows and seeds, one per line, as `PruningResult.to_frame`.

        After these columns come the settings in which rows of the list differ, by flag, such as `sparsity.target`, and
        `record`, the record's file. They do not depend on which rows are finished.

        Args:
            means: whether to add, for rows with several seeds, lines with the seed `mean`: means over seeds with
                intervals over seeds.
        """
        settings = differing_settings({row.name: row.identity for row in self.listing.rows})
        files = {(row.name, row.seed): str(record["path"]) for row, record in self.done}
        frame = self.report.frame if self.done else pd.DataFrame(columns=COLUMNS)
        if means:
            frame = pd.concat([frame, pool_seeds(frame)], ignore_index=True)
        of_rows = [settings[name] for name in frame["row"]]
        columns = list(next(iter(settings.values())))
        settings_of_lines = pd.DataFrame(of_rows, frame.index, columns, dtype=object)
        record = [files.get(key) for key in zip(frame["row"], frame["seed"], strict=True)]
        return pd.concat([frame, settings_of_lines], axis=1).assign(record=record)


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


def select_rows(listing: Listing, names: Iterable[str] | None, *, what: str = "The rows") -> list[Row]:
    """Select rows of a list by name, by default all."""
    all_names = dict.fromkeys(row.name for row in listing.rows)
    selected = list(all_names if names is None else names)
    if unknown := [name for name in selected if name not in all_names]:
        raise UserError(f"{what} must name rows of {listing.path} ({', '.join(all_names)}); got '{unknown[0]}'.")
    return [row for row in listing.rows if row.name in selected]


def read_study(listing: Listing, rows: Sequence[Row]) -> StudyResult:
    """Read the records of selected rows."""
    return StudyResult(listing, [find_record(row) for row in rows])


def make_report(listing: Listing, done: FinishedRows) -> Report:
    """Make the report of finished rows."""
    seen = listing.content.seen
    runs = [row_to_run(row, record, seen) for row, record in done]
    _check_text(done)
    return make_named(runs, seen=seen)


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
    tables = [report.corpora, report.summary, report.perplexity, *report.entry_tables, *report.task_tables]
    tables = [table for table in tables if table.name in listing.content.tables]
    pairs = dict.fromkeys(map(tuple, listing.content.compare))
    tables += [compare_table(report.runs, pairs), task_table(report.runs, pairs)]
    return [table for table in tables if table.rows]


def task_table(runs: Sequence[FinishedRun], pairs: Iterable[tuple[str, str]]) -> Table:
    """Table of paired comparisons on tasks: one column per task.

    There is one row per compared pair and per seed for which both have task results.
    """
    results: list[tuple[str, int, dict[str, str]]] = []  # pair, seed, and task -> formatted difference or ratio
    of_final = {(run.name, run.seed): [r for r in run.evaluation if r["stage"] != "dense"] for run in runs}
    for first, second in pairs:
        for (name, seed), records in of_final.items():
            references = of_final.get((second, seed), [])
            differences = compare_records(records, references) | compare_means(records, references)
            if name == first and differences:
                results.append((f"{first} - {second}", seed, differences))
    tasks = list(dict.fromkeys(task for *_, differences in results for task in differences))
    note = "Paired over questions or windows: difference of accuracies +- standard error; x ratio of perplexities with "
    note += "a 95 % interval (columns name the tokens per window)."
    if any(task.endswith(", acc") for task in tasks):
        note += " Differences of means over tasks have a 95 % interval."
    rows = [[pair, seed, *(differences.get(task) for task in tasks)] for pair, seed, differences in results]
    return Table("compare_tasks", "Comparisons on tasks", ["first - second", "seed", *tasks], rows, note=note)


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
    return study.report.to_html(title_of(study), tables=study.tables, lines=notes_of(study))


WRITERS: dict[str, Callable[[StudyResult], str]] = {
    ".csv": _csv, ".json": _json, ".md": _markdown, ".tex": _latex, ".html": _html,
}  # fmt: skip
