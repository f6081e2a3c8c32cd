"""The small world of the tests: tiny random models of many types without downloads, their statistics, and masks.

`tiny_run` has whole runs of seconds, and `synthetic_run` the files of a finished run.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)

from experiments.architectures import default_config
from gprune.calibration.collector import Collector
from gprune.calibration.statistics import CorpusStatistics
from gprune.discovery import family_of
from gprune.discovery.tiny import EXPERT_NEURONS, NEURONS, shrunk, tiny_model
from gprune.importance import IMPORTANCE
from gprune.models.masks import Masks
from gprune.models.units import units_of
from gprune.registry import Registry
from gprune.sparsity.cut import keep_top
from gprune.units.structure import Units

T = TypeVar("T")

BUILT_IN_METRICS = tuple(IMPORTANCE)  # `conftest.py` imports this module before any test registers a metric


@contextmanager
def restored(*registries: Registry) -> Iterator[None]:
    """Restore the entries of registries at the end. There is no public way to remove an entry."""
    with pytest.MonkeyPatch.context() as patch:
        for registry in registries:
            patch.setattr(registry, "_entries", dict(registry._entries))
        yield


# --- models


def make_tiny_llama(**overrides) -> LlamaForCausalLM:
    """Return a random Llama with grouped-query attention (4 query heads, 2 KV groups), in float32, frozen."""
    settings = {
        "vocab_size": 128, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256,
        "tie_word_embeddings": True, "bos_token_id": 1, "eos_token_id": 2,
        "initializer_range": 0.25,  # with the usual 0.02, the logits of a random model hardly depend on the FFN
    } | overrides  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**settings)).eval().requires_grad_(False)


TYPES = (
    "llama", "mistral", "qwen2", "qwen3", "smollm3", "granite", "gemma2", "gemma3_text", "olmo2", "phi3", "opt",
    "gpt_neox", "gpt2", "mixtral", "qwen3_moe", "olmoe",
)  # fmt: skip
WITH_EXPERTS = ("mixtral", "qwen3_moe", "olmoe")
# Name of the FFN width in the config, where it is not `intermediate_size`
WIDTHS = {"opt": "ffn_dim", "gpt2": "n_inner", "qwen3_moe": "moe_intermediate_size"}
SIZES = {
    "vocab_size": 128, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 8, "max_position_embeddings": 256, "sliding_window": 16, "num_experts": 4, "num_local_experts": 4,
    "num_experts_per_tok": 2, "word_embed_proj_dim": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    # Factors of Granite, for which the default 1 would not detect an ignored factor
    "logits_scaling": 4.0, "embedding_multiplier": 3.0, "residual_multiplier": 0.7, "attention_multiplier": 0.2,
}  # fmt: skip


def make_tiny(family: str, *, neurons: int = 48, **overrides: Any) -> PreTrainedModel:
    """Return a random model in float32, frozen. Biases and norms are random too, so that tests detect an ignored one.

    Args:
        family: a model type of transformers.
        neurons: FFN width, or width of each expert.
        overrides: other entries of the config.
    """
    config_class = CONFIG_MAPPING[family]
    default = config_class()
    settings = {name: value for name, value in SIZES.items() if hasattr(default, name)}
    settings |= {"intermediate_size": neurons, WIDTHS.get(family, "intermediate_size"): neurons}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_class(**settings | overrides)).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(5)
    norm_centre = 0.0 if family.startswith("gemma") else 1.0  # Gemma multiplies by 1 + weight
    for name, parameter in model.named_parameters():
        is_norm = parameter.dim() <= 1 and not name.endswith("bias")
        # With the usual scale 0.02, the logits of a random model hardly depend on the FFN.
        scale, centre = (0.3, norm_centre) if is_norm else (0.25, 0.0)
        parameter.copy_(centre + scale * torch.randn(parameter.shape, generator=generator))
    family_of(model)
    return model


def tiny_of(config: PreTrainedConfig) -> PreTrainedModel:
    """Return a random model of a tiny configuration, with its structure."""
    model = tiny_model(config)
    family_of(model)
    return model


# Mixtures of which whole experts can be removed, with 8 experts. Routers of the second and third choose experts of one
# of two groups.
GROUPS = {"n_group": 2, "topk_group": 1}
MIXTURES: dict[str, dict[str, Any]] = {
    "mixtral": {}, "deepseek_v3": GROUPS, "glm4_moe": GROUPS, "qwen3_moe": {}, "olmoe": {}, "gpt_oss": {},
    "qwen2_moe": {}, "ernie4_5_moe": {"moe_layer_start_index": 1}, "granitemoe": {}, "phimoe": {}, "minimax_m2": {},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "full_attention"]}, "afmoe": {},
}  # fmt: skip
WIDER = {NEURONS: 64, EXPERT_NEURONS: 32}  # widths whose half is a multiple of 8, as grouped kernels need


def mixture(name: str, **overrides: Any) -> PreTrainedModel:
    """Return a tiny random mixture of `MIXTURES`, frozen, with correction biases of routers other than zero."""
    config = shrunk(default_config(name)).to_dict()
    config |= {key: WIDER[value] for key, value in config.items() if type(value) is int and value in WIDER}
    experts = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    config |= dict.fromkeys(config.keys() & experts, 8)
    model = tiny_of(CONFIG_MAPPING[name](**config | MIXTURES[name] | overrides)).requires_grad_(False)
    for buffer_name, buffer in model.named_buffers():
        if "bias" in buffer_name:
            buffer += torch.randn(buffer.shape, generator=torch.Generator().manual_seed(4)) / 8
    return model


# --- statistics


def collect(
    model: PreTrainedModel, batches: Iterable[dict[str, Tensor]], *, gram: bool = False, saliency: Sequence[str] = (),
    routing: bool = False,
) -> CorpusStatistics:  # fmt: skip
    """Return the statistics of a corpus from one pass over its batches.

    Args:
        batches: with `input_ids` (B, T), optionally `weight` (B,), and the half of each window in `half` (B,); without
            `half`, windows alternate between halves by their `index` (B,).
    """
    with Collector(model, gram=gram, saliency=saliency, routing=routing) as collector:
        for batch in batches:
            half = batch["half"] if "half" in batch else batch["index"] % 2
            collector.observe(batch["input_ids"], half, batch.get("weight"))
    return collector.compute()


def hooks_of(model: nn.Module) -> int:
    """Return the number of forward hooks and forward pre-hooks of all modules."""
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())


# --- masks


def units_without_model(
    block: int, neurons: int, kv_groups: int = 1, *, neuron: int = 1, group: int = 1, whole: int = 900, expert: int = 0,
    experts: int = 1,
) -> list[Units]:  # fmt: skip
    """Units of a layer that is one block, with their numbers, and costs in parameters, as `budget_of` reads them.

    Costs are those of a neuron (summed over experts), a KV group, the whole layer, and a whole expert.
    """
    layer = Units(f"layer.{block}", "layer", block, 1, whole, least=0)
    router = Units(f"experts.{block}", "experts", block, experts, expert)
    inside = router.key if experts > 1 else ""
    return [
        layer, *([router] if experts > 1 else []), Units(f"kv_groups.{block}", "kv_groups", block, kv_groups, group),
        Units(f"neurons.{block}", "neurons", block, neurons, neuron, rows=experts, inside=inside),
    ]  # fmt: skip


def by_key(neurons: Iterable[T], kv_groups: Iterable[T] | None = None) -> dict[str, T]:
    """Return values by key of units from those of the neurons and of the KV groups of each block."""
    values = {f"neurons.{b}": value for b, value in enumerate(neurons)}
    return values | {f"kv_groups.{b}": value for b, value in enumerate(kv_groups or ())}


def units_of_kind(model: nn.Module, kind: str) -> list[Units]:
    """Return the units of one kind of a model; of neurons and of KV groups one set per block, which may be empty."""
    return [u for u in units_of(model) if u.kind == kind]


def some_masks(model: nn.Module, kept: Sequence[int] = (17, 48, 33), *, attention: bool, seed: int = 3) -> Masks:
    """Keep random neurons: `kept` of each block, or of each of its experts.

    With `attention`, also remove one KV group from the first and the last block if they have two or more.
    """
    generator = torch.Generator().manual_seed(seed)
    ffn, groups = [], []
    for u, n in zip(units_of_kind(model, "neurons"), kept, strict=True):
        noise = torch.rand(u.size, generator=generator)
        ffn.append(keep_top(noise.view(u.rows, -1), n).flatten())
    for u in units_of_kind(model, "kv_groups"):
        keep = torch.ones(u.count, dtype=torch.bool)
        if attention and u.count > 1 and u.number != 1:
            keep[u.number % u.count] = False
        groups.append(keep)
    return Masks.of_blocks(ffn, groups)


def masks_keeping(
    neurons: Sequence[int], groups: Sequence[int], of_neurons: int = 48, of_groups: int = 2, seed: int = 0
) -> Masks:
    """Keep these numbers of neurons and of KV groups of each block, at random positions."""
    generator = torch.Generator().manual_seed(seed)

    def keep(count: int, total: int) -> Tensor:
        mask = torch.zeros(total, dtype=torch.bool)
        mask[torch.randperm(total, generator=generator)[:count]] = True
        return mask

    return Masks.of_blocks([keep(n, of_neurons) for n in neurons], [keep(g, of_groups) for g in groups])


def masks_without(model: nn.Module, *removed: int, narrow: bool = False) -> Masks:
    """Remove these layers. `narrow` also removes a third of the units of the other layers."""

    def keep(count: int, kept: bool) -> Tensor:
        return torch.tensor([kept and not (narrow and i % 3 == 1) for i in range(count)], dtype=torch.bool)

    masks = (
        [keep(u.size, u.layer not in removed) for u in units_of_kind(model, kind)] for kind in ("neurons", "kv_groups")
    )
    return Masks.of_blocks(*masks)
