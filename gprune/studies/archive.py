"""Records of finished rows: one JSON file for each row and seed, in the folder of its list."""

from __future__ import annotations

import base64
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gprune.config import RunConfig, config_from_mapping, effective_settings
from gprune.errors import UserError
from gprune.models.masks import Masks
from gprune.runs.folder import differing_values
from gprune.runs.numbers import Record
from gprune.runs.results import FinishedRun
from gprune.storage.files import key_of, read_json, write_json
from gprune.studies.listing import LISTED_PRECISION, Row
from gprune.user_code import changed_code, compare_code

LINE_WIDTH = 4000  # characters per line of a record


@dataclass(frozen=True)
class Found:
    """A row with its record, if there is one that the row can use."""

    row: Row
    record: dict[str, Any] | None = None
    problem: str = ""  # why the file of the row is not used
    is_checked: bool = True  # whether the record was made by the code of the row for certain

    @cached_property
    def finished(self) -> dict[str, Any] | None:
        """The record if it has the masks that the list asks for, and its tasks are measured; otherwise None."""
        row, record = self.row, self.record
        if record is None or self.problem or (row.masks and record["masks"] is None):
            return None
        return None if row.tasks and not task_results(row, record) else record


def find_record(row: Row) -> Found:
    """Read the record of a row. A record of other settings or other code than the row's is not used."""
    place = f"Row '{row.name}', seed {row.seed}: The record {row.file}"
    record = read_record(row.file)
    if record is None:
        return Found(row, problem=f"{place} cannot be read" if row.file.exists() else "")
    if row.commit is not None:  # its settings are those of the record
        return Found(row, record)
    if changed := changed_flags(record["settings"], row.identity):
        name, (recorded, wanted) = next(iter(changed.items()))
        return Found(row, problem=f"{place} was made with --{name} {recorded}, and the row has {wanted}")
    recorded_code, code = record["settings"].get("code", {}), row.config.code
    relation = "same" if recorded_code == code else compare_code(recorded_code, code)
    if relation == "other":
        return Found(row, problem=f"{place} was made by other code ({', '.join(changed_code(recorded_code, code))})")
    problem = ""
    tasks = read_json(row.tasks_file) if row.tasks else None
    if tasks is not None and (changed := differing_values(tasks["tasks"], row.tasks)):
        name, (recorded, wanted) = next(iter(changed.items()))
        problem = f"Row '{row.name}', seed {row.seed}: {row.tasks_file} has tasks with {name} {recorded}, not {wanted}"
    return Found(row, record, problem, is_checked=relation == "same")


def finished_record(row: Row) -> dict[str, Any] | None:
    """Return the record of a row if it has the tasks and masks that the list asks for; otherwise None."""
    return find_record(row).finished


def changed_flags(recorded: Mapping[str, Any], wanted: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return the flags whose recorded and wanted values differ, with both values.

    The user's code is not compared, and settings of pruning are not compared for a model made elsewhere.
    """
    old, new = ({n: v for n, v in settings.items() if n != "code"} for settings in (recorded, wanted))
    return differing_values(effective_settings(old), effective_settings(new))


def why_not_run(row: Row) -> str:
    """Return why a row with the key `commit` cannot be run; empty for other rows."""
    if row.commit is None:
        return ""
    where = f"Row '{row.name}', seed {row.seed}, cannot be run"
    record = read_record(row.file)
    if record is None:
        return f"{where}: only commit {row.commit} can run it, and there is no record {row.file}."
    try:
        config_from_mapping(record["settings"])
        reason = "Only its results are used."
    except UserError as error:
        reason = str(error)
    return f"{where}: its record is {row.file}, made by commit {row.commit}. {reason}"


def read_record(path: Path) -> dict[str, Any] | None:
    """Load a record with its `path`. Return None if it is missing, or has other content.

    A setting that the record does not have was made with its default. Settings that this version does not have are
    kept.
    """
    content = read_json(path)
    if content is None or not {"settings", "records"} <= content.keys():
        return None
    defaults, settings = _default_settings(), content["settings"]
    groups = {name: group | settings.get(name, {}) for name, group in defaults.items() if isinstance(group, dict)}
    return unfold_records(content, path) | {"settings": defaults | settings | groups, "path": path}


@cache
def _default_settings() -> dict[str, Any]:
    """Return the settings of a row that sets none."""
    return RunConfig(trainer={"precision": LISTED_PRECISION}).settings()


def task_results(row: Row, record: dict[str, Any]) -> list[Record]:
    """Return the results of the row's tasks: those of the dense model, then those of the row's model.

    The list is empty if the row has no tasks, or they are not measured.
    """
    if not row.tasks:
        return []
    own = read_task_records(row, row.tasks_file)
    if own and own[0]["stage"] == "dense":  # timed in turns with the row's model, by the former task `speed`
        return own
    dense = read_task_records(row, dense_tasks_file(row, record))
    return dense + own if dense and own else []


def read_task_records(row: Row, file: Path) -> list[Record]:
    """Return the records of the row's tasks in a file; an empty list if it is missing or has other tasks."""
    content = read_json(file)
    return content["records"] if content is not None and content["tasks"] == row.tasks else []


def write_task_records(row: Row, file: Path, records: Sequence[Record]) -> None:
    """Write the results of the row's tasks on a model."""
    write_json(file, {"tasks": row.tasks, "records": list(records)}, width=LINE_WIDTH)


def dense_tasks_file(row: Row, record: dict[str, Any]) -> Path:
    """Return the file with the results of the row's tasks on its dense model, which the rows of a list share."""
    return row.tasks_file.with_name(f"dense-{record['inputs']['model']}-{row.config.model.dtype}.json")


def record_to_run(record: dict[str, Any]) -> FinishedRun:
    """Convert a record to a `FinishedRun` with the record's name."""
    return FinishedRun(
        path=record["path"],
        name=record["name"],
        settings=record["settings"] | {"inputs": record["inputs"]},
        records=record["records"],
        summary=record["summary"],
        masks=None if record["masks"] is None else unpack_masks(record["masks"]),
        steps=record["steps"],
        environment=record.get("environment") or {},
    )


def row_to_run(row: Row, record: dict[str, Any], seen: Sequence[str] | None) -> FinishedRun:
    """Convert a record to a `FinishedRun` with the row's name, and its tasks.

    `seen` is the key of the list. Raise UserError if it lacks a corpus that the run has seen.
    """
    if seen is not None:
        missing = sorted({r["corpus"] for r in record["records"] if r["seen"]} - set(seen))
        if missing:
            raise UserError(
                f"Row '{row.name}': The key seen must include {missing[0]}, because the run used text of this corpus; "
                f"got {', '.join(seen)}."
            )
    evaluation = [r | {"run": row.name} for r in task_results(row, record)]
    return replace(record_to_run(record), name=row.name, evaluation=evaluation)


def write_record(path: Path, record: dict[str, Any]) -> dict[str, Any]:
    """Write a record in compact form (`fold_records`), and return the record with its path.

    What records of the same dense model and text have in common is stored once, in the folder `dense` beside those of
    lists.
    """
    content = {name: value for name, value in record.items() if name != "path"}
    folded = fold_records(record["records"])
    for stage in folded["stages"]:
        if stage["all"].get("stage") == "dense":
            shared = {"corpora": folded.pop("corpora"), "each": stage.pop("each")}
            folded["shared"] = key_of(**shared)
            write_json(shared_file(path, folded["shared"]), shared, width=LINE_WIDTH)
    write_json(path, content | {"records": folded}, width=LINE_WIDTH)
    return content | {"path": path}


def fold_records(records: Sequence[Record]) -> dict[str, Any]:
    """Factor out entries that all records, all of a corpus, or all of a stage of the model have in common.

    The result is {"all": entries, "corpora": {corpus: entries}, "stages": [{"all": entries, "each": {...}}, ...]}. The
    remaining entries are in `each` by corpus.
    """
    common, rest = _split_common(records)
    corpora = {}
    for corpus in dict.fromkeys(r["corpus"] for r in records):
        places = [i for i, r in enumerate(records) if r["corpus"] == corpus]
        corpora[corpus], of_corpus = _split_common([rest[i] for i in places])
        for i, entries in zip(places, of_corpus, strict=True):
            rest[i] = entries
    stages = []
    for _, group in itertools.groupby(range(len(rest)), lambda i: (records[i]["stage"], records[i]["recovery"])):
        places = list(group)
        of_stage, others = _split_common([rest[i] for i in places])
        stages.append({"all": of_stage, "each": {records[i]["corpus"]: r for i, r in zip(places, others, strict=True)}})
    return {"all": common, "corpora": corpora, "stages": stages}


def unfold_records(content: dict[str, Any], path: Path) -> dict[str, Any]:
    """Invert `fold_records` in the content of a record's file."""
    folded, records = content["records"], []
    if "shared" in folded:
        file = shared_file(path, folded["shared"])
        shared = read_json(file)
        if shared is None:
            raise UserError(f"Cannot read record {path}: there is no file {file}, which has the dense model's numbers.")
        folded = folded | {"corpora": shared["corpora"]}
    for stage in folded["stages"]:
        each = stage["each"] if "each" in stage else shared["each"]
        records += [folded["all"] | folded["corpora"][c] | stage["all"] | entries for c, entries in each.items()]
    return content | {"records": records}


def shared_file(record: Path, key: str) -> Path:
    """Return the file with the entries that a record shares with others of its dense model and text."""
    return record.parent.parent / "dense" / f"{key}.json"


def _split_common(records: Sequence[Record]) -> tuple[Record, list[Record]]:
    """Return the entries that are equal in all records, and the other entries of each record."""
    if not records:
        return {}, []
    common = {name: value for name, value in records[0].items() if all(name in r and r[name] == value for r in records)}
    return common, [{name: value for name, value in r.items() if name not in common} for r in records]


def pack_masks(masks: Masks) -> dict[str, dict[str, Any]]:
    """Encode masks as base64 of their bits: 8 kB for 46,080 neurons."""
    packed = {}
    for field, block_masks in (("ffn", masks.ffn), ("attention", masks.attention)):
        bits = np.packbits(torch.cat(block_masks).numpy())
        sizes = [len(mask) for mask in block_masks]
        packed[field] = {"sizes": sizes, "bits": base64.b64encode(bits).decode()}
    return packed


def unpack_masks(packed: dict[str, dict[str, Any]]) -> Masks:
    """Invert `pack_masks`."""
    masks = {}
    for field, content in packed.items():
        packed_bits = np.frombuffer(base64.b64decode(content["bits"]), dtype=np.uint8)
        bits = np.unpackbits(packed_bits, count=sum(content["sizes"])).astype(bool)
        masks[field] = list(torch.from_numpy(bits).split(content["sizes"]))
    return Masks.of_blocks(**masks)
