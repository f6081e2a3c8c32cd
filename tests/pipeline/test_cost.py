"""What the dry run says of FLOPs and time."""

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
def test_a_token_costs_what_torch_counts(family, tmp_path):
    """Without learning, recovery and Gram matrices all tokens go forward."""
    model = make_tiny(family)
    flags = ("--gprune=false", "--corpora.num_samples=2", "--evaluation.seq_len=64", "--evaluation.controls=[]")
    plan = planned(model, tmp_path, *flags)
    assert plan.forward_backward_tokens == 0
    token = counted(lambda: model(input_ids=IDS, use_cache=False)) / IDS.numel()
    assert flops(plan) == pytest.approx(plan.forward_tokens * token, rel=1e-9)


def test_learning_costs_at_most_three_passes(tiny_model, tmp_path):
    less, more = (planned(tiny_model, tmp_path, f"--sparsity.epochs={epochs}") for epochs in (1, 3))
    tiny_model.requires_grad_(True).set_attn_implementation("eager")  # the fused one's backward pass is not counted
    step = counted(lambda: next_token_losses(tiny_model, IDS).mean().backward()) / IDS.numel()
    expected = (more.forward_backward_tokens - less.forward_backward_tokens) * step
    expected += (more.forward_tokens - less.forward_tokens) * counted(lambda: tiny_model(input_ids=IDS)) / IDS.numel()
    assert expected <= flops(more) - flops(less) <= 1.05 * expected  # the last token of a window needs no head


def test_speed_is_measured():
    assert 1e6 < matmul_flops(torch.device("cpu"), torch.float32, (64, 64), seconds=0.02) < 1e14


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text", "mixtral"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_time_is_that_of_two_blocks_scaled_to_the_model(family, precision, tmp_path, monkeypatch):
    """Each call takes a second for a block and one for the head: by the numbers of calls time is known exactly."""
    plan = planned(make_tiny(family), tmp_path, f"--trainer.precision={precision}", "--recovery=distill")
    blocks = plan.skeleton.config.num_hidden_layers
    calls = []

    def seconds(call, device, **_):
        call()  # it works for the family
        calls.append(call)
        # In `per_token` the whole is measured first, then all blocks of it.
        return 1.0 + pace.TIMED_BLOCKS if len(calls) % 2 else float(pace.TIMED_BLOCKS)

    monkeypatch.setattr(pace, "_seconds", seconds)
    monkeypatch.setattr(pace, "_PACES", {})
    dense, pruned = pace._paces(plan)
    c, tokens = plan.cfg, plan.cfg.corpora.batch_size * plan.cfg.evaluation.seq_len
    for one, trained in ((dense, c.corpora.batch_size * 64), (pruned, c.distill.batch_size * 64)):
        assert one == pytest.approx(
            (blocks / tokens, (blocks + 1) / tokens, (blocks + 1) / tokens, blocks / tokens, (blocks + 1) / trained)
        )


def test_time_grows_with_the_text_that_is_learned_from(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr(pace, "_PACES", {})
    flags = ("--recovery=distill", "--trainer.precision=32-true")
    less, more = (planned(tiny_model, tmp_path, *flags, f"--distill.tokens={tokens}") for tokens in (12_288, 122_880))
    few, many = pace.run_seconds(less), pace.run_seconds(more)  # of one measurement
    dense, pruned = pace._paces(less)
    rows = sum(recovery == "distill" for _, recovery in less.cfg.stages)
    added = less.cfg.distilled_windows * 9 * 3 * 64
    assert many - few == pytest.approx(added * (rows * pruned.learned + dense.teacher), rel=1e-6)


def test_time_of_a_large_model_is_not_measured(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr(pace, "MOST", 1000)
    plan = planned(tiny_model, tmp_path)
    assert pace.run_seconds(plan) is None
    assert "the speed of matrix products of float32 on cpu" in compute_time(plan)
