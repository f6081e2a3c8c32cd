"""Discovery of structures: equal to records by hand, cached, and refused with the reason. See also test_agree.py."""

from __future__ import annotations

import copy
import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import CONFIG_MAPPING, BartConfig, BertConfig, GraniteConfig, PreTrainedModel

from experiments.architectures import DEFAULTS, PAGE, default_config, describe, example
from gprune import discovery
from gprune.cli import main
from gprune.discovery import check_structure, search
from gprune.discovery.search import check_by_copy, discover_from_tiny, discover_record
from gprune.discovery.tiny import shrunk, tiny_model
from gprune.errors import UserError
from gprune.models.blocks import blocks_of
from gprune.models.copies import skeleton
from gprune.models.families import FAMILIES, Family, attach_record
from gprune.models.surgery import slice_model
from tests import tiny_run
from tests.models.records_by_hand import BY_HAND
from tests.tiny_llama import collect


@pytest.fixture(scope="module")
def structures(tmp_path_factory) -> Path:
    """Return a cache folder that is empty at first, so that each type is discovered once."""
    return tmp_path_factory.mktemp("structures")


@pytest.fixture(autouse=True)
def _own_cache(structures, monkeypatch):
    monkeypatch.setenv("GPRUNE_CACHE", str(structures))
    monkeypatch.setattr(discovery, "_known", {})


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(3, 100, (2, 24), generator=torch.Generator().manual_seed(1))


def as_json(record: Family) -> str:
    return json.dumps(asdict(record))


def logits(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def test_statistics_of_interleaved_experts_equal_a_reference(ids):
    """gpt_oss has biases and interleaves gate and up. The reference computes activations expert by expert."""
    model, calls = example("gpt_oss"), []
    handles = [
        block.down.host.register_forward_pre_hook(lambda m, inputs: calls.append((m, *inputs)))
        for block in blocks_of(model)
    ]
    logits(model, ids)
    for handle in handles:
        handle.remove()
    statistics = collect(model, [{"input_ids": ids, "index": torch.arange(len(ids))}])
    assert len(calls) == len(statistics.ffn) > 0
    for (module, hidden, routed, _), channels in zip(calls, statistics.ffn, strict=True):
        hidden = hidden.flatten(0, -2)
        for expert in range(4):
            tokens = (routed == expert).any(-1).flatten().nonzero()[:, 0]
            gate_up = hidden[tokens] @ module.gate_up_proj[expert] + module.gate_up_proj_bias[expert]
            x, moments = module._apply_gate(gate_up).double(), channels.total.of_expert(expert, 4)
            assert (moments.count == len(tokens)).all()
            torch.testing.assert_close(moments.sum_sq, x.square().sum(0), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "family", [f if f in ("llama", "gpt2") else pytest.param(f, marks=pytest.mark.slow) for f in BY_HAND]
)
def test_discovery_finds_the_same_structure_as_a_record_by_hand(family):
    """The same tensors for parts, slices and norms, and the same transform of logits."""
    config = shrunk(default_config(family))
    record, model = discover_from_tiny(config), tiny_model(config)
    model_by_hand = copy.deepcopy(model)
    attach_record(model, record)
    attach_record(model_by_hand, BY_HAND[family])
    discovered_blocks, blocks_by_hand = blocks_of(model), blocks_of(model_by_hand)
    assert len(discovered_blocks) == len(blocks_by_hand)
    for discovered, by_hand in zip(discovered_blocks, blocks_by_hand, strict=True):
        assert list(discovered.parts) == list(by_hand.parts)
        for name, part in discovered.parts.items():
            assert torch.equal(part.weight, by_hand.parts[name].weight), name
        assert {s.path: (s.dim, s.kind, s.units.tolist()) for s in discovered.slices} == {
            s.path: (s.dim, s.kind, s.units.tolist()) for s in by_hand.slices
        }
        for name in ("ffn_norm", "attention_norm"):
            norm, norm_by_hand = getattr(discovered, name), getattr(by_hand, name)
            assert (norm is None) == (norm_by_hand is None), name
            assert norm is None or torch.equal(norm.weight, norm_by_hand.weight), name
        assert set(discovered.attributes) <= set(by_hand.attributes)
    record_by_hand = blocks_by_hand[0].family
    for name in ("norm_offset", "softcap", "logits_scaling", "learned_positions", "layers"):
        expected = getattr(record_by_hand, name)
        # A softcap that the config does not set is not discovered.
        if name == "softcap" and not getattr(config, record_by_hand.softcap or "", None):
            expected = None
        assert getattr(record, name) == expected, name


def test_a_discovered_record_is_loaded_from_the_cache(monkeypatch):
    config = CONFIG_MAPPING["gemma"]()
    record = search.discover(config)
    monkeypatch.setattr(search, "discover_from_tiny", lambda _: pytest.fail("discovered again"))
    assert as_json(search.discover(config)) == as_json(record)


def test_discovery_does_not_change_the_global_random_state():
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    discover_from_tiny(shrunk(CONFIG_MAPPING["gemma"]()))
    assert torch.equal(torch.rand(4), expected)


def test_ffns_next_to_latent_attention_with_unequal_key_and_value_sizes_are_found():
    """Its fused projection of keys and values cannot be split into halves, so attention is not pruned."""
    model = skeleton(CONFIG_MAPPING["glm4_moe_lite"](num_hidden_layers=2))  # 192 and 256 per head
    check_structure(model)
    assert all(block.neurons and not block.kv_groups for block in blocks_of(model))


def test_the_table_of_types_says_that_heads_of_stablelm_with_a_norm_each_stay():
    ffn, attention = describe(example("stablelm with qk_layernorm"))
    assert attention == "none"
    assert f"| `stablelm with qk_layernorm` | {ffn} | {attention} |" in PAGE.read_text()


def test_a_type_whose_rotary_size_is_a_share_of_the_head_dimension_has_a_tiny_copy():
    assert discover_from_tiny(shrunk(CONFIG_MAPPING["mistral4"]())).kinds[0]


@pytest.mark.parametrize(
    ("model_type", "settings"),
    [
        ("falcon_h1", {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_ssm": 64}),
        ("bamba", {}),
        ("granitemoehybrid", {"mamba_n_heads": 4}),
    ],
)
def test_mamba_sizes_of_a_small_model_fit_together_in_its_tiny_copy(model_type, settings):
    """Some of these sizes are smaller than those of a tiny copy, and are kept."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    small = CONFIG_MAPPING[model_type](vocab_size=256, num_hidden_layers=3, **sizes, **settings)
    assert discover_from_tiny(shrunk(small)).kinds[0]


@pytest.mark.parametrize(
    ("model_type", "settings", "field", "key"),
    [
        ("granitemoehybrid", {"logits_scaling": 6.0, "num_attention_heads": 12}, "logits_scaling", "logits_scaling"),
        ("falcon_h1", {"lm_head_multiplier": 3.0}, "logits_multiplier", "lm_head_multiplier"),
    ],
)
def test_a_factor_of_logits_is_not_confused_with_a_size_of_the_tiny_copy(model_type, settings, field, key):
    """The tiny copies have 6 heads and 3 KV heads. Granite 4.0 has the factor 6 and other numbers of heads."""
    record = discover_from_tiny(shrunk(CONFIG_MAPPING[model_type](**settings)))
    assert getattr(record, field) == key


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [("roberta", "its logits are not the product of hidden states and head"), ("blt", "its config has no hidden_size")],
)
def test_a_command_line_run_refuses_types_whose_perplexity_cannot_be_measured(model_type, reason, tmp_path, capsys):
    example(model_type).save_pretrained(tmp_path / "model")
    tiny_run.tiny_tokenizer().save_pretrained(tmp_path / "model")
    assert main([f"--model.name={tmp_path / 'model'}", "--dry_run=true"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()[-1:]
    assert f"Cannot measure the perplexity of model type '{model_type}': {reason}." in line


# --- types that cannot be pruned


def encoder_decoder() -> BartConfig:
    return BartConfig()


def vision_model():
    return CONFIG_MAPPING["vit"]()


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (encoder_decoder, "must be a decoder; got an encoder-decoder"),
        (vision_model, "needs a class in transformers that predicts next tokens"),
        (BertConfig, "must be a decoder; got an encoder, "),
        (CONFIG_MAPPING["mamba"], "no FFN .* 3 layers in 'layers', but"),
        pytest.param(CONFIG_MAPPING["falcon_mamba"], "no FFN .* but they have no FFN", marks=pytest.mark.slow),
        pytest.param(CONFIG_MAPPING["zamba"], r"of layer \d are one tensor", marks=pytest.mark.slow),
        pytest.param(CONFIG_MAPPING["zamba2"], r"of layer \d are one tensor", marks=pytest.mark.slow),
    ],
)
def test_a_type_that_cannot_be_pruned_is_refused_in_one_line_with_the_reason(config, reason):
    with pytest.raises(UserError, match=reason) as caught:
        search.discover(config())
    assert "\n" not in str(caught.value)


def test_a_non_deterministic_forward_pass_is_refused():
    model = tiny_model(shrunk(CONFIG_MAPPING["gemma"]()))
    model.model.layers[0].mlp.register_forward_hook(lambda _m, _i, out: out + torch.randn_like(out))
    with pytest.raises(UserError, match="two forward passes of the same input"):
        discover_record(model)


def test_decoder_layers_outside_of_a_module_list_are_refused():
    model = tiny_model(shrunk(CONFIG_MAPPING["gemma"]()))
    model.model.layers = nn.Sequential(*model.model.layers)
    with pytest.raises(UserError, match=r"no nn\.ModuleList of decoder layers\..*--import names.*docs/extend\.md"):
        discover_record(model)


# --- records by hand


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (Family("gemma", up="mlp.wrong"), r"up='mlp\.wrong' is not a module of GemmaDecoderLayer"),
        (Family("gemma", layers="h"), "its decoder has no layers 'h'"),
        (Family("gemma"), r"it needs norm_offset=1\.0"),
        (Family("cohere2", ffn_norm="input_layernorm"), "logits are not head times hidden states"),
        (Family("stablelm", value="self_attn.o_proj", key="self_attn.o_proj"), "o_proj"),
    ],
)
def test_an_incorrect_record_is_refused_with_the_reason(record, reason, monkeypatch):
    monkeypatch.setitem(FAMILIES, record.model_type, record)
    with pytest.raises(UserError, match=reason) as caught:
        check_by_copy(CONFIG_MAPPING[record.model_type]())
    assert "docs/extend.md" in str(caught.value)


# --- a run


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    folder = tmp_path_factory.mktemp("discovery")
    return tiny_run.make_world(folder).corpora


def test_a_discovered_structure_that_does_not_fit_the_loaded_model_is_refused_before_step_1(
    corpora, tmp_path, monkeypatch, capsys
):
    """A wrong slice is simulated: one output projection of the sliced model is doubled."""

    def wrong_prune(model, masks):
        small = slice_model(model, masks)
        blocks_of(small)[1].down.host.weight.mul_(2)
        return small

    monkeypatch.setattr("gprune.method.save.slice_model", wrong_prune)
    example("stablelm").save_pretrained(tmp_path / "model")
    tiny_run.tiny_tokenizer().save_pretrained(tmp_path / "model")
    with tiny_run.isolated(tmp_path / "cache"):
        world = tiny_run.World(Path(tmp_path / "model"), corpora)
        assert tiny_run.main(world.args(tmp_path / "runs")) == 2
    printed = capsys.readouterr()
    (line,) = [line for line in printed.err.splitlines() if "stablelm" in line]
    assert "its structure, found on a tiny copy, does not fit this model" in line
    assert "docs/extend.md" in line
    assert "step 1/10" not in printed.out


def test_all_types_with_changed_defaults_exist_in_transformers():
    assert set(DEFAULTS) <= set(CONFIG_MAPPING)


def test_a_changed_built_in_record_is_checked(monkeypatch):
    monkeypatch.setitem(FAMILIES, "granite", Family("granite"))  # without the scale of its logits
    with pytest.raises(UserError, match="granite"):
        check_by_copy(GraniteConfig(logits_scaling=4.0))
