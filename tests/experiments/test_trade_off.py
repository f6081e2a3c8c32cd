"""Rows of a list and GGUF files, compared by perplexity, speed and size."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

import gprune
from experiments import engines, trade_off
from gprune.config import parse
from gprune.errors import UserError
from gprune.models.gguf import has_llama_cpp
from tests.experiments.test_engines import fork
from tests.studies.workbench import fake_run

FLAGS = [
    "--model.name=tiny-random", "--gprune=false", "--recovery=none", "--logging.mode=disabled",
    "--corpora.score=python_docs", "--corpora.evaluate=[python_code]", "--corpora.num_samples=4",
    "--corpora.seq_len=64", "--evaluation.num_samples=3", "--evaluation.seq_len=64",
]  # fmt: skip


def test_a_row_has_the_perplexity_ratio_the_speedup_of_prefill_and_decoding_and_the_size_in_bfloat16():
    run = fake_run("share, 20 %", {"dense": {"a": [20.0, 30.0]}, "pruned": {"a": [22.0, 33.0]}})
    seconds = {
        ("dense", "prefill"): 4.0,
        ("dense", "decode"): 0.5,
        ("pruned", "prefill"): 2.0,
        ("pruned", "decode"): 0.25,
    }
    records = [
        {"stage": stage, "task": task, "batch": batch, "prompt": 128, "seconds": value * batch}
        for (stage, task), value in seconds.items()
        for batch in (1, 8)
    ]
    run = replace(run, evaluation=records, summary={"parameters_after": 2**20})
    name, ratio, speedup, mib = trade_off.pruned(run)
    # The loss rises by 2 and 3 nats in windows of 10 predicted tokens each, so by 0.25 nats per token.
    assert (name, ratio.value, speedup, mib) == ("share, 20 %", pytest.approx(math.exp(0.25)), 2.0, 2.0)
    for missing in ({"prompt": 512}, {"batch": 8}):  # files are timed with one prompt of 128 tokens
        with pytest.raises(UserError, match=r"needs timings of .*--prompt 128`; got none of 'share, 20 %'"):
            trade_off.pruned(replace(run, evaluation=[r | missing for r in records]))


@pytest.mark.slow
def test_runs_are_compared_with_quantized_files_of_their_dense_model(tmp_path, monkeypatch):
    """Without llama.cpp, GGUF files have only a size. With llama.cpp, f16 has the perplexity and speed of the model."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GPRUNE_CACHE", str(tmp_path / "cache"))
    for name, least in (("MAX_SECONDS", 0.1), ("MIN_ROUNDS", 1), ("NEW_TOKENS", 4)):
        monkeypatch.setattr(engines, name, least)
    fork(monkeypatch)
    names = ["share, 20 %", "share, 50 %"]
    for name, target in zip(names, ("0.2", "0.5"), strict=True):
        gprune.prune(parse([*FLAGS, f"--run.name={name}", f"--sparsity.target={target}"]))
    runs = [str(tmp_path / "runs" / name) for name in names]
    assert engines.main([*runs, "--dense", "--batch", "1"]) == 0
    cells = {}  # {first cell: other cells} of each row
    for line in trade_off.work([*runs, str(tmp_path)]).splitlines():
        if line.startswith("| "):
            name, *numbers = [cell.strip() for cell in line.strip("|").split("|")]
            cells[name] = numbers
    assert list(cells)[1:5] == ["share, 20 %", "share, 50 %", "dense, GGUF f16", "dense, GGUF q8_0"]
    assert float(cells["dense, GGUF q8_0"][2]) < float(cells["dense, GGUF f16"][2])
    assert (tmp_path / "trade-off.png").exists()
    f16 = cells["dense, GGUF f16"]
    if has_llama_cpp():
        assert [float(cell.split()[0]) for cell in f16[:2]] == [pytest.approx(1, abs=0.01), 1]
    else:
        assert f16[:2] == ["", ""]
