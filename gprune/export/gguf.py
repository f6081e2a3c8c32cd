"""Export to GGUF files, and compute with GGUF files in llama.cpp (the package llama-cpp-py-sync).

Models with blocks of different widths have the architecture `deci`, which has the graph of `llama` with sizes per
layer; the loader of `llama` uses the first layer's sizes for all layers. Models with equal blocks have the architecture
`llama`, which older programs support too.

llama.cpp runs in a process of its own, the script `llamacpp.py`.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import math
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType, GGUFWriter, LlamaFileType, TokenType
from gguf.quants import quant_shape_to_byte_shape, quantize
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from gprune.errors import UserError
from gprune.export.hf import CHECK_TEXT
from gprune.models.blocks import Block, blocks_of
from gprune.models.copies import has_own_head
from gprune.models.gguf import WHOLE_WORDS, WORDS

log = logging.getLogger("gprune")
LLAMA_CPP = "llama-cpp-py-sync"
DEFAULT_TYPE, DTYPE = "f16", "float32"
QUANTISED = "q4_k_m"  # quantised by llama.cpp from f16, in blocks of up to 256 numbers of a row
# Largest mean KL(model || file) by type, nats per token. The largest values of SmolLM2-135M, dense and pruned, were
# 5e-9 (f32), 7e-5 (f16) and 1e-2 (q8_0). With the rows of one k_proj of 30 in the wrong order it was 0.2.
LIMITS = {"f32": 1e-6, "f16": 1e-3, "q8_0": 5e-2, QUANTISED: 0.2}
FILE_TYPES = {"f32": LlamaFileType.ALL_F32, "f16": LlamaFileType.MOSTLY_F16, "q8_0": LlamaFileType.MOSTLY_Q8_0}
CHECK_TOKENS = 512  # largest number of tokens whose log-probabilities are compared
LIKE_LLAMA = ("llama", "mistral", "qwen2", "smollm3")  # compared with llama.cpp by a slow test
GGUF_PARTS = {
    "attn_q": "query", "attn_k": "key", "attn_v": "value", "attn_output": "output",
    "ffn_gate": "gate", "ffn_up": "up", "ffn_down": "down",
}  # fmt: skip
GGML = "tokenizer.ggml"  # prefix of keys
SPECIAL_TOKENS = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}  # name in transformers -> in GGUF


def path_beside(folder: Path, type: str) -> str:
    """Return the path of a file beside a model folder."""
    return f"{folder}-{type}.gguf"


def has_llama_cpp() -> bool:
    """Return whether llama.cpp is installed."""
    return importlib.util.find_spec(LLAMA_CPP.replace("-", "_")) is not None


def check_settings(type: str, *, check: bool = False) -> None:
    """Raise UserError if a type is unknown, or llama.cpp is needed and not installed."""
    if type not in LIMITS:
        raise UserError(f"Unknown GGUF type '{type}'. Available: {', '.join(LIMITS)}.")
    if (type == QUANTISED or check) and not has_llama_cpp():
        use = f"quantise to {type}" if type == QUANTISED else "check the file"
        raise UserError(f"Export to GGUF needs a llama.cpp build to {use}. Run `pip install {LLAMA_CPP}`.")


def is_ours(path: Path) -> bool:
    """Return whether a path is a GGUF file. Other files are never overwritten."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(4) == b"GGUF"


def refuse(blocks: Sequence[Block], config: PreTrainedConfig, **_: Any) -> None:
    """Raise UserError if llama.cpp's graph of Llama computes something else than a model with these blocks.

    The blocks may have no weights.
    """
    if (reason := difference_from_llama(blocks, config)) is not None:
        raise UserError(
            f"Cannot export '{blocks[0].family.model_type}' to GGUF: it must compute like Llama, but {reason}. Export "
            "to hf; llama.cpp's own converter may read the folder, if all layers have equal widths."
        )


def difference_from_llama(blocks: Sequence[Block], config: PreTrainedConfig) -> str | None:
    """Return how a model differs from Llama, such as "has hidden_act gelu instead of silu", or None."""
    if blocks[0].family.model_type not in LIKE_LLAMA:
        return f"is not one of {', '.join(LIKE_LLAMA)}"
    if config.hidden_act not in ("silu", "swish"):
        return f"has hidden_act {config.hidden_act} instead of silu"
    if getattr(config, "sliding_window", None) is not None and getattr(config, "use_sliding_window", True):
        return f"attends to a window of {config.sliding_window} tokens"
    if (kind := config.rope_parameters.get("rope_type", "default")) not in ("default", "linear", "llama3"):
        return f"has rope_type {kind} instead of default, linear or llama3"
    if config.rope_parameters.get("partial_rotary_factor", 1.0) != 1.0:
        return "has rotary embeddings for a part of each head"
    if 0 in (getattr(config, "no_rope_layers", None) or ()):
        return "has layers without rotary embeddings"
    for block in blocks:
        if not (block.neurons and block.kv_groups):  # for a size of 0 llama.cpp skips more than the FFN or attention
            return f"has no FFN or no attention in layer {block.layer_index}"
    return None


def architecture(model: PreTrainedModel) -> str:
    """Return `llama` if all blocks have the same shape, else `deci`."""
    shapes = {(block.neurons, block.heads, block.kv_groups) for block in blocks_of(model)}
    return "llama" if len(shapes) == 1 else "deci"


def named_tensors(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """Yield GGUF names and tensors. Matrices are (out, in), with rows of q and k in llama.cpp's order."""
    decoder = model.get_decoder()
    yield "token_embd.weight", decoder.embed_tokens.weight
    yield "output_norm.weight", decoder.norm.weight
    if has_own_head(model):
        yield "output.weight", model.lm_head.weight
    if (factors := rope_factors(model)) is not None:
        yield "rope_freqs.weight", factors
    for block in blocks_of(model):
        prefix = f"blk.{block.layer_index}"
        yield f"{prefix}.attn_norm.weight", block.attention_norm.weight
        yield f"{prefix}.ffn_norm.weight", block.ffn_norm.weight
        for gguf_name, part_name in GGUF_PARTS.items():
            for suffix in ("weight", "bias"):
                rows = getattr(block.parts[part_name], suffix)
                if rows is None:
                    continue
                if gguf_name in ("attn_q", "attn_k"):
                    rows = interleave(rows, block.head_dim)
                yield f"{prefix}.{gguf_name}.{suffix}", rows


def interleave(rows: Tensor, head_dim: int) -> Tensor:
    """Reorder the rows of a query or key projection for llama.cpp.

    Rotary embeddings rotate pairs of rows: (i, i + head_dim / 2) of a head in transformers, neighbours in llama.cpp.
    """
    return rows.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).flatten(0, 2)


def rope_factors(model: PreTrainedModel) -> Tensor | None:
    """Return divisors of the default rotary frequencies, (head_dim / 2,), or None if they are the default."""
    rope = model.config.rope_parameters
    if rope.get("rope_type", "default") == "default":
        return None
    actual = model.get_decoder().rotary_emb.inv_freq.double()
    exponents = torch.arange(len(actual), dtype=torch.float64, device=actual.device) / len(actual)
    return (rope["rope_theta"] ** -exponents / actual).float()


def model_keys(model: PreTrainedModel, name: str, type: str) -> dict[str, Any]:
    """Return the GGUF keys of the model, without those of the tokenizer.

    Sizes are numbers for the architecture `llama`, and lists with one number per layer for `deci`.
    """
    config, blocks, arch = model.config, blocks_of(model), architecture(model)
    sizes = {
        "feed_forward_length": [b.neurons for b in blocks],
        "attention.head_count": [b.heads for b in blocks],
        "attention.head_count_kv": [b.kv_groups for b in blocks],
    }
    head_dim = blocks[0].head_dim
    architecture_keys = {
        "block_count": len(blocks),
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        **{key: values if arch == "deci" else values[0] for key, values in sizes.items()},
        # Without these keys llama.cpp divides the embedding length by the first layer's heads.
        **dict.fromkeys(("attention.key_length", "attention.value_length", "rope.dimension_count"), head_dim),
        "rope.freq_base": float(config.rope_parameters["rope_theta"]),
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "vocab_size": model.get_decoder().embed_tokens.num_embeddings,
    }
    general = {"general.type": "model", "general.name": name, "general.file_type": int(FILE_TYPES[type])}
    general["general.quantized_by"] = "gprune"
    if type == "q8_0":
        general["general.quantization_version"] = 2  # of ggml's block formats
    return general | {f"{arch}.{key}": value for key, value in architecture_keys.items()}


def write(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, path: Path, *, type: str, name: str, check: bool
) -> None:
    """Write a file, and compare it in llama.cpp if `check`. `path` is in a scratch folder.

    Rows that do not fit the type's blocks are stored in a larger type. A warning says so for down projections.
    """
    if type == QUANTISED:
        f16_file = path.with_name(f"f16-{path.name}")
        write_gguf(model, tokenizer, f16_file, type="f16", name=name)
        ask_llama_cpp("quantise", f16_file, output=str(path), type=type.upper())
        block_size = 256
    else:
        write_gguf(model, tokenizer, path, type=type, name=name)
        block_size, _ = GGML_QUANT_SIZES[GGMLQuantizationType[type.upper()]]
    log.info("Size: %.1f MB", path.stat().st_size / 1e6)
    if any(block.neurons % block_size for block in blocks_of(model)):
        log.warning(
            "Rows of down projections that do not fit blocks of %d are stored in a larger type, so the file may be "
            "larger than that of the dense model. Prune with --sparsity.width_multiple %d.", block_size, block_size,
        )  # fmt: skip
    if check:
        check_gguf(model, tokenizer, path, type=type)


@torch.no_grad()
def write_gguf(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, path: Path, *, type: str = "f16", name: str = "pruned"
) -> None:
    """Write a GGUF file.

    Vectors are float32. Matrices have the given type, or float16 if their rows do not fit blocks of q8_0.
    """
    refuse(blocks_of(model), model.config)
    keys = model_keys(model, name, type)
    keys |= tokenizer_keys(tokenizer, model.get_decoder().embed_tokens.num_embeddings)
    types = {tensor_name: stored_type(tensor.shape, type) for tensor_name, tensor in named_tensors(model)}
    writer = GGUFWriter(path, architecture(model))
    try:
        for key, value in keys.items():
            kind = GGUFValueType.get_type(value)
            writer.add_key_value(key, value, GGUFValueType.UINT32 if kind == GGUFValueType.INT32 else kind)
        for tensor_name, tensor in named_tensors(model):
            shape = quant_shape_to_byte_shape(tensor.shape, types[tensor_name])
            writer.add_tensor_info(tensor_name, shape, np.uint8, math.prod(shape), raw_dtype=types[tensor_name])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor_name, tensor in named_tensors(model):  # one at a time, to avoid a second copy of the model
            writer.write_tensor_data(encode_tensor(tensor_name, tensor, types[tensor_name]))
    finally:
        writer.close()


def stored_type(shape: Sequence[int], type: str) -> GGMLQuantizationType:
    """Return F32 for vectors, F16 for matrices whose rows do not fit blocks of `type`, else `type`."""
    kind = GGMLQuantizationType["F32" if len(shape) == 1 else type.upper()]
    block_size, _ = GGML_QUANT_SIZES[kind]
    return GGMLQuantizationType.F16 if shape[-1] % block_size else kind


def encode_tensor(name: str, tensor: Tensor, kind: GGMLQuantizationType) -> np.ndarray:
    """Convert a tensor to its form in the file."""
    numbers = np.ascontiguousarray(tensor.detach().float().cpu().numpy())
    with np.errstate(over="ignore"):
        encoded = quantize(numbers, kind)
        # q8_0 has int8 numbers, from -127 to 127, and a scale in float16, the largest number of a block / 127.
        in_float16 = np.float16(np.abs(numbers).max() / 127) if kind == GGMLQuantizationType.Q8_0 else encoded
    if in_float16.dtype == np.float16 and not np.isfinite(in_float16).all():
        raise UserError(f"Cannot write '{name}' in {kind.name.lower()}: it has too large numbers. Use --type f32.")
    return encoded


def tokenizer_keys(tokenizer: PreTrainedTokenizerBase, num_embeddings: int) -> dict[str, Any]:
    """Return the GGUF keys `tokenizer.*` for a fast tokenizer of type byte-level BPE.

    Rows of the embedding matrix without a token become tokens of type UNUSED.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)  # missing in tokenizers that are written in Python
    content = {"model": {"type": type(tokenizer).__name__}} if backend is None else json.loads(backend.to_str())
    model = content["model"]
    word_splitting = None if backend is None else find_word_splitting(content)
    if word_splitting is None:
        needed = f"a byte-level BPE tokenizer that splits words like {', '.join(WORDS)}"
        raise UserError(f"Export to GGUF needs {needed}; got another one ({model['type']}). Export to hf.")
    tokens, types = _tokens_and_types(content)
    if max(tokens) >= num_embeddings:
        raise UserError(
            f"Cannot export to GGUF: the tokenizer has token {max(tokens)}, but the model has only {num_embeddings} "
            "embeddings."
        )
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    keys = {
        f"{GGML}.model": "gpt2",
        f"{GGML}.pre": word_splitting,
        f"{GGML}.tokens": [tokens.get(i, f"[PAD{i}]") for i in range(num_embeddings)],
        f"{GGML}.token_type": [int(types.get(i, TokenType.UNUSED)) for i in range(num_embeddings)],
        f"{GGML}.merges": merges or [f"{tokens[0]} {tokens[0]}"],  # llama.cpp needs at least one
        f"{GGML}.add_space_prefix": False,
        **_special_token_keys(tokenizer),
    }
    if isinstance(tokenizer.chat_template, str):
        keys["tokenizer.chat_template"] = tokenizer.chat_template
    return keys


def _tokens_and_types(content: dict[str, Any]) -> tuple[dict[int, str], dict[int, TokenType]]:
    """Return index -> token and index -> type of token, from the content of `tokenizer.json`."""
    tokens = {index: token for token, index in content["model"]["vocab"].items()}
    types = dict.fromkeys(tokens, TokenType.NORMAL)
    for added in content["added_tokens"]:
        tokens[added["id"]] = added["content"]
        types[added["id"]] = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
    return tokens, types


def _special_token_keys(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Return the keys for indices of special tokens, and for whether BOS and EOS are added to a text."""
    indices = {gguf_name: getattr(tokenizer, f"{hf_name}_token_id") for hf_name, gguf_name in SPECIAL_TOKENS.items()}
    without_special = tokenizer("a", add_special_tokens=False).input_ids
    with_special = tokenizer("a", add_special_tokens=True).input_ids
    adds_tokens = len(with_special) > len(without_special)
    keys = {f"{GGML}.add_bos_token": adds_tokens and with_special[0] == indices["bos"]}
    keys |= {f"{GGML}.{name}_token_id": index for name, index in indices.items() if index is not None}
    if adds_tokens and with_special[-1] == indices["eos"]:
        keys[f"{GGML}.add_eos_token"] = True
    return keys


def find_word_splitting(content: dict[str, Any]) -> str | None:
    """Return llama.cpp's name of the tokenizer's word splitting, or None if llama.cpp does not support it."""
    model = content["model"]
    has_affixes = model.get("continuing_subword_prefix") or model.get("end_of_word_suffix")
    if model["type"] != "BPE" or model["byte_fallback"] or has_affixes or content["normalizer"]:
        return None
    if any(added["lstrip"] or added["rstrip"] or added["single_word"] for added in content["added_tokens"]):
        return None
    steps = _splitting_steps(content.get("pre_tokenizer") or {})
    for name, pre_tokenizer in WORDS.items():
        if _splitting_steps(json.loads(pre_tokenizer.__getstate__())) == steps:
            # The name also determines whether words that are tokens are used before any merge.
            uses_whole_words = name in WHOLE_WORDS
            return name if bool(model.get("ignore_merges")) == uses_whole_words else None
    return None


def _splitting_steps(pre_tokenizer: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the steps of a pre-tokenizer, without settings that only change offsets."""
    steps = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    return [{name: value for name, value in step.items() if name != "trim_offsets"} for step in steps]


# --- llama.cpp


@torch.no_grad()
def check_gguf(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, path: Path, *, type: str) -> float:
    """Compare tokens and log-probabilities of llama.cpp with those of the model and its tokenizer.

    This detects errors such as a wrong order of rows or a missing key, with which a file loads but generates nonsense.
    Return KL(model || file) in nats per token. Raise UserError for other tokens, or a KL above `LIMITS`.
    """
    special_tokens = "".join(token for token in (tokenizer.bos_token, tokenizer.eos_token) if token)
    texts = [CHECK_TEXT, f"{special_tokens}user\n{CHECK_TEXT[:80]}{special_tokens}"]
    ids = tokenizer(CHECK_TEXT).input_ids[: min(CHECK_TOKENS, model.config.max_position_embeddings)]
    log_p_of_file, tokens = score_in_llama_cpp(path, ids, texts)
    if tokens != [tokenizer(text).input_ids for text in texts]:
        raise UserError(
            "Cannot export to GGUF: llama.cpp splits text into other tokens than the tokenizer. Please report this."
        )
    logits = model(torch.tensor([ids], device=model.device), use_cache=False).logits[0]
    log_p = logits.double().log_softmax(-1).cpu()
    kl = float((log_p.exp() * (log_p - log_p_of_file)).sum(-1).mean())
    if not kl <= LIMITS[type]:  # also true for NaN
        lossy = f"If --type f32 passes, {type} loses too much accuracy for this model."
        advice = "Please report this." if type == "f32" else lossy
        raise UserError(
            f"Cannot export to GGUF: llama.cpp's predictions differ from the model's by KL {kl:.1e} nats per token, "
            f"more than {LIMITS[type]}. The file was removed. {advice}"
        )
    log.info("Checked in llama.cpp on %d tokens: KL %.1e nats", len(ids), kl)
    return kl


def score_in_llama_cpp(path: Path, ids: list[int], texts: list[str]) -> tuple[Tensor, list[list[int]]]:
    """Return log-probabilities after each of T `ids`, (T, vocabulary) float64, and the tokens of `texts`."""
    with tempfile.TemporaryDirectory(prefix="gprune-llamacpp-") as scratch:
        file = Path(scratch) / "logprobs.npy"
        tokens = ask_llama_cpp("score", path, ids=ids, texts=texts, logprobs=str(file))
        return torch.from_numpy(np.load(file)).double(), tokens


def window_nll(path: Path, windows: Tensor) -> list[float]:
    """Return the loss of a GGUF file in llama.cpp on windows of text.

    Args:
        path: the file.
        windows: tokens, (N, T) int64, such as `gprune.corpora.windows.Windows.tokens`.

    Returns:
        For each window the negative log-likelihood of its tokens 2 to T, in nats, as in `gprune.evaluation.perplexity`.

    Raises:
        UserError: if llama.cpp cannot load or compute the file.
    """
    return ask_llama_cpp("nll", path, windows=windows.tolist())


def ask_llama_cpp(work: str, path: Path, **request: Any) -> Any:
    """Run `llamacpp.py` in a process, and return its answer."""
    request |= {"work": work, "model": str(path.absolute()), "threads": torch.get_num_threads()}
    command = [sys.executable, "-P", str(Path(__file__).with_name("llamacpp.py"))]
    process = subprocess.run(
        command, input=json.dumps(request), capture_output=True, text=True, errors="replace", check=False
    )
    if process.returncode != 0:
        lines = [line for line in process.stderr.splitlines() if line.strip()] or [f"exit code {process.returncode}"]
        cause = next((line for line in lines if "GGML_ASSERT" in line or "error" in line), lines[-1])
        raise UserError(f"Cannot run the file in llama.cpp: {cause.removesuffix('.')}.")
    return json.loads(process.stdout.splitlines()[-1])
