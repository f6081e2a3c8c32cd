"""FLOPs and time in a dry run."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest
import torch

from experiments.bench.measure import flops as count_flops
from gprune.calibration.moments import _panels
from gprune.config.parse import parse
from gprune.models.blocks import blocks_of
from gprune.models.losses import next_token_losses
from gprune.pipeline import pace
from gprune.pipeline.cost import EXPERTS_PER_TOKEN, active_experts
from gprune.pipeline.dry_run import describe_compute, estimated_flops, gram_flops, matmul_flops
from gprune.pipeline.plan import check
from tests.tiny_families import make_tiny

IDS = torch.randint(3, 128, (2, 64), generator=torch.Generator().manual_seed(0))


def planned(model, folder, *flags):
    """Save a model, and return the plan of a run with windows of 64 tokens and without recovery."""
    model.save_pretrained(folder)
    return check(parse([f"--model.name={folder}", "--recovery=none", "--corpora.seq_len=64", *flags]))


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3"])
def test_flops_per_forward_token_equal_those_counted_by_torch(family, tmp_path):
    """Without training, recovery and Gram matrices, all tokens are forward tokens."""
    model = make_tiny(family)
    flags = ("--gprune=false", "--corpora.num_samples=2", "--evaluation.seq_len=64", "--evaluation.controls=[]")
    plan = planned(model, tmp_path, *flags)
    assert plan.forward_backward_tokens == 0
    flops_per_token = count_flops(lambda: model(input_ids=IDS, use_cache=False)) / IDS.numel()
    assert estimated_flops(plan) == pytest.approx(plan.forward_tokens * flops_per_token, rel=1e-9)


def test_estimated_training_flops_are_at_most_5_percent_above_torchs_count(tiny_model, tmp_path):
    """Compares a plan of one epoch with one of three epochs, so that all other costs cancel."""
    one_epoch, three_epochs = (planned(tiny_model, tmp_path, f"--sparsity.epochs={epochs}") for epochs in (1, 3))
    # torch does not count the backward pass of fused attention.
    tiny_model.requires_grad_(True).set_attn_implementation("eager")
    trained = count_flops(lambda: next_token_losses(tiny_model, IDS).mean().backward()) / IDS.numel()
    forward = count_flops(lambda: tiny_model(input_ids=IDS)) / IDS.numel()
    expected = (three_epochs.forward_backward_tokens - one_epoch.forward_backward_tokens) * trained
    expected += (three_epochs.forward_tokens - one_epoch.forward_tokens) * forward
    # The estimate includes an output projection of the last token of a window, which has no loss.
    assert expected <= estimated_flops(three_epochs) - estimated_flops(one_epoch) <= 1.05 * expected


@pytest.mark.parametrize("channels", [64, 192, 300, 576, 1536])
def test_gram_flops_are_an_upper_bound_of_the_products_of_panels(channels):
    """A panel of w columns is multiplied with all columns from its first one on."""
    exact = sum(2 * (panel.stop - panel.start) * (channels - panel.start) for panel in _panels(channels))
    assert exact <= gram_flops(channels) <= 4 / 3 * exact


@pytest.mark.parametrize("name", EXPERTS_PER_TOKEN)
def test_active_experts_are_read_by_any_name_and_default_to_all(name):
    """A list has one number for each layer, of which the largest one counts. There are at most all four experts."""
    block_with_experts, dense_block = SimpleNamespace(experts=4), SimpleNamespace(experts=1)
    for value, active in ((2, 2), ([1, 3], 3), (8, 4), (None, 4)):
        assert active_experts(SimpleNamespace(**{name: value}), block_with_experts) == active
        assert active_experts(SimpleNamespace(**{name: value}), dense_block) == 1
    assert active_experts(SimpleNamespace(), block_with_experts) == 4


def test_longer_evaluation_windows_cost_more_attention(tiny_model, tmp_path):
    """Half as many windows of twice the length have as many tokens. The cost of attention to 64 more is added."""
    flags = ("--gprune=false", "--evaluation.controls=[]")
    short, long = (
        planned(tiny_model, tmp_path, *flags, f"--evaluation.seq_len={length}", f"--evaluation.num_samples={windows}")
        for length, windows in ((64, 8), (128, 4))
    )
    evaluated = 2 * 8 * 64 * 3  # tokens: two rows, windows, tokens of a window, corpora
    channels = sum(block.channels for block in blocks_of(short.skeleton))
    assert estimated_flops(long) - estimated_flops(short) >= evaluated * 4 * 64 * channels


def test_the_measured_matmul_speed_is_plausible():
    assert 1e6 < matmul_flops(torch.device("cpu"), torch.float32, (64, 64), seconds=0.02) < 1e14


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text", "mixtral"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_seconds_per_token_are_those_of_a_few_blocks_scaled_to_the_model(family, precision, tmp_path, monkeypatch):
    """With 1 s for each block and 1 s for the output projection, the expected time is exact."""
    plan = planned(make_tiny(family), tmp_path, f"--trainer.precision={precision}", "--recovery=distill")
    monkeypatch.setattr(pace, "MAX_TIMED_BLOCKS", 2)
    blocks = plan.skeleton.config.num_hidden_layers
    calls = []

    def seconds(call, device, **_):
        call()  # must not raise for this model type
        calls.append(call)
        # `per_token` measures the whole model first, then its blocks.
        return 3.0 if len(calls) % 2 else 2.0

    monkeypatch.setattr(pace, "_seconds", seconds)
    monkeypatch.setattr(pace, "_PACES", {})
    dense, pruned = pace._measured_paces(plan)
    evaluated = plan.cfg.corpora.batch_size * plan.cfg.evaluation.seq_len  # tokens of a batch
    for model_pace, batch_size in ((dense, plan.cfg.corpora.batch_size), (pruned, plan.cfg.distill.batch_size)):
        expected = pace.Pace(
            forward=blocks / evaluated,
            evaluated=(blocks + 1) / evaluated,
            developed=(blocks + 1) / evaluated,
            teacher=blocks / evaluated,
            learned=(blocks + 1) / (batch_size * 64),
            salient=0.0,
        )
        assert model_pace == pytest.approx(tuple(expected))


def test_the_estimated_time_grows_with_the_training_tokens(tiny_model, tmp_path, monkeypatch):
    """The rows share the forward passes of the teacher. Both times are from the same measurement."""
    monkeypatch.setattr(pace, "_PACES", {})
    flags = ("--recovery=distill", "--trainer.precision=32-true")
    short, long = (planned(tiny_model, tmp_path, *flags, f"--distill.tokens={tokens}") for tokens in (12_288, 122_880))
    seconds_of_short, seconds_of_long = pace.run_seconds(short), pace.run_seconds(long)
    dense, pruned = pace._measured_paces(short)
    distilled_rows = sum(recovery == "distill" for _, recovery in short.cfg.stages)
    added_tokens = short.cfg.distilled_windows * 9 * 3 * 64  # nine times as many windows, three corpora, tokens
    added_seconds = added_tokens * (distilled_rows * pruned.learned + dense.teacher)
    assert seconds_of_long - seconds_of_short == pytest.approx(added_seconds, rel=1e-6)


@pytest.mark.parametrize(("long_call", "calls"), [(0.01, 1), (60.0, 4)])
def test_a_long_call_is_not_repeated_to_measure_its_time(long_call, calls, monkeypatch):
    """Other calls have a warm-up, and the median of three."""
    monkeypatch.setattr(pace, "LONG_CALL", long_call)
    made = []

    def call():
        made.append(time.sleep(0.02))

    assert pace._seconds(call, torch.device("cpu"), at_least=0) >= 0.02
    assert len(made) == calls


def test_the_time_of_saliency_is_measured_without_autocast(tiny_model, tmp_path, monkeypatch):
    plan = planned(tiny_model, tmp_path, "--trainer.precision=bf16-mixed", "--importance=taylor")
    assert "saliency" in plan.cfg.collects
    monkeypatch.setattr(pace, "_PACES", {})
    monkeypatch.setattr(pace, "_seconds", lambda call, device: 1.0 + torch.is_autocast_enabled("cpu"))
    dense, _ = pace._measured_paces(plan)
    assert dense.learned == 2 * dense.salient > 0


def test_the_time_of_a_large_model_is_estimated_from_the_matmul_speed(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr(pace, "MAX_TIMED_PARAMETERS", 1000)
    plan = planned(tiny_model, tmp_path)
    assert pace.run_seconds(plan) is None
    assert "the speed of matrix products of float32 on cpu" in describe_compute(plan)
