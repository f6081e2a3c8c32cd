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
from gprune.config import ExportConfig
from gprune.console import process_index, write_stdout
from gprune.errors import UserError, optional_output
from gprune.evaluation.perplexity import rank_and_world_size
from gprune.pipeline.dry_run import compute_time
from gprune.pipeline.plan import check
from gprune.report.records import cost_table
from gprune.runs import schema
from gprune.runs.folder import RunFolder
from gprune.storage.cache import disk_errors
from gprune.storage.files import read_json, scratch_folder, write_json
from gprune.storage.reading import expanded
from gprune.studies.archive import dense_path, find_record, finished_record, learned_tokens, packed, write_record
from gprune.studies.listing import Listing, Row, asked_of, select_part
from gprune.studies.output import notes_of, title_of, write_results
from gprune.studies.result import StudyResult, chosen, of_listing
from gprune.studies.tracking import beside_records, log, named


def work(options: Namespace) -> None:
    """Run the rows of the lists and print the results. `options` are the parsed arguments of `gprune study`."""
    for path in options.lists:
        listing = Listing.read(path, seeds=options.seeds, flags=options.flags, records=options.records)
        rows = select_part(chosen(listing, options.only, what="--only"), options.part)
        pending = [row for row in rows if finished_record(row) is None]
        if pending and not (options.table or options.files):
            run_all(pending)
        if process_index() == 0:  # Lightning may have started other processes with the same command
            finish(of_listing(listing, rows), options)


def run_all(pending: Sequence[Row]) -> None:
    """Print the expected cost, run each row and its tasks, and print when its record is stored.

    Raises:
        UserError: before anything runs, if a record could not be written or a row is invalid.
    """
    first = process_index() == 0
    for row in pending:
        if first:
            with disk_errors(path := find_record(row)[0]), scratch_folder(path):
                pass
        if row.tasks:
            measurement.check_tasks(asked_of(row.tasks, trust_remote_code=row.config.model.trust_remote_code))
            if row.config.processes > 1:  # other processes would wait until torch's timeout
                raise UserError(f"Row '{row.name}' must have one process for tasks; got {row.config.processes}.")
    if first:
        write_stdout(token_hours(pending) + "\n")
    for row in pending:
        started = time.monotonic()
        finished = run(row)
        if rank_and_world_size()[1] > 1:  # all processes need the record for the next list
            torch.distributed.barrier()
        if first:
            print_stored(row, started)
        if row.tasks:
            started = time.monotonic()
            measure_tasks(row, *finished)
            print_stored(row, started, "tasks ")


def token_hours(pending: Sequence[Row]) -> str:
    """Describe the upper bound of tokens of pending rows, and the expected time on this machine."""
    plans = [check(row.config) for row in pending]
    forward, backward = sum(p.forward_tokens for p in plans), sum(p.forward_backward_tokens for p in plans)
    tasks = ", tasks not counted" if any(row.tasks for row in pending) else ""
    return (
        f"{len(pending)} configurations: at most {forward:,} tokens forward and {backward:,} forward and backward, "
        f"without cached results{tasks}; {compute_time(*plans)}"
    )


def run(row: Row) -> tuple[Path, dict[str, Any]]:
    """Run one configuration and store its record.

    Returns:
        The run's folder and the record, which is empty on ranks other than 0.
    """
    cfg = named(row)
    before = find_record(row)[1] or {"masks": None}  # written for another list with other tasks or masks
    if row.tasks and cfg.recovery != "none":  # tasks need the recovered weights, not only masks
        own, of_bytes = cfg.export, cfg.sparsity.currency == "bytes"  # a target in bytes depends on the export
        hf = ExportConfig(format="hf", dtype=own.dtype if of_bytes else cfg.model.dtype)
        cfg = cfg.model_copy(update={"export": own if of_bytes and own.format == "gguf" else hf})
    with beside_records(row):
        result = gprune.prune(cfg)
    if process_index() != 0:
        return result.path, {}
    manifest = RunFolder(result.path).manifest
    derived = ("geometric_means", "unseen_over_base_same_recovery")  # can be computed from the records
    summary = {k: v for k, v in result.summary.items() if k not in derived}
    record = {
        "name": row.name,
        "settings": cfg.settings(),
        "inputs": manifest["settings"]["inputs"],
        "environment": manifest["environment"],
        "steps": manifest["steps"],
        "summary": summary | {"learned_tokens": learned_tokens(manifest["steps"])},
        "learning": manifest.get("learning"),
        "masks": packed(result.masks) if result.masks and (row.masks or before["masks"]) else None,
        "records": [rounded(r) for r in result.records],
    }
    record |= {name: before[name] for name in ("tasks", "evaluation") if name in before}
    write_record(find_record(row)[0], record)
    return result.path, record


def finish(study: StudyResult, options: Namespace) -> None:
    """Print tables, and write the output file and figures of a list."""
    listing, done = study.listing, study.done
    if options.files:
        write_stdout(f"\n{study.files().shown()}\n")
    if not done:
        if options.output:
            raise UserError(f"--output {options.output} needs a list with records; {listing.path} has none yet.")
        write_stdout(f"\n{listing.path}: no records yet.\n")
        return
    if options.files and not (options.table or options.output):
        return
    report, tables = study.report, study.tables
    write_stdout("\n" + "\n\n".join([f"**{title_of(study)}**", *(t.shown() for t in tables), *notes_of(study)]) + "\n")
    if options.output:
        write_results(study, expanded(options.output))
        write_stdout(f"\nWrote {options.output}.\n")
    if options.costs:
        steps = {f"{row.name}, seed {row.seed}: {step}": used for row, r in done for step, used in r["steps"].items()}
        write_stdout("\n" + cost_table(steps).shown() + "\n")
    if options.figures:
        report.draw(Path(options.figures), prefix=f"{listing.path.stem}-")
    if options.table:
        return
    with optional_output("some runs to W&B", "the same command logs them"):
        if (folder := log(listing, done, options.flags, report, tables)) is not None:
            write_stdout(f"\nW&B: `wandb leet {folder}` shows these rows together.\n")


def print_stored(row: Row, started: float, what: str = "") -> None:
    """Print how many seconds a row, or its tasks, took, and that the record is stored."""
    write_stdout(f"{row.name}, seed {row.seed}: {what}{time.monotonic() - started:.0f} s, stored\n")


def measure_tasks(row: Row, folder: Path, record: dict[str, Any]) -> dict[str, Any]:
    """Measure the tasks of a list on a finished run, store them in its record, and return the record.

    Results of the dense model are stored once for all rows, by its fingerprint. With the task `speed`, the dense model
    is measured again in alternation with each row's model.
    """
    asked = asked_of(row.tasks, trust_remote_code=row.config.model.trust_remote_code)
    shared = dense_path(row, record["inputs"]["model"])
    beside = SPEED in asked.tasks
    with beside_records(row):
        if not beside and not (read_json(shared, check=schema.Evaluation.problem) or {}).get("records"):
            measured, _ = measurement.evaluate(str(folder), asked, dense=True, pruned=False)
            write_json(shared, {"records": list(map(rounded, measured))})  # stored before the rest, which is slow
        measured, _ = measurement.evaluate(str(folder), asked, dense=beside)
    record = record | {"tasks": row.tasks, "evaluation": list(map(rounded, measured))}
    write_record(find_record(row)[0], record)  # looked up again, because another list may have written its tasks
    return record


def rounded(record: dict[str, Any]) -> dict[str, Any]:
    """Round the nll of windows in a record, if there are any, to four digits."""
    if "window_nll" not in record:
        return record
    return record | {"window_nll": [round(v, 4) for v in record["window_nll"]]}
