"""Records of finished rows: find, read and write their files, and convert them for reports."""

from __future__ import annotations

import base64
import functools
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gprune.config import RunConfig, flat, migrated
from gprune.errors import UserError
from gprune.models.masks import Masks
from gprune.runs import schema
from gprune.runs.numbers import Record
from gprune.runs.results import FinishedRun
from gprune.storage.files import key_of, read_json, write_json
from gprune.studies.listing import LISTED_PRECISION, Row

WIDTH = 1000  # characters per line of a record
FORMAT = 4  # version in the names of records, independent of the version of caches
CONTROL = "control"  # stage in tables of rows that the list declares as controls


@functools.cache
def default_settings() -> dict[str, Any]:
    """Settings of a run without flags, with the default precision of rows."""
    return RunConfig(trainer={"precision": LISTED_PRECISION}).settings()


def finished_record(row: Row) -> dict[str, Any] | None:
    """Return the record of a row if it has the tasks and masks that the list asks for; otherwise None."""
    _, record = find_record(row)
    return record if record is not None and _is_complete(row, record) else None


def _is_complete(row: Row, record: dict[str, Any]) -> bool:
    """Return whether a record has the masks and the tasks of a row, including those of the dense model."""
    if row.masks and record["masks"] is None:
        return False
    asked = row.tasks
    return not asked or (asked == record.get("tasks") and any(r["stage"] == "dense" for r in of_tasks(row, record)))


def read_record(path: Path) -> dict[str, Any] | None:
    """Load a record. Return None if it is missing or, with a warning, if it is not a valid record.

    Settings of earlier versions are converted (`migrated`); new settings get their default value.
    """
    content = read_json(path, check=lambda content: schema.Study.problem(unfolded(content)))
    if content is None:
        return None
    settings, default = migrated(content["settings"]), default_settings()
    groups = {name: group | settings.get(name, {}) for name, group in default.items() if isinstance(group, dict)}
    return unfolded(content) | {"settings": default | settings | groups}


def write_record(path: Path, record: dict[str, Any]) -> None:
    """Write a record in compact form (`folded`)."""
    write_json(path, record | {"records": folded(record["records"])}, width=WIDTH)


def find_record(row: Row) -> tuple[Path, dict[str, Any] | None]:
    """Return the path of a row's record and the record; if there is none, the path for a new record and None.

    A name has the row's name, for readability, and a hash of all settings that differ from their defaults. So the name
    does not depend on how other lists call the row, and new settings do not change names of existing records. A record
    with other tasks is never overwritten.
    """
    default, settings = flat(default_settings()), row.config.settings()
    unusual = {name: value for name, value in flat(settings).items() if value != default.get(name)}
    key = key_of(format=FORMAT, settings=unusual)[:10]
    there = [(path, read_record(path)) for path in sorted((row.records / "runs").glob(f"*-{key}*.json"))]
    own = [(path, record) for path, record in there if record is not None and record["settings"] == settings]
    own = [(p, r) for p, r in own if row.tasks in ({}, r.get("tasks", row.tasks))]
    if own:  # several lists may have written records, with other tasks or without masks
        return min(own, key=lambda one: not _is_complete(row, one[1]))
    slug = "-".join("".join(c if c.isalnum() else " " for c in row.name.lower()).split())
    slug = slug.encode()[:150].decode(errors="ignore")  # a file name has at most 255 bytes
    numbers = itertools.chain([""], (f"-{n}" for n in itertools.count(1)))
    names = (row.records / "runs" / f"{slug}-seed{row.seed}-{key}{number}.json" for number in numbers)
    return next(path for path in names if not path.exists()), None


def dense_path(row: Row, model: str) -> Path:
    """Return the file with results of the row's tasks on its dense model, which all rows share."""
    key = key_of(format=FORMAT, model=[model, row.config.model.dtype], tasks=row.tasks)
    return row.records / "dense" / f"{key}.json"


def of_tasks(row: Row, record: dict[str, Any]) -> list[Record]:
    """Return the results of the row's tasks, with the dense model's first; empty if there are none."""
    if not (row.tasks and record.get("evaluation")):
        return []
    dense = read_json(dense_path(row, record["inputs"]["model"]), check=schema.Evaluation.problem) or {"records": []}
    return dense["records"] + record["evaluation"]


def run_of(path: Path, record: dict[str, Any]) -> FinishedRun:
    """Convert a record to a `FinishedRun` with the record's name."""
    return FinishedRun(
        path=path,
        name=record["name"],
        settings=record["settings"] | {"inputs": record["inputs"]},
        records=record["records"],
        summary=record["summary"],
        masks=None if record["masks"] is None else unpacked(record["masks"]),
        steps=record["steps"],
        environment=record.get("environment") or {},
    )


def as_run(row: Row, record: dict[str, Any], seen: Sequence[str] | None) -> FinishedRun:
    """Convert a row's record to a `FinishedRun` with the row's name, its tasks and, for a control, the stage `control`.

    Raises:
        UserError: if the run has seen a corpus that the list declares unseen.
    """
    own = {"stage": CONTROL} if row.control else {}
    records, evaluation = (
        [r | (own if r["stage"] == "gprune" else {}) for r in numbers]
        for numbers in (record["records"], of_tasks(row, record))
    )
    if seen is not None and (extra := sorted({r["corpus"] for r in records if r["seen"]} - set(seen))):
        raise UserError(
            f"Row '{row.name}': The key seen must include {extra[0]}, because the run used text of this corpus; got "
            f"{', '.join(seen)}."
        )
    evaluation = [r | {"run": row.name} for r in evaluation]
    return replace(run_of(find_record(row)[0], record), name=row.name, records=records, evaluation=evaluation)


def learned_tokens(steps: Mapping[str, Mapping[str, float]]) -> int:
    """Forward-backward tokens of training steps, without calibration (may be cached) and evaluation (controls)."""
    learning = (step for name, step in steps.items() if name not in ("calibrate", "evaluate"))
    return int(sum(step.get("forward_backward_tokens", 0) for step in learning))


def folded(records: Sequence[Record]) -> dict[str, Any]:
    """Factor out common entries: {"all": common entries, "stages": [{"all": ..., "each": [other entries]}, ...]}.

    A stage is a sequence of consecutive records with the same `stage` and `recovery`.
    """
    shared, rest = _split_common(records)
    stages = []
    for _, places in itertools.groupby(range(len(rest)), lambda i: (records[i]["stage"], records[i]["recovery"])):
        own, each = _split_common([rest[i] for i in places])
        stages.append({"all": own, "each": each})
    return {"all": shared, "stages": stages}


def unfolded(content: Any) -> Any:
    """Invert `folded`. Content that is not folded is returned unchanged."""
    try:
        shared, stages = content["records"]["all"], content["records"]["stages"]
        return content | {"records": [shared | stage["all"] | own for stage in stages for own in stage["each"]]}
    except (KeyError, TypeError):
        return content


def _split_common(records: Sequence[Record]) -> tuple[Record, list[Record]]:
    """Return the entries that are equal in all records, and the other entries of each record."""
    same = {k: v for k, v in records[0].items() if all(k in r and r[k] == v for r in records)} if records else {}
    return same, [{k: v for k, v in r.items() if k not in same} for r in records]


def packed(masks: Masks) -> dict[str, dict[str, Any]]:
    """Encode masks as base64 of their bits: 8 kB for 46,080 neurons."""
    parts = {}
    for kind, of_kind in vars(masks).items():
        bits = np.packbits(torch.cat(of_kind).numpy())
        parts[kind] = {"sizes": [len(m) for m in of_kind], "bits": base64.b64encode(bits).decode()}
    return parts


def unpacked(content: dict[str, dict[str, Any]]) -> Masks:
    """Invert `packed`."""
    parts = {}
    for kind, value in content.items():
        bits = np.frombuffer(base64.b64decode(value["bits"]), dtype=np.uint8)
        bits = np.unpackbits(bits, count=sum(value["sizes"])).astype(bool)
        parts[kind] = list(torch.from_numpy(bits).split(value["sizes"]))
    return Masks(**parts)
