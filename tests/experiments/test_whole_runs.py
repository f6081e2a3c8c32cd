"""Whole runs on tiny random models: scope and recovery that work, and the reasons for others."""

from __future__ import annotations

import pytest

from experiments.architectures import random_model, run_summary
from experiments.whole_runs import CHAIN, in_words, whole_run
from tests import tiny_run


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model_type", "words", "reason"),
    [
        ("llama", "attention+ffn", None),
        ("bloom", "ffn", "--sparsity.scope attention+ffn needs KV groups that can be removed"),
        ("camembert", "refused", "Cannot measure the perplexity of model type 'camembert'"),
    ],
)
def test_a_whole_run_has_the_largest_scope_that_works_and_the_reason_for_others(model_type, words, reason, tmp_path):
    with tiny_run.isolated(tmp_path / "cache"):
        run = whole_run(random_model(model_type))
    assert in_words(run) == words
    assert run["recovery"] == (None if words == "refused" else CHAIN)
    assert run["failed"] is None
    assert [line.startswith(reason) for line in run["reasons"][:1]] == [True] * (reason is not None)


def test_the_summary_counts_results_and_names_types_that_fail():
    result = {"scope": "attention+ffn", "recovery": CHAIN, "reasons": [], "failed": None}
    survey = {
        "ffn": "up, down", "attention": "heads", "budget": True, "generation": True, "reloaded": 0.0, "agrees": 0.0,
        "moved": 1.0,
    }  # fmt: skip
    failed = {**result, "scope": None, "failed": "ffn, none: ValueError: x"}
    refused = {**result, "scope": "ffn", "reasons": ["attention is odd"]}
    runs = {"a": result, "b": result, "c": failed, "d": refused}
    text = run_summary([survey | {"type": name, "run": run} for name, run in runs.items()])
    assert "Whole runs of 4 types: *attention+ffn*: 2, *fails*: 1, *ffn*: 1." in text
    assert text.splitlines()[-2:] == ["- `c`: ffn, none: ValueError: x", "- `d`: attention is odd"]
