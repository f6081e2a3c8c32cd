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
# Type of a task -> metrics that are used. acc of loglikelihood: whether greedy decoding gives the text.
COUNTED = {"multiple_choice": ("acc", "acc_norm"), "loglikelihood": ("acc",), "generate_until": ("exact_match",)}
# Identity of complete splits: number of rows, or `content_hash` of local questions with lm_eval's prompts.
WHOLE = {"lambada_openai": 5153, "hellaswag": 10042, "winogrande": 1267, "arc_challenge": 1172, "gsm8k": (1319, 7473)}
WHOLE |= {"piqa": "f230db808510ef88", "arc_easy": "16b23eecab0a5935"}
PART = "not known to be all of lm_eval's, and never to be set beside published figures"


@dataclass(frozen=True)
class LoadedTask:
    """A task of lm_eval, and its description in records."""

    task: Any  # lm_eval.api.task.Task
    source: str  # "hub" or "local"
    complete: bool  # all questions of the split with lm_eval's prompts, so results can be compared with published ones
    note: str


def require_lm_eval() -> str:
    """Return the version of lm_eval; UserError if it is not installed."""
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        remedy = "Run pip install 'gprune[lm-eval]'"
        raise UserError(f"--tasks needs lm_eval for zero-shot tasks, which is not installed. {remedy}.") from error
    return version("lm_eval")


def load_tasks(name: str, source: str) -> list[LoadedTask]:
    """Load a task, or all tasks of a group.

    Args:
        name: name of the task or group.
        source: hub, local, or auto (the hub if it answers and has the task).

    Raises:
        UserError: if the task cannot be loaded, or its metric is not supported.
    """
    path = None if source == "hub" else local_file(name)
    if source == "local" and path is None:
        raise UserError(f"Task '{name}' needs the local file $GPRUNE_DATA_DIR/tasks/{name}/test.jsonl.")
    if source != "local":
        with offline_if_unreachable() as reachable:
            try:
                if reachable or path is None:
                    return hub_tasks(name)
            except UserError as error:
                if path is None:
                    raise
                log.info("%s", error)
        log.info("Reading task %s from local files", name)
    return [local_task(path)]


def hub_tasks(name: str) -> list[LoadedTask]:
    """Load lm_eval's task, or all tasks of a group, with data from the hub."""
    manager = _manager()
    if name not in manager.all_tasks:
        remedy = f"`lm-eval ls tasks` lists all tasks; local files go to $GPRUNE_DATA_DIR/tasks/{name}"
        raise UserError(f"Unknown task '{name}'. {remedy}.")
    with hub_errors(f"task '{name}'", f"its questions into $GPRUNE_DATA_DIR/tasks/{name}/test.jsonl"):
        tasks = manager.load([name])["tasks"].values()
    return [_admitted(task, "hub", "") for task in tasks]


def _admitted(task: Any, source: str, part: str) -> LoadedTask:
    """Return the task; UserError unless its metric is in `COUNTED`."""
    metrics, kind = list(task.aggregation()), task.OUTPUT_TYPE
    own = task.config.process_results is not None or task.config.repeats > 1
    if own or not {*COUNTED.get(kind, ())} & {*metrics}:
        raise UserError(
            f"Task '{task.task_name}' ({kind}) must have lm_eval's metric acc, acc_norm or exact_match; got its own "
            f"{', '.join(metrics)}. For such tasks run lm_eval on the exported model."
        )
    return LoadedTask(task, source, not part, f"lm_eval's own task{part}")


@functools.lru_cache(maxsize=1)
def _manager() -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager()  # slow: it reads thousands of YAML files


def local_file(name: str) -> Path | None:
    """Return the file with the questions of a local task, or None."""
    root = os.environ.get("GPRUNE_DATA_DIR")
    if not root or not name.replace("_", "").isalnum():  # other names could lead out of the folder
        return None
    files = (expanded(root) / "tasks" / name / f"{split}.jsonl" for split in ("test", "validation"))
    return next(filter(Path.is_file, files), None)


def local_task(path: Path) -> LoadedTask:
    """Load a local file as a task: rows of lm_eval's data set, or questions; UserError for other content."""
    import datasets
    from lm_eval.api.task import ConfigurableTask

    name, split, lines = path.parent.name, path.stem, _read_rows(path)
    first = next(iter(lines.values()))
    if not ({"prompt", "choices", "label"} <= first.keys() or "good" in first) and name in _manager().all_subtasks:
        return _of_rows(path.parent)
    rows = [_question(row, place) for place, row in lines.items()]
    pairs = all("paradigm" in row for row in rows)
    if pairs:  # interleave paradigms, so that any limit covers all of them
        turns: dict[str, Iterator[int]] = defaultdict(itertools.count)
        rows.sort(key=lambda row: next(turns[row["paradigm"]]))
    scored = questions_hash(([(row["prompt"], f" {c}") for c in row["choices"]], row["label"]) for row in rows)
    whole = scored == WHOLE.get(name)
    config = {
        "task": name, "custom_dataset": lambda **_: {split: datasets.Dataset.from_list(rows)},
        f"{split}_split": split, "output_type": "multiple_choice", "target_delimiter": " ",
        "doc_to_text": "prompt", "doc_to_choice": "choices", "doc_to_target": "label",
        # Pairs are scored as whole sentences, so normalising by length (acc_norm) makes no sense.
        "metric_list": [{"metric": metric} for metric in (["acc"] if pairs else ["acc", "acc_norm"])],
        "metadata": {"version": "1.0" if whole else "local"},
    }  # fmt: skip
    note = "lm_eval's prompts" if whole else f"{len(rows):,} questions, {PART}"
    with quoting(f"Cannot read questions in {path}: "):
        return LoadedTask(ConfigurableTask(config=config), "local", whole, note)


def _of_rows(folder: Path) -> LoadedTask:
    """Load lm_eval's task with rows of local files instead of its data set."""
    import datasets

    splits: dict[str, Any] = defaultdict(lambda: datasets.Dataset.from_list([]))  # other splits are empty
    own = {"task": folder.name, "custom_dataset": lambda **_: splits}
    with quoting(f"Cannot read rows of lm_eval's data set, in the split that it evaluates, in {folder}: "):
        for path in folder.glob("*.jsonl"):
            rows = list(_read_rows(path).values())
            splits[path.stem] = datasets.Dataset.from_dict({key: [row[key] for row in rows] for key in rows[0]})
        (task,) = _manager().load([{"group": "local", "task": [own]}])["tasks"].values()
    n = len(task.eval_docs)
    counted = n if task.OUTPUT_TYPE != "generate_until" else (n, len(splits["train"]))  # few-shot examples
    return _admitted(task, "local", "" if counted == WHOLE.get(folder.name) else f" on {n:,} rows, {PART}")


def _read_rows(path: Path) -> dict[str, dict[str, Any]]:
    """Read the JSON objects on the lines of a file, by "file:line"."""
    rows = {}
    for i, line in enumerate(read_required_text(path, "a question per line in UTF-8").split("\n"), 1):
        if line.strip():
            with quoting(f"{path}:{i}: Cannot read a JSON object: "):
                rows[f"{path}:{i}"] = {**json.loads(line)}
    if not rows:
        raise UserError(f"{path} must have a question per line; got an empty file.")
    return rows


def _question(row: dict[str, Any], where: str) -> dict[str, Any]:
    """Convert a row to prompt, choices and label; for a minimal pair also its paradigm."""
    own = {name: row.get(name) for name in ("prompt", "choices", "label")}
    if "good" in row:
        own = {"prompt": "", "choices": [row["good"], row.get("bad")], "label": 0}
        own["paradigm"] = str(row.get("paradigm", ""))
    choices = own["choices"] if isinstance(own["choices"], list) else []
    texts = all(isinstance(text, str) for text in (own["prompt"], *choices)) and all(choices)
    if not (texts and len(choices) > 1 and own["label"] in range(len(choices))):
        expected = '{"prompt": str, "choices": [str, str, ...], "label": int} or {"good": str, "bad": str}'
        raise UserError(f"{where}: The line must be {expected}, or a row of lm_eval's data set.")
    return own


def questions_hash(questions: Iterable[tuple[list[tuple[str, str]], int]]) -> str:
    """Hash of everything that is scored: (context, continuation) of each choice, and the label, of each question."""
    scored = [[[list(choice) for choice in choices], label] for choices, label in questions]
    return hashlib.sha256(json.dumps(scored).encode()).hexdigest()[:16]
