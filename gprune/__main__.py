"""The command line: `gprune COMMAND ...` or `python -m gprune COMMAND ...`. `train.py` is `gprune prune`."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from gprune.console import Parser, leave, run_guarded

# name -> (module, help). The module has `run` and `MESSAGE_ENDINGS`, the keyword arguments of `run_guarded`.
COMMANDS = {
    "prune": ("gprune.cli", "prune a model, configured by flags and --config files"),
    "report": ("gprune.studies.report_command", "make tables and figures of finished runs"),
    "export": ("gprune.export.convert", "convert the pruned model of a run for another program"),
    "evaluate": ("gprune.benchmarks.evaluate_command", "measure tasks and perplexity of a run or a model"),
    "study": ("gprune.studies.study_command", "run a list of configurations and tabulate the results"),
}


def parser() -> Parser:
    """Return the parser of the command's name. The command parses its own arguments."""
    lines = "\n".join(f"  {name:10}{command_help}" for name, (_, command_help) in COMMANDS.items())
    description = f"Prune a language model, and work with finished runs.\n\ncommands:\n{lines}"
    result = Parser("gprune", usage="gprune COMMAND ...", description=description)
    help_text = "one of the commands above; COMMAND --help lists its flags"
    result.add_argument("command", metavar="COMMAND", choices=COMMANDS, help=help_text)
    return result


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code (see `run_guarded`)."""
    args = list(sys.argv[1:] if args is None else args)
    if args and args[0] in COMMANDS:
        return run(args[0], args[1:])
    return run_guarded("gprune", lambda: str(parser().parse_args(args[:1])))  # prints the help or raises UserError


def run(name: str, args: Sequence[str]) -> int:
    """Run one command with its arguments and return the exit code (see `run_guarded`)."""
    command = importlib.import_module(COMMANDS[name][0])
    return run_guarded(f"gprune {name}", lambda: command.run(args), **command.MESSAGE_ENDINGS)


if __name__ == "__main__":
    leave(main())
