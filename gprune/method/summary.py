"""After step 10: summary, model card, figures, trackers and the page of a run."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedModel

from gprune.errors import optional_output
from gprune.features import attribute
from gprune.method.quality_summary import quality_reached
from gprune.method.run import Run
from gprune.models.masks import Masks
from gprune.models.surgery import widths
from gprune.partition.modules import Modules
from gprune.report.card import write_card
from gprune.report.figures import write_figures
from gprune.report.page import make, write_report
from gprune.report.tables import entry_tables, result_table
from gprune.runs import tracking
from gprune.runs.numbers import entries, number_frame, run_numbers
from gprune.runs.trainer import matmul_precision
from gprune.storage.files import write_json

log = logging.getLogger("gprune")
MEANS = ("seen", "unseen", "gap", "unseen_kl", "unseen_agreement")  # of each stage in the summary; None if undefined


def summarise(
    run: Run, records: Sequence[dict[str, Any]], masks: Masks, pruned: PreTrainedModel, modules: Modules | None
) -> dict[str, Any]:
    """Compute the summary of a run; write it to manifest, metrics.json, model card, figures, trackers and page."""
    summary = sizes_and_perplexity(run, records, masks, pruned)
    with matmul_precision(run.cfg.trainer.float32_matmul_precision):  # in which prices were measured
        for feature in run.cfg.features:
            summary |= attribute(feature, "summary")(run, masks, pruned)
    if run.cfg.trials:  # the target is a quality
        summary |= quality_reached(run, records)
    for entry in entries(summary).values():
        log.info("%s", entry["said"])
        for warning in entry.get("warnings", ()):
            log.warning("%s", warning)
    for table in entry_tables({run.folder.path.name: summary}):
        log.info("%s:\n\n%s\n", table.title, table.for_stdout())
    if stopped := run.folder.manifest.get("stopped"):
        summary["stopped"] = stopped  # stages that a callback stopped early
    run.folder.update_manifest(summary=summary, widths=widths(pruned))
    remedy = f"`gprune report {run.folder.path}` writes"
    with optional_output("the model card", f"{remedy} it"):
        write_card(run.folder, run.cfg, records)
    with optional_output("figures", f"{remedy} them"):
        write_figures(run.folder / "figures", records, modules, masks, summary)
    numbers = run_numbers(records, summary, run.folder.manifest["steps"])
    with optional_output("results to the trackers", "metrics.json has them"):
        tracking.log_numbers(run.loggers, numbers)
        figures = sorted((run.folder / "figures").glob("*.png"))
        tracking.log_pictures(run.loggers, figures, "\n\n".join(results_as_markdown(run, records, summary)))
    # Written last, because a run with a summary and all rows in metrics.json is finished and is not logged again.
    write_json(run.folder / "metrics.json", {"summary": summary, "records": list(records)}, run=run.folder.key)
    metadata = {name: value for name, value in numbers.items() if name.startswith(("final/", "sparsity_of"))}
    with optional_output("artifacts", "the run folder has their content"):
        tracking.log_artifacts(run.loggers, run.folder.path, run.cfg, metadata)
    with optional_output("report.html", f"{remedy} it"):
        write_pages(run)
    return summary


def sizes_and_perplexity(
    run: Run, records: Sequence[dict[str, Any]], masks: Masks, pruned: PreTrainedModel
) -> dict[str, Any]:
    """Return the part of the summary with sizes, tokens and mean perplexities; arguments as for `summarise`."""
    before, after = run.model.num_parameters(), pruned.num_parameters()
    numbers = number_frame(records)
    means: dict[str, dict[str, float | None]] = {stage: dict.fromkeys(MEANS) for stage in numbers["stage"].unique()}
    for line in numbers.itertuples():
        if line.number in MEANS:
            means[line.stage][line.number] = line.value
    return {
        "sparsity_of_scope": run.budget.parameters_removed_by(masks) / run.budget.total_parameters,
        "sparsity_of_model": 1 - after / before,
        "parameters_before": before,
        "parameters_after": after,
        "geometric_means": means,
        **run.folder.total_tokens(),
    }


def results_as_markdown(run: Run, records: Sequence[dict[str, Any]], summary: Mapping[str, Any]) -> list[str]:
    """Return paragraphs in Markdown: the result table, and the sentences and tables of the entries of the summary."""
    paragraphs = [result_table(records).to_markdown()]
    for entry in entries(summary).values():
        paragraphs += [entry["said"], *entry.get("warnings", ())]
    return [*paragraphs, *(table.to_markdown() for table in entry_tables({run.folder.path.name: summary}))]


def write_pages(run: Run) -> None:
    """Write `report.html` from the files in the run folder."""
    for logger in run.loggers:
        logger.save()  # writes curves that are still in memory
    write_report(make([run.folder.path]), run.folder / "report.html")
