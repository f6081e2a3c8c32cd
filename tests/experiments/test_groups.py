"""Perplexity by groups of kinds of text."""

from __future__ import annotations

import math

import pytest

from experiments import groups
from experiments.kinds import CHOOSING, ROMANCE, UNSEEN
from tests.studies.workbench import fake_run


def test_a_group_has_the_geometric_mean_of_its_kinds():
    dense = {name: [10.0, 30.0] for name in (*CHOOSING, *UNSEEN, *ROMANCE)}  # of 10 tokens each, so 2 nats per token
    pruned = {name: [nll + 10 * (name in groups.ALONE) for nll in windows] for name, windows in dense.items()}
    names = [*groups.GROUPS, groups.WORST, groups.MIXED]
    result = dict(zip(names, groups.ratios(fake_run("a", {"dense": dense, "pruned": pruned})), strict=True))
    assert result["English*"] == result["English"] == pytest.approx(1)
    assert [result[name] for name in ("C*", "French*", "Rust", "German")] == [pytest.approx(math.e)] * 4
    assert result[groups.WORST] == pytest.approx(math.e)
    assert result[groups.MIXED] == pytest.approx(1)
    assert result["all ten*"] == pytest.approx(math.e ** (2 / 10))
    assert result["all twelve"] == pytest.approx(math.e ** (2 / 12))
