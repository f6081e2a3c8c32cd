"""Local tasks whose text is made of words in the tiny tokenizer's vocabulary."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from experiments import tasks as task_script
from gprune.benchmarks import tasks
from tests.tiny_run import WORDS


def needs_lm_eval():
    return pytest.importorskip("lm_eval", reason="lm_eval is not installed: pip install -e '.[lm-eval]'")


def manager_of(*folders: str, include_path: str | None = None):
    """lm_eval's TaskManager for the tasks in these folders of its own. Reading all of its folders takes seconds."""
    root = Path(needs_lm_eval().__file__).parent / "tasks"
    manager = pytest.importorskip("lm_eval.tasks").TaskManager
    paths = [str(root / name) for name in folders] + ([include_path] if include_path else [])
    return manager(include_defaults=False, include_path=paths)


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


def write_rows(root: Path, name: str, split: str, rows: list[dict]) -> Path:
    """Write the rows of a task for `experiments.tasks`, and return the file's path."""
    path = root / "rows" / name / f"{split}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_tasks(root: Path, **rows: dict[str, list[dict]]) -> None:
    """Write YAML tasks into the data folder `root` from rows by task and split, as `experiments.tasks` does."""
    for name, of_task in rows.items():
        for split, of_split in of_task.items():
            write_rows(root, name, split, of_split)
    task_script.work(["--data", str(root / "rows"), "--output", str(root / "tasks")])
    tasks._task_manager.cache_clear()


@pytest.fixture
def only(monkeypatch):
    """A function that restricts lm_eval to tasks in folders of its own, with an unreachable hub."""
    import datasets
    import huggingface_hub

    for config in (datasets.config, huggingface_hub.constants):
        monkeypatch.setattr(config, "HF_HUB_OFFLINE", True)
    read = tasks._task_manager

    def restrict(*folders: str) -> None:
        def manager(folder, *, defaults):
            return manager_of(*folders, include_path=folder) if defaults else read(folder, defaults=False)

        monkeypatch.setattr(tasks, "_task_manager", manager)
        manager.cache_clear = read.cache_clear
        monkeypatch.setattr(task_script, "INDEX", dict(manager_of(*folders).task_index) if folders else {"": None})

    needs_lm_eval()
    # A measurement must not read the thousands of files of lm_eval's index, which takes seconds.
    monkeypatch.setattr("lm_eval.evaluator.TaskManager", lambda **_: pytest.fail("lm_eval's index was read again"))
    restrict()
    return restrict


@pytest.fixture
def data(tmp_path, monkeypatch, only):
    """A folder of local tasks. The Hugging Face hub is unreachable."""
    monkeypatch.setenv("GPRUNE_DATA_DIR", str(tmp_path))
    twelve = {"validation": questions(12)}
    write_tasks(tmp_path, piqa=twelve, sciq=twelve, mine={"test": questions(12)}, blimp={"test": pairs()})
    return tmp_path
