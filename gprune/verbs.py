"""What the commands beside train.py share: a parser, and errors that are one line on stderr with an exit code."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import NoReturn

from gprune.errors import UserError


class Parser(argparse.ArgumentParser):
    """Raises UserError where argparse would print its usage and leave."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see --help.")


def run_verb(
    verb: str,
    work: Callable[[], str],
    *,
    interrupted: str = "Interrupted.",
    memory: str = "Out of memory.",
) -> int:
    """Do the work of `python -m <verb>` and print what it returns.

    Args:
        verb: such as `gprune.export`, before every message.
        interrupted, memory: what to say of Ctrl-C and of a lack of memory.

    Returns:
        The exit code: 0, 2 for something the caller can put right, 130 for Ctrl-C.
    """
    try:
        said = work()
    except UserError as error:
        return _fail(verb, str(error))
    except KeyboardInterrupt:
        return _fail(verb, interrupted, 130)
    except MemoryError:
        return _fail(verb, memory)
    sys.stdout.write(said)
    return 0


def _fail(verb: str, message: str, code: int = 2) -> int:
    sys.stdout.flush()
    sys.stderr.write(f"{verb}: {' '.join(message.split())}\n")
    return code
