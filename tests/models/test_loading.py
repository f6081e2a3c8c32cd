"""Weights that do not fit the configuration: what is missing is refused, what is left over is named."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from gprune.errors import UserError
from gprune.models.loading import check_weight_dtypes, load_model
from tests import tiny_run


def configured(folder, **settings):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def renamed(folder, rename):
    """Weights under other names; those that get none are left out."""
    file = folder / "model.safetensors"
    named = {rename(name): tensor for name, tensor in load_file(file).items()}
    save_file({name: tensor for name, tensor in named.items() if name}, file, metadata={"format": "pt"})


DAMAGES = {
    "a layer's tensors are gone": lambda f: renamed(f, lambda n: None if ".layers.1." in n else n),
    "one tensor is gone": lambda f: renamed(f, lambda n: None if n.endswith("1.mlp.up_proj.weight") else n),
    "one layer more": lambda f: configured(f, num_hidden_layers=4),
    "a head that is not stored": lambda f: configured(f, tie_word_embeddings=False),
    "another prefix": lambda f: renamed(f, lambda n: f"transformer.{n}"),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("where", [{}, {"device_map": "cpu"}])
def test_missing_weights_are_refused_and_never_drawn_at_random(damage, where, tmp_path):
    folder = tiny_run.save_tiny_model(tmp_path / "model")
    DAMAGES[damage](folder)
    with pytest.raises(UserError, match=r"^--model\.name: Cannot load '.*': it has no weights for \w.*\.$"):
        load_model(str(folder), **where)


def test_tied_heads_and_heads_of_their_own_are_whole(tmp_path):
    for tied in (True, False):
        folder = tiny_run.save_tiny_model(tmp_path / str(tied), tie_word_embeddings=tied)
        model, _ = load_model(str(folder))
        ends = model.get_input_embeddings().weight, model.get_output_embeddings().weight
        assert (ends[0] is ends[1]) == tied


def test_weights_without_a_place_are_named(tmp_path, caplog):
    folder = tiny_run.save_tiny_model(tmp_path / "model")
    configured(folder, num_hidden_layers=2)
    model, _ = load_model(str(folder))
    assert len(model.model.layers) == 2
    (said,) = [r.getMessage() for r in caplog.records if r.name == "gprune"]
    assert "has 9 weights that do not belong to the model" in said
    assert "such as model.layers.2.input_layernorm.weight." in said


@pytest.mark.parametrize("how", ["float8", "quantizer"])
def test_weights_that_stay_quantised_are_refused(how, tiny_model):
    """Their scales would stay where rows go. A checkpoint that transformers de-quantises as it loads is welcome."""
    check_weight_dtypes(tiny_model, "here")
    if how == "float8":
        linear = tiny_model.model.layers[1].mlp.up_proj
        linear.weight = torch.nn.Parameter(linear.weight.to(torch.float8_e4m3fn), requires_grad=False)
    else:
        tiny_model.hf_quantizer = object()
    with pytest.raises(UserError, match=r"weights in float32, bfloat16 or float16; got 'here', which is quantised"):
        check_weight_dtypes(tiny_model, "here")


def test_weights_in_float64_are_refused_as_float64_and_not_as_quantized(tiny_model):
    with pytest.raises(UserError, match=r"got 'here', which has weights in float64\. Convert them to float32\."):
        check_weight_dtypes(tiny_model.double(), "here")
