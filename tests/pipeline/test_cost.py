"""FLOPs and time in a dry run."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from experiments.bench.measure import flops as counted
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
    model.save_pretrained(folder)
    return check(parse([f"--model.name={folder}", "--recovery=none", "--corpora.seq_len=64", *flags]))


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3"])
def test_flops_per_forward_token_equal_those_counted_by_torch(family, tmp_path):
    """Without training, recovery and Gram matrices, all tokens are forward tokens."""
    model = make_tiny(family)
    flags = ("--gprune=false", "--corpora.num_samples=2", "--evaluation.seq_len=64", "--evaluation.controls=[]")
    plan = planned(model, tmp_path, *flags)
    assert plan.forward_backward_tokens == 0
    token = counted(lambda: model(input_ids=IDS, use_cache=False)) / IDS.numel()
    assert estimated_flops(plan) == pytest.approx(plan.forward_tokens * token, rel=1e-9)


def test_estimated_training_flops_are_at_most_5_percent_above_torchs_count(tiny_model, tmp_path):
    less, more = (planned(tiny_model, tmp_path, f"--sparsity.epochs={epochs}") for epochs in (1, 3))
    # torch does not count the backward pass of fused attention
    tiny_model.requires_grad_(True).set_attn_implementation("eager")
    step = counted(lambda: next_token_losses(tiny_model, IDS).mean().backward()) / IDS.numel()
    expected = (more.forward_backward_tokens - less.forward_backward_tokens) * step
    expected += (more.forward_tokens - less.forward_tokens) * counted(lambda: tiny_model(input_ids=IDS)) / IDS.numel()
    # the last token of a window needs no output projection
    assert expected <= estimated_flops(more) - estimated_flops(less) <= 1.05 * expected


@pytest.mark.parametrize("channels", [64, 192, 300, 576, 1536])
def test_gram_flops_are_an_upper_bound_of_the_products_of_panels(channels):
    """A panel of w columns is multiplied with all columns from its first one on."""
    done = sum(2 * (panel.stop - panel.start) * (channels - panel.start) for panel in _panels(channels))
    assert done <= gram_flops(channels) <= 4 / 3 * done


@pytest.mark.parametrize("name", EXPERTS_PER_TOKEN)
def test_active_experts_are_read_by_any_name_and_default_to_all(name):
    experts, dense = SimpleNamespace(experts=4), SimpleNamespace(experts=1)
    for value, active in ((2, 2), ([1, 3], 3), (8, 4), (None, 4)):
        assert active_experts(SimpleNamespace(**{name: value}), experts) == active
        assert active_experts(SimpleNamespace(**{name: value}), dense) == 1
    assert active_experts(SimpleNamespace(), experts) == 4


def test_longer_evaluation_windows_cost_more_attention(tiny_model, tmp_path):
    """Half as many windows of twice the length: the same tokens, each of which attends to 64 more."""
    flags = ("--gprune=false", "--evaluation.controls=[]")
    short, long = (
        planned(tiny_model, tmp_path, *flags, f"--evaluation.seq_len={length}", f"--evaluation.num_samples={windows}")
        for length, windows in ((64, 8), (128, 4))
    )
    evaluated, channels = 2 * 8 * 64 * 3, sum(block.channels for block in blocks_of(short.skeleton))
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
    c, tokens = plan.cfg, plan.cfg.corpora.batch_size * plan.cfg.evaluation.seq_len
    for one, trained in ((dense, c.corpora.batch_size * 64), (pruned, c.distill.batch_size * 64)):
        assert one == pytest.approx(
            (blocks / tokens, (blocks + 1) / tokens, (blocks + 1) / tokens, blocks / tokens, (blocks + 1) / trained)
        )


def test_the_estimated_time_grows_with_the_training_tokens(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr(pace, "_PACES", {})
    flags = ("--recovery=distill", "--trainer.precision=32-true")
    less, more = (planned(tiny_model, tmp_path, *flags, f"--distill.tokens={tokens}") for tokens in (12_288, 122_880))
    few, many = pace.run_seconds(less), pace.run_seconds(more)  # both from one measurement
    dense, pruned = pace._measured_paces(less)
    rows = sum(recovery == "distill" for _, recovery in less.cfg.stages)
    added = less.cfg.distilled_windows * 9 * 3 * 64
    assert many - few == pytest.approx(added * (rows * pruned.learned + dense.teacher), rel=1e-6)


def test_the_time_of_a_large_model_is_estimated_from_the_matmul_speed(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr(pace, "MAX_TIMED_PARAMETERS", 1000)
    plan = planned(tiny_model, tmp_path)
    assert pace.run_seconds(plan) is None
    assert "the speed of matrix products of float32 on cpu" in describe_compute(plan)
