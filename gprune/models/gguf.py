"""GGUF files: convert one to a Hugging Face folder, write one, and compute with one in llama.cpp.

Models with layers of different widths have the architecture `deci`, which has the graph of `llama` with sizes per
layer; the loader of `llama` uses the first layer's sizes for all layers. Models with equal layers have the architecture
`llama`, which older programs support too.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
import json
import logging
import math
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import gguf as library
import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGML_QUANT_VERSION, GGMLQuantizationType, GGUFValueType, LlamaFileType, TokenType
from gguf.quants import quant_shape_to_byte_shape, quantize
from tokenizers import Regex, pre_tokenizers
from tokenizers.pre_tokenizers import ByteLevel, Digits, PreTokenizer, Split
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from gprune.console import quieted
from gprune.errors import UserError
from gprune.models.agreement import CHECK_TEXT
from gprune.models.copies import has_own_head
from gprune.models.families import PRUNED
from gprune.models.units import units_of
from gprune.units.structure import Units

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
MODULES = {  # name in llama.cpp -> path in a layer of `LIKE_LLAMA`
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip
GGML = "tokenizer.ggml"  # prefix of keys
SPECIAL_TOKENS = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}  # name in transformers -> in GGUF


# Word splitting of byte-level BPE tokenizers, by llama.cpp's names (`tokenizer.ggml.pre`).
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
WORDS: dict[str, PreTokenizer] = {
    "gpt-2": ByteLevel(add_prefix_space=False),
    "smollm": pre_tokenizers.Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]),
    "llama-bpe": pre_tokenizers.Sequence(
        [Split(Regex(LLAMA3_PATTERN), "isolated"), ByteLevel(add_prefix_space=False, use_regex=False)]
    ),
}
WHOLE_WORDS = ("llama-bpe",)  # names for which words that are tokens are used before any merge


# --- reading


def convert_gguf(gguf: Path, folder: Path, name: str) -> None:
    """Convert a GGUF file to a Hugging Face folder, with float32 weights and `name` as the model's `name_or_path`."""
    with quieted("transformers", stderr=True), cached_parsing():  # its GGUF reader always shows a progress bar
        model, tokenizer = load_gguf(gguf), load_gguf_tokenizer(gguf)
        model.config.name_or_path = name
        model.config.architectures = [type(model).__name__]
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


@contextmanager
def cached_parsing() -> Iterator[None]:
    """Cache parsed files and name maps of the gguf library while the context lasts.

    Otherwise transformers parses a file for config, weights and tokenizer again, and makes the name map for each
    module. Parsing slices the file a million times for the vocabulary; slices of a plain array are three times as fast
    as those of a `numpy.memmap`.
    """
    read, memmap = functools.cache(library.GGUFReader), np.memmap
    name_map = functools.cache(library.get_tensor_name_map)
    with (
        patch.multiple(library, GGUFReader=lambda path: read(str(path)), get_tensor_name_map=name_map),
        patch.object(np, "memmap", lambda *args, **options: np.asarray(memmap(*args, **options))),
    ):
        yield


def load_gguf(path: Path) -> PreTrainedModel:
    """Load a GGUF file as a float32 model, without quantiser and `quantization_config`.

    transformers cannot save a model that it de-quantised, so the weights are moved to a new model.
    """
    dequantised = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    settings = dequantised.config.to_dict()
    for key in ("quantization_config", "_model_name_or_path"):  # added by the GGUF loader
        settings.pop(key, None)
    with torch.device("meta"):  # no random weights
        model = type(dequantised)(type(dequantised.config).from_dict(settings))
    model.load_state_dict(dequantised.state_dict(), assign=True)
    model.tie_weights()
    model.generation_config = dequantised.generation_config
    return model.eval()


def load_gguf_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a GGUF file; for byte-level BPE with the word splitting of the file.

    The file has only a name for the word splitting. If transformers does not know the name, such as SmolLM2's, it
    silently splits like GPT-2, so blanks before a digit become other tokens than in training.
    """
    keys = library.Keys.Tokenizer
    fields = library.GGUFReader(path).fields
    is_byte_level = fields[keys.MODEL].contents() == "gpt2"
    splitting = fields[keys.PRE].contents() if is_byte_level else None  # a key of `WORDS`
    pre_tokenizer = WORDS[splitting] if is_byte_level else None
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    if pre_tokenizer is not None:
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizer
        tokenizer.backend_tokenizer.model.ignore_merges = splitting in WHOLE_WORDS
    return tokenizer


# --- writing


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


def refuse(units: Sequence[Units], config: PreTrainedConfig, **_: Any) -> None:
    """Raise UserError if llama.cpp's graph of Llama computes something else than a model with these units."""
    if (reason := difference_from_llama(units, config)) is not None:
        raise UserError(
            f"Cannot export '{config.model_type.removeprefix(PRUNED)}' to GGUF: it must compute like Llama, but "
            f"{reason}. Export to hf; llama.cpp's own converter may read the folder, if all layers have equal widths."
        )


def difference_from_llama(units: Sequence[Units], config: PreTrainedConfig) -> str | None:
    """Return how a model differs from Llama, such as "has hidden_act gelu instead of silu", or None."""
    if config.model_type.removeprefix(PRUNED) not in LIKE_LLAMA:
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
    for u in units:
        if u.kind in ("neurons", "kv_groups") and not u.count:  # llama.cpp skips more than the FFN or attention
            return f"has no FFN or no attention in layer {u.layer}"
    return None


def sizes_by_layer(model: PreTrainedModel) -> dict[str, list[int]]:
    """Return the sizes of layers that pruning changes, by GGUF key."""
    layers = model.get_decoder().layers
    head_dim = layers[0].self_attn.head_dim
    return {
        "feed_forward_length": [layer.mlp.down_proj.in_features for layer in layers],
        "attention.head_count": [layer.self_attn.o_proj.in_features // head_dim for layer in layers],
        "attention.head_count_kv": [layer.self_attn.k_proj.out_features // head_dim for layer in layers],
    }


def architecture(model: PreTrainedModel) -> str:
    """Return `llama` if all layers have the same sizes, else `deci`."""
    return "llama" if all(len(set(sizes)) == 1 for sizes in sizes_by_layer(model).values()) else "deci"


def named_tensors(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """Yield GGUF names and tensors. Matrices are (out, in), with rows of q and k in llama.cpp's order."""
    decoder = model.get_decoder()
    yield "token_embd.weight", decoder.embed_tokens.weight
    yield "output_norm.weight", decoder.norm.weight
    if has_own_head(model):
        yield "output.weight", model.lm_head.weight
    if (factors := rope_factors(model)) is not None:
        yield "rope_freqs.weight", factors
    for index, layer in enumerate(decoder.layers):
        for gguf_name, path in MODULES.items():
            for suffix, rows in layer.get_submodule(path).named_parameters():
                if gguf_name in ("attn_q", "attn_k"):
                    rows = interleave(rows, layer.self_attn.head_dim)
                yield f"blk.{index}.{gguf_name}.{suffix}", rows


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
    config, decoder, arch = model.config, model.get_decoder(), architecture(model)
    head_dim = decoder.layers[0].self_attn.head_dim
    architecture_keys = {
        "block_count": len(decoder.layers),
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        **{key: sizes if arch == "deci" else sizes[0] for key, sizes in sizes_by_layer(model).items()},
        # Without these keys llama.cpp divides the embedding length by the first layer's heads.
        **dict.fromkeys(("attention.key_length", "attention.value_length", "rope.dimension_count"), head_dim),
        "rope.freq_base": float(config.rope_parameters["rope_theta"]),
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "vocab_size": decoder.embed_tokens.num_embeddings,
    }
    general = {"general.type": "model", "general.name": name, "general.file_type": int(FILE_TYPES[type])}
    general["general.quantized_by"] = "gprune"
    if type == "q8_0":
        general["general.quantization_version"] = GGML_QUANT_VERSION
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
        ask_llama_cpp(f16_file, output=str(path), type=type.upper())
        block_size = 256
    else:
        write_gguf(model, tokenizer, path, type=type, name=name)
        block_size, _ = GGML_QUANT_SIZES[GGMLQuantizationType[type.upper()]]
    log.info("Size: %.1f MB", path.stat().st_size / 1e6)
    if any(width % block_size for width in sizes_by_layer(model)["feed_forward_length"]):
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
    refuse(units_of(model), model.config)
    keys = model_keys(model, name, type)
    keys |= tokenizer_keys(tokenizer, model.get_decoder().embed_tokens.num_embeddings)
    types = {tensor_name: stored_type(tensor.shape, type) for tensor_name, tensor in named_tensors(model)}
    writer = library.GGUFWriter(path, architecture(model))
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
        answer = ask_llama_cpp(path, windows=[ids], texts=texts, logprobs=str(file))
        return torch.from_numpy(np.load(file)).double(), answer["tokens"]


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
    return ask_llama_cpp(path, windows=windows.tolist(), texts=[])["nll"]


def ask_llama_cpp(path: Path, **request: Any) -> dict[str, Any]:
    """Run `in_llama_cpp` in a process, and return its answer."""
    request |= {"model": str(path.absolute()), "threads": torch.get_num_threads()}
    source = f"{textwrap.dedent(inspect.getsource(in_llama_cpp))}\nin_llama_cpp()"
    process = subprocess.run(
        [sys.executable, "-P", "-c", source],
        input=json.dumps(request), capture_output=True, text=True, errors="replace", check=False,
    )  # fmt: skip
    if process.returncode != 0:
        lines = [line for line in process.stderr.splitlines() if line.strip()] or [f"exit code {process.returncode}"]
        cause = next((line for line in lines if "GGML_ASSERT" in line or "error" in line), lines[-1])
        raise UserError(f"Cannot run the file in llama.cpp: {cause.removesuffix('.')}.")
    return json.loads(process.stdout.splitlines()[-1])


def in_llama_cpp() -> None:
    """Read a JSON request from stdin, and write the answer as the last line of stdout.

    Only the source of this function runs in the other process. There llama.cpp may abort and start threads, and the
    imports of this module would take seconds. A request has `model` (a path), `threads`, and for

    quantisation   `output`, and `type`, a type of llama.cpp such as Q4_K_M.
    losses         `windows`, lists of T ids, and `texts`. The answer is `nll`, the negative log-likelihood of tokens 2
                   to T of each window in nats, and `tokens` of each text. `logprobs` (optional) is a file to write
                   (.npy, float32, (T, vocabulary)) with log-probabilities after each id of the last window.
    """
    import json
    import sys

    import numpy as np
    from llama_cpp_py_sync import Llama
    from llama_cpp_py_sync._cffi_bindings import get_ffi, get_lib
    from scipy.special import log_softmax

    ffi, lib, request = get_ffi(), get_lib(), json.load(sys.stdin)

    def quantise():
        lib.llama_backend_init()
        settings = lib.llama_model_quantize_default_params()
        settings.ftype = getattr(lib, f"LLAMA_FTYPE_MOSTLY_{request['type']}")
        settings.nthread = request["threads"]
        if lib.llama_model_quantize(request["model"].encode(), request["output"].encode(), ffi.addressof(settings)):
            sys.exit("error: llama_model_quantize failed")

    def logprobs_of(model, ids):
        """Return log-probabilities of the token after each of T tokens, (T, vocabulary) float64."""
        model._clear_context_state()
        batch = lib.llama_batch_init(len(ids), 0, 1)
        batch.n_tokens = len(ids)
        for i, token in enumerate(ids):
            batch.token[i] = token
            batch.pos[i] = i
            batch.n_seq_id[i] = 1  # the token belongs to one sequence, number 0
            batch.seq_id[i][0] = 0
            batch.logits[i] = 1  # logits are computed for every token
        if status := lib.llama_decode(model._ctx, batch):
            sys.exit(f"error: llama_decode returned {status}")
        lib.llama_batch_free(batch)
        bytes_per_logit = 4  # float32
        buffer = ffi.buffer(lib.llama_get_logits(model._ctx), bytes_per_logit * len(ids) * model.n_vocab)
        logits = np.frombuffer(buffer, dtype=np.float32).reshape(len(ids), model.n_vocab)
        return log_softmax(logits.astype(np.float64), axis=1)

    def score():
        windows, losses = request["windows"], []
        length = len(windows[0])
        # Attention is exact and its cache is float32, so that only the weights differ from those of the model.
        exact = {"flash_attn_type": 0, "type_k": "f32", "type_v": "f32"}
        model = Llama(request["model"], n_ctx=length, n_batch=length, n_threads=request["threads"], **exact)
        for window in windows:
            logprobs = logprobs_of(model, window)
            losses.append(-float(logprobs[range(length - 1), window[1:]].sum()))
        if "logprobs" in request:
            np.save(request["logprobs"], logprobs.astype(np.float32))
        return {"nll": losses, "tokens": [model.tokenize(text, parse_special=True) for text in request["texts"]]}

    sys.stdout.write("\n" + json.dumps(quantise() if "output" in request else score()))
