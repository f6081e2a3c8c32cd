"""DeciLM folders: the classes in the folder, widths by the engines' formula, and what the format cannot express."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from gprune.errors import UserError
from gprune.export import export
from gprune.export.hf import reloaded_logits, save_pruned
from gprune.export.nemotron import ffn_settings, write
from gprune.models.masks import Masks
from gprune.models.surgery import slice_model
from tests.tiny_run import tiny_tokenizer
from tests.world import make_tiny, masks_without, some_masks

IDS = torch.tensor([[3, 17, 4, 99, 23, 8]])


def written_config(model, folder):
    """Write a folder, and return its config.json."""
    write(model, tiny_tokenizer(), folder)
    return json.loads((folder / "config.json").read_text())


def difference_after_reloading(model, folder):
    """Return the largest difference of logits from those of the saved folder."""
    return float((model(IDS).logits - reloaded_logits(folder, IDS)).abs().max())


def pruned(family, **overrides):
    """Return a tiny model with FFNs of 17, 48 and 33 neurons."""
    model = make_tiny(family, **overrides)
    return slice_model(model, some_masks(model, attention=False))


@pytest.mark.parametrize("hidden_size", [576, 960, 2048, 4096])
def test_engines_compute_each_width_from_ffn_mult(hidden_size):
    """mlx-lm rounds `ffn_mult` to six decimals first; all engines round the width up to a multiple of 256."""
    for width in range(256, 16384 + 1, 256):
        multiplier = ffn_settings(width, hidden_size, by_multiplier=True)["ffn_mult"]
        for read in (multiplier, round(multiplier, 6)):
            assert published_width(read, hidden_size) == width


@pytest.mark.parametrize(
    ("family", "overrides"),
    [
        ("llama", {"tie_word_embeddings": True}),
        ("llama", {"mlp_bias": True, "rope_parameters": {"rope_type": "linear", "rope_theta": 5e4, "factor": 2.0}}),
        ("mistral", {"sliding_window": None}),
        ("qwen2", {}),  # biases of q, k and v alone
    ],
)
def test_the_folder_computes_the_same_logits_after_reloading(family, overrides, tmp_path):
    model = pruned(family, **overrides)
    config = written_config(model, tmp_path / "folder")
    assert [block["ffn"]["intermediate_size"] for block in config["block_configs"]] == [17, 48, 33]
    assert difference_after_reloading(model, tmp_path / "folder") == 0


def published_width(ffn_mult: float, hidden_size: int) -> int:
    """Return the width that engines compute: 2 / 3 of `ffn_mult` times `hidden_size`, rounded up to 256.

    As `_ffn_mult_to_intermediate_size` and `_find_multiple` of NVIDIA's modeling_decilm.py and of vLLM.
    """
    intermediate_size = int(2 * ffn_mult * hidden_size / 3)
    if intermediate_size % 256 == 0:
        return intermediate_size
    return intermediate_size + 256 - (intermediate_size % 256)


def test_widths_in_multiples_of_256_are_written_for_all_engines(tmp_path):
    model = make_tiny("llama", neurons=768)
    model = slice_model(model, some_masks(model, kept=(256, 768, 512), attention=False))
    config = written_config(model, tmp_path / "folder")
    weights = load_file(tmp_path / "folder" / "model.safetensors")
    for index, (block, width) in enumerate(zip(config["block_configs"], (256, 768, 512), strict=True)):
        assert sorted(block["ffn"]) == ["ffn_mult", "no_op", "replace_with_linear"]
        computed = published_width(block["ffn"]["ffn_mult"], config["hidden_size"])
        assert computed == width == len(weights[f"model.layers.{index}.mlp.gate_proj.weight"])
    assert config["block_configs"][0]["attention"]["n_heads_in_group"] == 2
    assert difference_after_reloading(model, tmp_path / "folder") == 0


def test_the_config_has_attributes_for_engines_and_is_written_as_plain_json(tmp_path):
    written_config(pruned("llama"), tmp_path / "folder")
    config = AutoConfig.from_pretrained(tmp_path / "folder", trust_remote_code=True)
    assert config.block_configs[0].ffn.intermediate_size == 17
    assert not hasattr(config.block_configs[0].ffn, "ffn_mult")  # vLLM would compute the width from it
    assert json.loads(config.to_json_string())["block_configs"][2]["ffn"]["intermediate_size"] == 33


def test_added_biases_and_removed_layers_are_written(tmp_path):
    biased, shallow = pruned("llama"), slice_model(make_tiny("llama"), masks_without(make_tiny("llama"), 1))
    biased.model.layers[1].mlp.down_proj.bias = torch.nn.Parameter(torch.linspace(-1, 1, 32), requires_grad=False)
    for model, layers, bias in ((biased, 3, True), (shallow, 2, False)):
        config = written_config(model, tmp_path / str(layers))
        assert (config["num_hidden_layers"], config["mlp_bias"]) == (layers, bias)
        assert difference_after_reloading(model, tmp_path / str(layers)) == 0


@pytest.mark.parametrize(
    ("family", "attention", "reason"),
    [
        ("llama", True, r"query heads\. Export to hf or gguf, which"),
        ("qwen3", False, r"is not one of llama, mistral, qwen2, smollm3\. Export to hf\.$"),
    ],
)
def test_what_the_format_cannot_express_is_refused_before_anything_is_written(family, attention, reason, tmp_path):
    model = make_tiny(family)
    model = slice_model(model, some_masks(model, attention=attention))
    with pytest.raises(UserError, match=reason):
        write(model, tiny_tokenizer(), tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


@pytest.mark.parametrize("kept", [(False, True), (True, True, False, True)])
def test_layers_that_all_lost_a_kv_group_are_written(kept, tmp_path):
    """Also if the number of heads, as 3 here or 28 of Llama-3.2-1B's 32, does not divide the hidden size."""
    model = make_tiny("llama", num_key_value_heads=len(kept))
    masks = some_masks(model, attention=False)
    model = slice_model(model, Masks.of_blocks(masks.ffn, [torch.tensor(kept)] * 3))
    assert written_config(model, tmp_path / "folder")["num_key_value_heads"] == sum(kept)
    assert difference_after_reloading(model, tmp_path / "folder") == 0
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "folder", trust_remote_code=True)
    again.save_pretrained(tmp_path / "again")
    assert difference_after_reloading(model, tmp_path / "again") == 0


class ReversingTokenizer(PreTrainedTokenizerFast):
    """A class that `AutoTokenizer` does not find: it loads the general class instead."""

    def __call__(self, text, **options):
        encoding = super().__call__(text, **options)
        encoding["input_ids"] = encoding["input_ids"][::-1]
        return encoding


def test_a_tokenizer_that_gives_other_ids_after_reloading_is_reported_by_both_formats(tmp_path, caplog):
    tokenizer = tiny_tokenizer()
    other = ReversingTokenizer(tokenizer_object=tokenizer._tokenizer, name_or_path="my/model", unk_token="<unk>")
    for used, number in ((tokenizer, 0), (other, 1)):
        caplog.clear()
        save_pruned(pruned("llama"), used, tmp_path / f"hf-{number}")
        write(pruned("llama"), used, tmp_path / f"nemotron-{number}")
        warnings = [record.message for record in caplog.records if record.levelname == "WARNING"]
        expected = "AutoTokenizer gives other ids than the model's own tokenizer. Load the tokenizer of 'my/model'"
        assert [message.startswith(expected) for message in warnings] == [True, True][: 2 * number]


def test_a_config_that_transformers_refuses_is_found_without_check(tmp_path):
    model = pruned("llama")
    vars(model.config)["initializer_range"] = 2.0  # the class would refuse it
    with pytest.raises(UserError, match=r"Cannot export 'llama' to nemotron-nas: .*initializer_range.*"):
        write(model, tiny_tokenizer(), tmp_path / "folder")


def test_the_folder_has_the_dtype_of_the_model_folder(tmp_path):
    folder = save_pruned(pruned("llama"), tiny_tokenizer(), tmp_path / "model", dtype=torch.bfloat16)
    target = export(folder, tmp_path / "deci", format="nemotron-nas")
    weights = load_file(target / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    assert json.loads((target / "config.json").read_text())["torch_dtype"] == "bfloat16"
