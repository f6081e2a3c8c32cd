"""Tables of `gprune evaluate` and `experiments.engines`: tasks, perplexity, speed, and means over groups and lists.

Differences from the dense model are paired over questions or windows.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gprune.evaluation.intervals import Estimate, paired_difference, paired_ratio
from gprune.report.tables import Cell, Table, format_cell
from gprune.runs.numbers import HALF_WIDTH, Record

LIST = "all tasks"  # name of the mean over the whole list
METRICS = {"acc": "acc_norm", "acc_norm": "acc"}  # metric -> the one that counts for a task without it
CORRECT = {"acc": "correct", "acc_norm": "correct_norm"}  # metric -> entry of records with a digit per question


def evaluation_tables(records: Sequence[Record]) -> list[Table]:
    """Return the table of tasks, perplexity and speed and, if there are several tasks, the table of their means."""
    means = means_table(records)
    return [evaluation_table(records), *([means] if means.rows else [])]


def evaluation_table(records: Sequence[Record]) -> Table:
    """Table of accuracies, perplexities and speeds, with paired differences from the dense model if it was measured."""
    dense, shown = _dense_and_shown(records)
    rows: list[list[Cell]] = []
    for r in sorted(shown, key=_order):
        reference = dense.get(pair_key(r)) if r["stage"] != "dense" else None
        rows.append([r["task"], r["run"], r["stage"], *_cells(r, reference)])
    header = ["task", "run", "stage", "split", "n", "acc or perplexity", "acc_norm", "against dense", "flips", "greedy"]
    optional_columns = {  # dropped if empty -> their note
        "flips": "Flips: answers other than the dense model's; - right there and wrong here, + the reverse. ",
        "greedy": "Greedy: how often greedy decoding gives the right choice. ",
    }
    notes = ""
    for column, note in optional_columns.items():
        place = header.index(column)
        if all(row[place] is None for row in rows):
            rows = [row[:place] + row[place + 1 :] for row in rows]
            header.remove(column)
        else:
            notes += note
    note_on_examples = ""
    if any("own_num_fewshot" in r for r in shown):
        note_on_examples = " Numbers of examples in prompts are lm_eval's own, or those of most published numbers."
    return Table(
        "evaluation",
        "Tasks and perplexity",
        [*header, "standard protocol", "note"],
        rows,
        note="Accuracy +- standard error; perplexity with a 95 % interval. n: questions, or predicted tokens. Against "
        "dense, paired over questions or windows: accuracy minus the dense model's +- standard error; perplexity over "
        "the dense model's with a 95 % interval. "
        f"{notes}Standard protocol: all questions of the split with lm_eval's own prompts, or all windows; "
        "other numbers are never to be set beside published figures, nor is any number of a de-quantised model."
        f"{note_on_examples}",
    )


def _dense_and_shown(records: Sequence[Record]) -> tuple[dict[Any, Record], list[Record]]:
    """Return the records of dense models by `pair_key`, and the records that tables show.

    Runs may share a dense model. Its first record is shown, and compared with.
    """
    dense = {pair_key(r): r for r in reversed(records) if r["stage"] == "dense"}
    return dense, [r for r in records if r["stage"] != "dense" or dense[pair_key(r)] is r]


def _order(r: Record) -> tuple[Any, ...]:
    """Return the sort key of a record: zero-shot tasks first, then by task, with the dense model first.

    Records of speed are sorted by batch size instead, so that the dense model stays next to the model that was timed in
    alternation with it.
    """
    return r["kind"] != "zero_shot", r["task"], r.get("batch", r["stage"] != "dense")


def compare_records(records: Sequence[Record], references: Sequence[Record]) -> dict[str, str]:
    """Compare the records of two models. Return "piqa" or "decode, batch 8" -> the ratio or difference as text."""
    by_key = {pair_key(r): r for r in references}
    comparisons = {}
    for r in records:
        reference = by_key.get(pair_key(r))
        if reference is None:
            continue
        task = r["task"]
        if "seq_len" in r:
            task += f", {r['seq_len']}"
        if "batch" in r:
            task += f", batch {r['batch']}"
        if comparison := _format_comparison(r, reference):
            comparisons[task] = comparison
    return comparisons


def format_rate(r: Record) -> str:
    """Format a record of speed: tokens per second, and seconds."""
    return f"{r['tokens_per_second']:.1f} tokens/s, {r['seconds']:.3f} s"


def _format_comparison(r: Record, reference: Record) -> str | None:
    """Format the ratio of perplexities with its interval, the ratio of speeds, or the difference of accuracies."""
    if r["kind"] == "perplexity":
        nll, reference_nll = {"": r["window_nll"]}, {"": reference["window_nll"]}
        ratio = Estimate(*paired_ratio(nll, reference_nll, r["seq_len"] - 1))
        return f"x {format_cell(ratio, 3)}"
    if r["kind"] == "speed":
        return f"x {r['tokens_per_second'] / reference['tokens_per_second']:.3f}"
    if "scores" in r:  # of a task with a metric of its own
        return _with_error(*paired_difference(r["scores"], reference["scores"]), sign="+")
    key = "correct" if "correct" in r else "correct_norm"  # some tasks of lm_eval have only acc_norm
    if key not in r:  # a metric over all questions together
        return None
    return _with_error(*difference_of_answers(r, reference, key), sign="+")


def difference_of_answers(r: Record, reference: Record, key: str) -> tuple[float, float | None]:
    """Return `paired_difference` of two records in an entry with a digit per question (1: correct)."""
    return paired_difference(list(map(int, r[key])), list(map(int, reference[key])))


def _format_flips(r: Record, dense: Record) -> str | None:
    """Format the shares of questions whose answer changed, changed from right to wrong, and from wrong to right."""
    if not ("correct" in r and r.get("answers") and dense.get("answers")):
        return None
    pairs = list(zip(dense["correct"], r["correct"], strict=True))
    answers = zip(dense["answers"], r["answers"], strict=True)
    changed = sum(dense_answer != answer for dense_answer, answer in answers)
    to_wrong, to_right = pairs.count(("1", "0")), pairs.count(("0", "1"))
    n = len(pairs)
    return f"{changed / n:.1%}: -{to_wrong / n:.1%} +{to_right / n:.1%}"


def _format_greedy(r: Record, dense: Record | None) -> str | None:
    """Format how often greedy decoding gives the right choice, and the paired difference from the dense model."""
    share = _with_error(r.get("greedy"), r.get("greedy_stderr"))
    if share is None or dense is None or "correct_greedy" not in dense:
        return share
    return f"{share} ({_with_error(*difference_of_answers(r, dense, 'correct_greedy'), sign='+')})"


def _with_error(value: float | None, error: float | None, sign: str = "") -> str | None:
    """Format a value with its standard error, if there is one; None for a missing value."""
    if value is None:
        return None
    text = f"{value:{sign}.3f}"
    return text if error is None else f"{text} +- {error:.3f}"


def pair_key(r: Record) -> tuple[Cell, ...]:
    """Return a key that is equal for records that can be paired.

    Such records have the same base model and dtype, and the same questions, windows, or rounds of timing.
    """
    amount = len(r["window_nll"]) if r["kind"] == "perplexity" else r.get("questions")
    measured_on = r.get("rounds") or amount  # only records of speed have rounds
    has_accuracy = "correct" in r  # otherwise `_format_comparison` uses acc_norm
    names = ("task", "content_hash", "dtype", "model")
    return (r["kind"], measured_on, has_accuracy, *(r.get(name) for name in names))


def _cells(r: Record, dense: Record | None) -> list[Cell]:
    """Return the cells of a record after those of task, run and stage.

    They are split, n, number, acc_norm, difference from dense, flips, greedy, standard protocol, and note.
    """
    description = [r["source"]] if "source" in r else []
    if r["kind"] == "perplexity":
        description.append(f"windows of {r['seq_len']} tokens")
        n, number = r["tokens"], format_cell(Estimate(r["perplexity"], r["low"], r["high"]))
    elif r["kind"] == "speed":
        n, number = r["batch"], format_rate(r)
    else:
        metric = next((name for name in ("exact_match", "score") if r.get(name) is not None), "acc")
        n, number = r["questions"], _with_error(r.get(metric), r.get(f"{metric}_stderr"))
    acc_norm = _with_error(r.get("acc_norm"), r.get("acc_norm_stderr"))
    comparison = None if dense is None else _format_comparison(r, dense)
    flips = None if dense is None else _format_flips(r, dense)
    standard = "yes" if r["standard_protocol"] else "no"
    if r["standard_protocol"] and "own_num_fewshot" in r:
        whose = "lm_eval's" if r["num_fewshot"] == r["own_num_fewshot"] else "the literature's"
        standard = f"yes, {whose} {r['num_fewshot']} examples"
    note = f"{', '.join([*description, r['dtype']])}: {r['note']}"
    return [r["split"], n, number, acc_norm, comparison, flips, _format_greedy(r, dense), standard, note]


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


def means_table(records: Sequence[Record]) -> Table:
    """Table with a row per mean and model: mean accuracies, and their differences from the dense model's."""
    dense, shown = _dense_and_shown(records)
    rows: list[list[Cell]] = []
    for of_protocol in _by(filter(_has_accuracy, shown), "dtype", "limit", "num_fewshot"):
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
    return [mean.name, r["run"], r["stage"], tasks, *numbers, standard]


def compare_means(records: Sequence[Record], references: Sequence[Record]) -> dict[str, str]:
    """Compare means of two models over what both have. Return "zeroshot7, acc" -> the difference with its interval."""
    by_key = {pair_key(r): r for r in references}
    differences = {}
    for of_number in _by((r for r in records if _has_accuracy(r) and pair_key(r) in by_key), "num_fewshot"):
        shared = {r["task"]: r for r in of_number}
        for mean in _means(of_number):
            if len(mean.weights) == mean.num_tasks:
                for metric in METRICS:
                    difference = mean.difference(shared, by_key, metric)
                    differences[f"{mean.name}, {metric}"] = format_cell(difference, 3)
    return differences


def _means(records: Sequence[Record]) -> list[Mean]:
    """Return the means over all groups of the tasks, and over the list unless that is the same as a group.

    The prompts of all records have the same number of examples.
    """
    tasks = {r["task"]: r for r in records}
    groups = {name: group for r in tasks.values() for name, group in r.get("groups", {}).items()}
    (number,) = {r.get("num_fewshot") for r in tasks.values()} or {None}
    with_examples = f", {number} examples" if number else ""
    means = []
    items: dict[str, list[str]] = defaultdict(list)  # of the list: a task, or all subjects of a group that is one task
    for task, r in tasks.items():
        items[next((name for name in r.get("groups", {}) if groups[name]["by_size"]), task)].append(task)
    for name, group in groups.items():
        members = [task for task, r in tasks.items() if name in r.get("groups", {})]
        sizes = [tasks[task]["questions"] if group["by_size"] else 1 for task in members]
        means.append(Mean(name + with_examples, _shares(members, sizes), group["tasks"]))
    if len(items) > 1 and not any(mean.weights.keys() == tasks.keys() for mean in means):
        of_items = [_shares(members, [tasks[task]["questions"] for task in members]) for members in items.values()]
        weights = {task: share / len(items) for shares in of_items for task, share in shares.items()}
        means.append(Mean(LIST + with_examples, weights, len(tasks)))
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
