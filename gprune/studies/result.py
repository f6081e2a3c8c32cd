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
from gprune.config import applied
from gprune.corpora.load import corpus_labels
from gprune.errors import UserError
from gprune.report import Report, Table
from gprune.report.grouping import in_words
from gprune.report.perplexity_tables import base_of
from gprune.runs import frames
from gprune.runs.numbers import by_stage, on_same_windows
from gprune.runs.results import FinishedRun
from gprune.studies.archive import find_record, finished_record, of_tasks
from gprune.studies.listing import Listing, Row
from gprune.studies.tables import bases_of, reported, tables_of

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
        there = {(row.name, row.seed) for row, _ in self.done}
        return [row for row in self.rows if (row.name, row.seed) not in there]

    @property
    def missing_in_words(self) -> str:
        """A line with the rows and seeds that have no record; empty if all have one."""
        if not (missing := self.missing):
            return ""
        seeds: dict[str, list[int]] = {}
        for row in missing:
            seeds.setdefault(row.name, []).append(row.seed)
        named = (f"{name} (seed{'s' * (len(of) > 1)} {', '.join(map(str, of))})" for name, of in seeds.items())
        return f"Without a record, so left out: {len(missing)} of {len(self.rows)} rows and seeds: {'; '.join(named)}."

    @property
    def other_tokens_in_words(self) -> str:
        """A line with the rows whose tokenizer differs from the dense model's; empty if there are none."""
        made = [(row.name, record["records"]) for row, record in self.done]
        apart = [n for n, of in made if any(not on_same_windows(of, stage) for stage in by_stage(of))]
        if not apart:
            return ""
        names = ", ".join(dict.fromkeys(apart))
        return f"Another tokenizer, so no KL, agreement, gap or ratio, and a perplexity of other tokens: {names}."

    @cached_property
    def report(self) -> Report:
        """Report of the finished rows; seeds of a row are combined."""
        return reported(self.listing, self.done)

    @property
    def runs(self) -> list[FinishedRun]:
        """Finished rows as `FinishedRun`, in the order of the list."""
        by_name = {(run.name, run.seed): run for group in self.report.groups for run in group.runs}
        return [by_name[row.name, row.seed] for row, _ in self.done]

    @cached_property
    def tables(self) -> list[Table]:
        """Tables of the list that have rows."""
        return tables_of(self.listing, self.report)

    def files(self) -> Table:
        """Table of the training precision and the record's file for each row and seed."""
        found = {(row.name, row.seed): find_record(row)[0] for row, _ in self.done}
        records = {(row.name, row.seed): record for row, record in self.done}
        cells = [
            [
                row.name, row.seed, row.config.model.dtype, row.config.trainer.precision,
                str(found.get((row.name, row.seed), "none")),
                (records.get((row.name, row.seed), {}).get("environment") or {}).get("git_revision"),
            ]
            for row in self.rows
        ]  # fmt: skip
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
        bases = bases_of(self.listing.content.reference, runs)
        labels = corpus_labels({r["corpus"] for run in runs for r in run.records})
        differing = self._differing_settings()
        made = []
        for run, (row, record) in zip(runs, self.done, strict=True):
            lines = frames.lines(
                run.records, run.settings, run.summary, run.steps, base=base_of(run, bases), labels=labels
            )
            tasks = task_numbers(of_tasks(row, record))
            for line, prefix in ((lines[0], "rows/dense/"), (lines[-1], "final/")):
                own = {name: value for name, value in tasks.items() if name.startswith(prefix)}
                line |= {f"tasks/{name.removeprefix(prefix)}": value for name, value in own.items()}
            own = {"row": row.name, "record": str(run.path)}
            made += [own | line | differing[row.name] for line in (lines if stages else lines[-1:])]
        return frames.frame(made)

    def _differing_settings(self) -> dict[str, dict[str, Any]]:
        """Return row name -> settings by flag, for all flags except the seed in which rows of the list differ."""
        settings = {row.name: applied(row.config.settings()) for row in self.listing.rows}
        flags = [flag for flag in dict.fromkeys(chain(*settings.values())) if flag != "run.seed"]
        first = next(iter(settings.values()))
        differ = [flag for flag in flags if any(own.get(flag) != first.get(flag) for own in settings.values())]
        return {name: {flag: _plain(own.get(flag)) for flag in differ} for name, own in settings.items()}


def _plain(value: Any) -> str | int | float | bool | None:
    """Convert a setting to a cell of a DataFrame."""
    return value if isinstance(value, str | int | float | None) else in_words(value)


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
    study = of_listing(listing, chosen(listing, rows))
    if study.missing:
        log.warning("%s", study.missing_in_words)
    return study


def chosen(listing: Listing, names: Iterable[str] | None, *, what: str = "The rows") -> list[Row]:
    """Select rows by name, by default all; UserError, which begins with `what`, for an unknown name."""
    known = dict.fromkeys(row.name for row in listing.rows)
    wanted = list(known if names is None else names)
    if unknown := [name for name in wanted if name not in known]:
        raise UserError(f"{what} must name rows of {listing.path} ({', '.join(known)}); got '{unknown[0]}'.")
    return [row for row in listing.rows if row.name in wanted]


def of_listing(listing: Listing, rows: Sequence[Row]) -> StudyResult:
    """Read the records of selected rows and of the list's reference."""
    wanted = [row for row in listing.rows if row in rows or row.name == listing.content.reference]
    return StudyResult(
        listing, wanted, [(row, record) for row in wanted if (record := finished_record(row)) is not None]
    )
