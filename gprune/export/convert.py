"""The model of a run as one GGUF file for llama.cpp, checked in llama.cpp, written whole or not at all.

from gprune.export import export
export("runs/NAME", type="q8_0")      # returns the path of the file

Only light modules are imported here: a wrong argument should not have to wait for PyTorch.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

from gprune.errors import UserError, require_finite
from gprune.storage.reading import expanded

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

LLAMA_CPP = "llama-cpp-py-sync"  # a package with a ready-built llama.cpp, which runs in a process of its own
TYPES = {"f32": 32, "f16": 16, "q8_0": 8.5}  # bits of a weight
QUANTISED = ("q4_k_m",)  # by llama.cpp's own quantiser, from f16


def export(
    run_or_folder: str | Path,
    output: str | Path | None = None,
    *,
    type: str = "f16",
    overwrite: bool = False,
    unchecked: bool = False,
) -> Path:
    """Write a pruned model as a GGUF file, and compare what llama.cpp computes of it with the model.

    The file calls the model by the name of its run, or of its folder.

    Args:
        run_or_folder: a finished run, or a model folder (of gprune's, or of a stock Llama).
        output: file to write; by default beside the model.
        type: of the matrices: f32, f16, q8_0, or q4_k_m, which llama.cpp itself quantises. Vectors stay f32.
        overwrite: replace a GGUF file; it stays until the new one has been checked.
        unchecked: write the file although no llama.cpp build is installed to check it with.

    Returns:
        The absolute path of the file.

    Raises:
        UserError: before the model is loaded, for an argument, model or output that cannot be; later, for a model
            that GGUF cannot hold, a disk that cannot be written, or a check that failed.
    """
    folder = model_folder(run_or_folder)
    path = expanded(f"{folder}-{type}.gguf" if output is None else output).absolute()
    check_type(type, unchecked=unchecked)
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
            whole = new.with_name(f"f16-{new.name}")  # in the scratch folder of `replacing`, which removes it
            write_gguf(model, tokenizer, whole, type="f16", name=name)
            ask_llama_cpp("quantise", whole, output=str(new), type=type.upper())
        else:
            write_gguf(model, tokenizer, new, type=type, name=name)
        if not unchecked:
            check_gguf(model, tokenizer, new, type=type)
    return path


def has_llama_cpp() -> bool:
    """Whether the llama.cpp build that GGUF files are checked with is installed."""
    return importlib.util.find_spec(LLAMA_CPP.replace("-", "_")) is not None


def check_type(type: str, *, unchecked: bool) -> None:
    """Refuse a type that is unknown, or that needs a llama.cpp build where none is installed."""
    if type not in (*TYPES, *QUANTISED):
        raise UserError(f"Unknown GGUF type '{type}'. Available: {', '.join((*TYPES, *QUANTISED))}.")
    if not has_llama_cpp() and (type in QUANTISED or not unchecked):
        use = f"quantise to {type}" if type in QUANTISED else "check the file (--unchecked of gprune export skips it)"
        raise UserError(f"Export to GGUF needs a llama.cpp build to {use}. Run `pip install {LLAMA_CPP}`.")


def is_gguf(path: Path) -> bool:
    """Whether a file is GGUF: anything else stays, whatever is asked for."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(4) == b"GGUF"


def model_folder(run_or_folder: str | Path) -> Path:
    """The model folder of a finished run, or the model folder itself; a UserError for any other place."""
    path = expanded(run_or_folder)
    is_model, is_run = ((path / name).is_file() for name in ("config.json", "manifest.json"))
    if not (is_model or is_run):
        raise UserError(f"RUN must be a run (manifest.json) or a model folder (config.json); got '{path}'.")
    from gprune.runs.results import exported_model, finished

    folder = path.resolve()
    if is_model:
        if folder.name == "model" and (folder.parent / "manifest.json").is_file():
            exported_model(folder.parent)  # or says why it is not what the run left
        return folder
    finished(path)  # or says why it is not
    if not (path / "model" / "config.json").is_file():
        raise UserError(f"Cannot export '{path}': the run has no model (--export none). Run it again with --export hf.")
    return exported_model(folder)


def load_folder(folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model in float32, and its tokenizer; a UserError for what cannot be loaded. The folder's code is not run."""
    from gprune.models.loading import load_model

    try:
        model, tokenizer = load_model(str(folder))
        require_finite("weight was read", *model.parameters())
    except UserError as error:
        raise UserError(f"Cannot export '{folder}': {error}") from error
    return model, tokenizer
