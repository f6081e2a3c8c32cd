"""Compare the size of a GGUF file with that of the run's dense model in the same type."""

from __future__ import annotations

import logging
from importlib.metadata import version
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gprune.discovery import family_of
from gprune.export.gguf_check import ask_llama_cpp
from gprune.export.gguf_types import BLOCK_SIZES, LLAMA_CPP, QUANTISED
from gprune.export.gguf_writer import named_tensors, tensor_bytes, write_gguf
from gprune.models.blocks import blocks_of
from gprune.models.copies import skeleton
from gprune.models.loading import read_config
from gprune.runs.folder import RunFolder
from gprune.storage.cache import cache_dir
from gprune.storage.files import key_of, read_json, scratch_folder, write_json

log = logging.getLogger("gprune")


def report_size(
    file: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, *, type: str
) -> None:
    """Log the size of a GGUF file, and that of the dense model in the same type if `folder` is the model of a run.

    Rows of a down projection that do not fit the type's blocks are stored in a larger type. A warning says so if the
    file is larger than that of the dense model, and names the width multiple with which they fit.
    """
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
    shapes = {name: list(tensor.shape) for name, tensor in named_tensors(dense)}
    key = key_of(shapes=shapes, type=type, llama_cpp=version(LLAMA_CPP), vocabulary=len(tokenizer))
    cached = cache_dir() / "gguf_sizes" / f"{key}.json"
    if content := read_json(cached):
        return content["bytes"]
    log.info("Quantising the dense model once, for its size in %s", type)
    zeros = {name: torch.zeros(()).expand(tensor.shape) for name, tensor in dense.state_dict().items()}
    dense.load_state_dict(zeros, assign=True)
    dense.tie_weights()
    with scratch_folder(file) as scratch:
        write_gguf(dense, tokenizer, scratch / "f16.gguf", type="f16", name="dense")
        ask_llama_cpp("quantise", scratch / "f16.gguf", output=str(scratch / "dense.gguf"), type=type.upper())
        size = (scratch / "dense.gguf").stat().st_size
    write_json(cached, {"bytes": size})
    return size
