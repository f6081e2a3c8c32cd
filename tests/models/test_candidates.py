"""Discovery rejects modules that look like FFNs or experts but cannot be sliced or masked."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import CONFIG_MAPPING, PreTrainedModel

from gprune.discovery.search import agree, discover_record
from gprune.discovery.tiny import shrunk, tiny_model
from gprune.errors import UserError
from gprune.models import experts
from gprune.models.blocks import Block, blocks_of
from gprune.models.families import attach_record


def tiny(model_type: str = "gemma") -> PreTrainedModel:
    return tiny_model(shrunk(CONFIG_MAPPING[model_type]()))


def with_mlp(forward) -> PreTrainedModel:
    """A tiny Gemma whose FFNs have another forward."""
    model = tiny()
    base = type(model.model.layers[0].mlp)
    changed = type(base.__name__, (base,), {"forward": forward})
    for layer in model.model.layers:
        layer.mlp.__class__ = changed
    return model


def tiny_and_divided_by_width(mlp: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """An output that depends on the width, but is so small that logits of any two masks are within 1e-3."""
    hidden = mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x)
    return 2e-3 * mlp.down_proj(hidden) / hidden.shape[-1]


def two_gates(mlp: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return mlp.down_proj(mlp.act_fn(mlp.gate_proj(x)) * mlp.act_fn(mlp.up_proj(x)))


def without_calling_down(mlp: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return (mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x)) @ mlp.down_proj.weight.T


@pytest.mark.parametrize("forward", [tiny_and_divided_by_width, two_gates, without_calling_down])
def test_an_ffn_that_cannot_be_sliced_or_masked_is_rejected(forward):
    with pytest.raises(UserError, match=r"no FFN .* 3 layers in 'layers'"):
        discover_record(with_mlp(forward))


def test_agreement_is_relative_to_the_change_by_the_mask():
    dense = torch.tensor([1.0, 0.0])
    for effect, error, expected in ((0.5, 1e-4, True), (1e-3, 1e-4, False), (0.0, 0.0, False)):
        masked_logits = dense + torch.tensor([0.0, effect])
        assert agree(masked_logits, masked_logits + torch.tensor([0.0, error]), dense=dense) == expected


def without_calls(_block: Block, watcher: experts.Watcher) -> experts.Watch:
    """Watch a module that is not part of the model, so that the watcher is never called."""
    return experts.Watch(nn.Module(), watcher)


def with_reversed_tokens(watch):
    """Make a `watch_experts` that reports activations for other tokens than the expert computes."""

    def watch_reversed(block: Block, watcher: experts.Watcher) -> experts.Watch:
        return watch(block, lambda x, expert, tokens: watcher(x, expert, tokens.flip(0)))

    return watch_reversed


@pytest.mark.parametrize("broken", [without_calls, with_reversed_tokens(experts.watch_experts)])
def test_experts_whose_activations_are_not_observed_correctly_are_not_pruned(broken, monkeypatch):
    """For example, a class that computes its products in a custom kernel."""
    model = tiny("deepseek_v3")
    record = discover_record(model)
    assert any("experts" in kind for kind in record.kinds[0])
    for module in ("gprune.models.masks", "gprune.discovery.search"):
        monkeypatch.setattr(f"{module}.watch_experts", broken)
    record = discover_record(model)
    assert record.kinds[0]
    assert not any("experts" in kind for kind in record.kinds[0])
    attach_record(model, record)
    assert not any(block.has_experts for block in blocks_of(model))
