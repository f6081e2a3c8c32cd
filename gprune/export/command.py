"""`gprune export`: write a pruned model in the format another program reads."""

from __future__ import annotations

from collections.abc import Sequence

from gprune.console import Parser, quiet
from gprune.export.convert import QUANTISED, TYPES, export, model_folder

ABOUT = """Write the model of a finished run in the format another program reads: one GGUF file for llama.cpp.

The file is checked in a llama.cpp build, and takes its place only then; a former export stays until a new one has
passed. The model folder of a run is a Hugging Face model already: it needs no export, and `hf upload` publishes it."""

MORE = """
examples:
  gprune export runs/NAME                              runs/NAME/model-f16.gguf
  gprune export runs/NAME --type q8_0 --overwrite      8-bit matrices, in the place of a former export
  gprune export runs/NAME/model --output small.gguf    a model folder, written where you say"""
ENDS = {"stopped": "; nothing was written.", "memory": "; the model is loaded whole."}  # as for `guarded`


def parser() -> Parser:
    """The command line."""
    command_line = Parser("gprune export", description=ABOUT, epilog=MORE)
    command_line.add_argument("run", metavar="RUN", help="a finished run, or a model folder")
    command_line.add_argument("--output", metavar="PATH", help="the file to write (default: beside the model)")
    command_line.add_argument("--overwrite", action="store_true", help="replace a GGUF file")
    command_line.add_argument(
        "--type", type=str.lower, choices=(*TYPES, *QUANTISED), default="f16", help="of the matrices (default: f16)"
    )
    command_line.add_argument("--unchecked", action="store_true", help="do not ask for a llama.cpp build")
    return command_line


def run(args: Sequence[str]) -> str:
    """Write the file that the arguments ask for; returns the line that says where it is."""
    options = parser().parse_args(args)
    model_folder(options.run)  # what cannot be need not wait for the libraries that `quiet` imports
    quiet()
    choices = {name: getattr(options, name) for name in ("output", "type", "overwrite", "unchecked")}
    return f"Wrote {export(options.run, **choices)}\n"
