"""What the commands beside train.py share: a parser, and errors that are one line on stderr with an exit code."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import warnings
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
        verb: such as `gprune.export.job`, before every message.
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


def quiet() -> None:
    """Our own progress on stdout; of the libraries', warnings that matter. stderr is for the one line of an error."""
    import transformers

    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    ours = logging.getLogger("gprune")
    ours.handlers, ours.propagate = [handler], False
    ours.setLevel(logging.INFO if process_index() == 0 else logging.ERROR)
    for name in ("lightning", "lightning.pytorch", "lightning.fabric", "pytorch_lightning"):
        logging.getLogger(name).setLevel(logging.ERROR)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", module="lightning")
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")


def process_index() -> int:
    """Which of several processes on this machine this is; Lightning starts the others and numbers them."""
    return int(os.environ.get("LOCAL_RANK", 0))
