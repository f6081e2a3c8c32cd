"""Tasks by name, ready for lm_eval: its own, with data from the Hugging Face hub or local files, or local questions.

Local files are `$GPRUNE_DATA_DIR/tasks/<name>/<split>.jsonl`. A line is a row of the data set that lm_eval's task of
this name reads; or a question `{"prompt": ..., "choices": [...], "label": 0}`, where a choice is scored as the
continuation " " + choice of the prompt; or a minimal pair `{"good": ..., "bad": ..., "paradigm": ...}`, whose sentences
are scored whole.

`pip install 'gprune[lm-eval]'`; lm_eval is imported when it is used, and nothing but tasks needs it.
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

from gprune.corpora.hub import downloading, offline_if_unreachable
from gprune.errors import UserError, quoting
from gprune.storage.reading import expanded, needed_text

log = logging.getLogger("gprune")
# By type of a task, what is counted of its questions; of loglikelihood, whether greedy decoding gives the text.
COUNTED = {"multiple_choice": ("acc", "acc_norm"), "loglikelihood": ("acc",), "generate_until": ("exact_match",)}
# Of whole splits: the number of rows, or `content_hash` of local questions with lm_eval's prompts.
WHOLE = {"lambada_openai": 5153, "hellaswag": 10042, "winogrande": 1267, "arc_challenge": 1172, "gsm8k": (1319, 7473)}
WHOLE |= {"piqa": "f230db808510ef88", "arc_easy": "16b23eecab0a5935"}
PART = "not known to be all of lm_eval's, and never to be set beside published figures"


@dataclass(frozen=True)
class LoadedTask:
    """A task of lm_eval's, ready to run, and what is said of it in records."""

    task: Any  # lm_eval.api.task.Task
    source: str  # "hub" or "local"
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
        raise UserError(f"Task '{name}' has no local files: expected $GPRUNE_DATA_DIR/tasks/{name}/test.jsonl.")
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
    with downloading(f"task '{name}'", f"its questions into $GPRUNE_DATA_DIR/tasks/{name}/test.jsonl"):
        tasks = manager.load([name])["tasks"].values()
    return [_admitted(task, "hub", "") for task in tasks]


def _admitted(task: Any, source: str, part: str) -> LoadedTask:
    """A task of lm_eval's; a UserError unless its questions are counted as in `COUNTED`."""
    metrics, kind = list(task.aggregation()), task.OUTPUT_TYPE
    own = task.config.process_results is not None or task.config.repeats > 1
    if own or not {*COUNTED.get(kind, ())} & {*metrics}:
        raise UserError(
            f"Task '{task.task_name}' ({kind}) counts {', '.join(metrics)} in a way of its own; expected acc, acc_norm "
            "or exact_match, as lm_eval counts them. Use lm_eval on the exported model for others."
        )
    return LoadedTask(task, source, not part, f"lm_eval's own task{part}")


@functools.lru_cache(maxsize=1)
def _manager() -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager()  # reads thousands of YAML files, which takes seconds


def local_file(name: str) -> Path | None:
    """The file with the questions of a local task, or None where there is none."""
    root = os.environ.get("GPRUNE_DATA_DIR")
    if not root or not name.replace("_", "").isalnum():  # a plain name only: it must not lead out of the folder
        return None
    files = (expanded(root) / "tasks" / name / f"{split}.jsonl" for split in ("test", "validation"))
    return next(filter(Path.is_file, files), None)


def local_task(path: Path) -> LoadedTask:
    """A file as a task of lm_eval's: its own with these rows, or one of questions; a UserError for other lines."""
    import datasets
    from lm_eval.api.task import ConfigurableTask

    name, split, lines = path.parent.name, path.stem, _rows(path)
    first = next(iter(lines.values()))
    if not ({"prompt", "choices", "label"} <= first.keys() or "good" in first) and name in _manager().all_subtasks:
        return _of_rows(path.parent)
    rows = [_question(row, place) for place, row in lines.items()]
    pairs = all("paradigm" in row for row in rows)
    if pairs:  # the first of every paradigm, then the second of every paradigm, ...: any limit covers them all
        turns: dict[str, Iterator[int]] = defaultdict(itertools.count)
        rows.sort(key=lambda row: next(turns[row["paradigm"]]))
    scored = content_hash(([(row["prompt"], f" {c}") for c in row["choices"]], row["label"]) for row in rows)
    whole = scored == WHOLE.get(name)
    config = {
        "task": name, "custom_dataset": lambda **_: {split: datasets.Dataset.from_list(rows)},
        f"{split}_split": split, "output_type": "multiple_choice", "target_delimiter": " ",
        "doc_to_text": "prompt", "doc_to_choice": "choices", "doc_to_target": "label",
        # The sentences of a pair have no common prompt, and their lengths say nothing.
        "metric_list": [{"metric": metric} for metric in (["acc"] if pairs else ["acc", "acc_norm"])],
        "metadata": {"version": "1.0" if whole else "local"},
    }  # fmt: skip
    note = "lm_eval's prompts" if whole else f"{len(rows):,} questions, {PART}"
    with quoting(f"{path}: expected questions that lm_eval can read (", ")."):
        return LoadedTask(ConfigurableTask(config=config), "local", whole, note)


def _of_rows(folder: Path) -> LoadedTask:
    """lm_eval's own task, with the rows of local files in place of the data set."""
    import datasets

    splits: dict[str, Any] = defaultdict(lambda: datasets.Dataset.from_list([]))  # the others
    own = {"task": folder.name, "custom_dataset": lambda **_: splits}
    with quoting(f"{folder}: expected rows of lm_eval's data set, in the split that it measures (", ")."):
        for path in folder.glob("*.jsonl"):
            rows = list(_rows(path).values())
            splits[path.stem] = datasets.Dataset.from_dict({key: [row[key] for row in rows] for key in rows[0]})
        (task,) = _manager().load([{"group": "local", "task": [own]}])["tasks"].values()
    n = len(task.eval_docs)
    counted = n if task.OUTPUT_TYPE != "generate_until" else (n, len(splits["train"]))  # its worked examples
    return _admitted(task, "local", "" if counted == WHOLE.get(folder.name) else f" on {n:,} rows, {PART}")


def _rows(path: Path) -> dict[str, dict[str, Any]]:
    """By their place, the objects of a file's lines."""
    rows = {}
    for i, line in enumerate(needed_text(path, "a question per line in UTF-8").split("\n"), 1):
        if line.strip():
            with quoting(f"{path}:{i}: expected an object in JSON (", ")."):
                rows[f"{path}:{i}"] = {**json.loads(line)}
    if not rows:
        raise UserError(f"{path}: expected a question per line, got an empty file.")
    return rows


def _question(row: dict[str, Any], where: str) -> dict[str, Any]:
    """A row as prompt, choices and label; of a minimal pair, its paradigm too."""
    own = {name: row.get(name) for name in ("prompt", "choices", "label")}
    if "good" in row:
        own = {"prompt": "", "choices": [row["good"], row.get("bad")], "label": 0}
        own["paradigm"] = str(row.get("paradigm", ""))
    choices = own["choices"] if isinstance(own["choices"], list) else []
    texts = all(isinstance(text, str) for text in (own["prompt"], *choices)) and all(choices)
    if not (texts and len(choices) > 1 and own["label"] in range(len(choices))):
        expected = '{"prompt": str, "choices": [str, str, ...], "label": int} or {"good": str, "bad": str}'
        raise UserError(f"{where}: expected {expected}, or a row of lm_eval's.")
    return own


def content_hash(questions: Iterable[tuple[list[tuple[str, str]], int]]) -> str:
    """Hash of all that is scored: of each question, (context, continuation) of each choice, and the right one."""
    scored = [[[list(choice) for choice in choices], label] for choices, label in questions]
    return hashlib.sha256(json.dumps(scored).encode()).hexdigest()[:16]
