"""Cache of discovered records, by class, structure and version of transformers. Records are validated on reading."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import transformers
from transformers import PreTrainedConfig

from gprune.models.families import Family
from gprune.storage.cache import cache_dir
from gprune.storage.files import key_of, read_json, write_json

FORMAT = 6  # increase it when results of discovery change
MAPPINGS = {"layout", "extras", "attributes", "expert_rows", "classes"}


def place(config: PreTrainedConfig) -> Path:
    """Return the file of the record of a tiny configuration."""
    settings = json.dumps(config.to_dict(), sort_keys=True, default=str)
    kind = f"{type(config).__module__}.{type(config).__qualname__}"
    key = key_of(kind=kind, settings=settings, transformers=transformers.__version__, format=FORMAT)
    return cache_dir() / "structures" / f"{key}.json"


def read_record(config: PreTrainedConfig) -> Family | None:
    """Load a record. Return None if it is missing or invalid, and for classes outside of transformers.

    Classes of other packages are not cached, because their code may change between runs.
    """
    if type(config).__module__.partition(".")[0] != "transformers":
        return None
    content = read_json(place(config), sealed=True)
    return None if content is None else from_json(content)


def write_record(config: PreTrainedConfig, record: Family) -> None:
    """Write a record to the cache."""
    write_json(place(config), {"record": asdict(record)})


def frozen(kinds: Any) -> tuple[tuple[dict[str, Any], ...], ...]:
    """Return kinds in the form of a record, with tuples instead of lists."""
    return tuple(tuple({name: _pairs(name, value) for name, value in kind.items()} for kind in own) for own in kinds)


def _pairs(name: str, value: Any) -> Any:
    if name in MAPPINGS and isinstance(value, Mapping):
        return {key: tuple(v) if isinstance(v, list) else v for key, v in value.items()}
    return tuple(value) if name == "expert_down" else value


def from_json(content: Any) -> Family | None:
    """Parse a record, or return None if it is invalid."""
    record = content.get("record") if isinstance(content, dict) else None
    known = {f.name: f for f in fields(Family)}
    if not isinstance(record, dict) or set(record) != set(known):
        return None
    kinds = record["kinds"]
    if not isinstance(kinds, list) or len(kinds) != 2 or not all(isinstance(own, list) for own in kinds):
        return None
    if not all(_is_kind(kind, known) for own in kinds for kind in own):
        return None
    plain = {n: v for n, v in record.items() if n != "kinds"}
    if not all(_is_value(n, v) for n, v in plain.items()) or not isinstance(record["model_type"], str):
        return None
    return Family(**{n: _pairs(n, v) for n, v in plain.items()}, kinds=frozen(kinds))


def _is_kind(kind: Any, known: Mapping[str, Any]) -> bool:
    return (
        isinstance(kind, dict)
        and isinstance(kind.get("classes"), dict)
        and all(n in known or n == "classes" for n in kind)
        and all(_is_value(n, v) for n, v in kind.items())
    )


def _is_value(name: str, value: Any) -> bool:
    if name == "same_as":
        return value == {}
    if name in MAPPINGS:
        pairs = name in ("extras", "expert_rows")
        good = _is_place if pairs else lambda v: isinstance(v, str)
        return isinstance(value, dict) and all(isinstance(k, str) and good(v) for k, v in value.items())
    if name == "expert_down":
        return (
            isinstance(value, (list, tuple)) and len(value) == 2 and isinstance(value[0], str) and type(value[1]) is int
        )
    return value is None or type(value) in (str, bool, float, int)


def _is_place(value: Any) -> bool:
    """Return whether a JSON value is a dimension and a word."""
    return isinstance(value, (list, tuple)) and len(value) == 2 and type(value[0]) is int and isinstance(value[1], str)
