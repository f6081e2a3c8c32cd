"""Tasks of EleutherAI's lm_eval on a model in memory, by `lm_eval.simple_evaluate`.

Prompts, numbers of examples, groups, metrics and standard errors are lm_eval's own. Its data come from the Hugging Face
hub, or from YAML tasks with local files in a folder, which have priority over lm_eval's tasks with the same names
(`python -m experiments.tasks` writes such a folder). Paired differences between models come from lm_eval's samples.

lm_eval is an optional dependency (`pip install 'gprune[lm-eval]'`), which is imported when it is used.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import hashlib
import itertools
import json
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gprune.benchmarks.settings import PRESETS
from gprune.console import quieted
from gprune.corpora.hub import offline_if_unreachable
from gprune.corpora.windows import leading_token
from gprune.errors import UserError, first_line, quoting, require_finite
from gprune.models.offload import device_of
from gprune.storage.paths import expanded

CORRECT = {"acc": "correct", "acc_norm": "correct_norm", "exact_match": "correct"}  # metric -> text of its digits
REMEDY = "Without the hub, use YAML tasks with local files (docs/tasks.md, 'Without the hub')"


class TaskError(UserError):
    """A task that cannot be loaded or measured."""


@dataclass(frozen=True)
class LoadedTask:
    """A task of lm_eval with its data."""

    task: Any  # lm_eval.api.task.Task
    num_fewshot: int  # lm_eval's own number of worked examples in prompts
    # Preset, group or tag by which the task was named -> `tasks`, their number, and `by_size`: whether the mean weights
    # tasks by their numbers of questions
    groups: dict[str, dict[str, Any]] = field(default_factory=dict)


def require_lm_eval() -> None:
    """Raise UserError if lm_eval is not installed."""
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        remedy = "Run pip install 'gprune[lm-eval]'"
        raise UserError(f"--tasks needs lm_eval for zero-shot tasks, which is not installed. {remedy}.") from error


def load_tasks(
    names: Iterable[str], include_path: str | None = None
) -> tuple[dict[str, list[LoadedTask]], dict[str, TaskError]]:
    """Load tasks, groups, tags and presets. Return the tasks by name, and the errors by name, with lm_eval's reason.

    A preset is replaced by the names of its tasks. A task that several names stand for is listed once.
    """
    by_name: dict[str, list[LoadedTask]] = {}
    errors: dict[str, TaskError] = {}
    known: dict[str, LoadedTask] = {}  # by name of the task
    for name in names:
        for member in PRESETS.get(name, [name]):
            if member not in by_name and member not in errors:
                try:
                    by_name[member] = _load(member, include_path, known)
                except TaskError as error:
                    errors[member] = error
        if name in PRESETS:
            for member in known.keys() & {*PRESETS[name]}:
                known[member].groups[name] = {"tasks": len(PRESETS[name]), "by_size": False}
    return by_name, errors


def _load(name: str, include_path: str | None, known: dict[str, LoadedTask]) -> list[LoadedTask]:
    """Load a task, a group or a tag. Return the tasks that are not in `known`, and add them to it."""
    try:
        errors = quoting(f"Cannot load task '{name}': ", f". {REMEDY}.")
        with errors, quieted("lm_eval", stderr=not sys.stderr.isatty()):
            manager = _task_manager(_folder(include_path), defaults=False)
            if name not in manager.task_index:
                manager = _task_manager(_folder(include_path), defaults=True)
            with offline_if_unreachable():
                loaded = manager.load([name])
    except UserError as error:
        raise TaskError(str(error)) from error
    new = {
        task_name: LoadedTask(task, task.config.num_fewshot or 0)
        for task_name, task in loaded["tasks"].items()
        if task_name not in known
    }
    known |= new
    if [*loaded["tasks"]] != [name]:
        group = loaded["groups"].get(name)
        means = group.aggregate_metric_list if group is not None else None
        about = {"tasks": len(loaded["tasks"]), "by_size": bool(means and means[0].weight_by_size)}
        for task_name in loaded["tasks"]:
            known[task_name].groups[name] = about
    return [*new.values()]


def _folder(include_path: str | None) -> str | None:
    """Return the folder with YAML tasks, `$GPRUNE_DATA_DIR/tasks` by default; None if there is no such folder."""
    if include_path is None and (root := os.environ.get("GPRUNE_DATA_DIR")):
        include_path = f"{root}/tasks"
    folder = None if include_path is None else expanded(include_path)
    return str(folder.resolve()) if folder is not None and folder.is_dir() else None


@functools.lru_cache(maxsize=2)
def _task_manager(folder: str | None, *, defaults: bool) -> Any:
    """Return lm_eval's index of the YAML tasks in a folder, with `defaults` also of its own thousands."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=folder, include_defaults=defaults)


def measure_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[LoadedTask],
    *,
    limit: int | None = None,
    batch_size: int = 4,
    num_fewshot: int | None = None,
) -> list[dict[str, Any]]:
    """Measure tasks. Return a record per task and filter, and one per metric that is not right or wrong per question.

    The log-softmax is computed in float32, whatever the model's dtype. The tokenizer decides whether BOS is added, as
    in lm_eval by default, and no chat template is used.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    # lm_eval writes warnings and progress bars to stderr, which is kept for errors unless it is a terminal.
    with quieted("lm_eval", stderr=not sys.stderr.isatty()), torch.no_grad():
        # Copied, because HFLM sets the tokenizer's padding token.
        lm = HFLM(
            model, backend="causal", tokenizer=copy.deepcopy(tokenizer), batch_size=batch_size, softmax_dtype="float32"
        )
        lm._device = device_of(model)  # of an offloaded model, where it computes
        try:
            outcome = simple_evaluate(
                lm, tasks=[t.task for t in tasks], num_fewshot=num_fewshot, limit=limit,
                task_manager=_task_manager(None, defaults=False),  # else it reads lm_eval's 14,000 YAML files each time
            )  # fmt: skip
        except (RuntimeError, MemoryError, OSError):  # of torch and the machine
            raise
        except Exception as error:
            names = ", ".join(loaded.task.task_name for loaded in tasks)
            raise TaskError(f"Cannot measure task '{names}': {first_line(error)}.") from error
    protocol = {
        "harness": f"lm_eval {version('lm_eval')}",
        "limit": limit,
        "bos": leading_token(tokenizer, "auto") is not None,
        "chat_template": False,
        "dtype": str(model.dtype).removeprefix("torch."),
    }
    return [record | protocol for loaded in tasks for record in _records_of_task(loaded, outcome)]


def _records_of_task(loaded: LoadedTask, outcome: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the records of a task from lm_eval's results, of each filter of generated text and metric of its own.

    Records with the same `content_hash` have the same questions. YAML tasks of a folder may have `complete` (whether
    their rows are those of lm_eval's task) and `note` in their metadata.
    """
    import lm_eval.tasks

    task, own = loaded.task, loaded.num_fewshot
    name, config, metadata = task.task_name, task.config, task.config.metadata or {}
    num_fewshot, size = outcome["n-shot"][name], outcome["n-samples"][name]
    is_own = Path(lm_eval.tasks.__file__).parent in Path(metadata.get("config_source", "")).parents
    notes = [f"only the first {size['effective']} questions"] * (size["effective"] < size["original"])
    notes += [f"{num_fewshot} examples in prompts, lm_eval's own number is {own}"] * (num_fewshot != own)
    note = metadata.get("note", "lm_eval's own task" if is_own else "a task of your own")
    shared = {
        "kind": "zero_shot", "task_version": str(task.VERSION), "split": config.test_split or config.validation_split,
        "source": "hub" if is_own else "local", "num_fewshot": num_fewshot, "own_num_fewshot": own,
        "questions": size["effective"], "standard_protocol": metadata.get("complete", is_own) and not notes,
        "note": "; ".join([*notes, note]), **({"groups": loaded.groups} if loaded.groups else {}),
    }  # fmt: skip
    records, results = [], outcome["results"][name]
    for filter_name, of_filter in itertools.groupby(outcome["samples"][name], key=lambda sample: sample["filter"]):
        samples = list(of_filter)
        numbers = {}  # metric -> number and standard error
        for key, value in results.items():
            metric, _, of = key.partition(",")
            if of == filter_name and not metric.endswith("_stderr"):
                error = results[f"{metric}_stderr,{of}"]
                numbers[metric] = value, None if error == "N/A" else error
        title = name if len(config.filter_list or ()) < 2 else f"{name}/{filter_name}"
        shared["content_hash"] = questions_hash((sample["arguments"], sample["target"]) for sample in samples)
        records += [shared | of_metric for of_metric in _numbers(task, title, samples, numbers)]
    return records


def questions_hash(questions: Iterable[tuple[Any, Any]]) -> str:
    """Return a hash of everything that is scored: the texts and the right answer of each question."""
    return hashlib.sha256(json.dumps(list(questions)).encode()).hexdigest()[:16]


def _numbers(
    task: Any, title: str, samples: Sequence[dict[str, Any]], numbers: Mapping[str, tuple[float, float | None]]
) -> list[dict[str, Any]]:
    """Return one entry with the accuracies and the answers of a task or, without accuracies, one per metric.

    `correct` and `correct_norm`, texts with a digit per question (1: correct), and `scores` are for paired comparisons.
    """
    record: dict[str, Any] = {"task": title, "acc": None, "acc_stderr": None, "acc_norm": None, "acc_norm_stderr": None}
    answers = _answers(task, title, samples)
    accuracies = [m for m in CORRECT if m in numbers and all(sample.get(m) in (0, 1) for sample in samples)]
    if accuracies:
        for metric in accuracies:
            record[metric], record[f"{metric}_stderr"] = numbers[metric]
            record.setdefault(CORRECT[metric], "".join(str(int(sample[metric])) for sample in samples))
        if "perplexity" in numbers:
            record["perplexity"], _ = numbers["perplexity"]
        return [record | answers]
    records = []
    for metric, (score, error) in numbers.items():
        require_finite(f"{metric} came up in task '{title}'", torch.tensor(score))
        of_metric = {"task": f"{title}/{metric}", "metric": metric, "score": score, "score_stderr": error}
        with contextlib.suppress(KeyError, TypeError, ValueError):  # a metric over all questions together
            of_metric["scores"] = [float(sample[metric]) for sample in samples]
        records.append(record | of_metric)
    return records


def _answers(task: Any, title: str, samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return `answers`, for paired comparisons of models, and for choices `greedy`, how often greedy decoding is right.

    An answer is the generated text, the index of the most likely choice, or whether greedy decoding gives the text.
    `correct_greedy` is a text with a digit per question.
    """
    responses = [sample["filtered_resps"] for sample in samples]
    if task.OUTPUT_TYPE not in ("multiple_choice", "loglikelihood"):
        return {"answers": [response[0] for response in responses]} if task.OUTPUT_TYPE == "generate_until" else {}
    log_likelihoods = [[float(log_likelihood) for log_likelihood, _ in choices] for choices in responses]
    flat = torch.tensor(list(itertools.chain.from_iterable(log_likelihoods)))
    require_finite(f"log-likelihood came up in task '{title}'", flat)
    if task.OUTPUT_TYPE == "loglikelihood":
        return {"answers": [int(is_greedy) for ((_, is_greedy),) in responses]}
    answers = {"answers": [max(range(len(choices)), key=choices.__getitem__) for choices in log_likelihoods]}
    labels = [sample["target"] for sample in samples]
    if not all(isinstance(label, int) and label < len(of) for label, of in zip(labels, responses, strict=True)):
        return answers  # several choices are right, or the label is a text
    is_greedy = torch.tensor([float(choices[label][1]) for label, choices in zip(labels, responses, strict=True)])
    error = float(is_greedy.std() / len(is_greedy) ** 0.5) if len(is_greedy) > 1 else None
    digits = "".join(str(int(right)) for right in is_greedy)
    return answers | {"greedy": float(is_greedy.mean()), "greedy_stderr": error, "correct_greedy": digits}
