"""`gprune report`: tables and figures from finished runs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from gprune.console import Parser, quiet
from gprune.storage.reading import expanded

ABOUT = """Tables (Markdown, CSV) and figures (PNG, SVG) from finished runs.

Runs that differ in seed alone are summarised as mean and interval over seeds. What the folder of a single run lacks of
page, figures and model card is written there too."""

EXAMPLES = """examples:
  gprune report runs/NAME                                        into runs/NAME/report
  gprune report runs/a runs/b runs/c --output compared           three runs side by side
  gprune report runs/a runs/b --html compared.html               one page, whose tables can be sorted
  gprune report runs/ours runs/theirs --base runs/theirs         all divided by one base metric"""
ENDS = {}  # as for `guarded`


def parser() -> Parser:
    """The command line."""
    made = Parser("gprune report", description=ABOUT, epilog=EXAMPLES)
    made.add_argument("runs", metavar="RUN", nargs="+", help="a finished run's folder")
    made.add_argument("--output", metavar="FOLDER", help="(default: report/ in the run, or beside several)")
    made.add_argument("--html", metavar="FILE", help="write one page with everything, and nothing else")
    made.add_argument("--base", metavar="RUN", help="divide by this run's base metric (default: each run's own)")
    return made


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
        html.make_up(made)
    return f"{made.shown()}\nWrote {paths[0]} with {len(paths) - 1} tables and figures beside it.\n"


def default_output(runs: Sequence[str]) -> Path:
    """`report` in the run, or in the folder that several runs have in common."""
    resolved = {expanded(run).resolve() for run in runs}
    return Path(*resolved if len(resolved) == 1 else [os.path.commonpath([p.parent for p in resolved])], "report")
