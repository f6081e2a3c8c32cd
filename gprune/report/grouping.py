"""Runs under names that tell them apart, and in groups that differ in seed alone."""

from __future__ import annotations

import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from gprune.config import flat
from gprune.runs.results import FinishedRun, read_run
from gprune.storage.reading import expanded


def read_runs(paths: Sequence[Path | str]) -> list[FinishedRun]:
    """Several finished runs, each once, under names that tell them apart.

    A name is the folder's own; where two folders share theirs, all are named from the folder they have in common.
    """
    folders = {expanded(path).resolve(): path for path in paths}
    names = [folder.name for folder in folders]
    if len(set(names)) < len(names):
        top = os.path.commonpath([folder.parent for folder in folders])
        names = [os.path.relpath(folder, top) for folder in folders]
    return [replace(read_run(path), name=name) for path, name in zip(folders.values(), names, strict=True)]


def as_small(run: FinishedRun, other: FinishedRun) -> bool:
    """Whether two pruned models have as many parameters, within one percent of the dense model's."""
    one, two = run.summary, other.summary
    return abs(one["parameters_after"] - two["parameters_after"]) <= 0.01 * one["parameters_before"]


def told_apart(runs: Iterable[FinishedRun]) -> list[FinishedRun]:
    """The runs under names of their own: 'NAME, seed S' where several share one, and numbered where that is shared."""
    runs = list(runs)
    shared = Counter(run.name for run in runs)
    times: Counter[str] = Counter()
    found = []
    for run in runs:
        name = f"{run.name}, seed {run.seed}" if shared[run.name] > 1 else run.name
        times[name] += 1
        found.append(replace(run, name=name if times[name] == 1 else f"{name} ({times[name]})"))
    return found


def short_names(names: Sequence[str]) -> dict[str, str]:
    """Names for figures: without the model that all begin with and the hash at the end, where they stay different."""
    heads = {name.split("-gprune-")[0].split("-base-")[0] for name in names}
    cut = len(next(iter(heads))) + 1 if len(heads) == 1 and not heads & set(names) else 0
    short = {name: re.sub(r"-[0-9a-f]{8}(?= \(|, seed |$)", "", name[cut:]) for name in names}
    return short if len(set(short.values())) == len(short) else {name: name for name in names}


@dataclass(frozen=True)
class Group:
    """Runs that differ in seed alone; most often one."""

    runs: list[FinishedRun]
    own: str = ""  # what tells it from groups whose names begin alike

    @property
    def name(self) -> str:
        """The run's name, or what the names of several begin with, and what tells them from others that begin so."""
        return self.runs[0].name if len(self.runs) == 1 else f"{self.stem}{self.own} ({len(self.runs)} seeds)"

    @property
    def stem(self) -> str:
        """What the names of its runs begin with, up to the hash at the end of a default one."""
        names = [re.sub(r"-[0-9a-f]{8}$", "", run.name) for run in self.runs]
        common = os.path.commonprefix(names).rstrip("-_. ")  # noqa: RUF071 (names, not paths)
        return common.removesuffix("seed").rstrip("-_. ") or names[0]


def groups(runs: Sequence[FinishedRun]) -> list[Group]:
    """Runs that differ in seed alone together, in the order given; the same seed twice is two groups.

    A corpus that one of a group has seen, by what its own sample shares with it, counts as seen in all of it: a mean
    over seeds is of one set of corpora.
    """
    found: dict[tuple[str, int], list[FinishedRun]] = defaultdict(list)
    times: dict[tuple[str, int], int] = defaultdict(int)
    for run in runs:
        key = run.all_but_seed
        times[key, run.seed] += 1
        found[key, times[key, run.seed]].append(run)
    alike = [Group(_seen_together(members)) for members in found.values()]
    several = [group for group in alike if len(group.runs) > 1]
    stems = Counter(group.stem for group in several)
    return [
        replace(group, own=_apart(group, [other for other in several if other.stem == group.stem]))
        if len(group.runs) > 1 and stems[group.stem] > 1
        else group
        for group in alike
    ]


def _seen_together(runs: list[FinishedRun]) -> list[FinishedRun]:
    """The runs, where a corpus that one of them has seen is seen in all."""
    sets = [{r["corpus"] for r in run.records if r["seen"]} for run in runs]
    if all(one == sets[0] for one in sets):
        return runs
    seen = set().union(*sets)
    return [replace(run, records=[r | {"seen": r["corpus"] in seen} for r in run.records]) for run in runs]


def _apart(group: Group, same: Sequence[Group]) -> str:
    """The settings in which groups differ, with this one's values; or its first run's name, where they are many."""
    own, *others = (
        flat({kind: value for kind, value in g.runs[0].settings.items() if kind not in ("inputs", "run")})
        for g in (group, *same)
    )
    names = [name for name in own if any(other.get(name) != own[name] for other in others)]
    if not 1 <= len(names) <= 3:
        return f", {group.runs[0].name} and others"
    return "".join(f", {name}={own[name]}" for name in names)
