"""Read the files of offline W&B runs with wandb's own reader, `wandb leet inspect`."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from wandb.util import get_core_path


def read(file: Path) -> SimpleNamespace:
    """Return the content of a file.

    Attributes of the result: `about` (name, group, tags, ...), `config`, `history` (list of rows), `summary`, `axes`
    ({pattern of metrics: metric of the x axis}), `artifacts` and `exit_code`. A file that was not closed is read to its
    last complete record, and its `exit_code` is None.
    """
    command = [get_core_path(), "leet", "inspect", "--no-observability", "--json", "--run-file", file, file.parent]
    for _ in range(20):  # W&B's service may write the end of a file up to 0.1 s after `finish` has returned
        lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
        if any(json.loads(line)["type"] == "exit" for line in lines):
            break
        time.sleep(0.05)
    run = SimpleNamespace(about={}, config={}, history=[], summary={}, axes={}, artifacts=[], exit_code=None)
    for record in map(json.loads, lines):
        content: dict[str, Any] = record.get(record["type"], {})
        if record["type"] == "run":
            run.about = content
            run.config |= content["config"]["update"]
        elif record["type"] == "config":
            run.config |= content.get("update", {})
        elif record["type"] == "history":
            run.history.append(content["item"])
        elif record["type"] == "summary":
            run.summary |= content.get("update", {})
        elif record["type"] == "metric" and "step_metric" in content:
            run.axes[content.get("glob_name") or content["name"]] = content["step_metric"]
        elif record["type"] == "artifact":
            run.artifacts.append(content)
        elif record["type"] == "exit":
            run.exit_code = content["exit_code"]
    return run


def find(folder: Path) -> list[Path]:
    """Return the files of runs below a folder, in the order of their start."""
    return sorted(folder.rglob("offline-run-*/*.wandb"))
