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
ResultRow = tuple[str, str]  # (variant, recovery) of a row of the result table; `stage` in records is the variant
Line = dict[str, Any]  # a line of the frame of a run
DENSE, BASE = ("dense", "none"), ("base", "none")
NUMBER_COLUMNS = ["row", "seed", "stage", "recovery", "corpus", "number", "value", "low", "high"]


ESTIMATES = (
    "unseen", "seen", "gap", "unseen_over_dense", "unseen_over_unrecovered_base", "unseen_over_base_same_recovery",
    "unseen_kl", "unseen_agreement",
)  # fmt: skip
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


def row_name(variant: str, recovery: str) -> str:
    """Return the name of a row in tables: the variant and, if there is one, the recovery."""
    return variant if recovery == "none" else f"{variant} + {recovery}"


def key_part(name: str) -> str:
    """Convert a name to a part of a metric key: `gprune + least_squares` becomes `gprune_least_squares`."""
    return re.sub(r"[^\w.-]+", "_", name)


def by_row(records: Sequence[Record], number: str = "perplexity") -> dict[ResultRow, dict[str, Any]]:
    """Return (variant, recovery) -> corpus -> the field `number` of the record, in the order of the records."""
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


def estimates(records: Sequence[Record], row: ResultRow, base: Sequence[Record] | None) -> dict[str, Estimate | None]:
    """Means, gap, ratios, KL and agreement of a row, with intervals over windows; None for undefined numbers.

    `base` are the records of the run whose row `BASE` is the denominator of `unseen_over_unrecovered_base`.
    """
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

    def ratio_to(other_records: Sequence[Record] | None, other_row: ResultRow) -> Estimate | None:
        """Return `unseen_ratio` to a row; None without records, for the dense model, and for the row itself."""
        is_same_row = other_records is records and row == other_row
        if other_records is None or is_same_row or row == DENSE:
            return None
        return unseen_ratio(records, row, other_records, other_row)

    kl, agreement = distance(records, row)
    return {
        "seen": mean(seen_nll),
        "unseen": mean(unseen_nll),
        "gap": gap,
        "unseen_over_dense": ratio_to(records, DENSE),
        "unseen_over_unrecovered_base": ratio_to(base, BASE),
        "unseen_over_base_same_recovery": ratio_to(records, ("base", row[1])),
        "unseen_kl": kl,
        "unseen_agreement": agreement,
    }


def entries(summary: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the entries of a summary, which features write and readers print without knowing the feature.

    An entry has a sentence `said` and, optionally, lines `warnings`, `numbers` by name, and a `table`, which has the
    arguments of `report.tables.Table` except its name; an estimate in its rows is [value, low, high].
    """
    return {name: value for name, value in summary.items() if isinstance(value, dict) and "said" in value}


def number_frame(records: Sequence[Record], *, base: Sequence[Record] | None = None) -> pd.DataFrame:
    """Return all numbers of a run, one per line, with the columns `NUMBER_COLUMNS`. Undefined numbers have no line.

    Numbers of one corpus are `perplexity`, `kl` and `agreement`. The others, which have an empty corpus, are those of
    `estimates`. `base` has the records of the run whose row `BASE` is the denominator of
    `unseen_over_unrecovered_base`. Ends of intervals are NaN if there is no interval.
    """
    lines: list[tuple[str, int, str, str, str, str, float, float | None, float | None]] = []
    for row in by_row(records):
        identity = (row_name(*row), records[0]["seed"], *row)
        for corpus, record in records_of(records, row).items():
            for name, estimate in _corpus_estimates(record).items():
                lines.append((*identity, corpus, name, *estimate))
        for name, estimate in estimates(records, row, base).items():
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
    """Return numbers by which trackers can sort runs. Except for names of rows and corpora, keys are always the same.

    - `final/...`: the run's main row, which is measured last: `unseen`, `seen`, `gap`, `unseen_kl`, `unseen_agreement`,
      `unseen_over_dense`, `unseen_over_base_same_recovery`, `unseen_over_unrecovered_base`, `perplexity/<corpus>`,
      `kl/<corpus>` and `agreement/<corpus>`, if they are defined.
    - `rows/<row>/...`: the same for every row.
    - `parameters_after` and other numbers of the summary.
    - `<entry>/...`: the numbers of an entry of the summary.
    - `steps/<step>/...`: seconds, tokens and peak memory in MiB.
    """
    labels = corpus_labels(r["corpus"] for r in records)
    main_row = records[-1]["stage"], records[-1]["recovery"]
    numbers = {}
    for line in number_frame(records, base=records).itertuples():
        key = f"{line.number}/{key_part(labels[line.corpus])}" if line.corpus else line.number
        numbers[f"rows/{key_part(line.row)}/{key}"] = line.value
        if (line.stage, line.recovery) == main_row:
            numbers[f"final/{key}"] = line.value
    numbers |= {name: value for name, value in summary.items() if isinstance(value, int | float)}
    for entry, content in entries(summary).items():
        numbers |= {f"{entry}/{name}": value for name, value in content.get("numbers", {}).items() if value is not None}
    return numbers | {f"steps/{step}/{name}": value for step, costs in steps.items() for name, value in costs.items()}


def row_lines(
    records: Sequence[Record], settings: Mapping[str, Any], summary: Mapping[str, Any],
    steps: Mapping[str, Mapping[str, float]], *, base: Sequence[Record] | None, labels: Mapping[str, str] | None = None,
) -> list[Line]:  # fmt: skip
    """Return one line per row of a run's result table, with the main row last. Undefined numbers are missing.

    Only the main row has sizes, tokens, seconds and the numbers of entries of the summary.
    """
    labels = labels or corpus_labels(r["corpus"] for r in records)
    numbers = number_frame(records, base=base)
    lines = [_row_line(of_row, records, settings, labels) for _, of_row in numbers.groupby("row", sort=False)]
    of_dense = lines[0]
    for line in lines:
        line |= {f"{name}_dense": of_dense[name] for name in ("unseen", "seen") if name in of_dense}
    main_row = lines[-1]
    main_row |= {name: summary.get(name) for name in SUMMARY}
    for entry, content in entries(summary).items():
        main_row |= {f"{entry}_{name}": value for name, value in content.get("numbers", {}).items()}
    main_row["seconds"] = sum(step.get("seconds", 0) for step in steps.values()) if steps else math.nan
    main_row["peak_memory_mib"] = max((step.get("peak_memory_mib", 0) for step in steps.values()), default=math.nan)
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
    """Return the line of one row from its lines of `number_frame`, without the columns that only the main row has."""
    first = numbers.iloc[0]
    line = {"seed": first["seed"], "stage": first["stage"], "recovery": first["recovery"]}
    line |= number_columns(numbers, labels)
    by_corpus = records_of(records, (first["stage"], first["recovery"]))
    first_record = next(iter(by_corpus.values()))
    pruned = first["stage"] not in ("dense", "model")
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
