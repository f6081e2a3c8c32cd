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
from gprune.report.style import (
    COLOURS,
    LETTER_WIDTH,
    MARKERS,
    OTHER_COLOUR,
    add_title,
    canvas,
    interval_lengths,
    plain_ticks,
    save,
    style,
)
from gprune.report.table import Estimate
from gprune.runs.numbers import DENSE, Record, Stage, by_stage, on_same_windows, row_name


def _comparable_stages(records: Sequence[Record]) -> list[Stage]:
    """Return the stages other than dense that were measured on the dense model's windows."""
    return [stage for stage in by_stage(records) if stage != DENSE and on_same_windows(records, stage)]


@style()
def perplexity_figure(records: Sequence[Record]) -> Figure:
    """Figure of perplexity relative to dense by corpus and stage, with paired 95 % intervals; seen corpora first.

    Stages with another tokenizer than the dense model's are left out, because their perplexity is of other tokens.
    """
    nll = by_stage(records, "window_nll")
    dense_nll = nll["dense", "none"]
    is_seen = {r["corpus"]: r["seen"] for r in records}
    predicted_tokens = records[0]["seq_len"] - 1  # per window
    corpora = sorted(is_seen, key=lambda c: not is_seen[c])
    labels = corpus_labels(corpora)
    stages = _comparable_stages(records)
    corpus_width = max(1.1, LETTER_WIDTH * max(map(len, labels.values())))  # inches
    figure, axes = canvas(3.2 + corpus_width * len(corpora), 3.4)
    for i, (stage, recovery) in enumerate(stages):
        stage_nll = nll[stage, recovery]
        ratios = [Estimate(*paired_ratio({c: stage_nll[c]}, {c: dense_nll[c]}, predicted_tokens)) for c in corpora]
        offset = (i - (len(stages) - 1) / 2) * 0.6 / len(stages)  # stages share 0.6 of a corpus' width
        x = np.arange(len(corpora)) + offset
        colour = COLOURS.get(stage, OTHER_COLOUR)
        axes.errorbar(
            x, [ratio.value for ratio in ratios], yerr=interval_lengths(ratios), ls="none", ms=5, capsize=2.5, lw=1.2,
            color=colour, marker=MARKERS.get(stage, "D"), label=row_name(stage, recovery),
            mfc="white" if recovery == "none" else colour,  # filled markers: with recovery
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
    left.plot(blocks, [float(d.floor.mean()) for d in modules.drift], "--", color="black", lw=1, label="noise floor")
    right.plot(blocks, modules.block_agreement, "-", color="black", lw=1, label="whole block")
    halves = [float(d.halves) for d in modules.drift]
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


@style()
def speed_figure(table: dict[str, Any], depth: int) -> Figure:
    """Figure of the latency table: milliseconds of all layers by kept neurons and KV groups, and of other parts."""
    figure = Figure(figsize=(9, 3.4))
    panels = {"neurons": "FFN neurons", "groups": "KV groups"}
    for axes, (kind, units) in zip(figure.subplots(1, 2, sharey=True), panels.items(), strict=True):
        kept_units, seconds = np.transpose(table[kind])
        axes.plot(
            kept_units, 1000 * depth * seconds, marker="o", ms=4, color=COLOURS["gprune"], label=f"{depth} layers"
        )
        axes.axhline(1000 * table["rest"], ls="--", color=OTHER_COLOUR, label="other parts")
        axes.set(xlabel=f"{units} that each block keeps", ylabel="milliseconds", xticks=kept_units, ylim=0)
        axes.label_outer()
        axes.grid(axis="y")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right center")
    return figure


def run_figures(
    records: Sequence[Record], modules: Modules | None, masks: Masks | None, summary: dict[str, Any]
) -> dict[str, Figure]:
    """Make all figures for which a run has data, by name."""
    labels = None if modules is None else modules.labels
    figures = {"perplexity": perplexity_figure(records)} if _comparable_stages(records) else {}
    if masks is not None:
        figures["sparsity"] = sparsity_figure(masks, labels)
    if modules is not None and len(modules.drift[0].ranks) > 1:
        figures["heterogeneity"] = heterogeneity_figure(modules)
    if "speed_table" in summary:
        table = summary["speed_table"]
        # Older runs have no number of layers. Their layers have one block each.
        figures["speed"] = speed_figure(table, table.get("layers") or len(masks.ffn))
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
