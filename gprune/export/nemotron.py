"""Write a pruned model as DeciLM (`model_type: nemotron-nas`), which engines compute by a class of their own.

vLLM, SGLang, TensorRT-LLM, mlx-lm and exllamav3 have this class: Llama with an FFN width and a number of key/value
heads of its own in each layer. A layer's width is its `intermediate_size`, which vLLM reads, or results from its
`ffn_mult`, which all of them read and round to a multiple of 256. So a folder in which all widths are multiples of 256
(`--sparsity.width_multiple 256`) works everywhere, and any other folder in vLLM and transformers.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from gprune.errors import UserError, quoting
from gprune.export import modeling_decilm
from gprune.export.hf import check_reload, save_tokenizer
from gprune.export.modeling_decilm import MULTIPLE
from gprune.models.agreement import CHECK_TEXT
from gprune.models.blocks import Block, blocks_of
from gprune.models.copies import has_own_head
from gprune.models.gguf import CHECK_TOKENS, difference_from_llama
from gprune.models.modeling_pruned import legacy_rope_settings

log = logging.getLogger("gprune")
# Module of a layer -> our names of its projections -> Llama's names.
PROJECTIONS = {
    "self_attn": {"query": "q_proj", "key": "k_proj", "value": "v_proj", "output": "o_proj"},
    "mlp": {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"},
}
MODEL_TYPE = modeling_decilm.DeciLMConfig.model_type
CONFIG_KEYS = (
    "vocab_size", "hidden_size", "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps",
    "rope_parameters", "bos_token_id", "eos_token_id", "pad_token_id",
)  # fmt: skip

DEFAULT_TYPE, DTYPE = "", "auto"  # weights have the dtype of the model folder


def path_beside(folder: Path, type: str) -> str:
    """Return the path of a folder beside a model folder."""
    return f"{folder}-nemotron-nas"


def check_settings(type: str, *, check: bool = False) -> None:
    """Raise UserError for a type, which is of GGUF files only."""
    if type:
        raise UserError(f"--type must be left out with --format nemotron-nas, which keeps the dtype; got {type}.")


def is_ours(path: Path) -> bool:
    """Return whether a path is a folder of this format."""
    config = path / "config.json"
    return config.is_file() and json.loads(config.read_text(encoding="utf-8")).get("model_type") == MODEL_TYPE


def refuse(blocks: Sequence[Block], config: PreTrainedConfig, *, unequal_heads: bool = False, **_: Any) -> None:
    """Raise UserError if DeciLM cannot compute like a model with these blocks.

    `unequal_heads` tells that pruning may remove another number of heads in each layer.
    """
    heads = [block.heads for block in blocks]
    reason, others = difference_from_llama(blocks, config), "hf"  # GGUF is refused for the same difference
    if reason is None:
        others = "hf or gguf, which vLLM and llama.cpp load"
        if len(set(heads)) > 1:
            reason = f"layers have {min(heads)} to {max(heads)} query heads"
        elif unequal_heads:
            reason = "--sparsity.scope includes attention; --sparsity.uniform_width true removes equally many heads"
    if reason is not None:
        raise UserError(
            f"Cannot export '{blocks[0].family.model_type}' to nemotron-nas: it must compute like Llama with equally "
            f"many query heads in all layers, but {reason}. Export to {others}."
        )


def ffn_settings(width: int, hidden_size: int, *, by_multiplier: bool) -> dict[str, Any]:
    """Return the settings of an FFN, with its width as `ffn_mult` or as `intermediate_size`.

    Engines compute the width 2 / 3 x ffn_mult x hidden_size, rounded up to a multiple of 256. `ffn_mult` is in the
    middle of the numbers that give `width`, so that no rounding of theirs can give another one.
    """
    size: dict[str, Any] = {"intermediate_size": width}
    if by_multiplier:
        size = {"ffn_mult": 3 * (width - MULTIPLE // 2) / (2 * hidden_size)}
    return {"no_op": False, "replace_with_linear": False} | size


def decilm_config(model: PreTrainedModel, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Return the content of config.json. `tensors` is the result of `llama_tensors`."""
    config, blocks = model.config, blocks_of(model)
    values = config.to_dict()
    widths = [block.neurons for block in blocks]
    by_multiplier = all(width % MULTIPLE == 0 for width in widths)
    block_configs = [
        {
            "attention": {
                "no_op": False, "replace_with_linear": False, "n_heads_in_group": block.heads // block.kv_groups,
            },
            "ffn": ffn_settings(block.neurons, config.hidden_size, by_multiplier=by_multiplier),
        }
        for block in blocks
    ]  # fmt: skip
    module = Path(modeling_decilm.__file__).stem
    settings = {key: values[key] for key in CONFIG_KEYS if values.get(key) is not None}
    settings |= legacy_rope_settings(values)
    return settings | {
        "architectures": ["DeciLMForCausalLM"],
        "model_type": MODEL_TYPE,
        "auto_map": {
            "AutoConfig": f"{module}.DeciLMConfig", "AutoModelForCausalLM": f"{module}.DeciLMForCausalLM",
        },
        "num_hidden_layers": len(blocks),
        "num_attention_heads": blocks[0].heads,
        "num_key_value_heads": blocks[0].kv_groups,
        "intermediate_size": max(widths),
        "head_dim": blocks[0].head_dim,
        "attention_bias": any(name.endswith("_proj.bias") and ".self_attn." in name for name in tensors),
        "mlp_bias": any(name.endswith("_proj.bias") and ".mlp." in name for name in tensors),
        "tie_word_embeddings": "lm_head.weight" not in tensors,
        "torch_dtype": str(next(iter(tensors.values())).dtype).removeprefix("torch."),
        "block_configs": block_configs,
    }  # fmt: skip


def llama_tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return the weights by the names of Llama.

    If a projection of the attention (or FFN) of any layer has a bias, those of all layers have one, 0 where it was
    missing.
    """
    decoder = model.get_decoder()
    tensors = {"model.embed_tokens.weight": decoder.embed_tokens.weight, "model.norm.weight": decoder.norm.weight}
    if has_own_head(model):
        tensors["lm_head.weight"] = model.lm_head.weight
    blocks = blocks_of(model)
    biased = {
        scope for scope, parts in PROJECTIONS.items()
        if any(block.parts[part].bias is not None for block in blocks for part in parts)
    }  # fmt: skip
    for index, block in enumerate(blocks):
        prefix = f"model.layers.{index}"
        tensors[f"{prefix}.input_layernorm.weight"] = block.attention_norm.weight
        tensors[f"{prefix}.post_attention_layernorm.weight"] = block.ffn_norm.weight
        for scope, parts in PROJECTIONS.items():
            for part, name in parts.items():
                weight, bias = block.parts[part].weight, block.parts[part].bias
                tensors[f"{prefix}.{scope}.{name}.weight"] = weight
                if scope in biased:
                    tensors[f"{prefix}.{scope}.{name}.bias"] = weight.new_zeros(len(weight)) if bias is None else bias
    return {name: tensor.detach().contiguous() for name, tensor in tensors.items()}


def write(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, path: Path, *, check: bool = False, **_: Any
) -> None:
    """Write config.json, the file with its classes, weights and the tokenizer. `path` is in a scratch folder.

    The size and the engines that can read the widths are logged. With `check`, logits of the folder in a fresh process
    are compared with those of the model.
    """
    refuse(blocks_of(model), model.config)
    tensors = llama_tensors(model)
    path.mkdir()
    text = json.dumps(decilm_config(model, tensors), indent=2, sort_keys=True)
    (path / "config.json").write_text(text + "\n", encoding="utf-8")
    with quoting(f"Cannot export '{model.config.model_type}' to nemotron-nas: transformers refuses its config: "):
        config = modeling_decilm.DeciLMConfig.from_pretrained(path)
    shutil.copy(modeling_decilm.__file__, path)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    model.generation_config.save_pretrained(path)
    save_tokenizer(tokenizer, path, config)
    size = sum(file.stat().st_size for file in path.iterdir())
    for_all = all(block.neurons % MULTIPLE == 0 for block in blocks_of(model))
    engines = "all engines with the class" if for_all else "vLLM and transformers"
    hint = "" if for_all else f"; with --sparsity.width_multiple {MULTIPLE} others can too"
    log.info("Size: %.1f MB; %s can read its widths%s", size / 1e6, engines, hint)
    if check:
        ids = tokenizer(CHECK_TEXT, return_tensors="pt").input_ids[:, :CHECK_TOKENS]
        log.info("Checked in transformers: largest difference of logits %g", check_reload(model, path, ids))
