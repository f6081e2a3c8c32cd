"""Types of settings with their ranges, and pydantic's refusals as one line: what was expected, what came."""

from __future__ import annotations

import builtins
import inspect
from collections.abc import Collection, Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, ByteSize, Field, TypeAdapter, ValidationError

from gprune.errors import UserError

MOST = 10**12  # of any count, and 1e30 of any other number: beyond it are typing errors, and what overflows
AtLeast0 = Annotated[int, Field(ge=0, le=MOST)]
AtLeast1 = Annotated[int, Field(ge=1, le=MOST)]
AtLeast2 = Annotated[int, Field(ge=2, le=MOST)]
AtLeast8 = Annotated[int, Field(ge=8, le=MOST)]
Few = Annotated[int, Field(ge=1, le=4096)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
NonNegative = Annotated[float, Field(ge=0, le=1e30)]
Positive = Annotated[float, Field(gt=0, le=1e30)]
AtLeast1Float = Annotated[float, Field(ge=1, le=1e30)]
Quantile = Annotated[float, Field(ge=0, le=1)]
Sparsity = Annotated[float, Field(gt=0, lt=1)]
# A path can have no more characters; no name has controls or ends of lines.
Text = Annotated[str, Field(max_length=4096, pattern=r"^[^\p{Cc}\p{Zl}\p{Zp}]*$")]
Sizes = TypeAdapter(dict[str, Annotated[ByteSize, Field(gt=0, lt=10**15)]])

EXPECTED = {  # by pydantic's type of an error, where its own words are no better
    "missing": "a value",
    "missing_argument": "a value",
    "unexpected_keyword_argument": "no such argument",
    "greater_than": "more than {gt}",
    "greater_than_equal": "{ge} or more",
    "less_than_equal": "{le} or less",
    "dict_type": "values by name",
    "model_type": "values by name",
    "extra_forbidden": "no such key",
    "byte_size": "a size such as 2GiB or 500MB",
    "byte_size_unit": "a size such as 2GiB or 500MB",
}


def refusal(error: ValidationError, prefix: str = "") -> str:
    """The first of pydantic's errors on one line, `--corpora.num_samples: expected 2 or more, got 1`.

    Args:
        prefix: stands before the name of the setting, such as `--corpora.`.
    """
    first = error.errors(include_url=False)[0]
    context = first.get("ctx", {})
    if isinstance(context.get("error"), UserError):  # raised by a check of ours
        return str(context["error"])
    context = {name: f"{value:g}" if isinstance(value, float) else value for name, value in context.items()}
    place = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"])
    name = f"{prefix}{place.removeprefix('.')}".rstrip(".") or "content"
    expected = first["msg"].replace("Input should be", "expected", 1)
    if first["type"] in EXPECTED:
        expected = f"expected {EXPECTED[first['type']].format(**context)}"
    return f"{name}: {expected}, got {'none' if first['type'].startswith('missing') else shown(first['input'])}"


def require(value: Any, kind: type | tuple[type, ...], expected: str) -> None:
    """Raise UserError unless a value is of a kind; `expected` such as "prune: expected a RunConfig"."""
    if not isinstance(value, kind):
        raise UserError(f"{expected}, got {shown(value)}.")


def shown(value: Any) -> str:
    """A value that came, for an error: one line, and not all of what may be long."""
    try:
        text = "null" if value is None else repr(value)
    except ValueError:  # an int of 5,000 digits
        text = "a very large number"
    return text if len(text) <= 80 else f"{text[:60]}... ({len(text):,} characters)"


def memory_limits(sizes: Mapping[str, str]) -> dict[str | int, int]:
    """`--model.max_memory` as transformers takes it: bytes by `cpu` or device number."""
    if other := [device for device in sizes if device != "cpu" and not str(device).isdecimal()]:
        raise UserError(f"--model.max_memory: expected cpu or a device number such as 0, got {shown(other[0])}.")
    try:
        limits = Sizes.validate_python(sizes)
    except ValidationError as error:
        raise UserError(f"{refusal(error, '--model.max_memory.')}.") from error
    return {device if device == "cpu" else int(device): int(size) for device, size in limits.items()}


Memory = Annotated[dict[Text, Text], AfterValidator(lambda sizes: memory_limits(sizes) and sizes)]


def option_types(entry: Any) -> dict[str, Any]:
    """Types by name of the keyword-only parameters of a function, or of a class and those that its `**kwargs` reach.

    They are as annotated, `Positive` for instance; without an annotation a number.
    """
    types: dict[str, Any] = {}
    for owner in entry.__mro__ if isinstance(entry, type) else [entry]:
        function = vars(owner).get("__init__") if isinstance(owner, type) else owner
        if function is None:
            continue
        parameters = inspect.signature(function).parameters.values()
        for p in parameters:
            hint = p.annotation
            if isinstance(hint, str):  # of a file with `from __future__ import annotations`
                hint = (vars(builtins) | function.__globals__).get(hint, float)
            if p.kind is p.KEYWORD_ONLY:
                types.setdefault(p.name, float if hint is p.empty else hint)
        if all(p.kind is not p.VAR_KEYWORD for p in parameters):
            break
    return types


def accepted(entry: Any, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Those settings that a function or class takes as keyword-only parameters, by name."""
    return {name: settings[name] for name in option_types(entry) if name in settings}


def check_options(
    flag: str, name: str, entry: Any, options: Mapping[str, Any], *, settings: Collection[str] = ()
) -> None:
    """Raise UserError, which begins with the flag, for what is no option of an entry, or of another type or range.

    Args:
        settings: parameters of the entry that flags of their own set.
    """
    known = {option: kind for option, kind in option_types(entry).items() if option not in settings}
    if unknown := [option for option in options if option not in known]:
        raise UserError(f"{flag}: expected options of '{name}' ({', '.join(known) or 'none'}), got '{unknown[0]}'.")
    for option, value in options.items():
        try:
            TypeAdapter(known[option]).validate_python(value, strict=True)
        except ValidationError as error:
            raise UserError(f"{refusal(error, f'{flag}.{option}')}.") from error
