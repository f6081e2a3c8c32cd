"""The script `experiments.heterogeneity`, on tiny runs and on synthetic numbers."""

from __future__ import annotations

import math
import sys
from itertools import combinations

import numpy as np
import pytest
import torch
from scipy.stats import f_oneway, kendalltau

import gprune
from experiments import heterogeneity
from gprune.importance.scores import channel_scores, fractional_ranks, unit_weights
from gprune.models.loading import load_model
from gprune.models.units import units_of
from gprune.runs.results import read_run
from tests import tiny_run


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Return the folder of finished runs: `run` with three drift corpora, `two` with two, `base` without modules."""
    world = tiny_run.make_world(tmp_path_factory.mktemp("world"))
    folder = tmp_path_factory.mktemp("runs")
    with tiny_run.isolated(folder / "cache"):
        quick = ("--export=none", "--sparsity.allocation=uniform", "--evaluation.curve=[]")
        world.run(folder, *quick, name="run")
        world.run(folder, *quick, f"--corpora.drift={world.names('alpha', 'beta')}", name="two")
        world.run(folder, *quick, "--gprune=false", name="base")
        yield folder


@pytest.fixture(scope="module")
def finished(runs):
    return read_run(runs / "run")


def main(capsys, monkeypatch, *arguments):
    """Run the command, and return its exit code, stdout and stderr."""
    monkeypatch.setattr(sys, "argv", ["heterogeneity", *map(str, arguments)])
    code = heterogeneity.main()
    return code, *capsys.readouterr()


def rows(text):
    """Return {first cell: other cells} for the rows of all Markdown tables in a text."""
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    cells_by_line = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {cells[0]: cells[1:] for cells in cells_by_line}


def agreement_of_halves(folder) -> list[float]:
    """Return Kendall's tau between the scores of the two halves of a corpus: one mean over corpora for each block."""
    result = gprune.load_run(folder)
    model, _ = load_model(result.config.model.name)
    by_corpus = []
    for statistics in result.statistics.values():
        by_block = []
        for u in units_of(model):
            if u.kind != "neurons":
                continue
            weights = unit_weights(u, model.model.layers[u.layer])
            halves = [statistics.channels[u.key].half(half) for half in (0, 1)]
            first_half, second_half = (
                channel_scores("wanda_sp", u, weights, moments, torch.Generator()) for moments in halves
            )
            by_block.append(kendalltau(first_half, second_half).statistic)
        by_corpus.append(by_block)
    return np.mean(by_corpus, axis=0).tolist()


def test_printed_numbers_match_an_independent_computation(finished, runs, capsys, monkeypatch):
    _, text, _ = main(capsys, monkeypatch, runs / "run", "--all", "--no-data-free")
    cells_by_block = rows(text)
    halves = agreement_of_halves(runs / "run")
    for b, (block_drift, module_labels) in enumerate(zip(finished.modules.drift, finished.modules.labels, strict=True)):
        labels, floor = module_labels.numpy(), block_drift.noise_floor.numpy()
        drift = block_drift.ranks.numpy().std(0)
        module_means = [drift[labels == k].mean() for k in range(labels.max() + 1)]
        scores = block_drift.scores  # by corpus
        tau = np.mean([kendalltau(scores[i], scores[j]).statistic for i, j in combinations(range(3), 2)])
        above_floor = (drift > np.quantile(floor, 0.95)).mean()
        expected = [drift.mean(), floor.mean(), above_floor, tau, halves[b], min(module_means), max(module_means)]
        cells = cells_by_block[str(b)]
        # Cells have three decimals, and the ratio to the noise floor in column 2 has two.
        assert [float(cells[column]) for column in (0, 1, 3, 4, 5, 7, 8)] == pytest.approx(expected, abs=6e-4)
        assert float(cells[2]) == pytest.approx(drift.mean() / floor.mean(), abs=6e-3)
        switched = finished.modules.reliability[b].switched
        assert cells[9] == f"{int(switched.sum())} of {len(switched)}"


def test_the_mean_over_modules_is_weighted_by_pairs_of_neurons():
    """A module without a value is ignored. The mean is NaN if no module has a value."""
    values = torch.tensor([0.5, float("nan"), 0.1], dtype=torch.float64)
    sizes = torch.tensor([20, 500, 100])
    expected = (0.5 * 190 + 0.1 * 4950) / (190 + 4950)  # 20 neurons have 20 * 19 / 2 = 190 pairs
    assert heterogeneity.pair_weighted_mean(values, sizes) == pytest.approx(expected, rel=1e-12)
    assert math.isnan(heterogeneity.pair_weighted_mean(values[1:2], sizes[1:2]))


def test_eta_squared_gives_the_f_statistic_of_scipy_and_is_1_for_labels_and_0_for_constants():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(4, (200,), generator=generator)
    values = torch.randn(200, generator=generator).double() + 0.3 * labels
    N, K = 200, 4
    eta = heterogeneity.eta_squared(values, labels)
    f = (eta / (K - 1)) / ((1 - eta) / (N - K))
    assert f == pytest.approx(f_oneway(*(values[labels == k].numpy() for k in range(K))).statistic)
    assert heterogeneity.eta_squared(labels.double(), labels) == pytest.approx(1)
    assert heterogeneity.eta_squared(torch.ones(200), labels) == 0


def test_given_rank_removes_the_part_that_ranks_explain():
    ranks = fractional_ranks(torch.rand(3, 640, generator=torch.Generator().manual_seed(0)))
    mean = ranks.mean(0)
    by_rank = mean * (1 - mean)
    labels = (mean > mean.median()).long() + (mean > mean.quantile(0.9)).long()
    assert heterogeneity.eta_squared(by_rank, labels) > 0.2
    remainder = heterogeneity.given_rank(by_rank, ranks)
    assert float(remainder.var()) < 0.05 * float(by_rank.var())
    independent = torch.randn(640, generator=torch.Generator().manual_seed(1)).double()
    assert float(heterogeneity.given_rank(independent, ranks).var()) > 0.9 * float(independent.var())


def test_invalid_runs_and_arguments_are_refused_in_one_line(runs, capsys, monkeypatch):
    def refused(name, *arguments):
        code, out, err = main(capsys, monkeypatch, runs / name, *arguments)
        assert (code, out, err.count("\n")) == (2, "", 1)
        return err

    for name, arguments, message in (
        ("base", (), "no modules"),
        ("two", (), "2 drift corpora"),
        ("nowhere", (), "no folder"),
        ("run", ("--permutations", "0"), "--permutations"),
        ("run", ("--seed", "99999999999999999999"), "--seed"),
        ("run", ("--what",), "--help"),
    ):
        assert message in refused(name, *arguments)
    monkeypatch.setattr(heterogeneity, "fingerprint", lambda model: "0" * 16)
    assert "other weights" in refused("run")
