"""The benchmark measures the right quantities, on shapes that take seconds. The measured times are not tested."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch

import gprune
from experiments.bench import inference as speed
from experiments.bench import learning, measure, models
from experiments.bench.__main__ import main
from experiments.bench.models import Settings
from tests import tiny_run

CPU = torch.device("cpu")
SMALL = Settings(repeats=1).shrunk()
linux = pytest.mark.skipif(not measure.STATUS.exists(), reason="resident memory is read from /proc")


@pytest.fixture(autouse=True)
def _isolated(tmp_path):
    """Restore the logging setup that `main` changes."""
    with tiny_run.isolated(tmp_path / "cache"):
        yield


# FLOPs, compared with a calculation by hand


def by_hand(*, tokens: int, pairs: int, neurons: list[int], kv: int, hidden=32, heads=4, vocabulary=256) -> int:
    """Return the FLOPs of forward passes, with 2 FLOPs for each multiply-add.

    Args:
        tokens: number of tokens in the batch.
        pairs: number of (query, key) pairs in the batch.
        neurons: FFN width of each block.
        kv: number of KV groups of each block.
    """
    linear = sum(3 * hidden * n + 2 * hidden * hidden + 2 * hidden * kv * hidden // heads for n in neurons)
    return 2 * tokens * (linear + hidden * vocabulary) + 2 * 2 * pairs * hidden * len(neurons)


@pytest.mark.parametrize("groups", [4, 2])
def test_flops_of_prefill_equal_a_calculation_by_hand(groups):
    dense = models.random_llama(neurons=256, blocks=2, groups=groups)
    small = gprune.apply_masks(dense, models.random_masks(dense, replace(SMALL, widths="uniform")))
    B, T = 3, SMALL.seq_len
    counted = [measure.flops(speed.prefill(model, SMALL, B)) for model in (dense, small)]
    assert counted == [by_hand(tokens=B * T, pairs=B * T * T, neurons=[n, n], kv=groups) for n in (256, 128)]


def test_flops_of_decoding_include_attention_to_all_earlier_tokens():
    B, T, N = 3, SMALL.seq_len, SMALL.new_tokens
    pairs = B * sum(T + step + 1 for step in range(N))
    expected = by_hand(tokens=B * N, pairs=pairs, neurons=[256, 256], kv=2)
    assert measure.flops(speed.decode(models.model_of(SMALL), SMALL, B)) == expected


# Timed calls


def test_repeated_decoding_gives_the_logits_of_a_full_forward_pass():
    dense = models.model_of(SMALL)
    small = gprune.apply_masks(dense, models.random_masks(dense, SMALL))
    for model in (dense, small):
        call = speed.decode(model, SMALL, 2)
        ids = models.tokens(model, 2, SMALL.seq_len + SMALL.new_tokens, SMALL.seed)
        expected = model(input_ids=ids).logits[:, -1]
        for _ in range(3):
            torch.testing.assert_close(call()[:, -1], expected, rtol=1e-4, atol=1e-4)


# Measuring


def test_calls_alternate_and_ratios_are_taken_within_a_round(monkeypatch):
    order, clock = [], [0.0]
    load = iter([100, 100, 1, 1, 7, 7, 2, 2])  # the speed of the machine changes between rounds
    monkeypatch.setattr(measure.gc, "collect", lambda: None)

    def call(name, seconds):
        def work():
            order.append(name)
            clock[0] += seconds * next(load)

        return work

    timing = measure.in_turn({"a": call("a", 3.0), "b": call("b", 2.0)}, 3, CPU, clock=lambda: clock[0])
    assert order == ["a", "b", "a", "b", "b", "a", "a", "b"]
    assert timing.seconds == {"a": [3.0, 21.0, 6.0], "b": [2.0, 14.0, 4.0]}
    assert timing.median("a") == 6.0
    assert (timing.ratio("a", "b"), timing.range("a", "b")) == (1.5, "1.5 to 1.5")


@linux
def test_peak_memory_is_that_of_the_call_and_not_of_earlier_ones():
    def allocate(mib):
        return torch.ones(mib * measure.MIB // 4).sum()

    allocate(100)  # an earlier, higher peak
    for mib in (16, 48):
        # Other allocations change the resident memory too: accept 1 MiB less and 8 MiB more.
        assert mib - 1 <= measure.peak_above(lambda mib=mib: allocate(mib), CPU) / measure.MIB < mib + 8


# Commands


def numbers(out: str, first_cell: str) -> list[float]:
    """Return the numbers of a table row, without cells that contain anything except a single number."""
    (line,) = [line for line in out.splitlines() if line.startswith(f"| {first_cell} ")]
    return [float(cell.replace(",", "")) for cell in re.findall(r"\| +([\d,.]+) +(?=\|)", line)]


@pytest.mark.slow
def test_inference_compares_the_dense_model_with_one_pruned_by_random_masks(capsys):
    assert main(["inference", "--small", "--repeats", "1", "--batch_sizes", "2", "--widths", "uniform"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("**Inference, speed.** a tiny random Llama, uniform masks at 50% of the FFN, widths of 64, ")
    assert f"{torch.get_num_threads()} thread" in out
    _, _, speedup, bound, share_of_bound, goal = numbers(out, "prefill, batch 2")
    flops = [by_hand(tokens=32, pairs=2 * 16 * 16, neurons=[n, n], kv=2) for n in (256, 128)]
    assert bound == pytest.approx(flops[0] / flops[1], rel=1e-3)
    assert (share_of_bound, goal) == (pytest.approx(speedup / bound, rel=2e-3), speed.GOAL)


def test_a_finished_run_or_a_pruned_folder_is_compared_with_its_own_dense_model(tmp_path):
    (tmp_path / "world").mkdir()
    world = tiny_run.make_world(tmp_path / "world")
    run = world.run(tmp_path / "runs", "--gprune=false", "--evaluation.before_recovery=false")
    pair = models.pair_of(replace(SMALL, model="smollm2-135m", run=str(run.path)))
    assert pair.how == f"{world.model}, pruned as in run"
    assert [m.config.intermediate_size for m in pair.models.values()] == [tiny_run.NEURONS, tiny_run.NEURONS // 2]
    ids = torch.arange(4, 20)[None]
    assert torch.equal(pair.models["pruned"](ids).logits, run.model(ids).logits)
    of_folder = models.pair_of(replace(SMALL, model=str(world.model), run=str(run.path / "model")))
    assert of_folder.how.endswith("pruned as in model")
    assert torch.equal(of_folder.models["pruned"](ids).logits, run.model(ids).logits)


@pytest.mark.slow
def test_learning_compares_training_steps_with_plain_pytorch_steps(capsys):
    assert main(["learning", "--small", "--repeats", "1", "--clock", "cpu"]) == 0
    out = capsys.readouterr().out
    assert "`--trainer.precision auto` is " in out
    for step in ("distillation, 1 x 16 tokens", "thresholds, 8 x 16 tokens"):
        plain, mixed, full, overhead, goal, speedup = numbers(out, step)
        assert overhead == pytest.approx(mixed / plain, rel=2e-3)
        assert speedup == pytest.approx(mixed / full, rel=2e-3)
        assert goal == learning.STEP
