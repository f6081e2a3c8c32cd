"""`python -m gprune.report.report RUN [RUN ...]`: see gprune/report/__init__.py."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from gprune.console import Parser, run_verb


def parser() -> Parser:
    """The command line."""
    made = Parser(
        "python -m gprune.report.report",
        description="Tables (Markdown, CSV) and figures (PNG, SVG) from finished runs. Runs that differ in seed alone "
        "are summarised as mean and interval over seeds.",
        allow_abbrev=False,
    )
    made.add_argument("runs", metavar="RUN", nargs="+", help="a finished run's folder")
    made.add_argument("--output", metavar="FOLDER", help="default: report/ in the run, or beside the runs if several")
    made.add_argument("--base", metavar="RUN", help="divide by this run's base metric, not by each run's own")
    return made


def main(args: Sequence[str] | None = None) -> int:
    """Returns the exit code, as `run_verb`."""
    return run_verb("gprune.report.report", lambda: write(parser().parse_args(args)))


def write(options: argparse.Namespace) -> str:
    """Write tables and figures; the short tables come back."""
    from gprune.console import quiet
    from gprune import report

    quiet()  # warnings go to stdout
    made = report.make(options.runs, base=options.base)
    paths = made.write(options.output or default_output(options.runs))
    return f"{made.to_markdown(long=False)}\nWrote {paths[0]} with {len(paths) - 1} tables and figures beside it.\n"


def default_output(runs: Sequence[str]) -> Path:
    """`report` in the run, or in the folder that several runs have in common."""
    resolved = [Path(run).expanduser().resolve() for run in dict.fromkeys(runs)]
    return (resolved[0] if len(resolved) == 1 else Path(os.path.commonpath([p.parent for p in resolved]))) / "report"


if __name__ == "__main__":
    raise SystemExit(main())
