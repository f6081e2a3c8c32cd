"""Figures of a run: perplexity relative to dense, rank drift of modules, sparsity per block, latency table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from gprune.corpora.load import corpus_labels
from gprune.evaluation.intervals import paired_ratio
from gprune.models.masks import Masks
from gprune.partition.modules import Modules
from gprune.report.records import caption
from gprune.report.style import COLOURS, LETTER, MARKERS, OTHER, canvas, distances, plain_ticks, save, style, titled
from gprune.report.table import Estimate
from gprune.runs.numbers import Record, by_stage, row_name


@style()
def perplexity_figure(records: Sequence[Record]) -> Figure:
    """Figure of perplexity relative to dense by corpus and stage, with paired 95 % intervals; seen corpora first."""
    nll, seen = by_stage(records, "window_nll"), {r["corpus"]: r["seen"] for r in records}
    predicted = next(iter(records))["seq_len"] - 1
    corpora = sorted(seen, key=lambda c: not seen[c])
    labels = corpus_labels(corpora)
    stages = [key for key in nll if key[0] != "dense"]
    figure, axes = canvas(3.2 + max(1.1, LETTER * max(map(len, labels.values()))) * len(corpora), 3.4)
    for i, (stage, recovery) in enumerate(stages):
        ratios = [
            Estimate(*paired_ratio({c: nll[stage, recovery][c]}, {c: nll["dense", "none"][c]}, predicted))
            for c in corpora
        ]
        x = np.arange(len(corpora)) + (i - (len(stages) - 1) / 2) * 0.6 / len(stages)
        colour = COLOURS.get(stage, OTHER)
        axes.errorbar(
            x, [ratio.value for ratio in ratios], yerr=distances(ratios), ls="none", ms=5, capsize=2.5, lw=1.2,
            color=colour, marker=MARKERS.get(stage, "D"), label=row_name(stage, recovery),
            mfc="white" if recovery == "none" else colour,  # filled markers: with recovery
        )  # fmt: skip
    axes.set_yscale("log")
    plain_ticks(axes.yaxis)
    axes.axhline(1, color="black", lw=0.8)
    axes.set_xticks(range(len(corpora)), [f"{labels[c]}\n{'seen' if seen[c] else 'unseen'}" for c in corpora])
    axes.set_ylabel("perplexity / dense, 95 % interval")
    axes.grid(axis="y")
    figure.legend(loc="outside right center")
    return figure


@style()
def heterogeneity_figure(modules: Modules) -> Figure:
    """Rank drift and Kendall agreement per module and block (after the paper's Figure 1); switched modules ringed."""
    rows = modules.rows()
    figure = Figure(figsize=(9, 3.4))
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
        ring = {"facecolors": "none", "edgecolors": "#D55E00", "label": "switched", "zorder": 3}
        axes.scatter(block[switched], value[switched], s=60, **ring)
        axes.set(xlabel="block", ylabel=label)
    depth = range(len(modules.drift))
    left.plot(depth, [float(d.floor.mean()) for d in modules.drift], "--", color="black", lw=1, label="noise floor")
    right.plot(depth, modules.block_agreement, "-", color="black", lw=1, label="whole block")
    halves = [float(d.halves) for d in modules.drift]
    if np.isfinite(halves).any():
        right.plot(depth, halves, ":", color="black", lw=1, label="whole block, halves of one corpus")
    figure.colorbar(points, ax=right, label="mean importance rank")
    by_axes = (zip(*axes.get_legend_handles_labels(), strict=True) for axes in (left, right))
    handles = {label: handle for pairs in by_axes for handle, label in pairs}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=len(handles))
    return figure


@style()
def sparsity_figure(masks: Masks, labels: Sequence[Tensor] | None) -> Figure:
    """Figure of the share of neurons removed per block and, if there are modules, per module."""
    figure, axes = canvas(9, 3.4)
    per_block = [float((~m).float().mean()) if len(m) else 0.0 for m in masks.ffn]
    axes.bar(range(len(per_block)), per_block, color="#BFDDF0", label="block")
    if labels is not None:
        x, y, size = [], [], []
        for b, (m, modules) in enumerate(zip(masks.ffn, labels, strict=True)):
            for k in modules.unique().tolist():
                x.append(b)
                y.append(float((~m[modules == k]).float().mean()))
                size.append(int((modules == k).sum()))
        scale = 40 / max(size)
        axes.scatter(x, y, s=[scale * n for n in size], color="#0072B2", ec="white", lw=0.4, zorder=2,
                     label="module (area: neurons)")  # fmt: skip
    axes.set(xlim=(-0.7, len(per_block) - 0.3), ylim=(0, 1.02), xlabel="block", ylabel="fraction of neurons removed")
    figure.legend(loc="outside right center")
    return figure


@style()
def speed_figure(table: dict[str, Any], depth: int) -> Figure:
    """Figure of the latency table: milliseconds of all blocks by kept neurons and KV groups, and of other parts."""
    figure = Figure(figsize=(9, 3.4))
    panels = {"neurons": "FFN neurons", "groups": "KV groups"}
    for axes, (kind, units) in zip(figure.subplots(1, 2, sharey=True), panels.items(), strict=True):
        kept, seconds = np.transpose(table[kind])
        axes.plot(kept, 1000 * depth * seconds, marker="o", ms=4, color=COLOURS["gprune"], label=f"{depth} blocks")
        axes.axhline(1000 * table["rest"], ls="--", color=OTHER, label="what is never pruned")
        axes.set(xlabel=f"{units} that each block keeps", ylabel="milliseconds", xticks=kept, ylim=0)
        axes.label_outer()
        axes.grid(axis="y")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right center")
    return figure


def run_figures(
    records: Sequence[Record], modules: Modules | None, masks: Masks | None, summary: dict
) -> dict[str, Figure]:
    """Make all figures for which a run has data, by name."""
    labels = None if modules is None else modules.labels
    figures = {"perplexity": perplexity_figure(records)}
    if masks is not None:
        figures["sparsity"] = sparsity_figure(masks, labels)
    if modules is not None and len(modules.drift[0].ranks) > 1:
        figures["heterogeneity"] = heterogeneity_figure(modules)
    if "speed_table" in summary:
        figures["speed"] = speed_figure(summary["speed_table"], len(masks.ffn))
    about = caption(records)
    return {name: titled(figure, about) for name, figure in figures.items()}


def write_figures(folder: Path, *about: Any, formats: Sequence[str] = ("png",)) -> list[Path]:
    """Write the figures of `run_figures`, and return their paths."""
    return [path for name, figure in run_figures(*about).items() for path in save(figure, folder, name, formats)]
