"""Cache of discovered records, by class, structure and version of transformers."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import transformers
from transformers import PreTrainedConfig

from gprune.models.families import Family
from gprune.storage.cache import cache_dir
from gprune.storage.files import key_of, read_json, write_json

FORMAT = 9  # increase it when results of discovery change


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
    content = read_json(record_path(config)) if package == "transformers" else None
    return None if content is None else Family(**content["record"])


def write_record(config: PreTrainedConfig, record: Family) -> None:
    """Write a record to the cache."""
    write_json(record_path(config), {"record": asdict(record)})
