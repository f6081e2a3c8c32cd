"""Exported folders reload with the same logits, in this process and in a fresh one, with and without KV caches."""

from __future__ import annotations

import copy
import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

import gprune
from gprune.discovery import family_of
from gprune.discovery.tiny import shrunk
from gprune.errors import UserError
from gprune.export import hf
from gprune.models.families import decoder_layers
from gprune.models.masks import masked
from gprune.models.modeling_pruned import PrunedLlamaForCausalLM, PrunedLlamaModel, layer_configs
from gprune.models.paths import owner_of
from gprune.models.surgery import slice_model, widths
from gprune.models.units import units_of
from gprune.sparsity.budget import budget_of
from gprune.sparsity.cut import keep_masks
from tests.tiny_run import WORDS, environment, tiny_tokenizer
from tests.world import (
    make_tiny,
    make_tiny_llama,
    masks_keeping,
    masks_without,
    some_masks,
    tiny_of,
    units_of_kind,
)

NEURONS, GROUPS = [1, 7, 47], [1, 2, 1]
BIASES = {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False}
LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 50000.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip


def randomise_biases(model: nn.Module) -> None:
    """Replace biases, which are initialized with zeros, by random values."""
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data = torch.randn(parameter.shape, generator=generator)


def make_pruned(recovered=False, shape=(NEURONS, GROUPS), **overrides):
    """A tiny pruned Llama with odd widths. If `recovered`, some down and output projections have biases."""
    model = slice_model(make_tiny_llama(**overrides), masks_keeping(*shape))
    if recovered:
        first, second, third = model.model.layers
        for linear in (first.mlp.down_proj, third.mlp.down_proj, second.self_attn.o_proj):
            linear.bias = nn.Parameter(torch.zeros(32), requires_grad=False)
    randomise_biases(model)
    for parameter in model.parameters():  # unlike loading, `model.to` would also round the rotary frequencies
        parameter.data = parameter.data.to(overrides.get("dtype", torch.float32))
    return model


def load(folder, auto=AutoModelForCausalLM, **options):
    model = auto.from_pretrained(folder, dtype="auto", **options).eval()
    family_of(model)
    return model


def reloaded(model: nn.Module, folder, **options) -> nn.Module:
    """Save a pruned model, and load it again."""
    return load(hf.save_pruned(model, None, folder), **options)


# Rotary embeddings whose frequencies depend on the length of the text
ROPE_BY_LENGTH = {"rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}


@pytest.mark.parametrize("rope_type", ["yarn", "dynamic", "longrope"])
def test_yarn_dynamic_and_longrope_reload_with_unequal_heads(rope_type, tmp_path):
    """These types read the head size from the config. Layers with unequal numbers of heads must agree on it."""
    factors = {"short_factor": [1.0, 1.5, 2.0, 2.5], "long_factor": [2.0] * 4} if rope_type == "longrope" else {}
    model = make_pruned(rope_parameters={"rope_type": rope_type, **ROPE_BY_LENGTH, **factors})
    model(torch.arange(2, 42)[None])  # switches to the frequencies for long text
    copies = hf.to_portable(model), reloaded(model, tmp_path / "model")
    for length in (12, 40):  # within the original context length and beyond it
        ids = torch.arange(2, 2 + length)[None]
        assert all(torch.equal(copy(ids).logits, model(ids).logits) for copy in copies)


@pytest.mark.parametrize(("recovered", "overrides"), [(True, BIASES), (False, {"dtype": torch.bfloat16})])
def test_exported_models_reload_with_the_same_bits_also_saved_by_transformers_and_without_head(
    recovered, overrides, tmp_path, token_batch
):
    model = make_pruned(recovered, **overrides)
    expected = model(token_batch).logits
    loaded = reloaded(model, tmp_path / "model")
    assert type(loaded) is PrunedLlamaForCausalLM
    assert loaded.dtype == model.dtype
    assert torch.equal(loaded(token_batch).logits, expected)
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == model.config.tie_word_embeddings
    loaded.save_pretrained(tmp_path / "again")
    assert torch.equal(load(tmp_path / "again")(token_batch).logits, expected)
    decoder = load(tmp_path / "again", AutoModel)
    assert type(decoder) is PrunedLlamaModel
    assert torch.equal(decoder(token_batch).last_hidden_state, model.model(token_batch).last_hidden_state)


def misaligned(model: nn.Module, elements: int) -> nn.Module:
    """Shift each parameter by `elements` from aligned memory, as in a mapped file. In place."""
    for p in model.parameters():
        memory = torch.empty(p.numel() + elements, dtype=p.dtype)
        memory[elements:] = p.data.flatten()
        p.data = memory[elements:].view(p.shape)
    return model


@pytest.mark.slow
def test_experts_with_a_single_token_reload_with_the_same_bits(tmp_path):
    """The last bits of a product with a single row depend on the alignment of the matrix, which differs in files."""
    model = make_tiny("olmoe", neurons=168, num_experts=64, num_local_experts=64, num_experts_per_tok=8)
    ids = torch.randint(3, 128, (1, 128), generator=torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(0)
    budget = budget_of(units_of(model), 0.3, scope="ffn")
    margins = {u.key: torch.rand(u.size, generator=generator) for u in budget.of_kind("neurons")}
    small = slice_model(model, keep_masks(budget, margins))
    folder = hf.save_pruned(small, None, tmp_path / "model")
    assert hf.check_reload(misaligned(small, 2), folder, ids) == 0.0


def test_the_config_has_widths_per_layer_and_the_keys_of_older_transformers(tmp_path):
    model = make_pruned(recovered=True, rope_parameters=LLAMA3_ROPE)
    model.config.quantization_config = {"quant_method": "gguf"}  # as after dequantizing a GGUF file
    folder = hf.save_pruned(model, None, tmp_path / "model")
    load(folder).save_pretrained(tmp_path / "again")
    for path in (folder, tmp_path / "again"):
        config = json.loads((path / "config.json").read_text())
        assert config["added_biases"] == []
        narrow = {"num_attention_heads": 2, "num_key_value_heads": 1, "added_biases": ["mlp.down_proj"]}
        assert config["per_layer_config"] == {
            "0": {"intermediate_size": 1, **narrow},
            "1": {"intermediate_size": 7, "added_biases": ["self_attn.o_proj"]},
            "2": {"intermediate_size": 47, **narrow},
        }
        assert set(config["auto_map"]) == {"AutoConfig", "AutoModel", "AutoModelForCausalLM"}
        assert config["model_type"] == "pruned_llama"
        assert config["head_dim"] == 8
        assert config["intermediate_size"] == 48
        assert config["rope_theta"] == 50000.0
        assert config["rope_scaling"] == {k: v for k, v in LLAMA3_ROPE.items() if k != "rope_theta"}
        assert "quantization_config" not in config
        assert (path / "modeling_pruned.py").is_file()
    assert model.config.rope_parameters == AutoConfig.from_pretrained(folder).rope_parameters


# `pruned_layout` of Llamas in folders of earlier versions. Sizes are multiples of values of `per_layer_config`.
EARLIER_LAYOUT = {
    "layers": "layers",
    "attributes": {},
    "sizes": {
        **{f"mlp.{name}_proj.weight": [0, {"intermediate_size": 1}] for name in ("gate", "up")},
        "mlp.down_proj.weight": [1, {"intermediate_size": 1}],
        **{f"self_attn.{name}_proj.weight": [0, {"num_key_value_heads": 8}] for name in ("k", "v")},
        "self_attn.q_proj.weight": [0, {"num_attention_heads": 8}],
        "self_attn.o_proj.weight": [1, {"num_attention_heads": 8}],
    },
}


def test_a_folder_of_an_earlier_version_loads_and_can_be_pruned_and_saved_again(tmp_path, token_batch):
    model = make_pruned(recovered=True)
    folder = hf.save_pruned(model, None, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    assert config["pruned_layout"]["own"]["0"]["sizes"]["mlp.down_proj.weight"] == [1, 1]
    (folder / "config.json").write_text(json.dumps(config | {"pruned_layout": EARLIER_LAYOUT}))
    loaded = load(folder)
    assert torch.equal(loaded(token_batch).logits, model(token_batch).logits)
    assert torch.equal(load(folder, AutoModel)(token_batch)[0], model.model(token_batch)[0])
    for masks in (masks_without(loaded, narrow=True), masks_without(loaded, 1)):
        small = slice_model(loaded, masks)
        again = load(hf.save_pruned(small, None, tmp_path / "again", overwrite=(tmp_path / "again").exists()))
        assert torch.equal(again(token_batch).logits, small(token_batch).logits)
        assert "own" in again.config.pruned_layout


def test_equal_blocks_that_llama_cannot_describe_use_another_model_type(tmp_path, token_batch):
    """A bias of a single projection, and a number of heads that does not divide the hidden size."""
    biased = slice_model(make_tiny_llama(), masks_keeping([20] * 3, [2] * 3))
    biased.model.layers[0].mlp.down_proj.bias = nn.Parameter(torch.randn(32), requires_grad=False)
    uneven = slice_model(
        make_tiny_llama(num_attention_heads=4, num_key_value_heads=4), masks_keeping([20] * 3, [3] * 3, of_groups=4)
    )
    for model_type, model in (("pruned_llama", biased), ("mistral", uneven)):  # equal to Llama without a sliding window
        loaded = reloaded(model, tmp_path / model_type)
        assert loaded.config.model_type == model_type
        assert torch.equal(loaded(token_batch).logits, model(token_batch).logits)


def test_set_attn_implementation_reaches_every_layer(tmp_path, token_batch):
    loaded = reloaded(make_pruned(), tmp_path / "model")
    expected = loaded(token_batch).logits
    assert not loaded(token_batch, output_attentions=True).attentions  # sdpa does not return attention weights
    loaded.set_attn_implementation("eager")
    output = loaded(token_batch, output_attentions=True)
    assert [a.shape[1] for a in output.attentions] == [2, 4, 2]
    torch.testing.assert_close(output.logits, expected, atol=1e-4, rtol=0)


def test_apply_masks_keeps_modes_settings_classes_of_users_and_with_inplace_the_memory():
    """Training mode, attention implementation, generation config; in place, weights are not copied."""
    model, masks = make_tiny_llama(attn_implementation="eager").train(), masks_keeping(NEURONS, GROUPS)
    model.generation_config.max_length = 33
    small = gprune.apply_masks(model, masks)
    assert type(small) is PrunedLlamaForCausalLM
    assert small.training
    assert {layer.self_attn.config._attn_implementation for layer in small.model.layers} == {"eager"}
    assert small.generation_config.max_length == 33
    assert widths(model)["neurons"] == [48] * 3
    shared = gprune.apply_masks(model, masks, inplace=True)
    pointers = [{n: p.data_ptr() for n, p in m.named_parameters()} for m in (model, shared)]
    assert pointers[0] == pointers[1]

    class Subclass(LlamaForCausalLM):
        """A subclass, which might have another forward."""

    of_subclass, with_module = make_tiny_llama(), make_tiny_llama()
    of_subclass.__class__ = Subclass
    with_module.adapter = nn.Linear(2, 2)
    for model in (of_subclass, with_module):
        small = gprune.apply_masks(model, masks)
        assert type(small) is type(model)
        assert widths(small) == {"neurons": NEURONS, "kv_groups": GROUPS}


def test_the_config_of_a_reloaded_model_describes_the_remaining_layers_after_whole_blocks_are_removed(
    tmp_path, token_batch
):
    loaded = reloaded(make_pruned(recovered=True), tmp_path / "model")
    masks = masks_without(loaded, 0)
    shallow = slice_model(loaded, masks)
    for model, neurons, groups in ((loaded, NEURONS, GROUPS), (shallow, NEURONS[1:], GROUPS[1:])):
        assert widths(model) == {"neurons": neurons, "kv_groups": groups}
        layers = layer_configs(model.config)
        assert [(layer.intermediate_size, layer.num_key_value_heads) for layer in layers] == list(
            zip(neurons, groups, strict=True)
        )
        biases = [layer.mlp.down_proj.bias is not None for layer in model.model.layers]
        assert ["mlp.down_proj" in layer.added_biases for layer in layers] == biases
    with masked(loaded, masks):
        expected = loaded(token_batch).logits
    torch.testing.assert_close(shallow(token_batch).logits, expected, atol=1e-4, rtol=0)
    last = reloaded(slice_model(shallow, masks_without(shallow, 0)), tmp_path / "last")
    assert set(last.config.to_dict().get("per_layer_config", {})) <= {"0"}


def test_tokenizer_chat_templates_and_model_card_are_exported(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = {"default": "{{ messages }}", "tools": "{{ tools }}"}
    folder = hf.save_pruned(make_pruned(), tokenizer, tmp_path / "model")
    words = f"{WORDS[1]} {WORDS[0]}"
    assert AutoTokenizer.from_pretrained(folder)(words).input_ids == tokenizer(words).input_ids
    assert "pruned_layout" in (folder / "README.md").read_text()
    assert "pruned_layout" in json.loads((folder / "config.json").read_text())
    assert (folder / "generation_config.json").is_file()
    assert (folder / "additional_chat_templates").is_dir()
    hf.save_pruned(make_pruned(), tokenizer, folder, overwrite=True)  # all files are known files of gprune
    assert [path.name for path in tmp_path.iterdir()] == ["model"]  # no temporary folder left


def test_an_existing_folder_is_replaced_only_with_overwrite_and_by_a_complete_one(tmp_path, token_batch, monkeypatch):
    first, second = make_pruned(), make_pruned(recovered=True)
    folder = hf.save_pruned(first, None, tmp_path / "model")

    def fail_on_full_disk(*args, **options):
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match="exists already"):
        hf.save_pruned(second, None, folder)
    # A failure while writing leaves the first model.
    monkeypatch.setattr("pathlib.Path.write_text", fail_on_full_disk)
    with pytest.raises(UserError, match=r"Cannot write .*No space left"):
        hf.save_pruned(second, None, folder, overwrite=True)
    monkeypatch.undo()
    assert torch.equal(load(folder)(token_batch).logits, first(token_batch).logits)
    hf.save_pruned(second, None, folder, overwrite=True)
    assert torch.equal(load(folder)(token_batch).logits, second(token_batch).logits)
    # Files of a model in several shards are replaced as well.
    monkeypatch.setattr(hf, "MAX_FILE_BYTES", 20_000)
    hf.save_pruned(first, None, folder, overwrite=True)
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    monkeypatch.undo()
    hf.save_pruned(second, None, folder, overwrite=True)
    assert [path.name for path in folder.glob("*.safetensors*")] == ["model.safetensors"]
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize(
    ("name", "message"),
    [("diary.txt", "contains diary.txt, which would be lost"), ("README.md", "has no README.md that mentions gprune")],
)
def test_overwrite_refuses_folders_with_foreign_files(name, message, tmp_path):
    folder = hf.save_pruned(make_pruned(), None, tmp_path / "model")
    (folder / name).write_text("dear")
    with pytest.raises(UserError, match=message):
        hf.save_pruned(make_pruned(), None, folder, overwrite=True)
    assert (folder / name).read_text() == "dear"


def test_a_failing_reload_is_reported_by_the_last_line_of_its_process(tmp_path, monkeypatch, fresh_process):
    fake = tmp_path / "python"
    fake.write_text("#!/bin/sh\necho Traceback >&2\necho 'OSError: weights are gone' >&2\nexit 1\n")
    fake.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(fake))
    folder = hf.save_pruned(make_pruned(), None, tmp_path / "model")
    with pytest.raises(UserError, match=r"in a fresh process: OSError: weights are gone\.$"):
        hf.check_reload(make_pruned(), folder, torch.ones(1, 4, dtype=torch.long))
    assert not folder.exists()


def test_weights_are_restored_if_the_forward_pass_of_the_check_fails(tmp_path, token_batch):
    model = make_pruned()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    folder = hf.save_pruned(model, None, tmp_path / "model", dtype=torch.bfloat16)
    handle = model.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        hf.check_reload(model, folder, token_batch, dtype=torch.bfloat16)
    handle.remove()
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    assert not folder.exists()


def test_register_makes_exports_of_a_type_without_record_load_without_remote_code(tmp_path, token_batch, monkeypatch):
    dense = make_tiny("gemma3_text")
    model = slice_model(dense, some_masks(dense, attention=False))
    hf.save_pruned(model, None, tmp_path / "model")
    monkeypatch.delitem(CONFIG_MAPPING._extra_content, "pruned_gemma3_text")  # as in a process that did not export
    gprune.register()
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        load(tmp_path / "model", trust_remote_code=False)
    gprune.register("gemma3_text")
    assert torch.equal(load(tmp_path / "model")(token_batch).logits, model(token_batch).logits)


@pytest.mark.parametrize(("family", "kept"), [("llama", (17, 48, 33)), ("gemma3_text", (20, 20, 20))])
def test_a_head_with_its_own_weights_stays_untied_whatever_the_config_says(family, kept, tmp_path, token_batch):
    own_head = make_tiny(family, tie_word_embeddings=False)
    own_head.config.tie_word_embeddings = True
    own_head.save_pretrained(tmp_path / "dense")
    model = load(tmp_path / "dense")
    masks = some_masks(model, kept, attention=False)
    small = slice_model(model, masks)
    expected = small(token_batch).logits
    assert torch.equal(gprune.apply_masks(model, masks)(token_batch).logits, expected)
    loaded = reloaded(small, tmp_path / "model")
    assert torch.equal(loaded(token_batch).logits, expected)
    assert loaded.config.tie_word_embeddings is False


@pytest.mark.parametrize("removed", [(), (0,)])
def test_a_table_of_values_by_layer_of_the_dense_model_is_exported(removed, tmp_path, token_batch):
    """Heads of full attention have another size than those of sliding attention."""
    settings = shrunk(CONFIG_MAPPING["gemma4_text"]()).to_dict() | {"hidden_size_per_layer_input": 0}
    del settings["per_layer_config"]  # made from the next two settings
    dense = tiny_of(CONFIG_MAPPING["gemma4_text"](**settings | {"head_dim": 8, "global_head_dim": 16}))
    assert dense.config.to_dict()["per_layer_config"] == {"2": {"head_dim": 16}}
    masks = masks_without(dense, *removed, narrow=True)
    masks.ffn[2][:7] = True  # layers of unequal widths
    small = slice_model(dense, masks)
    expected = small(token_batch).logits
    gprune.apply_masks(dense, masks).save_pretrained(tmp_path / "applied")
    for folder in (hf.save_pruned(small, None, tmp_path / "model"), tmp_path / "applied"):
        loaded = load(folder, attn_implementation="eager")
        assert torch.equal(loaded(token_batch).logits, expected)
        assert loaded.config.to_dict()["per_layer_config"] == {str(2 - len(removed)): {"head_dim": 16}}
    smaller = slice_model(loaded, masks_without(loaded, narrow=True))
    again = reloaded(smaller, tmp_path / "again", attn_implementation="eager")
    assert torch.equal(again(token_batch).logits, smaller(token_batch).logits)


@pytest.mark.parametrize("value", [1.5, float("nan")])
def test_a_corrupted_export_is_detected_and_removed(value, tmp_path, token_batch):
    model = make_pruned()
    folder = hf.save_pruned(model, None, tmp_path / "model")
    weights = folder / "model.safetensors"
    final_norm = torch.full((32,), value).numpy().tobytes()  # the last 32 numbers of the file
    weights.write_bytes(weights.read_bytes()[: -len(final_norm)] + final_norm)
    with pytest.raises(UserError, match=r"logits of the reloaded model differ .* removed"):
        hf.check_reload(model, folder, token_batch)
    assert not folder.exists()


def with_lora(model: nn.Module) -> nn.Module:
    """Add random LoRA adapters to all linear layers of attention and FFN. They require correct `in_features`."""
    peft = pytest.importorskip("peft", reason="LoRA needs peft, which the extra `test` installs")
    paths = {owner_of(s.path) for kind in ("neurons", "kv_groups") for s in units_of_kind(model, kind)[0].slices}
    linear = [path for path in paths if isinstance(decoder_layers(model)[0].get_submodule(path), nn.Linear | Conv1D)]
    is_transposed = isinstance(decoder_layers(model)[0].get_submodule(linear[0]), Conv1D)
    config = peft.LoraConfig(
        r=2, target_modules=sorted(path.split(".")[-1] for path in linear), task_type="CAUSAL_LM",
        init_lora_weights=False, fan_in_fan_out=is_transposed,
    )  # fmt: skip
    return peft.get_peft_model(model.requires_grad_(False), config).eval()


@pytest.mark.slow
def test_exported_and_fine_tuned_models_load_without_gprune(tmp_path):
    """Exports and fine-tuned models, loaded by a process that cannot import gprune."""
    folders, models = tmp_path / "folders", {}
    ids = torch.randint(3, 128, (4, 24), generator=torch.Generator().manual_seed(1))  # longer than the sliding window
    for family in ("llama", "gemma3_text", "phi3", "opt", "gpt2", "qwen3_moe"):
        model = make_tiny(family)
        models[family] = small = gprune.apply_masks(model, some_masks(model, attention=True))
        hf.save_pruned(small, tiny_tokenizer(), folders / family)
        tuned = copy.deepcopy(small)
        optimizer = torch.optim.SGD(tuned.requires_grad_(True).parameters(), lr=1e-3)
        tuned(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        models[f"{family}-tuned"] = with_lora(tuned).merge_and_unload()
    for name, model in models.items():
        if not (folder := folders / name).exists():
            model.save_pretrained(folder)
        assert sorted(path.name for path in folder.glob("*.py")) == ["modeling_pruned.py"]
        logits = model(ids, use_cache=False).logits.detach().contiguous()
        save_file({"logits": logits, "ids": ids}, folder / "expected.safetensors")
    script = tmp_path / "load.py"
    script.write_text(
        "import sys, torch\nfrom pathlib import Path\nfrom safetensors.torch import load_file\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "for folder in Path(sys.argv[1]).iterdir():\n"
        "    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()\n"
        "    want = load_file(folder / 'expected.safetensors')\n"
        "    got = model(want['ids'], use_cache=False).logits\n"
        "    if (folder / 'tokenizer.json').exists():\n"
        "        AutoTokenizer.from_pretrained(folder, trust_remote_code=True)  # asks no question\n"
        "    print(folder.name, (got - want['logits']).abs().max().item())\n"
        "assert 'gprune' not in sys.modules\n"
    )
    variables = environment(tmp_path / "cache", HF_MODULES_CACHE=str(tmp_path / "modules"))
    process = subprocess.run(
        [sys.executable, "-P", str(script), str(folders)], cwd=tmp_path, env=variables, stdin=subprocess.DEVNULL,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr[-2000:]
    differences = dict(line.split() for line in process.stdout.splitlines() if line)
    assert {name: float(value) for name, value in differences.items()} == dict.fromkeys(models, 0.0)
