"""Numbers of a run, computed from the records in `metrics.json`: the frame from which all tables are made."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from gprune.corpora.load import corpus_labels
from gprune.evaluation.intervals import Estimate, mean_per_token, mean_perplexity, paired_gap, paired_ratio

Record = dict[str, Any]  # a perplexity with its evaluation protocol, as in metrics.json
ResultRow = tuple[str, str]  # (stage, recovery) of a row of the result table
STAGES = ("dense", "pruned", "recovered", "measured")  # of the model, in records; `measured` was not made by gprune
Line = dict[str, Any]  # a line of the frame of a run
DENSE = ("dense", "none")
NUMBER_COLUMNS = ["row", "seed", "stage", "recovery", "corpus", "number", "value", "low", "high"]


ESTIMATES = ("unseen", "seen", "gap", "unseen_over_dense", "seen_over_dense", "unseen_kl", "unseen_agreement")
WITH_INTERVALS = [column for name in ESTIMATES for column in (name, f"{name}_low", f"{name}_high")]
SUMMARY = (
    "sparsity_of_scope", "sparsity_of_model", "parameters_before", "parameters_after", "forward_tokens",
    "forward_backward_tokens",
)  # fmt: skip
ABOUT = ("model", "dtype", "precision", "scope", "target", "importance", "allocation")
# Columns of every frame. Columns of corpora, entries, settings and tasks follow, and `record` is the last column.
COLUMNS = [
    "row", "seed", "stage", "recovery", *WITH_INTERVALS, "unseen_dense", "seen_dense", *SUMMARY, "seconds",
    "peak_memory_mib", *ABOUT, "seen_corpora",
]  # fmt: skip


def row_name(stage: str, recovery: str) -> str:
    """Return the name of a row in tables: the stage of the model."""
    return stage


def key_part(name: str) -> str:
    """Convert a name to a part of a metric key: `my corpus.txt` becomes `my_corpus.txt`."""
    return re.sub(r"[^\w.-]+", "_", name)


def by_row(records: Sequence[Record], number: str = "perplexity") -> dict[ResultRow, dict[str, Any]]:
    """Return (stage, recovery) -> corpus -> the field `number` of the record, in the order of the records."""
    table: dict[ResultRow, dict[str, Any]] = {}
    for r in records:
        table.setdefault((r["stage"], r["recovery"]), {})[r["corpus"]] = r[number]
    return table


def records_of(records: Sequence[Record], row: ResultRow, *, seen: bool | None = None) -> dict[str, Record]:
    """Return the records of a row by corpus, optionally of seen or of unseen corpora only."""
    of_row = [r for r in records if (r["stage"], r["recovery"]) == row]
    return {r["corpus"]: r for r in of_row if seen is None or r["seen"] == seen}


def on_same_windows(records: Sequence[Record], row: ResultRow) -> bool:
    """Return whether a row was measured on the dense model's windows. It was not if the tokenizers differ."""

    def content_hashes(row: ResultRow) -> dict[str, str]:
        return {corpus: r["content_hash"] for corpus, r in records_of(records, row).items()}

    return content_hashes(row) == content_hashes(DENSE)


def distance(records: Sequence[Record], row: ResultRow) -> tuple[Estimate | None, Estimate | None]:
    """Return a row's mean KL from the dense model, and agreement with it, on unseen text; None if not measured."""
    unseen = records_of(records, row, seen=False)
    if not unseen or any(r.get("kl") is None for r in unseen.values()):
        return None, None
    predicted_tokens = records[0]["seq_len"] - 1  # of a window

    def mean(name: str, largest: float) -> Estimate:
        window_sums = {corpus: r[f"window_{name}"] for corpus, r in unseen.items()}
        return Estimate(*mean_per_token(window_sums, predicted_tokens, largest=largest))

    return mean("kl", math.inf), mean("agreement", 1.0)


def unseen_ratio(
    records: Sequence[Record],
    row: ResultRow,
    other_records: Sequence[Record],
    other_row: ResultRow,
    number: str = "nll",
) -> Estimate | None:
    """Ratio of the geometric-mean perplexities of two rows on unseen text, with a paired 95 % interval.

    With `number="kl"` it is the ratio of exp(KL). None without unseen text, on different windows, or if not measured.
    """
    denominator = records_of(other_records, other_row)
    numerator = {  # without corpora that the other row has seen
        corpus: r
        for corpus, r in records_of(records, row, seen=False).items()
        if corpus not in denominator or not denominator[corpus]["seen"]
    }
    if not numerator:
        return None
    for corpus, r in numerator.items():
        if corpus not in denominator or denominator[corpus]["content_hash"] != r["content_hash"]:
            return None
    numerator_sums = {corpus: numerator[corpus].get(f"window_{number}") for corpus in numerator}
    denominator_sums = {corpus: denominator[corpus].get(f"window_{number}") for corpus in numerator}
    if None in [*numerator_sums.values(), *denominator_sums.values()]:
        return None
    predicted_tokens = records[0]["seq_len"] - 1  # of a window
    return Estimate(*paired_ratio(numerator_sums, denominator_sums, predicted_tokens))


def estimates(records: Sequence[Record], row: ResultRow) -> dict[str, Estimate | None]:
    """Means, gap, ratios to dense, KL and agreement of a row, with intervals over windows; None if undefined."""
    predicted_tokens = records[0]["seq_len"] - 1  # of a window
    seen = {r["corpus"]: r["seen"] for r in records}
    window_nll = by_row(records, "window_nll")
    seen_nll = {corpus: nll for corpus, nll in window_nll[row].items() if seen[corpus]}
    unseen_nll = {corpus: nll for corpus, nll in window_nll[row].items() if not seen[corpus]}
    gap = None
    if seen_nll and unseen_nll and row != DENSE and on_same_windows(records, row):
        gap = Estimate(*paired_gap(window_nll[row], window_nll[DENSE], seen, predicted_tokens))

    def mean(nll: Mapping[str, Sequence[float]]) -> Estimate | None:
        return Estimate(*mean_perplexity(nll, predicted_tokens)) if nll else None

    over_dense, seen_over_dense = None, None
    if row != DENSE:
        over_dense = unseen_ratio(records, row, records, DENSE)
        if seen_nll and on_same_windows(records, row):
            dense_nll = {corpus: window_nll[DENSE][corpus] for corpus in seen_nll}
            seen_over_dense = Estimate(*paired_ratio(seen_nll, dense_nll, predicted_tokens))
    kl, agreement = distance(records, row)
    return {
        "seen": mean(seen_nll),
        "unseen": mean(unseen_nll),
        "gap": gap,
        "unseen_over_dense": over_dense,
        "seen_over_dense": seen_over_dense,
        "unseen_kl": kl,
        "unseen_agreement": agreement,
    }


def entries(summary: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the entries of a summary, which features write and readers print without knowing the feature.

    An entry has a sentence `said` and, optionally, lines `warnings`, `numbers` by name, and a `table`, which has the
    arguments of `report.tables.Table` except its name; an estimate in its rows is [value, low, high].
    """
    return {name: value for name, value in summary.items() if isinstance(value, dict) and "said" in value}


def number_frame(records: Sequence[Record]) -> pd.DataFrame:
    """Return all numbers of a run, one per line, with the columns `NUMBER_COLUMNS`. Undefined numbers have no line.

    Numbers of one corpus are `perplexity`, `kl` and `agreement`. The others, which have an empty corpus, are those of
    `estimates`. Ends of intervals are NaN if there is no interval.
    """
    lines: list[tuple[str, int, str, str, str, str, float, float | None, float | None]] = []
    for row in by_row(records):
        identity = (row_name(*row), records[0]["seed"], *row)
        for corpus, record in records_of(records, row).items():
            for name, estimate in _corpus_estimates(record).items():
                lines.append((*identity, corpus, name, *estimate))
        for name, estimate in estimates(records, row).items():
            if estimate is not None:
                lines.append((*identity, "", name, *estimate))
    frame = pd.DataFrame(lines, columns=NUMBER_COLUMNS)
    return frame.astype({"value": float, "low": float, "high": float})


def _corpus_estimates(record: Record) -> dict[str, Estimate]:
    """Return the perplexity of one corpus with its interval over windows and, if measured, KL and agreement."""
    predicted_tokens = record["seq_len"] - 1  # of a window
    _, low, high = mean_perplexity({record["corpus"]: record["window_nll"]}, predicted_tokens)
    by_name = {"perplexity": Estimate(record["perplexity"], low, high)}
    return by_name | {name: Estimate(record[name]) for name in ("kl", "agreement") if record.get(name) is not None}


def to_estimate(value: float, low: float, high: float) -> Estimate:
    """Return a number of `number_frame` as an Estimate."""
    return Estimate(value) if math.isnan(low) else Estimate(value, low, high)


def run_numbers(
    records: Sequence[Record], summary: Mapping[str, Any], steps: Mapping[str, Mapping[str, float]]
) -> dict[str, float]:
    """Return numbers by which trackers can sort runs. Except for names of corpora, keys are always the same.

    - `final/...`: the final model, which is measured last: `unseen`, `seen`, `gap`, `unseen_over_dense`,
      `seen_over_dense`, `unseen_kl`, `unseen_agreement`, `perplexity/<corpus>`, `kl/<corpus>` and `agreement/<corpus>`,
      if they are defined.
    - `dense/...`, `pruned/...`, `recovered/...`: the same for every stage of the model.
    - `parameters_after` and other numbers of the summary.
    - `<entry>/...`: the numbers of an entry of the summary.
    - `steps/<step>/...`: seconds, tokens and peak memory in MiB.
    """
    labels = corpus_labels(r["corpus"] for r in records)
    final_stage = records[-1]["stage"]
    numbers = {}
    for line in number_frame(records).itertuples():
        key = f"{line.number}/{key_part(labels[line.corpus])}" if line.corpus else line.number
        numbers[f"{line.stage}/{key}"] = line.value
        if line.stage == final_stage:
            numbers[f"final/{key}"] = line.value
    numbers |= {name: value for name, value in summary.items() if isinstance(value, int | float)}
    for entry, content in entries(summary).items():
        numbers |= {f"{entry}/{name}": value for name, value in content.get("numbers", {}).items() if value is not None}
    return numbers | {f"steps/{step}/{name}": value for step, costs in steps.items() for name, value in costs.items()}


def row_lines(
    records: Sequence[Record], settings: Mapping[str, Any], summary: Mapping[str, Any],
    steps: Mapping[str, Mapping[str, float]], *, labels: Mapping[str, str] | None = None,
) -> list[Line]:  # fmt: skip
    """Return one line per stage of a run's model, with the final model last. Undefined numbers are missing.

    Only the final model has sizes, tokens, seconds and the numbers of entries of the summary.
    """
    labels = labels or corpus_labels(r["corpus"] for r in records)
    numbers = number_frame(records)
    lines = [_row_line(of_row, records, settings, labels) for _, of_row in numbers.groupby("row", sort=False)]
    of_dense = lines[0]
    for line in lines:
        line |= {f"{name}_dense": of_dense[name] for name in ("unseen", "seen") if name in of_dense}
    final = lines[-1]
    final |= {name: summary.get(name) for name in SUMMARY}
    for entry, content in entries(summary).items():
        final |= {f"{entry}_{name}": value for name, value in content.get("numbers", {}).items()}
    final["seconds"] = sum(step.get("seconds", 0) for step in steps.values()) if steps else math.nan
    final["peak_memory_mib"] = max((step.get("peak_memory_mib", 0) for step in steps.values()), default=math.nan)
    return lines


def line_frame(lines: Sequence[Line]) -> pd.DataFrame:
    """Build a DataFrame with `COLUMNS` and all other columns of the lines; missing values are empty."""
    other_columns = dict.fromkeys(name for line in lines for name in line if name not in COLUMNS and name != "record")
    return pd.DataFrame(lines, columns=[*COLUMNS, *other_columns, "record"])


def number_columns(numbers: pd.DataFrame, labels: Mapping[str, str]) -> Line:
    """Return the lines of one row in `number_frame` as columns `NUMBER/CORPUS`, and `_low` and `_high` of intervals."""
    columns = {}
    for number in numbers.itertuples():
        name = f"{number.number}/{key_part(labels[number.corpus])}" if number.corpus else number.number
        columns[name] = number.value
        if number.number not in ("kl", "agreement"):  # these have no interval for a single corpus
            columns |= {f"{name}_low": number.low, f"{name}_high": number.high}
    return columns


def _row_line(
    numbers: pd.DataFrame, records: Sequence[Record], settings: Mapping[str, Any], labels: Mapping[str, str]
) -> Line:
    """Return the line of a stage from its lines of `number_frame`, without columns that only the final model has."""
    first = numbers.iloc[0]
    line = {"seed": first["seed"], "stage": first["stage"], "recovery": first["recovery"]}
    line |= number_columns(numbers, labels)
    by_corpus = records_of(records, (first["stage"], first["recovery"]))
    first_record = next(iter(by_corpus.values()))
    pruned = first["stage"] not in ("dense", "measured")
    return line | {
        "model": first_record["model"],
        "dtype": first_record["dtype"],
        "precision": settings["trainer"]["precision"],
        "scope": settings["sparsity"]["scope"] if pruned else None,
        "target": settings["sparsity"]["target"] if pruned else None,
        "importance": first_record.get("importance"),
        "allocation": first_record.get("allocation"),
        "seen_corpora": ", ".join(labels[corpus] for corpus, r in by_corpus.items() if r["seen"]),
    }
