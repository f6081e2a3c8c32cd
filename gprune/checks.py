"""Types of settings with their ranges, and pydantic's errors as one line: the setting, its type or range, the value."""

from __future__ import annotations

import builtins
import inspect
from collections.abc import Collection, Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, ByteSize, Field, TypeAdapter, ValidationError

from gprune.errors import UserError

MOST = 10**12  # limit of every count, as 1e30 is of other numbers: larger ones are typing errors, or overflow
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
# 4096 is the longest path. Control characters and line separators are invalid in names.
Text = Annotated[str, Field(max_length=4096, pattern=r"^[^\p{Cc}\p{Zl}\p{Zp}]*$")]
Sizes = TypeAdapter(dict[str, Annotated[ByteSize, Field(gt=0, lt=10**15)]])

MUST = {  # what a value must do, by pydantic's type of error; for other types pydantic's own words are used
    "missing": "be given",
    "missing_argument": "be given",
    "unexpected_keyword_argument": "not be given (no such argument)",
    "greater_than": "be more than {gt}",
    "greater_than_equal": "be {ge} or more",
    "less_than_equal": "be {le} or less",
    "dict_type": "be a mapping of names to values",
    "model_type": "be a mapping of names to values",
    "extra_forbidden": "not be given (no such key)",
    "byte_size": "be a size such as 2GiB or 500MB",
    "byte_size_unit": "be a size such as 2GiB or 500MB",
}


def refusal(error: ValidationError, prefix: str = "") -> str:
    """Return pydantic's first error on one line: `--corpora.num_samples must be 2 or more; got 1`.

    Args:
        prefix: put before the name of the setting, such as `--corpora.`.
    """
    first = error.errors(include_url=False)[0]
    context = first.get("ctx", {})
    if isinstance(context.get("error"), UserError):  # raised by a check of ours
        return str(context["error"]).removesuffix(".")
    context = {name: f"{value:g}" if isinstance(value, float) else value for name, value in context.items()}
    place = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"])
    name = f"{prefix}{place.removeprefix('.')}".rstrip(".") or "content"
    requirement = MUST.get(first["type"], "").format(**context)
    if not requirement:  # "Input should be a valid string", "String should have at most 3 characters"
        subject, should, rest = first["msg"].partition(" should ")
        requirement = rest if should and " " not in subject else f"be valid: {first['msg']}"
    got = "" if first["type"].startswith("missing") else f"; got {shown(first['input'])}"
    return f"{name} must {requirement}{got}"


def require(value: Any, kind: type | tuple[type, ...], expected: str) -> None:
    """Raise UserError unless a value has a type; `expected` such as "The argument of prune must be a RunConfig"."""
    if not isinstance(value, kind):
        raise UserError(f"{expected}; got {shown(value)}.")


def shown(value: Any) -> str:
    """Format a value for an error: one line, and a long value shortened."""
    try:
        text = "null" if value is None else repr(value)
    except ValueError:  # an int of 5,000 digits
        text = "a very large number"
    return text if len(text) <= 80 else f"{text[:60]}... ({len(text):,} characters)"


def memory_limits(sizes: Mapping[str, str]) -> dict[str | int, int]:
    """Convert `--model.max_memory` to the form of transformers: bytes by `cpu` or device number."""
    if other := [device for device in sizes if device != "cpu" and not str(device).isdecimal()]:
        raise UserError(f"--model.max_memory must have keys cpu or a device number such as 0; got {shown(other[0])}.")
    try:
        limits = Sizes.validate_python(sizes)
    except ValidationError as error:
        raise UserError(f"{refusal(error, '--model.max_memory.')}.") from error
    return {device if device == "cpu" else int(device): int(size) for device, size in limits.items()}


Memory = Annotated[dict[Text, Text], AfterValidator(lambda sizes: memory_limits(sizes) and sizes)]


def option_types(entry: Any) -> dict[str, Any]:
    """Types by name of the keyword-only parameters of a function or a class.

    For a class, base classes are included as far as `**kwargs` are passed on. A parameter has the type of its
    annotation, `Positive` for instance, or float without an annotation.
    """
    types: dict[str, Any] = {}
    for owner in entry.__mro__ if isinstance(entry, type) else [entry]:
        function = vars(owner).get("__init__") if isinstance(owner, type) else owner
        if function is None:
            continue
        parameters = inspect.signature(function).parameters.values()
        for p in parameters:
            hint = p.annotation
            if isinstance(hint, str):  # the file has `from __future__ import annotations`
                hint = (vars(builtins) | function.__globals__).get(hint, float)
            if p.kind is p.KEYWORD_ONLY:
                types.setdefault(p.name, float if hint is p.empty else hint)
        if all(p.kind is not p.VAR_KEYWORD for p in parameters):
            break
    return types


def accepted(entry: Any, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Select the settings that are keyword-only parameters of a function or class, by name."""
    return {name: settings[name] for name in option_types(entry) if name in settings}


def check_options(
    flag: str, name: str, entry: Any, options: Mapping[str, Any], *, settings: Collection[str] = ()
) -> None:
    """Raise UserError for an option that a registered entry does not have, or a value of wrong type or range.

    Args:
        flag: the flag of the options, which messages begin with.
        name: the entry's registered name.
        settings: parameters of the entry that have flags of their own, and so are not options.
    """
    known = {option: kind for option, kind in option_types(entry).items() if option not in settings}
    if unknown := [option for option in options if option not in known]:
        raise UserError(f"{flag} must name options of '{name}' ({', '.join(known) or 'none'}); got '{unknown[0]}'.")
    for option, value in options.items():
        try:
            TypeAdapter(known[option]).validate_python(value, strict=True)
        except ValidationError as error:
            raise UserError(f"{refusal(error, f'{flag}.{option}')}.") from error
