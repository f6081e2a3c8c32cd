"""Zero-shot tasks by name, ready for lm_eval: its own with data from the Hugging Face hub, or local questions.

Local questions are in `$GPRUNE_DATA_DIR/tasks/<name>/<split>.jsonl`. A line is `{"prompt": ..., "choices": [...],
"label": 0}`, where a choice is scored as the continuation " " + choice of the prompt; or it is a minimal pair
`{"good": ..., "bad": ..., "paradigm": ...}`, whose sentences are scored whole.

`pip install 'gprune[lm-eval]'`; lm_eval is imported when it is used, and nothing but zero-shot tasks needs it.
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

from gprune.corpora.hub import had_from_hub, offline_if_unreachable
from gprune.errors import UserError
from gprune.storage.reading import expanded, needed_text

log = logging.getLogger("gprune")
SPLITS = ("test", "validation")  # lm_eval, too, takes the test split where there is one
SUBSET = "a subset of the task: never to be set beside published figures"
# Of local tasks: the version, what their questions are, and `content_hash` where they are lm_eval's, all of a split.
KNOWN = {
    "piqa": ("1.0", "lm_eval's prompts", "f230db808510ef88"),
    "arc_easy": ("1.0", "lm_eval's prompts", "16b23eecab0a5935"),
    "sciq": ("subset-1", f"validation questions, without the test split; {SUBSET}", None),
    "blimp": ("subset-1", f"15 of the 1000 pairs of each paradigm; {SUBSET}", None),
}


@dataclass(frozen=True)
class LoadedTask:
    """A task of lm_eval's, ready to run, and what is said of it in records."""

    task: Any  # lm_eval.api.task.Task
    source: str  # "hub" or "local"
    split: str
    version: str
    complete: bool  # all questions of the split with lm_eval's prompts: a number may stand beside those of others
    note: str


def require_lm_eval() -> str:
    """Version of lm_eval; a UserError where it is not installed."""
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise UserError("Zero-shot tasks need lm_eval, which is not there: pip install 'gprune[lm-eval]'.") from error
    return version("lm_eval")


def load_tasks(name: str, source: str) -> list[LoadedTask]:
    """The tasks that a name stands for; `source`: hub, local, or auto: the hub where it answers and has the task.

    Raises:
        UserError: for a task that cannot be had, and for one whose accuracy is not measured here.
    """
    path = None if source == "hub" else local_file(name)
    if source == "local" and path is None:
        there = ", ".join(local_tasks()) or "none"
        raise UserError(f"No local files for task '{name}'. Under $GPRUNE_DATA_DIR/tasks: {there}.")
    if source != "local":
        with offline_if_unreachable() as reachable:
            try:
                if reachable or path is None:
                    return hub_tasks(name)
            except UserError as error:
                if path is None:
                    raise
                log.info("%s", error)
        log.info("Task %s comes from local files", name)
    return [local_task(path)]


def hub_tasks(name: str) -> list[LoadedTask]:
    """lm_eval's own task of a name, or all tasks of a group of this name, with data from the hub."""
    manager = _manager()
    if name not in manager.all_tasks:
        expected = f"a task of lm_eval's (`lm-eval ls tasks`), or files in $GPRUNE_DATA_DIR/tasks/{name}"
        raise UserError(f"Unknown task '{name}': expected {expected}.")
    with had_from_hub(f"Task '{name}'", f"its questions into $GPRUNE_DATA_DIR/tasks/{name}/test.jsonl"):
        tasks = list(manager.load([name])["tasks"].values())
    loaded = []
    for task in tasks:
        # Without a list lm_eval takes acc and acc_norm.
        metrics = [metric["metric"] for metric in task.config.metric_list or [{"metric": "acc"}]]
        own = task.config.process_results is not None or not {"acc", "acc_norm"} & set(metrics)
        if task.OUTPUT_TYPE != "multiple_choice" or own:
            raise UserError(
                f"Task '{task.task_name}' is of type {task.OUTPUT_TYPE} and counts {', '.join(map(str, metrics))}; "
                f"expected multiple_choice with acc or acc_norm. Use lm_eval on the exported model for others."
            )
        split = task.config.test_split or task.config.validation_split
        loaded.append(LoadedTask(task, "hub", split, str(task.VERSION), True, "lm_eval's own task"))
    return loaded


@functools.lru_cache(maxsize=1)
def _manager() -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager()  # reads thousands of YAML files, which takes seconds


def local_file(name: str) -> Path | None:
    """The file with the questions of a local task, or None where there is none."""
    root = os.environ.get("GPRUNE_DATA_DIR")
    if not root or not name.replace("_", "").isalnum():  # a plain name only: it must not lead out of the folder
        return None
    files = (expanded(root) / "tasks" / name / f"{split}.jsonl" for split in SPLITS)
    return next(filter(Path.is_file, files), None)


def local_tasks() -> list[str]:
    """Names of the tasks under `$GPRUNE_DATA_DIR`."""
    folders = expanded(os.environ.get("GPRUNE_DATA_DIR", "")).glob("tasks/*")
    return sorted(folder.name for folder in folders if local_file(folder.name))


def local_task(path: Path) -> LoadedTask:
    """The questions of a file as a task of lm_eval's; a UserError for a line that is no question."""
    import datasets
    from lm_eval.api.task import ConfigurableTask

    name, split = path.parent.name, path.stem
    lines = needed_text(path, "a question per line in UTF-8").split("\n")
    rows = [_question(line, f"{path}:{i}") for i, line in enumerate(lines, 1) if line.strip()]
    if not rows:
        raise UserError(f"{path}: expected a question per line, got an empty file.")
    pairs = all("paradigm" in row for row in rows)
    if pairs:  # the first of every paradigm, then the second of every paradigm, ...: any limit covers them all
        turns: dict[str, Iterator[int]] = defaultdict(itertools.count)
        rows.sort(key=lambda row: next(turns[row["paradigm"]]))
    unknown = ("local", "local files that gprune knows nothing of: not to be set beside published figures", None)
    task_version, note, whole = KNOWN.get(name, unknown)
    scored = content_hash(([(row["prompt"], f" {c}") for c in row["choices"]], row["label"]) for row in rows)
    if whole not in (None, scored):
        note = f"{len(rows):,} questions that are not all of lm_eval's, or have other prompts"
    config = {
        "task": name, "custom_dataset": lambda **_: {split: datasets.Dataset.from_list(rows)},
        f"{split}_split": split, "output_type": "multiple_choice", "num_fewshot": 0, "target_delimiter": " ",
        "doc_to_text": "prompt", "doc_to_choice": "choices", "doc_to_target": "label",
        # The sentences of a pair have no common prompt, and their lengths say nothing.
        "metric_list": [{"metric": metric} for metric in (["acc"] if pairs else ["acc", "acc_norm"])],
        "metadata": {"version": task_version},
    }  # fmt: skip
    return LoadedTask(ConfigurableTask(config=config), "local", split, task_version, whole == scored, note)


def _question(line: str, where: str) -> dict[str, Any]:
    """A line as prompt, choices and label; of a minimal pair, its paradigm too."""
    try:
        row = json.loads(line)
        if "good" in row:
            own = {"prompt": "", "choices": [row["good"], row["bad"]], "label": 0}
            own["paradigm"] = str(row.get("paradigm", ""))
        else:
            own = {name: row[name] for name in ("prompt", "choices", "label")}
        texts, choices = [own["prompt"], *own["choices"]], len(own["choices"])
        sound = all(isinstance(text, str) for text in texts) and all(texts[1:]) and choices >= 2
        if sound and own["label"] in range(choices):
            return own
    except (ValueError, KeyError, TypeError):
        pass
    expected = '{"prompt": str, "choices": [str, str, ...], "label": int} or {"good": str, "bad": str}'
    raise UserError(f"{where}: expected {expected}.")


def content_hash(questions: Iterable[tuple[list[tuple[str, str]], int]]) -> str:
    """Hash of all that is scored: of each question, (context, continuation) of each choice, and the right one."""
    scored = [[[list(choice) for choice in choices], label] for choices, label in questions]
    return hashlib.sha256(json.dumps(scored).encode()).hexdigest()[:16]
