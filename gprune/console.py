"""What every command line here shares: a parser, one boundary for errors, and libraries that keep quiet."""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import os
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import NoReturn, TextIO

from gprune.errors import UserError


class Parser(argparse.ArgumentParser):
    """Raises UserError where argparse would print its usage and leave; prints help as it was written."""

    def __init__(self, prog: str, **options: object):
        as_written = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
        super().__init__(prog, **as_written | options)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see --help.")


def guarded(command: str, work: Callable[[], str], *, stopped: str = ".", memory: str = ".") -> int:
    """Do the work of a command and print the text it returns.

    Whatever goes wrong for a reason outside the code is one line on stderr: UserError, Ctrl-C, SIGTERM while Lightning
    trains, no memory, a disk that fills up somewhere inside a library.

    Args:
        command: such as `gprune export`; it begins the line.
        stopped: continues "Interrupted" and "Terminated": what becomes of what was done.
        memory: continues "Out of memory": what to do.

    Returns:
        The exit code: 0, 2 for something the caller can put right, 130 for Ctrl-C, 143 for SIGTERM.
    """

    def fail(message: str, code: int = 2, *, alone: bool = False) -> int:
        """Say it, unless it went wrong in all processes alike (not `alone`) and the first one says it."""
        sys.stdout.flush()
        if alone or process_index() == 0:
            sys.stderr.write(f"{command}: {' '.join(message.split())}\n")
        return code

    try:
        sys.stdout.write(work())
    except UserError as error:
        return fail(str(error))
    except KeyboardInterrupt:
        return fail(f"Interrupted{stopped}", 130)
    except SystemExit as error:
        if type(error).__name__ != "SIGTERMException":  # Lightning's, by name: importing it takes seconds
            raise
        return fail(f"Terminated{stopped}", 143)
    except MemoryError:
        return fail(f"Out of memory{memory}", alone=True)
    except OSError as error:
        where = f" {error.filename}" if error.filename else ""
        reason = error.strerror or error
        return fail(f"The system refused to work on{where}: {reason}. What was finished is kept.", alone=True)
    except RuntimeError as error:
        if type(error).__name__ == "OutOfMemoryError" or "DefaultCPUAllocator" in str(error):
            return fail(f"Out of memory{memory}", alone=True)
        if process_index() == 0 or ("by peer" not in str(error) and type(error).__name__ != "DistBackendError"):
            raise
        return 2  # the first process has left, and has said why
    return 0


class StdoutHandler(logging.StreamHandler):
    """Writes to what stdout is at the moment, which notebooks and tests exchange."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:
        return sys.stdout


def speak() -> None:
    """Our own progress goes to stdout; stderr is for the one line of an error."""
    handler = StdoutHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    ours = logging.getLogger("gprune")
    ours.handlers, ours.propagate = [handler], False
    ours.setLevel(logging.INFO if process_index() == 0 else logging.ERROR)


def quiet() -> None:
    """Our own progress, and of the libraries' warnings those that matter."""
    speak()
    import lightning.pytorch  # noqa: F401 - it sets how much it says when it is imported
    import transformers

    for name in ("lightning", "lightning.pytorch", "lightning.fabric", "pytorch_lightning"):
        logging.getLogger(name).setLevel(logging.ERROR)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", module="lightning")
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")


@contextlib.contextmanager
def quieted(*loggers: str, stderr: bool = False) -> Iterator[None]:
    """For as long as the context lasts, loggers of libraries say errors only; with `stderr`, nothing reaches stderr."""
    before = {name: logging.getLogger(name).level for name in loggers}
    for name in loggers:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stderr(io.StringIO()) if stderr else contextlib.nullcontext():
            yield
    finally:
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)


def terminal_width() -> int | None:
    """Columns of the terminal that stdout is; None where it is none, and what is printed stays as files have it."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def process_index() -> int:
    """Which of several processes on this machine this is; Lightning starts the others and numbers them."""
    return int(os.environ.get("LOCAL_RANK", 0))
