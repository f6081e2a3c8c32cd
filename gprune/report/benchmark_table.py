"""Table of `evaluation.json`: tasks, perplexity and speed, with differences from the dense model."""

from __future__ import annotations

from collections.abc import Sequence

from gprune.evaluation.intervals import paired_difference, paired_ratio
from gprune.report.table import Cell, Table
from gprune.runs.numbers import Record, row_name


def evaluation_table(records: Sequence[Record]) -> Table:
    """Table of accuracies, perplexities and speeds, with paired differences from the dense model if it was measured.

    Args:
        records: as in `evaluation.json`, with `run` and `stage` in each.
    """
    dense = {_pair_key(r): r for r in reversed(records) if r["stage"] == "dense"}  # runs may share a dense model
    shown = [r for r in records if r["stage"] != "dense" or dense[_pair_key(r)] is r]
    rows: list[list[Cell]] = []
    # For speed, the dense model stays next to the model that was timed in alternation with it.
    for r in sorted(shown, key=lambda r: (r["kind"] != "zero_shot", r["task"], r.get("batch", r["stage"] != "dense"))):
        reference = dense.get(_pair_key(r)) if r["stage"] != "dense" else None
        rows.append([r["task"], r["run"], row_name(r["stage"], r.get("recovery") or "none"), *_cells(r, reference)])
    header = ["task", "run", "stage", "split", "n", "acc or perplexity", "acc_norm", "against dense", "flips"]
    flips = "Flips: answers other than the dense model's; - right there and wrong here, + the reverse. "
    if all(row[8] is None for row in rows):
        rows, header, flips = [row[:8] + row[9:] for row in rows], header[:8], ""
    return Table(
        "evaluation",
        "Tasks and perplexity",
        [*header, "standard protocol", "note"],
        rows,
        note="Accuracy +- standard error; perplexity with a 95 % interval. n: questions, or predicted tokens. Against "
        "dense, paired over questions or windows: accuracy minus the dense model's +- standard error; perplexity over "
        "the dense model's with a 95 % interval. "
        f"{flips}Standard protocol: all questions of the split with lm_eval's own prompts, or all windows; other "
        "numbers are never to be set beside published figures, nor is any number of a de-quantised model.",
    )


def against(ours: Sequence[Record], theirs: Sequence[Record]) -> dict[str, str]:
    """Compare the records of two models by task: paired difference of accuracy, or ratio of perplexity or speed."""
    others = {_pair_key(r): r for r in theirs}
    pairs = [(r, others[_pair_key(r)]) for r in ours if _pair_key(r) in others]
    of = {"seq_len": ", {}", "batch": ", batch {}"}
    return {r["task"] + "".join(s.format(r[n]) for n, s in of.items() if n in r): _against(r, o) for r, o in pairs}


def rated(r: Record) -> str:
    """Format a record of speed."""
    return f"{r['tokens_per_second']:.1f} tokens/s, {r['seconds']:.3f} s"


def _against(r: Record, other: Record) -> str:
    if r["kind"] == "perplexity":
        nll = ({"": record["window_nll"]} for record in (r, other))
        return "x {:.3f} [{:.3f}, {:.3f}]".format(*paired_ratio(*nll, r["seq_len"] - 1))
    if r["kind"] == "speed":
        return f"x {r['tokens_per_second'] / other['tokens_per_second']:.3f}"
    scored = "correct" if "correct" in r else "correct_norm"  # some tasks of lm_eval have only acc_norm
    digits = ([c == "1" for c in record[scored]] for record in (r, other))
    return _with_error(*paired_difference(*digits), sign="+")


def _flips(r: Record, dense: Record) -> str | None:
    """Format the shares of questions whose answer changed, changed from right to wrong, and from wrong to right."""
    if not ("correct" in r and r.get("answers") and dense.get("answers")):
        return None
    pairs = list(zip(dense["correct"], r["correct"], strict=True))
    changed = sum(a != b for a, b in zip(dense["answers"], r["answers"], strict=True))
    counts = changed, pairs.count(("1", "0")), pairs.count(("0", "1"))
    return "{:.1%}: -{:.1%} +{:.1%}".format(*(count / len(pairs) for count in counts))


def _with_error(value: float | None, error: float | None, sign: str = "") -> str | None:
    return None if value is None else f"{value:{sign}.3f}" + ("" if error is None else f" +- {error:.3f}")


def _pair_key(r: Record) -> tuple[Cell, ...]:
    """Return a key that is equal for records that can be paired: same questions or windows, base model and dtype."""
    parts = r.get("rounds") or (len(r["window_nll"]) if r["kind"] == "perplexity" else r["questions"])
    return (r["kind"], parts, "correct" in r, *(r.get(name) for name in ("task", "content_hash", "dtype", "model")))


def _cells(r: Record, dense: Record | None) -> list[Cell]:
    """Cells of a record after its name: split, n, number, acc_norm, difference from dense, flips, protocol, note."""
    about, n = [r["source"]] if "source" in r else [], "questions"
    main = "acc" if r.get("exact_match") is None else "exact_match"
    values = [_with_error(r.get(metric), r.get(f"{metric}_stderr")) for metric in (main, "acc_norm")]
    if r["kind"] == "perplexity":
        about, n = [*about, f"windows of {r['seq_len']} tokens"], "tokens"
        values[0] = f"{r['perplexity']:.2f} [{r['low']:.2f}, {r['high']:.2f}]"
    if r["kind"] == "speed":
        n, values[0] = "batch", rated(r)
    standard, note = "yes" if r["standard_protocol"] else "no", f"{', '.join([*about, r['dtype']])}: {r['note']}"
    return [r["split"], r[n], *values, dense and _against(r, dense), dense and _flips(r, dense), standard, note]
