"""Read a GGUF file as a plain model and tokenizer, and write them as a Hugging Face folder."""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager
from pathlib import Path
from unittest.mock import patch

import gguf as library
import torch
from tokenizers import Regex
from tokenizers.pre_tokenizers import ByteLevel, Digits, PreTokenizer, Sequence, Split
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from gprune.console import quieted

# Ways in which a byte-level BPE cuts text into words before it merges, by llama.cpp's names (`tokenizer.ggml.pre`).
LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
WORDS: dict[str, PreTokenizer] = {
    "gpt-2": ByteLevel(add_prefix_space=False),
    "smollm": Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]),
    "llama-bpe": Sequence([Split(Regex(LLAMA3_WORDS), "isolated"), ByteLevel(add_prefix_space=False, use_regex=False)]),
}
WHOLE_WORDS = ("llama-bpe",)  # names of ways in which a whole word that is a token is taken before any merge


def convert_gguf(gguf: Path, folder: Path, name: str) -> None:
    """Write the file `gguf` as a Hugging Face folder."""
    with quieted("transformers", stderr=True), parsed_once():  # its GGUF reader always shows a bar
        model, tokenizer = load_gguf(gguf), load_gguf_tokenizer(gguf)
        model.config.name_or_path = name
        model.config.architectures = [type(model).__name__]
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def parsed_once() -> AbstractContextManager[None]:
    """Let transformers parse a file once, and not for each of config, weights and tokenizer, which takes seconds; and
    make the map of tensors' names once and not for each module."""
    return patch.multiple(
        library,
        GGUFReader=functools.cache(library.GGUFReader),
        get_tensor_name_map=functools.cache(library.get_tensor_name_map),
    )


def load_gguf(path: Path) -> PreTrainedModel:
    """A GGUF file as a plain float32 model: no quantiser, no `quantization_config`, ready to be saved.

    transformers refuses to save a model that it de-quantised, so the weights move to a freshly built one.
    """
    loaded = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    settings = loaded.config.to_dict()
    for left_by_gguf in ("quantization_config", "_model_name_or_path"):
        settings.pop(left_by_gguf, None)
    with torch.device("meta"):  # no random weights
        clean = type(loaded)(type(loaded.config).from_dict(settings))
    clean.load_state_dict(loaded.state_dict(), assign=True)
    clean.tie_weights()
    clean.generation_config = loaded.generation_config
    return clean.eval()


def load_gguf_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """A GGUF file's tokenizer; a byte-level BPE cuts text into words as the file says, a KeyError if not in `WORDS`.

    The file holds only a name for that. transformers knows some names, and for others, such as SmolLM2's, silently cuts
    as GPT-2 does: blanks before a digit then become other tokens than the model was trained on.
    """
    keys, fields = library.Keys.Tokenizer, library.GGUFReader(path).fields
    name = fields[keys.PRE].contents() if fields[keys.MODEL].contents() == "gpt2" else None
    words = None if name is None else WORDS[name]
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    if words is not None:
        tokenizer.backend_tokenizer.pre_tokenizer = words
        tokenizer.backend_tokenizer.model.ignore_merges = name in WHOLE_WORDS
    return tokenizer
