"""`python -m gprune.export.job RUN --to FORMAT`: see gprune/export/__init__.py."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence

from gprune.console import Parser, run_verb
from gprune.export.job import EXPORTS, TYPES, Job


def parser() -> argparse.ArgumentParser:
    """The command line; what it knows of formats comes from `EXPORTS`."""
    formats = "\n".join(f"  {name:6}{(EXPORTS[name].__doc__ or '').splitlines()[0]}" for name in EXPORTS)
    made = Parser(
        "python -m gprune.export.job", description="Write a pruned model in another format.",
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
    """Returns the exit code, as `run_verb`; 143 for SIGTERM."""

    def work() -> str:
        options = vars(parser().parse_args(args))
        job = Job.of(options.pop("run"), **options)
        from gprune.console import quiet

        quiet()
        previous = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # unwinds, so that nothing is left behind
        try:
            return f"Wrote {job.run()}\n"
        finally:
            signal.signal(signal.SIGTERM, previous)

    return run_verb(
        "gprune.export.job",
        work,
        interrupted="Interrupted; nothing was written.",
        memory="Out of memory; the model is loaded whole.",
    )


if __name__ == "__main__":
    raise SystemExit(main())
