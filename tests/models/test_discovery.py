"""Discovery of structures: cached, of published types, and refused with the reason. See also test_agree.py."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest
import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, BartConfig, BertConfig, PreTrainedModel

from experiments.architectures import default_config, describe, example, read_table
from gprune import discovery
from gprune.discovery import check_structure, family_of, search
from gprune.discovery.search import agree, discover_from_tiny, discover_record
from gprune.discovery.tiny import shrunk, tiny_model
from gprune.errors import UserError
from gprune.export.hf import save_pruned
from gprune.models import experts
from gprune.models.agreement import random_masks
from gprune.models.copies import skeleton
from gprune.models.families import attach_record, decoder_layers, record_of
from gprune.models.loading import register_type
from gprune.models.masks import masked
from gprune.models.surgery import slice_model, widths
from gprune.models.units import UNITS, find_unpruned, units_by_layer, units_of
from gprune.units.structure import Slice, Units
from tests import tiny_run
from tests.world import tiny_of, units_of_kind


@pytest.fixture(scope="module", autouse=True)
def _own_cache(tmp_path_factory):
    """Discover each type once."""
    with tiny_run.isolated(tmp_path_factory.mktemp("structures")), pytest.MonkeyPatch.context() as patch:
        patch.setattr(discovery, "_known", {})
        yield


def test_a_record_with_what_it_refuses_is_loaded_from_the_cache(monkeypatch):
    config = default_config("gemma4_text")
    record = search.discover(config)
    assert {place.reads for place in record.refused} == {"per_layer_projection"}
    monkeypatch.setattr(search, "discover_from_tiny", lambda _: pytest.fail("discovered again"))
    assert json.dumps(asdict(search.discover(config))) == json.dumps(asdict(record))


def test_ffns_next_to_latent_attention_with_unequal_key_and_value_sizes_are_found():
    """Its fused projection of keys and values cannot be split into halves, so attention is not pruned."""
    model = skeleton(CONFIG_MAPPING["glm4_moe_lite"](num_hidden_layers=2))  # 192 and 256 per head
    check_structure(model)
    assert all(u.count for u in units_of_kind(model, "neurons"))
    assert not any(u.count for u in units_of_kind(model, "kv_groups"))


def test_two_ffns_and_two_attentions_of_a_layer_are_two_blocks():
    _, *units = units_by_layer(example("longcat_flash"))[1]
    found = {u.reads: u.kind for u in units if u.reads and u.reads != "mlp.experts"}  # which newer versions prune too
    assert found == {
        "self_attn.0.o_proj": "kv_groups", "mlps.0.down_proj": "neurons",
        "self_attn.1.o_proj": "kv_groups", "mlps.1.down_proj": "neurons",
    }  # fmt: skip


def test_the_table_of_types_says_that_heads_of_stablelm_with_a_norm_each_stay():
    ffn, attention = describe(example("stablelm with qk_layernorm"))
    assert attention == "none"
    row = read_table()["stablelm with qk_layernorm", "text"]
    assert (row["FFN"], row["attention"]) == (ffn, attention)


def test_discovery_does_not_change_the_global_random_state():
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    discover_from_tiny(shrunk(CONFIG_MAPPING["gemma"]()))
    assert torch.equal(torch.rand(4), expected)


@pytest.mark.parametrize(
    ("model_type", "settings", "field", "key"),
    [
        (
            "granitemoehybrid",
            {"hidden_size": 96, "num_attention_heads": 12, "mamba_n_heads": 4, "logits_scaling": 6.0},
            "logits_scaling", "logits_scaling",
        ),
        (
            "falcon_h1",
            {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_ssm": 64, "lm_head_multiplier": 3.0},
            "logits_multiplier", "lm_head_multiplier",
        ),
        ("mistral4", None, "model_type", "mistral4"),
    ],
)  # fmt: skip
def test_sizes_fit_together_in_the_tiny_copy_and_are_not_confused_with_a_factor_of_logits(
    model_type, settings, field, key
):
    """Sizes of Mamba that are smaller than those of a tiny copy, and a rotary size that is a share of the head's.

    The tiny copies have 6 heads and 3 KV heads. Granite 4.0 has the factor 6 and other numbers of heads.
    """
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 4}
    small = {} if settings is None else {"vocab_size": 256, "num_hidden_layers": 3, **sizes, **settings}
    record = discover_from_tiny(shrunk(CONFIG_MAPPING[model_type](**small)))
    assert record.places
    assert getattr(record, field) == key


# --- types that cannot be pruned


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (BartConfig, "must be a decoder; got an encoder-decoder"),
        (CONFIG_MAPPING["vit"], "needs a class in transformers that predicts next tokens"),
        (BertConfig, "must be a decoder; got an encoder, "),
        (lambda: default_config("xlstm"), r"'xlstm': a tiny copy does not run: .*docs/extend\.md"),
        # Activation sparsity depends on the mean over neurons, so that slicing and masking disagree.
        (
            lambda: default_config("gemma3n_text"),
            r"mlp\.down_proj cannot be pruned \(slicing and masking disagree\).*laurel\.linear_right cannot be pruned "
            r"\(its output does not join the residual\)",
        ),
        (CONFIG_MAPPING["mamba"], "no FFN .* 3 layers in 'layers', but"),
        pytest.param(CONFIG_MAPPING["falcon_mamba"], "no FFN .* but they have no FFN", marks=pytest.mark.slow),
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


def test_projections_that_do_not_divide_into_heads_are_refused():
    """The record is found on a tiny copy. `check_structure` compares it with the shapes of the given model."""
    model = tiny_of(shrunk(CONFIG_MAPPING["gemma"]()))
    check_structure(model)
    model.model.layers[1].self_attn.v_proj.weight.data = model.model.layers[1].self_attn.v_proj.weight.data[:-3]
    with pytest.raises(UserError, match=r"layer 1 of this 'gemma' model cannot be pruned: .* into heads of 8"):
        check_structure(model)


def test_exports_of_a_type_that_transformers_does_not_know_are_refused():
    with pytest.raises(UserError, match="Cannot register exports of model type 'own_type': transformers has no class"):
        register_type("own_type")


def test_experts_shared_between_layers_are_refused():
    model = tiny_of(shrunk(CONFIG_MAPPING["gpt_oss"]()))
    first, second = (layer.mlp.experts for layer in model.model.layers[:2])
    second.down_proj = first.down_proj
    with pytest.raises(UserError, match=r"'mlp\.experts\.down_proj' of layer 1 and '.*' of layer 0 are one tensor"):
        check_structure(model)


# --- what stays


@pytest.mark.parametrize(
    ("model", "output", "modules"),
    [
        (lambda: example("gemma"), None, []),
        (lambda: example("gemma4_text"), "per_layer_projection", ["per_layer_projection", "per_layer_input_gate"]),
        # Experts that are rows of two embedding tables next to an FFN
        (lambda: tiny_of(shrunk(CONFIG_MAPPING["doge"](is_moe=True))), "mlp.down_embed", ["mlp.down_embed"]),
        # A stack of one expert
        (lambda: example("inkling_text"), "mlp.shared_experts", ["mlp.shared_experts"]),
    ],
    ids=["gemma", "gemma4_per_layer_input", "doge", "inkling"],
)  # fmt: skip
def test_an_ffn_that_is_refused_is_named_with_all_of_its_parameters(model, output, modules):
    model = model()
    unpruned = find_unpruned(model)
    pruned = {s.path for u in units_of(model) if u.kind == "neurons" for s in u.slices}
    assert pruned
    if output is None:
        assert unpruned == {}
        return
    layers = [layer for layer in decoder_layers(model) if all(path in dict(layer.named_modules()) for path in modules)]
    assert unpruned[output].layers == len(layers) > 0
    parameters = (p for layer in layers for path in modules for p in layer.get_submodule(path).parameters())
    assert unpruned[output].parameters == sum(p.numel() for p in parameters)
    assert not any(path.startswith(f"{output}.") for path in pruned)


def test_the_ffn_of_gemma_3n_is_pruned_without_activation_sparsity():
    model = tiny_of(shrunk(CONFIG_MAPPING["gemma3n_text"](activation_sparsity_pattern=[0.0] * 35)))
    assert {u.reads for u in units_of_kind(model, "neurons")} == {"mlp.down_proj"}
    assert find_unpruned(model).keys() == {"laurel.linear_right", "per_layer_projection"}


def test_a_dry_run_names_an_ffn_inside_a_router_with_its_share(world, tmp_path, capsys):
    """The router of Zaya is an FFN whose output selects experts and is not added to the residual stream."""
    model = example("zaya")
    ((path, unpruned),) = find_unpruned(model).items()
    assert path not in {u.reads for u in units_of(model)}
    model.save_pretrained(tmp_path / "model")
    tiny_run.tiny_tokenizer().save_pretrained(tmp_path / "model")
    flags = [f"--model.name={tmp_path / 'model'}", "--dry_run=true"]
    assert tiny_run.main(world.args(tmp_path, *flags)) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("stays ")]
    share = unpruned.parameters / model.num_parameters()
    assert line.endswith(f"{path} in 3 layers (its output does not join the residual): {share:.1%} of the model")


# --- units of a user


def units_of_gemma(model: PreTrainedModel, *, without_gate: bool = False) -> list[Units]:
    """The neurons of a Gemma, as a user may write them."""
    units = []
    for i, layer in enumerate(model.model.layers):
        neurons = torch.arange(layer.mlp.down_proj.in_features)
        gate, up = (Slice(f"mlp.{name}_proj.weight", 0, neurons) for name in ("gate", "up"))
        down = Slice("mlp.down_proj.weight", 1, neurons)
        slices = (up, down) if without_gate else (gate, up, down)
        fields = {"inputs": (gate, up), "reads": "mlp.down_proj", "settings": {"intermediate_size": 1}}
        units.append(Units(f"neurons.{i}", "neurons", i, len(neurons), slices=slices, **fields))
    return units


def test_units_of_a_user_replace_those_that_would_be_found(monkeypatch, tmp_path):
    monkeypatch.setitem(UNITS, "gemma", units_of_gemma)
    monkeypatch.setattr(search, "accept_candidates", lambda *_: pytest.fail("searched"))
    model = tiny()
    check_structure(model)
    assert {u.kind for u in units_of(model) if u.count} == {"layer", "neurons"}
    assert record_of(model).norm_offset == 1.0
    masks = random_masks(model)
    with torch.no_grad(), masked(model, masks):
        expected = model(torch.arange(3, 19)[None]).logits
    small = slice_model(model, masks)
    with torch.no_grad():
        torch.testing.assert_close(small(torch.arange(3, 19)[None]).logits, expected, rtol=1e-4, atol=1e-4)
    loaded = AutoModelForCausalLM.from_pretrained(save_pruned(small, None, tmp_path / "model"))
    family_of(loaded)
    assert widths(loaded) == widths(small)


def test_units_of_a_user_that_lack_a_slice_are_refused(monkeypatch):
    monkeypatch.setitem(UNITS, "gemma", lambda model: units_of_gemma(model, without_gate=True))
    with pytest.raises(UserError, match=r"function in UNITS for model type 'gemma': .*docs/extend\.md"):
        check_structure(tiny())


# --- a run


def test_a_discovered_structure_that_does_not_fit_the_loaded_model_is_refused_before_step_1(
    world, tmp_path, monkeypatch, capsys
):
    """A wrong slice is simulated: one output projection of the sliced model is doubled."""

    def wrong_prune(model, masks):
        small = slice_model(model, masks)
        small.model.layers[1].mlp.down_proj.weight.mul_(2)
        return small

    monkeypatch.setattr("gprune.method.save.slice_model", wrong_prune)
    example("stablelm").save_pretrained(tmp_path / "model")
    tiny_run.tiny_tokenizer().save_pretrained(tmp_path / "model")
    assert tiny_run.main(world.args(tmp_path / "runs", f"--model.name={tmp_path / 'model'}")) == 2
    printed = capsys.readouterr()
    (line,) = [line for line in printed.err.splitlines() if "stablelm" in line]
    assert "its structure, found on a tiny copy, does not fit this model" in line
    assert "docs/extend.md" in line
    assert "step 1/10" not in printed.out


# --- modules that look like FFNs or experts but cannot be sliced or masked


def tiny(model_type: str = "gemma") -> PreTrainedModel:
    return tiny_model(shrunk(CONFIG_MAPPING[model_type]()))


def with_mlp(forward) -> PreTrainedModel:
    """A tiny Gemma whose FFNs have another forward."""
    model = tiny()
    base = type(model.model.layers[0].mlp)
    changed = type(base.__name__, (base,), {"forward": forward})
    for layer in model.model.layers:
        layer.mlp.__class__ = changed
    return model


def tiny_and_divided_by_width(mlp: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """An output that depends on the width, but is so small that logits of any two masks are within 1e-3."""
    hidden = mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x)
    return 2e-3 * mlp.down_proj(hidden) / hidden.shape[-1]


def without_calling_down(mlp: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return (mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x)) @ mlp.down_proj.weight.T


@pytest.mark.parametrize("forward", [tiny_and_divided_by_width, without_calling_down])
def test_an_ffn_that_cannot_be_sliced_or_masked_is_rejected(forward):
    with pytest.raises(UserError, match=r"no FFN .* 3 layers in 'layers'"):
        discover_record(with_mlp(forward))


def test_agreement_is_relative_to_the_change_by_the_mask():
    dense = torch.tensor([1.0, 0.0])
    for effect, error, expected in ((0.5, 1e-4, True), (1e-3, 1e-4, False), (0.0, 0.0, False)):
        masked_logits = dense + torch.tensor([0.0, effect])
        assert agree(masked_logits, masked_logits + torch.tensor([0.0, error]), dense=dense) == expected


def without_calls(_layer: nn.Module, _neurons: Units, watcher: experts.Watcher) -> experts.Watch:
    """Watch a module that is not part of the model, so that the watcher is never called."""
    return experts.Watch(nn.Module(), watcher)


def with_reversed_tokens(watch):
    """Make a `watch_experts` that reports activations for other tokens than the expert computes."""

    def watch_reversed(layer: nn.Module, neurons: Units, watcher: experts.Watcher) -> experts.Watch:
        return watch(layer, neurons, lambda x, expert, tokens: watcher(x, expert, tokens.flip(0)))

    return watch_reversed


@pytest.mark.parametrize("broken", [without_calls, with_reversed_tokens(experts.watch_experts)])
def test_experts_whose_activations_are_not_observed_correctly_are_not_pruned(broken, monkeypatch):
    """For example, a class that computes its products in a custom kernel."""
    model = tiny("deepseek_v3")
    assert any(place.reads == "mlp.experts" for place in family_of(model.config).places)
    for module in ("gprune.models.masks", "gprune.discovery.search"):
        monkeypatch.setattr(f"{module}.watch_experts", broken)
    record = discover_record(model)
    assert not any(place.reads == "mlp.experts" for place in record.places)
    attach_record(model, record)
    assert "mlp.experts" not in {u.reads for u in units_of(model)}
