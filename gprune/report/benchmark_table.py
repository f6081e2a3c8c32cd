"""Table of `evaluation.json`: tasks, perplexity and speed, with differences from the dense model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gprune.evaluation.estimate import Estimate
from gprune.evaluation.intervals import paired_difference, paired_ratio
from gprune.report.table import Cell, Table, format_estimate
from gprune.runs.numbers import Record, row_name


def evaluation_table(records: Sequence[Record]) -> Table:
    """Table of accuracies, perplexities and speeds, with paired differences from the dense model if it was measured."""
    # Runs may share a dense model. Its first record is shown, and compared with.
    dense = {_pair_key(r): r for r in reversed(records) if r["stage"] == "dense"}
    selected = [r for r in records if r["stage"] != "dense" or dense[_pair_key(r)] is r]
    rows: list[list[Cell]] = []
    for r in sorted(selected, key=_order):
        reference = dense.get(_pair_key(r)) if r["stage"] != "dense" else None
        rows.append([r["task"], r["run"], row_name(r["stage"], r.get("recovery") or "none"), *_cells(r, reference)])
    header = ["task", "run", "stage", "split", "n", "acc or perplexity", "acc_norm", "against dense", "flips"]
    note_on_flips = "Flips: answers other than the dense model's; - right there and wrong here, + the reverse. "
    flips = header.index("flips")
    if all(row[flips] is None for row in rows):
        rows = [row[:flips] + row[flips + 1 :] for row in rows]
        header.remove("flips")
        note_on_flips = ""
    return Table(
        "evaluation",
        "Tasks and perplexity",
        [*header, "standard protocol", "note"],
        rows,
        note="Accuracy +- standard error; perplexity with a 95 % interval. n: questions, or predicted tokens. Against "
        "dense, paired over questions or windows: accuracy minus the dense model's +- standard error; perplexity over "
        "the dense model's with a 95 % interval. "
        f"{note_on_flips}Standard protocol: all questions of the split with lm_eval's own prompts, or all windows; "
        "other numbers are never to be set beside published figures, nor is any number of a de-quantised model.",
    )


def _order(r: Record) -> tuple[Any, ...]:
    """Return the sort key of a record: zero-shot tasks first, then by task, with the dense model first.

    Records of speed are sorted by batch size instead, so that the dense model stays next to the model that was timed in
    alternation with it.
    """
    return r["kind"] != "zero_shot", r["task"], r.get("batch", r["stage"] != "dense")


def compare_records(records: Sequence[Record], references: Sequence[Record]) -> dict[str, str]:
    """Compare the records of two models."""
    by_key = {_pair_key(r): r for r in references}
    comparisons = {}
    for r in records:
        reference = by_key.get(_pair_key(r))
        if reference is None:
            continue
        task = r["task"]
        if "seq_len" in r:
            task += f", {r['seq_len']}"
        if "batch" in r:
            task += f", batch {r['batch']}"
        comparisons[task] = _format_comparison(r, reference)
    return comparisons


def format_speed(r: Record) -> str:
    """Format a record of speed: tokens per second, and seconds."""
    return f"{r['tokens_per_second']:.1f} tokens/s, {r['seconds']:.3f} s"


def _format_comparison(r: Record, reference: Record) -> str:
    """Format the ratio of perplexities with its interval, the ratio of speeds, or the difference of accuracies."""
    if r["kind"] == "perplexity":
        nll, reference_nll = {"": r["window_nll"]}, {"": reference["window_nll"]}
        ratio = Estimate(*paired_ratio(nll, reference_nll, r["seq_len"] - 1))
        return f"x {format_estimate(ratio, 3)}"
    if r["kind"] == "speed":
        return f"x {r['tokens_per_second'] / reference['tokens_per_second']:.3f}"
    key = "correct" if "correct" in r else "correct_norm"  # some tasks of lm_eval have only acc_norm
    correct = [digit == "1" for digit in r[key]]
    reference_correct = [digit == "1" for digit in reference[key]]
    return _with_error(*paired_difference(correct, reference_correct), sign="+")


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


def _with_error(value: float | None, error: float | None, sign: str = "") -> str | None:
    """Format a value with its standard error, if there is one; None for a missing value."""
    if value is None:
        return None
    text = f"{value:{sign}.3f}"
    return text if error is None else f"{text} +- {error:.3f}"


def _pair_key(r: Record) -> tuple[Cell, ...]:
    """Return a key that is equal for records that can be paired.

    Such records have the same base model and dtype, and the same questions, windows, or rounds of timing.
    """
    amount = len(r["window_nll"]) if r["kind"] == "perplexity" else r.get("questions")
    measured_on = r.get("rounds") or amount  # only records of speed have rounds
    has_accuracy = "correct" in r  # otherwise `_format_comparison` uses acc_norm
    names = ("task", "content_hash", "dtype", "model")
    return (r["kind"], measured_on, has_accuracy, *(r.get(name) for name in names))


def _cells(r: Record, dense: Record | None) -> list[Cell]:
    """Return the cells of a record after its name.

    They are split, n, number, acc_norm, difference from dense, flips, standard protocol, and note.
    """
    description = [r["source"]] if "source" in r else []
    if r["kind"] == "perplexity":
        description.append(f"windows of {r['seq_len']} tokens")
        n, number = r["tokens"], format_estimate(Estimate(r["perplexity"], r["low"], r["high"]))
    elif r["kind"] == "speed":
        n, number = r["batch"], format_speed(r)
    else:
        metric = "acc" if r.get("exact_match") is None else "exact_match"
        n, number = r["questions"], _with_error(r.get(metric), r.get(f"{metric}_stderr"))
    acc_norm = _with_error(r.get("acc_norm"), r.get("acc_norm_stderr"))
    comparison = None if dense is None else _format_comparison(r, dense)
    flips = None if dense is None else _format_flips(r, dense)
    standard = "yes" if r["standard_protocol"] else "no"
    note = f"{', '.join([*description, r['dtype']])}: {r['note']}"
    return [r["split"], n, number, acc_norm, comparison, flips, standard, note]
