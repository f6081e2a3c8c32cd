"""The page of one run or several: one file, which needs no network and no script from elsewhere."""

from __future__ import annotations

import io
import json
import math
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure

from gprune.corpora.load import corpus_labels
from gprune.models.embedded import model_label
from gprune.report.curves import curve_figures, read_curves
from gprune.report.records import means_and_gaps, result_table
from gprune.report.run_figures import run_figures
from gprune.report.style import style
from gprune.report.table import Cell, Estimate, Table
from gprune.runs.folder import RunFolder
from gprune.runs.results import FinishedRun, read_samples, row_name
from gprune.sparsity.allocation import removed_in_words
from gprune.storage.files import replacing
from gprune.storage.reading import expanded
from gprune.storage.yaml_text import to_yaml

if TYPE_CHECKING:
    from gprune.report.page import Report

CAPTIONS = {
    "perplexity": "Perplexity by corpus and row.",
    "heterogeneity": "How far the ranks of each module's neurons drift between corpora, and how far corpora agree.",
    "sparsity": "Share of the neurons that each block, and each of its modules, loses.",
    "means": "Perplexity over seen and unseen text.",
    "ratios": "Unseen perplexity over the base metric's.",
    "learning": "Each run's own model over the tokens that it has learned from; losses are running means.",
    "stability": "How far runs keep the same neurons.",
}
# The colours of figures that follow the page's theme.
THEME = {"#000000": "currentColor", "#ffffff": "var(--paper)", "#dddddd": "var(--line)", "#555555": "var(--soft)"}


def write(report: Report, path: Path | str) -> Path:
    """Write the page of a report, whole or not at all."""
    path = expanded(path)
    with replacing(path) as temporary:
        temporary.write_text(page(report), encoding="utf-8")
    return path


def page(report: Report) -> str:
    """HTML of a report: what all runs share, and a section for each of them."""
    templates = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    several = len(report.runs) > 1
    runs = [section(run) for run in report.named_runs]
    return templates.get_template("page.html").render(
        title=", ".join(group.name for group in report.groups) if several else runs[0]["title"],
        tables=[cells_of(table) for table in report.read_tables] if several else [],
        figures=drawn(report.figures(), "all") if several else [],
        protocols=report.protocols(),
        runs=runs,
    )


def section(run: FinishedRun) -> dict[str, Any]:
    """What the page says of one run."""
    folder, s = RunFolder(run.path), run.settings
    manifest = folder.manifest
    method = "gprune" if s["gprune"] else "the base metric alone"
    return {
        "name": run.name,
        "title": removed_from(run),
        "about": f"Pruned by {method}, importance {s['importance']}, recovery {s['recovery']}, seed {run.seed}.",
        "tiles": tiles(run, manifest),
        "result": cells_of(result_table(run.records)),
        "figures": drawn(run_figures(run.records, run.modules, run.masks), run.name) if run.masks else [],
        "curves": drawn(curve_figures(read_curves(run.path)), f"{run.name} curves"),
        "samples": read_samples(run),
        "labels": corpus_labels(r["corpus"] for r in run.records),
        "settings": to_yaml({name: value for name, value in s.items() if name != "inputs"}),
        "cost": cells_of(cost_table(manifest.get("steps", {}))),
        "environment": manifest.get("environment") or {},
        "load": how_to_load(run),
        "next": what_next(run),
    }


def removed_from(run: FinishedRun) -> str:
    """What the run has done, in one line."""
    sparsity, model = run.settings["sparsity"], run.settings["model"]
    share = removed_in_words(sparsity["target"], sparsity["scope"], sparsity["allocation"], digits=0)
    return f"{share} removed from {model_label(model['name'])}"


def how_to_load(run: FinishedRun) -> str:
    """Python that loads the pruned model, where the run exported one; a stock model needs no code of its own."""
    model = run.path / "model"
    if not (model / "config.json").is_file():
        return ""
    code = ", trust_remote_code=True" if any(model.glob("*.py")) else ""
    place = json.dumps(str(model), ensure_ascii=False)
    return (
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f"model = AutoModelForCausalLM.from_pretrained({place}{code})\n"
        f"tokenizer = AutoTokenizer.from_pretrained({place}{code})"
    )


def what_next(run: FinishedRun) -> list[tuple[str, str]]:
    """(what for, command) of what can be done with the run."""
    here, config = shlex.quote(str(run.path)), shlex.quote(str(run.path / "config.yaml"))
    steps = [
        ("beside other runs", f"gprune report {here} OTHER_RUN --html compared.html"),
        ("the same with another seed", f"python train.py --config {config} --run.name NAME --run.seed 1"),
    ]
    if how_to_load(run):
        steps.insert(0, ("for llama.cpp", f"gprune export {here}"))
        steps.insert(0, ("benchmarks, beside the dense model", f"gprune evaluate {here} --dense"))
    return steps


def tiles(run: FinishedRun, manifest: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(what, number, in words) of the headline."""
    s, means = run.summary, means_and_gaps(run.records)
    last = (run.final, run.settings["recovery"])
    dense, pruned = means["dense", "none"], means[last]
    seconds = sum(step.get("seconds", 0) for step in manifest.get("steps", {}).values())
    perplexities = [
        (f"{text} perplexity", f"{pruned[text]:.2f}", f"dense {dense[text]:.2f}")
        for text in ("unseen", "seen")
        if not math.isnan(pruned[text])
    ]
    if ratio := (s.get("unseen_over_base") or {}).get(row_name(*last)):
        interval = f"95 % interval {ratio['low']:.3f} to {ratio['high']:.3f}"
        perplexities.append(("unseen, over the base metric", f"{ratio['ratio']:.3f}", interval))
    before, after = s["parameters_before"], s["parameters_after"]
    sparsity = run.settings["sparsity"]
    scope = removed_in_words(s["sparsity_of_scope"], sparsity["scope"], sparsity["allocation"])
    return [
        *perplexities,
        ("of the model removed", f"{s['sparsity_of_model']:.1%}", f"{scope}; {before:,} → {after:,} parameters"),
        ("tokens", f"{s['forward_tokens']:,}", f"forward; {s['forward_backward_tokens']:,} forward and backward"),
        ("seconds", f"{seconds:,.0f}", "of all steps and sittings"),
    ]


def cost_table(steps: Mapping[str, Mapping[str, float]]) -> Table:
    """Seconds, tokens and memory of each step."""
    columns = {"seconds": "seconds", "forward_tokens": "tokens forward",
               "forward_backward_tokens": "forward and backward", "peak_memory_mib": "peak memory, MiB"}  # fmt: skip
    if any("peak_gpu_memory_mib" in step for step in steps.values()):
        columns["peak_gpu_memory_mib"] = "of the GPU, MiB"
    rows = [
        [name, float(step.get("seconds", 0)), *(int(step.get(n, 0)) for n in list(columns)[1:])]
        for name, step in steps.items()
    ]
    note = "Peak memory: the process's highest so far, so that a step may show that of one before it."
    return Table("cost", "Cost by step", ["step", *columns.values()], rows, {"seconds": 1}, note)


def cells_of(table: Table) -> dict[str, Any]:
    """A table for the template: columns and whether they hold words, texts, and beside each number its sorting key."""

    def cells(texts: list[str], row: list[Cell]) -> list[dict[str, Cell]]:
        keys = (cell.value if isinstance(cell, Estimate) else cell for cell in row)
        return [{"text": text, "key": key} for text, key in zip(texts, keys, strict=True)]

    rows = [cells(*pair) for pair in zip(table.texts(), table.rows, strict=True)]
    columns = [(name, any(isinstance(row[c], str) for row in table.rows)) for c, name in enumerate(table.columns)]
    return {"title": table.title, "columns": columns, "rows": rows, "note": table.plain_note}


def drawn(figures: Mapping[str, Figure], name: str) -> list[dict[str, Any]]:
    """Captions and SVG of figures."""
    return [
        {
            "caption": CAPTIONS.get(title, title),
            "svg": svg(figure, f"{name} {title}"),
            "broad": figure.get_figwidth() > 2.2 * figure.get_figheight(),
        }
        for title, figure in figures.items()
    ]


@style()
def svg(figure: Figure, name: str) -> Markup:
    """Inline SVG whose black, white and grey follow the page's theme, with text as text.

    Args:
        name: of the figure on its page: references inside the SVG of two figures must not meet.
    """
    out, nothing = io.StringIO(), dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with matplotlib.rc_context({"svg.hashsalt": name, "svg.fonttype": "none"}):
        figure.savefig(out, format="svg", transparent=True, metadata=nothing)
    text = re.sub('<g id="[^"]*"', "<g", out.getvalue())  # every figure has an axes_1
    text = re.sub("|".join(THEME), lambda match: THEME[match[0].lower()], text, flags=re.IGNORECASE)
    return Markup(text[text.index("<svg") :])
