"""Masks, and masking a model by hooks."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import pytest
import torch

from gprune.models.masks import Masks, gated, masked
from tests.world import by_key, hooks_of, masks_without


def some_masks(seed: int = 0, depth: int = 3) -> Masks:
    """Masks that keep about 60 % of 48 neurons, and one of two KV groups in every second block."""
    generator = torch.Generator().manual_seed(seed)
    return Masks.of_blocks(
        [torch.rand(48, generator=generator) < 0.6 for _ in range(depth)],
        [torch.tensor([True, b % 2 == 0]) for b in range(depth)],
    )


def test_masks_round_trip_through_tensors():
    masks = some_masks(depth=12)  # "10" sorts before "2"
    assert len(masks) == 2 * 12
    assert Masks.from_tensors({name: masks[name] for name in sorted(masks)}) == masks
    former = {"neurons": "ffn", "kv_groups": "attention"}  # names in files of earlier versions
    stored = {f"{former[key.split('.')[0]]}.{key.split('.')[1]}": mask.to(torch.uint8) for key, mask in masks.items()}
    assert Masks.from_tensors(stored) == masks


def test_a_block_is_removed_if_its_masks_keep_no_unit():
    some, none = torch.tensor([False, True]), torch.zeros(2, dtype=torch.bool)
    assert Masks.of_blocks([some, none, some, none], [some, some, none, none]).blocks == [True, True, True, False]


def test_masks_are_equal_if_all_bits_are_and_cannot_be_hashed():
    masks, other, shorter = some_masks(), some_masks(), some_masks()
    assert masks == other
    other.attention[1][0] = False
    shorter.pop("kv_groups.1")
    assert all(masks != different for different in (other, shorter, some_masks(depth=2), "masks"))
    with pytest.raises(TypeError):
        hash(masks)


def zeroed(model, masks: Masks):
    """A copy in which removed units have zero columns in the down and output projections."""
    model = copy.deepcopy(model)
    for layer, neurons, groups in zip(model.model.layers, masks.ffn, masks.attention, strict=True):
        layer.mlp.down_proj.weight.data[:, ~neurons] = 0
        channels = layer.self_attn.o_proj.in_features // len(groups)
        for g in (~groups).nonzero()[:, 0].tolist():
            layer.self_attn.o_proj.weight.data[:, g * channels : (g + 1) * channels] = 0
    return model


@pytest.mark.parametrize("failing", [False, True])
def test_leaving_masked_restores_the_model_bit_for_bit(tiny_model, token_batch, failing):
    before = {name: tensor.clone() for name, tensor in tiny_model.state_dict().items()}
    dense = tiny_model(token_batch).logits
    with (
        pytest.raises(IndexError) if failing else nullcontext(),
        masked(tiny_model, masks_without(tiny_model, 1, narrow=True)),
    ):
        assert hooks_of(tiny_model) == 7  # two projections in each of three blocks, and the removed block
        tiny_model(torch.full((1, 4), 999) if failing else token_batch)
    assert hooks_of(tiny_model) == 0
    assert torch.equal(tiny_model(token_batch).logits, dense)
    assert all(torch.equal(before[name], tensor) for name, tensor in tiny_model.state_dict().items())


def test_gates_are_read_in_each_forward_pass_and_get_gradients(tiny_model, token_batch):
    gates = by_key([torch.ones(48)] * 3, [torch.ones(2)] * 3)
    dense, masks = tiny_model(token_batch).logits, some_masks()
    with gated(tiny_model, gates):
        assert torch.equal(tiny_model(token_batch).logits, dense)  # gates of ones have no effect
        gates |= {key: mask.float().requires_grad_() for key, mask in masks.items()}
        logits = tiny_model(token_batch).logits
        logits.square().mean().backward()
    torch.testing.assert_close(logits, zeroed(tiny_model, masks)(token_batch).logits, atol=1e-5, rtol=0)
    assert all(bool((g.grad != 0).all()) for g in gates.values())  # also for removed units
    assert all(p.grad is None for p in tiny_model.parameters())
