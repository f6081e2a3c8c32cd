"""How figures look, and how they are written. Okabe and Ito's colours, and never by colour alone."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import matplotlib
import matplotlib.ticker
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure

from gprune.report.table import Estimate
from gprune.storage.files import replacing

FORMATS = ("png", "svg")
STYLE = matplotlib.rcParamsDefault | {  # whatever the user's matplotlibrc says
    "font.size": 9, "xtick.labelsize": 8, "ytick.labelsize": 8, "legend.fontsize": 8, "legend.frameon": False,
    "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True,
    "grid.color": "#DDDDDD", "grid.linewidth": 0.6, "figure.constrained_layout.use": True, "savefig.dpi": 160,
    "text.parse_math": False,  # names of corpora and runs may have a $
}  # fmt: skip
LETTER = 0.08  # inches that a letter of a label takes, at most
# By stage; base and averaged are equally light, so every stage has its own marker too.
COLOURS = {"dense": "#999999", "base": "#E69F00", "averaged": "#56B4E9", "gprune": "#0072B2", "model": "#CC79A7"}
MARKERS = {"base": "s", "averaged": "^", "gprune": "o", "model": "D"}
OTHER = "#CC79A7"
# lightness falls along the list, and with the dashes and markers a line is known in grey print
LINES = (
    ("#0072B2", "-", "o"), ("#E69F00", "--", "s"), ("#009E73", "-.", "^"), ("#D55E00", ":", "D"),
    ("#56B4E9", (0, (5, 1)), "v"), ("#CC79A7", (0, (3, 1, 1, 1)), "P"), ("#000000", (0, (1, 3)), "X"),
)  # fmt: skip


@contextmanager
def style() -> Iterator[None]:
    """`STYLE`, for as long as a figure is made or saved; also a decorator of functions that make one."""
    with warnings.catch_warnings(), matplotlib.rc_context(STYLE):
        warnings.filterwarnings("ignore", "Glyph")  # a name may have letters that no font has
        yield


def draw_line(axes: Axes, i: int, x: Sequence[float], y: Sequence[float], label: str) -> None:
    """The i-th line of a figure, with a dozen markers at most."""
    colour, dashes, _ = LINES[i % len(LINES)]
    marker = LINES[(i + i // len(LINES)) % len(LINES)][2]  # the eighth line has another one than the first
    shown = f" {label}" if label.startswith("_") else label  # which a legend would leave out
    axes.plot(x, y, color=colour, ls=dashes, lw=1.3, marker=marker, ms=4, markevery=len(x) // 12 or 1, label=shown)


def canvas(width: float, height: float) -> tuple[Figure, Axes]:
    """A figure of so many inches with one pair of axes."""
    figure = Figure(figsize=(width, height))
    return figure, figure.subplots()


@style()
def titled(figure: Figure, title: str) -> Figure:
    """Write what a figure is about above it, small, from its left edge."""
    figure.suptitle(title, x=0.01, ha="left", fontsize=7, color="#555555")
    return figure


def distances(estimates: Sequence[Estimate]) -> np.ndarray:
    """(2, n): how far intervals reach below and above; 0 where there is none."""
    # One window has an interval without width, and rounding may put the value outside of it.
    low = [0.0 if e.low is None else max(e.value - e.low, 0.0) for e in estimates]
    high = [0.0 if e.high is None else max(e.high - e.value, 0.0) for e in estimates]
    return np.array([low, high])


def plain_ticks(axis: Axis) -> None:
    """0.5 and 200 on a logarithmic axis, not powers of ten; more ticks where it is short."""
    axis.set_major_locator(matplotlib.ticker.LogLocator(base=10, subs=(1, 2, 5)))
    axis.set_minor_locator(matplotlib.ticker.LogLocator(base=10, subs=(0.5, 0.6, 0.7, 0.8, 0.9, 1.2, 1.5, 3)))
    axis.set_major_formatter("{x:g}")
    low, high = sorted(axis.get_view_interval())
    axis.set_minor_formatter("{x:g}" if high / low < 5 else "")


@style()
def save(figure: Figure, folder: Path, name: str, formats: Sequence[str] = ("png",)) -> list[Path]:
    """Write a figure whole or not at all, in each format; the same figure gives the same bytes."""
    paths = []
    with matplotlib.rc_context({"svg.hashsalt": name}):
        for suffix in formats:
            path = folder / f"{name}.{suffix}"
            with replacing(path) as temporary:
                figure.savefig(temporary, format=suffix, metadata={"Date": None} if suffix == "svg" else None)
            paths.append(path)
    return paths
