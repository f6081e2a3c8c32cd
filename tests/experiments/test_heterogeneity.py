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
from gprune.importance.scores import fractional_ranks, score_ffn
from gprune.importance.weights import ffn_weights
from gprune.models.blocks import blocks_of
from gprune.models.loading import load_model
from gprune.partition.drift import noise_floor, rank_drift
from gprune.runs.results import read_run
from tests import tiny_run


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Return the folder of finished runs: `run` with three drift corpora, `two` with two, `base` without modules."""
    world = tiny_run.make_world(tmp_path_factory.mktemp("world"))
    folder = tmp_path_factory.mktemp("runs")
    with tiny_run.isolated(folder / "cache"):
        quick = ("--export=none", "--sparsity.allocation=uniform", "--evaluation.curve=[]")
        with pytest.MonkeyPatch.context() as patch:
            tiny_run.quick(patch)
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
    """Return first cell -> other cells of the rows of all tables."""
    cells = [[c.strip() for c in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("| ")]
    return {row[0]: row[1:] for row in cells}


def test_the_table_has_every_third_block_or_all_blocks_and_the_mean(runs, capsys, monkeypatch):
    code, short, _ = main(capsys, monkeypatch, runs / "run", "--permutations", "1")
    assert code == 0
    assert [name for name in rows(short) if name.isdigit() or name == "mean"] == ["0", "mean"]
    _, full, _ = main(capsys, monkeypatch, runs / "run", "--all", "--no-data-free")
    assert [name for name in rows(full) if name.isdigit() or name == "mean"] == ["0", "1", "2", "mean"]
    assert rows(full)["mean"] == rows(short)["mean"]  # over all blocks, also over those that are not shown


def agreement_of_halves(folder) -> list[float]:
    """Return by block Kendall's tau between halves of a corpus, mean over corpora, from the statistics of the run."""
    result = gprune.load_run(folder)
    model, _ = load_model(result.config.model.name)
    found = []
    for statistics in result.statistics.values():
        one, two = (
            [
                score_ffn("wanda_sp", b, ffn_weights(b), statistics.ffn[b.index].half(half), torch.Generator())
                for b in blocks_of(model)
            ]
            for half in (0, 1)
        )
        found.append([kendalltau(a, b).statistic for a, b in zip(one, two, strict=True)])
    return np.mean(found, axis=0).tolist()


def test_printed_numbers_match_an_independent_computation(finished, runs, capsys, monkeypatch):
    _, text, _ = main(capsys, monkeypatch, runs / "run", "--all", "--no-data-free")
    shown = rows(text)
    halves = agreement_of_halves(runs / "run")
    for b, (d, y) in enumerate(zip(finished.modules.drift, finished.modules.labels, strict=True)):
        ranks, labels = d.ranks.numpy(), y.numpy()
        drift = ranks.std(0)
        inside = [drift[labels == k].mean() for k in range(labels.max() + 1)]
        tau = np.mean([kendalltau(d.scores[i], d.scores[j]).statistic for i, j in combinations(range(3), 2)])
        above = (drift > np.quantile(d.floor.numpy(), 0.95)).mean()
        expected = [drift.mean(), float(d.floor.mean()), above, tau, min(inside), max(inside)]
        expected.insert(4, halves[b])
        cells = [shown[str(b)][c] for c in (0, 1, 3, 4, 5, 7, 8)]
        assert list(map(float, cells)) == pytest.approx(expected, abs=6e-4)
        assert float(shown[str(b)][2]) == pytest.approx(drift.mean() / float(d.floor.mean()), abs=6e-3)
        switched = finished.modules.reliability[b].switched
        assert shown[str(b)][9] == f"{int(switched.sum())} of {len(switched)}"


def test_the_mean_over_modules_is_weighted_by_pairs_of_neurons():
    values = torch.tensor([0.5, float("nan"), 0.1], dtype=torch.float64)
    sizes = torch.tensor([20, 500, 100])
    expected = (0.5 * 190 + 0.1 * 4950) / (190 + 4950)
    assert heterogeneity.pair_weighted_mean(values, sizes) == pytest.approx(expected, rel=1e-12)
    assert math.isnan(heterogeneity.pair_weighted_mean(values[1:2], sizes[1:2]))


def test_eta_squared_gives_the_f_statistic_of_scipy():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(4, (200,), generator=generator)
    values = torch.randn(200, generator=generator).double() + 0.3 * labels
    eta, (N, K) = heterogeneity.eta_squared(values, labels), (200, 4)
    f = (eta / (K - 1)) / ((1 - eta) / (N - K))
    assert f == pytest.approx(f_oneway(*(values[labels == k].numpy() for k in range(K))).statistic)
    assert heterogeneity.eta_squared(labels.double(), labels) == pytest.approx(1)
    assert heterogeneity.eta_squared(torch.ones(200), labels) == 0


def test_eta_squared_of_random_partitions_has_the_expected_mean_and_follows_the_seed():
    values = torch.randn(400, generator=torch.Generator().manual_seed(1))
    labels = torch.arange(400) % 8
    found = heterogeneity.separation(values, labels, permutations=200, seed=0)
    assert float(found.random.mean()) == pytest.approx(7 / 399, rel=0.15)
    again = heterogeneity.separation(values, labels, permutations=200, seed=0)
    assert torch.equal(found.random, again.random)
    assert not torch.equal(found.random, heterogeneity.separation(values, labels, permutations=200, seed=9).random)


def test_the_share_above_the_noise_floor_is_small_for_noise_and_large_for_drift():
    """Scores of two halves of three corpora: a common term, a term of the corpus, and sampling noise."""
    generator = torch.Generator().manual_seed(0)

    def share(planted, N=2000):
        one, corpora, halves = (torch.randn(*shape, N, generator=generator) for shape in ((), (3, 1), (3, 2)))
        scores = (one + planted * corpora + 0.3 * halves).double()
        return heterogeneity.share_above(
            rank_drift(fractional_ranks(scores.mean(1))), noise_floor(fractional_ranks(scores))
        )

    assert 0.05 < share(0.0) < 0.15
    assert share(2.0) > 0.5


def test_given_rank_removes_the_part_that_ranks_explain():
    ranks = fractional_ranks(torch.rand(3, 640, generator=torch.Generator().manual_seed(0)))
    mean = ranks.mean(0)
    by_rank = mean * (1 - mean)
    labels = (mean > mean.median()).long() + (mean > mean.quantile(0.9)).long()
    assert heterogeneity.eta_squared(by_rank, labels) > 0.2
    left = heterogeneity.given_rank(by_rank, ranks)
    assert float(left.var()) < 0.05 * float(by_rank.var())
    own = torch.randn(640, generator=torch.Generator().manual_seed(1)).double()  # independent of the ranks
    assert float(heterogeneity.given_rank(own, ranks).var()) > 0.9 * float(own.var())


def test_drift_differs_by_modules_of_the_run_even_in_a_random_model_but_not_by_data_free_ones(
    runs, capsys, monkeypatch
):  # fmt: skip
    """This is why the output calls eta squared of the run's own modules circular."""
    _, text, _ = main(capsys, monkeypatch, runs / "run")
    shown = rows(text)
    own, _, largest, blocks = shown["the run's (circular): drift"]
    assert float(own) > 5 * float(largest)
    assert blocks == "3 of 3"
    free, _, largest, _ = shown["data-free: drift"]
    assert float(free) < 2 * float(largest)


def test_the_figure_is_written_as_svg_and_png(runs, tmp_path, capsys, monkeypatch):
    file = tmp_path / "drift.svg"
    code, out, _ = main(capsys, monkeypatch, runs / "run", "--no-data-free", "--figure", file)
    assert code == 0
    assert str(file.with_suffix(".png")) in out
    assert file.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert b"<svg" in file.read_bytes()


def test_a_model_with_other_weights_is_refused(runs, capsys, monkeypatch):
    monkeypatch.setattr(heterogeneity, "fingerprint", lambda model: "0" * 16)
    code, _, err = main(capsys, monkeypatch, runs / "run")
    assert code == 2
    assert "other weights" in err


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("base", (), "no modules"),
        ("two", (), "2 drift corpora"),
        ("nowhere", (), "no folder"),
        ("run", ("--permutations", "0"), "--permutations"),
        ("run", ("--seed", "99999999999999999999"), "--seed"),
        ("run", ("--what",), "--help"),
    ],
)
def test_invalid_runs_and_arguments_are_refused_in_one_line(runs, capsys, monkeypatch, name, arguments, message):
    code, out, err = main(capsys, monkeypatch, runs / name, *arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1
