"""Families, blocks and fingerprints."""

from __future__ import annotations

import json

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


def test_the_code_that_a_model_brings_is_in_its_fingerprint(tmp_path):
    """The same weights and configuration, and another activation in the class that comes with them."""
    found = []
    for name, code in (("one", "silu"), ("two", "relu")):
        save_tiny_model(tmp_path / name)
        config = json.loads((tmp_path / name / "config.json").read_text())
        config["auto_map"] = {"AutoModelForCausalLM": "modeling_own.Own"}
        (tmp_path / name / "config.json").write_text(json.dumps(config))
        (tmp_path / name / "modeling_own.py").write_text(
            "import torch\nfrom transformers import LlamaForCausalLM\n\n\n"
            f"class Own(LlamaForCausalLM):\n    act = torch.nn.functional.{code}\n"
        )
        found += [fingerprint(load_model(str(tmp_path / name), trust_remote_code=trust)[0]) for trust in (False, True)]
    assert found[0] == found[2]  # stock code reads both alike
    assert len(set(found)) == 3


def test_an_unknown_family_is_named_with_what_it_needs():
    with pytest.raises(UserError, match=r"'bert' is not supported\. Available: llama.*Family record"):
        family_of("bert")
