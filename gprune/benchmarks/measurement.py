"""Run benchmarks on the models of a run or on any model, and store the records in a file."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from gprune.benchmarks.literature import literature_perplexity
from gprune.benchmarks.settings import SPEED, TEXTS, Benchmarks
from gprune.benchmarks.subjects import Loaded, find_subjects
from gprune.benchmarks.tasks import require_lm_eval
from gprune.benchmarks.zero_shot import zero_shot
from gprune.errors import optional_output
from gprune.evaluation.speed import measure_throughput
from gprune.report.model_card import write_card
from gprune.runs.folder import RunFolder
from gprune.runs.numbers import key_part
from gprune.runs.results import config_of, read_evaluation, read_numbers
from gprune.runs.trainer import matmul_precision
from gprune.storage.files import key_of, write_json
from gprune.storage.reading import expanded

log = logging.getLogger("gprune")
METRICS = ("acc", "acc_stderr", "acc_norm", "acc_norm_stderr", "exact_match", "exact_match_stderr", "perplexity")
METRICS += ("tokens_per_second", "seconds")


def check_tasks(benchmarks: Benchmarks) -> None:
    """Raise UserError if the tasks need lm_eval and it is not installed."""
    if not {*benchmarks.tasks} <= {*TEXTS, SPEED}:
        require_lm_eval()


def evaluate(
    model: str, benchmarks: Benchmarks, *, dense: bool = False, pruned: bool = True, output: Path | None = None
) -> tuple[list[dict[str, Any]], Path | None]:
    """Measure a model, or the models of a run."""
    check_tasks(benchmarks)
    subjects, run_output, run_key = find_subjects(
        model, dense=dense, dtype=benchmarks.dtype, trust_remote_code=benchmarks.trust_remote_code
    )
    if not pruned:
        subjects = subjects[:1]
    folder = expanded(model).resolve()
    origin = {"run": folder.name, "origin": key_of(of=run_key or str(folder))[:12]}
    output_key = None if output else run_key  # a file that the caller names may have records of several runs
    output = output or run_output
    if output is not None:
        read_evaluation(output, run=output_key)  # raises for another file, which must not be overwritten
    records: list[dict[str, Any]] = []
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tasks = [task for task in dict.fromkeys(benchmarks.tasks) if task != SPEED]
    for subject in subjects if tasks else ():
        loaded_model, tokenizer = subject.load()
        loaded_model = loaded_model.to(device)
        for task in tasks:
            log.info("Evaluating %s", task)
            with matmul_precision(torch.get_float32_matmul_precision(), fastest_on=torch.device(device)):
                measured = _measure_task((loaded_model, tokenizer), task, benchmarks)
            records += [r | subject.about | origin for r in measured]
            if output is not None:
                merge_records(output, records, run=output_key)
    if SPEED in benchmarks.tasks:
        log.info("Evaluating %s", SPEED)
        models = [subject.load()[0].to(device) for subject in subjects]  # loaded together, to be timed in alternation
        by_model = measure_throughput(models, batches=benchmarks.speed_batch, prompt=benchmarks.speed_prompt)
        for subject, measured in zip(subjects, by_model, strict=True):
            records += [r | subject.about | origin for r in measured]
        if output is not None:
            merge_records(output, records, run=output_key)
    if run_key is not None:
        with optional_output("numbers to the model card or to W&B", "evaluation.json has them"):
            if SPEED in benchmarks.tasks:
                run = read_numbers(folder)
                write_card(RunFolder(folder), config_of(run), run.records)
            log_evaluation(folder, records)
    return records, output


def _measure_task(loaded: Loaded, task: str, benchmarks: Benchmarks) -> list[dict[str, Any]]:
    """Measure a task other than speed."""
    limit = benchmarks.limit
    if task not in TEXTS:
        return zero_shot(*loaded, [task], limit=limit, batch_size=benchmarks.batch_size, source=benchmarks.source)
    lengths = dict.fromkeys(benchmarks.seq_len)
    return [literature_perplexity(*loaded, task, seq_len=n, bos=benchmarks.bos, limit=limit) for n in lengths]


def merge_records(path: Path, records: Sequence[dict[str, Any]], *, run: str | None = None) -> None:
    """Add records to a file, replacing earlier records of the same model and protocol."""
    names = ["model", "stage", "recovery", "task", "content_hash", "dtype"]
    if not run:
        names += ["run", "origin"]

    def identity(r: dict[str, Any]) -> tuple[Any, ...]:
        """Return a key that is equal for records of the same model and protocol."""
        return tuple(r.get(name) for name in names)

    new_identities = {identity(r) for r in records}
    kept = [r for r in read_evaluation(path, run=run) if identity(r) not in new_identities]
    write_json(path, {"records": [*kept, *records]}, run=run)


def log_evaluation(run: Path, records: Sequence[dict[str, Any]]) -> None:
    """Add records to the summary of the run's W&B run, if it has one."""
    wandb_entry = RunFolder(run).manifest.get("wandb")
    if not wandb_entry:
        return
    from gprune.runs.tracking import resumed_run

    with resumed_run(run, wandb_entry) as wandb_run:
        if wandb_run is not None:
            wandb_run.summary.update(task_numbers(records))


def task_numbers(records: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Return numbers of records by W&B key: `final/<task>/acc` for the main row, `rows/dense/<task>/acc` for dense.

    For a perplexity the window length is added after the task, for a speed the batch size.
    """
    numbers = {}
    for r in records:
        prefix = "rows/dense" if r["stage"] == "dense" else "final"
        task = key_part(r["task"])
        size = r["seq_len"] if r["kind"] == "perplexity" else r.get("batch")
        if size is not None:
            task += f"/{size}"
        numbers |= {f"{prefix}/{task}/{name}": r[name] for name in METRICS if r.get(name) is not None}
    return numbers
