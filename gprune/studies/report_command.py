"""`gprune report`: tables and figures of finished runs and of records."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from gprune.console import Parser, quiet
from gprune.errors import UserError
from gprune.storage.reading import expanded

if TYPE_CHECKING:
    from gprune.runs.results import FinishedRun

    # Runs, or folders of runs; and path of a run -> reference run of its list, if the list has a reference
    Named = tuple[list[Path | FinishedRun], dict[Path, FinishedRun] | None]

ABOUT = """Make tables (Markdown, CSV) and figures (PNG, SVG) of finished runs, and of records that gprune study stores.

Runs that differ only in the seed are summarised by mean and interval over seeds. If the folder of a single run has no
page, figures or model card, they are written there too."""

EXAMPLES = """examples:
  gprune report runs/NAME                                        into runs/NAME/report
  gprune report runs/a runs/b runs/c --output compared           three runs side by side
  gprune report runs/a runs/b --html compared.html               one page, whose tables can be sorted
  gprune report runs/ours runs/theirs --base runs/theirs         all divided by one base metric
  gprune report mine.yaml:base mine.yaml:ours runs/a             rows of a list, from their records, beside a run
  gprune report runs/records/runs/ours-seed0-0123abcdef.json     one record"""
ENDS = {}  # keyword arguments of `guarded`
RUN = "folder of a finished run, record (.json), LIST.yaml:ROW for all seeds of a row, or LIST.yaml for all rows"


def parser() -> Parser:
    """Argument parser of the command."""
    result = Parser("gprune report", description=ABOUT, epilog=EXAMPLES)
    result.add_argument("runs", metavar="RUN", nargs="+", help=RUN)
    folder = "folder for tables and figures (default: report/ in the run, or beside several runs)"
    result.add_argument("--output", metavar="FOLDER", help=folder)
    result.add_argument("--html", metavar="FILE", help="write a single HTML page instead of a folder")
    result.add_argument(
        "--base",
        metavar="RUN",
        help="divide by this run's unrecovered base (default: the reference of the list, or each run's own base)",
    )
    result.add_argument("--records", metavar="FOLDER", help="folder of a list's records (default: as gprune study)")
    return result


def run(args: Sequence[str]) -> str:
    """Write tables and figures, and return the short tables as text."""
    options = parser().parse_args(args)
    for name in (*options.runs, *filter(None, [options.base])):
        check_exists(name)
    quiet()  # warnings go to stdout
    from gprune.report import html, page

    named = [runs_of(name, options.records) for name in options.runs]
    base = references(named) if options.base is None else base_run(options.base, options.records)
    report = page.make([run for runs, _ in named for run in runs], base=base)
    if options.html is not None:
        return f"{report.shown()}\nWrote {html.write_report(report, options.html)}.\n"
    paths = report.write(options.output or default_output([run.path for run in report.runs]))
    if options.output is None and len(report.runs) == 1 and report.runs[0].path.is_dir():
        html.write_missing(report)
    return f"{report.shown()}\nWrote {paths[0]} and {len(paths) - 1} tables and figures.\n"


def of_list(name: str) -> tuple[str, str | None] | None:
    """Return (list, row) of an argument, with row None for a whole list; None for folders and records."""
    if expanded(name).is_dir():
        return None
    path, mark, row = name.rpartition(":")
    if mark and path.endswith((".yaml", ".yml")):
        return path, row
    return (name, None) if name.endswith((".yaml", ".yml")) else None


def check_exists(name: str) -> None:
    """Raise UserError if a run, record or list does not exist, before the imports that take seconds."""
    listed = of_list(name)
    path = expanded(name if listed is None else listed[0])
    if not path.exists() and path.suffix in (".json", ".yaml", ".yml"):
        raise UserError(f"Cannot read {'list' if listed else 'record'}: there is no file '{path}'.")
    if not path.exists():
        raise UserError(f"Cannot read run: there is no folder '{name}'. For a row of a list, use LIST.yaml:ROW.")


def runs_of(name: str, records: str | None) -> Named:
    """Return the runs of an argument, which is a run folder, a record, or rows of a list, and their references."""
    from gprune.studies.archive import read_record, run_of
    from gprune.studies.listing import Listing
    from gprune.studies.result import chosen, of_listing
    from gprune.studies.tables import bases_of

    path = expanded(name)
    if (listed := of_list(name)) is not None:
        listing = Listing.read(expanded(listed[0]), records=records)
        runs = of_listing(listing, chosen(listing, None if listed[1] is None else [listed[1]])).runs
        if not (found := [run for run in runs if listed[1] in (None, run.name)]):
            raise UserError(f"{name} must have records; got none. Run them with `gprune study {listed[0]}`.")
        return found, bases_of(listing.content.reference, runs)
    if not path.is_file():
        return [path], None
    if (record := read_record(path)) is None:
        raise UserError(f"Cannot read '{name}': the file is not a record of gprune study.")
    return [run_of(path, record)], None


def references(named: Sequence[Named]) -> dict[Path, FinishedRun] | None:
    """Return path of a run -> reference run of its list; None unless all arguments are lists with a reference."""
    if any(bases is None for _, bases in named):
        return None
    return {path: base for _, bases in named for path, base in bases.items()}


def base_run(name: str, records: str | None) -> Path | FinishedRun:
    """Return the run of `--base`; UserError if the argument names several runs."""
    runs, _ = runs_of(name, records)
    if len(runs) > 1:
        raise UserError(f"--base must be one run; got {len(runs)} runs for {name}. Use the record of one seed.")
    return runs[0]


def default_output(runs: Sequence[Path]) -> Path:
    """Return `report` in the run, or in the common parent of several runs; for records in the working folder."""
    if not all(run.is_dir() for run in runs):
        return Path("report")
    resolved = {run.resolve() for run in runs}
    return Path(*resolved if len(resolved) == 1 else [os.path.commonpath([p.parent for p in resolved])], "report")
