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
from gprune.models.copies import has_own_head
from gprune.models.families import PRUNED
from gprune.models.gguf import CHECK_TOKENS, MODULES, difference_from_llama
from gprune.models.modeling_pruned import legacy_rope_settings
from gprune.models.surgery import widths
from gprune.models.units import units_of
from gprune.units.structure import Units

log = logging.getLogger("gprune")
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


def refuse(units: Sequence[Units], config: PreTrainedConfig, *, unequal_heads: bool = False, **_: Any) -> None:
    """Raise UserError if DeciLM cannot compute like a model with these units.

    `unequal_heads` tells that pruning may remove another number of heads in each layer.
    """
    reason, others = difference_from_llama(units, config), "hf"  # GGUF is refused for the same difference
    if reason is None:
        heads = [u.settings["num_attention_heads"] * u.count for u in units if u.kind == "kv_groups"]
        others = "hf or gguf, which vLLM and llama.cpp load"
        if len(set(heads)) > 1:
            reason = f"layers have {min(heads)} to {max(heads)} query heads"
        elif unequal_heads:
            reason = "--sparsity.scope includes attention; --sparsity.uniform_width true removes equally many heads"
    if reason is not None:
        raise UserError(
            f"Cannot export '{config.model_type.removeprefix(PRUNED)}' to nemotron-nas: it must compute like Llama "
            f"with equally many query heads in all layers, but {reason}. Export to {others}."
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
    config, layers = model.config, model.get_decoder().layers
    values, sizes = config.to_dict(), widths(model)
    head_dim = layers[0].self_attn.head_dim
    heads = [layer.self_attn.o_proj.in_features // head_dim for layer in layers]
    by_multiplier = all(width % MULTIPLE == 0 for width in sizes["neurons"])
    block_configs = [
        {
            "attention": {
                "no_op": False, "replace_with_linear": False, "n_heads_in_group": heads_of_layer // groups,
            },
            "ffn": ffn_settings(width, config.hidden_size, by_multiplier=by_multiplier),
        }
        for width, groups, heads_of_layer in zip(sizes["neurons"], sizes["kv_groups"], heads, strict=True)
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
        "num_hidden_layers": len(layers),
        "num_attention_heads": heads[0],
        "num_key_value_heads": sizes["kv_groups"][0],
        "intermediate_size": max(sizes["neurons"]),
        "head_dim": head_dim,
        "attention_bias": any(name.endswith("_proj.bias") and ".self_attn." in name for name in tensors),
        "mlp_bias": any(name.endswith("_proj.bias") and ".mlp." in name for name in tensors),
        "tie_word_embeddings": "lm_head.weight" not in tensors,
        "torch_dtype": str(next(iter(tensors.values())).dtype).removeprefix("torch."),
        "block_configs": block_configs,
    }  # fmt: skip


def llama_tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return the weights, whose names are those of Llama.

    If a projection of the attention (or FFN) of any layer has a bias, those of all layers have one, 0 where it was
    missing.
    """
    decoder = model.get_decoder()
    tensors = {"model.embed_tokens.weight": decoder.embed_tokens.weight, "model.norm.weight": decoder.norm.weight}
    if has_own_head(model):
        tensors["lm_head.weight"] = model.lm_head.weight
    modules = {
        f"{index}.{path}": layer.get_submodule(path) for index, layer in enumerate(decoder.layers)
        for path in MODULES.values()
    }  # fmt: skip
    biased = {path.split(".")[1] for path, module in modules.items() if getattr(module, "bias", None) is not None}
    for path, module in modules.items():
        tensors[f"model.layers.{path}.weight"] = module.weight
        if path.split(".")[1] in biased:  # `self_attn` or `mlp`
            bias = module.weight.new_zeros(len(module.weight)) if module.bias is None else module.bias
            tensors[f"model.layers.{path}.bias"] = bias
    return {name: tensor.detach().contiguous() for name, tensor in tensors.items()}


def write(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, path: Path, *, check: bool = False, **_: Any
) -> None:
    """Write config.json, the file with its classes, weights and the tokenizer. `path` is in a scratch folder.

    The size and the engines that can read the widths are logged. With `check`, logits of the folder in a fresh process
    are compared with those of the model.
    """
    refuse(units_of(model), model.config)
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
    for_all = all(width % MULTIPLE == 0 for width in widths(model)["neurons"])
    engines = "all engines with the class" if for_all else "vLLM and transformers"
    hint = "" if for_all else f"; with --sparsity.width_multiple {MULTIPLE} others can too"
    log.info("Size: %.1f MB; %s can read its widths%s", size / 1e6, engines, hint)
    if check:
        ids = tokenizer(CHECK_TEXT, return_tensors="pt").input_ids[:, :CHECK_TOKENS]
        log.info("Checked in transformers: largest difference of logits %g", check_reload(model, path, ids))
