"""GGUF files for llama.cpp: their types, what has to be installed, their size, and how they are written and checked.

PyTorch is imported late, so that errors in arguments are reported at once.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gprune.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from gprune.models.blocks import Block

log = logging.getLogger("gprune")
LLAMA_CPP = "llama-cpp-py-sync"  # a package with a compiled llama.cpp, which runs in a separate process
TYPES = {"f32": 32, "f16": 16, "q8_0": 8.5}  # bits per weight
QUANTISED = ("q4_k_m",)  # quantised by llama.cpp from f16
BLOCK_SIZES = {"f32": 1, "f16": 1, "q8_0": 32, "q4_k_m": 256}  # numbers of a row that are quantised together

TYPES_OF_FILE = (*TYPES, *QUANTISED)
DEFAULT_TYPE, DTYPE = "f16", "float32"


def path_beside(folder: Path, type: str) -> str:
    """Return the path of a file beside a model folder."""
    return f"{folder}-{type}.gguf"


def has_llama_cpp() -> bool:
    """Return whether the llama.cpp build for checking GGUF files is installed."""
    return importlib.util.find_spec(LLAMA_CPP.replace("-", "_")) is not None


def check_settings(type: str, *, check: bool = False) -> None:
    """Raise UserError if a type is unknown, or llama.cpp is needed and not installed."""
    if type not in TYPES_OF_FILE:
        raise UserError(f"Unknown GGUF type '{type}'. Available: {', '.join(TYPES_OF_FILE)}.")
    quantises = type in QUANTISED
    if (quantises or check) and not has_llama_cpp():
        use = f"quantise to {type}" if quantises else "check the file"
        raise UserError(f"Export to GGUF needs a llama.cpp build to {use}. Run `pip install {LLAMA_CPP}`.")


def is_ours(path: Path) -> bool:
    """Return whether a path is a GGUF file. Other files are never overwritten."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(4) == b"GGUF"


def refuse(blocks: Sequence[Block], config: PreTrainedConfig, *, type: str, uniform: bool, **_: Any) -> None:
    """Raise UserError for an invalid type, or if the format cannot express a model with these blocks.

    `uniform` tells that all blocks will have equal widths. The blocks may have no weights.
    """
    from gprune.export.gguf_writer import check_expressible

    check_settings(type)
    check_expressible(blocks, config, uniform=uniform)


def write(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, path: Path, *, type: str, name: str, check: bool
) -> None:
    """Write a file, and compare it in llama.cpp if `check`. `path` is in a scratch folder."""
    from gprune.export.gguf_check import ask_llama_cpp, check_gguf
    from gprune.export.gguf_writer import write_gguf

    if type in QUANTISED:
        f16_file = path.with_name(f"f16-{path.name}")
        write_gguf(model, tokenizer, f16_file, type="f16", name=name)
        ask_llama_cpp("quantise", f16_file, output=str(path), type=type.upper())
    else:
        write_gguf(model, tokenizer, path, type=type, name=name)
    if check:
        check_gguf(model, tokenizer, path, type=type)


def report_size(
    file: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, *, type: str
) -> None:
    """Log the size of a GGUF file, and that of the dense model in the same type if `folder` is the model of a run.

    Rows of a down projection that do not fit the type's blocks are stored in a larger type. A warning says so if the
    file is larger than that of the dense model, and names the width multiple with which they fit.
    """
    from gprune.discovery import family_of
    from gprune.export.gguf_writer import tensor_bytes
    from gprune.models.blocks import blocks_of
    from gprune.models.copies import skeleton
    from gprune.models.loading import read_config
    from gprune.runs.folder import RunFolder

    size = file.stat().st_size
    if not (folder.parent / "manifest.json").is_file():
        log.info("Size: %.1f MB", size / 1e6)
        return
    config = read_config(RunFolder(folder.parent).manifest["settings"]["model"]["name"])
    dense = skeleton(config, record=family_of(config))
    dense.get_decoder().rotary_emb = model.get_decoder().rotary_emb  # has numbers, and is stored in some files
    if type in QUANTISED:
        dense_size = quantised_size(dense, tokenizer, file, type=type)
    else:
        dense_size = size - tensor_bytes(model, type) + tensor_bytes(dense, type)
    block_size = BLOCK_SIZES[type]
    fits = all(block.neurons % block_size == 0 for block in blocks_of(model))
    hint = f"; widths in multiples of {block_size} (--sparsity.width_multiple {block_size}) make it smaller"
    log.info(
        "Size: %.1f MB; the dense model in %s: %.1f MB%s", size / 1e6, type, dense_size / 1e6, "" if fits else hint
    )
    if size > dense_size:
        log.warning(
            "The file is larger than that of the dense model, because rows of down projections that do not fit blocks "
            "of %d are stored in a larger type. Prune with --sparsity.width_multiple %d.",
            block_size, block_size,
        )  # fmt: skip


def quantised_size(dense: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, file: Path, *, type: str) -> int:
    """Return the bytes of a GGUF file that llama.cpp quantises from a model with the shapes of `dense`.

    The types of tensors depend on shapes alone, so the weights are zeros and the dense model is not loaded. The result
    is cached. Temporary files are written beside `file`.
    """
    import torch

    from gprune.export.gguf_check import ask_llama_cpp
    from gprune.export.gguf_writer import named_tensors, write_gguf
    from gprune.storage.files import Cache, key_of, scratch_folder

    shapes = {name: list(tensor.shape) for name, tensor in named_tensors(dense)}
    key = key_of(shapes=shapes, type=type, llama_cpp=version(LLAMA_CPP), vocabulary=len(tokenizer))

    def quantise() -> dict[str, int]:
        """Write and quantise the model, and return the bytes of the file."""
        log.info("Quantising the dense model once, for its size in %s", type)
        zeros = {name: torch.zeros(()).expand(tensor.shape) for name, tensor in dense.state_dict().items()}
        dense.load_state_dict(zeros, assign=True)
        dense.tie_weights()
        with scratch_folder(file) as scratch:
            write_gguf(dense, tokenizer, scratch / "f16.gguf", type="f16", name="dense")
            ask_llama_cpp("quantise", scratch / "f16.gguf", output=str(scratch / "dense.gguf"), type=type.upper())
            return {"bytes": (scratch / "dense.gguf").stat().st_size}

    return Cache("gguf_sizes").get(key, quantise)["bytes"]
