"""RWKV divides weights of layers from the seventh on in place in evaluation. Pruned and saved weights are not."""

from __future__ import annotations

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

import gprune
from gprune.discovery import family_of
from gprune.discovery.tiny import shrunk, tiny_model
from gprune.export.hf import save_pruned
from gprune.models.loading import load_weights
from gprune.models.masks import masked
from tests.models.test_surgery import masks_without


@pytest.fixture
def folder(tmp_path):
    settings = shrunk(CONFIG_MAPPING["rwkv"]()).to_dict() | {"num_hidden_layers": 8}
    tiny_model(CONFIG_MAPPING["rwkv"](**settings)).save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


@pytest.fixture
def rescaled(folder, token_batch):
    """A model of the user after a forward pass: weights of its last two layers are half of the folder's."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval().requires_grad_(False)
    family_of(model)
    before = model.rwkv.blocks[7].feed_forward.value.weight.clone()
    model(token_batch)
    assert torch.equal(2 * model.rwkv.blocks[7].feed_forward.value.weight, before)
    return model


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Check that logits are equal, except for rounding and for the epsilon of norms."""
    assert (actual - expected).abs().max() < 1e-4 * expected.abs().max()


def test_masked_sliced_and_reloaded_models_agree(rescaled, tmp_path, token_batch):
    masks = masks_without(rescaled, narrow=True)
    masks.ffn[7][:7] = True  # layers of unequal widths
    dense_logits = rescaled(token_batch).logits
    with masked(rescaled, masks):
        expected = rescaled(token_batch).logits
    small = gprune.apply_masks(rescaled, masks)
    assert_close(small(token_batch).logits, expected)
    folder = save_pruned(small, None, tmp_path / "small")
    reloaded = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    assert torch.equal(reloaded(token_batch).logits, small(token_batch).logits)
    assert_close(rescaled(token_batch).logits, dense_logits)  # the model of the user computes the same as before


def test_a_dense_model_that_has_run_is_saved_with_the_weights_of_its_folder(folder, rescaled, tmp_path):
    save_pruned(rescaled, None, tmp_path / "saved")
    saved, original = (load_weights(path).state_dict() for path in (tmp_path / "saved", folder))
    assert all(torch.equal(saved[name], weight) for name, weight in original.items())


def test_a_loaded_model_computes_the_same_logits(folder, rescaled, token_batch):
    model = load_weights(folder)
    family_of(model)
    assert_close(model(token_batch).logits, rescaled(token_batch).logits)
