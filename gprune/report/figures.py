"""Figures of one or several runs, and their style. Colours are those of Okabe and Ito, always combined with markers."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.ticker
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from torch import Tensor

from gprune.evaluation.intervals import Estimate
from gprune.models.masks import Masks
from gprune.partition.modules import Modules
from gprune.storage.files import replacing

log = logging.getLogger("gprune")
FORMATS = ("png", "svg")
STYLE = matplotlib.rcParamsDefault | {  # ignores the user's matplotlibrc
    "font.size": 9, "xtick.labelsize": 8, "ytick.labelsize": 8, "legend.fontsize": 8, "legend.frameon": False,
    "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True,
    "grid.color": "#DDDDDD", "grid.linewidth": 0.6, "figure.constrained_layout.use": True, "savefig.dpi": 160,
    "text.parse_math": False,  # names of corpora and runs may have a $
}  # fmt: skip
LETTER_WIDTH = 0.08  # largest width of a letter in inches
# Colour, dashes and marker. Lightness decreases, so that lines can be distinguished in grey print.
LINES = (
    ("#0072B2", "-", "o"), ("#E69F00", "--", "s"), ("#009E73", "-.", "^"), ("#D55E00", ":", "D"),
    ("#56B4E9", (0, (5, 1)), "v"), ("#CC79A7", (0, (3, 1, 1, 1)), "P"), ("#000000", (0, (1, 3)), "X"),
)  # fmt: skip
LEARNED = {  # label -> (x axis, metric) of training curves
    "development perplexity": ("development/tokens", "development/perplexity"),
    "loss while sparsity is learned, nats": ("learn/tokens", "learn/loss"),
    "loss of distillation, nats": ("distill/tokens", "distill/loss"),
}


@contextmanager
def style() -> Iterator[None]:
    """Context with `STYLE`, for making or saving figures; can also be used as a decorator."""
    with warnings.catch_warnings(), matplotlib.rc_context(STYLE):
        warnings.filterwarnings("ignore", "Glyph")  # names may have letters that are missing in the font
        yield


def line_style(i: int) -> tuple[str, Any, str]:
    """Return colour, dashes and marker of the i-th line of a figure. Repeated styles differ by their markers."""
    colour, dashes, _ = LINES[i % len(LINES)]
    _, _, marker = LINES[(i + i // len(LINES)) % len(LINES)]
    return colour, dashes, marker


def draw_line(axes: Axes, i: int, x: Sequence[float], y: Sequence[float], label: str) -> None:
    """Draw the i-th line of a figure, with a marker at about a dozen points."""
    colour, dashes, marker = line_style(i)
    label = f" {label}" if label.startswith("_") else label  # matplotlib's legend omits labels that begin with _
    axes.plot(x, y, color=colour, ls=dashes, lw=1.3, marker=marker, ms=4, markevery=len(x) // 12 or 1, label=label)


def canvas(width: float, height: float) -> tuple[Figure, Axes]:
    """Create a figure with one pair of axes; sizes in inches."""
    figure = Figure(figsize=(width, height))
    return figure, figure.subplots()


@style()
def add_title(figure: Figure, title: str, size: float = 7) -> Figure:
    """Write a small title above a figure, aligned to the left."""
    figure.suptitle(title, x=0.01, ha="left", fontsize=size, color="#555555")
    return figure


def interval_lengths(estimates: Sequence[Estimate]) -> np.ndarray:
    """Return the lengths of intervals below and above n values, (2, n) float64; 0 without an interval."""
    values, low, high = np.array([tuple(estimate) for estimate in estimates], dtype=float).T
    # If all windows have equal values the interval has length 0, and rounding may put the value outside.
    return np.nan_to_num(np.maximum([values - low, high - values], 0))


def plain_ticks(axis: Axis) -> None:
    """Label a logarithmic axis with plain numbers such as 0.5 and 200, and a short axis also at minor ticks."""
    axis.set_major_locator(matplotlib.ticker.LogLocator(base=10, subs=(1, 2, 5)))
    axis.set_minor_locator(matplotlib.ticker.LogLocator(base=10, subs=(0.5, 0.6, 0.7, 0.8, 0.9, 1.2, 1.5, 3)))
    axis.set_major_formatter("{x:g}")
    low, high = sorted(axis.get_view_interval())
    is_short = high / low < 5
    axis.set_minor_formatter("{x:g}" if is_short else "")
    # Minor ticks are shorter. With this pad the numbers of both kinds have the same distance from the axis.
    major, minor = (matplotlib.rcParams[f"{axis.axis_name}tick.{kind}.size"] for kind in ("major", "minor"))
    axis.set_tick_params(which="minor", pad=matplotlib.rcParams[f"{axis.axis_name}tick.major.pad"] + major - minor)


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


@style()
def loss_figure(frame: pd.DataFrame) -> Figure:
    """Figure of perplexity divided by dense on each corpus, with paired 95 % intervals; seen corpora first.

    There is a series for each stage of a single run, or for each row of several (`tables.lines_of_rows`). Models with
    another tokenizer than the dense model's are left out, because their perplexity is of other tokens.
    """
    ratios = frame[frame["number"] == "times_dense"].sort_values("seen", ascending=False, kind="stable")
    series = "stage" if ratios["row"].nunique() == 1 else "row"
    corpora = list(ratios["corpus"].unique())
    is_seen = ratios.groupby("corpus")["seen"].all()
    rows = list(ratios.sort_index(kind="stable")[series].unique())
    corpus_width = max(0.9, 0.16 * len(rows), LETTER_WIDTH * max(map(len, corpora)))  # inches
    figure, axes = canvas(3.2 + corpus_width * len(corpora), 3.4 + 0.05 * len(rows))
    for i, row in enumerate(rows):
        of_row = ratios[ratios[series] == row]
        lengths = interval_lengths([Estimate(*line) for line in of_row[["value", "low", "high"]].to_numpy()])
        offset = (i - (len(rows) - 1) / 2) * 0.7 / len(rows)  # rows share 0.7 of a corpus' width
        colour, _, marker = line_style(i)
        axes.errorbar(
            of_row["corpus"].map(corpora.index) + offset, of_row["value"], yerr=lengths, ls="none",
            ms=5, capsize=2.5, lw=1.2, color=colour, marker=marker, label=row,
        )  # fmt: skip
    axes.set_yscale("log")
    plain_ticks(axes.yaxis)
    axes.axhline(1, color="black", lw=0.8)
    axes.set_xticks(range(len(corpora)), [f"{c}\n{'seen' if is_seen[c] else 'unseen'}" for c in corpora])
    axes.set_ylabel("perplexity, times dense")
    axes.grid(axis="y")
    figure.legend(loc="outside right center")
    return figure


@style()
def removed_figure(masks: Mapping[str, Masks], labels: Sequence[Tensor] | None = None) -> Figure:
    """Figure of the share of neurons removed per layer: a line for each run and, with labels, a point for each module.

    `labels` has the modules of the neurons of a single run, by layer.
    """
    figure, axes = canvas(8, 3.2 + 0.06 * len(masks))
    for i, (name, run_masks) in enumerate(masks.items()):
        removed = [float((~mask).float().mean()) if len(mask) else 0.0 for mask in run_masks.ffn]
        draw_line(axes, i, range(len(removed)), removed, name)
        for layer, of_layer in enumerate(labels or ()):
            modules = pd.Series((~run_masks.ffn[layer]).float().numpy()).groupby(of_layer.numpy())
            areas = 60 * modules.size() / len(of_layer)
            axes.scatter([layer] * len(areas), modules.mean(), s=areas, color="#56B4E9", ec="white", lw=0.4, zorder=0)
    axes.set(ylim=(0, 1.02 * max(axes.get_ylim()[1], 0.1)), xlabel="layer", ylabel="share of neurons removed")
    axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True))
    axes.grid(axis="y")
    figure.legend(loc="outside lower center", ncols=3)
    return figure


@style()
def heterogeneity_figure(modules: Modules) -> Figure:
    """Figure of rank drift and Kendall agreement per module and block, after the paper's Figure 1.

    Modules that switch to another metric have a ring.
    """
    rows = modules.rows()
    figure = Figure(figsize=(9, 3.4))
    left, right = figure.subplots(1, 2)
    block_indices = np.array([row["block"] for row in rows])
    switched = np.array([row["switched"] for row in rows], dtype=bool)
    mean_ranks = np.array([row["score"] for row in rows])
    for axes, name, label in (
        (left, "sensitivity", "rank drift (mean of module)"),
        (right, "agreement", "Kendall τ inside module"),
    ):
        values = np.array([np.nan if row[name] is None else row[name] for row in rows], dtype=float)
        points = axes.scatter(block_indices, values, c=mean_ranks, cmap="cividis", s=18, vmin=0, vmax=1, zorder=2)
        ring = {"facecolors": "none", "edgecolors": "#D55E00", "label": "switched", "zorder": 3}
        axes.scatter(block_indices[switched], values[switched], s=60, **ring)
        axes.set(xlabel="block", ylabel=label)
    blocks = range(len(modules.drift))
    left.plot(
        blocks, [float(d.noise_floor.mean()) for d in modules.drift], "--", color="black", lw=1, label="noise floor"
    )
    right.plot(blocks, modules.block_agreement, "-", color="black", lw=1, label="whole block")
    halves = [float(d.half_agreement) for d in modules.drift]
    if np.isfinite(halves).any():
        right.plot(blocks, halves, ":", color="black", lw=1, label="whole block, halves of one corpus")
    figure.colorbar(points, ax=right, label="mean importance rank")
    handle_of_label = {}  # each label once, although both axes may have it
    for axes in (left, right):
        handles, labels = axes.get_legend_handles_labels()
        handle_of_label |= dict(zip(labels, handles, strict=True))
    figure.legend(
        handle_of_label.values(), handle_of_label.keys(), loc="outside lower center", ncols=len(handle_of_label)
    )
    return figure


def run_figures(
    frame: pd.DataFrame, masks: Mapping[str, Masks], curves: Mapping[str, pd.DataFrame], title: str = "",
    modules: Modules | None = None,
) -> dict[str, Figure]:  # fmt: skip
    """Make the figures for which runs have data, by name: loss by corpus, removed share by layer, learning curves.

    Args:
        frame: stages of a single run, or lines of several rows (`tables.lines_of_rows`).
        masks: masks of the final models by name.
        curves: result of `read_curves` by name.
        title: small title of each figure.
        modules: modules of a single run.
    """
    figures = {}
    if (frame["number"] == "times_dense").any():
        figures["loss"] = loss_figure(frame)
    if masks:
        figures["removed"] = removed_figure(masks, None if modules is None else modules.labels)
    if (learned := learning_figure(curves)) is not None:
        figures["learning"] = learned
    return {name: add_title(figure, title) for name, figure in figures.items()}


@style()
def learning_figure(curves: Mapping[str, pd.DataFrame]) -> Figure | None:
    """Figure of training curves: one panel per entry of `LEARNED`, one line per run; None without curves.

    Lines are moving averages over a twentieth of the points.
    """
    panels: dict[str, dict[str, pd.DataFrame]] = {}  # label -> name of a run -> points
    for label, (x_axis, metric) in LEARNED.items():
        lines = {run: curve_points(frame, x_axis, metric) for run, frame in curves.items()}
        if any(len(points) > 1 for points in lines.values()):
            panels[label] = lines
    if not panels:
        return None
    figure = Figure(figsize=(3.6 * len(panels) + 0.4, 3.4 + 0.06 * len(curves)))
    for axes, (label, lines) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for i, (name, points) in enumerate(lines.items()):
            if len(points) > 1:
                average = points["y"].rolling(max(1, len(points) // 20), min_periods=1).mean()
                draw_line(axes, i, points["x"], average, name)
        axes.set(xlabel="tokens learned from", ylabel=label)
        axes.grid(axis="y")
    by_label = {line.get_label(): line for axes in figure.axes for line in axes.lines}
    figure.legend(by_label.values(), by_label, loc="outside lower center", ncols=3)
    return figure


def read_curves(run: Path) -> pd.DataFrame:
    """Read the logged metrics of a run, with a row for each time that metrics were logged.

    Sessions are concatenated in their order. The frame is empty if there are no files, as for a record of a list.
    """
    frames = []
    number = re.compile(r"\d*$")
    for file in sorted(run.glob("csv/version_*/metrics.csv"), key=lambda f: int(number.search(f.parent.name)[0] or 0)):
        try:
            frames.append(pd.read_csv(file))
        except (OSError, ValueError) as error:  # pandas' errors are ValueErrors
            log.warning("Cannot read %s: %s. Its curves are left out.", file, " ".join(str(error).split()))
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()


def curve_points(frame: pd.DataFrame, axis: str, name: str) -> pd.DataFrame:
    """Return a frame with columns x and y of a metric, sorted by x, without missing values.

    Points of later sessions replace earlier ones.
    """
    points = frame.reindex(columns=[axis, name]).apply(pd.to_numeric, errors="coerce").dropna()
    return points.set_axis(["x", "y"], axis=1).drop_duplicates("x", keep="last").sort_values("x")
