"""What every command line here shares: a parser, one boundary for errors, and libraries that keep quiet."""

from __future__ import annotations

import argparse
import atexit
import contextlib
import io
import logging
import os
import re
import shutil
import signal
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import NoReturn, TextIO

from gprune.errors import UserError, printable
from gprune.imports import Import, import_matplotlib

BOLD = re.compile(r"(\x1b\[[01]m)")  # on and off: all that rich adds to a table, whose cells are printable already


class Parser(argparse.ArgumentParser):
    """Raises UserError where argparse would print its usage and leave; prints help as it was written."""

    def __init__(self, prog: str, **options: object):
        as_written = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
        super().__init__(prog, **as_written | options)
        about = "a module, or a .py file, that is imported first: what it registers is known; may be repeated"
        self.add_argument("--import", metavar="MODULE", action=Import, default=argparse.SUPPRESS, help=about)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see --help.")


def guarded(command: str, work: Callable[[], str], *, stopped: str = ".", memory: str = ".") -> int:
    """Do the work of a command and print the text it returns.

    Whatever goes wrong for a reason outside the code is one line on stderr: UserError, Ctrl-C, SIGTERM, SIGHUP, no
    memory, a disk that fills up somewhere inside a library, an output that nobody reads.

    Args:
        command: such as `gprune export`; it begins the line.
        stopped: continues "Interrupted" and "Terminated": what becomes of what was done.
        memory: continues "Out of memory": what to do.

    Returns:
        The exit code: 0, 2 for something the caller can put right, 129 for SIGHUP, 130 for Ctrl-C, 143 for SIGTERM.
    """

    def fail(message: str, code: int = 2, *, alone: bool = False) -> int:
        """Say it, unless it went wrong in all processes alike (not `alone`) and the first one says it."""
        _flushed()
        if alone or process_index() == 0:
            with contextlib.suppress(OSError):
                sys.stderr.write(f"{command}: {printable(' '.join(message.split()))}\n")
                sys.stderr.flush()
        return code

    _open_streams()
    with _signals():
        try:
            say(work())
        except UserError as error:
            return fail(str(error), alone=error.alone)
        except KeyboardInterrupt:
            return fail(f"Interrupted{stopped}", 130)
        except SystemExit as error:
            if error.code == 129:
                return fail(f"Hung up{stopped}", 129)
            if error.code == 143 or type(error).__name__ == "SIGTERMException":  # Lightning's
                return fail(f"Terminated{stopped}", 143)
            _flushed()
            raise
        except MemoryError:
            return fail(f"Out of memory{memory}", alone=True)
        except OSError as error:
            where = f" {error.filename}" if error.filename else ""
            reason = "nobody reads the output" if isinstance(error, BrokenPipeError) else error.strerror or error
            return fail(f"The system refused to work on{where}: {reason}. What was finished is kept.", alone=True)
        except RuntimeError as error:
            if type(error).__name__ == "OutOfMemoryError" or "DefaultCPUAllocator" in str(error):
                return fail(f"Out of memory{memory}", alone=True)
            left = "by peer" in str(error) or re.fullmatch(r"Dist\w*Error", type(error).__name__)  # torch.distributed's
            if process_index() == 0 or not left:
                raise
            return 2  # the first process has left, and has said why
    return 0


def say(text: str) -> None:
    """Print text that a command hands out."""
    sys.stdout.write(printable_or_bold(text))
    sys.stdout.flush()


def printable_or_bold(text: str) -> str:
    """`printable`, with bold let through."""
    return "".join(part if BOLD.fullmatch(part) else printable(part) for part in BOLD.split(text))


def _open_streams() -> None:
    """Replace closed streams by the null device, and write characters that the locale lacks as escapes."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        with contextlib.suppress(AttributeError, ValueError, io.UnsupportedOperation):
            getattr(sys, name).reconfigure(errors="backslashreplace")


def _flushed() -> None:
    """Flush stdout; if nobody can take it, send it to the null device, or Python would complain when it exits."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        with contextlib.suppress(OSError, ValueError, io.UnsupportedOperation):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextlib.contextmanager
def _signals() -> Iterator[None]:
    """SIGTERM and SIGHUP unwind, as Ctrl-C does; while Lightning trains, it stops at the end of the step."""
    before = {}

    def stop(number: int, _: object) -> None:
        if signal.getsignal(number) is stop:
            raise SystemExit(128 + number)

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is signal.SIG_DFL:  # nohup has it ignored
                before[number] = signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def leave(code: int) -> NoReturn:
    """Exit with a code; after Ctrl-C, further ones are ignored while libraries finish their work."""
    if code == 130:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    raise SystemExit(code)


class StdoutHandler(logging.StreamHandler):
    """Writes to the current `sys.stdout`, which notebooks and tests replace."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:
        return sys.stdout

    def format(self, record: logging.LogRecord) -> str:
        return printable_or_bold(super().format(record))

    def handleError(self, record: logging.LogRecord) -> NoReturn:  # noqa: N802
        """An output that nobody reads ends the run, where logging would print a traceback for each line."""
        raise


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
    _shelter()
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it says every line of a matplotlibrc that it refuses
    import_matplotlib()
    import lightning.pytorch.utilities as utilities  # lightning sets how much it says when it is imported
    import transformers

    utilities.rank_zero_only.rank = process_index()  # else whatever a shell has left over: it would write nothing

    for name in ("lightning", "lightning.pytorch", "lightning.fabric", "pytorch_lightning"):
        logging.getLogger(name).setLevel(logging.ERROR)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", module="lightning")
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message="Implicitly cleaning up")  # of W&B's tables, at exit


def _shelter() -> None:
    """Give W&B a folder for its own log where nobody can write in the home: it would be written on stderr."""
    home = os.path.expanduser("~")
    if "WANDB_CACHE_DIR" not in os.environ and not (os.path.isdir(home) and os.access(home, os.W_OK)):
        os.environ["WANDB_CACHE_DIR"] = tempfile.mkdtemp(prefix="gprune-")
        atexit.register(shutil.rmtree, os.environ["WANDB_CACHE_DIR"], ignore_errors=True)


@contextlib.contextmanager
def quieted(*loggers: str, stderr: bool = False) -> Iterator[None]:
    """For as long as the context lasts, loggers of libraries say errors only; with `stderr`, nothing reaches stderr."""
    with contextlib.ExitStack() as stack:
        if stderr:
            stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
        for logger in map(logging.getLogger, loggers):
            stack.callback(logger.setLevel, logger.level)
            logger.setLevel(logging.ERROR)
        yield


def process_index() -> int:
    """0 for the first of several processes, by what torchrun, Lightning (which starts a machine's) and SLURM say.

    A number that was left over in a shell, without the address where processes meet, says nothing. The first process of
    another machine, where nobody numbers all of them, has the number of its machine.
    """

    def given(name: str) -> int:
        text = os.environ.get(name, "")
        return int(text) if text.isdecimal() else 0

    meets = "MASTER_ADDR" in os.environ  # Lightning takes WORLD_SIZE away again
    names = ["RANK", "LOCAL_RANK"] if meets else []
    names += ["SLURM_PROCID"] if given("SLURM_NTASKS") > 1 else []
    rank = next((given(name) for name in names if name in os.environ), 0)
    return rank if rank or not meets or "RANK" in os.environ else given("NODE_RANK")
