"""HTML page of one or several runs, in one file without external resources."""

from __future__ import annotations

import io
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure

from gprune.config.elsewhere import made_elsewhere
from gprune.models.embedded import model_label
from gprune.report.curves import curve_figures, read_curves
from gprune.report.model_card import RESULTS, loading_code, write_card
from gprune.report.records import cost_table
from gprune.report.run_figures import run_figures, write_figures
from gprune.report.style import style
from gprune.runs.folder import RunFolder
from gprune.runs.results import FinishedRun, config_of
from gprune.sparsity.allocation import format_removed
from gprune.storage.files import replacing
from gprune.storage.reading import expanded
from gprune.storage.yaml_text import to_yaml

if TYPE_CHECKING:
    from gprune.report.page import Report

# Colours of figures -> CSS of the page's theme (light or dark).
THEME = {"#000000": "currentColor", "#ffffff": "var(--paper)", "#dddddd": "var(--line)", "#555555": "var(--soft)"}
CAPTIONS = {
    "perplexity": "Perplexity by corpus and row.",
    "heterogeneity": "How far the ranks of each module's neurons drift between corpora, and how far corpora agree.",
    "sparsity": "Share of the neurons that each block, and each of its modules, loses.",
    "speed": "Milliseconds of all blocks by what each keeps, measured on random weights.",
    "ratios": "Unseen perplexity of each row over that of base; the axis names which base.",
    "learning": "Each run's own model over the tokens that it has learned from; losses are running means.",
}
WIDE = 2.2  # width / height of a figure above which it is shown in the full width of the page


def write_report(report: Report, path: Path | str) -> Path:
    """Write the page of a report atomically, and return its path."""
    path = expanded(path)
    with replacing(path) as temporary:
        temporary.write_text(render(report), encoding="utf-8")
    return path


def write_missing(report: Report) -> None:
    """Write those of figures, model card and HTML page that are missing from a run's folder."""
    (run,) = report.runs
    if not any(run.path.glob("figures/*.png")):
        write_figures(run.path / "figures", run.records, run.modules, run.masks, run.summary)
    card = run.path / "model/README.md"
    if card.is_file() and RESULTS not in card.read_text(encoding="utf-8"):
        write_card(RunFolder(run.path), config_of(run), run.records)
    if not (run.path / "report.html").exists():
        write_report(report, run.path / "report.html")


def render(report: Report) -> str:
    """Render a report as HTML: tables and figures of all runs, and a section for each run."""
    templates = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    has_several_runs = len(report.runs) > 1
    sections = [run_section(run) for run in report.named_runs]
    return templates.get_template("page.html").render(
        title=report.title if has_several_runs else sections[0]["title"],
        tables=report.nonempty_tables,
        figures=render_figures(report.figures(), "all") if has_several_runs else [],
        lines=[*report.sentences(), *report.protocols()],
        runs=sections,
    )


def run_section(run: FinishedRun) -> dict[str, Any]:
    """Return the values for a run's section of the template `page.html`."""
    model = run.path / "model"
    title, about = _describe_run(run)
    figures = run_figures(run.records, run.modules, run.masks, run.summary) if run.masks else {}
    settings = {name: value for name, value in run.settings.items() if name not in ("inputs", "code")}
    return {
        "name": run.name,
        "title": title,
        "about": about,
        "figures": render_figures(figures, run.name),
        "curves": render_figures(curve_figures(read_curves(run.path)), f"{run.name} curves"),
        "settings": to_yaml(settings),
        "cost": cost_table(run.steps),
        "environment": run.environment,
        "load": loading_code(model) if model.is_dir() else "",
        "here": shlex.quote(str(run.path)),
        "folder": run.path.is_dir(),  # false for a record
    }


def _describe_run(run: FinishedRun) -> tuple[str, list[str]]:
    """Return the title of a run, and sentences on its method, sizes and cost."""
    settings, summary = run.settings, run.summary
    label = model_label(settings["model"]["name"])
    other = made_elsewhere(settings)
    seconds = sum(step.get("seconds", 0) for step in run.steps.values())
    cost = (
        f"{summary['sparsity_of_model']:.1%} of the model removed: {summary['parameters_after']:,} of "
        f"{summary['parameters_before']:,} parameters are left. Cost: {summary['forward_tokens']:,} tokens forward, "
        f"{summary['forward_backward_tokens']:,} forward and backward, {seconds:,.0f} seconds of all steps."
    )
    if other is not None:
        about = f"Made elsewhere, recovery {settings['recovery']}, seed {run.seed}."
        return f"{model_label(other)} beside {label}", [about, cost]
    sparsity = summary["sparsity_of_scope"], settings["sparsity"]["scope"], settings["sparsity"]["allocation"]
    method = "gprune" if settings["gprune"] else "the base metric alone"
    importance, recovery = settings["importance"], settings["recovery"]
    about = (
        f"{format_removed(*sparsity, digits=2)} removed by {method}, importance {importance}, recovery {recovery}, "
        f"seed {run.seed}."
    )
    return f"{format_removed(*sparsity, digits=0)} removed from {label}", [about, cost]


def render_figures(figures: Mapping[str, Figure], name: str) -> list[tuple[str, Markup, bool]]:
    """Return (caption, SVG, whether it needs the full width of the page) for each figure."""
    rendered = []
    for title, figure in figures.items():
        is_wide = figure.get_figwidth() > WIDE * figure.get_figheight()
        rendered.append((CAPTIONS.get(title, title), figure_to_svg(figure, f"{name} {title}"), is_wide))
    return rendered


@style()
def figure_to_svg(figure: Figure, name: str) -> Markup:
    """Convert a figure to inline SVG with text elements, and with black, white and grey replaced by theme colours."""
    file = io.StringIO()
    no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with matplotlib.rc_context({"svg.hashsalt": name, "svg.fonttype": "none"}):
        figure.savefig(file, format="svg", transparent=True, metadata=no_metadata)
    text = re.sub('<g id="[^"]*"', "<g", file.getvalue())  # ids such as axes_1 would be repeated on the page
    text = re.sub("|".join(THEME), lambda match: THEME[match[0].lower()], text, flags=re.IGNORECASE)
    return Markup(text[text.index("<svg") :])
