"""Types, ranges and choices of flags, said once: jsonargparse checks flags by them, and `check` what Python gives."""

from __future__ import annotations

import math
import os
import re
import unicodedata
from collections.abc import Callable, Mapping
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from jsonargparse.typing import (
    ClosedUnitInterval,
    NonNegativeFloat,
    NonNegativeInt,
    OpenUnitInterval,
    PositiveFloat,
    PositiveInt,
    restricted_number_type,
)

from gprune.errors import UserError

AtLeast0 = NonNegativeInt
AtLeast1 = PositiveInt
AtLeast1Float = restricted_number_type("AtLeast1Float", float, (">=", 1))
AtLeast2 = restricted_number_type("AtLeast2", int, (">=", 2))
AtLeast8 = restricted_number_type("AtLeast8", int, (">=", 8))
Few = restricted_number_type("Few", int, [(">=", 1), ("<=", 4096)])
Seed = restricted_number_type("Seed", int, [(">=", 0), ("<", 2**32)])
NonNegative, Positive, Quantile, Sparsity = NonNegativeFloat, PositiveFloat, ClosedUnitInterval, OpenUnitInterval
WORDS: dict[Any, str] = {  # what people are told to give
    AtLeast0: "0 or more",
    AtLeast1: "1 or more",
    AtLeast1Float: "1 or more",
    AtLeast2: "2 or more",
    AtLeast8: "8 or more",
    Few: "1 to 4,096",
    Seed: f"0 to {2**32 - 1}",
    NonNegative: "0 or more",
    Positive: "a positive number",
    Quantile: "a quantile in [0, 1]",
    Sparsity: "a fraction of parameters removed (half of them is 0.5) inside (0, 1)",
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    NoneType: "null",
    Any: "anything",
}
UNITS = {"": 1, "b": 1} | {f"{p}b": 1000**i for i, p in enumerate("kmgt", 1)}
UNITS |= {f"{p}ib": 1024**i for i, p in enumerate("kmgt", 1)}
LARGEST = {int: 10**12, float: 1e30}  # of any number: beyond it are typing errors, and what overflows
LONGEST = 4096  # characters of a text: a path can have no more
NO_TEXT = ("Cc", "Cs", "Zl", "Zp")  # controls, halves of characters, ends of lines: no name has them
Lookup = Callable[[str], Any]


def words(hint: Any) -> str:
    """What to give for a flag with this annotation."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return " or ".join(map(words, parts))
    if origin is Literal:
        return f"one of {', '.join(map(str, parts))}"
    if origin is list:
        return f"a list, each {words(parts[0])}"
    if origin is dict:
        return f"{words(parts[1])} by name"
    return WORDS.get(hint, getattr(hint, "__name__", str(hint)))


def check(flag: str, hint: Any, value: Any) -> Any:
    """The value as a plain one of its type: a number of numpy's as Python's, a path as text.

    Args:
        flag: the setting's dotted name.
        hint: its annotation.

    Raises:
        UserError: for a value of another type, a choice that there is not, a number out of its range, and text that
            is not fit for files.
    """
    origin, parts = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        if value is None and NoneType in parts:
            return None
        alike = [part for part in parts if (get_origin(part) in (list, dict)) == isinstance(value, list | tuple | dict)]
        if alike:  # an element of a list says what is wrong with it
            return check(flag, alike[0], value)
    elif origin is list and isinstance(value, list | tuple):
        return [check(flag, parts[0], item) for item in value]
    elif origin is dict and isinstance(value, dict):
        return {str(key): check(f"{flag}.{key}", parts[1], item) for key, item in value.items()}
    elif (origin is Literal and isinstance(value, str) and value in parts) or hint is Any:
        return value
    elif isinstance(hint, type):
        try:
            return _plain(hint, value)
        except (TypeError, ValueError, OverflowError) as error:
            more = f" ({error})" if isinstance(error, _RangeError) else ""
            raise UserError(f"--{flag}: expected {words(hint)}{more}, got {shown(value)}.") from error
    raise UserError(f"--{flag}: expected {words(hint)}, got {shown(value)}.")


class _RangeError(ValueError):
    """Says more than the words for a type do."""


def _plain(hint: type, value: Any) -> Any:
    if issubclass(hint, bool) or type(value).__name__ in ("bool", "bool_"):  # numpy's is none of Python's
        if not issubclass(hint, bool) or type(value).__name__ not in ("bool", "bool_"):
            raise TypeError
        return bool(value)
    if issubclass(hint, str):
        return _text(os.fspath(value) if isinstance(value, os.PathLike) else value)
    if issubclass(hint, int | float):
        plain: Any = int(value) if isinstance(value, Integral) else float(value) if isinstance(value, Real) else None
        if plain is None or plain != plain:
            raise ValueError
        kind = int if issubclass(hint, int) else float
        if abs(plain) > LARGEST[kind]:
            raise _RangeError(f"at most {LARGEST[kind]:,}")
        if kind is int and plain != int(plain):
            raise ValueError
        plain = kind(plain)
        if hint not in (int, float):
            hint(plain)
        return plain
    if not isinstance(value, hint):
        raise TypeError
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError
    if len(value) > LONGEST or any(unicodedata.category(c) in NO_TEXT for c in value):
        raise _RangeError(f"at most {LONGEST:,} characters, none of which controls a terminal")
    return value


def shown(value: Any) -> str:
    """A value that came, for an error: one line, and not all of what may be long."""
    try:
        said = str(value) if isinstance(value, Real) and math.isfinite(value) else repr(value)
    except (ValueError, OverflowError):  # an int of 5,000 digits
        said = "a very large number"
    said = "null" if value is None else said
    return said if len(said) <= 80 else f"{said[:60]}... ({len(said):,} characters)"


def in_our_words(message: str, hint_of: Lookup) -> str:
    """jsonargparse's error of a value, as `check` would say it: flag, expected, got."""
    flag = re.search(r'Parser key "([\w.]+)":', message)
    got = re.search(
        r"(?:Given value: |Got value: )(.*)|Not of type \w+: (.*) does not conform|(?:base 10|to float): '(.*)'"
        r"|, not '(NoneType)'",
        message,
    )
    hint = hint_of(flag[1]) if flag else None
    if hint is None or got is None:
        return " ".join(re.sub(r"<class '(\w+)'>", r"\1", re.sub(r'Parser key "([\w.]+)":', r"--\1:", message)).split())
    said = next(part for part in got.groups() if part is not None).replace("NoneType", "null")
    if len(said) > 80:
        said = f"{said[:60]}..."
    choice = get_origin(hint) is Literal
    return f"--{flag[1]}: expected {words(hint)}, got " + (f"'{said}'" if choice else said)


def bytes_of(size: str) -> int:
    """'2GiB', '500MB' or '1.5 TiB' as bytes."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]i?B|B|)", size.strip(), re.IGNORECASE)
    if match is None or not 0 < float(match[1]) < 1e15:
        raise UserError(f"--model.max_memory: expected sizes such as 2GiB or 500MB, got '{size}'.")
    return int(float(match[1]) * UNITS[match[2].lower()])


def memory_limits(sizes: Mapping[str, str]) -> dict[str | int, int]:
    """`--model.max_memory` as transformers takes it: bytes by `cpu` or device number."""
    for device in sizes:
        if device != "cpu" and not re.fullmatch(r"[0-9]{1,4}", str(device)):
            raise UserError(f"--model.max_memory: expected cpu or a device number such as 0, got '{device}'.")
    return {device if device == "cpu" else int(device): bytes_of(str(size)) for device, size in sizes.items()}
