"""Numbers of runs as a pandas DataFrame: one line per stage of a run, with a fixed set of columns."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from gprune.corpora.load import corpus_labels
from gprune.runs.numbers import Record, key_part, number_frame, records_of

if TYPE_CHECKING:
    import pandas

ESTIMATES = (
    "unseen", "seen", "gap", "unseen_over_dense", "unseen_over_unrecovered_base", "unseen_over_base_same_recovery",
    "unseen_kl", "unseen_agreement",
)  # fmt: skip
WITH_INTERVALS = [column for name in ESTIMATES for column in (name, f"{name}_low", f"{name}_high")]
SUMMARY = (
    "sparsity_of_scope", "sparsity_of_model", "parameters_before", "parameters_after", "forward_tokens",
    "forward_backward_tokens",
)  # fmt: skip
SPEEDS = ("asked", "predicted", "got")
QUALITIES = ("asked", "predicted", "got", "low", "high")  # low and high are the interval of got, on development text
ABOUT = ("model", "dtype", "precision", "scope", "target", "importance", "allocation")
# Columns of every frame. Columns of corpora, settings and tasks follow, and `record` is the last column.
COLUMNS = [
    "row", "seed", "stage", "recovery", *WITH_INTERVALS, "unseen_dense", "seen_dense", *SUMMARY, "seconds",
    "peak_memory_mib", *(f"speed_{name}" for name in SPEEDS), *(f"quality_{name}" for name in QUALITIES), *ABOUT,
    "seen_corpora",
]  # fmt: skip
Line = dict[str, Any]


def lines(
    records: Sequence[Record], settings: Mapping[str, Any], summary: Mapping[str, Any],
    steps: Mapping[str, Mapping[str, float]], *, base: Sequence[Record] | None, labels: Mapping[str, str] | None = None,
) -> list[Line]:  # fmt: skip
    """Return one line per stage of a run, with the main row last. Undefined numbers are missing.

    Only the main row has sizes, tokens, seconds, speed and quality (the relative rise of development perplexity).
    """
    labels = labels or corpus_labels(r["corpus"] for r in records)
    numbers = number_frame(records, base=base)
    stage_lines = [_stage_line(of_row, records, settings, labels) for _, of_row in numbers.groupby("row", sort=False)]
    of_dense = stage_lines[0]
    for line in stage_lines:
        line |= {f"{name}_dense": of_dense[name] for name in ("unseen", "seen") if name in of_dense}
    main_row = stage_lines[-1]
    main_row |= {name: summary.get(name) for name in SUMMARY}
    if "speed" in summary:
        main_row |= {f"speed_{name}": summary["speed"][name] for name in SPEEDS}
    if quality := summary.get("quality"):
        main_row["quality_asked"] = quality["asked"]  # already a relative rise; the others are ratios to dense
        for name in QUALITIES[1:]:
            main_row[f"quality_{name}"] = None if quality[name] is None else quality[name] - 1
    main_row["seconds"] = sum(step.get("seconds", 0) for step in steps.values()) if steps else math.nan
    main_row["peak_memory_mib"] = max((step.get("peak_memory_mib", 0) for step in steps.values()), default=math.nan)
    return stage_lines


def frame(lines: Sequence[Line]) -> pandas.DataFrame:
    """Build a DataFrame with `COLUMNS` and all other columns of the lines; missing values are empty."""
    import pandas

    other_columns = dict.fromkeys(name for line in lines for name in line if name not in COLUMNS and name != "record")
    return pandas.DataFrame(lines, columns=[*COLUMNS, *other_columns, "record"])


def _stage_line(
    numbers: pandas.DataFrame, records: Sequence[Record], settings: Mapping[str, Any], labels: Mapping[str, str]
) -> Line:
    """Return the line of one row from its lines of `number_frame`, without the columns that only the main row has."""
    first = numbers.iloc[0]
    line = {"seed": first["seed"], "stage": first["stage"], "recovery": first["recovery"]}
    for number in numbers.itertuples():
        name = f"{number.number}/{key_part(labels[number.corpus])}" if number.corpus else number.number
        line[name] = number.value
        if number.number not in ("kl", "agreement"):  # these have no interval for a single corpus
            line |= {f"{name}_low": number.low, f"{name}_high": number.high}
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
