"""FLOPs and time in a dry run."""

from __future__ import annotations

import pytest
import torch

from experiments.bench.measure import flops as counted
from gprune.config.parse import parse
from gprune.models.losses import next_token_losses
from gprune.pipeline import pace
from gprune.pipeline.dry_run import compute_time, flops, matmul_flops
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
    assert flops(plan) == pytest.approx(plan.forward_tokens * token, rel=1e-9)


def test_estimated_training_flops_are_at_most_5_percent_above_torchs_count(tiny_model, tmp_path):
    less, more = (planned(tiny_model, tmp_path, f"--sparsity.epochs={epochs}") for epochs in (1, 3))
    # torch does not count the backward pass of fused attention
    tiny_model.requires_grad_(True).set_attn_implementation("eager")
    step = counted(lambda: next_token_losses(tiny_model, IDS).mean().backward()) / IDS.numel()
    expected = (more.forward_backward_tokens - less.forward_backward_tokens) * step
    expected += (more.forward_tokens - less.forward_tokens) * counted(lambda: tiny_model(input_ids=IDS)) / IDS.numel()
    # the last token of a window needs no output projection
    assert expected <= flops(more) - flops(less) <= 1.05 * expected


def test_the_measured_matmul_speed_is_plausible():
    assert 1e6 < matmul_flops(torch.device("cpu"), torch.float32, (64, 64), seconds=0.02) < 1e14


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text", "mixtral"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_seconds_per_token_are_those_of_two_blocks_scaled_to_the_model(family, precision, tmp_path, monkeypatch):
    """With 1 s for each block and 1 s for the output projection, the expected time is exact."""
    plan = planned(make_tiny(family), tmp_path, f"--trainer.precision={precision}", "--recovery=distill")
    blocks = plan.skeleton.config.num_hidden_layers
    calls = []

    def seconds(call, device, **_):
        call()  # must not raise for this model type
        calls.append(call)
        # `per_token` measures the whole model first, then its blocks.
        return 1.0 + pace.TIMED_BLOCKS if len(calls) % 2 else float(pace.TIMED_BLOCKS)

    monkeypatch.setattr(pace, "_seconds", seconds)
    monkeypatch.setattr(pace, "_PACES", {})
    dense, pruned = pace._paces(plan)
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
    dense, pruned = pace._paces(less)
    rows = sum(recovery == "distill" for _, recovery in less.cfg.stages)
    added = less.cfg.distilled_windows * 9 * 3 * 64
    assert many - few == pytest.approx(added * (rows * pruned.learned + dense.teacher), rel=1e-6)


def test_the_time_of_a_large_model_is_estimated_from_the_matmul_speed(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr(pace, "MOST", 1000)
    plan = planned(tiny_model, tmp_path)
    assert pace.run_seconds(plan) is None
    assert "the speed of matrix products of float32 on cpu" in compute_time(plan)
