"""`gprune export`: write a pruned model in the format another program reads."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from gprune.console import Parser, guarded, quiet
from gprune.errors import UserError
from gprune.export.job import EXPORTS, QUANTISED, TYPES, Job
from gprune.export.push import push

ABOUT = """Write the model of a finished run in the format another program reads.

Whatever is written is checked in that program and takes its place only then; a former export stays until a new one has
passed. The model folder of a run is a Hugging Face model already: it needs no export."""

MORE = """
examples:
  gprune export runs/NAME                              runs/NAME/model-f16.gguf
  gprune export runs/NAME --type q8_0 --overwrite      8-bit matrices, in the place of a former export
  gprune export runs/NAME/model --output small.gguf    a model folder, written where you say
  gprune export runs/NAME --to onnx                    runs/NAME/model-onnx/model.onnx
  gprune export runs/NAME --push owner/name            what would go up to the Hugging Face Hub; --no-dry-run uploads"""


def parser() -> Parser:
    """The command line; what it knows of formats comes from `EXPORTS`."""
    formats = "\n".join(f"  {name:6}{(EXPORTS[name].__doc__ or '').splitlines()[0]}" for name in EXPORTS)
    made = Parser("gprune export", description=ABOUT, epilog=f"formats:\n{formats}\n{MORE}")
    made.add_argument("run", metavar="RUN", help="a finished run, or a model folder")
    made.add_argument("--to", default="gguf", metavar="FORMAT", help=f"{' or '.join(EXPORTS)} (default: %(default)s)")
    made.add_argument("--output", metavar="PATH", help="the file or folder to write (default: beside the model)")
    made.add_argument("--overwrite", action="store_true", help="replace a former export")
    # Options of one format: absent unless given, so that another format can refuse them.
    absent = {"default": argparse.SUPPRESS}
    made.add_argument(
        "--type", **absent, help=f"gguf: of the matrices, {', '.join((*TYPES, *QUANTISED))} (default: f16)"
    )
    made.add_argument("--unchecked", action="store_true", **absent, help="gguf: do not ask for a llama.cpp build")
    hub = made.add_argument_group("Hugging Face Hub")
    hub.add_argument("--push", metavar="OWNER/NAME", help="the model folder as it is, with its card; converts nothing")
    hub.add_argument(
        "--dry-run",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="only say what would go up (default: %(default)s)",
    )
    return made


def main(args: Sequence[str]) -> int:
    """Returns the exit code, as `guarded`."""
    return guarded("gprune export", lambda: run(args), stopped="; nothing was written.",
                   memory="; the model is loaded whole.")  # fmt: skip


def run(args: Sequence[str]) -> str:
    """Write what the arguments ask for; returns the line that says where it is."""
    options = vars(parser().parse_args(args))
    repo, dry_run = options.pop("push"), options.pop("dry_run")
    if repo is not None:
        if other := [name for name, value in options.items() if name != "run" and value not in (False, None, "gguf")]:
            raise UserError(f"--push uploads the model folder as it is; expected no --{other[0]} beside it.")
        quiet()
        return push(options["run"], repo, dry_run=dry_run)
    if not dry_run:
        raise UserError("--no-dry-run: expected --push OWNER/NAME beside it.")
    job = Job.of(options.pop("run"), **options)
    quiet()
    return f"Wrote {job.run()}\n"
