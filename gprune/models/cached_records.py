"""Cache of discovered records, by class, structure and version of transformers. Records are validated on reading."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import transformers
from transformers import PreTrainedConfig

from gprune.models.families import Family
from gprune.storage.cache import cache_dir
from gprune.storage.files import key_of, read_json, write_json

FORMAT = 9  # increase it when results of discovery change
MAPPINGS = {"layout", "extras", "attributes", "expert_rows", "classes"}  # fields with a dictionary
PAIR_MAPPINGS = {"extras", "expert_rows"}  # those whose values are pairs (dimension, word); other values are strings


def record_path(config: PreTrainedConfig) -> Path:
    """Return the file of the record of a tiny configuration."""
    settings = json.dumps(config.to_dict(), sort_keys=True, default=str)
    kind = f"{type(config).__module__}.{type(config).__qualname__}"
    key = key_of(kind=kind, settings=settings, transformers=transformers.__version__, format=FORMAT)
    return cache_dir() / "structures" / f"{key}.json"


def read_record(config: PreTrainedConfig) -> Family | None:
    """Load a record. Return None if it is missing or invalid, and for classes outside of transformers.

    Classes of other packages are not cached, because their code may change between runs.
    """
    package = type(config).__module__.partition(".")[0]
    if package != "transformers":
        return None
    content = read_json(record_path(config), sealed=True)
    return None if content is None else parse_record(content)


def write_record(config: PreTrainedConfig, record: Family) -> None:
    """Write a record to the cache."""
    write_json(record_path(config), {"record": asdict(record)})


def freeze_kinds(kinds: Iterable[Iterable[Mapping[str, Any]]]) -> tuple[tuple[dict[str, Any], ...], ...]:
    """Convert kinds of FFN and of attention to the form of `Family.kinds`, with tuples instead of lists.

    Args:
        kinds: two lists, kinds of FFN and kinds of attention. A kind is a dictionary of fields of a record.
    """
    return tuple(
        tuple({name: _lists_to_tuples(name, value) for name, value in kind.items()} for kind in of_scope)
        for of_scope in kinds
    )


def _lists_to_tuples(name: str, value: Any) -> Any:
    """Convert pairs in a field of a record to tuples. JSON has only lists."""
    if name in MAPPINGS and isinstance(value, Mapping):
        return {key: tuple(inner) if isinstance(inner, list) else inner for key, inner in value.items()}
    return tuple(value) if name == "expert_down" else value


def parse_record(content: Any) -> Family | None:
    """Return the record in the content of a cache file, or None if it is invalid.

    Args:
        content: any JSON value. The form of `write_record` is {"record": fields of `Family`}, where `kinds` is a list
            of two lists, kinds of FFN and kinds of attention, and a kind is a dictionary with fields of `Family` and
            `classes` (path of a module -> name of its class). `refused` is a list of kinds.
    """
    record = content.get("record") if isinstance(content, dict) else None
    known = {field.name for field in fields(Family)}
    if not isinstance(record, dict) or set(record) != known:
        return None
    kinds = record["kinds"]
    if not isinstance(kinds, list) or len(kinds) != 2 or not all(isinstance(of_scope, list) for of_scope in kinds):
        return None
    refused = record["refused"]
    if not isinstance(refused, list):
        return None
    if not all(_is_kind(kind, known) for of_scope in [*kinds, refused] for kind in of_scope):
        return None
    other_fields = {name: value for name, value in record.items() if name not in ("kinds", "refused")}
    if not isinstance(record["model_type"], str):
        return None
    if not all(_is_valid_value(name, value) for name, value in other_fields.items()):
        return None
    frozen_fields = {name: _lists_to_tuples(name, value) for name, value in other_fields.items()}
    return Family(**frozen_fields, kinds=freeze_kinds(kinds), refused=tuple(refused))


def _is_kind(kind: Any, known: Collection[str]) -> bool:
    """Return whether a JSON value is a kind: a dictionary of valid values of known fields, and with `classes`."""
    if not isinstance(kind, dict) or not isinstance(kind.get("classes"), dict):
        return False
    if any(name not in known and name != "classes" for name in kind):
        return False
    return all(_is_valid_value(name, value) for name, value in kind.items())


def _is_valid_value(name: str, value: Any) -> bool:
    """Return whether a JSON value has the type of a field of a record or kind."""
    if name == "same_as":
        return value == {}
    if name in MAPPINGS:
        if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
            return False
        if name in PAIR_MAPPINGS:
            return all(_is_pair(inner, int, str) for inner in value.values())
        return all(isinstance(inner, str) for inner in value.values())
    if name == "expert_down":
        return _is_pair(value, str, int)
    return value is None or type(value) in (str, bool, float, int)


def _is_pair(value: Any, first: type, second: type) -> bool:
    """Return whether a JSON value is a pair of these two types. A bool is not an int."""
    return isinstance(value, (list, tuple)) and len(value) == 2 and type(value[0]) is first and type(value[1]) is second
