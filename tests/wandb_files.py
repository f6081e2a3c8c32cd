"""Read an offline `.wandb` file, without an account and without W&B's servers: what a run really logged."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from google.protobuf.message import DecodeError
from wandb.proto import wandb_internal_pb2

from gprune.errors import UserError, first_line


@dataclass(frozen=True)
class OfflineRun:
    """What W&B keeps of a run. Values are plain JSON; images and tables are dictionaries with `_type` and `path`."""

    config: dict[str, Any]
    history: list[dict[str, Any]]  # one row per call of log
    axes: dict[str, str]  # metric name or pattern -> its x axis
    group: str
    job_type: str
    tags: list[str]
    exit_code: int | None  # None while the run goes on, or after it was killed

    def curve(self, metric: str) -> list[tuple[float, float]]:
        """(x, y) of a metric over its own axis, in the order in which it was logged."""
        axis = next(x for pattern, x in self.axes.items() if metric.startswith(pattern.removesuffix("*")))
        return [(row[axis], row[metric]) for row in self.history if metric in row]


def read_offline(path: Path | str) -> OfflineRun:
    """What a `.wandb` file holds.

    Args:
        path: the file itself, or a run folder with one offline run in `wandb/`; of several sittings the last is read.

    Raises:
        UserError: for a folder without a `.wandb` file, or a file that is none or damaged.
    """
    path = Path(path)
    if path.is_dir():
        path = _last_sitting(path)
    try:
        return _read(path)
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}.") from error
    except (DecodeError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({first_line(error)}); its curves cannot be read.") from error


def _last_sitting(folder: Path) -> Path:
    """The `.wandb` file to which W&B's own link `latest-run` leads; without it, the last by name.

    Names begin with the time, and clocks are put back.
    """
    found = sorted(folder.glob("wandb/*run-*/*.wandb"))
    if not found:
        raise UserError(f"{folder} holds no wandb/*/*.wandb file; run with --logging.mode offline.")
    latest = (folder / "wandb/latest-run").resolve().name
    return ([file for file in found if file.parent.name == latest] or found)[-1]


def _read(path: Path) -> OfflineRun:
    config, history, axes, exit_code, run = {}, [], {}, None, wandb_internal_pb2.RunRecord()
    for data in _log_entries(path):
        record = wandb_internal_pb2.Record.FromString(data)
        kind = record.WhichOneof("record_type")
        if kind == "run":
            run = record.run
            config |= _items(run.config.update)
        elif kind == "config":
            config |= _items(record.config.update)
        elif kind == "history":
            history.append(_items(record.history.item))
        elif kind == "metric" and record.metric.step_metric:
            axes[record.metric.name or record.metric.glob_name] = record.metric.step_metric
        elif kind == "exit":
            exit_code = record.exit.exit_code
    return OfflineRun(config, history, axes, run.run_group, run.job_type, list(run.tags), exit_code)


def _items(items: Sequence[Any]) -> dict[str, Any]:
    """Key-value records to a dictionary; W&B flattens images and tables, with nested keys that are a path."""
    content: dict[str, Any] = {}
    for item in items:
        *path, last = item.nested_key or [item.key]
        place = content
        for name in path:
            place = place.setdefault(name, {})
        place[last] = json.loads(item.value_json)
    return content


def _log_entries(path: Path) -> Iterator[bytes]:
    """The entries of a `.wandb` file: LevelDB's log format behind a header of 7 bytes.

    Blocks of 32 KiB hold chunks of (CRC-32 of kind and data, length, kind), and an entry that does not fit into a
    block is spread over several: kind 1 is whole, 2 first, 3 middle, 4 last. A run that was killed may end in the
    middle of an entry, which is then left out.
    """
    content, block, head = path.read_bytes(), 32 * 1024, struct.Struct("<IHB")
    if content[:4] != b":W&B":
        raise UserError(f"{path} is no .wandb file; expected one from the folder wandb/ of a run.")
    position, entry = 7, bytearray()
    while position + head.size <= len(content):
        room = block - position % block
        if room < head.size:  # a chunk's head never straddles blocks
            position += room
            continue
        checksum, length, kind = head.unpack_from(content, position)
        position += head.size
        data = content[position : position + length]
        position += length
        if len(data) < length:
            return
        if zlib.crc32(data, zlib.crc32(bytes([kind]))) != checksum:
            raise UserError(f"{path} is damaged near byte {position}; its curves cannot be read.")
        if kind in (1, 2):
            entry.clear()
        entry += data
        if kind in (1, 4):
            yield bytes(entry)
