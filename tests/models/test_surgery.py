"""Slicing must equal zeroing; the original must not move; parameters are counted by hand."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from gprune.errors import UserError
from gprune.export.hf import save_pruned
from gprune.models.blocks import blocks_of
from gprune.models.masks import Masks
from gprune.models.modeling_pruned import experts_aligned
from gprune.models.surgery import prune, widths
from gprune.sparsity.gates import masked
from tests.conftest import make_tiny_llama
from tests.tiny_families import make_tiny


def random_masks(neurons: list[int], groups: list[int], of_neurons=48, of_groups=2, seed: int = 0) -> Masks:
    """Masks that keep these many units per block, at random places."""
    generator = torch.Generator().manual_seed(seed)

    def keep(count: int, total: int) -> torch.Tensor:
        mask = torch.zeros(total, dtype=torch.bool)
        mask[torch.randperm(total, generator=generator)[:count]] = True
        return mask

    return Masks([keep(n, of_neurons) for n in neurons], [keep(g, of_groups) for g in groups])


def zeroed(model: nn.Module, masks: Masks) -> nn.Module:
    """The independent reference: full widths, what removed units send onwards set to zero."""
    model = copy.deepcopy(model)
    for layer, neurons, groups in zip(model.model.layers, masks.ffn, masks.attention, strict=True):
        layer.mlp.down_proj.weight.data[:, ~neurons] = 0.0
        heads = layer.self_attn.o_proj.weight.data.view(32, len(groups), -1)
        heads[:, ~groups] = 0.0
    return model


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"tie_word_embeddings": True},
        {"attention_bias": True, "mlp_bias": True},
        {"num_key_value_heads": 4},
        {"head_dim": 12},
        {"attn_implementation": "eager"},
    ],
    ids=lambda overrides: "-".join(overrides) or "plain",
)
def test_sliced_equals_zeroed(overrides, token_batch):
    model = make_tiny("llama", **overrides)
    groups = model.config.num_key_value_heads
    masks = random_masks([1, 7, 47], [1, groups, groups // 2], of_groups=groups)
    pruned = prune(model, masks)
    assert widths(pruned) == {"neurons": [1, 7, 47], "kv_groups": [1, groups, groups // 2]}
    torch.testing.assert_close(pruned(token_batch).logits, zeroed(model, masks)(token_batch).logits, atol=1e-4, rtol=0)
    # The masks are not idle: the dense logits are far away.
    assert (pruned(token_batch).logits - model(token_batch).logits).abs().max() > 0.1


@pytest.mark.parametrize("gone", [(), (1,)])
def test_original_is_untouched_unless_it_is_pruned_in_place(gone, tiny_model, token_batch):
    before = {name: tensor.clone() for name, tensor in tiny_model.state_dict().items()}
    masks = depth(tiny_model, *gone, narrow=True)
    pruned = prune(tiny_model, masks)
    logits = pruned(token_batch).logits
    for parameter in pruned.parameters():
        parameter.fill_(7.0)  # nothing is shared
    assert widths(tiny_model) == {"neurons": [48] * 3, "kv_groups": [2] * 3}
    assert all(torch.equal(before[name], tensor) for name, tensor in tiny_model.state_dict().items())
    assert prune(tiny_model, masks, inplace=True) is tiny_model
    assert tiny_model.config.num_hidden_layers == 3 - len(gone)
    assert torch.equal(tiny_model(token_batch).logits, logits)


def test_parameters_keep_their_nature(tiny_model):
    tiny_model.to(torch.bfloat16)
    blocks_of(tiny_model)[1].gate.weight.requires_grad_(True)
    pruned = prune(tiny_model, random_masks([5, 7, 9], [1, 2, 1]))
    assert [name for name, p in pruned.named_parameters() if p.requires_grad] == ["model.layers.1.mlp.gate_proj.weight"]
    for block in blocks_of(pruned):
        for linear in (block.gate, block.up, block.down, block.query, block.key, block.value, block.output):
            assert isinstance(linear.weight, nn.Parameter)
            assert linear.weight.is_contiguous()
            assert linear.weight.dtype == torch.bfloat16
            assert tuple(linear.weight.shape) == (linear.out_features, linear.in_features)
    assert pruned.lm_head.weight is pruned.model.embed_tokens.weight


def test_a_recovery_bias_is_carried_whole(tiny_model, token_batch):
    for block in blocks_of(tiny_model)[:2]:
        block.down.host.bias = nn.Parameter(torch.linspace(-1, 1, 32), requires_grad=False)
        block.output.host.bias = nn.Parameter(torch.linspace(2, -2, 32), requires_grad=False)
    masks = random_masks([5, 7, 9], [1, 2, 1])
    pruned = prune(tiny_model, masks)
    expected = zeroed(tiny_model, masks)(token_batch).logits
    torch.testing.assert_close(pruned(token_batch).logits, expected, atol=1e-5, rtol=0)
    assert pruned.model.layers[0].mlp.down_proj.bias is not tiny_model.model.layers[0].mlp.down_proj.bias


def units(*keep: bool) -> torch.Tensor:
    return torch.tensor(keep)


@pytest.mark.parametrize(
    ("kind", "index", "mask", "message"),
    [
        ("ffn", 1, units(*[True] * 47), r"Masks.ffn must be torch.bool of lengths \[48, 48, 48\]; got .*47"),
        ("ffn", 0, torch.ones(48), r"Masks.ffn must be torch.bool .*; got torch.float32 \(48,\)"),
        ("ffn", 2, units(*[False] * 48), r"Masks of block 2 must keep units of both scopes"),
        ("attention", 2, units(False, False), r"Masks of block 2 must keep units of both scopes"),
        ("attention", 0, units(*[True] * 4), r"Masks.attention must .* lengths \[2, 2, 2\]; got .*\(4,\)"),
        ("attention", 2, None, r"Masks.attention must .* \[2, 2, 2\]; got"),
    ],
)
def test_bad_masks_are_refused_before_anything_is_cut(tiny_model, kind, index, mask, message):
    masks = depth(tiny_model)
    masks.ffn[1 if kind == "attention" else 0] = torch.arange(48) < 3  # would be cut first
    getattr(masks, kind)[index : index + 1] = [] if mask is None else [mask]
    with pytest.raises(ValueError, match=message):
        prune(tiny_model, masks, inplace=True)
    assert widths(tiny_model) == {"neurons": [48] * 3, "kv_groups": [2] * 3}


# --- whole blocks -----------------------------------------------------------------------------------------------

GREEDY = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def depth(model: nn.Module, *gone: int, narrow: bool = False) -> Masks:
    """Masks for the present widths without these blocks; `narrow` drops units of the others too."""

    def keep(count: int, stays: bool) -> torch.Tensor:
        return torch.tensor([stays and not (narrow and i % 3 == 1) for i in range(count)])

    sizes = [(b.index not in gone, b.experts * b.neurons, b.kv_groups) for b in blocks_of(model)]
    return Masks([keep(n, stays) for stays, n, _ in sizes], [keep(g, stays) for stays, _, g in sizes])


def layer_indices(model: nn.Module) -> list[int]:
    return [layer.self_attn.layer_idx for layer in model.model.layers]


@pytest.mark.parametrize(("gone", "narrow"), [((0,), True), ((1, 2), False), ((3,), True), ((0, 1, 3), False)])
def test_sliced_equals_masked_without_whole_blocks(gone, narrow, token_batch):
    model = make_tiny_llama(num_hidden_layers=4)
    masks = depth(model, *gone, narrow=narrow)
    pruned = prune(model, masks)
    assert len(pruned.model.layers) == 4 - len(gone)
    prompt = token_batch[:2, :9]
    with masked(model, masks):
        logits = model(token_batch).logits
        continued = model.generate(prompt, **GREEDY)
    assert (pruned(token_batch).logits - logits).abs().max() <= 1e-4
    assert torch.equal(pruned.generate(prompt, **GREEDY), continued)
    # the KV cache of fewer layers is not idle, and changes nothing
    assert len(pruned(prompt, use_cache=True).past_key_values.layers) == 4 - len(gone)
    assert torch.equal(pruned.generate(prompt, use_cache=False, **GREEDY), continued)


def test_layers_that_stay_are_numbered_anew_and_keep_their_type():
    model = make_tiny_llama(num_hidden_layers=4)
    model.config.layer_types = ["full_attention", "sliding_attention", "full_attention", "sliding_attention"]
    model.config.no_rope_layers, model.config.mlp_only_layers = [1, 1, 1, 0], [0, 3]
    model.config.eos_token_id = [1, 2, 3, 4]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    pruned = prune(model, depth(model, 0, 2))
    assert pruned.config.num_hidden_layers == 2
    assert pruned.config.layer_types == ["sliding_attention"] * 2
    assert (pruned.config.no_rope_layers, pruned.config.mlp_only_layers) == ([1, 0], [1])
    assert pruned.config.eos_token_id == [1, 2, 3, 4]
    assert layer_indices(pruned) == [0, 1]
    assert pruned.model.config is pruned.config
    assert len(model.config.layer_types) == 4  # the original's
    assert layer_indices(model) == [0, 1, 2, 3]
    for new, old in enumerate((1, 3)):
        for name, parameter in pruned.model.layers[new].named_parameters():
            assert torch.equal(parameter, before[f"model.layers.{old}.{name}"])


def test_experts_in_every_second_layer_stay_where_they_are(tmp_path, token_batch):
    model = make_tiny("qwen3_moe", num_hidden_layers=6, decoder_sparse_step=2, mlp_only_layers=[3])
    assert [b.has_experts for b in blocks_of(model)] == [False, True, False, False, False, True]
    masks = depth(model, 0, 4)
    pruned = prune(model, masks)
    assert (pruned.config.mlp_only_layers, pruned.config.decoder_sparse_step) == ([1, 2], 1)
    with masked(model, masks):
        assert (pruned(token_batch).logits - model(token_batch).logits).abs().max() <= 1e-4
    again = AutoModelForCausalLM.from_pretrained(save_pruned(pruned, None, tmp_path / "model"))
    assert torch.equal(again(token_batch).logits, pruned(token_batch).logits)


def test_a_model_that_computes_from_the_numbers_of_its_layers_keeps_all_of_them(token_batch):
    model = make_tiny("gpt2", num_hidden_layers=4, scale_attn_by_inverse_layer_idx=True)
    said = r"^Model type 'gpt2' .*: attn\.scaling of layer 2 is 0\.1\d+, but 0\.1\d+ as layer 1\."
    with pytest.raises(UserError, match=said):
        prune(model, depth(model, 1))
    masks = depth(model, 3)  # no other layer gets another number
    with masked(model, masks):
        assert (prune(model, masks)(token_batch).logits - model(token_batch).logits).abs().max() <= 1e-4


def test_pruned_without_a_block_and_then_again_equals_pruned_once(token_batch):
    model = make_tiny_llama(num_hidden_layers=5)
    first = prune(model, depth(model, 1))  # 0 2 3 4 stay
    second = prune(first, depth(first, narrow=True))
    third_masks = depth(second, 2)  # 0 2 4 stay
    third = prune(second, third_masks)
    once = prune(model, depth(model, 1, 3, narrow=True))
    assert widths(third) == widths(once) == {"neurons": [32] * 3, "kv_groups": [1] * 3}
    assert layer_indices(third) == [0, 1, 2]
    for (name, a), (_, b) in zip(third.named_parameters(), once.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    assert torch.equal(third(token_batch).logits, once(token_batch).logits)
    with masked(second, third_masks):
        continued = second.generate(token_batch[:2, :9], **GREEDY)
    assert torch.equal(third.generate(token_batch[:2, :9], **GREEDY), continued)


def test_masks_that_keep_no_block_are_refused(tiny_model):
    with pytest.raises(ValueError, match="keep at least 1 of 3 blocks; got 0"):
        prune(tiny_model, depth(tiny_model, 0, 1, 2))


def test_experts_pruned_again_to_widths_of_grouped_kernels_use_them_again():
    model = make_tiny("mixtral")

    def cut(model, kept):
        blocks = blocks_of(model)
        ffn = [(torch.arange(b.neurons) < kept).repeat(b.experts) for b in blocks]
        return prune(model, Masks(ffn, [torch.ones(b.kv_groups, dtype=torch.bool) for b in blocks]))

    default = model.config._experts_implementation
    odd = cut(model, 45)
    assert (odd.config._experts_implementation, default) == ("eager", "grouped_mm")
    assert cut(odd, 16).config._experts_implementation == default
    model.config._experts_implementation = "eager"  # as somebody wants it
    assert cut(model, 16).config._experts_implementation == "eager"


@pytest.mark.parametrize(("width", "aligned"), [(16, True), (12, False)])
def test_a_convolution_does_not_keep_experts_from_grouped_kernels(width, aligned):
    model = nn.ModuleDict({"convolution": nn.Conv1d(8, 8, 4, groups=8)})
    model.register_parameter("down_proj", nn.Parameter(torch.zeros(4, 32, width)))
    assert experts_aligned(model) == aligned
