"""Run the configurations of a list and tabulate the results, for `gprune study`.

After each configuration its numbers, masks and costs are written to the folder of records. A configuration with a
record is not run again, even for another list.
"""

from __future__ import annotations

import time
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import gprune
from gprune.benchmarks import measurement
from gprune.benchmarks.settings import SPEED
from gprune.config import ExportConfig, RunConfig
from gprune.console import process_index, write_stdout
from gprune.errors import UserError, optional_output
from gprune.evaluation.perplexity import rank_and_world_size
from gprune.pipeline.dry_run import estimated_flops
from gprune.pipeline.plan import Plan, check
from gprune.report.records import cost_table
from gprune.runs import schema
from gprune.runs.folder import RunFolder
from gprune.runs.results import PruningResult
from gprune.storage.cache import disk_errors
from gprune.storage.files import read_json, scratch_folder, write_json
from gprune.storage.reading import expanded
from gprune.studies.archive import dense_path, find_record, finished_record, learned_tokens, pack_masks, write_record
from gprune.studies.listing import Listing, Row, benchmarks_of, select_part
from gprune.studies.output import notes_of, title_of, write_results
from gprune.studies.result import StudyResult, describe_outdated, read_study, select_rows
from gprune.studies.tracking import log_study, wandb_beside_records, with_wandb_names


def run_lists(listings: Sequence[Listing], options: Namespace) -> None:
    """Run the rows of the lists that have no record, and print the results."""
    for listing in listings:
        rows = select_part(select_rows(listing, options.only, what="--only"), options.part)
        pending = [row for row in rows if finished_record(row) is None]
        if pending and not (options.table or options.files or options.commands):
            run_rows(pending)
        if process_index() == 0:  # Lightning may have started other processes with the same command
            print_results(read_study(listing, rows), options)


def run_rows(pending: Sequence[Row]) -> None:
    """Print the expected cost, run each row and its tasks, and print when its record is stored."""
    is_rank_0 = process_index() == 0
    for row in pending:
        row.check()
    if is_rank_0 and (outdated := describe_outdated(pending)):
        write_stdout(outdated + "\n")
    for row in pending:
        if is_rank_0:
            path, _ = find_record(row)
            with disk_errors(path), scratch_folder(path):  # raises if the folder of records cannot be written
                pass
        if row.tasks:
            measurement.check_tasks(benchmarks_of(row.tasks, trust_remote_code=row.config.model.trust_remote_code))
            if row.config.processes > 1:  # other processes would wait until torch's timeout
                raise UserError(f"Row '{row.name}' must have one process for tasks; got {row.config.processes}.")
    if is_rank_0:
        write_stdout(largest_costs(pending) + "\n")
    for row in pending:
        start = time.monotonic()
        folder_and_record = run_row(row)
        if rank_and_world_size()[1] > 1:  # all processes need the record for the next list
            torch.distributed.barrier()
        if is_rank_0:
            print_stored(row, start)
        if row.tasks:
            start = time.monotonic()
            measure_tasks(row, *folder_and_record)
            print_stored(row, start, "tasks ")


def largest_costs(pending: Sequence[Row]) -> str:
    """Return a line with the largest number of tokens and FLOPs of pending rows."""
    plans = [_plan_of(row) for row in pending]
    forward = sum(plan.forward_tokens for plan in plans)
    backward = sum(plan.forward_backward_tokens for plan in plans)
    tasks = ", tasks not counted" if any(row.tasks for row in pending) else ""
    return (
        f"{len(pending)} configurations: at most {forward:,} tokens forward and {backward:,} forward and backward, "
        f"without cached results{tasks}; at most {sum(map(estimated_flops, plans)):.2e} FLOP"
    )


def _plan_of(row: Row) -> Plan:
    """Check the settings and the models of a row, and return its plan."""
    if row.made_elsewhere is None:
        return check(row.config)
    from gprune.pipeline.elsewhere import check_models  # imports W&B, which tables of records do not need

    return check_models(row.made_elsewhere, row.config)


def _run_method(row: Row, cfg: RunConfig) -> PruningResult:
    """Prune, or measure or distil the model made elsewhere, with the configuration of a row."""
    if row.made_elsewhere is None:
        return gprune.prune(cfg)
    function = gprune.evaluate if cfg.recovery == "none" else gprune.recover
    return function(row.made_elsewhere, cfg.model.name, cfg)


def run_row(row: Row) -> tuple[Path, dict[str, Any]]:
    """Run one configuration and store its record.

    Tasks and their results in an existing record are kept.
    """
    cfg = with_wandb_names(row)
    if row.tasks and cfg.recovery != "none":
        cfg = _with_exported_model(cfg)
    # A record exists if another list has this row with other tasks, or without masks.
    existing = find_record(row, checked=True)[1] or {"masks": None}
    with wandb_beside_records(row):
        result = _run_method(row, cfg)
    if process_index() != 0:
        return result.path, {}
    manifest = RunFolder(result.path).manifest
    derived = ("geometric_means", "unseen_over_base_same_recovery")  # can be computed from the records
    summary = {name: value for name, value in result.summary.items() if name not in derived}
    keeps_masks = result.masks and (row.masks or existing["masks"])
    record = {
        "name": row.name,
        "settings": row.identity,
        "inputs": manifest["settings"]["inputs"],
        "environment": manifest["environment"],
        "steps": manifest["steps"],
        "summary": summary | {"learned_tokens": learned_tokens(manifest)},
        "learning": manifest.get("learning"),
        "masks": pack_masks(result.masks) if keeps_masks else None,
        "records": [round_window_nll(r) for r in result.records],
    }
    record |= {name: existing[name] for name in ("tasks", "evaluation") if name in existing}
    write_record(find_record(row, checked=True)[0], record)
    return result.path, record


def _with_exported_model(cfg: RunConfig) -> RunConfig:
    """Return the configuration with an exported model, because tasks need the recovered weights, not only masks.

    With a target in bytes, which depends on the export, dtype and GGUF export are kept.
    """
    export = cfg.export
    if cfg.sparsity.currency != "bytes":
        export = ExportConfig(format="hf", dtype=cfg.model.dtype)
    elif export.format != "gguf":
        export = ExportConfig(format="hf", dtype=export.dtype)
    return cfg.model_copy(update={"export": export})


def print_results(study: StudyResult, options: Namespace) -> None:
    """Print the results of a list, write its output file and figures, and log them to W&B."""
    listing, done = study.listing, study.done
    if options.commands:
        write_stdout("\n" + "\n\n".join(f"# {row.name}, seed {row.seed}\n{row.command}" for row in study.rows) + "\n")
    if options.files:
        write_stdout(f"\n{study.files().for_stdout()}\n")
    if (options.files or options.commands) and not (options.table or options.output):
        return
    if not done:
        if options.output:
            raise UserError(f"--output {options.output} needs a list with records; {listing.path} has none yet.")
        lines = [f"{listing.path}: no records yet.", describe_outdated(study.rows)]
        write_stdout("\n" + "\n".join(filter(None, lines)) + "\n")
        return
    report, tables = study.report, study.tables
    paragraphs = [f"**{title_of(study)}**", *(table.for_stdout() for table in tables), *notes_of(study)]
    write_stdout("\n" + "\n\n".join(paragraphs) + "\n")
    if options.output:
        write_results(study, expanded(options.output))
        write_stdout(f"\nWrote {options.output}.\n")
    if options.costs:
        costs = {}
        for row, record in done:
            costs |= {f"{row.name}, seed {row.seed}: {step}": cost for step, cost in record["steps"].items()}
        write_stdout("\n" + cost_table(costs).for_stdout() + "\n")
    if options.figures:
        report.draw(Path(options.figures), prefix=f"{listing.path.stem}-")
    if options.table:
        return
    with optional_output("some runs to W&B", "the same command logs them"):
        if (folder := log_study(done)) is not None:
            write_stdout(f"\nW&B: `wandb leet {folder}` shows these rows together.\n")


def print_stored(row: Row, start: float, what: str = "") -> None:
    """Print the seconds since the start of a row or of its tasks, and that the record is stored."""
    write_stdout(f"{row.name}, seed {row.seed}: {what}{time.monotonic() - start:.0f} s, stored\n")


def measure_tasks(row: Row, folder: Path, record: dict[str, Any]) -> dict[str, Any]:
    """Measure the tasks of a list on a finished run, store them in its record, and return the record.

    Results of the dense model are stored once for all rows, by its fingerprint. With the task `speed`, the dense model
    is measured again in alternation with each row's model.
    """
    benchmarks = benchmarks_of(row.tasks, trust_remote_code=row.config.model.trust_remote_code)
    dense_file = dense_path(row, record["inputs"]["model"])
    with_speed = SPEED in benchmarks.tasks
    with wandb_beside_records(row):
        if not with_speed:
            dense_results = read_json(dense_file, check=schema.check_evaluation) or {}
            if not dense_results.get("records"):
                measured, _ = measurement.evaluate(str(folder), benchmarks, dense=True, pruned=False)
                # Stored at once, because the tasks of the pruned model take long.
                write_json(dense_file, {"records": list(map(round_window_nll, measured))})
        measured, _ = measurement.evaluate(str(folder), benchmarks, dense=with_speed)
    record = record | {"tasks": row.tasks, "evaluation": list(map(round_window_nll, measured))}
    # Looked up again, because another list may have written its tasks.
    write_record(find_record(row, checked=True)[0], record)
    return record


def round_window_nll(record: dict[str, Any]) -> dict[str, Any]:
    """Round the nll of windows, if the record has them, to four decimal places."""
    if "window_nll" not in record:
        return record
    return record | {"window_nll": [round(nll, 4) for nll in record["window_nll"]]}
