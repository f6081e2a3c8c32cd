"""All commands: `gprune COMMAND ...`, or `python -m gprune COMMAND ...`. `train.py` is `gprune prune`."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from gprune.console import Parser, guarded, leave

# By name: the module with `run`, which does the work, and `ENDS`, how it ends early; and a line of help.
COMMANDS = {
    "prune": ("gprune.cli", "a model, as flags and --config files say"),
    "report": ("gprune.studies.report_command", "tables and figures from finished runs"),
    "export": ("gprune.export.command", "the pruned model in the format another program reads"),
    "evaluate": ("gprune.benchmarks.command", "tasks, perplexity and speed of a run or a model"),
    "study": ("gprune.studies.command", "a list of configurations, run and tabulated"),
}


def parser() -> Parser:
    """The command line as far as the name of the command."""
    lines = "\n".join(f"  {name:10}{about}" for name, (_, about) in COMMANDS.items())
    about = f"Prune a language model, and work with finished runs.\n\ncommands:\n{lines}"
    made = Parser("gprune", usage="gprune COMMAND ...", description=about)
    made.add_argument("command", metavar="COMMAND", choices=COMMANDS, help="one of these; COMMAND --help says more")
    return made


def main(args: Sequence[str] | None = None) -> int:
    """Do what the command line says; returns the exit code, as `guarded`."""
    args = list(sys.argv[1:] if args is None else args)
    if args and args[0] in COMMANDS:
        return run(args[0], args[1:])
    return guarded("gprune", lambda: str(parser().parse_args(args[:1])))


def run(name: str, args: Sequence[str]) -> int:
    """Do what the command of this name says with its own arguments; returns the exit code, as `guarded`."""
    command = importlib.import_module(COMMANDS[name][0])
    return guarded(f"gprune {name}", lambda: command.run(args), **command.ENDS)


if __name__ == "__main__":
    leave(main())
