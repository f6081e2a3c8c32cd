"""Export the model of a run to a GGUF file, which is written completely or not at all.

from gprune.export import export
export("runs/NAME", type="q8_0")      # returns the path of the file

PyTorch is imported late, so that errors in arguments are reported at once.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

from gprune.errors import UserError, optional_output, require_finite
from gprune.export.gguf_types import LLAMA_CPP, QUANTISED, TYPES
from gprune.storage.reading import expanded

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


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
    from gprune.export.size import report_size
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
    from gprune.models.loading import load_model, read_config

    try:
        family_of(read_config(str(folder)))  # refuses an unknown type before its weights are loaded
        model, tokenizer = load_model(str(folder))
        family_of(model)
        require_finite("weight was read", *model.parameters())
    except UserError as error:
        raise UserError(f"Cannot export '{folder}': {error}") from error
    return model, tokenizer
