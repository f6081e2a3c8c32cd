"""The stored snapshots as files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
STORED = Path(__file__).parent / "stored"
REGENERATE = "If the change is intended, run `python -m tests.snapshots` and commit the files that it writes."


def read(name: str) -> Any:
    """Return the content of a stored file."""
    return json.loads((STORED / f"{name}.json").read_text(encoding="utf-8"))


def write(name: str, content: Any) -> None:
    """Store a file: lists of plain values are on one line, so that a changed cell changes one line."""
    STORED.mkdir(exist_ok=True)
    (STORED / f"{name}.json").write_text(_to_lines(content) + "\n", encoding="utf-8")


def _to_lines(content: Any, indent: str = "") -> str:
    """Return JSON with one line for each entry of a mapping and each list of plain values."""
    inner = f"{indent} "
    if isinstance(content, dict) and content:
        entries = [f"{inner}{json.dumps(key, ensure_ascii=False)}: {_to_lines(content[key], inner)}" for key in content]
        return "{\n" + ",\n".join(entries) + f"\n{indent}}}"
    if isinstance(content, list) and any(isinstance(item, list | dict) for item in content):
        return "[\n" + ",\n".join(f"{inner}{_to_lines(item, inner)}" for item in content) + f"\n{indent}]"
    return json.dumps(content, ensure_ascii=False)
