"""Fingerprints of models."""

from __future__ import annotations

import json

import torch

from gprune.models.loading import fingerprint, load_model
from tests.tiny_run import save_tiny_model


def test_a_fingerprint_depends_on_weights_and_config_but_not_on_the_path(tmp_path):
    model, copy = (load_model(str(save_tiny_model(tmp_path / name)))[0] for name in ("a", "b"))
    assert fingerprint(copy) == fingerprint(model)
    with torch.no_grad():
        copy.model.norm.weight[0] += 1e-3
    assert fingerprint(copy) != fingerprint(model)
    other_config, _ = load_model(str(tmp_path / "b"))
    other_config.config.rms_norm_eps *= 2
    assert fingerprint(other_config) != fingerprint(model)


def test_a_fingerprint_includes_the_models_custom_code(tmp_path):
    """Two models with the same weights and config, whose custom classes have different activations."""
    fingerprints = []
    for name, activation in (("one", "silu"), ("two", "relu")):
        save_tiny_model(tmp_path / name)
        config = json.loads((tmp_path / name / "config.json").read_text())
        config["auto_map"] = {"AutoModelForCausalLM": "modeling_own.Own"}
        (tmp_path / name / "config.json").write_text(json.dumps(config))
        (tmp_path / name / "modeling_own.py").write_text(
            "import torch\nfrom transformers import LlamaForCausalLM\n\n\n"
            f"class Own(LlamaForCausalLM):\n    act = torch.nn.functional.{activation}\n"
        )
        for trust in (False, True):
            fingerprints.append(fingerprint(load_model(str(tmp_path / name), trust_remote_code=trust)[0]))
    assert fingerprints[0] == fingerprints[2]  # without trust, both load as the stock class
    assert len(set(fingerprints)) == 3
