"""Figures. Okabe and Ito's colours, and never by colour alone: bars differ in hatching, lines in dashes and markers."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import matplotlib
import matplotlib.ticker
import numpy as np
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from torch import Tensor

from gprune.models.masks import Masks
from gprune.partition.record import Modules
from gprune.report.tables import by_stage, row_name
from gprune.runs.results import Record
from gprune.storage.files import replacing

# Okabe and Ito's palette by stage; base and base_averaged are equally light, so every stage has its own hatching too.
COLOURS = {"dense": "#999999", "base": "#E69F00", "base_averaged": "#56B4E9", "gprune": "#0072B2"}
HATCHES = {"base": "", "base_averaged": "....", "gprune": "////"}
OTHER = "#CC79A7"


def perplexity_figure(records: Sequence[Record]) -> Figure:
    """Perplexity relative to dense, per corpus and stage; unseen corpora on the right."""
    table = by_stage(records)
    seen = {r["corpus"]: r["seen"] for r in records}
    corpora = sorted(seen, key=lambda c: not seen[c])
    stages = [key for key in table if key[0] != "dense"]
    figure = Figure(figsize=(1.6 + 1.2 * len(corpora), 3.4), layout="constrained")
    axes = figure.subplots()
    for i, (stage, recovery) in enumerate(stages):
        ratio = [table[(stage, recovery)][c] / table[("dense", "none")][c] for c in corpora]
        x = np.arange(len(corpora)) + (i - (len(stages) - 1) / 2) * 0.8 / len(stages)
        axes.bar(
            x, ratio, 0.8 / len(stages), label=row_name(stage, recovery), color=COLOURS.get(stage, OTHER),
            # recovered: paler, and crossed as well
            alpha=1 if recovery == "none" else 0.55, edgecolor="black", linewidth=0.5,
            hatch=HATCHES.get(stage, "ooo") + ("" if recovery == "none" else "xx"),
        )  # fmt: skip
    axes.set_yscale("log")
    plain_ticks(axes.yaxis)
    axes.axhline(1, color="black", lw=0.8)
    axes.set_xticks(range(len(corpora)), [f"{c}\n{'seen' if seen[c] else 'unseen'}" for c in corpora])
    axes.set_ylabel("perplexity / dense")
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def heterogeneity_figure(modules: Modules) -> Figure:
    """Rank drift and Kendall agreement per module and block (after the paper's Figure 1); switched modules ringed."""
    rows = modules.rows()
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    block = np.array([r["block"] for r in rows])
    switched = np.array([r["switched"] for r in rows], dtype=bool)
    score = np.array([r["score"] for r in rows])
    for axes, name, label in (
        (left, "sensitivity", "rank drift (mean of module)"),
        (right, "agreement", "Kendall τ inside module"),
    ):
        value = np.array([np.nan if r[name] is None else r[name] for r in rows], dtype=float)
        points = axes.scatter(block, value, c=score, cmap="cividis", s=18, vmin=0, vmax=1, zorder=2)
        axes.scatter(
            block[switched],
            value[switched],
            s=60,
            facecolors="none",
            edgecolors="#D55E00",
            label="switched",
            zorder=3,
        )
        axes.set_xlabel("block")
        axes.set_ylabel(label)
        axes.spines[["top", "right"]].set_visible(False)
    depth = range(len(modules.drift))
    left.plot(depth, [float(d.floor.mean()) for d in modules.drift], "--", color="black", lw=1, label="noise floor")
    right.plot(depth, modules.block_agreement, "-", color="black", lw=1, label="whole block")
    halves = [float(d.halves) for d in modules.drift]
    if np.isfinite(halves).any():
        right.plot(depth, halves, "--", color="black", lw=1, label="whole block, halves of one corpus")
    for axes in (left, right):
        axes.legend(frameon=False, fontsize=8)
    figure.colorbar(points, ax=right, label="mean importance rank")
    return figure


def sparsity_figure(masks: Masks, labels: Sequence[Tensor] | None) -> Figure:
    """Fraction of neurons removed per block, and per module where there are modules."""
    figure = Figure(figsize=(7, 3.2), layout="constrained")
    axes = figure.subplots()
    per_block = [float((~m).float().mean()) for m in masks.ffn]
    axes.bar(range(len(per_block)), per_block, color="#56B4E9", label="block")
    if labels is not None:
        x, y, size = [], [], []
        for b, (m, modules) in enumerate(zip(masks.ffn, labels, strict=True)):
            for k in range(int(modules.max()) + 1):
                x.append(b)
                y.append(float((~m[modules == k]).float().mean()))
                size.append(int((modules == k).sum()))
        scale = 40 / max(size)
        axes.scatter(x, y, s=[scale * n for n in size], color="#0072B2", zorder=2, label="module (area: neurons)")
    axes.set_ylim(0, 1.02)
    axes.set_xlabel("block")
    axes.set_ylabel("fraction of neurons removed")
    axes.legend(frameon=False, fontsize=8, loc="upper left")
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def save(figure: Figure, folder: Path, name: str, formats: Sequence[str] = ("png",)) -> list[Path]:
    """Write a figure whole or not at all, in each format; the same figure gives the same bytes."""
    paths = []
    with style(), matplotlib.rc_context({"svg.hashsalt": name}):
        for kind in formats:
            path = folder / f"{name}.{kind}"
            metadata = {"Date": None} if kind == "svg" else None
            with replacing(path) as temporary:
                figure.savefig(temporary, dpi=160, format=kind, metadata=metadata)
            paths.append(path)
    return paths


def write_figures(
    folder: Path,
    records: Sequence[Record],
    modules: Modules | None,
    masks: Masks,
    formats: Sequence[str] = ("png",),
) -> list[Path]:
    """Files of all figures that one run has data for."""
    with style():
        figures = {
            "perplexity": perplexity_figure(records),
            "sparsity": sparsity_figure(masks, None if modules is None else modules.labels),
        }
        if modules is not None and len(modules.drift[0].ranks) > 1:
            figures["heterogeneity"] = heterogeneity_figure(modules)
    return [path for name, figure in figures.items() for path in save(figure, folder, name, formats)]


def style() -> AbstractContextManager[None]:
    """For as long as a figure is made and saved."""
    return matplotlib.rc_context({"font.size": 9, "xtick.labelsize": 8, "ytick.labelsize": 8})


def plain_ticks(axis: Axis) -> None:
    """0.5 and 200 on a logarithmic axis, not powers of ten; more ticks where it is short."""
    axis.set_major_locator(matplotlib.ticker.LogLocator(base=10, subs=(1, 2, 5)))
    axis.set_minor_locator(matplotlib.ticker.LogLocator(base=10, subs=(0.5, 0.6, 0.7, 0.8, 0.9, 1.2, 1.5, 3)))
    axis.set_major_formatter(matplotlib.ticker.FormatStrFormatter("%g"))
    low, high = sorted(axis.get_view_interval())
    axis.set_minor_formatter(
        matplotlib.ticker.FormatStrFormatter("%g") if high / low < 5 else matplotlib.ticker.NullFormatter()
    )
