"""Tasks of EleutherAI's lm_eval: its own where the Hugging Face hub answers, the same from local files where not.

`pip install 'gprune[lm-eval]'`; lm_eval is imported when it is used, and nothing but zero-shot tasks needs it.
"""

from __future__ import annotations

import functools
import logging
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from gprune.benchmarks.tasks import Questions, load_questions, local_file, local_tasks
from gprune.corpora.hub import offline_if_unreachable
from gprune.errors import UserError, first_line

log = logging.getLogger("gprune")


def require_lm_eval() -> str:
    """Version of lm_eval."""
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise UserError(
            "Zero-shot tasks need EleutherAI's lm_eval, which is not installed: pip install 'gprune[lm-eval]' "
            "(from a checkout: pip install -e '.[lm-eval]')."
        ) from error
    return version("lm_eval")


@dataclass(frozen=True)
class LoadedTask:
    """A task of lm_eval's, ready to run, and what is said of it in records."""

    task: Any  # lm_eval.api.task.Task
    source: str  # "hub" or "local"
    split: str
    version: str
    complete: bool
    note: str


def load_tasks(name: str, source: str) -> list[LoadedTask]:
    """The tasks a name stands for, from the hub or from local files."""
    path = local_file(name)
    if source == "local":
        if path is None:
            there = ", ".join(local_tasks()) or "none"
            raise UserError(f"No local files for task '{name}'. Under $GPRUNE_DATA_DIR/tasks: {there}.")
        return [local_task(load_questions(path))]
    with offline_if_unreachable() as reachable:
        if source == "auto" and path is not None and not reachable:
            log.info("No answer from the Hugging Face hub: task %s comes from local files", name)
            return [local_task(load_questions(path))]
        manager = _manager()
        if name not in manager.all_tasks:
            if source == "auto" and path is not None:
                return [local_task(load_questions(path))]
            raise UserError(
                f"Unknown task '{name}': expected a task of lm_eval's (`lm-eval ls tasks`), or files in "
                f"$GPRUNE_DATA_DIR/tasks/{name}."
            )
        try:
            found = manager.load([name])["tasks"].values()
        except Exception as error:  # datasets, the hub and the http client each raise their own
            reason = first_line(error)
            if source == "auto" and path is not None:
                log.warning("Task %s comes from local files: the hub did not give it (%s)", name, reason)
                return [local_task(load_questions(path))]
            raise UserError(
                f"Task '{name}' could not be had from the Hugging Face hub ({reason}). Without network put its "
                f"questions into $GPRUNE_DATA_DIR/tasks/{name}/test.jsonl."
            ) from error
    return [_hub_task(task) for task in found]


def local_task(questions: Questions) -> LoadedTask:
    """Local questions as a task of lm_eval's."""
    import datasets
    from lm_eval.api.task import ConfigurableTask

    rows = [{k: row[k] for k in ("prompt", "choices", "label")} for row in questions.rows]
    metrics = ["acc"] if questions.pairs else ["acc", "acc_norm"]
    data = {questions.split: datasets.Dataset.from_list(rows)}
    config = {
        "task": questions.name,
        "custom_dataset": lambda **_: data,
        f"{questions.split}_split": questions.split,
        "output_type": "multiple_choice",
        "doc_to_text": lambda row: row["prompt"],
        "doc_to_choice": lambda row: row["choices"],
        "doc_to_target": lambda row: row["label"],
        "target_delimiter": " ",
        "metric_list": [{"metric": m, "aggregation": "mean", "higher_is_better": True} for m in metrics],
        "metadata": {"version": questions.about.version},
    }
    about = questions.about
    return LoadedTask(
        ConfigurableTask(config=config), "local", questions.split, about.version, about.complete, about.note
    )


@functools.lru_cache(maxsize=1)
def _manager() -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager()  # reads thousands of YAML files, which takes seconds


def _hub_task(task: Any) -> LoadedTask:
    if task.OUTPUT_TYPE != "multiple_choice":
        raise UserError(
            f"Task '{task.task_name}' is of type {task.OUTPUT_TYPE}; expected multiple_choice, whose accuracy is "
            f"measured here. Use lm_eval's own command line on the exported model for others."
        )
    # Without a list lm_eval takes acc and acc_norm.
    metrics = [metric["metric"] for metric in task.config.metric_list or [{"metric": "acc"}]]
    if task.config.process_results is not None or not {"acc", "acc_norm"} & set(metrics):
        raise UserError(
            f"Task '{task.task_name}' counts in a way of its own ({', '.join(map(str, metrics))}); expected acc or "
            f"acc_norm as lm_eval defines them. Use lm_eval's own command line on the exported model for others."
        )
    split = task.config.test_split or task.config.validation_split
    return LoadedTask(task, "hub", split, str(task.VERSION), True, "lm_eval's own task")
