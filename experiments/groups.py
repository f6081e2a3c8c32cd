"""Perplexity by groups of kinds of text: English prose, code and another language, for choosing and unseen.

    python -m experiments.groups experiments/lists/kinds_text.yaml

A mean over kinds hides text that helps one group and hurts another. Prints the geometric mean of perplexity over that
of dense for each row of a list that is evaluated on the corpora of `experiments.kinds`.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path

from experiments.kinds import CHOOSING, ROMANCE, UNSEEN
from experiments.summary import runs_of
from gprune.console import Parser, quiet, run_guarded
from gprune.errors import UserError
from gprune.evaluation.intervals import geometric_mean
from gprune.report.tables import Table
from gprune.runs.numbers import final_lines
from gprune.runs.results import FinishedRun

ALONE = ("c", "french", "rust", "german")  # the other kinds are English prose
GROUPS = {
    "English*": [name for name in CHOOSING if name not in ALONE],
    "C*": ["c"],
    "French*": ["french"],
    "all ten*": CHOOSING,
    "English": [name for name in UNSEEN if name not in ALONE],
    "Rust": ["rust"],
    "German": ["german"],
    "all twelve": UNSEEN,
}
NOTE = "Geometric mean of perplexity over that of dense. *: text for choosing; the other groups are unseen."
MIXED = "Spanish, Italian, Portuguese*"  # other documents of languages in mixtures; a column if they are evaluated
WORST = "worst of ten*"


def ratios(run: FinishedRun) -> list[float]:
    """Return the perplexity of a run's final model over that of dense: means over `GROUPS`, `WORST` and `MIXED`."""
    lines = final_lines(run.frame())
    by_corpus = lines[lines["number"] == "times_dense"].set_index("corpus")["value"]
    of_groups = [geometric_mean(by_corpus[kinds]) for kinds in GROUPS.values()]
    of_mixed = geometric_mean(by_corpus[[*ROMANCE]]) if {*ROMANCE} <= {*by_corpus.index} else math.nan
    return [*of_groups, by_corpus[CHOOSING].max(), of_mixed]


def work(arguments: Sequence[str] | None = None) -> str:
    """Run the command. Returns the text to print."""
    parser = Parser("python -m experiments.groups", description=__doc__)
    parser.add_argument("listing", type=Path, metavar="LIST", help="list of rows, a YAML file")
    listing = parser.parse_args(arguments).listing
    quiet()
    needed = {*CHOOSING, *UNSEEN}
    runs = [run for run in runs_of(str(listing.resolve())) if needed <= {record["corpus"] for record in run.records}]
    if not runs:
        raise UserError(f"'{listing}' needs records of rows that are evaluated on all kinds of experiments.kinds.")
    rows = [[run.name, *ratios(run)] for run in runs]
    names = [*GROUPS, WORST, MIXED]
    if all(math.isnan(row[-1]) for row in rows):
        names, rows = names[:-1], [row[:-1] for row in rows]
    digits = dict.fromkeys(names, 3)
    table = Table("groups", "Times dense, by groups of kinds", ["row", *names], rows, digits=digits, note=NOTE)
    return f"{table.for_stdout()}\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command. A user error is one line on stderr and exit code 2."""
    return run_guarded("experiments.groups", lambda: work(arguments))


if __name__ == "__main__":
    sys.exit(main())
