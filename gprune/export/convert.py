"""Export the model of a run to a GGUF file, which is written completely or not at all.

from gprune.export import export
export("runs/NAME", type="q8_0")      # returns the path of the file

PyTorch is imported late, so that errors in arguments are reported at once.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from gprune.console import Parser, quiet
from gprune.errors import UserError, optional_output, require_finite
from gprune.storage.reading import expanded

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger("gprune")
LLAMA_CPP = "llama-cpp-py-sync"  # a package with a compiled llama.cpp, which runs in a separate process
TYPES = {"f32": 32, "f16": 16, "q8_0": 8.5}  # bits per weight
QUANTISED = ("q4_k_m",)  # quantised by llama.cpp from f16
BLOCK_SIZES = {"f32": 1, "f16": 1, "q8_0": 32, "q4_k_m": 256}  # numbers of a row that are quantised together
ABOUT = """Export the model of a finished run to a GGUF file for llama.cpp.

With --check, llama.cpp runs the file, and its predictions are compared with the model's. The model folder of a run is
a Hugging Face model, which needs no export; publish it with `hf upload`."""
EXAMPLES = """
examples:
  gprune export runs/NAME                              runs/NAME/model-f16.gguf
  gprune export runs/NAME --type q8_0 --overwrite      8-bit matrices; replaces an earlier export
  gprune export runs/NAME/model --output small.gguf    a model folder and an output path"""
MESSAGE_ENDINGS = {
    "stopped": "; nothing was written.",
    "memory": "; the model is loaded whole.",
}  # as for `run_guarded`


def export(
    run_or_folder: str | Path,
    output: str | Path | None = None,
    *,
    type: str = "f16",
    overwrite: bool = False,
    check: bool = False,
) -> Path:
    """Write a pruned model to a GGUF file.

    The model in the file has the name of its run, or of its folder.

    Args:
        run_or_folder: a finished run, or a model folder (of gprune, or of a stock Llama).
        output: file to write; by default next to the model.
        type: type of matrices: f32, f16, q8_0, or q4_k_m (quantised by llama.cpp). Vectors are always f32.
        overwrite: replace a GGUF file, after the new one has been written.
        check: compare predictions of llama.cpp with those of the model before the file gets its name.

    Returns:
        The absolute path of the file.

    Raises:
        UserError: before the model is loaded, if an argument, the model or the output path is invalid; later, if GGUF
            does not support the model, the file cannot be written, or the check fails.
    """
    folder = find_model_folder(run_or_folder)
    path = expanded(f"{folder}-{type}.gguf" if output is None else output).absolute()
    check_type(type, check=check)
    if path.exists() and not (overwrite and is_gguf(path)):
        remedy = "Choose another --output, or replace a GGUF file with --overwrite"
        raise UserError(f"Cannot write '{path}': the file exists already. {remedy}.")
    if not path.parent.is_dir():
        raise UserError(f"--output must be in an existing folder; got '{path}'.")
    from gprune.export.gguf_check import ask_llama_cpp, check_gguf
    from gprune.export.gguf_writer import write_gguf
    from gprune.storage.files import replacing

    model, tokenizer = load_folder(folder)
    name = folder.parent.name if (folder.parent / "manifest.json").is_file() else folder.name
    with replacing(path) as new:
        if type in QUANTISED:
            f16_file = new.with_name(f"f16-{new.name}")  # in the scratch folder that `replacing` removes
            write_gguf(model, tokenizer, f16_file, type="f16", name=name)
            ask_llama_cpp("quantise", f16_file, output=str(new), type=type.upper())
        else:
            write_gguf(model, tokenizer, new, type=type, name=name)
        if check:
            check_gguf(model, tokenizer, new, type=type)
    with optional_output("the size of the dense model", "the file is complete"):
        report_size(path, model, tokenizer, folder, type=type)
    return path


def has_llama_cpp() -> bool:
    """Return whether the llama.cpp build for checking GGUF files is installed."""
    return importlib.util.find_spec(LLAMA_CPP.replace("-", "_")) is not None


def check_type(type: str, *, check: bool = False) -> None:
    """Raise UserError if a type is unknown, or llama.cpp is needed and not installed."""
    if type not in (*TYPES, *QUANTISED):
        raise UserError(f"Unknown GGUF type '{type}'. Available: {', '.join((*TYPES, *QUANTISED))}.")
    quantises = type in QUANTISED
    if (quantises or check) and not has_llama_cpp():
        use = f"quantise to {type}" if quantises else "check the file"
        raise UserError(f"Export to GGUF needs a llama.cpp build to {use}. Run `pip install {LLAMA_CPP}`.")


def is_gguf(path: Path) -> bool:
    """Return whether a path is a GGUF file. Other files are never overwritten."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(4) == b"GGUF"


def find_model_folder(run_or_folder: str | Path) -> Path:
    """Return the path of the model folder of a finished run, or of a model folder."""
    path = expanded(run_or_folder)
    is_model = (path / "config.json").is_file()
    is_run = (path / "manifest.json").is_file()
    if not (is_model or is_run):
        raise UserError(f"RUN must be a run (manifest.json) or a model folder (config.json); got '{path}'.")
    from gprune.runs.results import exported_model, read_numbers

    if is_model:
        folder = path.resolve()
        if folder.name == "model" and (folder.parent / "manifest.json").is_file():
            exported_model(folder.parent)  # raises UserError if the model was changed after the run
        return folder
    read_numbers(path)  # raises UserError if the run is not finished
    if not (path / "model" / "config.json").is_file():
        raise UserError(f"Cannot export '{path}': the run has no model (--export none). Run it again with --export hf.")
    return exported_model(path.resolve())


def load_folder(folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model in float32, and its tokenizer, without running code of the folder."""
    from gprune.discovery import family_of
    from gprune.models.loading import load_model

    try:
        model, tokenizer = load_model(str(folder))
        family_of(model)
        require_finite("weight was read", *model.parameters())
    except UserError as error:
        raise UserError(f"Cannot export '{folder}': {error}") from error
    return model, tokenizer


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
    from gprune.storage.cache import cache_dir
    from gprune.storage.files import key_of, read_json, scratch_folder, write_json

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


def parser() -> Parser:
    """Return the parser of the command's arguments."""
    command_line = Parser("gprune export", description=ABOUT, epilog=EXAMPLES)
    command_line.add_argument("run", metavar="RUN", help="a finished run, or a model folder")
    command_line.add_argument("--output", metavar="PATH", help="the file to write (default: beside the model)")
    command_line.add_argument("--overwrite", action="store_true", help="replace a GGUF file")
    command_line.add_argument(
        "--type", type=str.lower, choices=(*TYPES, *QUANTISED), default="f16", help="type of matrices (default: f16)"
    )
    command_line.add_argument("--check", action="store_true", help="run the file in llama.cpp and compare it")
    return command_line


def run(args: Sequence[str]) -> str:
    """Run the command, and return a line with the path of the written file. Errors are those of `export`."""
    options = parser().parse_args(args)
    find_model_folder(options.run)  # reports an invalid path before the imports that take seconds
    quiet()
    path = export(options.run, options.output, type=options.type, overwrite=options.overwrite, check=options.check)
    return f"Wrote {path}\n"
