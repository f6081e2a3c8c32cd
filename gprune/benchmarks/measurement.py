"""Run benchmarks on the models of a run or on any model, and store the records in a file."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from gprune.benchmarks.literature import literature_perplexity
from gprune.benchmarks.settings import SPEED, TEXTS, Benchmarks
from gprune.benchmarks.speed import throughput
from gprune.benchmarks.subjects import Loaded, subjects_of
from gprune.benchmarks.tasks import require_lm_eval
from gprune.benchmarks.zero_shot import zero_shot
from gprune.errors import optional_output
from gprune.report.model_card import write_card
from gprune.runs.folder import RunFolder
from gprune.runs.numbers import key_part
from gprune.runs.results import config_of, finished, read_evaluation
from gprune.storage.files import key_of, write_json
from gprune.storage.reading import expanded

log = logging.getLogger("gprune")
NUMBERS = ("acc", "acc_stderr", "acc_norm", "acc_norm_stderr", "exact_match", "exact_match_stderr", "perplexity")
NUMBERS += ("tokens_per_second", "seconds")


def check_tasks(asked: Benchmarks) -> None:
    """Raise UserError if the tasks need lm_eval and it is not installed."""
    if not {*asked.tasks} <= {*TEXTS, SPEED}:
        require_lm_eval()


def evaluate(
    model: str, asked: Benchmarks, *, dense: bool = False, pruned: bool = True, output: Path | None = None
) -> tuple[list[dict[str, Any]], Path | None]:
    """Measure a model, or the models of a run.

    Args:
        model: folder of a run or of a model, embedded name or hub id.
        asked: the tasks and their settings.
        dense: for a run, whether to measure its dense model too, before the pruned model.
        pruned: for a run with `dense`, whether to measure the pruned model.
        output: JSON file to which records are added; by default `evaluation.json` in the run.

    Returns:
        The new records, and the path of the file, or None without a file.

    Raises:
        UserError: if lm_eval is missing, a model, task or data cannot be loaded, or `output` is not a file of records.
    """
    check_tasks(asked)
    subjects, default, key = subjects_of(
        model, dense=dense, dtype=asked.dtype, trust_remote_code=asked.trust_remote_code
    )
    folder, of_run = expanded(model).resolve(), key is not None
    about = {"run": folder.name, "origin": key_of(of=key or str(folder))[:12]}
    output, key = (output, None) if output else (default, key)
    if output is not None:
        read_evaluation(output, run=key)  # raises for another file, which must not be overwritten
    records: list[dict[str, Any]] = []
    subjects, device = subjects if pruned else subjects[:1], "cuda" if torch.cuda.is_available() else "cpu"
    tasks = [task for task in dict.fromkeys(asked.tasks) if task != SPEED]
    for subject in subjects if tasks else ():
        loaded, tokenizer = subject.load()
        loaded = loaded.to(device)
        for task in tasks:
            log.info("Evaluating %s", task)
            records += [r | subject.about | about for r in _task_records((loaded, tokenizer), task, asked)]
            if output is not None:
                merge_records(output, records, run=key)
    if SPEED in asked.tasks:
        log.info("Evaluating %s", SPEED)
        models = [subject.load()[0].to(device) for subject in subjects]  # loaded together, to be timed in alternation
        numbers = throughput(models, batches=asked.speed_batch, prompt=asked.speed_prompt)
        records += [r | subject.about | about for subject, own in zip(subjects, numbers, strict=True) for r in own]
        if output is not None:
            merge_records(output, records, run=key)
    if of_run:
        with optional_output("numbers to the model card or to W&B", "evaluation.json has them"):
            if SPEED in asked.tasks:
                run = finished(folder)
                write_card(RunFolder(folder), config_of(run), run.records)
            log_evaluation(folder, records)
    return records, output


def _task_records(loaded: Loaded, task: str, asked: Benchmarks) -> list[dict[str, Any]]:
    """Measure a task. There are several records for a group of tasks, and for several window lengths."""
    if task not in TEXTS:
        return zero_shot(*loaded, [task], limit=asked.limit, batch_size=asked.batch_size, source=asked.source)
    lengths = dict.fromkeys(asked.seq_len)
    return [literature_perplexity(*loaded, task, seq_len=n, bos=asked.bos, limit=asked.limit) for n in lengths]


def merge_records(path: Path, records: Sequence[dict[str, Any]], *, run: str | None = None) -> None:
    """Add records to a file, replacing earlier records of the same model and protocol.

    Args:
        path: the file.
        records: the new records.
        run: key of the run that the file belongs to. In other files `run` and `origin` of a record identify its model.
    """
    protocol = ["model", "stage", "recovery", "task", "content_hash", "dtype", *([] if run else ["run", "origin"])]
    new = {tuple(map(r.get, protocol)) for r in records}
    others = [r for r in read_evaluation(path, run=run) if tuple(map(r.get, protocol)) not in new]
    write_json(path, {"records": [*others, *records]}, run=run)


def log_evaluation(run: Path, records: Sequence[dict[str, Any]]) -> None:
    """Add records to the summary of the run's W&B run, if it has one."""
    if not (known := RunFolder(run).manifest.get("wandb")):
        return
    from gprune.runs.tracking import resumed_run

    with resumed_run(run, known) as tracked:
        if tracked is not None:
            tracked.summary.update(task_numbers(records))


def task_numbers(records: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Return numbers of records by W&B key: `final/<task>/acc` for the main row, `rows/dense/<task>/acc` for dense.

    For a perplexity the window length is added after the task, for a speed the batch size.
    """
    numbers = {}
    for r in records:
        place = "rows/dense" if r["stage"] == "dense" else "final"
        part = r["seq_len"] if r["kind"] == "perplexity" else r.get("batch")
        task = key_part(r["task"]) + ("" if part is None else f"/{part}")
        numbers |= {f"{place}/{task}/{name}": r[name] for name in NUMBERS if r.get(name) is not None}
    return numbers
