"""Types of settings with their ranges, and pydantic's errors as one line: the setting, its type or range, the value."""

from __future__ import annotations

import builtins
import inspect
from collections.abc import Collection, Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, ByteSize, Field, PlainSerializer, TypeAdapter, ValidationError, WrapValidator

from gprune.errors import UserError

# Largest count. Larger values are typing errors, or would overflow. For the same reason other numbers end at 1e30.
MAX_COUNT = 10**12
AtLeast0 = Annotated[int, Field(ge=0, le=MAX_COUNT)]
AtLeast1 = Annotated[int, Field(ge=1, le=MAX_COUNT)]
AtLeast2 = Annotated[int, Field(ge=2, le=MAX_COUNT)]
AtLeast8 = Annotated[int, Field(ge=8, le=MAX_COUNT)]
UpTo4096 = Annotated[int, Field(ge=1, le=4096)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
NonNegative = Annotated[float, Field(ge=0, le=1e30)]
Positive = Annotated[float, Field(gt=0, le=1e30)]
AtLeast1Float = Annotated[float, Field(ge=1, le=1e30)]
Quantile = Annotated[float, Field(ge=0, le=1)]
Sparsity = Annotated[float, Field(gt=0, lt=1)]
# 4096 is the longest path. Control characters and line separators are invalid in names.
Text = Annotated[str, Field(max_length=4096, pattern=r"^[^\p{Cc}\p{Zl}\p{Zp}]*$")]
# An option that is a number, stored as a float, or a bool. A union of types would add their names to error messages.
NumberOrBool = Annotated[
    float,
    WrapValidator(lambda value, check: value if isinstance(value, bool) else check(value)),
    PlainSerializer(lambda value: value),
]
MEMORY_SIZES = TypeAdapter(dict[str, Annotated[ByteSize, Field(gt=0, lt=10**15)]])

# Pydantic's type of error -> requirement on the value ("--flag must ..."). Other types of error keep pydantic's text.
REQUIREMENTS = {
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


def validation_message(error: ValidationError, prefix: str = "") -> str:
    """Return pydantic's first error on one line: `--corpora.num_samples must be 2 or more; got 1`.

    `prefix` is put before pydantic's name of the setting, such as `--corpora.`.
    """
    first_error = error.errors(include_url=False)[0]
    context = first_error.get("ctx", {})
    if isinstance(context.get("error"), UserError):  # raised by one of gprune's own validators
        return str(context["error"]).removesuffix(".")
    limits = {name: f"{value:g}" if isinstance(value, float) else value for name, value in context.items()}
    location = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first_error["loc"])
    name = f"{prefix}{location.removeprefix('.')}".rstrip(".") or "content"
    requirement = REQUIREMENTS.get(first_error["type"], "").format(**limits)
    if not requirement:  # pydantic's text: "Input should be a valid string", "String should have at most 3 characters"
        subject, should, rest_of_message = first_error["msg"].partition(" should ")
        requirement = rest_of_message if should and " " not in subject else f"be valid: {first_error['msg']}"
    if first_error["type"].startswith("missing"):
        return f"{name} must {requirement}"
    return f"{name} must {requirement}; got {format_value(first_error['input'])}"


def require(value: Any, kind: type | tuple[type, ...], expected: str) -> None:
    """Raise UserError, which begins with `expected`, unless a value is an instance of `kind`."""
    if not isinstance(value, kind):
        raise UserError(f"{expected}; got {format_value(value)}.")


def format_value(value: Any) -> str:
    """Format a value for an error: one line, and a long value shortened."""
    try:
        text = "null" if value is None else repr(value)
    except ValueError:  # Python does not convert ints of more than 4,300 digits to text
        text = "a very large number"
    return text if len(text) <= 80 else f"{text[:60]}... ({len(text):,} characters)"


def memory_limits(sizes: Mapping[str, str]) -> dict[str | int, int]:
    """Convert `--model.max_memory` to the form of transformers: bytes by `cpu` or device number."""
    if invalid := [device for device in sizes if device != "cpu" and not str(device).isdecimal()]:
        raise UserError(
            f"--model.max_memory must have keys cpu or a device number such as 0; got {format_value(invalid[0])}."
        )
    try:
        limits = MEMORY_SIZES.validate_python(sizes)
    except ValidationError as error:
        raise UserError(f"{validation_message(error, '--model.max_memory.')}.") from error
    return {device if device == "cpu" else int(device): int(size) for device, size in limits.items()}


def _check_memory(sizes: dict[str, str]) -> dict[str, str]:
    """Return the sizes unchanged. Raise UserError if `memory_limits` does not accept them."""
    memory_limits(sizes)
    return sizes


Memory = Annotated[dict[Text, Text], AfterValidator(_check_memory)]


def option_types(entry: Any) -> dict[str, Any]:
    """Return parameter name -> type, for the keyword-only parameters of a function or a class.

    Parameters of base classes are included if the constructor has `**kwargs`. The type is the annotation, such as
    `Positive`. Without an annotation, or if the annotation's name is not a global one, it is float.
    """
    types: dict[str, Any] = {}
    for owner in entry.__mro__ if isinstance(entry, type) else [entry]:
        function = vars(owner).get("__init__") if isinstance(owner, type) else owner
        if function is None:
            continue
        parameters = inspect.signature(function).parameters.values()
        for parameter in parameters:
            annotation = parameter.annotation
            if isinstance(annotation, str):  # the file has `from __future__ import annotations`
                annotation = (vars(builtins) | function.__globals__).get(annotation, float)
            if parameter.kind is parameter.KEYWORD_ONLY:
                types.setdefault(parameter.name, float if annotation is parameter.empty else annotation)
        passes_kwargs_on = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
        if not passes_kwargs_on:
            break
    return types


def option_defaults(entry: Any) -> dict[str, float | bool]:
    """Return the default values of the options of a function, in the form in which options are stored."""
    keywords = [p for p in inspect.signature(entry).parameters.values() if p.kind is p.KEYWORD_ONLY]
    numbers = {p.name: p.default for p in keywords if isinstance(p.default, int | float)}
    return {name: value if isinstance(value, bool) else float(value) for name, value in numbers.items()}


def select_options(entry: Any, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Select the settings that are keyword-only parameters of a function or class, by name."""
    return {name: settings[name] for name in option_types(entry) if name in settings}


def whole_numbers(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return options with ints in place of whole floats, such as 3 in place of 3.0."""
    return {name: int(v) if isinstance(v, float) and v.is_integer() else v for name, v in options.items()}


def typed_options(entry: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    """Convert checked options, whose numbers are stored as floats, to the types of an entry's parameters."""
    types = option_types(entry)
    return {
        name: TypeAdapter(types[name]).validate_python(value, strict=True)
        for name, value in whole_numbers(options).items()
    }


def check_options(
    flag: str, name: str, entry: Any, options: Mapping[str, Any], *, settings: Collection[str] = ()
) -> None:
    """Raise UserError for an option that a registered entry does not have, or a value of wrong type or range.

    Parameters in `settings` are set by flags, so they are not options.
    """
    known = {option: kind for option, kind in option_types(entry).items() if option not in settings}
    if unknown := [option for option in options if option not in known]:
        raise UserError(f"{flag} must name options of '{name}' ({', '.join(known) or 'none'}); got '{unknown[0]}'.")
    for option, value in options.items():
        try:
            TypeAdapter(known[option]).validate_python(value, strict=True)
        except ValidationError as error:
            raise UserError(f"{validation_message(error, f'{flag}.{option}')}.") from error
