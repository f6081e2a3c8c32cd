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

from gprune.config import applied
from gprune.report.table import Table
from gprune.runs.results import FinishedRun, read_run
from gprune.storage.reading import expanded

HASH = re.compile(r"-[0-9a-f]{8}$")  # end of names made by `RunConfig.run_name`


def read_runs(paths: Sequence[Path | str | FinishedRun]) -> list[FinishedRun]:
    """Read finished runs, without duplicates, and give them distinct names.

    A run is named after its folder. If two folders have the same name, all names are paths relative to the common
    parent. Runs that are already read, such as records, keep their names and follow after the folders.
    """
    read = {(run.path.resolve(), run.name): run for run in paths if isinstance(run, FinishedRun)}
    paths = [path for path in paths if not isinstance(path, FinishedRun)]
    if not paths:
        return list(read.values())
    folders = {expanded(path).resolve(): path for path in paths}
    names = [folder.name for folder in folders]
    if len(set(names)) < len(names):
        top = os.path.commonpath([folder.parent for folder in folders])
        names = [os.path.relpath(folder, top) for folder in folders]
    found = [replace(read_run(path), name=name) for path, name in zip(folders.values(), names, strict=True)]
    return [*found, *read.values()]


def as_small(run: FinishedRun, other: FinishedRun) -> bool:
    """Return whether two pruned models have the same number of parameters, within 1 % of the dense model's."""
    one, two = run.summary, other.summary
    return abs(one["parameters_after"] - two["parameters_after"]) <= 0.01 * one["parameters_before"]


def with_distinct_names(runs: Iterable[FinishedRun]) -> list[FinishedRun]:
    """Rename runs with the same name to 'NAME, seed S'."""
    runs = list(runs)
    shared = Counter(run.name for run in runs)
    return [replace(run, name=f"{run.name}, seed {run.seed}") if shared[run.name] > 1 else run for run in runs]


def named_by_difference(runs: Sequence[FinishedRun]) -> list[FinishedRun]:
    """Rename runs with default names, which end in a hash, by the settings in which they differ.

    A new name has as few settings as distinguish all runs except for seeds: `importance flap, target 0.3`. Names chosen
    by the user are kept.
    """
    settings = {run.all_but_seed: flags(run) for run in runs}
    words = dict.fromkeys(settings, "")
    for flag, short in _short(dict.fromkeys(chain(*settings.values()))).items():
        finer = {
            key: ", ".join(filter(None, (words[key], f"{short} {in_words(own.get(flag))}")))
            for key, own in settings.items()
        }
        if len(set(finer.values())) > len(set(words.values())):
            words = finer
    names = [words[run.all_but_seed] or HASH.sub("", run.name) if HASH.search(run.name) else run.name for run in runs]
    if len(runs) == 1 or len({(name, run.seed) for name, run in zip(names, runs, strict=True)}) < len(runs):
        return list(runs)
    return [replace(run, name=name) for name, run in zip(names, runs, strict=True)]


def _short(names: Iterable[str]) -> dict[str, str]:
    """Return flag -> short name: its last part, or the whole flag if the last part is not unique."""
    names = list(names)
    ends = Counter(name.rpartition(".")[2] for name in names)
    return {name: end if ends[end := name.rpartition(".")[2]] == 1 else name for name in names}


@dataclass(frozen=True)
class SeedGroup:
    """Runs that differ only in the seed; often a single run."""

    runs: list[FinishedRun]

    @property
    def name(self) -> str:
        """Name of the run or, for several, of the first run, with the number of seeds."""
        name, seeds = self.runs[0].name, len(self.runs)
        return name if seeds == 1 else f"{name} ({seeds} seeds)"


def groups(runs: Sequence[FinishedRun]) -> list[SeedGroup]:
    """SeedGroup runs that differ only in the seed, in the given order. Two runs with the same seed are in two groups.

    A corpus that one run of a group has seen counts as seen in all of them, so that means over seeds are over the same
    corpora.
    """
    by_settings: dict[tuple[str, int], list[FinishedRun]] = defaultdict(list)
    times: Counter[tuple[str, int]] = Counter()
    for run in runs:
        settings = run.all_but_seed
        times[settings, run.seed] += 1
        by_settings[settings, times[settings, run.seed]].append(run)
    groups = []
    for members in by_settings.values():
        members.sort(key=lambda run: run.seed)  # sums do not depend on the order of runs
        seen = {r["corpus"] for run in members for r in run.records if r["seen"]}
        of_all = ([r | {"seen": r["corpus"] in seen} for r in run.records] for run in members)
        groups.append(SeedGroup([replace(run, records=of) for run, of in zip(members, of_all, strict=True)]))
    return groups


def flags(run: FinishedRun) -> dict[str, Any]:
    """Settings of a run by flag, except those of the run folder and the seed."""
    return applied({group: values for group, values in run.settings.items() if group not in ("inputs", "run")})


def settings_table(groups: Sequence[SeedGroup]) -> Table:
    """Table with a row per flag in which groups differ, and a column per group."""
    settings = [flags(group.runs[0]) | {"run.seed": [run.seed for run in group.runs]} for group in groups]
    different = [
        name for name in dict.fromkeys(chain(*settings)) if any(s.get(name) != settings[0].get(name) for s in settings)
    ]
    rows = [[name, *(in_words(s.get(name)) for s in settings)] for name in different]
    return Table("settings", "Settings that differ", ["flag", *(group.name for group in groups)], rows)


def in_words(value: Any) -> str:
    """Format a setting like a flag; a path is shortened to its last part."""
    if isinstance(value, list):
        return ", ".join(map(in_words, value))
    return PurePath(value).name if isinstance(value, str) else json.dumps(value)
