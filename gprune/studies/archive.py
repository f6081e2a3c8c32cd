"""Records of finished rows: find, read and write their files, and convert them for reports."""

from __future__ import annotations

import base64
import functools
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gprune.config import RunConfig, config_from_mapping, effective_settings, flatten
from gprune.errors import UserError
from gprune.models.masks import Masks
from gprune.runs.folder import check_evaluation, check_study
from gprune.runs.numbers import Record
from gprune.runs.results import FinishedRun
from gprune.storage.files import key_of, read_json, write_json
from gprune.studies.listing import LISTED_PRECISION, Row
from gprune.user_code import changed_code, compare_code

LINE_WIDTH = 1000  # characters per line of a record
RECORD_FORMAT = 4  # part of the hash in the names of records, independent of the version of caches
DEFAULTS = Path(__file__).with_name("defaults_0_1_0.json")  # never changed
# Options of allocations, which records of version 0.1.0 do not have unless they were given; never changed.
OPTIONS = {"owl": {"multiple": 5.0, "spread": 0.08}, "reconstruction": {"strength": 0.75}}


@functools.cache
def stored_defaults() -> dict[str, Any]:
    """Settings whose differences are hashed in names of records, and that fill in for settings missing in a record.

    They are the defaults of version 0.1.0, in `DEFAULTS`, so that neither a changed default nor a removed setting
    changes the name of a record. Settings that were added later have their default.
    """
    today = RunConfig(trainer={"precision": LISTED_PRECISION}).settings()
    return _filled(json.loads(DEFAULTS.read_text(encoding="utf-8")), today)


def _filled(settings: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Return nested settings, in which missing ones have their default."""
    groups = {name: group | settings.get(name, {}) for name, group in defaults.items() if isinstance(group, dict)}
    return {**defaults, **settings, **groups}


def _default_options(settings: Mapping[str, Any]) -> dict[str, float]:
    """Return the options of version 0.1.0 for the allocation to blocks of complete settings."""
    s = settings["sparsity"]
    return OPTIONS.get(s["start"] if s["allocation"] in ("learned", "equal") else s["allocation"], {})


@dataclass(frozen=True)
class Found:
    """Records with the settings of a row, by whether the user's code that made them is that of the row."""

    row: Row
    same: list[dict[str, Any]]
    unknown: list[dict[str, Any]]  # the code of the row or of the record is not known
    other: list[dict[str, Any]]

    @functools.cached_property
    def record(self) -> dict[str, Any] | None:
        """Record of the row, preferably a complete one; None if there is no record."""
        records = self.same or self.unknown
        return next(filter(self._is_complete, records), records[0] if records else None)

    @functools.cached_property
    def finished(self) -> dict[str, Any] | None:
        """Record of the row if it has the tasks and masks that the list asks for; otherwise None."""
        return self.record if self.record is not None and self._is_complete(self.record) else None

    @property
    def is_checked(self) -> bool:
        """Whether the record was made by the code of the row for certain."""
        return bool(self.same)

    @property
    def outdated(self) -> list[tuple[Path, list[str]]]:
        """Paths of the records that were made by other code, with the changes of the code."""
        code = self.row.config.code
        return [(record["path"], changed_code(record["settings"].get("code", {}), code)) for record in self.other]

    def _is_complete(self, record: dict[str, Any]) -> bool:
        """Return whether a record has the masks that the row asks for, and the results of its tasks for both models."""
        row = self.row
        if row.masks and record["masks"] is None:
            return False
        if not row.tasks:
            return True
        has_dense_results = any(r["stage"] == "dense" for r in task_results(row, record))
        return row.tasks == record.get("tasks") and has_dense_results


def find_records(row: Row) -> Found:
    """Read the records of a row.

    The name of a record's file consists of the row's name, for readability, the seed, and a hash of
    `identifying_settings`. Records are found by the hash, so that lists with other names for a row share its record.
    Several lists may have written records with the same settings, but with other tasks or without masks. Records with
    other tasks are left out. Those of other code are all kept, because they are only listed as outdated.

    A row that names its record has this one, unless flags ask for other settings, or the seed is another one.
    """
    if row.record is not None:
        record = read_record(row.record)
        is_of_row = record is not None and all(
            _setting(record["settings"], name) == _setting(row.identity, name) for name in row.settings
        )
        return Found(row, [record] if is_of_row else [], [], [])
    code, settings = row.config.code, identifying_settings(row.identity)
    by_code = {"same": [], "unknown": [], "other": []}
    for path in sorted((row.records / "runs").glob(f"*-{_settings_key(row)}*.json")):
        record = read_record(path)
        if record is None or identifying_settings(record["settings"]) != settings:
            continue
        recorded = record["settings"].get("code", {})
        relation = "same" if recorded == code else compare_code(recorded, code)
        if relation == "other" or not row.tasks or record.get("tasks", row.tasks) == row.tasks:
            by_code[relation].append(record)
    return Found(row, **by_code)


def _setting(settings: Mapping[str, Any], name: str) -> Any:
    """Return the value of a setting by dotted name; None if it does not identify a run."""
    group, _, setting = name.partition(".")
    return settings.get(group, {}).get(setting) if setting else settings.get(group)


def why_not_run(row: Row) -> str:
    """Return why a row that names its record cannot be run, and the commit of the record; empty for other rows."""
    if row.record is None:
        return ""
    where = f"Row '{row.name}', seed {row.seed}, cannot be run: its record is {row.record}"
    if (record := read_record(row.record)) is None:
        return f"{where}, which cannot be read."
    commit = (record.get("environment") or {}).get("git_revision") or "that it does not name"
    try:
        config_from_mapping(identifying_settings(record["settings"]))
        reason = "Only its results are used."
    except UserError as error:
        reason = str(error)
    return f"{where}, made by the commit {commit}. {reason}"


def finished_record(row: Row) -> dict[str, Any] | None:
    """Return the record of a row if it has the tasks and masks that the list asks for; otherwise None."""
    return find_records(row).finished


def find_record(row: Row) -> tuple[Path, dict[str, Any] | None]:
    """Return the path of the row's record that may be replaced, and the record, or a new path and None.

    A record may be replaced if it was made by the code of the row for certain, and does not have other tasks.
    """
    record = replace(find_records(row), unknown=[]).record
    return (_new_path(row), None) if record is None else (record["path"], record)


def read_record(path: Path) -> dict[str, Any] | None:
    """Load a record with its `path`. Return None if it is missing or, with a warning, if it is not a valid record.

    Missing settings get the value of `stored_defaults`. Settings that this version does not have are kept.
    """
    content = read_json(path, check=lambda content: check_study(unfold_records(content)))
    if content is None:
        return None
    settings = _filled(content["settings"], stored_defaults())
    options = _default_options(settings) | settings["sparsity"]["options"]
    settings["sparsity"] = settings["sparsity"] | {"options": options}
    return unfold_records(content) | {"settings": settings, "path": path}


def write_record(path: Path, record: dict[str, Any]) -> dict[str, Any]:
    """Write a record in compact form (`fold_records`), and return the record with its path."""
    content = {name: value for name, value in record.items() if name != "path"}
    write_json(path, content | {"records": fold_records(record["records"])}, width=LINE_WIDTH)
    return content | {"path": path}


def _settings_key(row: Row) -> str:
    """Return the hash of the row's `identifying_settings`."""
    return key_of(format=RECORD_FORMAT, settings=identifying_settings(row.identity))[:10]


def identifying_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that differ from `stored_defaults`, by dotted name, without the user's code.

    Settings of pruning are left out for a model made elsewhere, so that their defaults do not matter.
    """
    defaults = flatten(stored_defaults())
    settings = {name: value for name, value in settings.items() if name != "code"}
    of_default = _default_options(settings)
    options = {name: value for name, value in settings["sparsity"]["options"].items() if value != of_default.get(name)}
    settings["sparsity"] = settings["sparsity"] | {"options": options}
    settings = effective_settings(settings) | {"gprune": settings["gprune"]}
    return {name: value for name, value in settings.items() if value != defaults.get(name)}


def _new_path(row: Row) -> Path:
    """Return the path for a new record, with a number at the end if the name is used."""
    words = "".join(letter if letter.isalnum() else " " for letter in row.name.lower()).split()
    slug = "-".join(words).encode()[:150].decode(errors="ignore")  # a file name has at most 255 bytes
    endings = itertools.chain([""], (f"-{number}" for number in itertools.count(1)))
    name = f"{slug}-seed{row.seed}-{_settings_key(row)}"
    paths = (row.records / "runs" / f"{name}{ending}.json" for ending in endings)
    return next(path for path in paths if not path.exists())


def dense_path(row: Row, model: str) -> Path:
    """Return the file with results of the row's tasks on its dense model. Rows with the same tasks share the file."""
    key = key_of(format=RECORD_FORMAT, model=[model, row.config.model.dtype], tasks=row.tasks)
    return row.records / "dense" / f"{key}.json"


def task_results(row: Row, record: dict[str, Any]) -> list[Record]:
    """Return the results of the row's tasks: those of the dense model, then those of the pruned model.

    The list is empty if the row has no tasks, or the record has no results.
    """
    if not (row.tasks and record.get("evaluation")):
        return []
    dense = read_json(dense_path(row, record["inputs"]["model"]), check=check_evaluation) or {"records": []}
    return dense["records"] + record["evaluation"]


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


def learned_tokens(manifest: Mapping[str, Any]) -> int:
    """Return the training tokens of the final model, as reported by its stages, over all processes."""
    return sum(manifest.get("learned_tokens", {}).values())


def fold_records(records: Sequence[Record]) -> dict[str, Any]:
    """Factor out common entries: {"all": common entries, "stages": [{"all": ..., "each": [other entries]}, ...]}.

    `stages` has an entry for each row of the result table, whose records follow each other.
    """
    common, others = _split_common(records)
    rows = []
    for _, indices in itertools.groupby(range(len(others)), lambda i: (records[i]["stage"], records[i]["recovery"])):
        common_of_row, others_of_row = _split_common([others[i] for i in indices])
        rows.append({"all": common_of_row, "each": others_of_row})
    return {"all": common, "stages": rows}


def unfold_records(content: Any) -> Any:
    """Invert `fold_records` in the content of a file. Content in another form is returned unchanged."""
    try:
        common, rows = content["records"]["all"], content["records"]["stages"]
        records = [common | of_row["all"] | others for of_row in rows for others in of_row["each"]]
        return content | {"records": records}
    except (KeyError, TypeError):
        return content


def _split_common(records: Sequence[Record]) -> tuple[Record, list[Record]]:
    """Return the entries that are equal in all records, and the other entries of each record."""
    if not records:
        return {}, []
    common = {name: value for name, value in records[0].items() if all(name in r and r[name] == value for r in records)}
    return common, [{name: value for name, value in r.items() if name not in common} for r in records]


def pack_masks(masks: Masks) -> dict[str, dict[str, Any]]:
    """Encode masks as base64 of their bits: 8 kB for 46,080 neurons."""
    packed = {}
    for field, block_masks in vars(masks).items():
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
    return Masks(**masks)
