"""Model folders, looked at before anything is loaded: whole, of this world's sizes, and leading nowhere else."""

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

# Far beyond any model there is: a config.json of a few bytes must not ask for more than this machine has.
COUNTED = re.compile(r"(num|n)_|.*_(size|dim|layers?|heads|rank|experts)$|.*intermediate.*")
LARGEST_SIZE = 2**24
LARGEST = {"num_hidden_layers": 1000, "num_experts": 4096, "num_local_experts": 4096, "num_labels": 10_000}
POSITIVE = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")
WEIGHTS = (".safetensors", ".bin", ".gguf")


def check_folder(location: str | Path) -> None:
    """Raise UserError for a model folder with files that never end, or that lead to text, or weights, outside of it.

    A tokenizer's files and a chat template are copied into exports: a link would copy any file of the user's. Weights
    may lie elsewhere, and the hub's cache links to its own blobs.
    """
    blobs = os.path.realpath(os.path.join(location, "../../blobs")) + os.sep
    for what, path in unsafe_entries(location):
        if what.startswith("neither") or not (path.suffix in WEIGHTS or os.path.realpath(path).startswith(blobs)):
            raise UserError(f"--model.name must contain only regular files; got {path}, which is {what}.")
    for index in Path(location).glob("*.index.json"):
        try:
            names = [str(name) for name in json.loads(read_text(index))["weight_map"].values()]
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
            continue  # transformers says what is wrong with it
        if outside := [name for name in names if os.path.isabs(name) or ".." in Path(name).parts]:
            raise UserError(f"--model.name: {index} must name files of its own folder; got {shown(outside[0])}.")


def check_sizes(content: Any, name: str) -> None:
    """Raise UserError for a number of layers, heads, ... that no model has, in any part of a model's config.json.

    Before a config class reads it, which makes as many labels as a number in it says.
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
    """Raise UserError for a config that asks for more parameters than the folder's files of weights can hold.

    `model` has no weights. A model on the hub is not checked, since nothing of it lies here yet.
    """
    stored = sum(path.stat().st_size for path in Path(location).glob("*") if path.suffix in WEIGHTS)
    asked = sum(parameter.numel() for parameter in model.parameters())
    if stored and asked > 8 * stored:  # one bit each is the least
        got = f"{asked:,} parameters, for files of weights with {stored:,} bytes"
        raise UserError(f"--model.name: config.json of '{location}' must describe its weights; got {got}.")
