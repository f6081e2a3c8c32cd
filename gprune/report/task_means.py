"""Means of accuracies over groups of tasks and over lists, with paired differences from the dense model."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gprune.evaluation.intervals import Estimate
from gprune.report.tables import Cell, Table, difference_of_answers, evaluation_table, format_estimate, pair_key
from gprune.runs.numbers import Record, row_name

HALF_WIDTH = 1.959964  # of a 95 % interval, in standard errors; tasks have hundreds of questions
LIST = "all tasks"  # name of the mean over the whole list
METRICS = {"acc": "acc_norm", "acc_norm": "acc"}  # metric -> the one that counts for a task without it
CORRECT = {"acc": "correct", "acc_norm": "correct_norm"}  # metric -> entry of records with a digit per question


@dataclass(frozen=True)
class Mean:
    """A weighted mean over tasks."""

    name: str  # of a group, or `LIST`
    weights: Mapping[str, float]  # by name of the task
    num_tasks: int  # of the complete group; fewer have weights if some could not be measured

    def of(self, by_task: Mapping[str, tuple[float, float | None]]) -> Estimate:
        """Return the mean of (number, standard error) of each task, with a 95 % interval."""
        numbers, errors = zip(*(by_task[task] for task in self.weights), strict=True)
        weights = list(self.weights.values())
        mean = sum(weight * number for weight, number in zip(weights, numbers, strict=True))
        if None in errors:  # a task with a single question
            return Estimate(mean)
        half_width = HALF_WIDTH * math.hypot(*(weight * error for weight, error in zip(weights, errors, strict=True)))
        return Estimate(mean, mean - half_width, mean + half_width)

    def accuracy(self, records: Mapping[str, Record], metric: str) -> Estimate:
        """Return the mean of a metric of one model."""
        used = {task: _used_metric(records[task], metric) for task in self.weights}
        return self.of({task: (records[task][name], records[task][f"{name}_stderr"]) for task, name in used.items()})

    def difference(self, records: Mapping[str, Record], references: Mapping[Any, Record], metric: str) -> Estimate:
        """Return the mean difference of a model from the one of `references`, paired over questions."""
        differences = {}
        for task in self.weights:
            r = records[task]
            key = CORRECT[_used_metric(r, metric)]
            differences[task] = difference_of_answers(r, references[pair_key(r)], key)
        return self.of(differences)


def evaluation_tables(records: Sequence[Record]) -> list[Table]:
    """Return the table of tasks, perplexity and speed and, if there are several tasks, the table of their means."""
    means = means_table(records)
    return [evaluation_table(records), *([means] if means.rows else [])]


def means_table(records: Sequence[Record]) -> Table:
    """Table with a row per mean and model: mean accuracies, and their differences from the dense model's."""
    dense = {pair_key(r): r for r in reversed(records) if r["stage"] == "dense"}
    shown = [r for r in records if r["stage"] != "dense" or dense[pair_key(r)] is r]  # runs may share a dense model
    rows: list[list[Cell]] = []
    for of_protocol in _by(filter(_has_accuracy, shown), "dtype", "limit"):
        models = _by(of_protocol, "run", "stage", "recovery", "origin")
        models.sort(key=lambda of_model: of_model[0]["stage"] != "dense")
        for mean in _means(of_protocol):
            for of_model in models:
                of_tasks = {r["task"]: r for r in of_model if r["task"] in mean.weights}
                if of_tasks:
                    rows.append(_row(mean, of_tasks, dense))
    against = [f"{metric} - dense" for metric in METRICS]
    columns = ["mean over", "run", "stage", "tasks", "acc", against[0], "acc_norm", against[1], "standard protocol"]
    note = (
        "Each task has the same weight; subjects of a group such as mmlu are weighted by their numbers of questions. A "
        "task without acc_norm, such as boolq and winogrande, counts with acc. In brackets 95 % intervals over "
        "questions; differences from dense are paired."
    )
    return Table("means", "Means of tasks", columns, rows, dict.fromkeys(columns[4:8], 3), note)


def _row(mean: Mean, records: Mapping[str, Record], dense: Mapping[Any, Record]) -> list[Cell]:
    """Return a row of the table: a mean of one model. Numbers are empty if a task is missing."""
    r = next(iter(records.values()))
    is_complete = len(records) == mean.num_tasks
    has_dense = r["stage"] != "dense" and all(pair_key(of_task) in dense for of_task in records.values())
    numbers: list[Cell] = []
    for metric in METRICS:
        numbers.append(mean.accuracy(records, metric) if is_complete else None)
        numbers.append(mean.difference(records, dense, metric) if is_complete and has_dense else None)
    tasks = f"{len(records)}" if is_complete else f"{len(records)} of {mean.num_tasks}"
    standard = "yes" if is_complete and all(of_task["standard_protocol"] for of_task in records.values()) else "no"
    return [mean.name, r["run"], row_name(r["stage"], r.get("recovery") or "none"), tasks, *numbers, standard]


def compare_means(records: Sequence[Record], references: Sequence[Record]) -> dict[str, str]:
    """Compare means of two models over what both have. Return "zeroshot7, acc" -> the difference with its interval."""
    by_key = {pair_key(r): r for r in references}
    shared = {r["task"]: r for r in records if _has_accuracy(r) and pair_key(r) in by_key}
    complete = [mean for mean in _means(list(shared.values())) if len(mean.weights) == mean.num_tasks]
    return {
        f"{mean.name}, {metric}": format_estimate(mean.difference(shared, by_key, metric), 3)
        for mean in complete
        for metric in METRICS
    }


def _means(records: Sequence[Record]) -> list[Mean]:
    """Return the means over all groups of the tasks, and over the list unless that is the same as a group."""
    tasks = {r["task"]: r for r in records}
    groups = {name: group for r in tasks.values() for name, group in r.get("groups", {}).items()}
    means = []
    items: dict[str, list[str]] = defaultdict(list)  # of the list: a task, or all subjects of a group that is one task
    for task, r in tasks.items():
        items[next((name for name in r.get("groups", {}) if groups[name]["by_size"]), task)].append(task)
    for name, group in groups.items():
        members = [task for task, r in tasks.items() if name in r.get("groups", {})]
        sizes = [tasks[task]["questions"] if group["by_size"] else 1 for task in members]
        means.append(Mean(name, _shares(members, sizes), group["tasks"]))
    if len(items) > 1 and not any(mean.weights.keys() == tasks.keys() for mean in means):
        of_items = [_shares(members, [tasks[task]["questions"] for task in members]) for members in items.values()]
        weights = {task: share / len(items) for shares in of_items for task, share in shares.items()}
        means.append(Mean(LIST, weights, len(tasks)))
    return means


def _shares(tasks: Sequence[str], sizes: Sequence[int]) -> dict[str, float]:
    return {task: size / sum(sizes) for task, size in zip(tasks, sizes, strict=True)}


def _has_accuracy(r: Record) -> bool:
    return r["kind"] == "zero_shot" and (r["acc"] is not None or r["acc_norm"] is not None)


def _used_metric(r: Record, metric: str) -> str:
    """Return the metric that counts for a task: `metric`, or the other one if the task does not have it."""
    return metric if r[metric] is not None else METRICS[metric]


def _by(records: Iterable[Record], *names: str) -> list[list[Record]]:
    """Return the records in lists of those that agree in the entries `names`."""
    groups = defaultdict(list)
    for r in records:
        groups[tuple(r.get(name) for name in names)].append(r)
    return list(groups.values())
