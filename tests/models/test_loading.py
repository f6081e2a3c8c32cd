"""Checkpoints that do not fit the config: missing weights are refused, unexpected weights are reported."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from gprune.errors import UserError
from gprune.models.loading import check_weight_dtypes, fingerprint, load_model
from tests import tiny_run


def change_config(folder, **settings):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def rename_weights(folder, rename):
    """Rename the weights of a checkpoint, and drop those for which `rename` returns None."""
    file = folder / "model.safetensors"
    renamed = {rename(name): tensor for name, tensor in load_file(file).items()}
    save_file({name: tensor for name, tensor in renamed.items() if name}, file, metadata={"format": "pt"})


DAMAGES = {
    "a layer is missing": lambda f: rename_weights(f, lambda n: None if ".layers.1." in n else n),
    "one tensor is missing": lambda f: rename_weights(f, lambda n: None if n.endswith("1.mlp.up_proj.weight") else n),
    "one layer more in the config": lambda f: change_config(f, num_hidden_layers=4),
    "the head is missing": lambda f: change_config(f, tie_word_embeddings=False),
    "another prefix": lambda f: rename_weights(f, lambda n: f"transformer.{n}"),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("options", [{}, {"device_map": "cpu"}])
def test_missing_weights_are_refused_instead_of_initialized_at_random(damage, options, tmp_path):
    folder = tiny_run.save_tiny_model(tmp_path / "model")
    DAMAGES[damage](folder)
    with pytest.raises(UserError, match=r"^--model\.name: Cannot load '.*': it has no weights for \w.*\.$"):
        load_model(str(folder), **options)


def test_models_with_tied_and_untied_heads_load_without_missing_weights(tmp_path):
    for tied in (True, False):
        folder = tiny_run.save_tiny_model(tmp_path / str(tied), tie_word_embeddings=tied)
        model, _ = load_model(str(folder))
        embeddings = model.get_input_embeddings().weight, model.get_output_embeddings().weight
        assert (embeddings[0] is embeddings[1]) == tied


def test_unexpected_weights_are_reported_in_a_warning(tmp_path, caplog):
    folder = tiny_run.save_tiny_model(tmp_path / "model")
    change_config(folder, num_hidden_layers=2)
    model, _ = load_model(str(folder))
    assert len(model.model.layers) == 2
    (message,) = [r.getMessage() for r in caplog.records if r.name == "gprune"]
    assert "has 9 weights that do not belong to the model" in message
    assert "such as model.layers.2.input_layernorm.weight." in message


@pytest.mark.parametrize("quantization", ["float8", "quantizer"])
def test_weights_that_remain_quantized_after_loading_are_refused(quantization, tiny_model):
    """Pruning would not slice their scales. Checkpoints that transformers dequantizes while loading are accepted."""
    check_weight_dtypes(tiny_model, "here")
    if quantization == "float8":
        linear = tiny_model.model.layers[1].mlp.up_proj
        linear.weight = torch.nn.Parameter(linear.weight.to(torch.float8_e4m3fn), requires_grad=False)
    else:
        tiny_model.hf_quantizer = object()
    with pytest.raises(UserError, match=r"weights in float32, bfloat16 or float16; got 'here', which is quantised"):
        check_weight_dtypes(tiny_model, "here")


def test_weights_in_float64_are_refused_as_float64_and_not_as_quantized(tiny_model):
    with pytest.raises(UserError, match=r"got 'here', which has weights in float64\. Convert them to float32\."):
        check_weight_dtypes(tiny_model.double(), "here")


# --- fingerprints


def test_a_fingerprint_depends_on_weights_and_config_but_not_on_the_path(tmp_path):
    model, copy = (load_model(str(tiny_run.save_tiny_model(tmp_path / name)))[0] for name in ("a", "b"))
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
        tiny_run.save_tiny_model(tmp_path / name)
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
