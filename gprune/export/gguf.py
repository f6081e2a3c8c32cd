"""A pruned model as one GGUF file, which llama.cpp and what is built on it run: Llama, and what computes as Llama does.

Blocks of different widths are architecture `deci`: its graph is that of `llama`, with sizes per layer. The loader of
`llama` takes the first layer's sizes for all. A model whose blocks are equal is architecture `llama`, which older
programs know too. Nothing here converts a checkpoint: tensors come from the model in memory, block by block.

The tokenizer is written as the model's folder has it, so the file takes the tokens that the run was measured with. A
folder made by an older gprune, whose SmolLM2 did not cut numbers into digits, says `gpt-2` in its file; prune anew to
mend it.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType, TokenType
from gguf.quants import quantize
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from gprune.errors import UserError
from gprune.models.blocks import Block, blocks_of
from gprune.models.gguf import WHOLE_WORDS, WORDS

log = logging.getLogger("gprune")

FILE_TYPES = {
    "f32": (GGMLQuantizationType.F32, LlamaFileType.ALL_F32),
    "f16": (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
    "q8_0": (GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0),
}
Q8_BLOCK = 32


def architecture(model: PreTrainedModel) -> str:
    """`llama` where all blocks have the same shape, else `deci`."""
    shapes = {(b.neurons, b.query.out_features, b.key.out_features) for b in blocks_of(model)}
    return "llama" if len(shapes) == 1 else "deci"


def tensors(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """GGUF names and tensors; matrices in PyTorch's (out, in), rows of q and k in llama.cpp's order."""
    decoder = model.get_decoder()
    yield "token_embd.weight", decoder.embed_tokens.weight
    yield "output_norm.weight", decoder.norm.weight
    if not model.config.tie_word_embeddings:
        yield "output.weight", model.lm_head.weight
    if (factors := rope_factors(model)) is not None:
        yield "rope_freqs.weight", factors
    for block in blocks_of(model):
        here = f"blk.{block.index}"
        yield f"{here}.attn_norm.weight", block.attention_norm.weight
        yield f"{here}.ffn_norm.weight", block.ffn_norm.weight
        for name, part in (
            ("attn_q", block.query),
            ("attn_k", block.key),
            ("attn_v", block.value),
            ("attn_output", block.output),
            ("ffn_gate", block.gate),
            ("ffn_up", block.up),
            ("ffn_down", block.down),
        ):
            for kind, parameter in (("weight", part.weight), ("bias", part.bias)):
                if parameter is not None:
                    rotated = name in ("attn_q", "attn_k")
                    yield f"{here}.{name}.{kind}", interleave(parameter, block.head_dim) if rotated else parameter


def interleave(rows: Tensor, head_dim: int) -> Tensor:
    """From rotary pairs (i, i + head_dim / 2), as transformers has them, to neighbours, as llama.cpp has them.

    Args:
        rows: (heads * head_dim, ...) weight or bias; heads are this block's, whose number the rows tell.
    """
    return rows.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).flatten(0, 2)


def rope_factors(model: PreTrainedModel) -> Tensor | None:
    """(head_dim / 2,) divisors of the plain rotary frequencies; None where they are plain."""
    rope = model.config.rope_parameters
    if rope.get("rope_type", "default") == "default":
        return None
    actual = model.get_decoder().rotary_emb.inv_freq.double()
    exponents = torch.arange(len(actual), dtype=torch.float64, device=actual.device) / len(actual)
    return (rope["rope_theta"] ** -exponents / actual).float()


def tokenizer_keys(tokenizer: PreTrainedTokenizerBase, size: int) -> dict[str, Any]:
    """`tokenizer.*` of a byte-level BPE.

    Args:
        tokenizer: fast tokenizer.
        size: rows of the embedding; rows beyond the vocabulary become unused tokens.
    """
    content = json.loads(tokenizer.backend_tokenizer.to_str()) if tokenizer.is_fast else {"model": {"type": "slow"}}
    model, pre = content["model"], _words(content)
    if pre is None:
        raise UserError(
            f"Export: GGUF takes a byte-level BPE tokenizer that cuts words as {', '.join(WORDS)} do; this "
            f"one ({model['type']}) does otherwise. Export to hf instead, or convert with llama.cpp's own script."
        )
    tokens = {index: token for token, index in model["vocab"].items()}
    types = dict.fromkeys(tokens, TokenType.NORMAL)
    for added in content["added_tokens"]:
        tokens[added["id"]] = added["content"]
        types[added["id"]] = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
    if max(tokens) >= size:
        raise UserError(f"Export: the tokenizer has token {max(tokens)}, but the model has {size} embeddings.")
    special = {
        "bos": tokenizer.bos_token_id,
        "eos": tokenizer.eos_token_id,
        "unknown": tokenizer.unk_token_id,
        "padding": tokenizer.pad_token_id,
    }
    bare, full = (tokenizer("a", add_special_tokens=add).input_ids for add in (False, True))
    # llama.cpp wants to see merges; one that no text can ask for stands in for none.
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    keys = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": [tokens.get(i, f"[PAD{i}]") for i in range(size)],
        "tokenizer.ggml.token_type": [int(types.get(i, TokenType.UNUSED)) for i in range(size)],
        "tokenizer.ggml.merges": merges or [f"{tokens[0]} {tokens[0]}"],
        "tokenizer.ggml.add_space_prefix": False,
        "tokenizer.ggml.add_bos_token": len(full) > len(bare) and full[0] == special["bos"],
        **{f"tokenizer.ggml.{name}_token_id": index for name, index in special.items() if index is not None},
    }
    if len(full) > len(bare) and full[-1] == special["eos"]:
        keys["tokenizer.ggml.add_eos_token"] = True
    if isinstance(tokenizer.chat_template, str):
        keys["tokenizer.chat_template"] = tokenizer.chat_template
    return keys


def _words(content: dict[str, Any]) -> str | None:
    """llama.cpp's name for how the tokenizer cuts words; None if it has none, or the tokenizer is of another kind."""
    model, cut = content["model"], content.get("pre_tokenizer") or {}
    affixes = model.get("continuing_subword_prefix") or model.get("end_of_word_suffix")
    if model["type"] != "BPE" or model["byte_fallback"] or affixes or content["normalizer"]:
        return None
    if any(added["lstrip"] or added["rstrip"] or added["single_word"] for added in content["added_tokens"]):
        return None
    name = next((name for name in WORDS if _steps(json.loads(WORDS[name].__getstate__())) == _steps(cut)), None)
    # Taking a whole word that is a token before any merge is bound to llama.cpp's name too.
    return name if bool(model.get("ignore_merges")) == (name in WHOLE_WORDS) else None


def _steps(cut: dict[str, Any]) -> list[dict[str, Any]]:
    """What a pre-tokenizer does, step by step, without what only moves the offsets it reports."""
    return [{k: v for k, v in step.items() if k != "trim_offsets"} for step in cut.get("pretokenizers", [cut])]


def model_keys(model: PreTrainedModel, name: str, type: str) -> dict[str, Any]:
    """`general.*` and the architecture's keys; sizes are one number for `llama`, one per layer for `deci`."""
    config, blocks, arch = model.config, blocks_of(model), architecture(model)
    sizes = {
        "feed_forward_length": [b.neurons for b in blocks],
        "attention.head_count": [b.query.out_features // b.head_dim for b in blocks],
        "attention.head_count_kv": [b.kv_groups for b in blocks],
    }
    head_dim = blocks[0].head_dim
    own = {
        "block_count": len(blocks),
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        **{key: values if arch == "deci" else values[0] for key, values in sizes.items()},
        # Without these llama.cpp divides the embedding length by the first layer's heads.
        **dict.fromkeys(("attention.key_length", "attention.value_length", "rope.dimension_count"), head_dim),
        "rope.freq_base": float(config.rope_parameters["rope_theta"]),
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "vocab_size": model.get_decoder().embed_tokens.num_embeddings,
    }
    general = {"general.type": "model", "general.name": name, "general.file_type": int(FILE_TYPES[type][1])}
    general["general.quantized_by"] = "gprune"  # the mark by which `--overwrite` knows a former export
    if type == "q8_0":
        general["general.quantization_version"] = 2
    return general | {f"{arch}.{key}": value for key, value in own.items()}


def check_expressible(model: PreTrainedModel) -> None:
    """Refuse what llama.cpp's graphs of `llama` and `deci` compute differently."""
    for block in blocks_of(model):
        if (reason := unlike_llama(model.config, block)) is not None:
            raise UserError(
                f"Export: llama.cpp's graph for layers of different widths computes as Llama does, but this "
                f"'{model.config.model_type}' {reason}. Export to hf, or prune with --sparsity.uniform_width true and "
                f"--sparsity.scope ffn, which leaves a stock model for llama.cpp's own converter."
            )
        # llama.cpp takes a size of 0 for a layer without FFN or attention, and then skips more than that.
        if not block.neurons or not block.kv_groups:
            raise UserError(f"Export: GGUF takes no layer without FFN or attention, such as layer {block.index}.")


def unlike_llama(config: PreTrainedConfig, block: Block) -> str | None:
    """What a block has that Llama has not, or the other way round; read off the record and the weights."""
    family = block.family
    if block.has_experts or block.gate is None:
        return "has experts" if block.has_experts else "has no gate"
    if block.ffn_norm is None or block.attention_norm is None or family.norm_offset:
        return "normalises elsewhere or otherwise"
    if config.hidden_act not in ("silu", "swish"):
        return f"has hidden_act {config.hidden_act} instead of silu"
    modules = [block.ffn_norm, block.attention_norm, *(part.host for part in block.parts.values())]
    written = {id(parameter) for module in modules for parameter in module.parameters()}
    other = [name for name, parameter in block.layer.named_parameters() if id(parameter) not in written]
    if other:
        return f"has weights beside Llama's ({other[0]})"
    if getattr(config, "sliding_window", None) is not None and getattr(config, "use_sliding_window", True):
        return f"attends to a window of {config.sliding_window} tokens"
    if (kind := config.rope_parameters.get("rope_type", "default")) not in ("default", "linear", "llama3"):
        return f"has rope_type {kind} instead of default, linear or llama3"
    if config.rope_parameters.get("partial_rotary_factor", 1.0) != 1.0:
        return "rotates a part of each head"
    return None


@torch.no_grad()
def write_gguf(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, path: Path, *, type: str = "f16", name: str = "pruned"
) -> list[str]:
    """Write the file. Matrices in `type`, vectors in float32.

    Args:
        model: of a family that computes as Llama does, sliced or not.
        tokenizer: fast byte-level BPE.
        path: file to write; what is there is overwritten.
        type: f32, f16 or q8_0.
        name: `general.name`.

    Returns:
        Names of tensors whose rows q8_0 cannot divide into blocks of 32; they are float16.

    Raises:
        UserError: for a model or tokenizer that GGUF or llama.cpp has no words for, or weights beyond float16.
    """
    check_expressible(model)
    keys = model_keys(model, name, type)
    keys |= tokenizer_keys(tokenizer, model.get_decoder().embed_tokens.num_embeddings)
    writer = GGUFWriter(path, architecture(model))
    try:
        for key, value in keys.items():
            _add(writer, key, value)
        chosen, odd = {}, []
        for tensor_name, tensor in tensors(model):
            chosen[tensor_name] = FILE_TYPES[type][0] if tensor.ndim == 2 else GGMLQuantizationType.F32
            if chosen[tensor_name] == GGMLQuantizationType.Q8_0 and tensor.shape[-1] % Q8_BLOCK:
                chosen[tensor_name] = GGMLQuantizationType.F16
                odd.append(tensor_name)
            data = _stored(torch.zeros(1, tensor.shape[-1]), chosen[tensor_name])
            shape = (*tensor.shape[:-1], data.shape[-1])
            writer.add_tensor_info(
                tensor_name, shape, data.dtype, math.prod(shape) * data.itemsize, raw_dtype=chosen[tensor_name]
            )
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor_name, tensor in tensors(model):  # one at a time: no second copy of the model in memory
            data = _stored(tensor, chosen[tensor_name])
            if data.dtype == np.float16 and not np.isfinite(data).all():
                raise UserError(f"Export: '{tensor_name}' holds numbers beyond float16; choose --type f32.")
            writer.write_tensor_data(data)
    finally:
        writer.close()
    if odd:
        log.info("q8_0 needs rows of a multiple of %d numbers; float16 instead: %s", Q8_BLOCK, _listed(odd))
    return odd


def _listed(names: list[str]) -> str:
    """'ffn_down.weight of blocks 0, 1' for what may be one tensor of each of many blocks."""
    kinds: dict[str, list[str]] = {}
    for name in names:
        *block, kind, suffix = name.split(".")
        kinds.setdefault(f"{kind}.{suffix}", []).extend(block[1:])
    return "; ".join(f"{kind} of blocks {', '.join(of)}" if of else kind for kind, of in kinds.items())


def _stored(tensor: Tensor, kind: GGMLQuantizationType) -> np.ndarray:
    with np.errstate(over="ignore"):  # found and named by the caller
        return quantize(np.ascontiguousarray(tensor.detach().float().cpu().numpy()), kind)


def _add(writer: GGUFWriter, key: str, value: Any) -> None:
    kinds = {
        bool: writer.add_bool,
        int: writer.add_uint32,
        float: writer.add_float32,
        str: writer.add_string,
        list: writer.add_array,
    }
    kinds[type(value)](key, value)
