"""Run benchmarks on the models of a run or on any model, and store the records in a file."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gprune.benchmarks.literature import literature_perplexity
from gprune.benchmarks.settings import PRESETS, TEXTS, Benchmarks
from gprune.benchmarks.subjects import find_evaluation
from gprune.benchmarks.tasks import LoadedTask, TaskError, load_tasks, measure_tasks, require_lm_eval
from gprune.discovery import family_of
from gprune.errors import UserError
from gprune.runs.results import config_of, read_numbers
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
    names = [name for name in benchmarks.tasks if name not in TEXTS]
    if names:
        require_lm_eval()
    if rows:
        _, errors = load_tasks(names, benchmarks.include_path)
        for error in errors.values():
            raise error


def evaluate(
    model: str, benchmarks: Benchmarks, *, dense: bool = False, pruned: bool = True, output: Path | None = None
) -> tuple[list[dict[str, Any]], Path | None]:
    """Measure a model, or the models of a run. Return the records, and the file that has them.

    With `dense` the dense model of a run is measured too, and without `pruned` it alone. A task that cannot be measured
    does not end the others. UnmeasuredTasksError, which has their records, is raised at the end.
    """
    check_tasks(benchmarks)
    loading = _loading(benchmarks, expanded(model))
    evaluation = find_evaluation(model, benchmarks, dense=dense, output=output, loading=loading)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tasks, unmeasured = load_tasks([n for n in benchmarks.tasks if n not in TEXTS], benchmarks.include_path)
    names = dict.fromkeys(member for name in benchmarks.tasks for member in PRESETS.get(name, [name]))
    records: list[dict[str, Any]] = []
    for subject in evaluation.subjects if pruned else evaluation.subjects[:1]:
        loaded_model, tokenizer = subject.load()
        loaded_model = loaded_model if loading else loaded_model.to(device)
        for name in [name for name in names if name not in unmeasured]:
            log.info("Evaluating %s", name)
            try:
                with matmul_precision(torch.get_float32_matmul_precision(), fastest_on=device):
                    measured = _measure(loaded_model, tokenizer, tasks.get(name, name), benchmarks)
            except TaskError as error:
                unmeasured[name] = error
                continue
            records += [r | subject.about | evaluation.origin for r in measured]
            evaluation.store(records)
    evaluation.publish(records)
    if unmeasured:
        raise UnmeasuredTasksError(unmeasured, records, evaluation.output)
    return records, evaluation.output


def _loading(benchmarks: Benchmarks, run: Path) -> dict[str, Any]:
    """Return the arguments for loading: those of the flags or, without them, of the run's own settings."""
    if benchmarks.device_map is not None:
        return {"device_map": benchmarks.device_map, "max_memory": benchmarks.max_memory}
    if not (run / "manifest.json").is_file():
        return {}
    numbers = read_numbers(run)
    if numbers.settings["model"].get("device_map") is None:
        return {}
    model = config_of(numbers).model
    return {"device_map": model.device_map, "max_memory": model.max_memory}


def _measure(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: str | list[LoadedTask], benchmarks: Benchmarks
) -> list[dict[str, Any]]:
    """Measure the perplexity on a text, or tasks, on one model."""
    if isinstance(task, list):
        options = {"batch_size": benchmarks.batch_size, "num_fewshot": benchmarks.num_fewshot}
        return measure_tasks(model, tokenizer, task, limit=benchmarks.limit, **options) if task else []
    family_of(model)
    return [
        literature_perplexity(model, tokenizer, task, seq_len=n, bos=benchmarks.bos, limit=benchmarks.limit)
        for n in dict.fromkeys(benchmarks.seq_len)
    ]
