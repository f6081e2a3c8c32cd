"""Checks of model folders before anything is loaded: complete, of plausible sizes, and without links out of them."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from gprune.checks import format_value
from gprune.errors import UserError
from gprune.storage.reading import read_text, unsafe_entries

SIZE_KEYS = re.compile(r"(num|n)_|.*_(size|dim|layers?|heads|rank|experts)$|.*intermediate.*")
# Limits are larger than in any model. They exist because a small config.json could exhaust memory.
DEFAULT_LIMIT = 2**24
LIMITS = {"num_hidden_layers": 1000, "num_experts": 4096, "num_local_experts": 4096, "num_labels": 10_000}
POSITIVE_KEYS = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".gguf")


def check_folder(location: str | Path) -> None:
    """Raise UserError if a model folder has special files, or links to text files outside of it.

    Tokenizer files and chat templates are copied into exports, so a link could copy any file of the user. Links to
    weights, and links of the hub's cache to its own blobs, are allowed. An index may only name files of the folder.
    """
    blobs = os.path.realpath(os.path.join(location, "../../blobs")) + os.sep
    for what, path in unsafe_entries(location):
        is_special_file = what.startswith("neither")
        is_allowed_link = path.suffix in WEIGHT_SUFFIXES or os.path.realpath(path).startswith(blobs)
        if is_special_file or not is_allowed_link:
            raise UserError(f"--model.name must contain only regular files; got {path}, which is {what}.")
    for index in Path(location).glob("*.index.json"):
        try:
            names = [str(name) for name in json.loads(read_text(index))["weight_map"].values()]
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
            continue  # transformers reports the error
        if outside := [name for name in names if os.path.isabs(name) or ".." in Path(name).parts]:
            raise UserError(f"--model.name: {index} must name files of its own folder; got {format_value(outside[0])}.")


def check_sizes(content: Any, name: str) -> None:
    """Raise UserError if a number of layers, heads, ... in a config.json is implausible.

    This is checked before a config class reads the file, because a class makes as many labels as a number in it.

    Args:
        content: the content of config.json or a nested value of it, any JSON value.
        name: name of the model, for the message.
    """
    if isinstance(content, dict):
        items = list(content.items())
    elif isinstance(content, list):
        items = list(enumerate(content))
    else:
        items = []
    for key, value in items:
        check_sizes(value, name)
        if isinstance(value, int | float) and SIZE_KEYS.match(str(key)):
            limit = LIMITS.get(key, DEFAULT_LIMIT)
            is_too_large = not abs(value) <= limit  # also true for NaN
            is_too_small = key in POSITIVE_KEYS and value <= 0
            if is_too_large or is_too_small:
                description = f"{str(value)[:40]} in config.json of '{name}'"
                raise UserError(f"--model.name: {key} must be 1 to {limit:,}; got {description}.")


def check_parameter_count(model: PreTrainedModel, location: str | Path) -> None:
    """Raise UserError if a config has more parameters than the weight files of the folder can contain.

    A parameter needs at least one bit, so a byte contains at most 8 parameters. Models on the hub are not checked,
    because they are not downloaded yet.

    Args:
        model: the model of the config, which may have no weights.
        location: folder or hub id.
    """
    stored_bytes = sum(path.stat().st_size for path in Path(location).glob("*") if path.suffix in WEIGHT_SUFFIXES)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    if stored_bytes and parameters > 8 * stored_bytes:
        sizes = f"{parameters:,} parameters, for files of weights with {stored_bytes:,} bytes"
        raise UserError(f"--model.name: config.json of '{location}' must describe its weights; got {sizes}.")
