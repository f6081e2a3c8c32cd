"""bfloat16 copies of frozen weights give the same bits as autocast, and the original weights are restored."""

from __future__ import annotations

import pytest
import torch

from gprune.models.losses import next_token_losses
from gprune.models.masks import gated
from gprune.models.products import CastWeights


def step(model, ids, copies=None):
    """Losses of a pass under autocast, with bfloat16 copies if given, and the gradient of the last block's gates."""
    gate = torch.ones(model.config.intermediate_size, requires_grad=True)
    gates = [torch.ones_like(gate)] * (model.config.num_hidden_layers - 1) + [gate]
    with torch.autocast("cpu", torch.bfloat16), gated(model, gates):
        if copies is None:
            losses = next_token_losses(model, ids)
        else:
            with copies.applied():
                losses = next_token_losses(model, ids)
    losses.mean().backward()  # outside of the context, with the tensors saved by the forward pass
    return losses.detach(), gate.grad


def test_bfloat16_copies_give_the_bits_of_autocast_and_are_made_once(tiny_model):
    ids = torch.arange(24).view(2, 12)
    copies = CastWeights(tiny_model)
    by_autocast, first = step(tiny_model, ids), step(tiny_model, ids, copies)
    first_copies = {key: copy for key, (_, _, copy) in copies._copies.items()}
    second = step(tiny_model, ids, copies)
    for result in (first, second):
        assert all(torch.equal(a, b) for a, b in zip(by_autocast, result, strict=True))
    assert all(copies._copies[key][2] is copy for key, copy in first_copies.items())
    assert first_copies
    assert {p.dtype for p in tiny_model.parameters()} == {torch.float32}


def test_a_modified_weight_is_cast_again(tiny_model):
    ids = torch.arange(24).view(2, 12)
    copies = CastWeights(tiny_model)
    before, _ = step(tiny_model, ids, copies)
    tiny_model.get_output_embeddings().weight.mul_(2)
    after, _ = step(tiny_model, ids, copies)
    assert torch.equal(after, step(tiny_model, ids)[0])
    assert not torch.equal(after, before)


def test_trainable_weights_and_float32_passes_use_no_copies(tiny_model):
    copies = CastWeights(tiny_model)
    weight = tiny_model.get_output_embeddings().weight
    with copies.applied():
        assert tiny_model.get_output_embeddings().weight is weight
    weight.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16), copies.applied():
        assert tiny_model.get_output_embeddings().weight is weight
        assert tiny_model.get_decoder().layers[0].mlp.down_proj.weight.dtype == torch.bfloat16


def test_an_exception_restores_the_float32_weights(tiny_model):
    with pytest.raises(KeyError), torch.autocast("cpu", torch.bfloat16), CastWeights(tiny_model).applied():
        raise KeyError
    assert tiny_model.get_decoder().layers[0].mlp.down_proj.weight.dtype == torch.float32
