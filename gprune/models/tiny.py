"""Make a tiny configuration of transformers: same structure and flags, small sizes.

Sizes are recognised by names of fields. The small sizes are distinguishable: no two of heads, key/value heads, head
size, widths of FFN and expert, and hidden size are equal, or one twice the other. Lists by layer are shortened such
that every kind of layer remains.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

import torch
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel

from gprune.models.lookup import auto_class
from gprune.models.modeling_pruned import PREFIX

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, NEURONS, EXPERT_NEURONS, SHARED_NEURONS = 48, 6, 3, 8, 44, 20, 28
VOCABULARY, POSITIONS, EXPERTS, ROUTED, LAYERS = 136, 128, 4, 2, 3

# Pattern of the full name of a field -> its value in a tiny configuration. The first match is used.
RULES: tuple[tuple[str, int], ...] = (
    (r".*_group_vocab|.*vocab_size_base|.*_vocab_size.*", VOCABULARY),
    (r"n_(input|output)_layers", 1),
    (r"mm_tokens_per_image", 4),
    (r".*_(cycles|loops)", 2),
    (r"mamba_d_ssm|mamba_intermediate_size", 2 * HIDDEN),
    (r"(?:.*_)?vocab_size(_per_layer_input)?|ngram_size|entity_vocab_size", VOCABULARY),
    (r"(n|num|kv|encoder|decoder)_.*shared_layers|num_nextn_predict_layers|num_mtp_layers|num_memory_layers", 0),
    (r"(num_)?(hidden|decoder|encoder)_?layers|num_hidden_layers|n_layers?|num_layers|num_blocks|num_encoder_layers"
     r"|num_decoder_layers|depth", LAYERS),
    (r"num_(key_value|kv)_(heads|groups)|n_(head_kv|kv_heads?)|multi_query_group_num|kv_n_heads|swa_num_key_value_heads"
     r"|num_global_key_value_heads|global_num_key_value_heads|head_kv|num_kv_attention_heads", KV_HEADS),
    (r"(linear_)?num_(key|value)_heads|linear_num_heads|num_linear_.*heads|index_n_heads|index_num_heads", 4),
    (r"mamba_(n|num)_heads|mamba_nheads", 2 * HIDDEN // HEAD_DIM),
    (r"(swa_|num_)?(global_|linear_)?(attention_)?heads|n_heads?|num_(attention|encoder_attention|decoder_attention)_heads"
     r"|(encoder|decoder)_attention_heads|num_heads|swa_num_attention_heads|num_global_attention_heads", HEADS),
    (r"(linear_)?(key|value)_head_dim|head_dim|attention_head_dim|(global|swa|local)_(v_)?head_dim|v_head_dim|d_kv|d_head"
     r"|mamba_(d_head|head_dim)|mamba_headdim|qk_(nope|rope)_head_dim|attention_key_dim|kv_channels|index_head_dim"
     r"|swa_v_head_dim|linear_head_dim|dim_head|size_per_head|rotary_dim|qk_rope_head_dim|head_size", HEAD_DIM),
    (r"qk_head_dim", 2 * HEAD_DIM),
    (r"(q|kv|o|v|index)_lora_rank|.*_lora_rank|.*low_rank.*dim|time_step_rank|mamba_dt_rank|hidden_size_per_layer_input"
     r"|embedding_rank|adapter_rank", 16),
    (r"shared_(expert_)?intermediate_size|moe_shared_expert_intermediate_size|shared_mlp_.*size", SHARED_NEURONS),
    (r"(moe|expert|routed)_?.*(intermediate|ffn_hidden|ffn)_(size|dim)|expert_ffn_hidden_size|moe_.*hidden_size"
     r"|expert_hidden_size|moe_intermediate_size", EXPERT_NEURONS),
    (r".*(intermediate|ffn|inner|feed_?forward|ff|mlp)_?(hidden_)?(size|dim)?(_mlp)?|n_inner|d_inner|ffn_dim|d_ff"
     r"|(en|de)coder_ffn_dim|ffn_hidden_size|mlp_hidden_size|block_ff_dim|d_ffn", NEURONS),
    (r"num_experts_per_(tok|token)|(moe_)?top_?k|moe_top_k|num_selected_experts|n_activated_experts|experts_per_tok"
     r"|num_experts_per_topk|moe_topk|moe_k|topk", ROUTED),
    (r"(n|num|moe_num)_?shared_experts?|(moe_)?num_null_experts", 1),
    (r"(n|num|moe_num|zero|n_routed|num_local|num_routed)_(expert_num|experts?)|n_routed_experts|num_local_experts"
     r"|zero_expert_num", EXPERTS),
    (r"n_group|topk_group|num_expert_group|num_groups?|n_groups|mamba_n_?groups|topk_groups|ssm_n_groups", 1),
    (r".*hidden_(size|dim)|d_model|n_embd|embedding_size|word_embed_proj_dim|embed_dim|emb_dim|lru_width|dim_model"
     r"|backbone_hidden_size|attention_hidden_size|target_hidden_size|altup_.*size|projection_dim|output_hidden_size|"
     r"model_dim|hidden_size_.*", HIDDEN),
    (r"(max|n)_(.*_)?(positions?|position_embeddings|seq_?len|sequence_length|context)|n_positions|n_ctx|seq_length"
     r"|max_seq_len|max_position_embeddings|model_max_length|max_source_positions|max_target_positions", POSITIONS),
    (r"(.*_)?(state_size|d_state|ssm_state_size)", 8),
    (r"(.*_)?(attention_)?(sliding_window|chunk_size|window_size|attention_window_size|attention_chunk_size"
     r"|mamba_chunk_size|swa_window_size|window)(_size)?", 16),
    (r"index_topk|index_top_k", 8),
    (r"first_k_dense_replace|num_dense_layers|moe_layer_start_index|n_dense_layers|first_dense_layers|dense_layers", 1),
    (r"image_size|input_size", 32),
    (r"patch_size", 8),
)  # fmt: skip
COMPILED = tuple((re.compile(pattern), value) for pattern, value in RULES)
TOKENS = re.compile(r"(.*_)?(token_id|token_index|tokens?_ids?)")
KINDS = re.compile(r".*layer.*(types?|pattern)|.*block_types?|.*pattern|attention_types|.*_types")
NUMBERS = re.compile(r"(mlp_only|dense|moe|full_attn|attn).*(idxs|indices|layers)")
PER_LAYER = re.compile(r".*layers?.*|.*types|.*windows?|.*pattern|.*sparsity.*|.*widths?|.*(intermediate|heads).*")


def shrunk(config: PreTrainedConfig) -> PreTrainedConfig:
    """Return a tiny configuration of the same class with the same structure.

    Raises:
        Exception: of any class, if the configuration class rejects the sizes.
    """
    content = copy.deepcopy(config.to_dict())
    for name in ("quantization_config", "architectures", "auto_map", "transformers_version", "_name_or_path"):
        content.pop(name, None)
    _shrink(content, config)
    made = type(config)(**content)
    made.dtype = torch.float32
    return made


def tiny_model(config: PreTrainedConfig, seed: int = 0) -> PreTrainedModel:
    """Return a random model of a tiny configuration, on the CPU in float32, without changing global random state.

    Weights are large, so that every part has an effect. Norms and biases are random too.
    """
    config = copy.deepcopy(config)
    for name in ("_attn_implementation", "_experts_implementation"):
        with suppress(Exception):
            setattr(config, name, "eager")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # only the CPU generator, whose state is restored
        model = auto_class(config).from_config(config, dtype=torch.float32).eval().float()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.is_floating_point():
                    parameter.add_(torch.randn(parameter.shape) * (0.2 if parameter.dim() > 1 else 0.3))
    return model


def stock_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """Return the stock configuration of a pruned model's configuration; others are returned unchanged."""
    if not config.model_type.startswith(PREFIX):
        return config
    left_out = ("pruned_layout", "per_layer_config", "added_biases", "auto_map", "model_type", "architectures")
    values = {name: value for name, value in config.to_dict().items() if name not in left_out}
    return CONFIG_MAPPING[config.model_type.removeprefix(PREFIX)](**values)


def _depth(content: Mapping[str, Any]) -> int | None:
    """Return the number of layers of a configuration, or None."""
    names = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "num_decoder_layers")
    return next((content[n] for n in names if isinstance(content.get(n), int)), None)


def _chosen(content: Mapping[str, Any], depth: int) -> list[int]:
    """Return the layers to keep, in order: the first of each kind, and others up to `LAYERS`."""
    lists = _lists(content, depth)
    table = {int(index): value for index, value in (content.get("per_layer_config") or {}).items()}
    numbered = _numbered(content, lists).values()
    kinds = [
        (*(str(values[i]) for values in lists.values()), str(table.get(i)), *(i in own for own in numbered))
        for i in range(depth)
    ]
    chosen = {kinds.index(kind) for kind in kinds}
    # Hybrid layers share weights.
    chosen |= {i for i, kind in enumerate(kinds) if "hybrid" in kind and kinds[:i].count(kind) == 1}
    chosen = sorted(chosen)[: 2 * LAYERS]
    others = [index for index in range(depth) if index not in chosen]
    return sorted([*chosen, *others[: max(0, min(LAYERS, depth) - len(chosen))]])


def _lists(content: Mapping[str, Any], depth: int) -> dict[str, list[Any]]:
    return {
        name: value
        for name, value in content.items()
        if isinstance(value, (list, tuple)) and len(value) == depth and PER_LAYER.fullmatch(name)
    }


def _numbered(content: Mapping[str, Any], lists: Mapping[str, Any]) -> dict[str, list[int]]:
    """Return lists of layer numbers, such as those of layers with attention."""
    return {
        name: value
        for name, value in content.items()
        if name not in lists and NUMBERS.fullmatch(name) and isinstance(value, list)
        and all(isinstance(number, int) for number in value)
    }  # fmt: skip


def _shrink(content: dict[str, Any], config: PreTrainedConfig) -> None:
    """Make sizes of a configuration and its nested configurations small, in place."""
    depth, before = _depth(content), dict(content)
    if depth:
        lists, chosen = _lists(content, depth), _chosen(content, depth)
        for name, values in lists.items():
            content[name] = [_smaller(name, values[index]) for index in chosen]
        for name, values in _numbered(content, lists).items():
            content[name] = [new for new, old in enumerate(chosen) if old in values]
        for name in [name for name in content if name.endswith("_layer_period")]:  # so that layers of both kinds remain
            offset = name.replace("_period", "_offset")
            if content[name] > 2 and content.get(offset, depth) < depth:
                content[name], content[offset] = 2, 1
    if depth and content.get("per_layer_config"):
        table = {int(index): value for index, value in content["per_layer_config"].items()}
        smaller = {i: {n: _smaller(n, v) for n, v in own.items()} for i, own in table.items()}
        content["per_layer_config"] = {new: smaller[old] for new, old in enumerate(chosen) if old in smaller}
    for rope in _dicts_with(content, "mrope_section"):
        if rope["mrope_section"] is not None:  # three parts of half the head size
            rope["mrope_section"] = [2, 1, 1]
    for name, value in content.items():
        if isinstance(value, dict):
            sub = config.__dict__.get(name)
            if isinstance(sub, PreTrainedConfig):
                _shrink(value, sub)
            elif name in ("ffn_config", "attn_config"):
                _shrink(value, config)
        elif TOKENS.fullmatch(name):
            content[name] = _token(name, value)
        elif isinstance(value, int) and not isinstance(value, bool) and value > 0:
            content[name] = _smaller(name, value)
    if depth:
        for name in ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "num_decoder_layers"):
            if isinstance(content.get(name), int):
                content[name] = len(chosen)
    if "mamba_headdim" in content and "n_mamba_heads" in content:
        content["n_mamba_heads"] = 2 * HIDDEN // HEAD_DIM
    if "attention_hidden_size" in content and before["attention_hidden_size"] == 2 * before.get("hidden_size", 0):
        content["attention_hidden_size"] = 2 * HIDDEN  # Zamba concatenates hidden states and embeddings
        content["attention_head_dim"] = 2 * HIDDEN // content["num_attention_heads"]
    if "expand" in content and isinstance(content.get("num_heads"), int) and "state_size" in content:
        content["num_heads"] = 2 * HIDDEN // HEAD_DIM
    if "num_hidden_layers" in content and "n_recurrent_layers" in content:
        content["n_recurrent_layers"] = content["num_hidden_layers"] - 2
    heads, groups = (next((before[n] for n in names if type(before.get(n)) is int), 0) for names in _HEAD_NAMES)
    for name in _HEAD_NAMES[1]:
        if name in content and groups and groups in (1, heads):  # one key/value head in total, or one per query head
            content[name] = 1 if groups == 1 else next(content[n] for n in _HEAD_NAMES[0] if n in content)


def _dicts_with(content: Any, key: str) -> Iterator[dict[str, Any]]:
    """Yield dictionaries with a key in a configuration, at any depth."""
    if isinstance(content, dict):
        if key in content:
            yield content
        for value in content.values():
            yield from _dicts_with(value, key)


_HEAD_NAMES = (
    ("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"),
    ("num_key_value_heads", "num_kv_heads", "n_head_kv", "multi_query_group_num", "kv_n_heads"),
)


def _smaller(name: str, value: Any) -> Any:
    """Return the value of a field in a tiny configuration."""
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        return value
    for pattern, small in COMPILED:
        if pattern.fullmatch(name):
            return min(value, small)
    return value


def _token(name: str, value: Any) -> Any:
    """Return a token id in the tiny vocabulary."""
    order = ("pad", "bos", "eos")
    small = next((i for i, word in enumerate(order) if word in name), VOCABULARY - 1 - sum(map(ord, name)) % 32)
    if isinstance(value, (list, tuple)):
        return [small] * min(1, len(value))
    return value if value is None or not isinstance(value, int) or value < 0 else small
