"""Means of tasks over groups and lists, compared with sums over questions in NumPy."""

from __future__ import annotations

import numpy as np
import pytest

from gprune.report.task_tables import compare_means, evaluation_tables, means_table

SIZES = {"boolq": 40, "piqa": 60, "mmlu_a": 30, "mmlu_b": 90}
PAIR = {"pair": {"tasks": 2, "by_size": False}}
MMLU = {"mmlu": {"tasks": 2, "by_size": True}}
GROUPS = {"boolq": PAIR, "piqa": PAIR, "mmlu_a": MMLU, "mmlu_b": MMLU}


def digits(task: str, model: str, metric: str) -> np.ndarray:
    """Return whether the model answers each question correctly."""
    seed = [*f"{task} {model} {metric}".encode()]
    return np.random.default_rng(seed).random(SIZES[task]) < (0.6 if model == "dense" else 0.45)


def record(task: str, model: str, **entries) -> dict:
    """Return the record of a task. That of boolq has no acc_norm."""
    result = {
        "kind": "zero_shot", "task": task, "stage": model, "recovery": "none", "run": "r", "model": "tiny",
        "origin": "o", "dtype": "float32", "limit": None, "split": "test", "source": "local", "note": "",
        "standard_protocol": True, "questions": SIZES[task], "content_hash": task, "groups": GROUPS[task],
        "acc_norm": None, "acc_norm_stderr": None,
    }  # fmt: skip
    for metric, text in (("acc", "correct"), ("acc_norm", "correct_norm")):
        if (task, metric) != ("boolq", "acc_norm"):
            correct = digits(task, model, metric)
            result[metric] = correct.mean()
            result[f"{metric}_stderr"] = correct.std(ddof=1) / len(correct) ** 0.5
            result[text] = "".join(map(str, correct.astype(int)))
    return result | entries


RECORDS = [record(task, model) for model in ("dense", "pruned") for task in SIZES]


def rows_by_name(records) -> dict[tuple[str, str], dict]:
    """Return {(name of the mean, model): {column: cell}} of the rows of the table of means."""
    table = means_table(records)
    return {(row[0], row[2]): dict(zip(table.columns, row, strict=True)) for row in table.rows}


def expected(weights: dict[str, float], per_question) -> tuple[float, float, float]:
    """Weighted mean over tasks of a number per question, and its 95 % interval."""
    values = {task: per_question(task).astype(float) for task in weights}
    mean = sum(weight * values[task].mean() for task, weight in weights.items())
    variance = sum(weight**2 * values[task].var(ddof=1) / len(values[task]) for task, weight in weights.items())
    return mean, mean - 1.96 * variance**0.5, mean + 1.96 * variance**0.5


@pytest.mark.parametrize(
    ("name", "weights"),
    [
        ("pair", {"boolq": 1 / 2, "piqa": 1 / 2}),
        ("mmlu", {"mmlu_a": 30 / 120, "mmlu_b": 90 / 120}),
        ("all tasks", {"boolq": 1 / 3, "piqa": 1 / 3, "mmlu_a": 30 / 360, "mmlu_b": 90 / 360}),
    ],
)
def test_means_and_differences_equal_sums_over_questions(name, weights):
    rows = rows_by_name(RECORDS)
    for metric in ("acc", "acc_norm"):

        def used(task, model, metric=metric):
            return digits(task, model, "acc" if task == "boolq" else metric)

        for model in ("dense", "pruned"):
            assert rows[name, model][metric] == pytest.approx(
                expected(weights, lambda task, m=model: used(task, m)), abs=1e-4
            )
        difference = expected(weights, lambda t: used(t, "pruned").astype(float) - used(t, "dense").astype(float))
        assert rows[name, "pruned"][f"{metric} - dense"] == pytest.approx(difference, abs=1e-4)
        assert rows[name, "dense"][f"{metric} - dense"] is None


def test_means_need_all_tasks_of_a_group_and_differences_the_same_questions():
    without_piqa = rows_by_name([r for r in RECORDS if (r["task"], r["stage"]) != ("piqa", "pruned")])
    row = without_piqa["pair", "pruned"]
    assert (row["tasks"], row["acc"], row["acc - dense"], row["standard protocol"]) == ("1 of 2", None, None, "no")
    assert without_piqa["pair", "dense"]["acc"] is not None
    nowhere = [r for r in RECORDS if r["task"] != "piqa"]
    assert rows_by_name(nowhere)["pair", "dense"]["tasks"] == "1 of 2"
    other_questions = [r | {"content_hash": "x"} if r["stage"] == "dense" else r for r in RECORDS]
    assert rows_by_name(other_questions)["pair", "pruned"]["acc - dense"] is None
    of_earlier_version = [{k: v for k, v in r.items() if k != "groups"} for r in RECORDS]
    assert {name for name, _ in rows_by_name(of_earlier_version)} == {"all tasks"}


def test_a_single_task_a_perplexity_and_tasks_with_different_limits_have_no_mean():
    piqa, boolq = (record(task, "dense", groups={}) for task in ("piqa", "boolq"))
    assert [table.name for table in evaluation_tables([piqa])] == ["evaluation"]
    assert means_table([piqa, boolq | {"kind": "perplexity", "window_nll": [1.0]}]).rows == []
    assert means_table([piqa | {"limit": 20}, boolq]).rows == []


def test_two_models_are_compared_on_complete_groups():
    dense, pruned = RECORDS[:4], RECORDS[4:]
    compared = compare_means(pruned, dense)
    names = [f"{name}, {metric}" for name in ("pair", "mmlu", "all tasks") for metric in ("acc", "acc_norm")]
    assert list(compared) == names
    value = expected(
        {"boolq": 0.5, "piqa": 0.5}, lambda t: digits(t, "pruned", "acc") * 1.0 - digits(t, "dense", "acc")
    )
    assert compared["pair, acc"] == "{:.3f} [{:.3f}, {:.3f}]".format(*value)
    assert "pair, acc" not in compare_means(pruned[1:], dense)


def test_means_never_mix_numbers_of_examples():
    """The same tasks with 5 examples, where boolq was answered without examples only."""
    shots = [r | {"num_fewshot": 5, "content_hash": f"{r['task']}, 5"} for r in RECORDS if r["task"] != "boolq"]
    zero = [r | {"num_fewshot": 0} for r in RECORDS]
    rows, without = rows_by_name([*zero, *shots]), rows_by_name(zero)
    assert {key: row for key, row in rows.items() if "examples" not in key[0]} == without
    assert rows["mmlu, 5 examples", "pruned"]["acc"] == without["mmlu", "pruned"]["acc"]
    assert (rows["pair, 5 examples", "pruned"]["tasks"], rows["pair, 5 examples", "pruned"]["acc"]) == ("1 of 2", None)
    compared = compare_means(*([r for r in (*zero, *shots) if r["stage"] == of] for of in ("pruned", "dense")))
    assert {key: value for key, value in compared.items() if "examples" not in key} == compare_means(zero[4:], zero[:4])
    assert "mmlu, 5 examples, acc" in compared
    assert "pair, 5 examples, acc" not in compared
