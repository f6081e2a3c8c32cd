"""Convert the tokenizer of a model folder to keys of GGUF."""

from __future__ import annotations

import json
from typing import Any

from gguf import TokenType
from transformers import PreTrainedTokenizerBase

from gprune.errors import UserError
from gprune.models.gguf import WHOLE_WORDS, WORDS


def tokenizer_keys(tokenizer: PreTrainedTokenizerBase, size: int) -> dict[str, Any]:
    """Return `tokenizer.*` of a fast byte-level BPE. Embeddings beyond the vocabulary become unused tokens.

    Args:
        tokenizer: the tokenizer.
        size: number of embeddings.
    """
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    model, pre = content["model"], word_splitting(content)
    if pre is None:
        needed = f"a byte-level BPE tokenizer that splits words like {', '.join(WORDS)}"
        raise UserError(f"Export to GGUF needs {needed}; got another one ({model['type']}). Export to hf.")
    tokens = {index: token for token, index in model["vocab"].items()}
    types = dict.fromkeys(tokens, TokenType.NORMAL)
    for added in content["added_tokens"]:
        tokens[added["id"]] = added["content"]
        types[added["id"]] = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
    if max(tokens) >= size:
        raise UserError(
            f"Cannot export to GGUF: the tokenizer has token {max(tokens)}, but the model has only {size} embeddings."
        )
    names = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}
    special = {there: getattr(tokenizer, f"{here}_token_id") for there, here in names.items()}
    bare, full = (tokenizer("a", add_special_tokens=add).input_ids for add in (False, True))
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    keys = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": [tokens.get(i, f"[PAD{i}]") for i in range(size)],
        "tokenizer.ggml.token_type": [int(types.get(i, TokenType.UNUSED)) for i in range(size)],
        "tokenizer.ggml.merges": merges or [f"{tokens[0]} {tokens[0]}"],  # llama.cpp needs at least one
        "tokenizer.ggml.add_space_prefix": False,
        "tokenizer.ggml.add_bos_token": len(full) > len(bare) and full[0] == special["bos"],
        **{f"tokenizer.ggml.{name}_token_id": index for name, index in special.items() if index is not None},
    }
    if len(full) > len(bare) and full[-1] == special["eos"]:
        keys["tokenizer.ggml.add_eos_token"] = True
    if isinstance(tokenizer.chat_template, str):
        keys["tokenizer.chat_template"] = tokenizer.chat_template
    return keys


def word_splitting(content: dict[str, Any]) -> str | None:
    """Return llama.cpp's name of the tokenizer's word splitting, or None if llama.cpp does not support it."""
    model, cut = content["model"], content.get("pre_tokenizer") or {}
    affixes = model.get("continuing_subword_prefix") or model.get("end_of_word_suffix")
    if model["type"] != "BPE" or model["byte_fallback"] or affixes or content["normalizer"]:
        return None
    if any(added["lstrip"] or added["rstrip"] or added["single_word"] for added in content["added_tokens"]):
        return None
    name = next((name for name in WORDS if _steps(json.loads(WORDS[name].__getstate__())) == _steps(cut)), None)
    # The name also determines whether words that are tokens are used before any merge.
    return name if bool(model.get("ignore_merges")) == (name in WHOLE_WORDS) else None


def _steps(cut: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the steps of a pre-tokenizer, without settings that only change offsets."""
    return [{k: v for k, v in step.items() if k != "trim_offsets"} for step in cut.get("pretokenizers", [cut])]
