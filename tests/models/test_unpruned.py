"""FFNs and experts that cannot be pruned are named with their size, also in runs and the dry run."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest
import torch
from torch import nn
from transformers import CONFIG_MAPPING, PreTrainedModel

from experiments.architectures import default_config, example
from gprune import discovery
from gprune.discovery import search
from gprune.discovery.tiny import shrunk
from gprune.errors import UserError
from gprune.models.blocks import blocks_of, decoder_layers, find_unpruned
from tests import tiny_run
from tests.tiny_families import tiny_of

IDS = torch.randint(3, 100, (2, 24), generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("GPRUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(discovery, "_known", {})


def doge_with_experts() -> PreTrainedModel:
    """A tiny Doge, whose experts are rows of two embedding tables next to an FFN."""
    return tiny_of(shrunk(CONFIG_MAPPING["doge"](is_moe=True)))


def number_of_parameters(layers: nn.ModuleList, *paths: str) -> int:
    return sum(p.numel() for layer in layers for path in paths for p in layer.get_submodule(path).parameters())


@pytest.mark.parametrize(
    ("model", "output", "modules"),
    [
        (lambda: example("gemma4_text"), "per_layer_projection", ["per_layer_projection", "per_layer_input_gate"]),
        # Experts that return their input have rows in the stacked up projections, but none in the down projections.
        (lambda: example("longcat_flash"), "mlp.experts", ["mlp.experts"]),
        (doge_with_experts, "mlp.up_embed", ["mlp.up_embed"]),
        (doge_with_experts, "mlp.down_embed", ["mlp.down_embed"]),
        # A stack of one expert.
        (lambda: example("inkling_text"), "mlp.shared_experts", ["mlp.shared_experts"]),
    ],
    ids=["gemma4_per_layer_input", "longcat_flash", "doge_up", "doge_down", "inkling"],
)
def test_an_ffn_that_is_refused_is_named_with_all_of_its_parameters(model, output, modules):
    model = model()
    layers, unpruned = decoder_layers(model), find_unpruned(model)
    with_modules = [layer for layer in layers if all(path in dict(layer.named_modules()) for path in modules)]
    assert unpruned[output].layers == len(with_modules) > 0
    assert unpruned[output].parameters == number_of_parameters(with_modules, *modules)
    pruned = {slice_.path for block in blocks_of(model) for slice_ in block.slices if slice_.kind == "ffn"}
    assert pruned
    assert not any(path.startswith(f"{output}.") for path in pruned)


def test_gemma_3n_is_refused_instead_of_pruning_a_residual_layer_of_low_rank():
    """Its activation sparsity depends on the mean over neurons, so that slicing and masking its FFN disagree."""
    with pytest.raises(UserError, match=r"mlp\.down_proj cannot be pruned \(slicing and masking disagree\)") as caught:
        search.discover(default_config("gemma3n_text"))
    assert "laurel.linear_right cannot be pruned (its output does not join the residual)" in str(caught.value)


def test_the_ffn_of_gemma_3n_is_pruned_without_activation_sparsity():
    config = CONFIG_MAPPING["gemma3n_text"](activation_sparsity_pattern=[0.0] * 35)
    model = tiny_of(shrunk(config))
    assert {block.family.down for block in blocks_of(model)} == {"mlp.down_proj"}
    assert find_unpruned(model).keys() == {"laurel.linear_right", "per_layer_projection"}


def test_nothing_is_named_if_every_ffn_is_pruned():
    assert find_unpruned(example("gemma")) == {}


def test_refused_ffns_are_cached_with_the_record():
    config = default_config("longcat_flash")
    record = search.discover(config)
    assert [kind["experts"] for kind in record.refused] == ["mlp.experts"]
    assert json.dumps(asdict(search.discover(config))) == json.dumps(asdict(record))


def test_dry_run_and_log_name_experts_that_stay(tmp_path, capsys):
    corpora = tiny_run.make_world(tmp_path).corpora
    model = example("longcat_flash")
    model.save_pretrained(tmp_path / "model")
    tiny_run.tiny_tokenizer().save_pretrained(tmp_path / "model")
    world = tiny_run.World(tmp_path / "model", corpora)
    share = number_of_parameters(decoder_layers(model), "mlp.experts") / model.num_parameters()
    named = f"mlp.experts in 3 layers (slicing and masking disagree): {share:.1%} of the model"
    with tiny_run.isolated(tmp_path / "cache"):
        assert tiny_run.main(world.args(tmp_path / "runs", "--dry_run=true")) == 0
        (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("stays ")]
        assert named in line
        world.run(tmp_path / "runs", "--gprune=false", "--evaluation.controls=[]", "--export=none")
    assert f"Not pruned: {named}" in capsys.readouterr().out
