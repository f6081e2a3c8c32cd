"""The benchmark measures what it says, on shapes that take seconds; the figures themselves mean nothing here."""

from __future__ import annotations

import math
import sys
import time
from dataclasses import replace

import pytest
import torch

import gprune
from experiments.bench import gguf, measure, models, pipeline
from experiments.bench import inference as speed
from experiments.bench.__main__ import BENCHMARKS, main, parser, tables
from experiments.bench.measure import Table, Timing
from experiments.bench.models import Settings
from gprune.errors import UserError
from gprune.export.hf import save_pruned
from gprune.export.packages import has_llama_cpp
from gprune.models.blocks import blocks_of
from gprune.models.losses import next_token_loss
from tests import tiny_run

CPU = torch.device("cpu")
CLOCK = measure.Clock(CPU)
SMALL = Settings(repeats=1).shrunk()
linux = pytest.mark.skipif(not measure.STATUS.exists(), reason="resident memory is read from /proc")


@pytest.fixture(autouse=True, scope="module")
def _old_garbage():
    """Passed over: collecting before every call takes half a second after other tests."""
    with measure.only_new_garbage():
        yield


@pytest.fixture(autouse=True)
def _apart(tmp_path):
    """`main` sets up logging, which is put back."""
    with tiny_run.isolated(tmp_path / "cache"):
        yield


def finite(table: Table) -> bool:
    numbers = [c for row in table.rows for c in row if isinstance(c, float | int) and not isinstance(c, bool)]
    return bool(numbers) and all(math.isfinite(n) for n in numbers)


@pytest.mark.slow
@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_benchmark_gives_tables_of_finite_numbers(name):
    if name == "peer":
        pytest.importorskip("optipfair")
    found = list(tables(name, SMALL))
    assert found
    for table in found:
        assert finite(table), str(table)
        assert all(len(row) == len(table.header) for row in table.rows)
        assert str(table).count("\n| ") == len(table.rows) + 1
    for part in (measure.processor(), f"{torch.get_num_threads()} thread", torch.__version__, "float32", "median of 1"):
        assert part in found[0].protocol


def test_a_peer_that_is_not_installed_is_one_line(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "optipfair", None)
    assert main(["peer", "--small"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "peer: optipfair is not installed" in line


def test_what_is_timed_must_cost_something():
    (table,) = tables("calibration", SMALL)
    assert all(seconds > 0 for seconds in table.column("seconds"))
    (table,) = tables("learning", SMALL)
    assert all(seconds > 0 for seconds in table.column("seconds"))


def test_main_prints_markdown(capsys):
    assert main(["calibration", "--small", "--repeats", "1"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("**Calibration.** a tiny random Llama, float32; ")
    assert "| moments and Gram |" in out


# FLOPs, worked out by hand


def by_hand(*, tokens: int, pairs: int, neurons: list[int], kv: int, hidden=32, heads=4, vocabulary=256) -> int:
    """2 per multiply-add: projections, head, attention with `pairs` of query and key, those of the batch counted."""
    linear = sum(3 * hidden * n + 2 * hidden * hidden + 2 * hidden * kv * hidden // heads for n in neurons)
    return 2 * tokens * (linear + hidden * vocabulary) + 2 * 2 * pairs * hidden * len(neurons)


@pytest.mark.parametrize("groups", [4, 2])
def test_bound_of_half_the_ffn_is_the_one_worked_out_by_hand(groups):
    settings = replace(SMALL, widths="uniform")
    dense = models.random_llama(hidden=32, neurons=256, blocks=2, groups=groups)
    small = gprune.apply_masks(dense, models.random_masks(dense, settings))
    B, T = 3, settings.seq_len
    counted = [measure.flops(speed.prefill(model, settings, B)) for model in (dense, small)]
    expected = [by_hand(tokens=B * T, pairs=B * T * T, neurons=[n, n], kv=groups) for n in (256, 128)]
    assert counted == expected
    assert 1.5 < counted[0] / counted[1] < 2


def test_flops_of_decoding_count_what_attention_looks_back_on():
    dense = models.model_of(SMALL)
    B, T, N = 3, SMALL.seq_len, SMALL.new_tokens
    pairs = B * sum(T + step + 1 for step in range(N))
    expected = by_hand(tokens=B * N, pairs=pairs, neurons=[256, 256], kv=2)
    assert measure.flops(speed.decode(dense, SMALL, B)) == expected


def test_the_table_holds_the_ratio_of_these_flops():
    settings = replace(SMALL, widths="uniform", batch_sizes=(2,))
    table, memory = speed.inference(settings)
    dense = models.model_of(settings)
    small = gprune.apply_masks(dense, models.random_masks(dense, settings))
    first = table.rows[0]
    bound = measure.flops(speed.prefill(dense, settings, 2)) / measure.flops(speed.prefill(small, settings, 2))
    assert table.column("FLOP bound")[0] == bound
    assert table.column("reached")[0] == pytest.approx(table.column("speed-up")[0] / bound)
    assert first[list(table.header).index("goal")] == speed.GOAL
    assert memory.rows[0][3] == pytest.approx(
        sum(p.numel() for p in small.parameters()) / sum(p.numel() for p in dense.parameters())
    )
    assert memory.column("pruned, MiB")[-1] > memory.column("pruned, MiB")[0]  # the file has a header too


# The calls that are timed


def test_decoding_gives_the_logits_of_the_whole_text_every_time():
    settings = replace(SMALL, widths="random")
    dense = models.model_of(settings)
    small = gprune.apply_masks(dense, models.random_masks(dense, settings))
    for model in (dense, small):
        call = speed.decode(model, settings, 2)
        ids = models.tokens(model, 2, settings.seq_len + settings.new_tokens, settings.seed)
        expected = model(input_ids=ids).logits[:, -1]
        for _ in range(3):
            torch.testing.assert_close(call()[:, -1], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("widths", ["random", "uniform"])
def test_masks_meet_budget_and_grid(widths):
    model = models.random_llama(hidden=32, neurons=1024, blocks=4)
    settings = replace(SMALL, widths=widths)
    kept = [int(m.sum()) for m in models.random_masks(model, settings).ffn]
    assert all(n % 64 == 0 for n in kept)
    assert 2048 - 64 * len(kept) < sum(kept) <= 2048
    assert (len(set(kept)) == 1) == (widths == "uniform")


def test_the_decoder_alone_never_reaches_the_head():
    model = models.model_of(SMALL)
    seen = {"decoder": 0, "head": 0}
    for name, module in (("decoder", model.get_decoder()), ("head", model.get_output_embeddings())):
        module.register_forward_hook(lambda *_, name=name: seen.__setitem__(name, seen[name] + 1))
    pipeline.decoder_alone(model, models.batches(models.tokens(model, 5, 8), 2))
    assert seen == {"decoder": 3, "head": 0}


@pytest.mark.parametrize("kl", [False, True])
def test_a_bare_step_goes_backward_through_every_block_and_to_no_weight(kl):
    model = models.model_of(SMALL)
    (batch,) = models.batches(models.tokens(model, 2, 8), 2)
    reached = []
    watch = [b.layer.register_full_backward_hook(lambda *_, i=b.index: reached.append(i)) for b in blocks_of(model)]
    assert pipeline.bare_step(model, batch, CLOCK, kl=kl) > 0
    for handle in watch:
        handle.remove()
    assert reached == [1, 0]
    assert all(p.grad is None for p in model.parameters())
    with torch.enable_grad():
        assert not next_token_loss(model, batch["input_ids"]).requires_grad  # the hook is gone


def test_a_step_of_learning_is_a_real_one():
    model = models.model_of(SMALL)
    stage = pipeline.threshold_stage(model, SMALL)
    before = [t.detach().clone() for t in stage.ffn_thresholds]
    (batch,) = models.batches(models.tokens(model, 2, 8), 2)
    logits = model(input_ids=batch["input_ids"]).logits
    assert pipeline.fit_step(stage, batch, CLOCK) > 0
    assert any(not torch.equal(a, b) for a, b in zip(before, stage.ffn_thresholds, strict=True))
    assert torch.equal(model(input_ids=batch["input_ids"]).logits, logits)


def test_differing_counts_units_that_one_mask_keeps():
    def masks(*rows):
        return gprune.Masks([torch.tensor(row, dtype=torch.bool) for row in rows], [])

    assert pipeline.differing(masks([1, 1, 0, 0], [1, 0]), masks([1, 0, 1, 0], [1, 0])) == (2, 6, 2 / 6)


# Measuring


def test_calls_run_in_turn_and_ratios_stay_inside_a_round():
    order, load = [], iter([100, 100, 1, 1, 7, 7, 2, 2])  # a machine whose speed changes from round to round

    def call(name, seconds):
        return lambda: order.append(name) or seconds * next(load)

    timing = measure.in_turn({"a": call("a", 3.0), "b": call("b", 2.0)}, repeats=3)
    assert order == ["a", "b", "a", "b", "b", "a", "a", "b"]
    assert timing.seconds == {"a": [3.0, 21.0, 6.0], "b": [2.0, 14.0, 4.0]}
    assert timing.ratio("a", "b") == 1.5
    assert timing.spread("a", "b") == "1.5 to 1.5"
    assert timing.median("a") == 6.0


def test_the_ratio_is_the_median_over_rounds_not_of_medians():
    timing = Timing({"a": [1.0, 10.0, 5.0], "b": [2.0, 4.0, 5.0]})
    assert timing.ratios("a", "b") == [0.5, 2.5, 1.0]
    assert timing.ratio("a", "b") == 1.0
    assert timing.spread("a", "b") == "0.5 to 2.5"


def test_short_calls_are_repeated_and_counted_once():
    timing = measure.alternated({"nap": lambda: time.sleep(0.004)}, 2, CLOCK, at_least=0.05)
    assert all(0.004 <= s < 0.03 for s in timing.seconds["nap"])


def test_the_clock_of_the_process_does_not_run_while_others_do():
    def seconds(kind):
        timing = measure.alternated({"nap": lambda: time.sleep(0.05)}, 1, measure.Clock(CPU, kind), at_least=0)
        return timing.median("nap")

    assert seconds("process") < 0.02 < seconds("wall")


def test_no_repeat_is_refused():
    with pytest.raises(ValueError, match="at least 1, got 0"):
        measure.in_turn({}, 0)


@linux
@pytest.mark.parametrize("resets", [True, False])
def test_peak_memory_is_what_a_call_takes_and_gives_back(resets, monkeypatch, tmp_path):
    if not resets:
        monkeypatch.setattr(measure, "RESET", tmp_path / "missing" / "clear_refs")

    def take(mib):
        kept = torch.ones(mib * measure.MIB // 4)
        time.sleep(0.05)
        return kept.sum()

    take(200)  # an earlier peak does not count
    for mib in (32, 96):
        assert mib - 1 <= measure.peak_above(lambda mib=mib: take(mib), CPU) / measure.MIB < mib + 8


def test_the_exponent_is_that_of_a_power():
    assert measure.exponent([1, 2, 4], [3.0, 12.0, 48.0]) == pytest.approx(2)
    assert measure.exponent([5, 10, 20], [7.0, 7.0, 7.0]) == pytest.approx(0)


def test_cells_of_a_table():
    cells = [None, True, False, 12345, 1234.5, 1.10449, 0.000123456, "x"]
    assert [measure.show(cell) for cell in cells] == ["", "yes", "no", "12,345", "1,234", "1.104", "0.0001235", "x"]


def test_goals_are_met_up_to_the_number_itself():
    timing = Timing({"decoder": [1.0], "moments": [1.1], "moments and Gram": [1.7]})
    assert pipeline.against(timing, "moments", "decoder")[2:] == [1.1, True]
    assert pipeline.against(timing, "moments and Gram", "decoder")[2:] == [1.6, False]


# What people ask for


def test_a_pruned_folder_beside_its_dense_model(tmp_path, capsys):
    dense = tiny_run.save_tiny_model(tmp_path / "dense")
    model = tiny_run.make_tiny_llama(intermediate_size=tiny_run.NEURONS)
    small = gprune.apply_masks(model, models.random_masks(model, SMALL))
    save_pruned(small, tiny_run.tiny_tokenizer(), tmp_path / "small")
    arguments = ["--model", dense, "--run", tmp_path / "small", "--repeats", 1, "--seq_len", 8, "--new_tokens", 2]
    assert main(["inference", *map(str, arguments)]) == 0
    out = capsys.readouterr().out
    assert "pruned as in small" in out
    share = sum(p.numel() for p in small.parameters()) / sum(p.numel() for p in model.parameters())
    (weights,) = [line for line in out.splitlines() if line.startswith("| weights")]
    assert float(weights.split("|")[-2]) == pytest.approx(share, abs=1e-3)


def test_a_finished_run_is_measured_against_its_own_dense_model(tmp_path, monkeypatch, capsys):
    tiny_run.quick(monkeypatch)
    (tmp_path / "world").mkdir()
    world = tiny_run.make_world(tmp_path / "world")
    world.run(tmp_path / "runs", "--gprune=false")
    capsys.readouterr()
    arguments = ["--run", tmp_path / "runs" / "run", "--repeats", 1, "--seq_len", 8, "--new_tokens", 2]
    assert main(["inference", *map(str, arguments)]) == 0
    out = capsys.readouterr().out
    assert f"{world.model}, pruned as in run" in out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--repeats", "0"], "--repeats: expected at least 1, got 0."),
        (["--batch_sizes", "0"], "--batch_sizes: expected at least 1"),
        (["--windows", "1"], "--windows, --window: expected at least 2"),
        (["--device", "abacus"], "--device: 'abacus' is not there"),
        (["--sparsity", "1.5", "--model", "tiny"], "inside (0, 1), got 1.5"),
        (["--model", "nowhere"], "'nowhere' is neither an embedded model"),
        (["--clock", "process", "--threads", "2"], "--clock process: expected one thread"),
        (["--gguf", "q1"], "Unknown GGUF type 'q1'"),
    ],
)
def test_what_cannot_be_is_one_line(arguments, said, capsys):
    assert main(["inference", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("experiments.bench: ")
    assert said in error
    assert error.count("\n") == 1


def test_llama_cpp_is_asked_for_where_it_is_missing(monkeypatch):
    monkeypatch.setattr(gguf, "has_llama_cpp", lambda: False)
    with pytest.raises(UserError, match="pip install llama-cpp-py-sync"):
        gguf.check_build("f16")


@pytest.mark.real
@pytest.mark.skipif(not has_llama_cpp(), reason="no llama.cpp build is installed")
def test_through_llama_cpp(capsys):
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("GPRUNE_CACHE")
        arguments = ["--repeats", 1, "--batch_sizes", 1, 2, "--seq_len", 16, "--new_tokens", 2]
        assert main(["inference", "--gguf", "q8_0", *map(str, arguments)]) == 0
    out = capsys.readouterr().out
    assert "llama.cpp (llama-cpp-py-sync), q8_0" in out
    assert out.count("| decode, batch") == 2


def test_help_names_every_benchmark():
    text = parser().format_help()
    assert all(f"\n{name} " in text for name in BENCHMARKS)
