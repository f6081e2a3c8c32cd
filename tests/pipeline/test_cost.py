"""What the dry run says of FLOPs and time."""

from __future__ import annotations

import pytest
import torch

from experiments.bench.measure import flops as counted
from gprune.config.parse import parse
from gprune.models.losses import next_token_losses
from gprune.pipeline.dry_run import flops, speed
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
    assert 1e6 < speed(torch.device("cpu"), torch.float32, (64, 64), seconds=0.02) < 1e14
