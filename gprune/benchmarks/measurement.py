"""Run benchmarks on the models of a run or on any model, and store the records in a file."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from gprune.benchmarks.literature import literature_perplexity
from gprune.benchmarks.placement import Placement, placement
from gprune.benchmarks.settings import REMOVED, TEXTS, Benchmarks
from gprune.benchmarks.subjects import Loaded, find_evaluation
from gprune.benchmarks.task_sources import TaskError, load_tasks, require_lm_eval, with_groups
from gprune.benchmarks.tasks import measure_tasks
from gprune.console import quieted
from gprune.discovery import family_of
from gprune.errors import UserError
from gprune.runs.trainer import matmul_precision
from gprune.storage.paths import expanded

log = logging.getLogger("gprune")


class UnmeasuredTasksError(UserError):
    """Some tasks could not be measured. `records` has the results of the others, which are stored in `path`."""

    def __init__(self, errors: Mapping[str, TaskError], records: Sequence[dict[str, Any]], path: Path | None):
        reasons = " ".join(map(str, errors.values()))
        super().__init__(reasons if len(errors) == 1 else f"Cannot measure {len(errors)} tasks: {reasons}")
        self.records, self.path = records, path


def check_tasks(benchmarks: Benchmarks, *, rows: bool = False) -> None:
    """Raise UserError if the tasks need lm_eval and it is not installed. With `rows`, load each task too."""
    for name in benchmarks.tasks:
        if replacement := REMOVED.get(f"tasks={name}"):
            raise UserError(f"The task {name} was removed. Use {replacement}.")
    names = [name for name in benchmarks.tasks if name not in TEXTS]
    if names:
        require_lm_eval()
    with quieted("lm_eval", stderr=not sys.stderr.isatty()):
        for task in with_groups(names) if rows else ():
            load_tasks(task, benchmarks.source)


def evaluate(
    model: str, benchmarks: Benchmarks, *, dense: bool = False, pruned: bool = True, output: Path | None = None
) -> tuple[list[dict[str, Any]], Path | None]:
    """Measure a model, or the models of a run. Return the records, and the file that has them.

    With `dense` the dense model of a run is measured too, and without `pruned` it alone. A task that cannot be measured
    does not end the others. UnmeasuredTasksError, which has their records, is raised at the end.
    """
    check_tasks(benchmarks)
    with placement(benchmarks, expanded(model)) as placed:
        return _evaluate(model, benchmarks, placed, dense=dense, pruned=pruned, output=output)


def _evaluate(
    model: str, benchmarks: Benchmarks, placed: Placement, *, dense: bool, pruned: bool, output: Path | None
) -> tuple[list[dict[str, Any]], Path | None]:
    """Measure a model, or the models of a run, with a placement."""
    evaluation = find_evaluation(model, benchmarks, dense=dense, output=output, loading=placed.loading)
    subjects = evaluation.subjects if pruned else evaluation.subjects[:1]
    records: list[dict[str, Any]] = []
    tasks = with_groups(benchmarks.tasks)
    unmeasured: dict[str, TaskError] = {}
    for subject in subjects:
        loaded_model, tokenizer = subject.load()
        loaded_model = placed.place(loaded_model)
        for task, groups in tasks.items():
            if task in unmeasured:
                continue
            log.info("Evaluating %s", task)
            try:
                with matmul_precision(torch.get_float32_matmul_precision(), fastest_on=placed.device):
                    measured = _measure_task((loaded_model, tokenizer), task, benchmarks)
            except TaskError as error:
                unmeasured[task] = error
                continue
            about = subject.about | evaluation.origin | ({"groups": groups} if groups else {})
            records += [r | about for r in measured]
            if placed.writes:
                evaluation.store(records)
    if placed.writes:
        evaluation.publish(records)
    if unmeasured:
        raise UnmeasuredTasksError(unmeasured, records, evaluation.output)
    return records, evaluation.output


def _measure_task(loaded: Loaded, task: str, benchmarks: Benchmarks) -> list[dict[str, Any]]:
    """Measure a task on one model."""
    limit = benchmarks.limit
    if task not in TEXTS:
        options = {"batch_size": benchmarks.batch_size, "num_fewshot": benchmarks.num_fewshot}
        return measure_tasks(*loaded, [task], limit=limit, source=benchmarks.source, **options)
    family_of(loaded[0])
    lengths = dict.fromkeys(benchmarks.seq_len)
    return [literature_perplexity(*loaded, task, seq_len=n, bos=benchmarks.bos, limit=limit) for n in lengths]
