"""`gprune report`: tables and figures of finished runs and of records."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from gprune.console import Parser, quiet
from gprune.errors import UserError
from gprune.storage.paths import expanded

if TYPE_CHECKING:
    from gprune.runs.results import FinishedRun

    # Runs, and the corpora that count as seen in all rows of the list.
    Argument = tuple[list[Path | FinishedRun], list[str] | None]

log = logging.getLogger("gprune")
ABOUT = """Make tables (Markdown), the frame of all numbers (CSV) and figures (PNG) of finished runs, and of records
that gprune study stores.

Runs that differ only in the seed are summarised by mean and interval over seeds. If the folder of a single run has no
page, figures or model card, they are written there too."""

EXAMPLES = """examples:
  gprune report runs/NAME                                        into runs/NAME/report
  gprune report runs/a runs/b runs/c --output compared           three runs side by side
  gprune report runs/a runs/b --html compared.html               one page
  gprune report mine.yaml:base mine.yaml:ours runs/a             rows of a list, from their records, beside a run
  gprune report runs/records/mine/ours-seed0.json                one record"""
MESSAGE_ENDINGS = {}  # keyword arguments of `run_guarded`
RUN = "folder of a finished run, record (.json), LIST.yaml:ROW for the seeds of a row, or LIST.yaml for all rows"


def parser() -> Parser:
    """Return the parser of the command's arguments."""
    result = Parser("gprune report", description=ABOUT, epilog=EXAMPLES)
    result.add_argument("runs", metavar="RUN", nargs="+", help=RUN)
    folder = "folder for tables and figures (default: report/ in the run, or beside several runs)"
    result.add_argument("--output", metavar="FOLDER", help=folder)
    result.add_argument("--html", metavar="FILE", help="write a single HTML page instead of a folder")
    result.add_argument("--records", metavar="FOLDER", help="folder of a list's records (default: as gprune study)")
    seeds = "seeds of rows of a list (default: those of the list)"
    result.add_argument("--seeds", nargs="+", type=int, metavar="SEED", help=seeds)
    return result


def run(args: Sequence[str]) -> str:
    """Write tables and figures, and return the tables and the path of the report as text."""
    options = parser().parse_args(args)
    for name in options.runs:
        check_exists(name)
    if options.html is not None and options.output is not None:
        raise UserError("--html cannot be combined with --output. Run the command twice.")
    quiet()  # warnings go to stdout
    from gprune.report import page

    arguments = [read_argument(name, options.records, options.seeds) for name in options.runs]
    first_seen = arguments[0][1]
    seen = first_seen if all(seen == first_seen for _, seen in arguments) else None
    report = page.make([run for runs, _ in arguments for run in runs], seen=seen)
    if options.html is not None:
        return f"{report.for_stdout()}\nWrote {page.write_report(report, options.html)}.\n"
    paths = report.write(options.output or default_output([run.path for run in report.runs]))
    if options.output is None and len(report.runs) == 1 and report.runs[0].path.is_dir():
        page.write_missing(report)
    return f"{report.for_stdout()}\nWrote {paths[0]} and {len(paths) - 1} tables and figures.\n"


def split_list_name(name: str) -> tuple[str, str | None] | None:
    """Split LIST.yaml:ROW into (list, row), and LIST.yaml into (list, None). None for runs and records."""
    if expanded(name).is_dir():
        return None
    path, colon, row = name.rpartition(":")
    if colon and path.endswith((".yaml", ".yml")):
        return path, row
    return (name, None) if name.endswith((".yaml", ".yml")) else None


def check_exists(name: str) -> None:
    """Raise UserError if a run, record or list does not exist, before the imports that take seconds."""
    list_and_row = split_list_name(name)
    path = expanded(name if list_and_row is None else list_and_row[0])
    if path.exists():
        return
    if path.suffix in (".json", ".yaml", ".yml"):
        from gprune.studies.listing import place_in_project

        what = "list" if list_and_row else "record"
        remedy = place_in_project(path) or "Check the path"
        raise UserError(f"Cannot read {what}: there is no file '{path}'. {remedy}.")
    raise UserError(f"Cannot read run: there is no folder '{name}'. For a row of a list, use LIST.yaml:ROW.")


def read_argument(name: str, records: str | None, seeds: Sequence[int] | None) -> Argument:
    """Return the runs of an argument, which is a run folder, a record, or rows of a list.

    For a list it also returns the corpora that count as seen in all rows.
    """
    from gprune.studies.archive import read_record, record_to_run
    from gprune.studies.listing import Listing
    from gprune.studies.study import read_study, select_rows

    path = expanded(name)
    if (list_and_row := split_list_name(name)) is not None:
        list_path, row = list_and_row
        listing = Listing.read(expanded(list_path), records=records, seeds=seeds)
        study = read_study(listing, select_rows(listing, None if row is None else [row]))
        for line in study.record_warnings:
            log.warning("%s", line)
        if not study.runs:
            raise UserError(
                f"{name} must have records; got none. Run them with `gprune study {list_path}`, or give --records."
            )
        return study.runs, listing.content.seen
    if not path.is_file():
        return [path], None
    if (record := read_record(path)) is None:
        raise UserError(f"Cannot read '{name}': the file is not a record of gprune study.")
    return [record_to_run(record)], None


def default_output(runs: Sequence[Path]) -> Path:
    """Return the default folder `report`.

    It is in the run, in the common parent of several runs or, if any argument is a record, in the current directory.
    """
    if not all(run.is_dir() for run in runs):
        return Path("report")
    folders = {run.resolve() for run in runs}
    if len(folders) == 1:
        return folders.pop() / "report"
    return Path(os.path.commonpath([folder.parent for folder in folders]), "report")
