"""`gprune export`: write a pruned model in the format of another program."""

from __future__ import annotations

from collections.abc import Sequence

from gprune.console import Parser, quiet
from gprune.export.convert import QUANTISED, TYPES, export, model_folder

ABOUT = """Export the model of a finished run to a GGUF file for llama.cpp.

The file is checked with llama.cpp before it replaces an earlier export. The model folder of a run is a Hugging Face
model, which needs no export; publish it with `hf upload`."""

MORE = """
examples:
  gprune export runs/NAME                              runs/NAME/model-f16.gguf
  gprune export runs/NAME --type q8_0 --overwrite      8-bit matrices; replaces an earlier export
  gprune export runs/NAME/model --output small.gguf    a model folder and an output path"""
ENDS = {"stopped": "; nothing was written.", "memory": "; the model is loaded whole."}  # as for `guarded`


def parser() -> Parser:
    """The command line."""
    command_line = Parser("gprune export", description=ABOUT, epilog=MORE)
    command_line.add_argument("run", metavar="RUN", help="a finished run, or a model folder")
    command_line.add_argument("--output", metavar="PATH", help="the file to write (default: beside the model)")
    command_line.add_argument("--overwrite", action="store_true", help="replace a GGUF file")
    command_line.add_argument(
        "--type", type=str.lower, choices=(*TYPES, *QUANTISED), default="f16", help="type of matrices (default: f16)"
    )
    command_line.add_argument("--unchecked", action="store_true", help="do not check the file in llama.cpp")
    return command_line


def run(args: Sequence[str]) -> str:
    """Export by command-line arguments. Return a line with the path of the file."""
    options = parser().parse_args(args)
    model_folder(options.run)  # checked before `quiet` imports libraries
    quiet()
    choices = {name: getattr(options, name) for name in ("output", "type", "overwrite", "unchecked")}
    return f"Wrote {export(options.run, **choices)}\n"
