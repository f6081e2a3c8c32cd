"""Power laws fitted to rows that differ in their training tokens."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from experiments import tokens
from tests.studies.workbench import cells, fake_run
from tests.tiny_run import ROOT

A, B = 2.5, 0.12


def run_with(name: str, number_of_tokens: int, loss: float, *, repeat: bool = False):
    """A run whose last stage is `loss` nats per token above dense, in two windows of 10 predicted tokens."""
    dense = [20.0, 30.0]
    run = fake_run(name, {"dense": {"a": dense}, "pruned": {"a": [nll + 10 * loss for nll in dense]}})
    settings = run.settings | {"distill": {"repeat": repeat} if repeat else {}}
    return replace(run, summary={"learned_tokens": number_of_tokens}, settings=settings)


def law(number_of_tokens: int) -> float:
    return A * number_of_tokens**-B


@pytest.fixture
def runs():
    """Two models in mixed order. The last row of the first model repeats its text and is 5 % worse than the law."""
    base = fake_run("m, base", {"dense": {"a": [20.0, 30.0]}, "pruned": {"a": [40.0, 60.0]}})
    base = replace(base, summary={"learned_tokens": 0})
    rows = [run_with(f"m, {d}", d, law(d)) for d in (4000, 1000, 2000)]
    return [base, *rows, run_with("m, 8k", 8000, law(8000) + math.log(1.05), repeat=True), run_with("n, 1k", 1000, 0.5)]


def test_the_fit_uses_only_rows_whose_text_is_used_once(runs):
    points = tokens.points_of(runs)
    assert [(p.model, p.tokens, p.repeats) for p in points] == [
        ("m", 1000, False), ("m", 2000, False), ("m", 4000, False), ("m", 8000, True), ("n", 1000, False),
    ]  # fmt: skip
    fits = {model: tokens.Fit.to([p for p in points if p.model == model]) for model in ("m", "n")}
    assert (fits["m"].a, fits["m"].b) == pytest.approx((A, B))
    assert fits["n"] is None  # one row
    rows = tokens.rows_of(points, fits)
    assert [row[2] for row in rows] == ["once"] * 3 + ["repeats", "once"]
    assert [row[5] for row in rows] == [*[pytest.approx(1)] * 3, pytest.approx(1.05), None]
    assert f"lower ln (unseen / dense) by {1 - 2**-B:.1%}" in tokens.in_words(fits)


def test_the_committed_records_are_printed_and_drawn(tmp_path):
    printed = tokens.work([str(ROOT / "experiments/lists/tokens.yaml"), "--figures", str(tmp_path)])
    rows = [cells(line) for line in printed.splitlines() if line.startswith("| ")]
    assert ["smollm2", "98,304", "once", "2.003 [1.965, 2.041]"] in [row[:4] for row in rows]
    assert {file.name for file in tmp_path.iterdir()} == {"tokens.png", "tokens.svg"}
