"""How far do more training tokens go? Fits a power law to the rows of a list that differ in `--distill.tokens`.

    python -m experiments.tokens experiments/lists/tokens.yaml
    python -m experiments.tokens experiments/lists/tokens.yaml --figures FOLDER   # tokens.png and tokens.svg

With D training tokens, the loss above that of the dense model, in nats per token on unseen text, is described by

    ln (unseen / dense) = a D^-b.

For each model, a and b are fitted by least squares of the logarithms, on the rows in which each token is used once. A
row whose text repeats (`--distill.repeat`) is compared with what the fit predicts for as many fresh tokens. Rows are
named `MODEL, TOKENS`.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from experiments.summary import draw_curves, runs_of, times_dense
from gprune.console import Parser, quiet, run_guarded
from gprune.errors import UserError
from gprune.report.figures import FORMATS, LINES, add_title, canvas, save, style
from gprune.report.tables import Cell, Estimate, Table
from gprune.runs.results import FinishedRun

COLUMNS = ["model", "tokens", "text", "unseen / dense", "fit", "unseen / fit"]
NOTE = "fit: exp (a D^-b) for D tokens, fitted to the rows whose text is used once."


@dataclass(frozen=True)
class Point:
    """A row: its training tokens, and its unseen perplexity divided by that of dense."""

    model: str
    tokens: int
    repeats: bool  # whether the text of a corpus was repeated
    ratio: Estimate


@dataclass(frozen=True)
class Fit:
    """ln (unseen / dense) = a D^-b of a model."""

    a: float
    b: float

    @classmethod
    def to(cls, points: Sequence[Point]) -> Fit | None:
        """Fit a and b to the points whose text is used once; None for fewer than two."""
        once = [p for p in points if not p.repeats and p.ratio.value > 1]
        if len({p.tokens for p in once}) < 2:
            return None
        slope, intercept = np.polyfit(
            [math.log(p.tokens) for p in once], [math.log(math.log(p.ratio.value)) for p in once], 1
        )
        return cls(math.exp(intercept), -slope)

    def __call__(self, tokens: float) -> float:
        """Return the predicted unseen / dense."""
        return math.exp(self.a * tokens**-self.b)


def points_of(runs: Sequence[FinishedRun]) -> list[Point]:
    """Return the points of the rows that learn, in the order of model and tokens."""
    points = []
    for run in runs:
        if not (tokens := run.summary["learned_tokens"]):
            continue
        if (ratio := times_dense(run)) is not None:
            repeats = run.settings["distill"].get("repeat", False)
            points.append(Point(run.name.partition(", ")[0], tokens, repeats, ratio))
    models = list(dict.fromkeys(p.model for p in points))
    return sorted(points, key=lambda p: (models.index(p.model), p.tokens))


def rows_of(points: Sequence[Point], fits: dict[str, Fit | None]) -> list[list[Cell]]:
    """Return the cells of each point, by `COLUMNS`."""
    rows: list[list[Cell]] = []
    for p in points:
        fit = fits[p.model]
        predicted = None if fit is None else fit(p.tokens)
        over = None if predicted is None else p.ratio.value / predicted
        rows.append([p.model, f"{p.tokens:,}", "repeats" if p.repeats else "once", p.ratio, predicted, over])
    return rows


def in_words(fits: dict[str, Fit | None]) -> str:
    """Describe each fit: by how much a doubling lowers the loss above dense."""
    return "\n".join(
        f"{model}: a = {fit.a:.3g}, b = {fit.b:.3f}. Twice the tokens lower ln (unseen / dense) by {1 - 2**-fit.b:.1%}."
        for model, fit in fits.items()
        if fit is not None
    )


@style()
def drawn(points: Sequence[Point], fits: dict[str, Fit | None]) -> Figure:
    """Draw unseen perplexity relative to dense against tokens, and the fits as dotted lines."""
    figure, axes = canvas(6, 3.8)
    lines: dict[tuple[str, str], list[tuple[float, Estimate]]] = {}
    for p in points:
        lines.setdefault((p.model, ""), []).append((p.tokens / 1000, p.ratio))
    draw_curves(axes, lines, over="thousands of tokens, forward and backward", ticks="{x:.0f}", reference="dense")
    for number, model in enumerate(fits):
        if (fit := fits[model]) is not None:
            values = [p.tokens for p in points if p.model == model]
            grid = np.geomspace(min(values), max(values), 50)
            axes.plot(
                grid / 1000, [fit(d) for d in grid], ":", color=LINES[number % len(LINES)][0], label=f"{model}, fit"
            )
    axes.set_xscale("log")
    ticks = sorted({value for line in lines.values() for value, _ in line})
    axes.set_xticks(ticks, [f"{value:.0f}" for value in ticks])
    axes.minorticks_off()
    figure.legend(loc="outside right center")
    return add_title(figure, "fit: ln (unseen / dense) = a D^-b, to rows whose text is used once")


def work(arguments: Sequence[str] | None = None) -> str:
    """Run the command. Returns the text to print.

    Raises:
        UserError: if the list cannot be read, or no row that learns has a record.
    """
    parser = Parser("python -m experiments.tokens", description=__doc__)
    parser.add_argument("list", type=Path, metavar="LIST", help="YAML list with records")
    parser.add_argument("--figures", type=Path, metavar="FOLDER", help="write the figure to this folder")
    options = parser.parse_args(arguments)
    quiet()
    points = points_of(runs_of(str(options.list.resolve())))
    if not points:
        raise UserError(f"List '{options.list}' needs records of rows that learn. Run `gprune study {options.list}`.")
    fits = {model: Fit.to([p for p in points if p.model == model]) for model in dict.fromkeys(p.model for p in points)}
    table = Table(
        "tokens", "", COLUMNS, rows_of(points, fits), {"unseen / dense": 3, "fit": 3, "unseen / fit": 3}, NOTE
    )
    text = f"{table.for_stdout()}\n\n{in_words(fits)}\n"
    if options.figures is not None:
        text += f"\nDrawn: {', '.join(map(str, save(drawn(points, fits), options.figures, 'tokens', FORMATS)))}.\n"
    return text


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command. A user error is one line on stderr and exit code 2."""
    return run_guarded("experiments.tokens", lambda: work(arguments))


if __name__ == "__main__":
    sys.exit(main())
