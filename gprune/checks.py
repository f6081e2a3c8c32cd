"""Ranges and choices of flags, said once: jsonargparse checks them on the command line, and `check` in Python."""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import UnionType
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
Seed = restricted_number_type("Seed", int, [(">=", 0), ("<", 2**32)])
NonNegative, Positive, Quantile, Sparsity = NonNegativeFloat, PositiveFloat, ClosedUnitInterval, OpenUnitInterval
WORDS: dict[type, str] = {  # what people are told to give
    AtLeast0: "0 or more",
    AtLeast1: "1 or more",
    AtLeast1Float: "1 or more",
    AtLeast2: "2 or more",
    AtLeast8: "8 or more",
    Seed: f"0 to {2**32 - 1}",
    NonNegative: "0 or more",
    Positive: "a positive number",
    Quantile: "a quantile in [0, 1]",
    Sparsity: "a fraction of parameters removed (half of them is 0.5) inside (0, 1)",
}
UNITS = {"": 1, "b": 1} | {f"{p}b": 1000**i for i, p in enumerate("kmgt", 1)}
UNITS |= {f"{p}ib": 1024**i for i, p in enumerate("kmgt", 1)}
NAMED = {kind.__name__: words for kind, words in WORDS.items()}


def check(flag: str, hint: Any, value: Any) -> Any:
    """The value as a plain number where `hint` is one of the types above, else the value itself.

    Args:
        flag: the setting's dotted name.
        hint: its annotation; also in a list, or beside None.

    Raises:
        UserError: for a choice that there is not, and a number out of its range.
    """
    if get_origin(hint) in (Union, UnionType):
        return value if value is None else check(flag, next(h for h in get_args(hint) if h is not type(None)), value)
    if get_origin(hint) is list:
        return [check(flag, get_args(hint)[0], item) for item in value] if isinstance(value, list) else value
    if get_origin(hint) is Literal:
        if value not in get_args(hint):
            raise UserError(f"--{flag}: expected one of {', '.join(get_args(hint))}, got '{value}'.")
    elif hint in WORDS:
        try:
            return (int if issubclass(hint, int) else float)(hint(value))
        except (TypeError, ValueError, OverflowError) as error:
            raise UserError(f"--{flag}: expected {WORDS[hint]}, got {value}.") from error
    return value


def in_our_words(message: str) -> str:
    """jsonargparse's error of a value, as `check` would say it: flag, expected, got."""
    flag = re.search(r'Parser key "([\w.]+)":', message)
    number = re.search(r"Not of type (\w+)", message)
    choice = re.search(r"typing\.Literal\[([^\]]*)\]", message)
    got = re.search(
        r"(?:Given value: |Got value: )(.*)|Not of type \w+: (.*) does not conform|base 10: '(.*)'", message
    )
    said = next((part for part in got.groups() if part is not None), "") if got else ""
    if flag and got and number and number[1] in NAMED:
        return f"--{flag[1]}: expected {NAMED[number[1]]}, got {said}"
    if flag and got and choice:
        return f"--{flag[1]}: expected one of {choice[1].replace(chr(39), '')}, got '{said}'"
    return re.sub(r"<class '(\w+)'>", r"\1", re.sub(r'Parser key "([\w.]+)":', r"--\1:", message))


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
