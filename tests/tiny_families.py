"""Tiny random models of sixteen families, made from the configuration classes of transformers."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from gprune.discovery import family_of
from gprune.discovery.tiny import tiny_model
from gprune.models.blocks import blocks_of
from gprune.models.masks import Masks
from gprune.sparsity.cut import keep_top_neurons

TYPES = (
    "llama", "mistral", "qwen2", "qwen3", "smollm3", "granite", "gemma2", "gemma3_text", "olmo2", "phi3", "opt",
    "gpt_neox", "gpt2", "mixtral", "qwen3_moe", "olmoe",
)  # fmt: skip
WITH_EXPERTS = ("mixtral", "qwen3_moe", "olmoe")
# Name of the FFN width in the config, where it is not `intermediate_size`
WIDTHS = {"opt": "ffn_dim", "gpt2": "n_inner", "qwen3_moe": "moe_intermediate_size"}
SIZES = {
    "vocab_size": 128,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "sliding_window": 16,
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "word_embed_proj_dim": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    # Factors of Granite, for which the default 1 would not detect an ignored factor
    "logits_scaling": 4.0,
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.7,
    "attention_multiplier": 0.2,
}


def make_tiny(family: str, *, neurons: int = 48, **overrides: Any) -> PreTrainedModel:
    """Return a random model in float32, frozen. Biases and norms are random too, so that tests detect an ignored one.

    Args:
        family: a model type of transformers.
        neurons: FFN width, or width of each expert.
        overrides: other entries of the config.
    """
    config_class = CONFIG_MAPPING[family]
    default_config = config_class()
    settings = {name: value for name, value in SIZES.items() if hasattr(default_config, name)}
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


def some_masks(model: nn.Module, kept: tuple[int, ...] = (17, 48, 33), *, attention: bool, seed: int = 3) -> Masks:
    """Keep random neurons: `kept` of each block, or of each of its experts.

    With `attention`, also remove one KV group from the first and the last block if they have two or more.
    """
    generator = torch.Generator().manual_seed(seed)
    ffn, groups = [], []
    for block, n in zip(blocks_of(model), kept, strict=True):
        noise = torch.rand(block.all_neurons, generator=generator)
        ffn.append(keep_top_neurons(block, noise, n))
        keep = torch.ones(block.kv_groups, dtype=torch.bool)
        if attention and block.kv_groups > 1 and block.index != 1:
            keep[block.index % block.kv_groups] = False
        groups.append(keep)
    return Masks(ffn, groups)
