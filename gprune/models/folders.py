"""Checks of model folders before anything is loaded: complete, of plausible sizes, and without links out of them."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from gprune.checks import shown
from gprune.errors import UserError
from gprune.storage.reading import read_text, unsafe_entries

# Larger than in any model, so that a small config.json cannot exhaust memory.
COUNTED = re.compile(r"(num|n)_|.*_(size|dim|layers?|heads|rank|experts)$|.*intermediate.*")
LARGEST_SIZE = 2**24
LARGEST = {"num_hidden_layers": 1000, "num_experts": 4096, "num_local_experts": 4096, "num_labels": 10_000}
POSITIVE = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")
WEIGHTS = (".safetensors", ".bin", ".gguf")


def check_folder(location: str | Path) -> None:
    """Raise UserError if a model folder has special files, or links to text files outside of it.

    Tokenizer files and chat templates are copied into exports, so a link could copy any file of the user. Links to
    weights, and links of the hub's cache to its own blobs, are allowed. An index may only name files of the folder.
    """
    blobs = os.path.realpath(os.path.join(location, "../../blobs")) + os.sep
    for what, path in unsafe_entries(location):
        if what.startswith("neither") or not (path.suffix in WEIGHTS or os.path.realpath(path).startswith(blobs)):
            raise UserError(f"--model.name must contain only regular files; got {path}, which is {what}.")
    for index in Path(location).glob("*.index.json"):
        try:
            names = [str(name) for name in json.loads(read_text(index))["weight_map"].values()]
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
            continue  # transformers reports the error
        if outside := [name for name in names if os.path.isabs(name) or ".." in Path(name).parts]:
            raise UserError(f"--model.name: {index} must name files of its own folder; got {shown(outside[0])}.")


def check_sizes(content: Any, name: str) -> None:
    """Raise UserError if a number of layers, heads, ... in a config.json is implausible.

    This is checked before a config class reads it, because a class makes as many labels as a number in it.
    """
    named = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in named:
        check_sizes(value, name)
        if isinstance(value, int | float) and COUNTED.match(str(key)):
            largest = LARGEST.get(key, LARGEST_SIZE)
            if not abs(value) <= largest or (key in POSITIVE and value <= 0):
                got = f"{str(value)[:40]} in config.json of '{name}'"
                raise UserError(f"--model.name: {key} must be 1 to {largest:,}; got {got}.")


def check_stored(model: PreTrainedModel, location: str | Path) -> None:
    """Raise UserError if a config has more parameters than the weight files of the folder can contain.

    `model` has no weights. Models on the hub are not checked, because they are not downloaded yet.
    """
    stored = sum(path.stat().st_size for path in Path(location).glob("*") if path.suffix in WEIGHTS)
    asked = sum(parameter.numel() for parameter in model.parameters())
    if stored and asked > 8 * stored:  # at least one bit each
        got = f"{asked:,} parameters, for files of weights with {stored:,} bytes"
        raise UserError(f"--model.name: config.json of '{location}' must describe its weights; got {got}.")
