"""The model of a run as one GGUF file for llama.cpp, checked in llama.cpp, written whole or not at all.

from gprune.export import export
export("runs/NAME", type="q8_0")      # returns the path of the file

Only light modules are imported here: a wrong argument should not have to wait for PyTorch.
"""

from __future__ import annotations

import importlib.util
import tempfile
from contextlib import suppress
from pathlib import Path

from gprune.errors import UserError
from gprune.export.source import load_folder, model_folder
from gprune.storage.reading import expanded, regular_file

LLAMA_CPP = "llama-cpp-py-sync"  # a package with a ready-built llama.cpp, which runs in a process of its own
TYPES = ("f32", "f16", "q8_0")
QUANTISED = ("q4_k_m",)  # by llama.cpp's own quantiser, from f16
SEARCHED = 2**26  # bytes at the beginning of a file among which the name of the program that wrote it is looked for


def export(
    run_or_folder: str | Path,
    output: str | Path | None = None,
    *,
    type: str = "f16",
    overwrite: bool = False,
    unchecked: bool = False,
) -> Path:
    """Write a pruned model as a GGUF file, and compare what llama.cpp computes of it with the model.

    Args:
        run_or_folder: a finished run, or a model folder (of gprune's, or of a stock Llama).
        output: file to write; by default beside the model.
        type: of the matrices: f32, f16, q8_0, or q4_k_m, which llama.cpp itself quantises. Vectors stay f32.
        overwrite: replace a former export; it stays until the new one has been checked.
        unchecked: write the file although no llama.cpp build is installed to check it with.

    Returns:
        The absolute path of the file.

    Raises:
        UserError: before anything heavy is done, for an argument, model or output that cannot be; later, for a model
            that GGUF cannot hold, a disk that cannot be written, or a check that failed.
    """
    folder = model_folder(run_or_folder)
    path = checked_output(folder, output, type=type, overwrite=overwrite, unchecked=unchecked)
    write(folder, path, type=type, unchecked=unchecked)
    return path


def has_llama_cpp() -> bool:
    """Whether the llama.cpp build that GGUF files are checked with is installed."""
    return importlib.util.find_spec(LLAMA_CPP.replace("-", "_")) is not None


def checked_output(folder: Path, output: str | Path | None, *, type: str, overwrite: bool, unchecked: bool) -> Path:
    """The absolute path to write; refuses what can be refused before the model is loaded. Arguments as for `export`."""
    if type not in (*TYPES, *QUANTISED):
        raise UserError(f"Unknown GGUF type '{type}'. Available: {', '.join((*TYPES, *QUANTISED))}.")
    if not has_llama_cpp() and (type in QUANTISED or not unchecked):
        use = f"quantise to {type}" if type in QUANTISED else "check the file (--unchecked writes it unchecked)"
        raise UserError(f"Export: expected a llama.cpp build to {use}; got none. Run `pip install {LLAMA_CPP}`.")
    path = expanded(f"{folder}-{type}.gguf" if output is None else output).absolute()
    if path.exists() and not overwrite:
        raise UserError(f"Export: '{path}' exists already; choose another --output, or pass --overwrite.")
    if path.exists() and not is_former_export(path):
        raise UserError(f"Export: '{path}' is no former export, so it is not overwritten.")
    if not path.parent.is_dir():
        raise UserError(f"Export: expected --output in a folder that exists, got '{path}'.")
    return path


def is_former_export(path: Path) -> bool:
    """Whether a file is GGUF and says that gprune wrote it: anything else stays, whatever is asked for."""
    with suppress(OSError):
        regular_file(path)
        with path.open("rb") as file:
            content = file.read(SEARCHED)
        return content.startswith(b"GGUF") and b"gprune" in content
    return False


def write(folder: Path, output: Path, *, type: str, unchecked: bool) -> None:
    """Write and check under a temporary name, then rename; the file calls the model by the name of its run or folder.

    Args:
        folder: of the model.
        output: absolute path, checked by `checked_output`.
        type, unchecked: as for `export`.
    """
    from gprune.export.gguf_check import check_gguf, quantise
    from gprune.export.gguf_writer import write_gguf
    from gprune.storage.files import replacing

    model, tokenizer = load_folder(folder)
    name = folder.parent.name if (folder.parent / "manifest.json").is_file() else folder.name
    with replacing(output) as new:
        if type in QUANTISED:
            with tempfile.TemporaryDirectory(dir=new.parent, prefix=".quantise-") as scratch:
                whole = Path(scratch) / "f16.gguf"
                write_gguf(model, tokenizer, whole, type="f16", name=name)
                quantise(whole, new, type=type)
        else:
            write_gguf(model, tokenizer, new, type=type, name=name)
        if not unchecked:
            check_gguf(model, tokenizer, new, type=type)
