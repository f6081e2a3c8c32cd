"""Run folders as a report reads them: settings, numbers and masks, without the model and without its corpora."""

from __future__ import annotations

import json
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gprune.errors import UserError
from gprune.models.masks import Masks
from gprune.partition.record import Modules
from gprune.report.tables import Record
from gprune.storage.files import read_json, read_tensors


@dataclass(frozen=True)
class FinishedRun:
    """What a run folder says about a run."""

    path: Path
    name: str  # of the folder; longer where two folders have the same one
    settings: dict[str, Any]
    records: list[Record]
    summary: dict[str, Any]
    masks: Masks  # of the final stage
    modules: Modules | None
    evaluation: list[Record]  # of `python -m gprune.evaluation`; empty where nobody ran it

    @property
    def seed(self) -> int:
        return self.settings["run"]["seed"]

    @property
    def final(self) -> str:
        """The stage the run was about."""
        return "gprune" if self.settings["gprune"] else "base"

    @property
    def model(self) -> str:
        """Fingerprint of the dense model."""
        return self.settings["inputs"]["model"]

    @property
    def but_for_seed(self) -> str:
        """Equal for runs that differ in seed alone: settings, dense model and the text they are evaluated on."""
        plain = json.loads(json.dumps(self.settings))
        plain["run"].pop("seed")
        plain["inputs"].pop("text", None)  # the sample of calibration text goes with the seed
        text = sorted({(r["corpus"], r["content_hash"]) for r in self.records})
        return json.dumps([plain, text], sort_keys=True)


def read_run(path: Path | str) -> FinishedRun:
    """A finished run, from its folder.

    Raises:
        UserError: for a folder that is no run of gprune's, one that is not finished, or a file that is not whole.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise UserError(f"Report: expected a run folder, but there is no folder '{path}'.")
    manifest, metrics = (read_json(folder / f"{name}.json") for name in ("manifest", "metrics"))
    settings = manifest.get("settings") if isinstance(manifest, dict) else None
    if not isinstance(settings, dict) or "inputs" not in settings:
        raise UserError(
            f"Report: '{path}' is no run of gprune's (manifest.json with settings); expected e.g. runs/NAME."
        )
    if not isinstance(metrics, dict) or "summary" not in metrics:
        raise UserError(f"Report: the run '{path}' is not finished; run the same command again, then report.")
    final = "gprune" if settings["gprune"] else "base"
    masks = read_tensors(folder / "masks" / f"{final}.safetensors")
    modules = read_tensors(folder / "modules.safetensors") if settings["gprune"] else None
    if masks is None or (settings["gprune"] and modules is None):
        raise UserError(f"Report: masks or modules of '{path}' are missing or not whole; run the same command again.")
    return FinishedRun(
        path=folder,
        name=folder.resolve().name,
        settings=settings,
        records=metrics["records"],
        summary=metrics["summary"],
        masks=Masks.from_tensors(masks),
        modules=None if modules is None else Modules.from_tensors(modules),
        evaluation=read_evaluation(folder / "evaluation.json"),
    )


def read_evaluation(path: Path) -> list[dict[str, Any]]:
    """Records of `python -m gprune.evaluation`, none where there is no file.

    Raises:
        UserError: for a file that holds something else.
    """
    found = read_json(path)
    if found is None and not path.exists():
        return []
    records = found.get("records") if isinstance(found, dict) else None
    if not isinstance(records, list) or not all(
        isinstance(r, dict) and {"kind", "stage", "task"} <= r.keys() for r in records
    ):
        raise UserError(
            f"'{path}' holds no records of python -m gprune.evaluation; move it away, or name another file."
        )
    return records


def read_runs(paths: Sequence[Path | str]) -> list[FinishedRun]:
    """Several finished runs, each once, under names that tell them apart."""
    return [replace(read_run(path), name=name) for name, path in run_names(paths).items()]


def run_names(paths: Sequence[Path | str]) -> dict[str, Path | str]:
    """The names that `read_runs` gives to folders, each once; nothing is read.

    A name is the folder's own; where two folders share theirs, all are named from the folder they have in common.
    """
    folders = {Path(path).expanduser().resolve(): path for path in paths}
    names = [folder.name for folder in folders]
    if len(set(names)) < len(names):
        top = os.path.commonpath([folder.parent for folder in folders])
        names = [os.path.relpath(folder, top) for folder in folders]
    return dict(zip(names, folders.values(), strict=True))


def told_apart(runs: Iterable[FinishedRun]) -> list[FinishedRun]:
    """The runs under names of their own: 'NAME, seed S' where several share one, and numbered where that is shared."""
    runs = list(runs)
    shared = Counter(run.name for run in runs)
    named = [f"{run.name}, seed {run.seed}" if shared[run.name] > 1 else run.name for run in runs]
    times: Counter[str] = Counter()
    found = []
    for run, name in zip(runs, named, strict=True):
        times[name] += 1
        found.append(replace(run, name=name if times[name] == 1 else f"{name} ({times[name]})"))
    return found


def divided(runs: Iterable[FinishedRun], seen: Sequence[str] | None) -> list[FinishedRun]:
    """The runs with `seen` as the corpora that count as seen in all of them; None: each run's own."""
    if seen is None:
        return list(runs)
    return [replace(run, records=[r | {"seen": r["corpus"] in seen} for r in run.records]) for run in runs]


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

    @property
    def name(self) -> str:
        """The run's name, or what the names of several begin with."""
        names = [run.name for run in self.runs]
        if len(names) == 1:
            return names[0]
        common = os.path.commonprefix(names).rstrip("-_. ")  # noqa: RUF071 (names, not paths)
        common = common.removesuffix("seed").rstrip("-_. ") or names[0]
        return f"{common} ({len(names)} seeds)"


def groups(runs: Sequence[FinishedRun]) -> list[Group]:
    """Runs that differ in seed alone together, in the order given; the same seed twice is two groups."""
    found: dict[tuple[str, int], list[FinishedRun]] = defaultdict(list)
    times: dict[tuple[str, int], int] = defaultdict(int)
    for run in runs:
        key = run.but_for_seed
        times[key, run.seed] += 1
        found[key, times[key, run.seed]].append(run)
    return [Group(members) for members in found.values()]
