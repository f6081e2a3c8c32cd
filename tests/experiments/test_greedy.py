"""Greedy removal compared with all choices of neurons, on a tiny block in float64."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from gprune import user_code
from gprune.cli import main
from gprune.runs.results import load_run
from gprune.sparsity.allocation import ALLOCATION
from tests import tiny_run
from tests.world import restored

with restored(ALLOCATION):  # so that tests of every allocation do not include this one
    from experiments.greedy import removal_order

RIDGE = 0.01


def block(seed: int, *, neurons: int = 10, tokens: int = 40):
    """Return W (4, N), and x (tokens, N) with correlated neurons of unequal size."""
    generator = torch.Generator().manual_seed(seed)
    weight, x, mix = (
        torch.randn(*size, generator=generator, dtype=torch.float64)
        for size in ((4, neurons), (tokens, neurons), (neurons, neurons))
    )
    return weight, x @ mix * torch.rand(neurons, generator=generator, dtype=torch.float64)


def error(weight: torch.Tensor, x: torch.Tensor, removed: tuple[int, ...], ridge: float = RIDGE) -> float:
    """Return the squared error without some neurons, from rows of x and of the ridge, solved by NumPy."""
    W, N = weight.numpy(), x.shape[1]
    rows = np.vstack([x.numpy(), np.sqrt(ridge * np.square(x.numpy()).sum(0).mean()) * np.eye(N)])
    kept = [n for n in range(N) if n not in removed]
    y = rows @ W.T
    V = np.linalg.lstsq(rows[:, kept], y, rcond=None)[0]
    return float(np.square(y - rows[:, kept] @ V).sum())


def order_of(weight, x, removed: int, ridge: float = RIDGE) -> list[int]:
    """Return all neurons in the order of removal: the `removed` ones first, then the kept ones."""
    return removal_order(weight, x.T @ x, removed, ridge=ridge).tolist()


@pytest.mark.parametrize("seed", range(4))
def test_every_step_removes_the_neuron_that_adds_least_to_the_error_and_kept_neurons_are_sorted_by_error(seed):
    weight, x = block(seed)
    order = order_of(weight, x, 6)
    assert sorted(order) == list(range(10))
    for k in range(6):
        removed_so_far = tuple(order[:k])
        costs = {j: error(weight, x, (*removed_so_far, j)) for j in range(10) if j not in removed_so_far}
        assert order[k] == min(costs, key=costs.get)
    removed_so_far = tuple(order[:6])
    costs = [error(weight, x, (*removed_so_far, j)) for j in order[6:]]
    assert costs == sorted(costs)  # the kept neurons are sorted by the error that their removal would add


def test_idle_and_duplicate_neurons_are_removed_first_and_a_singular_gram_matrix_needs_no_ridge():
    """Neurons 2 and 7 are always 0, and neurons 4 and 5 are equal. Removing 2, 7 and one of 4 and 5 adds no error."""
    weight, x = block(0, neurons=12, tokens=200)
    x[:, [2, 7]] = 0
    x[:, 5] = x[:, 4]
    order = order_of(weight, x, 6, ridge=0.0)
    assert sorted(order) == list(range(12))
    assert {2, 7} < set(order[:3]) < {2, 7, 4, 5}
    order_of_few_tokens = order_of(weight, x[:3], 11, ridge=0.0)  # 3 tokens for 12 neurons
    assert sorted(order_of_few_tokens) == list(range(12))


@pytest.fixture
def imported(monkeypatch):
    """Undo the effects of `--import`."""
    monkeypatch.setattr(sys, "path", sys.path[:])
    monkeypatch.setattr(user_code, "IMPORTED", [])
    with restored(ALLOCATION):
        yield
    sys.modules.pop("greedy", None)


def test_a_run_with_greedy_allocation_keeps_equal_widths_and_needs_least_squares(tmp_path, imported, capsys):
    world = tiny_run.make_world(tmp_path)
    script = Path(__file__).parents[2] / "experiments/greedy.py"
    flags = [f"--import={script}", "--sparsity.allocation=greedy", "--gprune=false", "--export=none"]
    with tiny_run.isolated(tmp_path / "cache"):
        assert main(world.args(tmp_path, *flags, "--recovery=least_squares")) == 0
        widths = [int(keep.sum()) for keep in load_run(tmp_path / "run").masks.ffn]
        assert max(widths) - min(widths) <= 1
        capsys.readouterr()
        assert main(world.args(tmp_path, *flags, "--recovery=none", name="none")) == 2
        assert "needs --sparsity.scope ffn, dense blocks and --recovery least_squares" in capsys.readouterr().err
