"""Make a tiny configuration of transformers: same structure and flags, small sizes.

Sizes are recognised by names of fields. The small sizes are distinguishable: no two of heads, key/value heads, head
size, widths of FFN and expert, and hidden size are equal, or one twice the other, except that there are two heads per
key/value head. Lists by layer are shortened such that every kind of layer remains.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

import torch
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel

from gprune.models.copies import auto_class
from gprune.models.families import PRUNED
from gprune.models.surgery import lists_of_layer_numbers, per_layer_lists

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, NEURONS, EXPERT_NEURONS, SHARED_NEURONS = 48, 6, 3, 8, 44, 20, 28
VOCABULARY, POSITIONS, EXPERTS, ROUTED, LAYERS = 136, 128, 4, 2, 3

# Pattern of the full name of a field -> its largest value in a tiny configuration. The first match is used.
RULES: tuple[tuple[str, int], ...] = (
    (r".*_group_vocab|.*vocab_size_base|.*_vocab_size.*", VOCABULARY),
    (r"n_(input|output)_layers", 1),
    (r"mm_tokens_per_image", 4),
    (r".*_(cycles|loops)", 2),
    (r"mamba_d_ssm|mamba_intermediate_size", 2 * HIDDEN),
    (r"(?:.*_)?vocab_size(_per_layer_input)?|ngram_size|entity_vocab_size", VOCABULARY),
    (r"(n|num|kv|encoder|decoder)_.*shared_layers|num_nextn_predict_layers|num_mtp_layers|num_memory_layers", 0),
    (r"(num_)?(hidden|decoder|encoder)_?layers|num_hidden_layers|n_layers?|num_layers(_per_stack)?|num_blocks"
     r"|num_encoder_layers|num_decoder_layers|depth", LAYERS),
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
    (r"(q|kv|o|v|index)_lora_rank|.*_lora_rank|laurel_rank|.*low_rank.*dim|time_step_rank|mamba_dt_rank|hidden_size_per_layer_input"
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
# Patterns of names of fields: with the number of layers that share tensors of other layers, and with token ids.
SHARED_LAYERS = re.compile(r"(n|num|kv|encoder|decoder)_.*shared_layers")
TOKEN_IDS = re.compile(r"(.*_)?(token_id|token_index|tokens?_ids?)")
# Names of fields with the number of layers, query heads, and key/value heads. The first that exists is used.
DEPTH_NAMES = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "num_decoder_layers")
HEAD_NAMES = ("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads")
KV_HEAD_NAMES = ("num_key_value_heads", "num_kv_heads", "n_head_kv", "multi_query_group_num", "kv_n_heads")


def shrunk(config: PreTrainedConfig, *, all_layers: bool = False) -> PreTrainedConfig:
    """Return a tiny stock configuration of the same structure. `all_layers` keeps the number of layers."""
    config = stock_config(config)
    content = copy.deepcopy(config.to_dict())
    for name in ("quantization_config", "architectures", "auto_map", "transformers_version", "_name_or_path"):
        content.pop(name, None)
    _shrink(content, config, all_layers=all_layers)
    tiny = type(config)(**content)
    tiny.dtype = torch.float32
    return tiny


def tiny_model(config: PreTrainedConfig, seed: int = 0) -> PreTrainedModel:
    """Return a random model of a tiny configuration, on the CPU in float32, without changing global random state.

    Weights are large, so that every part has an effect. Norms and biases are random too. Attention and experts use the
    implementation `eager`.
    """
    config = copy.deepcopy(config)
    for name in ("_attn_implementation", "_experts_implementation"):
        with suppress(Exception):  # some classes do not have both
            setattr(config, name, "eager")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # only the CPU generator, whose state is restored
        model = auto_class(config).from_config(config, dtype=torch.float32).eval().float()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.is_floating_point():
                    scale = 0.2 if parameter.dim() > 1 else 0.3
                    parameter.add_(torch.randn(parameter.shape) * scale)
    return model


def stock_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """Return the stock configuration of a pruned model's configuration; others are returned unchanged."""
    if not config.model_type.startswith(PRUNED):
        return config
    excluded = ("pruned_layout", "per_layer_config", "added_biases", "auto_map", "model_type", "architectures")
    values = {name: value for name, value in config.to_dict().items() if name not in excluded}
    return CONFIG_MAPPING[config.model_type.removeprefix(PRUNED)](**values)


def _depth(content: Mapping[str, Any]) -> int | None:
    """Return the number of layers of a configuration, or None."""
    return next((content[name] for name in DEPTH_NAMES if isinstance(content.get(name), int)), None)


def _layers_to_keep(content: Mapping[str, Any], depth: int) -> list[int]:
    """Return the layers to keep, in order: the first of each kind, and others up to `LAYERS`.

    Two layers are of the same kind if they have equal values in all lists by layer.
    """
    per_layer = per_layer_lists(content, depth)
    layer_numbers = lists_of_layer_numbers(content, per_layer).values()
    values_by_layer = {int(index): values for index, values in (content.get("per_layer_config") or {}).items()}
    kinds = []
    for index in range(depth):
        values = [str(values[index]) for values in per_layer.values()]
        is_listed = [index in numbers for numbers in layer_numbers]
        kinds.append((*values, str(values_by_layer.get(index)), *is_listed))
    kept = {kinds.index(kind) for kind in kinds}
    # Hybrid layers share weights, so the second one is kept too.
    kept |= {index for index, kind in enumerate(kinds) if "hybrid" in kind and kinds[:index].count(kind) == 1}
    first_kept = sorted(kept)[: 2 * LAYERS]  # a limit for the size of the copy
    others = [index for index in range(depth) if index not in first_kept]
    number_of_others = max(0, min(LAYERS, depth) - len(first_kept))
    return sorted([*first_kept, *others[:number_of_others]])


def _shrink(content: dict[str, Any], config: PreTrainedConfig, *, all_layers: bool) -> None:
    """Make sizes of a configuration and its nested configurations small, in place."""
    original = dict(content)
    depth = _depth(content)
    kept = _keep_layers(content, depth, all_layers=all_layers) if depth else []
    for rope in _dicts_with(content, "mrope_section"):
        if rope["mrope_section"] is not None:  # three parts of half the head size
            rope["mrope_section"] = [2, 1, 1]
    for name, value in content.items():
        if isinstance(value, dict):
            nested = config.__dict__.get(name)
            if isinstance(nested, PreTrainedConfig):
                _shrink(value, nested, all_layers=all_layers)
            elif name in ("ffn_config", "attn_config"):  # of types that nest them as plain dictionaries
                _shrink(value, config, all_layers=all_layers)
        elif TOKEN_IDS.fullmatch(name):
            content[name] = _tiny_token_id(name, value)
        elif not (all_layers and SHARED_LAYERS.fullmatch(name)):  # that number belongs to the number of layers
            content[name] = _tiny_value(name, value)
    if depth:
        for name in DEPTH_NAMES:
            if isinstance(content.get(name), int):
                content[name] = len(kept)
    _restore_relations(content, original)
    for rope in _dicts_with(content, "partial_rotary_factor"):
        if rope["partial_rotary_factor"]:  # channels are rotated in pairs
            rope["partial_rotary_factor"] = max(1, int(rope["partial_rotary_factor"] * HEAD_DIM) // 2) * 2 / HEAD_DIM
    for rope in _dicts_with(content, "long_factor"):  # longrope has a factor for each pair
        pairs = int(rope.get("partial_rotary_factor", 1) * HEAD_DIM) // 2
        rope |= {name: rope[name][:pairs] for name in ("short_factor", "long_factor")}


def _keep_layers(content: dict[str, Any], depth: int, *, all_layers: bool) -> list[int]:
    """Shorten all lists by layer of a configuration to the layers to keep, in place, and return the numbers of these.

    Values of layers in the lists and in `per_layer_config` become small. `all_layers` keeps the number of layers.
    """
    kept = list(range(depth)) if all_layers else _layers_to_keep(content, depth)
    per_layer = per_layer_lists(content, depth)
    for name, values in per_layer.items():
        content[name] = [_tiny_value(name, values[index]) for index in kept]
    for name, numbers in lists_of_layer_numbers(content, per_layer).items():
        content[name] = [new for new, old in enumerate(kept) if old in numbers]
    # Jamba has no list by layer. Layer i has attention if i % attn_layer_period == attn_layer_offset (8 and 4, so the
    # first few layers have none), and experts likewise. With period 2 and offset 1 every second layer is of this kind,
    # with `all_layers` too.
    for period in [name for name in content if name.endswith("_layer_period")]:
        offset = period.replace("_period", "_offset")
        if content[period] > 2 and content.get(offset, depth) < depth:  # there are layers of both kinds
            content[period], content[offset] = 2, 1
    if content.get("per_layer_config"):
        values_by_layer = {int(index): values for index, values in content["per_layer_config"].items()}
        content["per_layer_config"] = {
            new: {name: _tiny_value(name, value) for name, value in values_by_layer[old].items()}
            for new, old in enumerate(kept) if old in values_by_layer
        }  # fmt: skip
    return kept


def _restore_relations(content: dict[str, Any], original: Mapping[str, Any]) -> None:
    """Change small sizes in place, so that they have relations that classes of transformers require."""
    number_of_wide_heads = 2 * HIDDEN // HEAD_DIM  # of Mamba and others with inner states of 2 x the hidden size
    if "mamba_headdim" in content and "n_mamba_heads" in content:
        content["n_mamba_heads"] = number_of_wide_heads
    if "mamba_d_ssm" in content and isinstance(content.get("mamba_d_head"), int):  # falcon_h1
        content["mamba_d_ssm"] = content["mamba_n_heads"] * content["mamba_d_head"]
    elif "mamba_expand" in content and isinstance(content.get("mamba_d_head"), int):  # bamba, granitemoehybrid
        content["mamba_n_heads"] = content["mamba_expand"] * content["hidden_size"] // content["mamba_d_head"]
    if "attention_hidden_size" in content and original["attention_hidden_size"] == 2 * original.get("hidden_size", 0):
        content["attention_hidden_size"] = 2 * HIDDEN  # Zamba concatenates hidden states and embeddings
        content["attention_head_dim"] = 2 * HIDDEN // content["num_attention_heads"]
    if "expand" in content and isinstance(content.get("num_heads"), int) and "state_size" in content:
        content["num_heads"] = number_of_wide_heads
    if "num_hidden_layers" in content and "n_recurrent_layers" in content:  # dory, with 1 input and 1 output layer
        content["n_recurrent_layers"] = content["num_hidden_layers"] - 2
    if "num_layers_per_stack" in content:  # hrm_text: the number of layers that one token passes through
        content["num_hidden_layers"] = content["num_layers_per_stack"] * content["H_cycles"] * (content["L_cycles"] + 1)
    key_size, value_size = original.get("qk_nope_head_dim"), original.get("v_head_dim")
    if type(key_size) is type(value_size) is int and key_size != value_size:  # keys and values of another size
        content["qk_nope_head_dim"] = 2 * HEAD_DIM
    # mistral4: a share of the head dimension is rotated.
    rotary_share = (original.get("rope_parameters") or {}).get("partial_rotary_factor")
    rotary_size = original.get("qk_rope_head_dim")
    if rotary_share and rotary_size and rotary_size == rotary_share * (original.get("head_dim") or 0):
        content["qk_rope_head_dim"] = int(rotary_share * content["head_dim"])
    if {"qk_head_dim", "qk_nope_head_dim", "qk_rope_head_dim"} <= content.keys():
        content["qk_head_dim"] = content["qk_nope_head_dim"] + content["qk_rope_head_dim"]
    heads = next((original[name] for name in HEAD_NAMES if type(original.get(name)) is int), 0)
    kv_heads = next((original[name] for name in KV_HEAD_NAMES if type(original.get(name)) is int), 0)
    for name in KV_HEAD_NAMES:
        if name in content and kv_heads == 1:  # one key/value head in total
            content[name] = 1
        elif name in content and kv_heads and kv_heads == heads:  # one key/value head per query head
            content[name] = next(content[head_name] for head_name in HEAD_NAMES if head_name in content)


def _dicts_with(content: Any, key: str) -> Iterator[dict[str, Any]]:
    """Yield dictionaries with a key in a configuration, at any depth."""
    if isinstance(content, dict):
        if key in content:
            yield content
        for value in content.values():
            yield from _dicts_with(value, key)


def is_size(name: str) -> bool:
    """Return whether a field has a size or a number of units, which is another one in a tiny copy."""
    return any(re.fullmatch(pattern, name) for pattern, _ in RULES)


def _tiny_value(name: str, value: Any) -> Any:
    """Return the value of a field in a tiny configuration, by the rule for its name; unchanged without a rule."""
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        return value
    for pattern, largest in RULES:
        if re.fullmatch(pattern, name):
            return min(value, largest)
    return value


def _tiny_token_id(name: str, value: Any) -> Any:
    """Return a token id, or a list with one id, in the tiny vocabulary. Other values are returned unchanged.

    Ids of pad, bos and eos are 0, 1 and 2. Others are among the last 32 ids, and depend on the name of the field.
    """
    id_from_name = VOCABULARY - 1 - sum(map(ord, name)) % 32
    token_id = next((index for index, word in enumerate(("pad", "bos", "eos")) if word in name), id_from_name)
    if isinstance(value, (list, tuple)):
        return [token_id] * min(1, len(value))
    return value if value is None or not isinstance(value, int) or value < 0 else token_id
