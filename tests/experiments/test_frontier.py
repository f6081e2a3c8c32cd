"""Files of pruned and dense models in llama.cpp: loss, bytes, speed, and which of them are on the frontier."""

from __future__ import annotations

import json
import math

import pytest

import gprune
from experiments import engines, frontier
from gprune.config import parse
from gprune.errors import UserError
from gprune.models.gguf import has_llama_cpp
from tests.experiments.test_engines import fork

FLAGS = [
    "--model.name=tiny-random", "--gprune=false", "--recovery=none", "--logging.mode=disabled",
    "--corpora.score=python_docs", "--corpora.evaluate=[python_code]", "--corpora.num_samples=4",
    "--corpora.seq_len=64", "--evaluation.num_samples=3", "--evaluation.seq_len=64", "--sparsity.target=0.2",
]  # fmt: skip


def measured(*files: tuple[float, int, float]):
    """Measurements of files with (loss per token in nats, bytes, tokens/s) on two windows of 11 tokens."""
    rows = [
        {
            "model": f"m{i}", "type": "f16", "share": 0.1 * i, "bytes": size, "prefill": rate, "decode": rate,
            "nll": {"law": [10 * nats, 30 * nats], "rust": [20 * nats, 20 * nats + 2 * i]},
        }
        for i, (nats, size, rate) in enumerate(files)
    ]  # fmt: skip
    return {"predicted": 10, "note": "a machine", "files": rows}


def test_loss_is_the_geometric_mean_over_kinds_and_the_worst_kind_relative_to_the_first_file():
    of_two = measured((1.0, 100, 5.0), (1.3, 80, 6.0))
    assert frontier.loss(of_two["files"][0], of_two) == (1.0, 1.0)
    mean, worst = frontier.loss(of_two["files"][1], of_two)
    assert mean == pytest.approx(math.exp((0.6 + 0.7) / 2))  # law 0.3 nats on 40, 20 tokens; rust 0.1 more
    assert worst == pytest.approx(math.exp(0.7))


def test_a_file_is_on_the_frontier_unless_another_one_is_better():
    files = measured((1.0, 100, 5.0), (1.3, 80, 6.0), (1.4, 90, 7.0), (1.4, 90, 7.0))
    on = {number: [frontier.on_frontier(row, files, number) for row in files["files"]] for number in frontier.AXES}
    assert on == {
        "prefill": [True, True, True, False],  # the last file has more loss on rust at the same speed
        "decode": [True, True, True, False],
        "bytes": [True, True, False, False],
    }


def test_the_table_and_the_figure_come_from_the_file(tmp_path):
    path = tmp_path / "measured.json"
    path.write_text(json.dumps(measured((1.0, 100_000_000, 5.0), (1.3, 80_000_000, 6.0))))
    text = frontier.work([str(path), "--figures", str(tmp_path)])
    assert all(cell in text for cell in ("| m1", "10 %", "80*", "6*"))
    assert (tmp_path / "frontier.png").stat().st_size > 10_000


def test_a_run_without_a_model_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    gprune.prune(parse([*FLAGS, "--run.name=bare", "--export=none"]))
    with pytest.raises(UserError, match=r"RUN must be runs with an exported model \(--export hf\); got 'bare'"):
        frontier.work(["runs/bare"])


@pytest.mark.slow
@pytest.mark.skipif(not has_llama_cpp(), reason="needs llama.cpp")
def test_files_of_a_run_are_measured_in_llama_cpp(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, least in (("MAX_SECONDS", 0.1), ("MIN_ROUNDS", 1), ("NEW_TOKENS", 4)):
        monkeypatch.setattr(engines, name, least)
    monkeypatch.setattr(frontier, "UNSEEN", ["python_code"])
    monkeypatch.setattr(frontier, "PROMPT", 32)
    monkeypatch.setattr(frontier, "BITS", {name: frontier.BITS[name] for name in ("f16", "q8_0")})
    fork(monkeypatch)
    records = gprune.prune(parse([*FLAGS, "--run.name=a"])).records
    frontier.work(["runs/a", "--output", "measured.json"])
    files = json.loads((tmp_path / "measured.json").read_text())["files"]
    assert [(row["model"], row["type"]) for row in files] == [
        (m, t) for m in ("dense", "20 % of the FFN") for t in frontier.BITS
    ]
    assert all(row["prefill"] > 0 and row["decode"] > 0 for row in files)
    dense, pruned = files[0], files[2]
    assert pruned["bytes"] < dense["bytes"]
    for row, record in ((dense, records[0]), (pruned, records[-1])):
        assert row["nll"]["python_code"] == pytest.approx(record["window_nll"], rel=1e-3)
