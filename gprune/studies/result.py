"""Results of a study, read from records: `gprune.load_study("mine.yaml").to_frame()`, and tables of `gprune study`."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gprune.benchmarks.measurement import task_numbers
from gprune.config import effective_settings
from gprune.corpora.load import corpus_labels
from gprune.errors import UserError
from gprune.report import Report, Table
from gprune.report.grouping import format_setting
from gprune.report.perplexity_tables import base_records
from gprune.runs import frames
from gprune.runs.results import FinishedRun
from gprune.studies.archive import find_record, finished_record, is_unchecked, outdated_records, task_results
from gprune.studies.listing import Listing, Row
from gprune.studies.tables import make_report, reference_runs, study_tables

if TYPE_CHECKING:
    import pandas

log = logging.getLogger("gprune")


@dataclass(frozen=True)
class StudyResult:
    """Rows of a list, with the records of finished rows.

    Attributes:
        listing: the parsed list.
        rows: the selected rows, one per name and seed.
        done: finished rows with their records.
    """

    listing: Listing
    rows: list[Row]
    done: list[tuple[Row, dict[str, Any]]]

    @property
    def missing(self) -> list[Row]:
        """Rows without a record, or with a record that lacks tasks or masks of the list."""
        finished = {(row.name, row.seed) for row, _ in self.done}
        return [row for row in self.rows if (row.name, row.seed) not in finished]

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
        unchecked = [f"{row.name} (seed {row.seed})" for row, record in self.done if is_unchecked(row, record)]
        of_unknown = f"Not checked, because the code of the row or of its record is not known: {', '.join(unchecked)}."
        return [*filter(None, [describe_outdated(self.missing)]), *[of_unknown] * bool(unchecked)]

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
        """Table of the training precision and the record's file for each row and seed."""
        records = {(row.name, row.seed): record for row, record in self.done}
        cells = []
        for row in self.rows:
            record = records.get((row.name, row.seed))
            path = "none" if record is None else str(find_record(row)[0])
            environment = {} if record is None else record.get("environment") or {}
            commit = environment.get("git_revision")
            cells.append([row.name, row.seed, row.config.model.dtype, row.config.trainer.precision, path, commit])
        columns = ["row", "seed", "weights", "precision of training", "record", "commit"]
        return Table("files", "Records", columns, cells)

    def to_frame(self, *, stages: bool = False) -> pandas.DataFrame:
        """Return the results with 95 % intervals as a DataFrame, one line per finished row and seed.

        The columns are `frames.COLUMNS`, columns of corpora, settings in which rows of the list differ (by flag, such
        as `sparsity.target`), numbers of tasks (`tasks/piqa/acc`), and `record`, the record's file. Except for corpora
        and tasks, the columns do not depend on which rows are finished.

        Args:
            stages: whether to add a line for each other stage of the rows, such as `dense` and controls.
        """
        runs = self.runs
        bases = reference_runs(self.listing.content.reference, runs)
        labels = corpus_labels({r["corpus"] for run in runs for r in run.records})
        differing = self._differing_settings()
        all_lines = []
        for run, (row, record) in zip(runs, self.done, strict=True):
            lines = frames.lines(
                run.records, run.settings, run.summary, run.steps, base=base_records(run, bases), labels=labels
            )
            tasks = task_numbers(task_results(row, record))
            for line, prefix in ((lines[0], "rows/dense/"), (lines[-1], "final/")):
                of_line = {name: value for name, value in tasks.items() if name.startswith(prefix)}
                line.update({f"tasks/{name.removeprefix(prefix)}": value for name, value in of_line.items()})
            identity = {"row": row.name, "record": str(run.path)}
            selected = lines if stages else lines[-1:]
            # A line's own recovery and metric are those of its stage.
            of_row = {flag: value for flag, value in differing[row.name].items() if flag not in lines[0]}
            all_lines += [identity | line | of_row for line in selected]
        return frames.frame(all_lines)

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
        rows: names of the rows to read, in addition to the reference of the list; by default all.
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


def describe_outdated(rows: Sequence[Row]) -> str:
    """Return a line that names the records of rows that were made by other code; empty if there are none."""
    records = []
    for row in rows:
        for path, changes in outdated_records(row):
            records.append(f"{path} (row {row.name}, seed {row.seed}: {', '.join(changes)})")
    return f"Made by other code, so not used: {'; '.join(records)}." if records else ""


def select_rows(listing: Listing, names: Iterable[str] | None, *, what: str = "The rows") -> list[Row]:
    """Select rows of a list by name, by default all."""
    all_names = dict.fromkeys(row.name for row in listing.rows)
    selected = list(all_names if names is None else names)
    if unknown := [name for name in selected if name not in all_names]:
        raise UserError(f"{what} must name rows of {listing.path} ({', '.join(all_names)}); got '{unknown[0]}'.")
    return [row for row in listing.rows if row.name in selected]


def read_study(listing: Listing, rows: Sequence[Row]) -> StudyResult:
    """Read the records of selected rows and of the list's reference."""
    with_reference = [row for row in listing.rows if row in rows or row.name == listing.content.reference]
    done = [(row, record) for row in with_reference if (record := finished_record(row)) is not None]
    return StudyResult(listing, with_reference, done)
