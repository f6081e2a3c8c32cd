"""Families, blocks and fingerprints."""

from __future__ import annotations

import pytest
import torch

from gprune.errors import UserError
from gprune.models.blocks import blocks_of
from gprune.models.families import family_of
from gprune.models.loading import fingerprint, load_model
from tests.conftest import make_tiny_llama
from tests.tiny_run import save_tiny_model


def test_blocks_say_what_a_unit_costs(tiny_model):
    for block in blocks_of(tiny_model):
        ffn = sum(m.weight.numel() for m in (block.gate, block.up, block.down))
        attention = sum(m.weight.numel() for m in (block.query, block.key, block.value, block.output))
        assert block.neurons * block.neuron_cost == ffn
        assert block.kv_groups * block.group_cost == attention
        assert block.kv_groups * block.channels_per_group == block.output.in_features


def test_biases_count():
    model = make_tiny_llama(attention_bias=True, mlp_bias=True)
    (block, *_) = blocks_of(model)
    # down and o keep their biases whole: they belong to no unit
    assert block.neuron_cost == 2 * (32 + 1) + 32
    assert block.group_cost == 8 * 2 * (32 + 1) + 16 * (32 + 1 + 32)


def test_a_fingerprint_is_the_content_not_the_place(tmp_path):
    here, there = (load_model(str(save_tiny_model(tmp_path / name)))[0] for name in ("a", "b"))
    assert fingerprint(here) == fingerprint(there)
    with torch.no_grad():
        there.model.norm.weight[0] += 1e-3
    assert fingerprint(here) != fingerprint(there)
    there = load_model(str(tmp_path / "b"))[0]
    there.config.rms_norm_eps *= 2
    assert fingerprint(here) != fingerprint(there)


def test_an_unknown_family_is_named_with_what_it_needs():
    with pytest.raises(UserError, match=r"'bert' is not supported\. Available: llama.*Family record"):
        family_of("bert")
