"""Style of figures, and writing them to files. Colours are those of Okabe and Ito, always combined with markers."""

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
STYLE = matplotlib.rcParamsDefault | {  # ignores the user's matplotlibrc
    "font.size": 9, "xtick.labelsize": 8, "ytick.labelsize": 8, "legend.fontsize": 8, "legend.frameon": False,
    "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True,
    "grid.color": "#DDDDDD", "grid.linewidth": 0.6, "figure.constrained_layout.use": True, "savefig.dpi": 160,
    "text.parse_math": False,  # names of corpora and runs may have a $
}  # fmt: skip
LETTER_WIDTH = 0.08  # largest width of a letter in inches
# Colour of each stage. base and averaged are equally light, so stages have different markers too.
COLOURS = {"dense": "#999999", "base": "#E69F00", "averaged": "#56B4E9", "gprune": "#0072B2", "model": "#CC79A7"}
MARKERS = {"base": "s", "averaged": "^", "gprune": "o", "model": "D"}
OTHER_COLOUR = "#CC79A7"  # of other stages, and of what is not pruned
# Colour, dashes and marker. Lightness decreases, so that lines can be distinguished in grey print.
LINES = (
    ("#0072B2", "-", "o"), ("#E69F00", "--", "s"), ("#009E73", "-.", "^"), ("#D55E00", ":", "D"),
    ("#56B4E9", (0, (5, 1)), "v"), ("#CC79A7", (0, (3, 1, 1, 1)), "P"), ("#000000", (0, (1, 3)), "X"),
)  # fmt: skip


@contextmanager
def style() -> Iterator[None]:
    """Context with `STYLE`, for making or saving figures; can also be used as a decorator."""
    with warnings.catch_warnings(), matplotlib.rc_context(STYLE):
        warnings.filterwarnings("ignore", "Glyph")  # names may have letters that are missing in the font
        yield


def draw_line(axes: Axes, i: int, x: Sequence[float], y: Sequence[float], label: str) -> None:
    """Draw the i-th line of a figure, with a marker at about a dozen points.

    The style is the i-th of `LINES`. When styles repeat, lines differ by their markers.
    """
    colour, dashes, _ = LINES[i % len(LINES)]
    repeats = i // len(LINES)
    _, _, marker = LINES[(i + repeats) % len(LINES)]
    if label.startswith("_"):
        label = f" {label}"  # matplotlib's legend omits labels that begin with _
    axes.plot(x, y, color=colour, ls=dashes, lw=1.3, marker=marker, ms=4, markevery=len(x) // 12 or 1, label=label)


def canvas(width: float, height: float) -> tuple[Figure, Axes]:
    """Create a figure with one pair of axes; sizes in inches."""
    figure = Figure(figsize=(width, height))
    return figure, figure.subplots()


@style()
def add_title(figure: Figure, title: str) -> Figure:
    """Write a small title above a figure, aligned to the left."""
    figure.suptitle(title, x=0.01, ha="left", fontsize=7, color="#555555")
    return figure


def interval_lengths(estimates: Sequence[Estimate]) -> np.ndarray:
    """Return the lengths of intervals below and above n values, (2, n) float64; 0 without an interval."""
    # With a single window the interval has width 0, and rounding may put the value outside.
    below = [0.0 if e.low is None else max(e.value - e.low, 0.0) for e in estimates]
    above = [0.0 if e.high is None else max(e.high - e.value, 0.0) for e in estimates]
    return np.array([below, above])


def plain_ticks(axis: Axis) -> None:
    """Label a logarithmic axis with plain numbers such as 0.5 and 200, and a short axis also at minor ticks."""
    axis.set_major_locator(matplotlib.ticker.LogLocator(base=10, subs=(1, 2, 5)))
    axis.set_minor_locator(matplotlib.ticker.LogLocator(base=10, subs=(0.5, 0.6, 0.7, 0.8, 0.9, 1.2, 1.5, 3)))
    axis.set_major_formatter("{x:g}")
    low, high = sorted(axis.get_view_interval())
    is_short = high / low < 5
    axis.set_minor_formatter("{x:g}" if is_short else "")


@style()
def save(figure: Figure, folder: Path, name: str, formats: Sequence[str] = ("png",)) -> list[Path]:
    """Write a figure in each format, atomically, and return the paths. The same figure gives the same bytes."""
    paths = []
    with matplotlib.rc_context({"svg.hashsalt": name}):
        for suffix in formats:
            path = folder / f"{name}.{suffix}"
            metadata = {"Date": None} if suffix == "svg" else None
            with replacing(path) as temporary:
                figure.savefig(temporary, format=suffix, metadata=metadata)
            paths.append(path)
    return paths
