"""User errors: one line with what is wrong, the value, and what to do.

Every message has one of four forms. A place (a file, a row, a flag with its value) and a colon may come first.

1. Invalid value: `SUBJECT must WHAT; got VALUE.`

       --model.dtype must be 'float32', 'bfloat16' or 'float16'; got 'fp8'.

2. Settings that do not fit together: `SUBJECT needs OTHER.` or `SUBJECT cannot DO.`

       --model.max_memory needs --model.device_map.
       --export.type q8_0 needs --sparsity.width_multiple 32 or a multiple of 32; got 1.

3. Unknown name: `Unknown KIND 'NAME'.`

       Unknown corpus 'c5'. Did you mean 'c4'? Available: c4, wiki.

4. Failure: `Cannot DO: CAUSE.`

       Cannot write runs/a/metrics.json: No space left on device.

A sentence with the remedy may follow. Each message is one line, begins with a flag or a capital letter, and ends with a
full stop. `tests/test_errors.py` checks this for every message in the source.
"""

from __future__ import annotations

import contextlib
import difflib
import errno
import logging
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # commands that refuse a flag should not wait for PyTorch
    from torch import Tensor

log = logging.getLogger("gprune")
MAX_QUOTED = 500  # characters of a library's error that are quoted


class UserError(ValueError):
    """An error that the caller can fix: a flag, a corpus, a model, a budget or a file.

    The command line prints the message as a single line on stderr and exits with code 2. Rank 0 prints it for all
    ranks, unless the error is `rank_local`: only one rank failed. The module's docstring has the form of messages.
    Internal invariants are `assert`s instead.
    """

    def __init__(self, message: str, *, rank_local: bool = False):
        super().__init__(" ".join(message.split()))
        self.rank_local = rank_local


class UnregisteredError(UserError):
    """An unknown name: nothing is registered under it, or no imported module defines it."""


def require_finite(what: str, *tensors: Tensor) -> None:
    """Raise UserError if a tensor has NaN or infinity. `what` completes "a non-finite ..." in the message."""
    if not all(bool(tensor.isfinite().all()) for tensor in tensors):
        remedy = "Check the model's weights, or use --model.dtype float32"
        raise UserError(f"Cannot compute with NaN or infinity: a non-finite {what}. {remedy}.")


def closest_name(name: object, known: Iterable[str]) -> str | None:
    """Return the known name that is most similar to an unknown one, or None if none is similar."""
    return next(iter(difflib.get_close_matches(str(name), known, n=1)), None)


def first_line(error: BaseException) -> str:
    """Return the first line of an exception's text, to be quoted in a message.

    The second line is added if the first one ends in a colon. An exception without text is quoted as the name of its
    class. The result has at most `MAX_QUOTED` characters, and no full stop at the end.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    quoted = lines[:2] if lines[0].endswith(":") else lines[:1]
    return " ".join(quoted)[:MAX_QUOTED].removesuffix(".")


@contextlib.contextmanager
def quoting(before: str, after: str = ".") -> Iterator[None]:
    """Context that converts exceptions to a UserError, which quotes their first line between `before` and `after`.

    A UserError is raised unchanged.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{before}{first_line(error)}{after}") from error


@contextlib.contextmanager
def optional_output(what: str, remedy: str) -> Iterator[None]:
    """Context for optional output. If it fails, log one line with the cause and the remedy, and continue.

    A full disk still ends the run, and so does anything that is not an `Exception`, such as Ctrl-C.
    """
    try:
        yield
    except Exception as error:
        codes = {getattr(exception, "errno", None) for exception in (error, error.__cause__)}
        if codes & {errno.ENOSPC, errno.EDQUOT}:
            raise
        log.warning("Could not write %s: %s. The run continues; %s.", what, first_line(error), remedy)
