"""After step 10: summary, model card, figures, trackers and the page of a run."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedModel

from gprune.errors import optional_output
from gprune.evaluation.tolerance import tolerated_shares
from gprune.features import attribute
from gprune.models.masks import Masks
from gprune.models.surgery import widths
from gprune.partition.modules import Modules
from gprune.pipeline.quality import quality_reached
from gprune.pipeline.run import Run
from gprune.report import html, page
from gprune.report.model_card import write_card
from gprune.report.records import quality_table, result_table
from gprune.report.run_figures import write_figures
from gprune.runs import tracking
from gprune.runs.numbers import number_frame, run_numbers, to_estimate
from gprune.runs.trainer import matmul_precision
from gprune.storage.files import write_json

log = logging.getLogger("gprune")
MEANS = ("seen", "unseen", "gap", "unseen_kl", "unseen_agreement")  # of each row in the summary; None if undefined


def summarise(
    run: Run, records: Sequence[dict[str, Any]], masks: Masks | None, pruned: PreTrainedModel, modules: Modules | None
) -> dict[str, Any]:
    """Compute the summary of a run, and write it to manifest, metrics.json, model card, figures and trackers."""
    summary = sizes_and_perplexity(run, records, masks, pruned)
    with matmul_precision(run.cfg.trainer.float32_matmul_precision):  # in which prices were measured
        for feature in run.cfg.features:
            summary |= attribute(feature, "summary")(run, masks, pruned)
            for entry in (summary[name] for name in attribute(feature, "reports") if name in summary):
                log.info("%s", entry["said"])
    if run.cfg.sparsity.quality:
        summary["quality"] = quality_reached(run, records)
        log.info("%s", summary["quality"]["said"])
        for warning in summary["quality"]["warnings"]:
            log.warning("%s", warning)
        table = quality_table({run.folder.path.name: summary})
        log.info("%s:\n\n%s\n", table.title, table.for_stdout())
    curve = run.folder.manifest.get("learning", {}).get("development_perplexity_by_sparsity") or {}
    if tolerated := tolerated_shares(curve, run.cfg.sparsity.scope, recovered=run.cfg.recovery != "none"):
        summary["tolerated"] = tolerated
        log.info("%s", tolerated["said"])
    if stopped := run.folder.manifest.get("stopped"):
        summary["stopped"] = stopped  # stages that a callback stopped early
    block_widths = {} if masks is None else {"widths": widths(pruned)}
    run.folder.update_manifest(summary=summary, **block_widths)
    remedy = f"`gprune report {run.folder.path}` writes"
    with optional_output("the model card", f"{remedy} it"):
        write_card(run.folder, run.cfg, records)
    with optional_output("figures", f"{remedy} them"):
        write_figures(run.folder / "figures", records, modules, masks, summary)
    main_row = records[-1]["stage"], records[-1]["recovery"]
    numbers = run_numbers(records, summary, run.folder.manifest["steps"], main_row)
    with optional_output("results to the trackers", "metrics.json has them"):
        tracking.log_numbers(run.loggers, numbers)
        figures = sorted((run.folder / "figures").glob("*.png"))
        tracking.log_pictures(run.loggers, figures, "\n\n".join(results_as_markdown(run, records, summary)))
    # Written last, because a run with a summary and all rows in metrics.json is finished and is not logged again.
    write_json(run.folder / "metrics.json", {"summary": summary, "records": list(records)}, run=run.folder.key)
    metadata = {name: value for name, value in numbers.items() if name.startswith(("final/", "sparsity_of"))}
    with optional_output("artifacts", "the run folder has their content"):
        tracking.log_artifacts(run.loggers, run.folder.path, run.cfg, metadata)
    return summary


def sizes_and_perplexity(
    run: Run, records: Sequence[dict[str, Any]], masks: Masks | None, pruned: PreTrainedModel
) -> dict[str, Any]:
    """Return the part of the summary with sizes, tokens and mean perplexities; arguments as for `summarise`."""
    before, after = run.model.num_parameters(), pruned.num_parameters()
    summary = {}
    if masks is not None:
        units = run.budget.costs.in_parameters
        summary["sparsity_of_scope"] = units.removed(masks) / units.total
    numbers = number_frame(records, base=records)
    means: dict[str, dict[str, float | None]] = {row: dict.fromkeys(MEANS) for row in numbers["row"].unique()}
    ratios = {}
    for line in numbers.itertuples():
        if line.number in MEANS:
            means[line.row][line.number] = line.value
        if line.number == "unseen_over_base_same_recovery":
            ratio = to_estimate(line.value, line.low, line.high)
            ratios[line.row] = {"ratio": ratio.value, "low": ratio.low, "high": ratio.high}
    return summary | {
        "sparsity_of_model": 1 - after / before,
        "parameters_before": before,
        "parameters_after": after,
        "geometric_means": means,
        "unseen_over_base_same_recovery": ratios,
        **run.folder.total_tokens(),
    }


def results_as_markdown(run: Run, records: Sequence[dict[str, Any]], summary: Mapping[str, Any]) -> list[str]:
    """Return paragraphs in Markdown: the result table, and for a quality target sentences and a table."""
    paragraphs = [result_table(records).to_markdown()]
    for name in ("quality", "tolerated"):
        if name in summary:
            paragraphs += [summary[name]["said"], *summary[name].get("warnings", ())]
    quality = quality_table({run.folder.path.name: summary})
    if quality.rows:
        paragraphs.append(quality.to_markdown())
    return paragraphs


def write_pages(run: Run) -> None:
    """Write `report.html` from the files in the run folder."""
    for logger in run.loggers:
        logger.save()  # writes curves that are still in memory
    html.write_report(page.make([run.folder.path]), run.folder / "report.html")
