"""Names that the JSON files of runs and studies must have.

A checksum detects a file that was damaged or edited. The names detect a file of an older version or of another program,
before a reader misses one of them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from gprune.config import check_settings, migrate_settings

MEASURED = ("perplexity", "nll", "tokens", "window_nll")
RECORD = (
    *MEASURED, "stage", "recovery", "corpus", "seen", "seq_len", "stride", "bos", "model", "scope", "sparsity",
    "importance", "split", "dtype", "seed", "content_hash",
)  # fmt: skip
SUMMARY = ("sparsity_of_model", "parameters_before", "parameters_after", "forward_tokens", "forward_backward_tokens")
STUDY = ("name", "settings", "inputs", "steps", "summary", "records", "masks")
BENCHMARK = ("task", "stage", "split", "dtype", "note", "standard_protocol", "content_hash")
BENCHMARKS = {  # kind of a record of `gprune evaluate` -> its names besides `BENCHMARK`
    "zero_shot": ("questions", "acc", "acc_stderr", "acc_norm", "acc_norm_stderr"),
    "perplexity": (*MEASURED, "low", "high", "seq_len"),
    "speed": ("batch", "tokens_per_second", "seconds", "rounds"),
}


def require_names(what: str, content: dict[str, Any], names: Iterable[str]) -> None:
    """Raise ValueError unless `content`, a JSON object called `what`, has all names."""
    if missing := [name for name in names if name not in content]:
        raise ValueError(f"{what} without {missing[0]}")


def check_manifest(content: dict[str, Any]) -> None:
    """Raise ValueError unless the content of `manifest.json` has its names, and settings of this version."""
    require_names("a manifest", content, ("settings", "steps"))
    check_settings(migrate_settings(content["settings"]))


def check_metrics(content: dict[str, Any]) -> None:
    """Raise ValueError unless the content of `metrics.json` has its names; the summary is written last."""
    require_names("metrics", content, ("records",))
    for record in content["records"]:
        require_names("a record", record, RECORD)
    if content.get("summary") is not None:
        require_names("a summary", content["summary"], SUMMARY)


def check_evaluation(content: dict[str, Any]) -> None:
    """Raise ValueError unless the content of `evaluation.json` has its names."""
    require_names("an evaluation", content, ("records",))
    for record in content["records"]:
        require_names("a record", record, ("kind",))
        require_names(f"a record of kind {record['kind']}", record, (*BENCHMARK, *BENCHMARKS.get(record["kind"], ())))


def check_study(content: dict[str, Any]) -> None:
    """Raise ValueError unless the record of a row of a study has its names."""
    require_names("a study record", content, STUDY)
    check_metrics(content)
    check_evaluation({"records": content.get("evaluation", [])})
