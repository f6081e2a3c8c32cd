"""`gprune report`: tables and figures from finished runs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from gprune.console import Parser, guarded, quiet
from gprune.errors import UserError
from gprune.storage.reading import expanded

if TYPE_CHECKING:
    from gprune.report.page import Report

ABOUT = """Tables (Markdown, CSV) and figures (PNG, SVG) from finished runs.

Runs that differ in seed alone are summarised as mean and interval over seeds. What the folder of a single run lacks of
page, figures and model card is written there too."""

EXAMPLES = """examples:
  gprune report runs/NAME                                        into runs/NAME/report
  gprune report runs/a runs/b runs/c --output compared           three runs side by side
  gprune report runs/a runs/b --html compared.html               one page, whose tables can be sorted
  gprune report runs/ours runs/theirs --base runs/theirs         all divided by one base metric"""


def parser() -> Parser:
    """The command line."""
    made = Parser("gprune report", description=ABOUT, epilog=EXAMPLES)
    made.add_argument("runs", metavar="RUN", nargs="+", help="a finished run's folder")
    made.add_argument(
        "--output", metavar="FOLDER", help="(default: report/ in the run, or beside the runs if there are several)"
    )
    made.add_argument("--html", metavar="FILE", help="write one page with everything, and nothing else")
    made.add_argument(
        "--base", metavar="RUN", help="divide by this run's base metric (default: each run's own base metric)"
    )
    return made


def main(args: Sequence[str]) -> int:
    """Returns the exit code, as `guarded`."""
    return guarded("gprune report", lambda: run(args))


def run(args: Sequence[str]) -> str:
    """Write tables and figures; the short tables come back."""
    options = parser().parse_args(args)
    quiet()  # warnings go to stdout
    from gprune.report import html, page

    made = page.make(options.runs, base=options.base)
    if options.html is not None:
        return f"{made.shown()}\nWrote {html.write(made, options.html)}.\n"
    paths = made.write(options.output or default_output(options.runs))
    if options.output is None and len(made.runs) == 1:
        make_up(made)
    return f"{made.shown()}\nWrote {paths[0]} with {len(paths) - 1} tables and figures beside it.\n"


def make_up(report: Report) -> None:
    """Write figures, model card and page of a run, as it does itself, where its folder lacks them."""
    from gprune.report import html
    from gprune.report.model_card import RESULTS, write_card
    from gprune.report.run_figures import write_figures
    from gprune.runs.folder import RunFolder
    from gprune.runs.results import config_of

    (run,) = report.runs
    if not any(run.path.glob("figures/*.png")):
        write_figures(run.path / "figures", run.records, run.modules, run.masks)
    card = run.path / "model/README.md"
    if card.is_file() and RESULTS not in card.read_text(encoding="utf-8"):
        write_card(RunFolder(run.path), config_of(run), run.records)
    if not (run.path / "report.html").exists():
        html.write(report, run.path / "report.html")


def default_output(runs: Sequence[str]) -> Path:
    """`report` in the run, or in the folder that several runs have in common; a UserError where that is a link."""
    resolved = [expanded(run).resolve() for run in dict.fromkeys(runs)]
    place = resolved[0] if len(resolved) == 1 else Path(os.path.commonpath([p.parent for p in resolved]))
    if (place / "report").is_symlink():
        raise UserError(f"{place / 'report'} is a link; remove it, or name a folder with --output.")
    return place / "report"
