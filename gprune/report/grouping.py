"""Distinct names of runs, and groups of runs that differ only in the seed."""

from __future__ import annotations

import json
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path, PurePath
from typing import Any

from gprune.config import effective_settings
from gprune.runs.results import FinishedRun, read_run
from gprune.storage.paths import expanded


def read_runs(paths: Sequence[Path | str | FinishedRun]) -> list[FinishedRun]:
    """Read finished runs, without duplicates, and name the runs that are read.

    A run is named after its folder. If that name is used twice, all folders are named by their paths relative to a
    common parent. `FinishedRun` objects, such as records of a study, keep their names and come last.
    """
    finished_runs = {(run.path.resolve(), run.name): run for run in paths if isinstance(run, FinishedRun)}
    folders = {expanded(path).resolve(): path for path in paths if not isinstance(path, FinishedRun)}
    if not folders:
        return list(finished_runs.values())
    names = _folder_names(list(folders), used={run.name for run in finished_runs.values()})
    runs = [replace(read_run(path), name=name) for path, name in zip(folders.values(), names, strict=True)]
    return [*runs, *finished_runs.values()]


def _folder_names(folders: Sequence[Path], used: set[str]) -> list[str]:
    """Return distinct names of folders: their own names or, if these do not suffice, relative paths.

    Paths are relative to the common parent of all folders, or to one of its parents if a path is in `used`.
    """
    names = [folder.name for folder in folders]
    common_parent = Path(os.path.commonpath([folder.parent for folder in folders]))
    for parent in (common_parent, *common_parent.parents):
        if len(set(names)) == len(names) and used.isdisjoint(names):
            break
        names = [os.path.relpath(folder, parent) for folder in folders]
    return names


def group_by_seed(runs: Sequence[FinishedRun]) -> list[FinishedRun]:
    """Give runs that differ only in the seed one name, that of the first, and order them by seed beside each other.

    Two runs with the same seed keep their names.
    """
    # The second part of the key counts runs with the same settings and seed.
    groups: dict[tuple[str, int], list[FinishedRun]] = defaultdict(list)
    repeats: Counter[tuple[str, int]] = Counter()
    for run in runs:
        settings = run.all_but_seed
        repeats[settings, run.seed] += 1
        groups[settings, repeats[settings, run.seed]].append(run)
    return [
        replace(run, name=group[0].name) for group in groups.values() for run in sorted(group, key=lambda run: run.seed)
    ]


def with_distinct_names(runs: Iterable[FinishedRun]) -> list[FinishedRun]:
    """Rename runs with the same name to 'NAME, seed S'."""
    runs = list(runs)
    shared = Counter(run.name for run in runs)
    return [replace(run, name=f"{run.name}, seed {run.seed}") if shared[run.name] > 1 else run for run in runs]


def differing_settings(settings: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return row -> settings by flag, from row -> settings, for the flags in which rows differ.

    Flags of the run folder and the seed are left out.
    """
    flags = {}
    for row, of_row in settings.items():
        flags[row] = effective_settings({group: v for group, v in of_row.items() if group not in ("inputs", "run")})
    first = next(iter(flags.values()))
    different = [
        flag
        for flag in dict.fromkeys(chain(*flags.values()))
        if any(of_row.get(flag) != first.get(flag) for of_row in flags.values())
    ]
    return {row: {flag: _to_cell(of_row.get(flag)) for flag in different} for row, of_row in flags.items()}


def _to_cell(value: Any) -> str | int | float | bool | None:
    """Convert a setting to a cell: a list becomes text, and a path its last part."""
    if isinstance(value, list):
        return ", ".join(str(_to_cell(item)) for item in value)
    if isinstance(value, str):
        return PurePath(value).name
    return value if isinstance(value, int | float | None) else json.dumps(value)
