"""`gprune export`: convert the model of a run to the format of another program, completely or not at all.

from gprune.export import export
export("runs/NAME", type="q8_0")                  # returns the path of the GGUF file
export("runs/NAME", format="nemotron-nas")        # returns the path of the folder

A format is a module with the names `DEFAULT_TYPE`, `DTYPE` (in which the model is loaded), `path_beside`,
`check_settings`, `is_ours`, `refuse` and `write`. It is imported late, so that errors in arguments are reported at
once.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from gprune.console import Parser, quiet
from gprune.errors import UserError, require_finite
from gprune.storage.paths import expanded

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

FORMATS = {"gguf": "gprune.models.gguf", "nemotron-nas": "gprune.export.nemotron"}
ABOUT = """Export the model of a finished run to a GGUF file for llama.cpp, or to a DeciLM folder (nemotron-nas), which
vLLM, SGLang, TensorRT-LLM, mlx-lm and exllamav3 compute by a class of their own.

With --check, the result is loaded in a process of its own, and its predictions are compared with the model's. The model
folder of a run is a Hugging Face model, which needs no export; publish it with `hf upload`."""
EXAMPLES = """
examples:
  gprune export runs/NAME                              runs/NAME/model-f16.gguf
  gprune export runs/NAME --type q8_0 --overwrite      8-bit matrices; replaces an earlier export
  gprune export runs/NAME --format nemotron-nas        runs/NAME/model-nemotron-nas
  gprune export runs/NAME/model --output small.gguf    a model folder and an output path"""
MESSAGE_ENDINGS = {
    "stopped": "; nothing was written.",
    "memory": "; the model is loaded whole.",
}  # as for `run_guarded`


def format_named(name: str) -> ModuleType:
    """Return the module of a format. Raise UserError if the name is unknown."""
    if name not in FORMATS:
        raise UserError(f"Unknown format '{name}'. Available: {', '.join(FORMATS)}.")
    return importlib.import_module(FORMATS[name])


def export(
    run_or_folder: str | Path,
    output: str | Path | None = None,
    *,
    format: str = "gguf",
    type: str | None = None,
    overwrite: bool = False,
    check: bool = False,
) -> Path:
    """Write a pruned model in the format of another program.

    In a GGUF file the model has the name of its run, or of its folder.

    Args:
        run_or_folder: a finished run, or a model folder (of gprune, or of a stock Llama).
        output: path to write; by default next to the model.
        format: gguf, or nemotron-nas.
        type: type of the matrices in a GGUF file: f32, f16 (default), q8_0, or q4_k_m (quantised by llama.cpp). Vectors
            are always f32. A DeciLM folder has the dtype of the model.
        overwrite: replace an earlier export, after the new one has been written.
        check: compare predictions of the export with those of the model before the export gets its name: of a GGUF file
            in llama.cpp, of a folder in transformers.

    Returns:
        The absolute path of the file or folder.

    Raises:
        UserError: before the model is loaded, if an argument, the model or the output path is invalid; later, if the
            format does not support the model, the result cannot be written, or the check fails.
    """
    folder = find_model_folder(run_or_folder)
    target = format_named(format)
    type = type or target.DEFAULT_TYPE
    path = expanded(target.path_beside(folder, type) if output is None else output).absolute()
    target.check_settings(type, check=check)
    if path.exists() and not (overwrite and target.is_ours(path)):
        remedy = f"Choose another --output, or replace an earlier export to {format} with --overwrite"
        raise UserError(f"Cannot write '{path}': it exists already. {remedy}.")
    if not path.parent.is_dir():
        raise UserError(f"--output must be in an existing folder; got '{path}'.")
    from gprune.storage.files import replacing

    model, tokenizer = load_folder(folder, dtype=target.DTYPE)
    name = folder.parent.name if (folder.parent / "manifest.json").is_file() else folder.name
    with replacing(path) as new:
        target.write(model, tokenizer, new, type=type, name=name, check=check)
    return path


def find_model_folder(run_or_folder: str | Path) -> Path:
    """Return the path of the model folder of a finished run, or of a model folder."""
    path = expanded(run_or_folder)
    is_model = (path / "config.json").is_file()
    is_run = (path / "manifest.json").is_file()
    if not (is_model or is_run):
        raise UserError(f"RUN must be a run (manifest.json) or a model folder (config.json); got '{path}'.")
    if is_model:
        return path.resolve()
    from gprune.runs.results import read_numbers

    read_numbers(path)  # raises UserError if the run is not finished
    if not (path / "model" / "config.json").is_file():
        raise UserError(f"Cannot export '{path}': the run has no model (--export none). Run it again with --export hf.")
    return path.resolve() / "model"


def load_folder(folder: Path, *, dtype: str = "float32") -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model in a dtype (auto: that of its files), and its tokenizer, without running code of the folder."""
    from gprune.discovery import family_of
    from gprune.models.loading import load_model, read_config

    try:
        family_of(read_config(str(folder)))  # refuses an unknown type before its weights are loaded
        model, tokenizer = load_model(str(folder), dtype=dtype)
        family_of(model)
        require_finite("weight was read", *model.parameters())
    except UserError as error:
        raise UserError(f"Cannot export '{folder}': {error}") from error
    return model, tokenizer


def parser() -> Parser:
    """Return the parser of the command's arguments."""
    command_line = Parser("gprune export", description=ABOUT, epilog=EXAMPLES)
    command_line.add_argument("run", metavar="RUN", help="a finished run, or a model folder")
    command_line.add_argument("--format", choices=tuple(FORMATS), default="gguf", help="format (default: gguf)")
    command_line.add_argument("--output", metavar="PATH", help="the path to write (default: beside the model)")
    command_line.add_argument("--overwrite", action="store_true", help="replace an earlier export")
    command_line.add_argument(
        "--type", type=str.lower, help="type of matrices in a GGUF file: f32, f16 (default), q8_0 or q4_k_m"
    )
    command_line.add_argument(
        "--check", action="store_true", help="load the result in llama.cpp or transformers and compare it"
    )
    return command_line


def run(args: Sequence[str]) -> str:
    """Run the command, and return a line with the path that was written. Errors are those of `export`."""
    options = parser().parse_args(args)
    find_model_folder(options.run)  # reports an invalid path before the imports that take seconds
    quiet()
    path = export(
        options.run, options.output, format=options.format, type=options.type, overwrite=options.overwrite,
        check=options.check,
    )  # fmt: skip
    return f"Wrote {path}\n"
