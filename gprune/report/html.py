"""HTML page of one or several runs, in one file without external resources."""

from __future__ import annotations

import io
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure

from gprune.corpora.load import corpus_labels
from gprune.models.embedded import model_label
from gprune.report.curves import curve_figures, read_curves
from gprune.report.model_card import RESULTS, loading_code, write_card
from gprune.report.records import SAME_RECOVERY, UNRECOVERED, cost_table, quality_table, result_table
from gprune.report.run_figures import run_figures, write_figures
from gprune.report.style import style
from gprune.runs.folder import RunFolder
from gprune.runs.numbers import Record, Stage, means_and_gaps, row_name, unseen_ratios
from gprune.runs.results import FinishedRun, config_of
from gprune.sparsity.allocation import format_removed
from gprune.storage.files import replacing
from gprune.storage.reading import expanded
from gprune.storage.yaml_text import to_yaml

if TYPE_CHECKING:
    from gprune.report.page import Report

# Colours of figures -> CSS of the page's theme (light or dark).
THEME = {"#000000": "currentColor", "#ffffff": "var(--paper)", "#dddddd": "var(--line)", "#555555": "var(--soft)"}


def write_report(report: Report, path: Path | str) -> Path:
    """Write the page of a report atomically, and return its path."""
    path = expanded(path)
    with replacing(path) as temporary:
        temporary.write_text(render(report), encoding="utf-8")
    return path


def write_missing(report: Report) -> None:
    """Write figures, model card and page of a single run if its folder lacks them."""
    (run,) = report.runs
    if not any(run.path.glob("figures/*.png")):
        write_figures(run.path / "figures", run.records, run.modules, run.masks, run.summary)
    card = run.path / "model/README.md"
    if card.is_file() and RESULTS not in card.read_text(encoding="utf-8"):
        write_card(RunFolder(run.path), config_of(run), run.records)
    if not (run.path / "report.html").exists():
        write_report(report, run.path / "report.html")


def render(report: Report) -> str:
    """Render a report as HTML: common tables and figures, and a section for each run."""
    templates = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    several = len(report.runs) > 1
    runs = [section(run) for run in report.named_runs]
    return templates.get_template("page.html").render(
        title=report.title if several else runs[0]["title"],
        tables=report.read_tables,
        figures=drawn(report.figures(), "all") if several else [],
        protocols=report.protocols(),
        runs=runs,
    )


def section(run: FinishedRun) -> dict[str, Any]:
    """Return the values for a run's section of the template."""
    s, model = run.settings, run.path / "model"
    method = "gprune" if s["gprune"] else "the base metric alone"
    asked, summary = s["sparsity"], run.summary
    if (other := s["model"].get("made_elsewhere")) is not None:
        title, removed = f"{model_label(other)} beside {model_label(s['model']['name'])}", "made elsewhere"
        about = f"Made elsewhere, recovery {s['recovery']}, seed {run.seed}."
    else:
        of_scope = (summary["sparsity_of_scope"], asked["scope"], asked["allocation"])
        target, removed = (format_removed(*of_scope, digits=digits) for digits in (0, 2))
        title = f"{target} removed from {model_label(s['model']['name'])}"
        about = f"Pruned by {method}, importance {s['importance']}, recovery {s['recovery']}, seed {run.seed}."
    means = means_and_gaps(run.records)
    last = list(means)[-1]  # the main row, which a study may declare as a control
    return {
        "name": run.name,
        "title": title,
        "about": about,
        "summary": summary,
        "removed": removed,
        "dense": means["dense", "none"],
        "pruned": means[last],
        "ratios": ratios_to_base(run.records, last),
        "steps": run.steps,
        "result": result_table(run.records),
        "quality": quality_table({run.name: summary}),
        "figures": drawn(run_figures(run.records, run.modules, run.masks, summary), run.name) if run.masks else [],
        "curves": drawn(curve_figures(read_curves(run.path)), f"{run.name} curves"),
        "labels": corpus_labels(r["corpus"] for r in run.records),
        "settings": to_yaml({name: value for name, value in s.items() if name != "inputs"}),
        "cost": cost_table(run.steps),
        "environment": run.environment,
        "load": loading_code(str(model), stock=not any(model.glob("*.py"))) if model.is_dir() else "",
        "here": shlex.quote(str(run.path)),
        "folder": run.path.is_dir(),  # false for a record
    }


def ratios_to_base(records: Sequence[Record], row: Stage) -> dict[str, dict[str, float]]:
    """Return the ratios of a row to `base` by name: two for a recovered row, one for a row without recovery."""
    names = {UNRECOVERED: False} | ({} if row[1] == "none" else {SAME_RECOVERY: True})
    ratios = {name: unseen_ratios(records, same_recovery=same).get(row_name(*row)) for name, same in names.items()}
    return {name: ratio for name, ratio in ratios.items() if ratio is not None}


def drawn(figures: Mapping[str, Figure], name: str) -> list[tuple[str, Markup, bool]]:
    """Return (title, SVG, whether it is wide) for each figure."""
    broad = {title: figure.get_figwidth() > 2.2 * figure.get_figheight() for title, figure in figures.items()}
    return [(title, svg(figure, f"{name} {title}"), broad[title]) for title, figure in figures.items()]


@style()
def svg(figure: Figure, name: str) -> Markup:
    """Convert a figure to inline SVG with text elements, and with black, white and grey replaced by theme colours.

    Args:
        figure: the figure.
        name: unique name on the page, so that ids in the SVG of different figures differ.
    """
    out, nothing = io.StringIO(), dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with matplotlib.rc_context({"svg.hashsalt": name, "svg.fonttype": "none"}):
        figure.savefig(out, format="svg", transparent=True, metadata=nothing)
    text = re.sub('<g id="[^"]*"', "<g", out.getvalue())  # ids such as axes_1 would be repeated on the page
    text = re.sub("|".join(THEME), lambda match: THEME[match[0].lower()], text, flags=re.IGNORECASE)
    return Markup(text[text.index("<svg") :])
