"""Tasks for lm_eval by name: its own tasks with data from the hub or from local files, and local questions.

Local files are `$GPRUNE_DATA_DIR/tasks/<name>/<split>.jsonl`. A line is one of these: a row of the data set of
lm_eval's task with this name; a question `{"prompt": ..., "choices": [...], "label": 0}`, where each choice is scored
as the continuation " " + choice of the prompt; a minimal pair `{"good": ..., "bad": ..., "paradigm": ...}`, where whole
sentences are scored.

Tasks need lm_eval (`pip install 'gprune[lm-eval]'`), which is imported when it is used.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import logging
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from gprune.corpora.hub import hub_errors, offline_if_unreachable
from gprune.errors import UserError, quoting
from gprune.storage.reading import expanded, read_required_text

log = logging.getLogger("gprune")
# Type of a task -> metrics that are used. acc of loglikelihood is the share of texts that greedy decoding gives.
SUPPORTED_METRICS = {
    "multiple_choice": ("acc", "acc_norm"),
    "loglikelihood": ("acc",),
    "generate_until": ("exact_match",),
}
# Task -> how its complete split is recognised in local files: the number of rows; for a task with few-shot examples
# (rows, rows of train.jsonl); or the `content_hash` of local questions with lm_eval's prompts.
COMPLETE_SPLITS = {
    "lambada_openai": 5153,
    "hellaswag": 10042,
    "winogrande": 1267,
    "arc_challenge": 1172,
    "gsm8k": (1319, 7473),
}
COMPLETE_SPLITS |= {"piqa": "f230db808510ef88", "arc_easy": "16b23eecab0a5935"}
PARTIAL_NOTE = "not known to be all of lm_eval's, and never to be set beside published figures"


@dataclass(frozen=True)
class LoadedTask:
    """A task of lm_eval, and its description in records."""

    task: Any  # lm_eval.api.task.Task
    source: str  # "hub" or "local"
    complete: bool  # all questions of the split with lm_eval's prompts, so results can be compared with published ones
    note: str
    num_fewshot: int = 0  # number of worked examples in lm_eval's own protocol of the task


def require_lm_eval() -> str:
    """Return the version of lm_eval. Raise UserError if it is not installed."""
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        remedy = "Run pip install 'gprune[lm-eval]'"
        raise UserError(f"--tasks needs lm_eval for zero-shot tasks, which is not installed. {remedy}.") from error
    return version("lm_eval")


def load_tasks(name: str, source: str) -> list[LoadedTask]:
    """Load a task, or all tasks of a group."""
    path = local_file(name)
    if source == "local":
        if path is None:
            raise UserError(f"Task '{name}' needs the local file $GPRUNE_DATA_DIR/tasks/{name}/test.jsonl.")
        return [local_task(path)]
    with offline_if_unreachable() as reachable:
        if source == "hub" or path is None:
            return hub_tasks(name)
        if reachable:
            try:
                return hub_tasks(name)
            except UserError as error:
                log.info("%s", error)
    log.info("Reading task %s from local files", name)
    return [local_task(path)]


def hub_tasks(name: str) -> list[LoadedTask]:
    """Load lm_eval's task, or all tasks of a group, with data from the hub."""
    manager = _task_manager()
    if name not in manager.all_tasks:
        remedy = f"`lm-eval ls tasks` lists all tasks; local files go to $GPRUNE_DATA_DIR/tasks/{name}"
        raise UserError(f"Unknown task '{name}'. {remedy}.")
    with hub_errors(f"task '{name}'", f"its questions into $GPRUNE_DATA_DIR/tasks/{name}/test.jsonl"):
        tasks = manager.load([name])["tasks"].values()
    return [_to_loaded_task(task, "hub", "") for task in tasks]


def _to_loaded_task(task: Any, source: str, incomplete: str) -> LoadedTask:
    """Describe a task of lm_eval."""
    metrics, kind = list(task.aggregation()), task.OUTPUT_TYPE
    has_own_function = any(callable(metric["metric"]) for metric in task.config.metric_list or ())
    computes_own_metrics = task.config.process_results is not None or task.config.repeats > 1 or has_own_function
    if getattr(task, "MULTIMODAL", False):
        raise UserError(f"Task '{task.task_name}' must have text only; got images or audio.")
    if computes_own_metrics or not {*SUPPORTED_METRICS.get(kind, ())} & {*metrics}:
        raise UserError(
            f"Task '{task.task_name}' ({kind}) must have lm_eval's metric acc, acc_norm or exact_match; got its own "
            f"{', '.join(metrics)}. For such tasks run lm_eval on the exported model."
        )
    note = f"lm_eval's own task{incomplete}"
    return LoadedTask(task, source, complete=not incomplete, note=note, num_fewshot=task.config.num_fewshot or 0)


@functools.lru_cache(maxsize=1)
def _task_manager() -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager()  # cached, because it reads thousands of YAML files


def local_file(name: str) -> Path | None:
    """Return the file with the questions of a local task, or None."""
    root = os.environ.get("GPRUNE_DATA_DIR")
    is_plain_name = name.replace("_", "").isalnum()  # with other characters the path could leave the folder
    if not root or not is_plain_name:
        return None
    files = (expanded(root) / "tasks" / name / f"{split}.jsonl" for split in ("test", "validation"))
    return next(filter(Path.is_file, files), None)


def local_task(path: Path) -> LoadedTask:
    """Load a task from a local file, which has rows of lm_eval's data set, or questions."""
    import datasets
    from lm_eval.api.task import ConfigurableTask

    name, split = path.parent.name, path.stem
    rows_by_line = _read_rows(path)
    first_row = next(iter(rows_by_line.values()))
    is_question = {"prompt", "choices", "label"} <= first_row.keys() or "good" in first_row
    if not is_question and name in _task_manager().all_subtasks:
        return _task_with_local_rows(path.parent)
    questions = [_parse_question(row, line) for line, row in rows_by_line.items()]
    are_pairs = all("paradigm" in question for question in questions)
    if are_pairs:
        _interleave_paradigms(questions)
    scored_texts = (([(q["prompt"], f" {choice}") for choice in q["choices"]], q["label"]) for q in questions)
    complete = questions_hash(scored_texts) == COMPLETE_SPLITS.get(name)
    # Minimal pairs are scored as whole sentences, so normalising by length (acc_norm) makes no sense.
    metrics = ["acc"] if are_pairs else ["acc", "acc_norm"]
    config = {
        "task": name, "custom_dataset": lambda **_: {split: datasets.Dataset.from_list(questions)},
        f"{split}_split": split, "output_type": "multiple_choice", "target_delimiter": " ",
        "doc_to_text": "prompt", "doc_to_choice": "choices", "doc_to_target": "label",
        "metric_list": [{"metric": metric} for metric in metrics],
        "metadata": {"version": "1.0" if complete else "local"},
    }  # fmt: skip
    note = "lm_eval's prompts" if complete else f"{len(questions):,} questions, {PARTIAL_NOTE}"
    with quoting(f"Cannot read questions in {path}: "):
        return LoadedTask(ConfigurableTask(config=config), "local", complete, note)


def _interleave_paradigms(pairs: list[dict[str, Any]]) -> None:
    """Sort minimal pairs in place: the first of every paradigm, the second of every paradigm, and so on.

    So any `--limit` covers all paradigms.
    """
    counters: dict[str, Iterator[int]] = defaultdict(itertools.count)
    pairs.sort(key=lambda pair: next(counters[pair["paradigm"]]))


def _task_with_local_rows(folder: Path) -> LoadedTask:
    """Load lm_eval's task, with rows of the local files `<split>.jsonl` instead of its data set."""
    import datasets

    splits: dict[str, Any] = defaultdict(lambda: datasets.Dataset.from_list([]))  # splits without a file are empty
    config = {"task": folder.name, "custom_dataset": lambda **_: splits}
    with quoting(f"Cannot read rows of lm_eval's data set, in the split that it evaluates, in {folder}: "):
        for path in folder.glob("*.jsonl"):
            rows = list(_read_rows(path).values())
            splits[path.stem] = datasets.Dataset.from_dict({key: [row[key] for row in rows] for key in rows[0]})
        (task,) = _task_manager().load([{"group": "local", "task": [config]}])["tasks"].values()
    num_rows = len(task.eval_docs)
    has_few_shot_examples = task.OUTPUT_TYPE == "generate_until"
    sizes = (num_rows, len(splits["train"])) if has_few_shot_examples else num_rows
    complete = sizes == COMPLETE_SPLITS.get(folder.name)
    return _to_loaded_task(task, "local", "" if complete else f" on {num_rows:,} rows, {PARTIAL_NOTE}")


def _read_rows(path: Path) -> dict[str, dict[str, Any]]:
    """Read a file with a JSON object on each line. Return "file:line" -> object."""
    rows = {}
    for i, line in enumerate(read_required_text(path, "a question per line in UTF-8").split("\n"), 1):
        if line.strip():
            with quoting(f"{path}:{i}: Cannot read a JSON object: "):
                rows[f"{path}:{i}"] = {**json.loads(line)}
    if not rows:
        raise UserError(f"{path} must have a question per line; got an empty file.")
    return rows


def _parse_question(row: dict[str, Any], where: str) -> dict[str, Any]:
    """Convert a row to a question with `prompt`, `choices` and `label`, and for a minimal pair also `paradigm`."""
    if "good" in row:
        question = {"prompt": "", "choices": [row["good"], row.get("bad")], "label": 0}
        question["paradigm"] = str(row.get("paradigm", ""))
    else:
        question = {name: row.get(name) for name in ("prompt", "choices", "label")}
    choices = question["choices"] if isinstance(question["choices"], list) else []
    are_texts = all(isinstance(text, str) for text in (question["prompt"], *choices))
    has_choices = len(choices) > 1 and all(choices)
    if not (are_texts and has_choices and question["label"] in range(len(choices))):
        expected = '{"prompt": str, "choices": [str, str, ...], "label": int} or {"good": str, "bad": str}'
        raise UserError(f"{where}: The line must be {expected}, or a row of lm_eval's data set.")
    return question


def questions_hash(questions: Iterable[tuple[list[tuple[str, str]], Any]]) -> str:
    """Return a hash of everything that is scored."""
    return hashlib.sha256(json.dumps(list(questions)).encode()).hexdigest()[:16]
