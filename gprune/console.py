"""Shared parts of all commands: parser, error handling, logging, silent libraries, and deferred imports."""

from __future__ import annotations

import argparse
import atexit
import contextlib
import importlib
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
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn, TextIO

import jsonargparse

from gprune.errors import UserError, closest_name
from gprune.user_code import import_user_module


class Import(argparse.Action):
    """Action of `--import`: import immediately, so that other flags can use registered names."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        import_user_module(values)


class Parser(jsonargparse.ArgumentParser):
    """Parser of jsonargparse that raises UserError, keeps line breaks in help, and has the flag `--import`."""

    def __init__(self, prog: str, **options: Any):
        defaults = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
        super().__init__(prog, **defaults | options)
        text = "a module or .py file to import first, with metrics, recoveries, stages or callbacks; may be repeated"
        self.add_argument("--import", metavar="MODULE", action=Import, default=argparse.SUPPRESS, help=text)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise UserError instead of printing the usage. For an unknown flag, the error has the closest flag."""
        unknown = re.match(r"unrecognized arguments: --([^\s=]+)", message)
        closest = closest_name(unknown[1], [action.dest for action in self._actions]) if unknown else None
        hint = f"Did you mean --{closest}? " if closest else ""
        if message.endswith("expected one argument"):
            hint = "A value that begins with - needs =, such as --run.name=-x. "
        message = message.replace("<class 'int'>", "whole number")
        raise UserError(f"Cannot read the command line: {message}. {hint}See --help.") from ex


def run_guarded(command: str, work: Callable[[], str], *, stopped: str = ".", memory: str = ".") -> int:
    """Run a command, print the text that it returns, and report expected failures as one line on stderr.

    Expected failures are UserError, Ctrl-C, SIGTERM, SIGHUP, out of memory, OSError (a full disk, a closed output pipe)
    and the end of another process of the run. Other exceptions are bugs, and are raised with their traceback. The exit
    code is 0, 130 for Ctrl-C, 129 for SIGHUP, 143 for SIGTERM, and 2 for other failures. `stopped` ends the line after
    an interruption, and `memory` the line for out of memory.
    """

    def fail(message: str, code: int = 2, *, rank_local: bool = False) -> int:
        """Print the message and return the code. Rank 0 prints for all ranks, unless only this rank failed."""
        _flush_stdout()
        if rank_local or process_index() == 0:
            with contextlib.suppress(OSError):
                sys.stderr.write(f"{command}: {' '.join(message.split())}\n")
                sys.stderr.flush()
        return code

    _open_streams()
    with _exit_on_signals():
        try:
            write_stdout(work())
        except UserError as error:
            return fail(str(error), rank_local=error.rank_local)
        except KeyboardInterrupt:
            return fail(f"Interrupted{stopped}", 130)
        except SystemExit as error:
            if error.code == 129:
                return fail(f"Hung up{stopped}", 129)
            if error.code == 143 or type(error).__name__ == "SIGTERMException":  # Lightning's
                return fail(f"Terminated{stopped}", 143)
            _flush_stdout()
            raise
        except MemoryError:
            return fail(f"Out of memory{memory}", rank_local=True)
        except OSError as error:
            where = f" {error.filename}" if error.filename else ""
            reason = "the output pipe is closed" if isinstance(error, BrokenPipeError) else error.strerror or error
            return fail(f"Cannot read or write{where}: {reason}. Finished work is kept.", rank_local=True)
        except RuntimeError as error:
            if type(error).__name__ == "OutOfMemoryError" or "DefaultCPUAllocator" in str(error):
                return fail(f"Out of memory{memory}", rank_local=True)
            # torch.distributed raises these errors after another rank has ended.
            peer_ended = "by peer" in str(error) or re.fullmatch(r"Dist\w*Error", type(error).__name__)
            if not peer_ended:
                raise
            if process_index() == 0:
                return fail(f"Another process of this run has ended; its own error, if any, is above{stopped}")
            return 2  # rank 0 has ended and has reported the cause
    return 0


def write_stdout(text: str) -> None:
    """Write a command's result to stdout."""
    sys.stdout.write(text)
    sys.stdout.flush()


def _open_streams() -> None:
    """Replace closed streams by the null device, and escape characters that the locale cannot encode."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        with contextlib.suppress(AttributeError, ValueError, io.UnsupportedOperation):
            getattr(sys, name).reconfigure(errors="backslashreplace")


def _flush_stdout() -> None:
    """Flush stdout. If that fails, redirect stdout to the null device, or Python would report an error at exit."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        with contextlib.suppress(OSError, ValueError, io.UnsupportedOperation):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextlib.contextmanager
def _exit_on_signals() -> Iterator[None]:
    """Context that converts SIGTERM and SIGHUP to SystemExit, with exit code 128 + number of the signal.

    While Lightning trains, its own handler is called, which stops after the step. Signals that arrive while the process
    is already ending are ignored, because job schedulers send several, and the second would interrupt the cleanup.
    """
    previous_handlers = {}

    def exit_process(number: int, _: object) -> None:
        if signal.getsignal(number) is not exit_process:
            return  # Lightning is training: its own handler, which has called this one, stops after the step
        if not is_ending(sys.exception()):
            raise SystemExit(128 + number)

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGHUP):
            # Other handlers are kept: nohup, for example, ignores SIGHUP.
            if signal.getsignal(number) is signal.SIG_DFL:
                previous_handlers[number] = signal.signal(number, exit_process)
    try:
        yield
    finally:
        for number, handler in previous_handlers.items():
            signal.signal(number, handler)


def is_ending(error: BaseException | None) -> bool:
    """Return whether the exception that is being handled, if any, or one of its causes ends the process."""
    while error is not None and not isinstance(error, (SystemExit, KeyboardInterrupt)):
        error = error.__context__
    return error is not None


def leave(code: int) -> NoReturn:
    """Exit with a code. If a signal ended the command, ignore further signals of its kind while libraries clean up."""
    if code == 130:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    if code in (129, 143):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
    raise SystemExit(code)


class StdoutHandler(logging.StreamHandler):
    """Log handler for the current `sys.stdout`, which notebooks and tests replace."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:
        return sys.stdout

    def handleError(self, record: logging.LogRecord) -> NoReturn:  # noqa: N802
        """Raise the error, such as a closed output pipe; logging would print a traceback for each line."""
        raise


def log_to_stdout() -> None:
    """Log to stdout, which leaves stderr to errors: INFO and above on rank 0, errors on other ranks."""
    handler = StdoutHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    logger = logging.getLogger("gprune")
    logger.handlers = [handler]
    logger.propagate = False
    logger.setLevel(logging.INFO if process_index() == 0 else logging.ERROR)


def quiet() -> None:
    """Log to stdout, and silence the progress bars and irrelevant warnings of libraries."""
    log_to_stdout()
    _set_wandb_cache()
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it warns about every invalid line of a matplotlibrc
    import_matplotlib()
    import lightning.pytorch.utilities as utilities  # imported first, because lightning sets its log level on import
    import transformers

    utilities.rank_zero_only.rank = process_index()  # a rank left over in the shell would disable all output

    for name in ("lightning", "lightning.pytorch", "lightning.fabric", "pytorch_lightning"):
        logging.getLogger(name).setLevel(logging.ERROR)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", module="lightning")
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message="Implicitly cleaning up")  # of W&B's tables, at exit


def show_progress() -> None:
    """Call `quiet` for a run from Python, unless the user has configured logging. A higher log level is kept."""
    logger = logging.getLogger("gprune")
    if not logger.hasHandlers():
        level = logger.level
        quiet()
        logger.setLevel(max(level, logger.level))


def import_matplotlib() -> None:
    """Import matplotlib, without the user's matplotlibrc and backend if they are broken.

    Call it before Lightning imports matplotlib, which would raise their error.
    """
    try:
        import matplotlib
    except Exception:
        partly_imported = [name for name in sys.modules if name.split(".")[0] == "matplotlib"]
        for name in partly_imported:
            del sys.modules[name]
        environment = os.environ.copy()
        os.environ |= {"MPLBACKEND": "", "MATPLOTLIBRC": os.devnull}
        import matplotlib  # noqa: F401

        os.environ.clear()
        os.environ.update(environment)


def _set_wandb_cache() -> None:
    """Give W&B a temporary cache folder if the home folder is not writable; it would log to stderr instead."""
    home = os.path.expanduser("~")
    if "WANDB_CACHE_DIR" not in os.environ and not (os.path.isdir(home) and os.access(home, os.W_OK)):
        os.environ["WANDB_CACHE_DIR"] = tempfile.mkdtemp(prefix="gprune-")
        atexit.register(shutil.rmtree, os.environ["WANDB_CACHE_DIR"], ignore_errors=True)


@contextlib.contextmanager
def quieted(*loggers: str, stderr: bool = False) -> Iterator[None]:
    """Context in which the named loggers report errors only. `stderr=True` also discards all text written to stderr."""
    with contextlib.ExitStack() as stack:
        if stderr:
            stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
        for logger in map(logging.getLogger, loggers):
            stack.callback(logger.setLevel, logger.level)
            logger.setLevel(logging.ERROR)
        yield


def process_index() -> int:
    """Return this process's rank from the environment variables of torchrun, Lightning and SLURM. The default is 0.

    RANK and LOCAL_RANK count only together with MASTER_ADDR; alone they may be left over in a shell. Lightning sets
    only LOCAL_RANK on each machine, so local rank 0 of another machine returns its NODE_RANK. Then only 0 is exact.
    """

    def read_number(name: str) -> int:
        text = os.environ.get(name, "")
        return int(text) if text.isdecimal() else 0

    distributed = "MASTER_ADDR" in os.environ  # WORLD_SIZE cannot be used: Lightning removes it again
    names = ["RANK", "LOCAL_RANK"] if distributed else []
    if read_number("SLURM_NTASKS") > 1:
        names.append("SLURM_PROCID")
    rank = next((read_number(name) for name in names if name in os.environ), 0)
    if rank == 0 and distributed and "RANK" not in os.environ:
        return read_number("NODE_RANK")
    return rank


def lazy_exports(package: str, modules: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Return `__getattr__` and `__dir__` for a package whose public names are imported at first use.

    `modules` maps each of these names to its module.
    """

    def lazy_getattr(name: str) -> Any:
        """Import a public name, and store it in the package, so that this function is called once for each name."""
        if name not in modules:
            raise AttributeError(f"module '{package}' has no attribute '{name}'")
        # The modules import Lightning, which imports matplotlib and fails if the user's matplotlibrc is broken.
        import_matplotlib()
        value = getattr(importlib.import_module(modules[name]), name)
        setattr(sys.modules[package], name, value)
        return value

    def list_names() -> list[str]:
        return sorted(sys.modules[package].__all__)

    return lazy_getattr, list_names
