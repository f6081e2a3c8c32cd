"""Hybrid models keep a layer with attention if whole layers are removed, because generation with a cache needs one."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from transformers import PreTrainedModel

from experiments.architectures import default_config, example
from gprune.errors import UserError
from gprune.models.blocks import blocks_of
from gprune.models.masks import Masks
from gprune.models.surgery import attention_by_layer, slice_model
from gprune.sparsity.budget import Budget, block_units
from gprune.sparsity.whole_blocks import check_attention_remains
from tests import tiny_run

PROMPT = torch.arange(3, 12)[None]
GREEDY = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("GPRUNE_CACHE", str(tmp_path / "cache"))


def masks_without(model: PreTrainedModel, removed: int) -> Masks:
    """Masks that remove a layer and keep all units of the others."""
    blocks = blocks_of(model)
    return Masks(
        [torch.full((b.experts * b.neurons,), b.layer_index != removed) for b in blocks],
        [torch.full((b.kv_groups,), b.layer_index != removed) for b in blocks],
    )


@pytest.mark.parametrize("model_type", ["qwen3_next", "nemotron_h"])
def test_masks_that_remove_the_last_attention_layer_are_refused(model_type):
    model = example(model_type)
    (last,) = {block.layer_index for block in blocks_of(model) if block.kv_groups}
    with pytest.raises(UserError, match=rf"must keep a layer with attention, .* remove all of them: {last}\."):
        slice_model(model, masks_without(model, last))
    with_ffn = [block.layer_index for block in blocks_of(model) if block.neurons and block.layer_index != last]
    small = slice_model(model, masks_without(model, with_ffn[0]))  # a layer without attention
    assert small.generate(PROMPT, **GREEDY).shape == (1, 13)


REFUSED = pytest.raises(UserError, match="must name a layer with attention")


@pytest.mark.parametrize(
    ("attention_layers", "target", "protect", "outcome"),
    [
        ([2], 0.02, [], nullcontext()), ([2], 0.5, [], REFUSED), ([2], 0.5, [2], nullcontext()),
        ([1, 2], 0.5, [], nullcontext()), ([1, 2], 0.7, [], REFUSED),
    ],
)  # fmt: skip
def test_a_budget_for_whole_layers_that_fits_all_attention_layers_is_refused(
    attention_layers, target, protect, outcome
):
    model = example("qwen3_next")
    kinds = ["full_attention" if layer in attention_layers else "linear_attention" for layer in range(3)]
    model.config.layer_types = kinds
    budget = Budget.of(block_units(blocks_of(model), scope="ffn", protect=protect), target, block_share=1.0)
    with outcome:
        check_attention_remains(SimpleNamespace(skeleton=model, budget=budget))


def test_a_type_without_a_cache_in_transformers_has_no_layers_that_must_be_kept():
    assert attention_by_layer(default_config("blt")) == []


def test_a_run_that_may_remove_the_last_attention_layer_is_refused_in_one_line(tmp_path, capsys):
    corpora = tiny_run.make_world(tmp_path).corpora
    example("qwen3_next").save_pretrained(tmp_path / "model")
    tiny_run.tiny_tokenizer().save_pretrained(tmp_path / "model")
    world = tiny_run.World(tmp_path / "model", corpora)
    flags = ["--sparsity.scope=ffn+blocks", "--sparsity.block_share=1", "--gprune=false", "--sparsity.target=0.4"]
    flags += ["--dry_run=true"]
    with tiny_run.isolated(tmp_path / "cache"):
        assert tiny_run.main(world.args(tmp_path / "runs", *flags)) == 2
        (line,) = [line for line in capsys.readouterr().err.splitlines() if "--sparsity.protect" in line]
        assert "must name a layer with attention of model type 'qwen3_next'" in line
        assert "--sparsity.protect [2]." in line
        assert tiny_run.main(world.args(tmp_path / "runs", *flags, "--sparsity.protect=[2]")) == 0
    assert not (tmp_path / "runs").exists()
