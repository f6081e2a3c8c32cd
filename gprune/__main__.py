"""What is done with finished runs, beside train.py: `gprune COMMAND ...`, or `python -m gprune COMMAND ...`."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from gprune.console import Parser, guarded, leave

# By name: the room whose `command.py` has the command line and the work, and a line of help.
COMMANDS = {
    "report": ("gprune.report", "tables and figures from finished runs"),
    "export": ("gprune.export", "the pruned model in the format another program reads"),
    "evaluate": ("gprune.benchmarks", "zero-shot accuracy and WikiText-2 perplexity of a run or a model"),
    "study": ("gprune.studies", "a list of configurations, run and tabulated"),
}


def parser() -> Parser:
    """The command line as far as the name of the command."""
    lines = "\n".join(f"  {name:10}{about}" for name, (_, about) in COMMANDS.items())
    about = f"What is done with finished runs; train.py makes them.\n\ncommands:\n{lines}"
    made = Parser("gprune", usage="gprune COMMAND ...", description=about)
    made.add_argument("command", metavar="COMMAND", choices=COMMANDS, help="one of these; COMMAND --help says more")
    return made


def main(args: Sequence[str] | None = None) -> int:
    """Do what the command line says; returns the exit code, as `guarded`."""
    args = list(sys.argv[1:] if args is None else args)
    if args and args[0] in COMMANDS:
        room, _ = COMMANDS[args[0]]
        return importlib.import_module(f"{room}.command").main(args[1:])
    return guarded("gprune", lambda: str(parser().parse_args(args[:1])))


if __name__ == "__main__":
    leave(main())
