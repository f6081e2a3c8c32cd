"""Multiple-choice tasks from local files: `$GPRUNE_DATA_DIR/tasks/<name>/<split>.jsonl`.

A line is either `{"prompt": ..., "choices": [...], "label": 0}`, where a choice is scored as the continuation
" " + choice of the prompt, or a minimal pair `{"good": ..., "bad": ...}`, whose sentences are scored whole. Any folder
of such files is a task; `LOCAL_TASKS` says of those we know what they are. Of tasks that claim lm_eval's prompts, every
line is checked: it needs `fields`, the columns that lm_eval makes its prompt of.
"""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gprune.errors import UserError
from gprune.storage.reading import expanded, needed_text

SPLITS = ("test", "validation")  # lm_eval, too, takes the test split where there is one


@dataclass(frozen=True)
class LocalTask:
    """What is known of a task in local files.

    Attributes:
        version: of the task in lm_eval whose prompts these are; other files have versions of our own.
        complete: the whole split with lm_eval's own prompts, so that a number may stand beside those of others.
        note: goes into every record.
        split: the only split of which this is said; another one is not complete.
        prompt: lm_eval's prompt as a format string over `fields`; None where prompts are what the file says.
        questions: of that split; None where nothing is said of it.
    """

    version: str
    complete: bool
    note: str
    split: str
    prompt: str | None = None
    questions: int | None = None


SUBSET = "a subset of the task: never to be set beside published figures"
LOCAL_TASKS = {
    "piqa": LocalTask("1.0", True, "lm_eval's prompts", "validation", "Question: {goal}\nAnswer:", 1838),
    "arc_easy": LocalTask("1.0", True, "lm_eval's prompts", "test", "Question: {question}\nAnswer:", 2376),
    "sciq": LocalTask("subset-1", False, f"validation questions, without the test split; {SUBSET}", "validation"),
    "blimp": LocalTask("subset-1", False, f"15 of the 1000 pairs of each paradigm; {SUBSET}", "test"),
}
UNKNOWN = LocalTask(
    "local", False, "local files that gprune knows nothing of: not to be set beside published figures", ""
)


@dataclass(frozen=True)
class Questions:
    """The questions of one split, in the order in which `--limit` takes them."""

    name: str
    split: str
    rows: list[dict[str, Any]]  # prompt, choices, label
    pairs: bool  # minimal pairs: no prompt, and lengths say nothing, so no acc_norm
    about: LocalTask


def local_file(name: str) -> Path | None:
    """The file a local task is read from, or None where there is none."""
    root = os.environ.get("GPRUNE_DATA_DIR")
    if not root or not name.replace("_", "").isalnum():  # a plain name only: it must not lead out of the folder
        return None
    folder = expanded(root) / "tasks" / name
    return next((folder / f"{split}.jsonl" for split in SPLITS if (folder / f"{split}.jsonl").is_file()), None)


def local_tasks() -> list[str]:
    """Names of the tasks under `$GPRUNE_DATA_DIR`."""
    root = os.environ.get("GPRUNE_DATA_DIR")
    folder = expanded(root) / "tasks" if root else None
    return sorted(p.name for p in folder.iterdir() if local_file(p.name)) if folder and folder.is_dir() else []


def load_questions(path: Path) -> Questions:
    """Read and check a task file."""
    name, split = path.parent.name, path.stem
    about = LOCAL_TASKS.get(name, UNKNOWN)
    lines = needed_text(path, "a question per line in UTF-8").split("\n")
    rows = [_question(line, f"{path}:{i}", about.prompt) for i, line in enumerate(lines, 1) if line.strip()]
    if not rows:
        raise UserError(f"{path}: expected a question per line, got an empty file.")
    pairs = all("paradigm" in row for row in rows)
    if about.complete and split != about.split:
        about = replace(about, complete=False, note=f"the {split} split, not {about.split}")
    elif about.complete and len(rows) != about.questions:
        about = replace(about, complete=False, note=f"{len(rows):,} of {about.questions:,} questions")
    return Questions(name, split, spread(rows) if pairs else rows, pairs, about)


def spread(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The first pair of every paradigm, then the second of every paradigm, ...: any limit then covers them all."""
    seen: dict[str, int] = defaultdict(int)
    turns = []
    for row in rows:
        turns.append(seen[row["paradigm"]])
        seen[row["paradigm"]] += 1
    return [rows[i] for i in sorted(range(len(rows)), key=turns.__getitem__)]


def _question(line: str, where: str, prompt: str | None) -> dict[str, Any]:
    expected = '{"prompt": str, "choices": [str, str, ...], "label": int} or {"good": str, "bad": str}'
    try:
        row = json.loads(line)
        if "good" in row:
            pair = [row["good"], row["bad"]]
            row = {"prompt": "", "choices": pair, "label": 0, "paradigm": str(row.get("paradigm", ""))}
        found = {k: row[k] for k in ("prompt", "choices", "label", "paradigm") if k in row}
        texts = [found["prompt"], *found["choices"]]
        right = all(isinstance(t, str) for t in texts) and all(found["choices"]) and len(found["choices"]) > 1
        if not right or found["label"] not in range(len(found["choices"])):
            raise ValueError
        if prompt is not None:
            expected = f"'fields' that make lm_eval's prompt {prompt!r}"
            if found["prompt"] != prompt.format_map(row["fields"]):
                raise ValueError
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{where}: expected {expected}, got {line[:80]!r}.") from None
    return found
