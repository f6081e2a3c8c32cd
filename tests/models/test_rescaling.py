"""RWKV divides weights of layers from the seventh on in place in evaluation. Pruned and saved weights are not."""

from __future__ import annotations

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

import gprune
from gprune.discovery import family_of
from gprune.discovery.tiny import shrunk, tiny_model
from gprune.export.hf import save_pruned
from gprune.models.loading import load_weights
from gprune.models.masks import masked
from tests.world import masks_without


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Check that logits are equal, except for rounding and for the epsilon of norms."""
    assert (actual - expected).abs().max() < 1e-4 * expected.abs().max()


def test_a_model_that_has_run_is_pruned_and_saved_with_the_weights_of_its_folder(tmp_path, token_batch):
    settings = shrunk(CONFIG_MAPPING["rwkv"]()).to_dict() | {"num_hidden_layers": 8}
    tiny_model(CONFIG_MAPPING["rwkv"](**settings)).save_pretrained(tmp_path / "dense")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense").eval().requires_grad_(False)
    family_of(model)
    before = model.rwkv.blocks[7].feed_forward.value.weight.clone()
    dense = model(token_batch).logits
    assert torch.equal(2 * model.rwkv.blocks[7].feed_forward.value.weight, before)
    # Saved with the weights of the folder, and loaded with the same logits.
    save_pruned(model, None, tmp_path / "saved")
    saved, original = (load_weights(tmp_path / name) for name in ("saved", "dense"))
    assert all(torch.equal(saved.state_dict()[name], weight) for name, weight in original.state_dict().items())
    family_of(original)
    assert_close(original(token_batch).logits, dense)
    # Masked, sliced and reloaded models agree.
    masks = masks_without(model, narrow=True)
    masks.ffn[7][:7] = True  # layers of unequal widths
    with masked(model, masks):
        expected = model(token_batch).logits
    small = gprune.apply_masks(model, masks)
    assert_close(small(token_batch).logits, expected)
    folder = save_pruned(small, None, tmp_path / "small")
    reloaded = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    assert torch.equal(reloaded(token_batch).logits, small(token_batch).logits)
    assert_close(model(token_batch).logits, dense)  # the model of the user computes the same as before
