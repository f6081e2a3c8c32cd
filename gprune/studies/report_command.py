"""`gprune report`: tables and figures from finished runs, and from the records of rows."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from gprune.console import Parser, quiet
from gprune.errors import UserError
from gprune.storage.reading import expanded

if TYPE_CHECKING:
    from gprune.runs.results import FinishedRun
    from gprune.studies.result import StudyResult

ABOUT = """Tables (Markdown, CSV) and figures (PNG, SVG) from finished runs, and from records that gprune study keeps.

Runs that differ in seed alone are summarised as mean and interval over seeds. What the folder of a single run lacks of
page, figures and model card is written there too."""

EXAMPLES = """examples:
  gprune report runs/NAME                                        into runs/NAME/report
  gprune report runs/a runs/b runs/c --output compared           three runs side by side
  gprune report runs/a runs/b --html compared.html               one page, whose tables can be sorted
  gprune report runs/ours runs/theirs --base runs/theirs         all divided by one base metric
  gprune report mine.yaml:base mine.yaml:ours runs/a             rows of a list, from their records, beside a run
  gprune report runs/records/runs/ours-seed0-0123abcdef.json     one record"""
ENDS = {}  # as for `guarded`
RUN = "a finished run's folder, a record (.json), or LIST.yaml:ROW, all seeds of a row of a list; LIST.yaml is all rows"


def parser() -> Parser:
    """The command line."""
    made = Parser("gprune report", description=ABOUT, epilog=EXAMPLES)
    made.add_argument("runs", metavar="RUN", nargs="+", help=RUN)
    made.add_argument("--output", metavar="FOLDER", help="(default: report/ in the run, or beside several)")
    made.add_argument("--html", metavar="FILE", help="write one page with everything, and nothing else")
    made.add_argument(
        "--base",
        metavar="RUN",
        help="divide by this run's unrecovered base (default: the reference of the list, or each run's own base)",
    )
    made.add_argument("--records", metavar="FOLDER", help="where the records of a list are (default: as gprune study)")
    return made


def run(args: Sequence[str]) -> str:
    """Write tables and figures; the short tables come back."""
    options = parser().parse_args(args)
    for name in (*options.runs, *filter(None, [options.base])):
        check_exists(name)
    quiet()  # warnings go to stdout
    from gprune.report import html, page

    runs = [run for name in options.runs for run in runs_of(name, options.records)]
    if options.base is None:
        base = references(options.runs, options.records)
    else:
        base = base_run(options.base, options.records)
    made = page.make(runs, base=base)
    if options.html is not None:
        return f"{made.shown()}\nWrote {html.write(made, options.html)}.\n"
    paths = made.write(options.output or default_output([run.path for run in made.runs]))
    if options.output is None and len(made.runs) == 1 and made.runs[0].path.is_dir():
        html.make_up(made)
    return f"{made.shown()}\nWrote {paths[0]} with {len(paths) - 1} tables and figures beside it.\n"


def of_list(name: str) -> tuple[str, str | None] | None:
    """The list and the row that an argument names, without a row for a whole list; None for folders and records."""
    if expanded(name).is_dir():
        return None
    path, mark, row = name.rpartition(":")
    if mark and path.endswith((".yaml", ".yml")):
        return path, row
    return (name, None) if name.endswith((".yaml", ".yml")) else None


def check_exists(name: str) -> None:
    """Raise UserError, before anything is imported that takes seconds, for a run, record or list that is not there."""
    listed = of_list(name)
    path = expanded(name if listed is None else listed[0])
    if not path.exists() and path.suffix in (".json", ".yaml", ".yml"):
        raise UserError(f"Expected a {'list' if listed else 'record'}, but there is no file '{path}'.")
    if not path.exists():
        raise UserError(f"Expected a run folder, but there is no folder '{name}'; a row of a list is LIST.yaml:ROW.")


def runs_of(name: str, records: str | None) -> Iterator[Path | FinishedRun]:
    """What an argument names: the folder of a run, or runs as they are read from records."""
    from gprune.studies.archive import read, run_of

    if (listed := of_list(name)) is not None:
        study = study_of(*listed, records)
        found = [run for run in study.runs if listed[1] in (None, run.name)]
        if not found:
            raise UserError(f"{name}: expected rows that have records; `gprune study {listed[0]}` runs them.")
        yield from found
    elif expanded(name).is_file():
        path = expanded(name)
        if (record := read(path)) is None:
            raise UserError(f"'{name}' is no record of gprune study.")
        yield run_of(path, record)
    else:
        yield expanded(name)


def study_of(path: str, row: str | None, records: str | None) -> StudyResult:
    """The records of one row of a list, by default of all, with those of the list's reference."""
    from gprune.studies.listing import Listing
    from gprune.studies.result import chosen, of_listing

    listing = Listing.read(expanded(path), records=records)
    return of_listing(listing, chosen(listing, None if row is None else [row]))


def references(names: Sequence[str], records: str | None) -> dict[Path, FinishedRun] | None:
    """By path of a run, the reference of its list; None unless every argument names rows of a list that has one."""
    from gprune.studies.tables import bases_of

    found: dict[Path, FinishedRun] = {}
    for name in names:
        study = None if (listed := of_list(name)) is None else study_of(*listed, records)
        if study is None or (bases := bases_of(study.listing.content.reference, study.runs)) is None:
            return None
        found |= bases
    return found


def base_run(name: str, records: str | None) -> Path | FinishedRun:
    """The run that others are divided by; a UserError where an argument names several."""
    runs = list(runs_of(name, records))
    if len(runs) > 1:
        raise UserError(f"--base {name}: expected one run, got {len(runs)}; name the record of one seed.")
    return runs[0]


def default_output(runs: Sequence[Path]) -> Path:
    """`report` in the run, or in the folder that several runs share; in the working folder for records."""
    if not all(run.is_dir() for run in runs):
        return Path("report")
    resolved = {run.resolve() for run in runs}
    return Path(*resolved if len(resolved) == 1 else [os.path.commonpath([p.parent for p in resolved])], "report")
