"""Ranges over rows: their value, their interval, and the rows of the table."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from experiments.ranges import log_range, range_table
from tests.studies.workbench import fake_run


def test_an_interval_of_a_range_covers_it():
    """Rows whose windows differ by a constant have a range without noise; with noise it is near the truth."""
    generator = np.random.default_rng(0)
    windows = {c: generator.normal(100, 10, n) for c, n in (("a", 400), ("b", 399))}

    def run(name: str, shift: float, noise: float = 0.0):
        moved = {c: nll + shift + noise * generator.normal(0, 1, len(nll)) for c, nll in windows.items()}
        return fake_run(name, {"gprune": moved})

    turned = fake_run("y", {"gprune": {c: windows[c] + 5 for c in "ba"}})  # the order of corpora is nothing
    exact = log_range([run("x", 0.0), turned], "gprune")
    assert torch.allclose(exact, torch.full_like(exact, 0.5))
    noisy = log_range([run("x", 0.0), run("y", 5.0, 4.0)], "gprune")
    low, high = torch.quantile(noisy[1:], torch.tensor([0.025, 0.975], dtype=noisy.dtype)).tolist()
    assert low < 0.5 < high
    assert low < float(noisy[0]) < high
    assert high - low == pytest.approx(2 * 1.96 * 4 / np.sqrt(400) / 10 / np.sqrt(2), rel=0.25)  # two corpora


def test_ranges_of_base_average_and_result_are_a_row_for_each_group():
    """Recovered as each row is; a stage that a row lacks leaves the cell empty."""
    stages = {"base": {"a": [20.0, 30.0]}, "gprune": {"a": [10.0, 20.0]}}
    moved = {"base": {"a": [28.0, 38.0]}, "gprune": {"a": [12.0, 22.0]}}
    runs = [fake_run("x", stages), fake_run("y", moved, recovery="bias")]
    (row,) = range_table({"both": ["x", "y"]}, runs).rows
    base, averaged, result, ratio = row[1:]
    assert (row[0], averaged) == ("both: x, y", None)
    assert [tuple(e) for e in (base, result, ratio)] == [pytest.approx([v] * 3) for v in (0.8, 0.2, 0.25)]
