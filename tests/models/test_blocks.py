"""Families, blocks and fingerprints."""

from __future__ import annotations

import json

import torch

from gprune.models.loading import fingerprint, load_model
from tests.tiny_run import save_tiny_model


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
    prints = []
    for name, code in (("one", "silu"), ("two", "relu")):
        save_tiny_model(tmp_path / name)
        config = json.loads((tmp_path / name / "config.json").read_text())
        config["auto_map"] = {"AutoModelForCausalLM": "modeling_own.Own"}
        (tmp_path / name / "config.json").write_text(json.dumps(config))
        (tmp_path / name / "modeling_own.py").write_text(
            "import torch\nfrom transformers import LlamaForCausalLM\n\n\n"
            f"class Own(LlamaForCausalLM):\n    act = torch.nn.functional.{code}\n"
        )
        prints += [fingerprint(load_model(str(tmp_path / name), trust_remote_code=trust)[0]) for trust in (False, True)]
    assert prints[0] == prints[2]  # stock code reads both alike
    assert len(set(prints)) == 3
