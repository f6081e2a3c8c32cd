"""Published models: their configurations, on the meta device, pass the checks before a run, and all units are found.

Rows have the values of config.json files that their type's default configuration does not have.
"""

from __future__ import annotations

import copy

import pytest
from transformers import CONFIG_MAPPING

from gprune.discovery import check_structure, family_of
from gprune.models.copies import skeleton
from tests.world import units_of_kind

LONGROPE = {"type": "longrope", "short_factor": [1.05] * 48, "long_factor": [1.18] * 48}
LLAMA3 = {
    "rope_type": "llama3", "factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
YARN = {
    "type": "yarn", "factor": 40, "beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0,
    "original_max_position_embeddings": 4096,
}  # fmt: skip


def sizes(hidden: int, width: int, layers: int, heads: int, groups: int | None = None, **others: object) -> dict:
    """Return values of a config.json by their usual names."""
    return {
        "hidden_size": hidden, "intermediate_size": width, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": groups or heads,
    } | others  # fmt: skip


# Name of a model -> type, values, number of blocks, neurons of the last block (of one expert), and KV groups (0:
# attention is not pruned)
PUBLISHED = {
    "phi-2": ("phi", sizes(2560, 10240, 32, 32, vocab_size=51200, partial_rotary_factor=0.4), 32, 10240, 32),
    "Phi-4-mini-instruct": (
        "phi3",
        sizes(
            3072, 8192, 32, 24, 8, vocab_size=200064, max_position_embeddings=131072, rope_scaling=LONGROPE,
            original_max_position_embeddings=4096, sliding_window=262144, partial_rotary_factor=0.75,
            tie_word_embeddings=True,
        ),
        32, 8192, 8,
    ),
    "Phi-3.5-MoE-instruct": (
        "phimoe",
        sizes(
            4096, 6400, 32, 32, 8, vocab_size=32064, max_position_embeddings=131072, num_local_experts=16,
            num_experts_per_tok=2, attention_bias=True, lm_head_bias=True, sliding_window=131072,
            original_max_position_embeddings=4096,
            rope_scaling={
                "type": "longrope", "short_factor": [1.05] * 64, "long_factor": [1.18] * 64, "short_mscale": 1.243,
                "long_mscale": 1.243, "original_max_position_embeddings": 4096,
            },
        ),
        32, 6400, 8,
    ),
    "Llama-3.2-1B": (
        "llama",
        sizes(
            2048, 8192, 16, 32, 8, head_dim=64, vocab_size=128256, rope_theta=500000.0, rope_scaling=LLAMA3,
            max_position_embeddings=131072, tie_word_embeddings=True,
        ),
        16, 8192, 8,
    ),
    "gemma-3-1b": (
        "gemma3_text",
        sizes(1152, 6912, 26, 4, 1, head_dim=256, vocab_size=262144, sliding_window=512, sliding_window_pattern=6),
        26, 6912, 0,
    ),
    "gpt-oss-20b": (
        "gpt_oss",
        sizes(
            2880, 2880, 24, 64, 8, head_dim=64, vocab_size=201088, num_local_experts=32, num_experts_per_tok=4,
            sliding_window=128, layer_types=["sliding_attention", "full_attention"] * 12,
        ),
        24, 2880, 8,
    ),
    "DeepSeek-V2-Lite": (
        "deepseek_v2",
        sizes(
            2048, 10944, 27, 16, first_k_dense_replace=1, kv_lora_rank=512, q_lora_rank=None, n_routed_experts=64,
            moe_intermediate_size=1408, n_shared_experts=2, num_experts_per_tok=6, n_group=1, topk_group=1,
            topk_method="greedy", qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128, vocab_size=102400,
            rope_scaling=YARN, max_position_embeddings=163840,
        ),
        53, 2816, 16,
    ),
    "opt-350m": (
        "opt",
        {
            "hidden_size": 1024, "ffn_dim": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
            "word_embed_proj_dim": 512, "do_layer_norm_before": False,
        },
        24, 4096, 16,
    ),
    "falcon-7b": (
        "falcon",
        {
            "hidden_size": 4544, "num_hidden_layers": 32, "num_attention_heads": 71, "multi_query": True,
            "parallel_attn": True, "bias": False, "alibi": False, "new_decoder_architecture": False,
        },
        32, 18176, 0,
    ),
    "stablelm-2-1_6b": (
        "stablelm",
        sizes(2048, 5632, 24, 32, vocab_size=100352, partial_rotary_factor=0.25, use_qkv_bias=True), 24, 5632, 32,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_units_of_a_published_configuration_are_found(name):
    model_type, values, number, neurons, kv_groups = PUBLISHED[name]
    config = CONFIG_MAPPING[model_type](**copy.deepcopy(values))  # classes change nested values in place
    model = skeleton(config, record=family_of(config))
    check_structure(model)
    counts = [u.count for u in units_of_kind(model, "neurons")]
    assert (len(counts), counts[-1]) == (number, neurons)
    assert max(u.count for u in units_of_kind(model, "kv_groups")) == kv_groups
