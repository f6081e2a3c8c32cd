"""`gprune export`: write a pruned model in the format another program reads."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from gprune.console import Parser, guarded, quiet
from gprune.errors import UserError
from gprune.export.convert import QUANTISED, TYPES, export, model_folder
from gprune.export.push import push

ABOUT = """Write the model of a finished run in the format another program reads: one GGUF file for llama.cpp.

The file is checked in a llama.cpp build, and takes its place only then; a former export stays until a new one has
passed. The model folder of a run is a Hugging Face model already: it needs no export."""

MORE = """
examples:
  gprune export runs/NAME                              runs/NAME/model-f16.gguf
  gprune export runs/NAME --type q8_0 --overwrite      8-bit matrices, in the place of a former export
  gprune export runs/NAME/model --output small.gguf    a model folder, written where you say
  gprune export runs/NAME --push owner/name            what would go up to the Hugging Face Hub; --no-dry-run uploads"""


def parser() -> Parser:
    """The command line."""
    command_line = Parser("gprune export", description=ABOUT, epilog=MORE)
    command_line.add_argument("run", metavar="RUN", help="a finished run, or a model folder")
    command_line.add_argument("--to", choices=("gguf",), default="gguf", help="format (default: %(default)s)")
    command_line.add_argument("--output", metavar="PATH", help="the file to write (default: beside the model)")
    command_line.add_argument("--overwrite", action="store_true", help="replace a former export")
    types = ", ".join((*TYPES, *QUANTISED))
    command_line.add_argument("--type", default="f16", help=f"of the matrices: {types} (default: %(default)s)")
    command_line.add_argument("--unchecked", action="store_true", help="do not ask for a llama.cpp build")
    hub = command_line.add_argument_group("Hugging Face Hub")
    hub.add_argument("--push", metavar="OWNER/NAME", help="the model folder as it is, with its card; converts nothing")
    say_only = "only say what would go up (default: %(default)s)"
    hub.add_argument("--dry-run", action=argparse.BooleanOptionalAction, default=True, help=say_only)
    return command_line


def main(args: Sequence[str]) -> int:
    """Returns the exit code, as `guarded`."""
    return guarded("gprune export", lambda: run(args), stopped="; nothing was written.",
                   memory="; the model is loaded whole.")  # fmt: skip


def run(args: Sequence[str]) -> str:
    """Write or upload what the arguments ask for; returns the line that says where it is."""
    command_line = parser()
    options = command_line.parse_args(args)
    if options.push is not None:
        converting = ("to", "output", "overwrite", "type", "unchecked")
        if other := [name for name in converting if getattr(options, name) != command_line.get_default(name)]:
            raise UserError(f"--push uploads the model folder as it is; expected no --{other[0]} beside it.")
        quiet()
        return push(options.run, options.push, dry_run=options.dry_run)
    if not options.dry_run:
        raise UserError("--no-dry-run: expected --push OWNER/NAME beside it.")
    model_folder(options.run)  # what cannot be need not wait for the libraries that `quiet` imports
    quiet()
    choices = {name: getattr(options, name) for name in ("output", "type", "overwrite", "unchecked")}
    return f"Wrote {export(options.run, **choices)}\n"
