"""One property of every type: masked, sliced and reloaded models agree, the price is exact, kept weights are unchanged.

Types cover separate and fused projections, stacked and interleaved experts, shared experts, biases and sinks, norms
over all heads, latent and linear attention, Mamba, convolutions, parallel blocks, layers without an FFN, and images.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel

import gprune
from experiments.architectures import VISION, example, image_arguments
from gprune.discovery import family_of
from gprune.discovery.tiny import shrunk, tiny_model
from gprune.export.hf import save_pruned
from gprune.export.reload import align_weights
from gprune.models.agreement import compare
from gprune.models.experts import least_experts
from gprune.models.families import decoder_layers
from gprune.models.loading import load_weights
from gprune.models.losses import iter_logits, next_token_losses, why_not_measurable
from gprune.models.masks import Masks, masked
from gprune.models.surgery import slice_model
from gprune.models.units import units_of
from gprune.sparsity.budget import budget_of
from tests import tiny_run
from tests.world import MIXTURES, TYPES, hooks_of, make_tiny, masks_without, mixture, tiny_of, units_of_kind

FLAGS = ("attention_bias", "mlp_bias", "enable_bias", "use_parallel_residual")
DISCOVERED = (
    "gemma", "starcoder2", "stablelm", "cohere2", "openai-gpt", "persimmon", "glm4", "falcon", "gptj", "phi", "mpt",
    "bloom", "qwen3_next", "llama4_text", "nemotron_h", "lfm2", "olmo3", "bert", "modernbert-decoder", "xglm",
    "minicpm3", "falcon_h1", "longcat_flash",
)  # fmt: skip
TIED = ("llama", "gemma2", "gpt2", "mixtral")  # also with, or without, a head of its own
OTHER_WIDTHS = (
    "starcoder2",
    "gptj",
    "xglm",
    "bloom",
    "modernbert-decoder",
)  # other keys for the width
# Types in which whole layers are removed, too.
DEEP = ("llama", "gpt2", "qwen2_moe", "gpt_oss", "llama4_text", "hunyuan_v1_moe", "lfm2")
HUNYUAN = {  # of the form of Hunyuan-A13B, with lists by layer
    "head_dim": 128, "num_key_value_heads": 8, "num_experts": 64, "moe_topk": [8] * 32, "num_shared_expert": [1] * 32,
    "moe_intermediate_size": [3072] * 32, "intermediate_size": 3072,
}  # fmt: skip
ROPE = {"rope_type": "llama3", "rope_theta": 5e4, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16}  # fmt: skip


def variants() -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield families with a changed setting: each boolean flag inverted, 1 and 4 KV heads, and settings by layer."""
    yield from (("qwen3_moe", {"mlp_only_layers": [1]}), ("smollm3", {"no_rope_layers": [1, 0, 1]}))
    yield from (("llama", {"head_dim": 12}), ("llama", {"attn_implementation": "eager"}))
    yield "llama", {"rope_parameters": ROPE}
    for name in TYPES:
        default = CONFIG_MAPPING[name]()
        yield from ((name, {f: not getattr(default, f)}) for f in FLAGS if isinstance(getattr(default, f, 0), bool))
    yield from ((name, {"tie_word_embeddings": not CONFIG_MAPPING[name]().tie_word_embeddings}) for name in TIED)
    for name in ("llama", "olmo2", "phi3"):
        yield from ((name, {"num_key_value_heads": number}) for number in (1, 4))


def cases() -> Iterator[pytest.param]:
    """Yield the cases: type, settings, scope, and whether all layers lose equally many units."""
    rows: list[tuple[str, dict[str, Any], str, bool]] = []
    for name in (*TYPES, *DISCOVERED, *sorted(set(MIXTURES) - set(TYPES)), "hunyuan_v1_moe", "gemma3", "qwen3_vl"):
        if name in MIXTURES:  # with other experts in each layer, but all of them in the first one
            rows += [(name, {}, "attention+ffn+experts", False), (name, {}, "ffn+experts", True)]
        if name in TYPES or name not in MIXTURES:
            rows.append((name, {}, "attention+ffn", False))
        if name in (*TYPES, *OTHER_WIDTHS, "hunyuan_v1_moe", "gemma3") and name not in MIXTURES:
            rows.append((name, {}, "ffn", True))
        if name in DEEP:
            rows.append((name, {}, "attention+ffn+blocks", False))
    rows += [(name, settings, "attention+ffn", False) for name, settings in variants()]
    # Lists of layer numbers are renumbered, and layers keep their experts.
    for experts_in in ([0, 1, 2, 3], [1, 3]):
        rows.append(("llama4_text", {"num_hidden_layers": 4, "moe_layers": experts_in}, "ffn+blocks", False))
    settings = {"num_hidden_layers": 6, "decoder_sparse_step": 2, "mlp_only_layers": [3]}
    rows.append(("qwen3_moe", settings, "attention+ffn+blocks", False))
    for name, settings, scope, equal in rows:
        setting = "".join(f"-{key}={value}" for key, value in settings.items() if not isinstance(value, dict))
        quick = not settings and name in (*TYPES, *DISCOVERED[:7], "gpt_oss")
        marks = [] if quick else [pytest.mark.slow]
        yield pytest.param(name, settings, scope, equal, id=f"{name}{setting}-{scope}-{equal}", marks=marks)


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory):
    """Discover each type once."""
    with tiny_run.isolated(tmp_path_factory.mktemp("structures")):
        yield
    model_and_inputs.cache_clear()


@functools.lru_cache(maxsize=1)
def model_and_inputs(name: str, settings: str) -> tuple[PreTrainedModel, dict[str, Tensor]]:
    """Return a tiny random model with its structure, and arguments of a forward pass."""
    settings = json.loads(settings)
    ids = torch.randint(3, 90, (4, 24), generator=torch.Generator().manual_seed(1))
    if name in VISION:
        model = example(name)
        return model, image_arguments(model)
    if name in TYPES or settings:
        return make_tiny(name, **settings), {"input_ids": ids}
    if name == "hunyuan_v1_moe":
        return tiny_of(shrunk(CONFIG_MAPPING[name](**HUNYUAN))).requires_grad_(False), {"input_ids": ids}
    if name not in MIXTURES:
        return example(name), {"input_ids": ids}
    return mixture(name), {"input_ids": ids}


def masks_of(model: PreTrainedModel, scope: str, *, equal: bool) -> Masks:
    """Keep random units: half of each kind, or another number in each block; without the second layer for `blocks`."""
    generator, ffn, attention = torch.Generator().manual_seed(5), [], []
    for u in units_of_kind(model, "neurons"):
        order = torch.rand(u.rows, u.count, generator=generator).argsort(1)
        removed = u.count // 2 if equal else min(u.count - 1, 3 + u.number)
        keep = order >= (removed if "ffn" in scope else 0)
        if "experts" in scope and u.inside:
            groups, least = least_experts(model.config, u.rows)
            of_group = torch.rand(groups, u.rows // groups, generator=generator).argsort(1)
            kept = max(least, u.rows // groups // 2) if equal or u.number else u.rows // groups
            keep &= (of_group < kept).view(-1, 1)
        ffn.append(keep.flatten() & ("blocks" not in scope or u.layer != 1))
    for u in units_of_kind(model, "kv_groups"):
        removed = min(u.count - 1, 1) if "attention" in scope and (equal or u.number != 1) else 0
        keep = (torch.arange(u.count) - u.number) % max(1, u.count) >= removed
        attention.append(keep & ("blocks" not in scope or u.layer != 1))
    return Masks.of_blocks(ffn, attention)


def is_part_of(small: Tensor, tensor: Tensor) -> bool:
    """Return whether a tensor has numbers of another one in the same order."""
    values, positions = tensor.flatten().sort()
    found = torch.searchsorted(values, small.flatten()).clamp_max(len(values) - 1)
    if not torch.equal(values[found], small.flatten()):
        return False
    has_duplicates = bool((values[1:] == values[:-1]).any())
    return has_duplicates or bool((positions[found].diff() > 0).all())


def assert_kept_weights_are_unchanged(model: nn.Module, small: nn.Module, removed: set[int]) -> None:
    """Compare the parameters of the remaining layers, and all parameters outside of layers."""
    layers = [layer for index, layer in enumerate(decoder_layers(model)) if index not in removed]
    for old, new in zip(layers, decoder_layers(small), strict=True):
        before = dict(old.named_parameters())
        for name, parameter in new.named_parameters():
            assert is_part_of(parameter, before[name]), name
    path = next(path for path, module in model.named_modules() if module is decoder_layers(model))
    before = dict(model.named_parameters())
    for name, parameter in small.named_parameters():
        assert name.startswith(f"{path}.") or torch.equal(parameter, before[name]), name


@pytest.mark.parametrize(("name", "settings", "scope", "equal"), cases())
@torch.no_grad()
def test_masked_sliced_and_reloaded_models_agree(name, settings, scope, equal, tmp_path):
    model, inputs = model_and_inputs(name, json.dumps(settings))
    masks = masks_of(model, scope, equal=equal)
    if name in TYPES and settings.get("num_key_value_heads") != 1:
        # Discovery would not find an attention that is sliced or masked wrongly.
        assert all(u.count > 1 for u in units_of_kind(model, "kv_groups"))
    with_units = [u for u in units_of(model) if u.key in masks and u.count]
    removed_layers = {u.layer for u in with_units} - {u.layer for u in with_units if masks[u.key].any()}

    def logits(of: PreTrainedModel) -> Tensor:
        return of(**inputs, use_cache=False).logits

    dense = logits(model)
    with masked(model, masks):
        expected = logits(model)
    assert torch.equal(logits(model), dense)
    assert hooks_of(model) == 0
    scale = float(expected.abs().max())
    assert (expected - dense).abs().max() > 1e-3 * scale  # the masks have an effect

    small = slice_model(model, masks)
    sliced = logits(small)
    torch.testing.assert_close(sliced, expected, atol=1e-4 * scale, rtol=0)
    removed = model.num_parameters() - small.num_parameters()
    assert removed == budget_of(units_of(model), scope="attention+ffn+experts").removed_by(masks) > 0
    assert_kept_weights_are_unchanged(model, small, removed_layers)
    neurons, groups = (units_of_kind(small, kind) for kind in ("neurons", "kv_groups"))
    groups_before = [u for u in units_of_kind(model, "kv_groups") if u.layer not in removed_layers]
    for before, after in zip(groups_before, groups, strict=True):  # KV groups are removed with all heads
        assert (after.repeats, after.settings) == (before.repeats, before.settings) if before.count else not after.count

    folder = save_pruned(small, None, tmp_path / "model")
    is_stock = "auto_map" not in json.loads((folder / "config.json").read_text())
    if name in TYPES or name in MIXTURES:
        has_own_sizes = len({(u.count, u.rows, v.count) for u, v in zip(neurons, groups, strict=True)}) > 1
        assert is_stock == (equal or not has_own_sizes)
    assert is_stock == (not list(folder.glob("*.py")))
    auto = AutoModelForImageTextToText if name in VISION else AutoModelForCausalLM
    attention = {"attn_implementation": model.config._attn_implementation}
    loaded = auto.from_pretrained(folder, trust_remote_code=True, experts_implementation="eager", **attention).eval()
    for each in (small, loaded):
        align_weights(each)
    assert torch.equal(logits(loaded), logits(small))
    if name not in VISION and not equal:  # with the defaults of a family, longer than its sliding window
        assert_generation_agrees(model, masks, loaded, inputs["input_ids"][:2, :9], tokens=3 if settings else 8)
    kernels = [type(each)._can_set_experts_implementation() for each in (loaded, model)]
    assert kernels[0] == kernels[1]  # transformers reads the file of a class
    if name not in VISION and why_not_measurable(small) is None:
        assert_chunked_logits_and_losses_agree(small, inputs["input_ids"], logits(small))
    family_of(loaded)  # and it can be pruned again
    again = slice_model(loaded, masks_of(loaded, "ffn", equal=False))
    assert again.num_parameters() < loaded.num_parameters()
    assert len(decoder_layers(again)) == len(decoder_layers(small))


def assert_chunked_logits_and_losses_agree(model: PreTrainedModel, ids: Tensor, logits: Tensor) -> None:
    """Compare with the head applied in chunks, with the type's scaling or softcap of logits."""
    chunks, targets, _ = (torch.cat(rows) for rows in zip(*iter_logits(model, ids), strict=True))
    torch.testing.assert_close(chunks, logits[:, :-1], atol=1e-4 * float(logits.abs().max()), rtol=0)
    assert torch.equal(targets, ids[:, 1:])
    expected = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(next_token_losses(model, ids).mean(), expected, atol=1e-5, rtol=1e-5)


def assert_generation_agrees(
    model: PreTrainedModel, masks: Masks, loaded: PreTrainedModel, prompt: Tensor, *, tokens: int
) -> None:
    """Compare greedy tokens of the masked model with those of the reloaded one, with and without a cache."""
    settings = {"max_new_tokens": tokens, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with masked(model, masks):
        expected = model.generate(prompt, **settings)
    assert torch.equal(loaded.generate(prompt, **settings), expected)
    assert torch.equal(loaded.generate(prompt, use_cache=False, **settings), expected)


def test_a_changed_window_does_not_change_the_difference_of_a_typical_token():
    """A near tie between experts, which rounding decides, changes one window. A wrong slice changes all."""
    generator = torch.Generator().manual_seed(0)
    expected = torch.randn(8, 16, 50, generator=generator)
    rounded = expected + 1e-6 * torch.randn(expected.shape, generator=generator)
    one_window = rounded.clone()
    one_window[2] += 0.5
    assert compare(expected, one_window).typical < 1e-5 < 0.1 < compare(expected, one_window).rms
    assert compare(expected, rounded + 0.5).typical > 0.4


# --- RWKV divides weights of layers from the seventh on in place in evaluation


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Check that logits are equal, except for rounding and for the epsilon of norms."""
    assert (actual - expected).abs().max() < 1e-4 * expected.abs().max()


def test_a_model_that_has_run_is_pruned_and_saved_with_the_weights_of_its_folder(tmp_path, token_batch):
    settings = shrunk(CONFIG_MAPPING["rwkv"]()).to_dict() | {"num_hidden_layers": 8}
    tiny_model(CONFIG_MAPPING["rwkv"](**settings)).save_pretrained(tmp_path / "dense")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense").eval().requires_grad_(False)
    family_of(model)
    before = model.rwkv.blocks[7].feed_forward.value.weight.clone()
    dense = model(token_batch).logits
    assert torch.equal(2 * model.rwkv.blocks[7].feed_forward.value.weight, before)
    # Saved with the weights of the folder, and loaded with the same logits.
    save_pruned(model, None, tmp_path / "saved")
    saved, original = (load_weights(tmp_path / name) for name in ("saved", "dense"))
    assert all(torch.equal(saved.state_dict()[name], weight) for name, weight in original.state_dict().items())
    family_of(original)
    assert_close(original(token_batch).logits, dense)
    # Masked, sliced and reloaded models agree.
    masks = masks_without(model, narrow=True)
    masks.ffn[7][:7] = True  # layers of unequal widths
    with masked(model, masks):
        expected = model(token_batch).logits
    small = gprune.apply_masks(model, masks)
    assert_close(small(token_batch).logits, expected)
    folder = save_pruned(small, None, tmp_path / "small")
    reloaded = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    assert torch.equal(reloaded(token_batch).logits, small(token_batch).logits)
    assert_close(model(token_batch).logits, dense)  # the model of the user computes the same as before
