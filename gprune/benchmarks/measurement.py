"""Benchmarks of a run's pruned model, of its dense model, or of any model by name, and the file of their records."""

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


def check(asked: Benchmarks) -> None:
    """Raise UserError, before a model is loaded or a list of rows runs, where a package is missing for the tasks."""
    if not {*asked.tasks} <= {*TEXTS, SPEED}:
        require_lm_eval()


def evaluate(
    model: str, asked: Benchmarks, *, dense: bool = False, pruned: bool = True, output: Path | None = None
) -> tuple[list[dict[str, Any]], Path | None]:
    """Measure a model, or the models of a run.

    Args:
        model: a run's folder, a model folder, an embedded name or a hub id.
        dense: of a run, its dense model as well, first; and with `pruned` false, that alone.
        output: JSON file for the records, beside those that are there; by default `evaluation.json` in the run.

    Returns:
        The new records, and the file they are in; None where there is none.

    Raises:
        UserError: without lm_eval, for a model, a task or data that cannot be had, and for an output that is no file
            of records.
    """
    check(asked)
    subjects, default, key = subjects_of(
        model, dense=dense, dtype=asked.dtype, trust_remote_code=asked.trust_remote_code
    )
    folder, of_run = expanded(model).resolve(), key is not None
    about = {"run": folder.name, "origin": key_of(of=key or str(folder))[:12]}
    output, key = (output, None) if output else (default, key)
    if output is not None:
        read_evaluation(output, run=key)  # what is no such file is not written over
    records: list[dict[str, Any]] = []
    subjects, device = subjects if pruned else subjects[:1], "cuda" if torch.cuda.is_available() else "cpu"
    tasks = [task for task in dict.fromkeys(asked.tasks) if task != SPEED]
    for subject in subjects if tasks else ():
        loaded, tokenizer = subject.load()
        loaded = loaded.to(device)
        for task in tasks:
            log.info("Evaluating %s", task)
            records += [r | subject.about | about for r in _measured((loaded, tokenizer), task, asked)]
            if output is not None:
                keep(output, records, run=key)
    if SPEED in asked.tasks:
        log.info("Evaluating %s", SPEED)
        models = [subject.load()[0].to(device) for subject in subjects]  # all at once, as they take turns
        numbers = throughput(models, batches=asked.speed_batch, prompt=asked.speed_prompt)
        records += [r | subject.about | about for subject, own in zip(subjects, numbers, strict=True) for r in own]
        if output is not None:
            keep(output, records, run=key)
    if of_run:
        with optional_output("numbers to the model card or to W&B", "evaluation.json has them"):
            if SPEED in asked.tasks:
                run = finished(folder)
                write_card(RunFolder(folder), config_of(run), run.records)
            log_evaluation(folder, records)
    return records, output


def _measured(loaded: Loaded, task: str, asked: Benchmarks) -> list[dict[str, Any]]:
    """The records of one task; a group of tasks, and a text in windows of several lengths, has several."""
    if task not in TEXTS:
        return zero_shot(*loaded, [task], limit=asked.limit, batch_size=asked.batch_size, source=asked.source)
    lengths = dict.fromkeys(asked.seq_len)
    return [literature_perplexity(*loaded, task, seq_len=n, bos=asked.bos, limit=asked.limit) for n in lengths]


def keep(path: Path, records: Sequence[dict[str, Any]], *, run: str | None = None) -> None:
    """Write records beside those that are there, in the place of former ones of the same model and protocol.

    `run`: the key of the run whose file it is; in other files a record's `run` and `origin` say which model it is of.
    """
    protocol = ["model", "stage", "recovery", "task", "content_hash", "dtype", *([] if run else ["run", "origin"])]
    new = {tuple(map(r.get, protocol)) for r in records}
    others = [r for r in read_evaluation(path, run=run) if tuple(map(r.get, protocol)) not in new]
    write_json(path, {"records": [*others, *records]}, run=run)


def log_evaluation(run: Path, records: Sequence[dict[str, Any]]) -> None:
    """Add records to the summary of the W&B run in which a run was logged, if it was."""
    if not (known := RunFolder(run).manifest.get("wandb")):
        return
    from gprune.runs.tracking import resumed_run

    with resumed_run(run, known) as tracked:
        if tracked is not None:
            tracked.summary.update(task_numbers(records))


def task_numbers(records: Sequence[dict[str, Any]]) -> dict[str, float]:
    """`NUMBERS` of records, as W&B gets them: `final/<task>/acc` of the run's own model, `rows/dense/<task>/acc` of the
    dense one; behind the task a perplexity has the length of its windows, a speed its batch."""
    numbers = {}
    for r in records:
        place = "rows/dense" if r["stage"] == "dense" else "final"
        part = r["seq_len"] if r["kind"] == "perplexity" else r.get("batch")
        task = key_part(r["task"]) + ("" if part is None else f"/{part}")
        numbers |= {f"{place}/{task}/{name}": r[name] for name in NUMBERS if r.get(name) is not None}
    return numbers
