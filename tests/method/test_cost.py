"""FLOPs in a dry run."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from experiments.bench.measure import flops as count_flops
from gprune.calibration.moments import _panels, panel_flops
from gprune.config.parse import parse
from gprune.method.dry_run import estimated_flops
from gprune.method.plan import make_plan
from gprune.models.blocks import blocks_of
from gprune.models.experts import EXPERTS_PER_TOKEN, active_experts
from gprune.models.losses import next_token_losses
from tests.tiny_families import make_tiny

IDS = torch.randint(3, 128, (2, 64), generator=torch.Generator().manual_seed(0))


def planned(model, folder, *flags):
    """Save a model, and return the plan of a run with windows of 64 tokens and without recovery."""
    model.save_pretrained(folder)
    return make_plan(parse([f"--model.name={folder}", "--recovery=none", "--corpora.seq_len=64", *flags]))


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
    assert exact <= panel_flops(channels) <= 4 / 3 * exact


@pytest.mark.parametrize("name", EXPERTS_PER_TOKEN)
def test_active_experts_are_read_by_any_name_and_default_to_all(name):
    """A list has one number for each layer, of which the largest one counts. There are at most all four experts."""
    block_with_experts, dense_block = SimpleNamespace(experts=4), SimpleNamespace(experts=1)
    for value, active in ((2, 2), ([1, 3], 3), (8, 4), (None, 4)):
        assert active_experts(SimpleNamespace(**{name: value}), block_with_experts) == active
        assert active_experts(SimpleNamespace(**{name: value}), dense_block) == 1
    assert active_experts(SimpleNamespace(), block_with_experts) == 4


def test_longer_evaluation_windows_cost_more_attention(tiny_model, tmp_path):
    """Half as many windows of twice the length have as many tokens, each with attention to 64 more tokens."""
    flags = ("--gprune=false", "--evaluation.controls=[]")
    short, long = (
        planned(tiny_model, tmp_path, *flags, f"--evaluation.seq_len={length}", f"--evaluation.num_samples={windows}")
        for length, windows in ((64, 8), (128, 4))
    )
    evaluated = 2 * 8 * 64 * 3  # tokens: two rows, windows, tokens of a window, corpora
    channels = sum(block.channels for block in blocks_of(short.skeleton))
    # 4: two matrix products, and a multiply-add counts as 2. `>=`: logits are compared on longer windows, too.
    assert estimated_flops(long) - estimated_flops(short) >= evaluated * 4 * 64 * channels
