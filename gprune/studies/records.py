"""Records of rows that have run: where they lie, which row each one is of, and what reports read of them."""

from __future__ import annotations

import base64
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gprune.config import RunConfig, flat
from gprune.errors import UserError
from gprune.models.masks import Masks
from gprune.runs import schema
from gprune.runs.results import FinishedRun, Record, with_defaults
from gprune.storage.files import key_of, read_json, write_json
from gprune.studies.listing import Row

WIDTH = 1000  # characters of a line
FORMAT = 4  # of the names of records, which stay when the format of caches changes
CONTROL = "control"  # what tables call the result of a row that the list names as a control

# Defaults that have changed since the first record: names of records go on telling settings apart from these.
FORMER_DEFAULTS = {"recovery": "none", "sparsity.epochs": 2, "sparsity.centred": False}


def plain(value: Any) -> Any:
    """As JSON gives it back."""
    return json.loads(json.dumps(value))


def found(row: Row) -> dict[str, Any] | None:
    """The record of an earlier run with the row's settings, with the tasks and the masks that the list asks for."""
    kept = read(path_of(row))
    return kept if is_of(row, kept) and _serves(row, kept) else None


def _serves(row: Row, kept: dict[str, Any]) -> bool:
    """Whether a record of the row's settings has the tasks, the dense model's too, and the masks that are asked for."""
    tasks = row.wanted_tasks in ({}, kept.get("tasks"))
    tasks = tasks and (not row.wanted_tasks or any(r["stage"] == "dense" for r in of_tasks(row, kept)))
    return tasks and not (row.masks and kept["masks"] is None)


def read(path: Path) -> dict[str, Any] | None:
    """A record as `write` was given it; None, with one warning unless it is missing, for what is none."""
    kept = read_json(path, check=lambda content: schema.study(unfolded(content)))
    return None if kept is None else unfolded(kept)


def write(path: Path, kept: dict[str, Any]) -> None:
    """Write a record, with what is the same in all of its numbers, or in all of a stage, once."""
    write_json(path, kept | {"records": folded(kept["records"])}, width=WIDTH)


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


def unfolded(kept: Any) -> Any:
    """A record whose numbers are records again; whatever is no folded record as it is."""
    match kept:
        case {"records": {"all": dict(shared), "stages": list(stages)}}:
            pass
        case _:
            return kept
    try:
        return kept | {"records": [shared | stage["all"] | own for stage in stages for own in stage["each"]]}
    except (KeyError, TypeError):
        return kept


def _shared(records: Sequence[Record]) -> tuple[Record, list[Record]]:
    """What is the same in all, and what is left of each."""
    same = {k: v for k, v in records[0].items() if all(k in r and r[k] == v for r in records)} if records else {}
    return same, [{k: v for k, v in r.items() if k not in same} for r in records]


def path_of(row: Row) -> Path:
    """Where a row's record is, under whatever name another list gave the row; or where it will be.

    Named for people, and told apart by the settings that are not the defaults, so that a setting that is new today, at
    its default, leaves yesterday's records what they were. A record with other tasks is never written over.
    """
    default, settings = (flat(plain(cfg.settings())) for cfg in (RunConfig(), row.config))
    usual = default | FORMER_DEFAULTS
    unusual = {name: value for name, value in settings.items() if value != usual.get(name)}
    key = key_of(format=FORMAT, settings=unusual)[:10]
    there = [(path, read(path)) for path in sorted((row.records / "runs").glob(f"*-{key}*.json"))]
    own = [(p, k) for p, k in there if is_of(row, k) and row.wanted_tasks in ({}, k.get("tasks", row.wanted_tasks))]
    if own:  # several: of lists with other tasks, of which one may have masks and another none
        return min(own, key=lambda one: not _serves(row, one[1]))[0]
    slug = "-".join("".join(c if c.isalnum() else " " for c in row.name.lower()).split())
    slug = slug.encode()[:150].decode(errors="ignore")  # the name of a file has 255 bytes at most
    # A record under this key may be of other settings, those of a default that has changed since: it stays.
    numbers = itertools.chain([""], (f"-{n}" for n in itertools.count(1)))
    names = (row.records / "runs" / f"{slug}-seed{row.seed}-{key}{number}.json" for number in numbers)
    return next(path for path in names if not path.exists())


def dense_path(records: Path, model: str, dtype: str, tasks: dict[str, Any]) -> Path:
    """Where the tasks of a dense model, by its fingerprint, are kept for all rows."""
    return records / "dense" / f"{key_of(format=FORMAT, model=[model, dtype], tasks=tasks)}.json"


def of_tasks(row: Row, kept: dict[str, Any]) -> list[Record]:
    """What the row's tasks gave, the dense model first: from the file for all rows, or from records of before it."""
    own = kept.get("evaluation", []) if row.wanted_tasks else []
    if not own or own[0]["stage"] == "dense":
        return own
    path = dense_path(row.records, kept["inputs"]["model"], row.config.model.dtype, row.wanted_tasks)
    return (read_json(path, check=schema.evaluation) or {"records": []})["records"] + own


def is_of(row: Row, kept: dict[str, Any] | None) -> bool:
    """Whether a record has the row's settings, as they would be given today."""
    if kept is None:
        return False
    then = with_defaults(kept["settings"], plain(RunConfig().settings()))
    return flat(then) == flat(plain(row.config.settings()))


def packed(masks: Masks) -> dict[str, dict[str, Any]]:
    """Keep masks as base64 of their bits: 8 kB for 46,080 neurons."""
    return {
        kind: {
            "sizes": [len(m) for m in masks_of_kind],
            "bits": base64.b64encode(np.packbits(torch.cat(masks_of_kind).numpy())).decode(),
        }
        for kind, masks_of_kind in (("ffn", masks.ffn), ("attention", masks.attention))
    }


def unpacked(kept: dict[str, dict[str, Any]]) -> Masks:
    """What `packed` was given."""
    parts = {}
    for kind, value in kept.items():
        if len(base64.b64decode(value["bits"])) != -(-sum(value["sizes"]) // 8):
            raise UserError(
                f"A record's masks: expected {sum(value['sizes'])} bits for {kind}, got others; run it again."
            )
        bits = np.unpackbits(np.frombuffer(base64.b64decode(value["bits"]), dtype=np.uint8), count=sum(value["sizes"]))
        parts[kind] = list(torch.from_numpy(bits.astype(bool)).split(value["sizes"]))
    return Masks(**parts)


def as_run(row: Row, kept: dict[str, Any], seen: Sequence[str] | None) -> FinishedRun:
    """A record as reports read runs.

    Raises:
        UserError: for a record that has seen what the list calls unseen.
    """
    records, evaluation = (_named(row, numbers) for numbers in (kept["records"], of_tasks(row, kept)))
    if seen is not None and (extra := sorted({r["corpus"] for r in records if r["seen"]} - set(seen))):
        raise UserError(
            f"Row '{row.name}': expected text that the list calls unseen, got {extra[0]}, which the run used, or "
            f"which shares text with what it used; add it to `seen` ({', '.join(seen)})."
        )
    return FinishedRun(
        path=path_of(row),
        name=row.name,
        settings=with_defaults(kept["settings"], plain(RunConfig().settings())) | {"inputs": kept["inputs"]},
        records=records,
        summary=kept["summary"] | {"learned_tokens": learned_tokens(kept)},
        masks=None if kept["masks"] is None else unpacked(kept["masks"]),
        modules=None,
        evaluation=[r | {"run": row.name} for r in evaluation],
    )


def learned_tokens(kept: dict[str, Any]) -> int:
    """Forward and backward, of what a row has learned; not of scores, which the cache may have had, nor of controls."""
    if not kept["steps"]:  # the oldest
        return kept["summary"]["forward_backward_tokens"]
    steps = ((name.rpartition("/")[2], step) for name, step in kept["steps"].items())
    return int(sum(s.get("forward_backward_tokens", 0) for name, s in steps if name not in ("calibrate", "evaluate")))


def _named(row: Row, records: Sequence[Record]) -> list[Record]:
    """The records, with the result of a control called what it is."""
    return [r | {"stage": CONTROL} if row.control and r["stage"] == "gprune" else r for r in records]
