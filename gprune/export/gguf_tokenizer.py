"""Convert the tokenizer of a model folder to keys of GGUF."""

from __future__ import annotations

import json
from typing import Any

from gguf import TokenType
from transformers import PreTrainedTokenizerBase

from gprune.errors import UserError
from gprune.models.gguf import WHOLE_WORDS, WORDS

GGML = "tokenizer.ggml"  # prefix of keys
SPECIAL_TOKENS = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}  # name in transformers -> in GGUF


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
