"""Whole runs on tiny random models: scope and recovery that work, and the reasons for others."""

from __future__ import annotations

import re

import pytest
import transformers

from experiments.architectures import TABLE, random_model, read_table, run_cells, summary
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


def test_the_reason_of_a_whole_run_is_that_of_a_failure_or_of_the_refused_larger_scope():
    result = {"scope": "attention+ffn", "recovery": CHAIN, "reasons": [], "failed": None}
    failed = {**result, "scope": None, "failed": "ffn, none: ValueError: x"}
    narrower = {**result, "scope": "ffn", "reasons": ["attention is odd"]}
    assert run_cells(result, "heads") == {"whole run": "attention+ffn", "reason": ""}
    assert run_cells(failed, "heads") == {"whole run": "fails", "reason": "ffn, none: ValueError: x"}
    assert run_cells(narrower, "heads") == {"whole run": "ffn", "reason": "attention is odd"}
    assert run_cells(narrower, "none") == {"whole run": "ffn", "reason": ""}


def test_the_page_of_types_is_the_summary_of_the_table(monkeypatch):
    page = TABLE.with_suffix(".md").read_text(encoding="utf-8")
    monkeypatch.setattr(transformers, "__version__", re.search(r"transformers\s(\S+) knows", page)[1])
    assert summary(read_table()) == page
