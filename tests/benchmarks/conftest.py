"""Local tasks whose text is made of words in the tiny tokenizer's vocabulary."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest

from gprune.benchmarks import task_sources
from tests.tiny_run import WORDS


def needs_lm_eval():
    return pytest.importorskip("lm_eval", reason="lm_eval is not installed: pip install -e '.[lm-eval]'")


def manager_of(*folders: str):
    """lm_eval's TaskManager for the tasks in these folders only. Reading all of its folders takes seconds."""
    root = Path(needs_lm_eval().__file__).parent / "tasks"
    manager = pytest.importorskip("lm_eval.tasks").TaskManager
    return manager(include_defaults=False, include_path=[str(root / name) for name in folders])


def sentence(rng: np.random.Generator, words: int) -> str:
    return " ".join(rng.choice(WORDS, words))


def questions(n: int, seed: int = 0) -> list[dict]:
    """Questions with three to five choices, as in ARC."""
    rng, rows = np.random.default_rng(seed), []
    for i in range(n):
        choices = [sentence(rng, int(rng.integers(1, 6))) for _ in range(3 + i % 3)]
        prompt = f"Question: {sentence(rng, 6)}\nAnswer:"
        rows.append({"prompt": prompt, "choices": choices, "label": int(rng.integers(len(choices)))})
    return rows


def pairs() -> list[dict]:
    """Pairs of an acceptable and an unacceptable sentence of three paradigms, as in BLiMP."""
    rng = np.random.default_rng(2)
    return [
        {"good": sentence(rng, 5), "bad": sentence(rng, 5), "paradigm": paradigm}
        for paradigm in ("island", "binding", "ellipsis")
        for _ in range(4)
    ]


def write_task(root: Path, name: str, split: str, rows: list[dict]) -> Path:
    """Write the rows of a local task below the data folder `root`, and return the file's path."""
    path = root / "tasks" / name / f"{split}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


class NoTasks:
    """The part of lm_eval's TaskManager that gprune uses, without any task."""

    all_tasks = all_subtasks = ()
    task_index: ClassVar[dict] = {}


def fake_hub(monkeypatch, *, reachable: bool, manager: object = NoTasks) -> None:
    """Replace the check whether the Hugging Face hub is reachable, and lm_eval's TaskManager."""

    @contextmanager
    def is_reachable() -> Iterator[bool]:
        yield reachable

    monkeypatch.setattr(task_sources, "offline_if_unreachable", is_reachable)
    monkeypatch.setattr(task_sources, "_task_manager", lambda: manager)


@pytest.fixture
def data(tmp_path, monkeypatch):
    """A folder of local tasks. The Hugging Face hub is unreachable."""
    needs_lm_eval()
    for name, split in (("piqa", "validation"), ("arc_easy", "test"), ("sciq", "validation"), ("mine", "test")):
        write_task(tmp_path, name, split, questions(12))
    write_task(tmp_path, "blimp", "test", pairs())
    monkeypatch.setenv("GPRUNE_DATA_DIR", str(tmp_path))
    fake_hub(monkeypatch, reachable=False)
    return tmp_path
