"""Run the configurations of a list and tabulate the results, for `gprune study`.

After each configuration its numbers, masks and costs are written to its record. A row with a record is not run again.

In W&B each row is a run, named after the row and in the group of its list. The W&B folders of all runs are in
`<records>/<list>/wandb/`, so that `wandb leet` shows them together. A folder's name ends in the id of its run, so that
nothing is logged twice.
"""

from __future__ import annotations

import os
import time
from argparse import Namespace
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import gprune
from gprune.benchmarks import measurement
from gprune.benchmarks.settings import Benchmarks
from gprune.config import ExportConfig, RunConfig
from gprune.console import process_index, write_stdout
from gprune.errors import UserError, optional_output
from gprune.evaluation.perplexity import rank_and_world_size
from gprune.method.plan import Plan, make_plan
from gprune.models.embedded import model_label
from gprune.report.tables import cost_table
from gprune.runs.folder import RunFolder
from gprune.runs.numbers import Record, keyed
from gprune.storage.environment import environment
from gprune.storage.files import key_of, scratch_folder
from gprune.storage.paths import disk_errors, expanded
from gprune.studies.archive import (
    dense_tasks_file,
    find_record,
    pack_masks,
    read_task_records,
    row_to_run,
    why_not_run,
    write_record,
    write_task_records,
)
from gprune.studies.listing import LISTS, OTHER_RECORDS, Listing, Row, select_part
from gprune.studies.study import (
    FinishedRows,
    StudyResult,
    notes_of,
    read_study,
    select_rows,
    title_of,
    write_results,
)


def run_lists(listings: Sequence[Listing], options: Namespace) -> None:
    """Run the rows of the lists that have no record, and print the results."""
    for listing in listings:
        rows = select_part(select_rows(listing, options.only, what="--only"), options.part)
        found = map(find_record, rows)
        pending = [f.row for f in found if f.finished is None and (options.again or not f.problem)]
        if pending and not (options.table or options.files or options.commands):
            run_rows(pending, len(rows))
        if process_index() == 0:  # Lightning may have started other processes with the same command
            print_results(read_study(listing, rows), options)


def run_rows(pending: Sequence[Row], num_rows: int) -> None:
    """Print the expected cost, run each row and its tasks, and print when its record is stored.

    The rows are numbered among all `num_rows` rows of the list, of which the others are not run.
    """
    is_rank_0 = process_index() == 0
    for row in pending:
        if reason := why_not_run(row):
            raise UserError(reason)
        row.check()
    if is_rank_0:
        with disk_errors(pending[0].file), scratch_folder(pending[0].file):  # raises if the folder cannot be written
            pass
    for row in pending:
        if row.tasks:
            if row.config.processes > 1:  # other processes would wait until torch's timeout
                raise UserError(f"Row '{row.name}' must have one process for tasks; got {row.config.processes}.")
            measurement.check_tasks(row.benchmarks, rows=row is pending[0])
    if is_rank_0:
        write_stdout(largest_costs(pending) + "\n")
    started = time.monotonic()
    for done, row in enumerate(pending):
        start = time.monotonic()
        if is_rank_0:
            place = f"row {num_rows - len(pending) + done + 1} of {num_rows}"
            write_stdout(f"{place}: {row.name}, seed {row.seed}{time_left(started, done, pending)}\n")
        folder_and_record = run_row(row, needs_of_list(row.config, pending[done:]))
        if rank_and_world_size()[1] > 1:  # all processes need the record for the next list
            torch.distributed.barrier()
        if is_rank_0:
            print_stored(row, start)
        if row.tasks:
            start = time.monotonic()
            measure_tasks(row, *folder_and_record)
            print_stored(row, start, "tasks ")


def largest_costs(pending: Sequence[Row]) -> str:
    """Return a line with the largest number of tokens of pending rows."""
    plans = [_plan_of(row) for row in pending]
    forward = sum(plan.forward_tokens for plan in plans)
    backward = sum(plan.forward_backward_tokens for plan in plans)
    number = "1 configuration" if len(pending) == 1 else f"{len(pending)} configurations"
    tasks = ", tasks not counted" if any(row.tasks for row in pending) else ""
    return (
        f"{number}: at most {forward:,} tokens forward and {backward:,} forward and backward, "
        f"without cached results{tasks}"
    )


def _plan_of(row: Row) -> Plan:
    """Check the settings and the models of a row, and return its plan."""
    if row.made_elsewhere is None:
        return make_plan(row.config)
    from gprune.method.measure import check_models

    return check_models(row.made_elsewhere, row.config)


def needs_of_list(cfg: RunConfig, rows: Sequence[Row]) -> dict[str, set[str]]:
    """Return corpus -> extra statistics that rows of a list need, of those that share the statistics of `cfg`."""
    needs: dict[str, set[str]] = {}
    settings = _settings_of_statistics(cfg)
    for other in (row.config for row in rows if row.made_elsewhere is None):
        if _settings_of_statistics(other) == settings:
            # Saliency is cached by scope.
            kinds = other.needs if other.attention == cfg.attention else other.needs - {"saliency"}
            for corpus in other.calibration_corpora:
                needs.setdefault(corpus, set()).update(kinds)
    return needs


def _settings_of_statistics(cfg: RunConfig) -> list[Any]:
    """Return the settings that determine the statistics of a corpus."""
    corpora = cfg.corpora.model_dump(include={"num_samples", "seq_len", "bos", "batch_size"})
    calibrator = cfg.user_stage("calibrator")
    return [cfg.model.model_dump(), corpora, calibrator, cfg.run.seed, cfg.processes, cfg.matmul_settings]


def run_row(row: Row, collect: Mapping[str, Collection[str]]) -> tuple[Path, dict[str, Any]]:
    """Run one configuration and store its record. Return the run folder and the record, which other ranks lack ({}).

    A row of a model made elsewhere has no run folder. `collect` is as for `gprune.prune`.
    """
    if row.made_elsewhere is not None:
        from gprune.method.measure import measure_records

        measured = measure_records(row.made_elsewhere, row.config)
        record = _record_of(
            row, measured.records, inputs=measured.inputs, environment=environment(), steps=measured.steps,
            summary=measured.summary | {"learned_tokens": 0},
        )  # fmt: skip
        return Path(), write_record(row.file, record)
    cfg = with_wandb_names(row)
    if row.tasks and cfg.recovery != "none":
        cfg = _with_exported_model(cfg)
    with wandb_beside_records(row):
        result = gprune.prune(cfg, collect=collect)
    if process_index() != 0:
        return result.path, {}
    manifest = RunFolder(result.path).manifest
    record = _record_of(
        row, result.records, inputs=manifest["settings"]["inputs"], environment=manifest["environment"],
        steps=manifest["steps"], summary=result.summary, learning=manifest.get("learning"),
        masks=pack_masks(result.masks) if result.masks and row.masks else None,
    )  # fmt: skip
    return result.path, write_record(row.file, record)


def _record_of(row: Row, records: Sequence[Record], **results: Any) -> dict[str, Any]:
    """Return the content of a record from results of a run, or of the measurement of a model made elsewhere."""
    identified = {"name": row.name, "settings": row.identity}
    return (
        identified | {"learning": None, "masks": None} | results | {"records": [round_window_nll(r) for r in records]}
    )


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
        commands = (
            f"# {why_not_run(row)}" if row.commit else f"# {row.name}, seed {row.seed}\n{row.command}"
            for row in study.rows
        )
        write_stdout("\n" + "\n\n".join(commands) + "\n")
    if options.files:
        write_stdout(f"\n{study.files().for_stdout()}\n")
    if (options.files or options.commands) and not (options.table or options.output):
        return
    if not done:
        if options.output:
            raise UserError(f"--output {options.output} needs a list with records; {listing.path} has none yet.")
        write_stdout("\n" + "\n".join([f"{listing.path}: no records yet.", *study.record_warnings]) + "\n")
        return
    report, tables = study.report, study.tables
    paragraphs = [f"**{title_of(study)}**", *(table.for_stdout() for table in tables), *notes_of(study)]
    write_stdout("\n" + "\n\n".join(paragraphs) + "\n")
    if options.output:
        write_results(study, expanded(options.output))
        write_stdout(f"\nWrote {options.output}.\n")
    if options.costs:
        write_stdout("\n" + cost_table(report.frame).for_stdout() + "\n")
    if options.figures:
        report.draw(Path(options.figures), prefix=f"{listing.path.stem}-")
    if options.table:
        return
    with optional_output("some runs to W&B", "the same command logs them"):
        if (folder := log_study(done)) is not None:
            write_stdout(f"\nW&B: `wandb leet {folder}` shows these rows together.\n")


def time_left(started: float, done: int, pending: Sequence[Row]) -> str:
    """Return the expected time of the rows that are left, by the mean of the finished ones; empty before the first."""
    if not done:
        return ""
    minutes = (time.monotonic() - started) / done * (len(pending) - done) / 60
    return f"; about {minutes:.0f} min left" if minutes >= 1 else "; less than a minute left"


def print_stored(row: Row, start: float, what: str = "") -> None:
    """Print the seconds since the start of a row or of its tasks, and that the record is stored."""
    write_stdout(f"{row.name}, seed {row.seed}: {what}{time.monotonic() - start:.0f} s, stored\n")


def measure_tasks(row: Row, folder: Path, record: dict[str, Any]) -> None:
    """Measure the tasks of a list on a finished run, and store the results.

    Those of the dense model are stored once for all rows of the list, before those of the run, which take long.
    """
    for file, is_dense in ((dense_tasks_file(row, record), True), (row.tasks_file, False)):
        if is_dense and read_task_records(row, file):
            continue
        with wandb_beside_records(row):
            measured = _measure_models(row, folder, row.benchmarks, dense=is_dense)
        write_task_records(row, file, list(map(round_window_nll, measured)))


def _measure_models(row: Row, folder: Path, benchmarks: Benchmarks, *, dense: bool) -> list[Record]:
    """Measure the tasks on the dense model of a row, or on the row's own model."""
    if row.made_elsewhere is None:
        return measurement.evaluate(str(folder), benchmarks, dense=dense, pruned=not dense)[0]
    about = {"model": model_label(row.config.model.name), "stage": "measured", "recovery": "none"}
    if dense:
        about |= {"stage": "dense", "sparsity": 0.0}
    name = row.config.model.name if dense else row.made_elsewhere
    records, _ = measurement.evaluate(name, replace(benchmarks, dtype=row.config.model.dtype))
    return [r | about for r in records]


def round_window_nll(record: dict[str, Any]) -> dict[str, Any]:
    """Round the nll of windows, if the record has them, to four decimal places."""
    if "window_nll" not in record:
        return record
    return record | {"window_nll": [round(nll, 4) for nll in record["window_nll"]]}


def with_wandb_names(row: Row) -> RunConfig:
    """Return the row's configuration with a name, a group and tags for W&B. A group and tags of the user are kept."""
    logging = row.config.logging
    names = {
        "name": f"{_words(row.name)[:100]}, seed {row.seed}",
        "group": logging.resolved_group or _words(row.study)[:128],
        "tags": [_words(row.study)[:64], _words(row.name)[:64], *logging.resolved_tags],
    }
    return row.config.model_copy(update={"logging": logging.model_copy(update=names)})


def wandb_folder(row: Row) -> Path:
    """Return W&B's folder for a list. It is next to the records, unless they are in `experiments/lists`."""
    in_repository = row.records.resolve().is_relative_to(LISTS)
    return (OTHER_RECORDS if in_repository else row.records) / row.study


@contextmanager
def wandb_beside_records(row: Row) -> Iterator[Path]:
    """Context in which W&B writes to `wandb_folder` of the row or, if it is set, to $WANDB_DIR."""
    users_folder = os.environ.get("WANDB_DIR")
    folder = users_folder or str(wandb_folder(row))
    os.environ["WANDB_DIR"] = folder
    try:
        yield Path(folder)
    finally:
        if users_folder:
            os.environ["WANDB_DIR"] = users_folder
        else:
            del os.environ["WANDB_DIR"]


def log_study(done: FinishedRows) -> Path | None:
    """Log finished rows that are not in W&B yet, and return the folder for `wandb leet`; None if W&B is disabled."""
    tracked = [(row, record) for row, record in done if row.config.logging.resolved_mode != "disabled"]
    if not tracked:
        return None
    with wandb_beside_records(tracked[0][0]) as folder:
        for row, record in tracked:
            log_row(folder, row, record)
    return folder / "wandb"


def log_row(folder: Path, row: Row, record: dict[str, Any]) -> None:
    """Log the numbers of a row's record, without curves, unless the row was logged when it ran.

    The W&B configuration of such a run has `record: true`.
    """
    from gprune.runs.tracking import charts, wandb_arguments, wandb_id, wandb_run

    cfg = with_wandb_names(row)
    settings = row.identity | {"inputs": record["inputs"]}
    id = wandb_id(key_of(settings=settings), cfg)
    if _has_run(folder, id):
        return
    with wandb_run(folder, cfg.logging, id=id, **wandb_arguments(cfg, row.made_elsewhere)) as run:
        if run is None:
            return
        if not run.resumed:  # otherwise the row has run on another machine, and has logged its curves online
            run.config.update({"record": True, "environment": record["environment"]})
        numbers = keyed(row_to_run(row, record, None).frame())
        run.log(charts(numbers))
        run.summary.update(numbers)


def _words(name: str) -> str:
    """Replace the characters of a name that are invalid in W&B."""
    return "".join(c if c.isprintable() and c not in r"/\#?%:" else " " for c in name)


def _has_run(folder: Path, id: str) -> bool:
    """Return whether W&B's folder has a run with this id."""
    return any(folder.glob(f"wandb/*run-*-{id}"))
