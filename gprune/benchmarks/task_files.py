"""Local files of tasks: a JSON object per line, questions and minimal pairs, and a hash of what is scored."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from gprune.errors import UserError, quoting
from gprune.storage.paths import read_required_text


def interleave_paradigms(pairs: list[dict[str, Any]]) -> None:
    """Sort minimal pairs in place: the first of every paradigm, the second of every paradigm, and so on.

    So any `--limit` covers all paradigms.
    """
    counters: dict[str, Iterator[int]] = defaultdict(itertools.count)
    pairs.sort(key=lambda pair: next(counters[pair["paradigm"]]))


def read_json_lines(path: Path) -> dict[str, dict[str, Any]]:
    """Read a file with a JSON object on each line. Return "file:line" -> object."""
    rows = {}
    for i, line in enumerate(read_required_text(path, "a question per line in UTF-8").split("\n"), 1):
        if line.strip():
            with quoting(f"{path}:{i}: Cannot read a JSON object: "):
                rows[f"{path}:{i}"] = {**json.loads(line)}
    if not rows:
        raise UserError(f"{path} must have a question per line; got an empty file.")
    return rows


def parse_question(row: dict[str, Any], where: str) -> dict[str, Any]:
    """Convert a row to a question with `prompt`, `choices` and `label`, and for a minimal pair also `paradigm`."""
    if "good" in row:
        question = {"prompt": "", "choices": [row["good"], row.get("bad")], "label": 0}
        question["paradigm"] = str(row.get("paradigm", ""))
    else:
        question = {name: row.get(name) for name in ("prompt", "choices", "label")}
    choices = question["choices"] if isinstance(question["choices"], list) else []
    are_texts = all(isinstance(text, str) for text in (question["prompt"], *choices))
    has_choices = len(choices) > 1 and all(choices)
    if not (are_texts and has_choices and question["label"] in range(len(choices))):
        expected = '{"prompt": str, "choices": [str, str, ...], "label": int} or {"good": str, "bad": str}'
        raise UserError(f"{where}: The line must be {expected}, or a row of lm_eval's data set.")
    return question


def questions_hash(questions: Iterable[tuple[list[tuple[str, str]], Any]]) -> str:
    """Return a hash of everything that is scored."""
    return hashlib.sha256(json.dumps(list(questions)).encode()).hexdigest()[:16]
