"""After step 10: summary, model card, figures, trackers and the page of a run."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from gprune.errors import optional_output
from gprune.evaluation import speed
from gprune.method.experts import experts_entry
from gprune.method.quality import quality_entry
from gprune.method.run import Run
from gprune.method.says import says_entry
from gprune.models.masks import Masks
from gprune.models.surgery import widths
from gprune.partition.modules import Modules
from gprune.report.card import write_card
from gprune.report.page import Report, write_report
from gprune.report.tables import entry_tables
from gprune.runs import tracking
from gprune.runs.numbers import entries, keyed
from gprune.runs.results import FinishedRun
from gprune.runs.trainer import matmul_precision
from gprune.storage.files import write_json

log = logging.getLogger("gprune")


def summarise(
    run: Run, records: Sequence[dict[str, Any]], masks: Masks, pruned: PreTrainedModel, modules: Modules | None
) -> dict[str, Any]:
    """Compute the summary of a run; write it to manifest, metrics.json, model card, figures, trackers and page."""
    summary = sizes(run, masks, pruned)
    if "experts" in run.cfg.sparsity.scope:
        summary |= experts_entry(run, masks)
    if run.cfg.sparsity.currency == "seconds":
        summary |= speed_entry(run, masks, pruned)
    if run.cfg.searches_quality:
        summary |= quality_entry(run, records, masks, summary["parameters_after"])
    for entry in entries(summary).values():
        log.info("%s", entry["said"])
        for warning in entry.get("warnings", ()):
            log.warning("%s", warning)
    for table in entry_tables({run.folder.path.name: summary}):
        log.info("%s:\n\n%s\n", table.title, table.for_stdout())
    summary |= says_entry(run.folder.manifest)  # the command prints it at its end
    if stopped := run.folder.manifest.get("stopped"):
        summary["stopped"] = stopped  # stages that a callback stopped early
    run.folder.update_manifest(summary=summary, widths=widths(pruned))
    manifest = run.folder.manifest
    report = Report([
        FinishedRun(
            run.folder.path, run.folder.path.name, manifest["settings"], list(records), summary, masks, modules,
            steps=manifest["steps"], environment=manifest.get("environment") or {},
        )
    ])  # fmt: skip
    for logger in run.loggers:
        logger.save()  # writes curves that are still in memory
    remedy = f"`gprune report {run.folder.path}` writes"
    with optional_output("the model card", f"{remedy} it"):
        write_card(run.folder, run.cfg, report.runs[0])
    with optional_output("figures", f"{remedy} them"):
        write_figures(report, run.folder.path)
    with optional_output("results to the trackers", "metrics.json has them"):
        tracking.log_numbers(run.loggers, report.frame)
        figures = sorted((run.folder / "figures").glob("*.png"))
        tracking.log_pictures(run.loggers, figures, report.to_markdown())
    # Written last, because a run with a summary and all stages in metrics.json is finished and is not logged again.
    write_json(run.folder / "metrics.json", {"summary": summary, "records": list(records)})
    metadata = {name: value for name, value in keyed(report.frame).items() if name.startswith("final/")}
    with optional_output("artifacts", "the run folder has their content"):
        tracking.log_artifacts(run.loggers, run.folder.path, run.cfg, metadata)
    with optional_output("report.html", f"{remedy} it"):
        write_page(report, run.folder.path)
    return summary


def sizes(run: Run, masks: Masks, pruned: PreTrainedModel) -> dict[str, Any]:
    """Return the part of the summary with sizes and tokens; arguments as for `summarise`."""
    before, after = run.model.num_parameters(), pruned.num_parameters()
    return {
        "sparsity_of_scope": run.budget.parameters_removed_by(masks) / run.budget.total_parameters,
        "sparsity_of_model": 1 - after / before,
        "parameters_before": before,
        "parameters_after": after,
        "learned_tokens": sum(run.folder.manifest.get("learned_tokens", {}).values()),
        **run.folder.total_tokens(),
    }


def speed_entry(run: Run, masks: Masks, pruned: PreTrainedModel) -> dict[str, Any]:
    """Return the entry `speed` of the summary: the speed of the pruned model, and the latency table.

    Dense and pruned model are measured in alternation.
    """
    if (measured_earlier := run.folder.manifest.get("summary", {}).get("speed")) is not None:
        return {"speed": measured_earlier}
    dense_cost = run.budget.model  # in units of time
    with matmul_precision(run.cfg.trainer.float32_matmul_precision):  # in which the table was measured
        seconds = speed.time_generation([run.model, pruned])
    speeds = {
        "asked": dense_cost / (dense_cost - run.budget.target),
        "predicted": dense_cost / (dense_cost - run.budget.removed_by(masks)),
        "got": seconds[0] / seconds[1],
    }
    numbers = ", ".join(f"{name} {ratio:.2f}x" for name, ratio in speeds.items())
    device = speed.describe_device(run.model.device)
    setting = f"prompt of {speed.PROMPT} tokens, {speed.GENERATE} generated, {device}"
    said = f"Speed: {numbers} of dense ({setting})."
    table = run.plan.pricing.latency_table
    return {"speed": speeds | {"said": said, "numbers": speeds, "seconds": seconds, "latency": table}}


def write_figures(report: Report, folder: Path) -> None:
    """Write the figures of a run."""
    report.draw(folder / "figures")


def write_page(report: Report, folder: Path) -> None:
    """Write `report.html` of a run."""
    write_report(report, folder / "report.html")
