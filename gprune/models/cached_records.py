"""Cache of discovered records, by class, structure and version of transformers."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

import transformers
from transformers import PreTrainedConfig

from gprune.models.families import Family
from gprune.storage.files import Cache, key_of

FORMAT = 9  # increase it when results of discovery change
CACHE = Cache("structures")
MAPPINGS = {"layout", "extras", "attributes", "expert_rows", "classes"}  # fields with a dictionary


def _key(config: PreTrainedConfig) -> str:
    """Return the key of the record of a tiny configuration."""
    settings = json.dumps(config.to_dict(), sort_keys=True, default=str)
    kind = f"{type(config).__module__}.{type(config).__qualname__}"
    return key_of(kind=kind, settings=settings, transformers=transformers.__version__, format=FORMAT)


def read_record(config: PreTrainedConfig) -> Family | None:
    """Load a record. Return None if it is missing or invalid, and for classes outside of transformers.

    Classes of other packages are not cached, because their code may change between runs.
    """
    package = type(config).__module__.partition(".")[0]
    if package != "transformers":
        return None
    content = CACHE.read(_key(config))
    return None if content is None else parse_record(content)


def write_record(config: PreTrainedConfig, record: Family) -> None:
    """Write a record to the cache."""
    CACHE.write(_key(config), {"record": asdict(record)})


def freeze_kinds(kinds: Iterable[Iterable[Mapping[str, Any]]]) -> tuple[tuple[dict[str, Any], ...], ...]:
    """Convert kinds of FFN and of attention to the form of `Family.kinds`, with tuples instead of lists."""
    return tuple(
        tuple({name: _lists_to_tuples(name, value) for name, value in kind.items()} for kind in of_scope)
        for of_scope in kinds
    )


def _lists_to_tuples(name: str, value: Any) -> Any:
    """Convert pairs in a field of a record to tuples. JSON has only lists."""
    if name in MAPPINGS and isinstance(value, Mapping):
        return {key: tuple(inner) if isinstance(inner, list) else inner for key, inner in value.items()}
    return tuple(value) if name == "expert_down" else value


def parse_record(content: dict[str, Any]) -> Family:
    """Return the record in the content of a cache file: {"record": fields of `Family`}."""
    record = content["record"]
    kinds, refused = freeze_kinds(record["kinds"]), tuple(record["refused"])
    other_fields = {name: value for name, value in record.items() if name not in ("kinds", "refused")}
    frozen_fields = {name: _lists_to_tuples(name, value) for name, value in other_fields.items()}
    return Family(**frozen_fields, kinds=kinds, refused=refused)
