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

from gprune.corpora.load import corpus_labels
from gprune.evaluation.intervals import paired_ratio
from gprune.features import FIGURES
from gprune.models.masks import Masks
from gprune.partition.modules import Modules
from gprune.report.tables import Estimate, caption
from gprune.runs.numbers import DENSE, Record, ResultRow, by_row, on_same_windows, row_name
from gprune.storage.files import read_json, replacing

log = logging.getLogger("gprune")
FORMATS = ("png", "svg")
STYLE = matplotlib.rcParamsDefault | {  # ignores the user's matplotlibrc
    "font.size": 9, "xtick.labelsize": 8, "ytick.labelsize": 8, "legend.fontsize": 8, "legend.frameon": False,
    "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True,
    "grid.color": "#DDDDDD", "grid.linewidth": 0.6, "figure.constrained_layout.use": True, "savefig.dpi": 160,
    "text.parse_math": False,  # names of corpora and runs may have a $
}  # fmt: skip
LETTER_WIDTH = 0.08  # largest width of a letter in inches
COLOURS = {"pruned": "#E69F00", "recovered": "#0072B2", "measured": "#CC79A7"}  # by stage of the model
MARKERS = {"pruned": "s", "recovered": "o", "measured": "D"}
# Colour, dashes and marker. Lightness decreases, so that lines can be distinguished in grey print.
LINES = (
    ("#0072B2", "-", "o"), ("#E69F00", "--", "s"), ("#009E73", "-.", "^"), ("#D55E00", ":", "D"),
    ("#56B4E9", (0, (5, 1)), "v"), ("#CC79A7", (0, (3, 1, 1, 1)), "P"), ("#000000", (0, (1, 3)), "X"),
)  # fmt: skip
# Label -> (x axis, metric) of training curves.
LEARNED = {
    "development perplexity": ("development/tokens", "development/perplexity"),
    "loss while sparsity is learned, nats": ("learn/tokens", "learn/loss"),
    "loss of distillation, nats": ("distill/tokens", "distill/loss"),
}
# Title -> (x axis, its label, metric, its label). There is a line for each corpus that matches `*`.
CURVES = {
    "Loss while sparsity is learned": ("step", "step", "learn/loss", "loss, nats"),
    "Development perplexity while sparsity is learned": (
        "learn/epoch", "epoch", "development/perplexity/*", "perplexity under masks",
    ),
    "Development perplexity against sparsity": (
        "curve/sparsity", "share of the scope removed", "curve/perplexity/*", "perplexity under masks",
    ),
    "Loss of distillation": ("distill/tokens", "tokens learned from", "distill/loss", "loss, nats"),
    "Development perplexity while distilling": (
        "distill/tokens", "tokens learned from", "development/perplexity/*", "perplexity",
    ),
}  # fmt: skip


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
def add_title(figure: Figure, title: str, size: float = 7) -> Figure:
    """Write a small title above a figure, aligned to the left."""
    figure.suptitle(title, x=0.01, ha="left", fontsize=size, color="#555555")
    return figure


def interval_lengths(estimates: Sequence[Estimate]) -> np.ndarray:
    """Return the lengths of intervals below and above n values, (2, n) float64; 0 without an interval."""
    # If all windows have equal values the interval has length 0, and rounding may put the value outside.
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


def _comparable_rows(records: Sequence[Record]) -> list[ResultRow]:
    """Return the rows of the result table other than dense that were measured on the dense model's windows."""
    return [row for row in by_row(records) if row != DENSE and on_same_windows(records, row)]


@style()
def perplexity_figure(records: Sequence[Record]) -> Figure:
    """Figure of perplexity relative to dense by corpus and row, with paired 95 % intervals; seen corpora first.

    Rows with another tokenizer than the dense model's are left out, because their perplexity is of other tokens.
    """
    nll = by_row(records, "window_nll")
    dense_nll = nll["dense", "none"]
    is_seen = {r["corpus"]: r["seen"] for r in records}
    predicted_tokens = records[0]["seq_len"] - 1  # per window
    corpora = sorted(is_seen, key=lambda c: not is_seen[c])
    labels = corpus_labels(corpora)
    rows = _comparable_rows(records)
    corpus_width = max(1.1, LETTER_WIDTH * max(map(len, labels.values())))  # inches
    figure, axes = canvas(3.2 + corpus_width * len(corpora), 3.4)
    for i, (stage, recovery) in enumerate(rows):
        row_nll = nll[stage, recovery]
        ratios = [Estimate(*paired_ratio({c: row_nll[c]}, {c: dense_nll[c]}, predicted_tokens)) for c in corpora]
        offset = (i - (len(rows) - 1) / 2) * 0.6 / len(rows)  # rows share 0.6 of a corpus' width
        x = np.arange(len(corpora)) + offset
        axes.errorbar(
            x, [ratio.value for ratio in ratios], yerr=interval_lengths(ratios), ls="none", ms=5, capsize=2.5, lw=1.2,
            color=COLOURS[stage], marker=MARKERS[stage], label=row_name(stage, recovery),
        )  # fmt: skip
    axes.set_yscale("log")
    plain_ticks(axes.yaxis)
    axes.axhline(1, color="black", lw=0.8)
    axes.set_xticks(range(len(corpora)), [f"{labels[c]}\n{'seen' if is_seen[c] else 'unseen'}" for c in corpora])
    axes.set_ylabel("perplexity / dense, 95 % interval")
    axes.grid(axis="y")
    figure.legend(loc="outside right center")
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


@style()
def sparsity_figure(masks: Masks, labels: Sequence[Tensor] | None) -> Figure:
    """Figure of the share of neurons removed per block and, if there are modules, per module."""
    figure, axes = canvas(9, 3.4)
    removed_of_block = [float((~mask).float().mean()) if len(mask) else 0.0 for mask in masks.ffn]
    axes.bar(range(len(removed_of_block)), removed_of_block, color="#BFDDF0", label="block")
    if labels is not None:
        block_indices, removed, sizes = [], [], []  # of each module
        for block_index, (mask, block_labels) in enumerate(zip(masks.ffn, labels, strict=True)):
            for module in block_labels.unique().tolist():
                members = block_labels == module
                block_indices.append(block_index)
                removed.append(float((~mask[members]).float().mean()))
                sizes.append(int(members.sum()))
        scale = 40 / max(sizes)  # area of the largest module is 40 square points
        areas = [scale * size for size in sizes]
        axes.scatter(
            block_indices, removed, s=areas, color="#0072B2", ec="white", lw=0.4, zorder=2,
            label="module (area: neurons)",
        )  # fmt: skip
    limits = {"xlim": (-0.7, len(masks.ffn) - 0.3), "ylim": (0, 1.02)}
    axes.set(**limits, xlabel="block", ylabel="fraction of neurons removed")
    figure.legend(loc="outside right center")
    return figure


def run_figures(
    records: Sequence[Record], modules: Modules | None, masks: Masks | None, summary: dict[str, Any]
) -> dict[str, Figure]:
    """Make all figures for which a run has data, by name."""
    labels = None if modules is None else modules.labels
    figures = {"perplexity": perplexity_figure(records)} if _comparable_rows(records) else {}
    if masks is not None:
        figures["sparsity"] = sparsity_figure(masks, labels)
    if modules is not None and len(modules.drift[0].ranks) > 1:
        figures["heterogeneity"] = heterogeneity_figure(modules)
    for name, figure in FIGURES.items():
        if figure.entry in summary:
            with style():
                figures[name] = figure.draw(summary[figure.entry], masks)
    title = caption(records)
    return {name: add_title(figure, title) for name, figure in figures.items()}


def write_figures(
    folder: Path, records: Sequence[Record], modules: Modules | None, masks: Masks | None, summary: dict[str, Any], *,
    formats: Sequence[str] = ("png",),
) -> list[Path]:  # fmt: skip
    """Write the figures of a run, and return their paths."""
    paths = []
    for name, figure in run_figures(records, modules, masks, summary).items():
        paths += save(figure, folder, name, formats)
    return paths


@style()
def ratio_figure(rows: Sequence[tuple[str, Estimate]], *, base: str) -> Figure:
    """Figure of perplexity on unseen text relative to a model `base`, with paired intervals; left is better."""
    figure, axes = canvas(4.5 + 0.07 * max(len(label) for label, _ in rows), 1.2 + 0.3 * len(rows))
    draw_ratios(axes, rows, base=base)
    return figure


def draw_ratios(axes: Axes, rows: Sequence[tuple[str, Estimate]], *, base: str) -> None:
    """Draw `ratio_figure` on existing axes."""
    ratios = [ratio for _, ratio in rows]
    axes.errorbar(
        [ratio.value for ratio in ratios], range(len(rows)), xerr=interval_lengths(ratios), ls="none", ms=5,
        capsize=2.5, lw=1.2, color="#0072B2", marker="o",
    )  # fmt: skip
    axes.axvline(1, color="black", lw=0.8)
    behind = {"facecolor": "white", "edgecolor": "none", "pad": 0.4}  # hides the line at 1 behind a number
    for y, (_, ratio) in enumerate(rows):
        axes.annotate(
            f"{ratio.value:.2f}", (ratio.value, y), (0, 6), textcoords="offset points", ha="center", fontsize=8,
            bbox=behind,
        )  # fmt: skip
    axes.set(xscale="log", xlabel=f"unseen perplexity / {base}; 95 % interval")
    plain_ticks(axes.xaxis)
    axes.set_yticks(range(len(rows)), [label for label, _ in rows], fontsize=8)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.grid(axis="x")


@style()
def sparsity_lines(masks: Mapping[str, Masks]) -> Figure:
    """Figure of the share of neurons removed per block, one line per run."""
    figure, axes = canvas(7, 3.2 + 0.06 * len(masks))
    for i, (name, run_masks) in enumerate(masks.items()):
        removed = [float((~mask).float().mean()) for mask in run_masks.ffn]
        draw_line(axes, i, range(len(removed)), removed, name)
    axes.set(ylim=(0, min(1.02, 1.1 * axes.get_ylim()[1])), xlabel="block", ylabel="fraction of neurons removed")
    axes.grid(axis="y")
    figure.legend(loc="outside lower center", ncols=3)
    return figure


@style()
def learning_figure(curves: Mapping[str, pd.DataFrame]) -> Figure | None:
    """Figure of training curves: one panel per entry of `LEARNED`, one line per run.

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

    Sessions are concatenated in their order. The DataFrame is empty if there are no files. In a run with a quality
    target, metrics of the trial that is the run's model lose their prefix, such as `trial_2/`.
    """
    frames = []
    files = sorted(
        run.glob("csv/version_*/metrics.csv"), key=lambda file: int(re.sub(r"\D", "", file.parent.name) or 0)
    )
    for file in files:
        try:
            frames.append(pd.read_csv(file))
        except (OSError, ValueError) as error:  # pandas' errors are ValueErrors
            log.warning("Cannot read %s: %s. Its curves are left out.", file, " ".join(str(error).split()))
    if not frames:  # such as a record of a list, which is no folder
        return pd.DataFrame()
    frame = pd.concat(frames, ignore_index=True)
    trials = read_json(run / "quality.json") or {}
    kept = (trials.get("reached") or {}).get("trial")
    return frame if kept is None else _without_prefix(frame, f"trial_{kept}/")


def _without_prefix(frame: pd.DataFrame, prefix: str) -> pd.DataFrame:
    """Remove the prefix of metrics, and merge them with columns that exist already."""
    columns: dict[str, pd.Series] = {}
    for column, values in frame.items():
        name = column.removeprefix(prefix)
        columns[name] = values.combine_first(columns[name]) if name in columns else values
    return pd.DataFrame(columns)


def curve_figures(frame: pd.DataFrame) -> dict[str, Figure]:
    """Make a figure for each entry of `CURVES` with at least two points, by title."""
    figures = {}
    for title, (axis, axis_label, pattern, label) in CURVES.items():
        columns = matching_columns(frame, pattern)
        lines = {name: curve_points(frame, axis.replace("*", name), column) for name, column in columns.items()}
        if any(len(points) > 1 for points in lines.values()):
            figures[title] = _figure(lines, axis_label, label)
    return figures


def matching_columns(frame: pd.DataFrame, pattern: str) -> dict[str, str]:
    """Return text that matches `*` -> column, for the columns that match a pattern of `CURVES`."""
    expression = re.compile(re.escape(pattern).replace(r"\*", "(.+)"))
    matches = [match for column in frame if (match := expression.fullmatch(column))]
    return {"".join(match.groups()): match[0] for match in matches}


def curve_points(frame: pd.DataFrame, axis: str, name: str) -> pd.DataFrame:
    """Return a DataFrame with columns x and y of a metric, sorted by x, without missing values.

    Points of later sessions replace earlier ones.
    """
    points = frame.reindex(columns=[axis, name]).apply(pd.to_numeric, errors="coerce").dropna()
    return points.set_axis(["x", "y"], axis=1).drop_duplicates("x", keep="last").sort_values("x")


@style()
def _figure(lines: dict[str, pd.DataFrame], axis_label: str, label: str) -> Figure:
    """Draw the lines of a metric. With several lines the y axis is logarithmic."""
    labels = corpus_labels(lines)
    figure, axes = canvas(5.4 + LETTER_WIDTH * max(8, *map(len, labels.values())), 3.2)
    for i, (name, points) in enumerate(lines.items()):
        draw_line(axes, i, points["x"], points["y"], labels[name])
    axes.set(xlabel=axis_label, ylabel=label)
    axes.grid(axis="y")
    if len(lines) > 1:
        axes.set_yscale("log")
        plain_ticks(axes.yaxis)
        figure.legend(loc="outside right center")
    return figure
