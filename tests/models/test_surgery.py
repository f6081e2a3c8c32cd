"""Slicing: what it changes in place, renumbers and refuses. Computations are compared in test_agree.py."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from experiments.architectures import default_config, example
from gprune.errors import UserError
from gprune.models.masks import masked
from gprune.models.modeling_pruned import experts_aligned
from gprune.models.surgery import attention_by_layer, slice_model, widths
from tests import tiny_run
from tests.world import make_tiny, make_tiny_llama, masks_keeping, masks_without, some_masks, units_of_kind


def test_slice_model_changes_the_original_only_with_inplace(tiny_model, token_batch):
    before = {name: tensor.clone() for name, tensor in tiny_model.state_dict().items()}
    masks = masks_without(tiny_model, 1, narrow=True)
    pruned = slice_model(tiny_model, masks)
    logits = pruned(token_batch).logits
    for parameter in pruned.parameters():
        parameter.fill_(7.0)  # no memory is shared
    assert widths(tiny_model) == {"neurons": [48] * 3, "kv_groups": [2] * 3}
    assert all(torch.equal(before[name], tensor) for name, tensor in tiny_model.state_dict().items())
    assert slice_model(tiny_model, masks, inplace=True) is tiny_model
    assert tiny_model.config.num_hidden_layers == 2
    assert torch.equal(tiny_model(token_batch).logits, logits)


def test_sliced_parameters_keep_dtype_requires_grad_and_tying(tiny_model):
    tiny_model.to(torch.bfloat16)
    tiny_model.model.layers[1].mlp.gate_proj.weight.requires_grad_(True)
    pruned = slice_model(tiny_model, masks_keeping([5, 7, 9], [1, 2, 1]))
    assert [name for name, p in pruned.named_parameters() if p.requires_grad] == ["model.layers.1.mlp.gate_proj.weight"]
    projections = [module for module in pruned.model.layers.modules() if isinstance(module, nn.Linear)]
    assert len(projections) == 3 * 7
    for linear in projections:
        assert isinstance(linear.weight, nn.Parameter)
        assert linear.weight.is_contiguous()
        assert linear.weight.dtype == torch.bfloat16
        assert tuple(linear.weight.shape) == (linear.out_features, linear.in_features)
    assert pruned.lm_head.weight is pruned.model.embed_tokens.weight


def units(*keep: bool) -> torch.Tensor:
    return torch.tensor(keep)


@pytest.mark.parametrize(
    ("kind", "index", "mask", "message"),
    [
        ("neurons", 1, units(*[True] * 47), r"Masks\['neurons.1'\] must be torch.bool of length 48; got .*47"),
        ("neurons", 0, [True] * 48, r"^Masks\['neurons.0'\] must be a tensor; got list\. Use torch\.tensor\(mask\)\.$"),
        ("kv_groups", 2, units(True, False).numpy(), r"^Masks\['kv_groups.2'\] must be a tensor; got ndarray\."),
        ("neurons", 0, torch.ones(48), r"Masks\['neurons.0'\] must be torch.bool .*; got torch.float32 \(48,\)"),
        ("neurons", 2, units(*[False] * 48), r"Masks of block 2 must keep units of both scopes"),
        ("kv_groups", 0, units(*[True] * 4), r"Masks\['kv_groups.0'\] must .* length 2; got .*\(4,\)"),
        ("kv_groups", 2, None, r"Masks must have the keys .*; got .* \('kv_groups.2'\)"),
    ],
)
def test_invalid_masks_are_refused_before_anything_is_sliced(tiny_model, kind, index, mask, message):
    masks = masks_without(tiny_model)
    masks["neurons.1" if kind == "kv_groups" else "neurons.0"] = torch.arange(48) < 3  # would be sliced first
    masks[f"{kind}.{index}"] = mask
    if mask is None:
        del masks[f"{kind}.{index}"]
    with pytest.raises(ValueError, match=message):
        slice_model(tiny_model, masks, inplace=True)
    assert widths(tiny_model) == {"neurons": [48] * 3, "kv_groups": [2] * 3}


def test_masks_that_keep_no_layer_no_layer_with_attention_or_a_part_of_a_layer_are_refused(tmp_path, tiny_model):
    with pytest.raises(ValueError, match="keep at least 1 of 3 blocks; got 0"):
        slice_model(tiny_model, masks_without(tiny_model, 0, 1, 2))
    with tiny_run.isolated(tmp_path):
        shared_expert, hybrids = example("qwen2_moe"), [example(name) for name in ("qwen3_next", "nemotron_h")]
    masks = masks_without(shared_expert)
    masks.ffn[3][:] = False  # of two blocks of layer 1
    with pytest.raises(UserError, match=r"Masks of blocks 2 to 3, of layer 1, must keep units of all"):
        slice_model(shared_expert, masks)
    for model in hybrids:
        (last,) = {u.layer for u in units_of_kind(model, "kv_groups") if u.count}
        with pytest.raises(UserError, match=rf"must keep a layer with attention, .* remove all of them: {last}\."):
            slice_model(model, masks_without(model, last))
        other = next(u.layer for u in units_of_kind(model, "neurons") if u.count and u.layer != last)
        small = slice_model(model, masks_without(model, other))
        assert small.generate(torch.arange(3, 12)[None], max_new_tokens=4, eos_token_id=None).shape == (1, 13)
    assert attention_by_layer(default_config("blt")) == []  # a type without a cache: no layer has to remain


def test_pruning_refuses_a_quantised_model_of_any_type(tiny_model):
    """Scales of blocks of weights cannot be sliced with neurons."""
    tiny_model.config.quantization_config = {"quant_method": "fp8"}
    with pytest.raises(UserError, match=r"'llama' must have weights in float32.*got a quantised checkpoint \(fp8\)"):
        slice_model(tiny_model, masks_without(tiny_model))


def test_remaining_layers_are_renumbered_and_keep_their_type_and_weights():
    model = make_tiny_llama(num_hidden_layers=4)
    model.config.layer_types = ["full_attention", "sliding_attention", "full_attention", "sliding_attention"]
    model.config.no_rope_layers, model.config.mlp_only_layers = [1, 1, 1, 0], [0, 3]
    model.config.activation_sparsity_pattern, model.config.moe_layers = [0.1, 0.2, 0.3, 0.4], [0, 1, 2, 3]
    model.config.eos_token_id = [1, 2, 3, 4]  # four values that do not belong to the four layers
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    pruned = slice_model(model, masks_without(model, 0, 2))
    assert pruned.config.num_hidden_layers == 2
    assert pruned.config.layer_types == ["sliding_attention"] * 2
    assert (pruned.config.no_rope_layers, pruned.config.mlp_only_layers) == ([1, 0], [1])
    assert (pruned.config.activation_sparsity_pattern, pruned.config.moe_layers) == ([0.2, 0.4], [0, 1])
    assert pruned.config.eos_token_id == [1, 2, 3, 4]
    assert [layer.self_attn.layer_idx for layer in pruned.model.layers] == [0, 1]
    assert pruned.model.config is pruned.config
    assert len(model.config.layer_types) == 4  # of the original
    assert [layer.self_attn.layer_idx for layer in model.model.layers] == [0, 1, 2, 3]
    for new_index, old_index in enumerate((1, 3)):
        for name, parameter in pruned.model.layers[new_index].named_parameters():
            assert torch.equal(parameter, before[f"model.layers.{old_index}.{name}"])


def test_removing_layers_is_refused_if_a_weight_outside_of_them_depends_on_their_number():
    settings = {"num_kv_shared_layers": 0, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 128}
    model = make_tiny("gemma3n_text", activation_sparsity_pattern=[0.0, 0.0, 0.0], **settings)
    message = r"cannot lose whole blocks, .*: model\.embed_tokens_per_layer\.weight has shape .*24.*, but .*16"
    with pytest.raises(UserError, match=message):
        slice_model(model, masks_without(model, 0))


def test_removing_layers_is_refused_if_it_changes_a_layers_computation(token_batch):
    model = make_tiny("gpt2", num_hidden_layers=4, scale_attn_by_inverse_layer_idx=True)
    message = r"^Model type 'gpt2' .*: attn\.scaling of layer 2 is 0\.1\d+, but 0\.1\d+ as layer 1\."
    for inplace in (False, True):
        with pytest.raises(UserError, match=message):
            slice_model(model, masks_without(model, 1, narrow=True), inplace=inplace)
        assert widths(model) == {"neurons": [48] * 4, "kv_groups": [4] * 4}  # nothing has been sliced
    masks = masks_without(model, 3)  # without the last layer, the other layers keep their indices
    with masked(model, masks):
        assert (slice_model(model, masks)(token_batch).logits - model(token_batch).logits).abs().max() <= 1e-4


def test_experts_use_grouped_kernels_if_their_width_allows_it_and_the_user_did_not_set_others():
    model = make_tiny("mixtral")

    def sliced(model, kept_neurons):
        masks = masks_without(model)
        for u in units_of_kind(model, "neurons"):
            masks[u.key] = (torch.arange(u.count) < kept_neurons).repeat(u.rows)
        return slice_model(model, masks)

    default = model.config._experts_implementation
    odd = sliced(model, 45)
    assert (odd.config._experts_implementation, default) == ("eager", "grouped_mm")
    assert sliced(odd, 16).config._experts_implementation == default
    model.config._experts_implementation = "eager"  # set by the user
    assert sliced(model, 16).config._experts_implementation == "eager"


def test_alignment_of_experts_does_not_depend_on_convolutions():
    model = nn.ModuleDict({"convolution": nn.Conv1d(8, 8, 4, groups=8)})
    model.register_parameter("down_proj", nn.Parameter(torch.zeros(4, 32, 16)))
    assert experts_aligned(model)


def test_the_factor_of_norms_over_kept_heads_is_not_rounded_to_bfloat16():
    """With 7 of 8 heads kept the factor is 1.06904, and 1.07031 in bfloat16."""
    model = make_tiny("olmo2", hidden_size=64, num_attention_heads=8, num_key_value_heads=8).to(torch.bfloat16)
    masks, ids = some_masks(model, attention=True), torch.arange(3, 67).view(2, 32)

    def size_of_keys(m):
        """Return the sum of absolute values of the normalised keys."""
        norm, found = m.model.layers[0].self_attn.k_norm, []
        with norm.register_forward_hook(lambda _module, _inputs, output: found.append(output.double().abs())):
            m(ids)
        return float(found[0].sum())

    with masked(model, masks):
        of_masked = size_of_keys(model)
    assert of_masked == pytest.approx(size_of_keys(slice_model(model, masks)), rel=3e-4)
