"""Model folders, looked at before anything is loaded: whole, of this world's sizes, and leading nowhere else."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel

from gprune.errors import UserError
from gprune.models.families import FAMILIES
from gprune.storage.reading import read_text, unsafe_entries

# Far beyond any model there is: a config.json of a few bytes must not ask for more than this machine has.
LARGEST_SIZE = 2**24
SIZES = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size")
LARGEST = {
    "num_hidden_layers": 1000,
    "num_experts": 4096,
    "num_local_experts": 4096,
    "num_labels": 10_000,
} | dict.fromkeys(SIZES, LARGEST_SIZE)
COUNTED = re.compile(r"(num|n)_|.*_(size|dim|layers?|heads|rank|experts)$|.*intermediate.*")  # other sizes
WEIGHTS = (".safetensors", ".bin", ".gguf")
INDEX = "model.safetensors.index.json"


def is_complete(folder: Path) -> bool:
    """Whether a model folder is whole, with one file of weights or several; safetensors knows where files must end."""
    try:
        json.loads((folder / "config.json").read_text())
        json.loads((folder / "tokenizer_config.json").read_text())
        index = folder / INDEX
        if (folder / "model.safetensors").exists() or not index.exists():
            return bool(_names_in(folder / "model.safetensors"))
        places = json.loads(index.read_text())["weight_map"]
        names = {file: _names_in(folder / Path(file).name) for file in set(places.values())}
        return bool(places) and all(name in names[file] for name, file in places.items())
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError, SafetensorError):
        return False  # JSON of any other shape, or weights that are not whole


def _names_in(weights: Path) -> set[str]:
    """Names of the tensors in a safetensors file; a SafetensorError unless it ends where its header says."""
    with safe_open(weights, "pt") as file:
        return set(file.keys())


def check_folder(location: str | Path) -> None:
    """Raise UserError for a model folder with files that never end, or links to text outside of it.

    A tokenizer's files and a chat template are copied into exports: a link would copy any file of the user's. Weights
    may lie elsewhere, and the hub's cache links to its own blobs.
    """
    blobs = os.path.realpath(os.path.join(location, "../../blobs")) + os.sep
    for what, path in unsafe_entries(location):
        if what.startswith("neither") or not (path.suffix in WEIGHTS or os.path.realpath(path).startswith(blobs)):
            raise UserError(f"--model.name: {path} is {what}; expected a plain file in its place.")


def check_index(folder: Path) -> None:
    """Raise UserError for an index that names files of weights outside of its folder."""
    try:
        places = json.loads(read_text(folder / INDEX))["weight_map"].values()
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return  # there is none; or it is damaged, of which transformers tells
    for file in places:
        if not isinstance(file, str) or Path(file).is_absolute() or ".." in Path(file).parts:
            raise UserError(
                f"--model.name: {INDEX} in '{folder}' names the file '{file}'; expected files inside the folder."
            )


def check_sizes(content: Any, name: str) -> None:
    """Raise UserError for a number of layers, heads, ... that no model has, in any part of a config.json.

    Before a config class reads it, which makes as many labels as a number in it says.

    Args:
        content: the config.json, or a part of it.
        name: of the model, for the error.
    """
    for part in content if isinstance(content, list) else ():
        check_sizes(part, name)
    exact = {*LARGEST, *(family.width for family in FAMILIES.values())}
    for key, value in content.items() if isinstance(content, dict) else ():
        check_sizes(value, name)
        largest = LARGEST.get(key, LARGEST_SIZE)
        if key in exact:
            fits = value is None or (type(value) is int and 0 < value <= largest)
        else:
            fits = not isinstance(value, int | float) or not COUNTED.match(key) or abs(value) <= largest
        if not fits:
            raise UserError(
                f"--model.name: config.json of '{name}' says {key} {str(value)[:40]}; expected 1 to {largest:,}."
            )


def check_stored(model: PreTrainedModel, location: str | Path) -> None:
    """Raise UserError for a config that asks for more parameters than the folder's files of weights can hold.

    Args:
        model: of the config, without weights.
        location: a folder; a hub id is not checked, since nothing of it lies here yet.
    """
    stored = sum(path.stat().st_size for path in Path(location).glob("*") if path.suffix in WEIGHTS)
    asked = sum(parameter.numel() for parameter in model.parameters())
    if stored and asked > 8 * stored:  # one bit each is the least
        raise UserError(
            f"--model.name: config.json of '{location}' asks for {asked:,} parameters, and its files of weights have "
            f"{stored:,} bytes; expected a config of these weights."
        )
