"""The frame of a run: all of its numbers, one per line.

The terminal, files, the page, W&B, the model card, lists and notebooks print this frame, filtered and pivoted.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import t as student

from gprune.corpora.load import corpus_labels
from gprune.evaluation.intervals import Estimate, mean_per_token, mean_perplexity, paired_gap, paired_ratio

Record = dict[str, Any]  # a perplexity with its evaluation protocol, as in metrics.json
ByCorpus = dict[str, Record]
Line = tuple[str, bool | None, str, Estimate, int | None]  # corpus, seen, number, value with interval, windows
COLUMNS = ["row", "stage", "corpus", "seen", "seed", "number", "value", "low", "high", "windows"]
STAGES = ("dense", "pruned", "recovered", "measured")  # of a model, in the order of the frame
SUMMARY = ("sparsity_of_model", "sparsity_of_scope", "forward_tokens", "forward_backward_tokens", "learned_tokens")
METRICS = ("acc", "acc_norm", "exact_match", "score", "perplexity", "tokens_per_second", "seconds")  # of tasks
HALF_WIDTH = 1.959964  # of a 95 % interval, in standard errors; tasks have hundreds of questions
NOTHING: Mapping[str, Any] = {}


def key_part(name: str) -> str:
    """Convert a name to a part of a metric key: `my corpus.txt` becomes `my_corpus.txt`."""
    return re.sub(r"[^\w.-]+", "_", name)


def by_stage(records: Sequence[Record]) -> dict[str, ByCorpus]:
    """Return stage -> corpus -> record, in the order of the records; the last stage is the final model."""
    table: dict[str, ByCorpus] = {}
    for r in records:
        table.setdefault(r["stage"], {})[r["corpus"]] = r
    return table


def final(records: Sequence[Record]) -> ByCorpus:
    """Return the records of the final model by corpus."""
    return list(by_stage(records).values())[-1]


def same_windows(one: ByCorpus, other: ByCorpus) -> bool:
    """Return whether two models were measured on the same windows. They were not if their tokenizers differ."""
    return {c: r["content_hash"] for c, r in one.items()} == {c: r["content_hash"] for c, r in other.items()}


def unseen_ratio(one: ByCorpus, other: ByCorpus, number: str = "nll") -> Estimate | None:
    """Ratio of the geometric-mean perplexities of two models on text unseen by both, with a paired 95 % interval.

    With `number="kl"` it is the ratio of exp(KL). None without unseen text, on different windows, or if not measured.
    """
    unseen = [c for c, r in one.items() if not (r["seen"] or (c in other and other[c]["seen"]))]
    if any(c not in other or other[c]["content_hash"] != one[c]["content_hash"] for c in unseen):
        return None
    return _ratio({c: one[c] for c in unseen}, other, number)


def _ratio(one: ByCorpus, other: ByCorpus, number: str = "nll") -> Estimate | None:
    """Ratio of the geometric means of exp(`number`) over the corpora of `one`; None if it was not measured."""
    sums = [{c: records[c].get(f"window_{number}") for c in one} for records in (one, other)]
    if not one or any(None in of_model.values() for of_model in sums):
        return None
    return Estimate(*paired_ratio(*sums, _predicted(one)))


def _predicted(records: ByCorpus) -> int:
    """Return the number of predicted tokens of a window."""
    return next(iter(records.values()))["seq_len"] - 1


def entries(summary: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the entries of a summary, which features write and readers print without knowing the feature.

    An entry has a text `said` and, optionally, lines `warnings`, `numbers` by name, and a `table`, which has the
    arguments of `report.tables.Table` except its name; an estimate among numbers or in rows is [value, low, high].
    """
    return {name: value for name, value in summary.items() if isinstance(value, dict) and "said" in value}


def run_frame(
    row: str, records: Sequence[Record], summary: Mapping[str, Any] = NOTHING,
    steps: Mapping[str, Mapping[str, float]] = NOTHING, evaluation: Sequence[Record] = (), *,
    labels: Mapping[str, str] | None = None,
) -> pd.DataFrame:  # fmt: skip
    """Return all numbers of a run, one per line, with the columns `COLUMNS`. Undefined numbers have no line.

    - With a corpus: `perplexity`, `times_dense`, `kl` (nats per token) and `agreement`.
    - Over corpora, where `corpus` is empty: `seen` and `unseen` (geometric means), `gap`, `seen_over_dense`,
      `unseen_over_dense`, `unseen_kl` and `unseen_agreement`.
    - Of the whole model: `parameters` and `tasks/<task>/<metric>`; of the final stage also shares, tokens, seconds and
      peak memory of the run and of its steps (`steps/<step>/seconds`), and `<entry>/<number>` of entries.

    `low` and `high` are the ends of 95 % intervals over windows, or over questions; NaN without an interval.

    Args:
        row: name of the run.
        records: perplexities, as in metrics.json.
        summary, steps: as in metrics.json and manifest.json.
        evaluation: records of `gprune evaluate`.
        labels: name of a corpus -> its label in the column `corpus`. Default: the shortest names that are unique.
    """
    stages, seed = by_stage(records), records[0]["seed"]
    labels = labels or corpus_labels({r["corpus"] for r in records})
    lines = []
    for stage, of_stage in stages.items():
        is_final = of_stage is list(stages.values())[-1]
        numbers = list(_of_text(of_stage, stages["dense"]))
        numbers += [("", None, name, value, None) for name, value in _of_model(summary, steps, stage, is_final)]
        if stage == "dense" or is_final:
            numbers += _of_tasks([r for r in evaluation if (r["stage"] == "dense") == (stage == "dense")])
        for corpus, seen, number, estimate, windows in numbers:
            lines.append((row, stage, labels.get(corpus, ""), seen, seed, number, *estimate, windows))
    return typed(pd.DataFrame(lines, columns=COLUMNS))


def typed(frame: pd.DataFrame) -> pd.DataFrame:
    """Return a frame with the types of `COLUMNS`, for example after it was read from a CSV file."""
    types = {"corpus": str, "seen": "boolean", "value": float, "low": float, "high": float, "windows": "Int64"}
    return frame.fillna({"corpus": ""}).astype(types)


def _of_text(model: ByCorpus, dense: ByCorpus) -> Iterator[Line]:
    """Yield the numbers of one stage on each corpus, then those over corpora."""
    beside_dense = model is not dense and same_windows(model, dense)
    predicted = _predicted(model)
    for corpus, r in model.items():
        seen, windows = r["seen"], len(r["window_nll"])
        interval = mean_perplexity({corpus: r["window_nll"]}, predicted)[1:]
        yield corpus, seen, "perplexity", Estimate(r["perplexity"], *interval), windows
        if beside_dense:
            yield corpus, seen, "times_dense", _ratio({corpus: r}, dense), windows
        for name, largest in (("kl", math.inf), ("agreement", 1.0)):
            if r.get(name) is not None:
                interval = mean_per_token({corpus: r[f"window_{name}"]}, predicted, largest=largest)[1:]
                yield corpus, seen, name, Estimate(r[name], *interval), windows
    for name, seen in (("seen", True), ("unseen", False)):
        of_kind = {c: r for c, r in model.items() if r["seen"] == seen}
        if not of_kind:
            continue
        windows = sum(len(r["window_nll"]) for r in of_kind.values())
        nll = {c: r["window_nll"] for c, r in of_kind.items()}
        yield "", seen, name, Estimate(*mean_perplexity(nll, predicted)), windows
        if beside_dense:
            yield "", seen, f"{name}_over_dense", _ratio(of_kind, dense), windows
        if not seen and all(r.get("kl") is not None for r in of_kind.values()):
            for number, largest in (("kl", math.inf), ("agreement", 1.0)):
                sums = {c: r[f"window_{number}"] for c, r in of_kind.items()}
                yield "", seen, f"unseen_{number}", Estimate(*mean_per_token(sums, predicted, largest=largest)), windows
    if beside_dense and len({r["seen"] for r in model.values()}) == 2:
        nll = [{c: r["window_nll"] for c, r in records.items()} for records in (model, dense)]
        gap = paired_gap(*nll, {c: r["seen"] for c, r in model.items()}, predicted)
        yield "", None, "gap", Estimate(*gap), sum(map(len, nll[0].values()))


def _of_model(
    summary: Mapping[str, Any], steps: Mapping[str, Mapping[str, float]], stage: str, is_final: bool
) -> Iterator[tuple[str, Estimate]]:
    """Yield numbers of the whole model: those of the summary, costs, and numbers of entries."""
    numbers: dict[str, Any] = {}
    if stage == "dense":
        numbers = {"parameters": summary.get("parameters_before")}
    elif is_final:
        numbers = {"parameters": summary.get("parameters_after")} | {name: summary.get(name) for name in SUMMARY}
        if steps:
            numbers["seconds"] = sum(step.get("seconds", 0) for step in steps.values())
            numbers["peak_memory_mib"] = max(step.get("peak_memory_mib", 0) for step in steps.values())
        for entry, content in entries(summary).items():
            numbers |= {f"{entry}/{name}": value for name, value in content.get("numbers", {}).items()}
        numbers |= {f"steps/{step}/{name}": value for step, costs in steps.items() for name, value in costs.items()}
    for name, value in numbers.items():
        if value is not None:
            yield name, Estimate(*value) if isinstance(value, list) else Estimate(value)


def task_frame(records: Sequence[Record]) -> pd.DataFrame:
    """Return the lines of `run_frame` for results of `gprune evaluate` on one model and on its dense model."""
    lines = []
    for stage in dict.fromkeys(r["stage"] for r in records):
        for corpus, seen, number, estimate, questions in _of_tasks([r for r in records if r["stage"] == stage]):
            lines.append(("", stage, corpus, seen, None, number, *estimate, questions))
    return typed(pd.DataFrame(lines, columns=COLUMNS))


def _of_tasks(records: Sequence[Record]) -> Iterator[Line]:
    """Yield results of `gprune evaluate`. Of records of one task with other prompts or weights the last one counts."""
    numbers: dict[str, tuple[Estimate, int | None]] = {}
    for r in records:
        size = r["seq_len"] if r["kind"] == "perplexity" else r.get("batch")
        task = key_part(r["task"]) + ("" if size is None else f"/{size}")
        for name in METRICS:
            if (value := r.get(name)) is None:
                continue
            low, high = r.get("low"), r.get("high")  # of a perplexity
            if (error := r.get(f"{name}_stderr")) is not None:
                low, high = value - HALF_WIDTH * error, value + HALF_WIDTH * error
            numbers[f"tasks/{task}/{name}"] = Estimate(value, low, high), r.get("questions")
    for name, (estimate, questions) in numbers.items():
        yield "", None, name, estimate, questions


def final_lines(frame: pd.DataFrame) -> pd.DataFrame:
    """Return the lines of the final model of each row: recovered, or pruned without recovery, or measured."""
    order = frame["stage"].map(STAGES.index)
    return frame[order == order.groupby(frame["row"]).transform("max")]


def keyed(frame: pd.DataFrame) -> dict[str, float]:
    """Return the numbers of one run by `<stage>/<number>` or `<stage>/<number>/<corpus>`, as trackers log them.

    The final model has the keys `final/...` too.
    """
    numbers = {}
    for prefix, lines in (("", frame), ("final", final_lines(frame[frame["stage"] != "dense"]))):
        for line in lines.itertuples():
            corpus = f"/{key_part(line.corpus)}" if line.corpus else ""
            numbers[f"{prefix or line.stage}/{line.number}{corpus}"] = line.value
    return numbers


# --- means over seeds


def mean_over_seeds(values: Sequence[float]) -> Estimate:
    """Return the geometric mean over seeds with exp(mean(log) +- t(0.975, n - 1) sd(log) / sqrt(n)) as its interval."""
    mean, half_width = _mean_and_half_width(np.log(values))
    return Estimate(math.exp(mean), math.exp(mean - half_width), math.exp(mean + half_width))


def arithmetic_mean_over_seeds(values: Sequence[float], largest: float = math.inf) -> Estimate:
    """Return the arithmetic mean over seeds with a 95 % interval by Student's t, cut off at 0 and `largest`."""
    mean, half_width = _mean_and_half_width(np.array(values))
    return Estimate(mean, max(0.0, mean - half_width), min(largest, mean + half_width))


def _mean_and_half_width(values: np.ndarray) -> tuple[float, float]:
    """Return the mean of n values, and half of its 95 % interval: t(0.975, n - 1) sd / sqrt(n)."""
    half_width = student.ppf(0.975, len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values))
    return float(values.mean()), float(half_width)


MEANS = dict.fromkeys(("perplexity", "times_dense", "seen", "unseen", "gap"), mean_over_seeds)
MEANS |= dict.fromkeys(("seen_over_dense", "unseen_over_dense"), mean_over_seeds)
MEANS |= dict.fromkeys(("kl", "unseen_kl"), arithmetic_mean_over_seeds)
MEANS |= dict.fromkeys(("agreement", "unseen_agreement"), partial(arithmetic_mean_over_seeds, largest=1.0))


def pool_estimates(estimates: Sequence[Estimate | None], mean: Any = mean_over_seeds) -> Estimate | None:
    """Combine the estimates of seeds by `mean`; None if one is None.

    A single estimate, and estimates that do not depend on the seed, keep their interval over windows.
    """
    if not estimates or None in estimates:
        return None
    values = [estimate.value for estimate in estimates]
    same = max(values) - min(values) <= 1e-6 * abs(values[0])  # sums differ by machine
    return estimates[0] if same else mean(values)


def pool_seeds(frame: pd.DataFrame) -> pd.DataFrame:
    """Return the means over the seeds of each row that has several, with intervals over seeds; `seed` is "mean".

    Numbers that do not depend on the seed, such as those of the dense model, are kept. Numbers that a seed lacks, and
    costs that differ by seed, have no line.
    """
    seeds = frame.groupby("row")["seed"].transform("nunique")
    lines = []
    for _, same in frame[seeds > 1].groupby(["row", "stage", "corpus", "number"], sort=False):
        first = same.iloc[0]
        if len(same) < seeds[same.index[0]]:
            continue
        if (mean := MEANS.get(first["number"])) is not None:
            pooled = pool_estimates([Estimate(*e) for e in same[["value", "low", "high"]].to_numpy()], mean)
        elif same["value"].nunique() == 1:
            pooled = Estimate(*first[["value", "low", "high"]])
        else:
            continue
        lines.append(first.to_dict() | {"seed": "mean"} | pooled._asdict())
    return typed(pd.DataFrame(lines, columns=frame.columns))
