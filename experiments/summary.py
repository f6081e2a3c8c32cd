"""One page for a talk, from the records that are kept: perplexity on unseen text against what is removed, against what
is learned from, and what each part adds.

Rows without a record are left out. `python -m experiments.summary FOLDER` draws summary.png and summary.svg there.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from matplotlib.figure import Figure

from gprune.console import Parser, guarded, quiet
from gprune.report.comparison_figures import draw_curves, draw_ratios
from gprune.report.perplexity_tables import pooled, ratio_to
from gprune.report.records import by_stage
from gprune.report.style import FORMATS, save, style, titled
from gprune.report.table import Estimate
from gprune.runs.results import FinishedRun
from gprune.studies.figures import TOKENS, token_lines
from gprune.studies.listing import Listing
from gprune.studies.records import as_run
from gprune.studies.records import found as kept_of
from gprune.studies.tables import ratios_of

HERE = Path(__file__).resolve().parent
DENSE = ("dense", "none")
# Stages of the headline's rows, as its comparisons name them, in the order in which parts are added.
PARTS = {
    "paper: gprune": "the paper: modules, thresholds",
    "paper, centred: gprune": "the same, centred gradient",
    "paper: averaged": "scores averaged over corpora",
    "averaged, least squares: control + least_squares": "and least squares",
    "gates: gprune + least_squares": "and gates by KL, 49k tokens",
    "best: control + least_squares+distill": "or distillation, 98k tokens",
    "base: dense": "the dense model",
}
Lines = dict[tuple[str, str], list[tuple[float, Estimate]]]


@cache
def runs_of(name: str) -> list[FinishedRun]:
    """The rows of a list that have run, by its path below `experiments`."""
    listing = Listing.read(HERE / name)
    return [as_run(row, kept, listing.seen) for row in listing.rows if (kept := kept_of(row)) is not None]


def by_budget() -> Lines:
    """Perplexity over dense against the share of neurons removed: what chooses, and what recovers."""
    lines: Lines = {}
    bases = [run for run in runs_of("questions/sparsity.yaml") if run.name.startswith("wanda_sp")]
    recovered = runs_of("questions/distill_budgets.yaml")
    half = [r for r in runs_of("questions/distill.yaml") if r.name in ("averaged, least squares", "averaged, 98k")]
    for run in bases + recovered + half:
        share = run.settings["sparsity"]["target"]
        for stage in by_stage(run.records):
            ratio = ratio_to(run, stage, run, DENSE)
            if stage != DENSE and ratio is not None:
                lines.setdefault((_what(run, stage), ""), []).append((share, ratio))
    return {name: sorted(points, key=lambda point: point[0]) for name, points in lines.items()}


def _what(run: FinishedRun, stage: tuple[str, str]) -> str:
    name, recovery = stage
    if recovery == "none":
        return {"base": "base metric", "averaged": "averaged scores", "gprune": "the paper"}[name]
    return {
        "least_squares": "averaged, least squares", "least_squares+distill": "and 98k tokens of distillation",
    }[recovery]  # fmt: skip


def parts() -> list[tuple[str, Estimate]]:
    """Perplexity of the headline's rows over the base metric's, over seeds."""
    runs = runs_of("headline.yaml")
    found = [(label, ratios_of(runs, stage, "base: base")) for stage, label in PARTS.items()]
    return [("the base metric", Estimate(1.0)), *((label, pooled(ratios)) for label, ratios in found if ratios)]


@style()
def drawn() -> Figure:
    """The page: three pairs of axes side by side, each with its legend below."""
    figure = Figure(figsize=(13, 4.6))
    removed, tokens, added = figure.subplots(1, 3)
    draw_curves(removed, by_budget(), over="neurons of the FFN removed", ticks="{x:.0%}", reference="dense")
    listing = Listing.read(HERE / "questions/distill.yaml")
    lines = token_lines(listing.lines, runs_of("questions/distill.yaml"))
    draw_curves(tokens, lines, over=TOKENS, ticks="{x:.0f}", reference="dense")
    draw_ratios(added, parts(), base="base metric")
    for axes, title in (
        (removed, "What is removed"),
        (tokens, "What is learned from (half of the FFN)"),
        (added, "What each part adds (three seeds)"),
    ):
        axes.set_title(title, loc="left", fontsize=10)
    for axes in (removed, tokens):
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2)
    about = "SmolLM2-135M-Instruct, standard protocol: stackexchange, gsm8k, stories, python_docs, never read; seed 0"
    return titled(
        figure, f"{about} but on the right; 95 % intervals; base, averaged and the paper by budget in bfloat16"
    )


def work(arguments: Sequence[str] | None = None) -> str:
    """What the command prints."""
    made: argparse.ArgumentParser = Parser("python -m experiments.summary", description=__doc__)
    made.add_argument("folder", type=Path, metavar="FOLDER", help="where summary.png and summary.svg go")
    folder = made.parse_args(arguments).folder
    quiet()
    return f"Drawn: {', '.join(map(str, save(drawn(), folder, 'summary', FORMATS)))}.\n"


def main() -> int:
    """Exit code 2 and one line for what a user can mend."""
    return guarded("experiments.summary", work)


if __name__ == "__main__":
    sys.exit(main())
