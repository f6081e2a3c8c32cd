"""Errors for people: one line that says what was expected, what came and what to do."""

from __future__ import annotations

import contextlib
import difflib
import errno
import logging
import re
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # commands that refuse a flag should not wait for PyTorch
    from torch import Tensor

log = logging.getLogger("gprune")
# Beside newline and tab: controls of a terminal, lone halves of characters, and what turns the direction of text.
CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


class UserError(ValueError):
    """Something the caller can put right: a flag, a corpus, a model, a budget, a file.

    The command line prints the message as a single line on stderr and exits with code 2, so the message
    carries everything: what was expected, what came, what to do. Invariants of our own are `assert`s.

    Args:
        alone: whether it concerns this process of several alone, and no first one says it.
    """

    def __init__(self, message: str, *, alone: bool = False):
        super().__init__(printable(" ".join(message.split())))
        self.alone = alone


class UnregisteredError(UserError):
    """A name under which nothing is registered."""


def printable(text: str) -> str:
    """Text whose control characters are escaped, as `\\x1b`, so that it cannot control a terminal."""
    return CONTROLS.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def one_line(text: str) -> str:
    """A name as text to be shown: `printable`, its newlines escaped as well."""
    return printable(text).replace("\n", "\\n")


def require_finite(what: str, *tensors: Tensor) -> None:
    """Raise a UserError for NaN or infinity in the tensors. `what`: "activation came up during calibration"."""
    if not all(bool(tensor.isfinite().all()) for tensor in tensors):
        raise UserError(f"A non-finite {what}. Check the model's weights, or use --model.dtype float32.")


def nearest(name: object, known: Iterable[str]) -> str | None:
    """The known name that somebody may have meant."""
    return next(iter(difflib.get_close_matches(str(name), known, n=1)), None)


def first_line(error: BaseException) -> str:
    """The first line of a library's error, to be quoted in one of ours, and the next if it ends in a colon."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[: 2 if lines[0].endswith(":") else 1])[:500]


@contextlib.contextmanager
def quoting(before: str, after: str = "") -> Iterator[None]:
    """Raise what a library raises, of whatever class, as a UserError: its first line between `before` and `after`."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{before}{first_line(error)}{after}") from error


@contextlib.contextmanager
def dispensable(what: str, remedy: str) -> Iterator[None]:
    """Work without which a run is whole: where it fails, one line says what is missing, why, and what to do.

    A full disk still ends the run, and so does whatever is no `Exception`, such as Ctrl-C.

    Args:
        what: is missing then, such as `samples`.
        remedy: a clause, such as `the same command writes them`.
    """
    try:
        yield
    except Exception as error:
        if {getattr(e, "errno", None) for e in (error, error.__cause__)} & {errno.ENOSPC, errno.EDQUOT}:
            raise
        log.warning("Without %s (%s): the run is whole, and %s.", what, first_line(error), remedy)
