"""Tables and figures from records and modules."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from gprune.artifacts import replacing
from gprune.assets import EMBEDDED_MODELS
from gprune.config import RunConfig
from gprune.evaluation.perplexity import generalisation_gap, geometric_mean, paired_bootstrap_ratio
from gprune.masks import Masks
from gprune.results import Modules

Record = dict[str, Any]
# Okabe and Ito's palette: told apart by colour-blind readers, and in print by lightness
COLOURS = {"dense": "#999999", "base": "#E69F00", "base_averaged": "#56B4E9", "gprune": "#0072B2"}


def model_label(name: str) -> str:
    """How a model is named in tables: an embedded one with what was done to it, any other as it was asked for."""
    return EMBEDDED_MODELS[name].description if name in EMBEDDED_MODELS else name


def row_name(stage: str, recovery: str) -> str:
    return stage if recovery == "none" else f"{stage} + {recovery}"


def by_stage(records: Sequence[Record]) -> dict[tuple[str, str], dict[str, float]]:
    """(stage, recovery) -> corpus -> perplexity, in the order of the records."""
    table: dict[tuple[str, str], dict[str, float]] = {}
    for r in records:
        table.setdefault((r["stage"], r["recovery"]), {})[r["corpus"]] = r["perplexity"]
    return table


def unseen_ratios(records: Sequence[Record]) -> dict[str, dict[str, float]]:
    """Unseen geometric mean of each stage over `base` with the same recovery, with a 95 % interval over windows."""
    unseen = [r for r in records if not r["seen"]]
    nll: dict[tuple[str, str], dict[str, list[float]]] = {}
    for r in unseen:
        nll.setdefault((r["stage"], r["recovery"]), {})[r["corpus"]] = r["window_nll"]
    ratios = {}
    for (stage, recovery), values in nll.items():
        base = nll.get(("base", recovery))
        if stage in ("dense", "base") or base is None:
            continue
        ratio, low, high = paired_bootstrap_ratio(values, base, unseen[0]["seq_len"] - 1)
        ratios[row_name(stage, recovery)] = {
            "ratio": ratio,
            "low": low,
            "high": high,
        }
    return ratios


def result_table(records: Sequence[Record]) -> str:
    """Markdown: a row per stage; a column per corpus (seen ones marked), geometric means and the gap."""
    table = by_stage(records)
    seen = {r["corpus"]: r["seen"] for r in records}
    corpora = sorted(seen, key=lambda c: not seen[c])
    dense = table[("dense", "none")]
    ratios = unseen_ratios(records)
    rows = [["", *(f"{c}*" if seen[c] else c for c in corpora), "seen", "unseen", "gap", "unseen / base"]]
    for (stage, recovery), values in table.items():
        name = row_name(stage, recovery)
        means = [geometric_mean(v for c, v in values.items() if seen[c] == flag) for flag in (True, False)]
        gap = float("nan") if stage == "dense" else generalisation_gap(values, dense, seen)
        r = ratios.get(name)
        ratio = f"{r['ratio']:.3f} [{r['low']:.3f}, {r['high']:.3f}]" if r else ""
        cells = [*(f"{values[c]:.2f}" for c in corpora), *(f"{m:.2f}" for m in means), f"{gap:.3f}"]
        rows.append([name, *("" if cell == "nan" else cell for cell in cells), ratio])
    return (
        markdown(rows) + "\n\\* seen: the corpus, in other documents, was used by the run. Perplexity, lower is better."
    )


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table with aligned columns; the first row is the header, the first column text."""
    width = [max(len(row[c]) for row in rows) for c in range(len(rows[0]))]

    def line(row: Sequence[str]) -> str:
        first, *rest = (cell.ljust(w) if c == 0 else cell.rjust(w) for c, (cell, w) in enumerate(zip(row, width)))  # noqa: B905
        return "| " + " | ".join([first, *rest]) + " |"

    rule = "|" + "|".join("-" * (w + 2) if c == 0 else "-" * (w + 1) + ":" for c, w in enumerate(width)) + "|"
    return "\n".join([line(rows[0]), rule, *(line(row) for row in rows[1:])])


def model_card(cfg: RunConfig, *, stock: bool = False) -> str:
    """README.md of the exported folder: what it is, how it was made, how to load it.

    Args:
        stock: whether the folder is a stock model, without code of its own.
    """
    trust = "" if stock else ", trust_remote_code=True"
    code = (
        "All blocks have the same shape: a stock Llama, which needs no code of its own."
        if stock
        else "`modeling_pruned_llama.py` is the code that is run: one short file. Where `gprune` is installed, "
        "`import gprune`\nmakes `trust_remote_code` unnecessary."
    )
    embedded = EMBEDDED_MODELS.get(cfg.model.name)
    licence = embedded.license if embedded else "that of the base model"
    recovery = "" if cfg.recovery == "none" else f", recovery `{cfg.recovery}`"
    method = "gprune" if cfg.gprune else "base metric alone"
    return f"""# {model_label(cfg.model.name)}, structurally pruned

{cfg.sparsity.target:.0%} of the parameters in scope `{cfg.sparsity.scope}` removed by {method}: importance
`{cfg.importance}` scored on `{cfg.corpora.score}`, drift measured on {", ".join(f"`{c}`" for c in cfg.corpora.drift)},
allocation `{cfg.sparsity.allocation if cfg.gprune else cfg.base_allocation}`{recovery}, seed {cfg.run.seed}.
The method is our reading of GPrune-LLM (arXiv 2603.13418).

Base model: {model_label(cfg.model.name)}. Licence: {licence}.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("path/to/this/folder"{trust})
tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder"{trust})
```

{code}
"""


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
        label = row_name(stage, recovery)
        hatch = None if recovery == "none" else "//"
        axes.bar(x, ratio, 0.8 / len(stages), label=label, color=COLOURS.get(stage, "#CC79A7"), hatch=hatch)
    axes.set_yscale("log")
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


def write_figures(folder: Path, records: Sequence[Record], modules: Modules | None, masks: Masks) -> list[Path]:
    """PNG files of all figures that the run has data for."""
    figures = {
        "perplexity": perplexity_figure(records),
        "sparsity": sparsity_figure(masks, None if modules is None else modules.labels),
    }
    if modules is not None and len(modules.drift[0].ranks) > 1:
        figures["heterogeneity"] = heterogeneity_figure(modules)
    paths = []
    with matplotlib.rc_context({"font.size": 9}):
        for name, figure in figures.items():
            path = folder / f"{name}.png"
            with replacing(path) as temporary:
                figure.savefig(temporary, dpi=160, format="png")
            paths.append(path)
    return paths
