"""Convert a GGUF file to a Hugging Face folder with model and tokenizer."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import gguf as library
import numpy as np
import torch
from tokenizers import Regex
from tokenizers.pre_tokenizers import ByteLevel, Digits, PreTokenizer, Sequence, Split
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from gprune.console import quieted

# Word splitting of byte-level BPE tokenizers, by llama.cpp's names (`tokenizer.ggml.pre`).
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
WORDS: dict[str, PreTokenizer] = {
    "gpt-2": ByteLevel(add_prefix_space=False),
    "smollm": Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]),
    "llama-bpe": Sequence(
        [Split(Regex(LLAMA3_PATTERN), "isolated"), ByteLevel(add_prefix_space=False, use_regex=False)]
    ),
}
WHOLE_WORDS = ("llama-bpe",)  # names for which words that are tokens are used before any merge


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
