"""`python -m gprune.export RUN --to FORMAT`: see gprune/export/__init__.py."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from typing import NoReturn

from gprune.errors import UserError
from gprune.export import EXPORTS, TYPES, Job


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see --help.")


def parser() -> argparse.ArgumentParser:
    """The command line; what it knows of formats comes from `EXPORTS`."""
    formats = "\n".join(f"  {name:6}{(EXPORTS[name].__doc__ or '').splitlines()[0]}" for name in EXPORTS)
    made = Parser(
        "python -m gprune.export", description="Write a pruned model in another format.",
        epilog=f"formats:\n{formats}", formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
    )  # fmt: skip
    made.add_argument("run", metavar="RUN", help="a finished run, or a model folder")
    made.add_argument("--to", required=True, metavar="FORMAT", help=f"one of {', '.join(EXPORTS)}")
    made.add_argument("--output", metavar="PATH", help="what to write; by default beside the model")
    made.add_argument("--overwrite", action="store_true", help="replace a former export")
    # Options of one format: absent unless given, so that another format can refuse them.
    made.add_argument("--type", default=argparse.SUPPRESS, help=f"gguf: {', '.join(TYPES)} (default f16)")
    made.add_argument(
        "--unchecked", action="store_true", default=argparse.SUPPRESS, help="gguf: do not ask for a llama.cpp build"
    )
    return made


def main(args: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, 2 for something the caller can put right, 130 for Ctrl-C, 143 for SIGTERM."""
    try:
        options = vars(parser().parse_args(args))
        job = Job.of(options.pop("run"), **options)
        from gprune.cli import quiet  # imports transformers

        quiet()
        previous = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # unwinds, so that nothing is left behind
        try:
            path = job.run()
        finally:
            signal.signal(signal.SIGTERM, previous)
    except UserError as error:
        return _fail(str(error))
    except KeyboardInterrupt:
        return _fail("Interrupted; nothing was written.", 130)
    except MemoryError:
        return _fail("Out of memory; the model is loaded whole.")
    sys.stdout.write(f"Wrote {path}\n")
    return 0


def _fail(message: str, code: int = 2) -> int:
    sys.stdout.flush()
    sys.stderr.write(f"gprune.export: {' '.join(message.split())}\n")
    return code


if __name__ == "__main__":
    raise SystemExit(main())
