"""Distinct names of runs, and groups of runs that differ only in the seed."""

from __future__ import annotations

import json
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path, PurePath
from typing import Any

from gprune.config import effective_settings
from gprune.runs.results import FinishedRun, read_run
from gprune.storage.paths import expanded

DEFAULT_NAME = re.compile(r".+-(base|gprune)-.+-.+-[0-9a-f]{8}")  # made by `RunConfig.run_name`
HASH = re.compile(r"-[0-9a-f]{8}$")


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


def with_distinct_names(runs: Iterable[FinishedRun]) -> list[FinishedRun]:
    """Rename runs with the same name to 'NAME, seed S'."""
    runs = list(runs)
    shared = Counter(run.name for run in runs)
    return [replace(run, name=f"{run.name}, seed {run.seed}") if shared[run.name] > 1 else run for run in runs]


def named_by_difference(runs: Sequence[FinishedRun]) -> list[FinishedRun]:
    """Rename runs with default names, which end in a hash, by the settings in which they differ.

    Rows of a list, whose path is a record, keep their names.

    A new name lists settings, such as `importance flap, target 0.3`. A setting is added only if it distinguishes more
    runs; seeds are ignored. Runs that differ only in the seed lose their hash. Names chosen by the user are kept. All
    names are kept if there is a single run, or if the new names of two runs with the same seed would be equal.
    """
    if len(runs) == 1:
        return list(runs)
    settings = {run.all_but_seed: run_flags(run) for run in runs}
    descriptions = dict.fromkeys(settings, "")
    for flag, short_name in _short_names(dict.fromkeys(chain(*settings.values()))).items():
        longer = {}
        for key, flags in settings.items():
            parts = (descriptions[key], f"{short_name} {format_setting(flags.get(flag))}")
            longer[key] = ", ".join(filter(None, parts))
        if len(set(longer.values())) > len(set(descriptions.values())):
            descriptions = longer
    names = []
    for run in runs:
        has_default_name = not run.path.is_file() and DEFAULT_NAME.fullmatch(run.name) is not None
        default = descriptions[run.all_but_seed] or HASH.sub("", run.name)
        names.append(default if has_default_name else run.name)
    if len({(name, run.seed) for name, run in zip(names, runs, strict=True)}) < len(runs):
        return list(runs)
    return [replace(run, name=name) for name, run in zip(names, runs, strict=True)]


def _short_names(flags: Iterable[str]) -> dict[str, str]:
    """Return flag -> its last part, or the whole flag if several flags have the same last part."""
    last_parts = {flag: flag.rpartition(".")[2] for flag in flags}
    counts = Counter(last_parts.values())
    return {flag: last_part if counts[last_part] == 1 else flag for flag, last_part in last_parts.items()}


@dataclass(frozen=True)
class SeedGroup:
    """Runs that differ only in the seed; often a single run."""

    runs: list[FinishedRun]

    @property
    def name(self) -> str:
        """Name of the run or, for several, of the first run, with the number of seeds."""
        name, seeds = self.runs[0].name, len(self.runs)
        return name if seeds == 1 else f"{name} ({seeds} seeds)"


def group_by_seed(runs: Sequence[FinishedRun]) -> list[SeedGroup]:
    """Group runs that differ only in the seed, in the given order. Two runs with the same seed are in two groups.

    A corpus that one run of a group has seen counts as seen in all of them, so that means over seeds are over the same
    corpora.
    """
    # The second part of the key counts runs with the same settings and seed.
    members_by_key: dict[tuple[str, int], list[FinishedRun]] = defaultdict(list)
    repeats: Counter[tuple[str, int]] = Counter()
    for run in runs:
        settings = run.all_but_seed
        repeats[settings, run.seed] += 1
        members_by_key[settings, repeats[settings, run.seed]].append(run)
    groups = []
    for members in members_by_key.values():
        members.sort(key=lambda run: run.seed)  # sums do not depend on the order of runs
        seen = {r["corpus"] for run in members for r in run.records if r["seen"]}
        marked = []
        for run in members:
            records = [r | {"seen": r["corpus"] in seen} for r in run.records]
            marked.append(replace(run, records=records))
        groups.append(SeedGroup(marked))
    return groups


def run_flags(run: FinishedRun) -> dict[str, Any]:
    """Return the settings of a run by flag, except those of the run folder and the seed."""
    settings = {group: values for group, values in run.settings.items() if group not in ("inputs", "run")}
    return effective_settings(settings)


def format_setting(value: Any) -> str:
    """Format a setting like a flag; a path is shortened to its last part."""
    if isinstance(value, list):
        return ", ".join(map(format_setting, value))
    return PurePath(value).name if isinstance(value, str) else json.dumps(value)
