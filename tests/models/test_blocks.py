"""Fingerprints of models."""

from __future__ import annotations

import json

import torch

from gprune.models.loading import fingerprint, load_model
from tests.tiny_run import save_tiny_model


def test_a_fingerprint_depends_on_weights_and_config_but_not_on_the_path(tmp_path):
    here, there = (load_model(str(save_tiny_model(tmp_path / name)))[0] for name in ("a", "b"))
    assert fingerprint(here) == fingerprint(there)
    with torch.no_grad():
        there.model.norm.weight[0] += 1e-3
    assert fingerprint(here) != fingerprint(there)
    there = load_model(str(tmp_path / "b"))[0]
    there.config.rms_norm_eps *= 2
    assert fingerprint(here) != fingerprint(there)


def test_a_fingerprint_includes_the_models_custom_code(tmp_path):
    """Two models with the same weights and config, whose custom classes have different activations."""
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
    assert prints[0] == prints[2]  # both load as the stock class
    assert len(set(prints)) == 3
