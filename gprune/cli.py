"""The command line: flags and YAML into a RunConfig; errors for people; the table at the end."""

from __future__ import annotations

import re
import sys
from argparse import ArgumentError
from collections.abc import Sequence

from gprune.console import process_index, quiet
from gprune.errors import UserError
from gprune.parse import parse


def main(args: Sequence[str] | None = None) -> int:
    """Run `train.py`; returns the exit code: 0, 2 for something the caller can put right, 130 for Ctrl-C.

    Whatever goes wrong for a reason outside the code is one line on stderr.
    """
    try:
        _run(args)
    except UserError as error:
        return _fail(str(error))
    except ArgumentError as error:
        return _fail(f"{_in_our_words(str(error))}; see --help.")
    except KeyboardInterrupt:
        return _fail("Interrupted. What was finished is kept; the same command takes up from there.", 130)
    except SystemExit as error:
        if type(error).__name__ != "SIGTERMException":  # Lightning's, by name: importing it takes seconds
            raise
        return _fail("Terminated. What was finished is kept; the same command takes up from there.", 143)
    except MemoryError:
        return _fail("Out of memory; lower --corpora.batch_size or --corpora.seq_len.", alone=True)
    except OSError as error:  # a disk that fills up somewhere inside a library
        where = f" {error.filename}" if error.filename else ""
        reason = error.strerror or error
        return _fail(f"The system refused to work on{where}: {reason}. What was finished is kept.", alone=True)
    except RuntimeError as error:
        if type(error).__name__ == "OutOfMemoryError" or "DefaultCPUAllocator" in str(error):
            return _fail("Out of memory; lower --corpora.batch_size or --corpora.seq_len.", alone=True)
        if process_index() == 0 or ("by peer" not in str(error) and type(error).__name__ != "DistBackendError"):
            raise
        return 2  # the first process has left, and has said why
    return 0


def _in_our_words(message: str) -> str:
    """jsonargparse's `Parser key "a.b": Expected a <class 'float'>. Got value: x`, without the Python in it."""
    return re.sub(r"<class '(\w+)'>", r"\1", re.sub(r'Parser key "([\w.]+)":', r"--\1:", message))


def _run(args: Sequence[str] | None) -> None:
    cfg = parse(args)
    quiet()
    from gprune.pipeline.plan import check
    from gprune.pipeline.prune import prune
    from gprune.report.records import result_table

    if cfg.dry_run:
        sys.stdout.write(check(cfg).describe(cfg) + "\n")
        return
    result = prune(cfg)
    if process_index() == 0:
        s = result.summary
        sys.stdout.write(
            f"\n{result_table(result.records)}\n\n"
            f"Removed {s['sparsity_of_scope']:.2%} of {cfg.sparsity.scope}, {s['sparsity_of_model']:.2%} of the model: "
            f"{s['parameters_before']:,} -> {s['parameters_after']:,} parameters.\n"
            f"Tokens: {s['forward_tokens']:,} forward, {s['forward_backward_tokens']:,} forward and backward.\n"
            f"Everything is in {result.path}"
            + ("" if cfg.export == "none" else f"; the model in {result.path / 'model'}")
            + ".\n"
        )


def _fail(message: str, code: int = 2, *, alone: bool = False) -> int:
    """Say it, unless it went wrong in all processes alike (not `alone`) and the first one says it."""
    sys.stdout.flush()
    if alone or process_index() == 0:
        sys.stderr.write(f"train.py: {' '.join(message.split())}\n")
    return code
