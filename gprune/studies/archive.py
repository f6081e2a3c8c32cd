"""Records of rows that have run: where and how they lie, which row each one is of, and what reports read of them."""

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

WIDTH = 1000  # characters of a line
FORMAT = 4  # of the names of records, which stay when the format of caches changes
CONTROL = "control"  # what tables call the result of a row that the list names as a control


@functools.cache
def default_settings() -> dict[str, Any]:
    """The settings of a run without flags, in the precision of rows that name none."""
    return RunConfig(trainer={"precision": LISTED_PRECISION}).settings()


def record_of(row: Row) -> dict[str, Any] | None:
    """The record of the row's settings, if it has the tasks and the masks that the list asks for."""
    _, record = stored(row)
    return record if record is not None and _serves(row, record) else None


def _serves(row: Row, record: dict[str, Any]) -> bool:
    """Whether a record of the row's settings has the tasks, the dense model's too, and the masks that are asked for."""
    if row.masks and record["masks"] is None:
        return False
    asked = row.tasks
    return not asked or (asked == record.get("tasks") and any(r["stage"] == "dense" for r in of_tasks(row, record)))


def read(path: Path) -> dict[str, Any] | None:
    """A record as `write` was given it; None, with one warning unless it is missing, for what is none.

    Its settings are `migrated`; one that did not exist yet has its default's value.
    """
    content = read_json(path, check=lambda content: schema.Study.problem(unfolded(content)))
    if content is None:
        return None
    settings, default = migrated(content["settings"]), default_settings()
    groups = {name: group | settings.get(name, {}) for name, group in default.items() if isinstance(group, dict)}
    return unfolded(content) | {"settings": default | settings | groups}


def write(path: Path, record: dict[str, Any]) -> None:
    """Write a record, with what is the same in all of its numbers, or in all of a stage, once."""
    write_json(path, record | {"records": folded(record["records"])}, width=WIDTH)


def stored(row: Row) -> tuple[Path, dict[str, Any] | None]:
    """Where a row's record is, under whatever name another list gave the row, or where it will be; and the record.

    Named for people, and told apart by a hash of the settings that are not the defaults, so that a new setting, at its
    default, leaves the names of records what they were. A record with other tasks is never written over.
    """
    default, settings = flat(default_settings()), row.config.settings()
    unusual = {name: value for name, value in flat(settings).items() if value != default.get(name)}
    key = key_of(format=FORMAT, settings=unusual)[:10]
    there = [(path, read(path)) for path in sorted((row.records / "runs").glob(f"*-{key}*.json"))]
    own = [(path, record) for path, record in there if record is not None and record["settings"] == settings]
    own = [(p, r) for p, r in own if row.tasks in ({}, r.get("tasks", row.tasks))]
    if own:  # several: of lists with other tasks, of which one may have masks and another none
        return min(own, key=lambda one: not _serves(row, one[1]))
    slug = "-".join("".join(c if c.isalnum() else " " for c in row.name.lower()).split())
    slug = slug.encode()[:150].decode(errors="ignore")  # the name of a file has 255 bytes at most
    numbers = itertools.chain([""], (f"-{n}" for n in itertools.count(1)))
    names = (row.records / "runs" / f"{slug}-seed{row.seed}-{key}{number}.json" for number in numbers)
    return next(path for path in names if not path.exists()), None


def dense_path(row: Row, model: str) -> Path:
    """Where the row's tasks, measured on its dense model of this fingerprint, are kept for all rows."""
    key = key_of(format=FORMAT, model=[model, row.config.model.dtype], tasks=row.tasks)
    return row.records / "dense" / f"{key}.json"


def of_tasks(row: Row, record: dict[str, Any]) -> list[Record]:
    """Results of the row's tasks, the dense model's first; empty where the list asks for none, or nobody ran them."""
    if not (row.tasks and record.get("evaluation")):
        return []
    dense = read_json(dense_path(row, record["inputs"]["model"]), check=schema.Evaluation.problem) or {"records": []}
    return dense["records"] + record["evaluation"]


def run_of(path: Path, record: dict[str, Any]) -> FinishedRun:
    """A record as reports read runs, under its own name."""
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
    """`run_of` a row's record, with the row's name, its tasks and, for a control, the stage `control`.

    Raises:
        UserError: for a record that has seen what the list calls unseen.
    """
    own = {"stage": CONTROL} if row.control else {}
    records, evaluation = (
        [r | (own if r["stage"] == "gprune" else {}) for r in numbers]
        for numbers in (record["records"], of_tasks(row, record))
    )
    if seen is not None and (extra := sorted({r["corpus"] for r in records if r["seen"]} - set(seen))):
        raise UserError(
            f"Row '{row.name}': expected text that the list calls unseen, got {extra[0]}, which the run used, or "
            f"which shares text with what it used; add it to `seen` ({', '.join(seen)})."
        )
    evaluation = [r | {"run": row.name} for r in evaluation]
    return replace(run_of(stored(row)[0], record), name=row.name, records=records, evaluation=evaluation)


def learned_tokens(steps: Mapping[str, Mapping[str, float]]) -> int:
    """Tokens forward and backward of steps that learn: not of scores, which the cache may have had, nor of controls."""
    learning = (step for name, step in steps.items() if name not in ("calibrate", "evaluate"))
    return int(sum(step.get("forward_backward_tokens", 0) for step in learning))


def folded(records: Sequence[Record]) -> dict[str, Any]:
    """Records as {"all": what is the same in all, "stages": [{"all": ..., "each": [what is left], ...}, ...]}.

    A stage is what follows each other with one `stage` and `recovery`.
    """
    shared, rest = _shared(records)
    stages = []
    for _, places in itertools.groupby(range(len(rest)), lambda i: (records[i]["stage"], records[i]["recovery"])):
        own, each = _shared([rest[i] for i in places])
        stages.append({"all": own, "each": each})
    return {"all": shared, "stages": stages}


def unfolded(content: Any) -> Any:
    """A record of a row whose numbers are records again; whatever is not folded as it is."""
    try:
        shared, stages = content["records"]["all"], content["records"]["stages"]
        return content | {"records": [shared | stage["all"] | own for stage in stages for own in stage["each"]]}
    except (KeyError, TypeError):
        return content


def _shared(records: Sequence[Record]) -> tuple[Record, list[Record]]:
    """What is the same in all, and what is left of each."""
    same = {k: v for k, v in records[0].items() if all(k in r and r[k] == v for r in records)} if records else {}
    return same, [{k: v for k, v in r.items() if k not in same} for r in records]


def packed(masks: Masks) -> dict[str, dict[str, Any]]:
    """Masks as base64 of their bits: 8 kB for 46,080 neurons."""
    parts = {}
    for kind, of_kind in vars(masks).items():
        bits = np.packbits(torch.cat(of_kind).numpy())
        parts[kind] = {"sizes": [len(m) for m in of_kind], "bits": base64.b64encode(bits).decode()}
    return parts


def unpacked(content: dict[str, dict[str, Any]]) -> Masks:
    """What `packed` was given."""
    parts = {}
    for kind, value in content.items():
        bits = np.frombuffer(base64.b64decode(value["bits"]), dtype=np.uint8)
        bits = np.unpackbits(bits, count=sum(value["sizes"])).astype(bool)
        parts[kind] = list(torch.from_numpy(bits).split(value["sizes"]))
    return Masks(**parts)
