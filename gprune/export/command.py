"""`gprune export`: write a pruned model in the format of another program."""

from __future__ import annotations

from collections.abc import Sequence

from gprune.console import Parser, quiet
from gprune.export.convert import QUANTISED, TYPES, export, find_model_folder

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
