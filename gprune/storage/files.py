"""All-or-nothing writes of files and folders, readers of safetensors and JSON, and the cache.

Nothing is ever unpickled. Only rank 0 writes; all ranks read. A file is written in a scratch folder beside its
destination, and renamed when it is complete. A file that cannot be parsed counts as missing, and is computed again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from glob import escape as glob_escape
from pathlib import Path
from typing import Any

import safetensors
import torch
from filelock import FileLock
from lightning.pytorch.utilities import rank_zero_only
from safetensors.torch import save_file
from torch import Tensor

from gprune.errors import first_line
from gprune.storage.paths import cache_dir, disk_errors

log = logging.getLogger("gprune")
FORMAT_VERSION = 5  # part of every cache key; increase it when stored data changes its meaning
MISSING = "the file is missing"
UNUSABLE = "Ignored %s: %s."
FORMER = "former"  # name in a scratch folder of the folder that is being replaced


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Context manager that writes a file or folder completely or not at all.

    A temporary path becomes `path` on success. On failure it is removed, and `path` is as before. The temporary path is
    in a scratch folder beside `path` and has the same name, because files may store their name. Files get the default
    mode of new files (safetensors would make them readable for the owner only). A file is replaced atomically, and a
    folder by two renames.
    """
    with disk_errors(path), scratch_folder(path) as folder:
        temporary = folder / path.name
        yield temporary
        new_file = folder / ".new"  # created only to read its mode, which is the default mode
        new_file.touch()
        default_mode = new_file.stat().st_mode
        for file in (temporary, *temporary.rglob("*")):
            if file.is_file() and file.stat().st_mode != default_mode:
                file.chmod(default_mode)
        if temporary.is_dir() and path.is_dir():  # os.replace cannot replace a folder that is not empty
            os.replace(path, folder / FORMER)
        os.replace(temporary, path)


@contextmanager
def scratch_folder(path: Path) -> Iterator[Path]:
    """Context manager that creates a locked scratch folder beside `path`, and removes it at the end.

    Scratch folders for `path` that killed processes left are removed first. A lock is released when its process ends in
    any way, so a folder that can be locked is abandoned. It is a folder, because libraries put temporary files beside
    the file that they write.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for abandoned in path.parent.glob(f".{glob_escape(path.name)}.*.tmp"):
        with suppress(OSError), locked(abandoned):
            _remove(abandoned, path)
    with ExitStack() as stack:
        while True:
            folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
            stack.callback(_remove, folder, path)
            # Another process may have removed the folder as abandoned before it was locked.
            with suppress(TimeoutError, FileNotFoundError, NotADirectoryError):
                stack.enter_context(locked(folder))
                if folder.exists():
                    break
        yield folder


def _remove(scratch: Path, path: Path) -> None:
    """Remove a scratch folder. If the replacement of `path` failed, first move the former folder back."""
    former = scratch / FORMER
    if former.exists() and not path.exists():
        os.replace(former, path)
    shutil.rmtree(scratch, ignore_errors=True)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Context manager that holds the lock of a folder, a file `.lock` in it, which is not removed.

    Raise TimeoutError at once if another process holds the lock.
    """
    if not folder.is_dir():  # FileLock would create the folder
        raise NotADirectoryError(f"{folder} is not a folder")
    with FileLock(folder / ".lock", blocking=False):
        yield


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@rank_zero_only
def write_json(path: Path, content: dict[str, Any], *, width: int = 0) -> None:
    """Write a JSON object. For `width` see `_format_lines`."""
    text = _format_lines(content, width) if width else json.dumps(content, indent=1, allow_nan=False)
    write_text(path, text + "\n")


def _format_lines(content: Any, width: int, indent: str = "") -> str:
    """Format JSON without spaces. A value of more than `width` characters gets one line per entry."""
    text = json.dumps(content, separators=(",", ":"), allow_nan=False)
    if len(text) <= width or not isinstance(content, dict | list):
        return text
    if isinstance(content, dict):
        named_values = [(f"{json.dumps(key)}:", value) for key, value in content.items()]
    else:
        named_values = [("", value) for value in content]
    entries = [f"{indent} {name}{_format_lines(value, width, indent + ' ')}" for name, value in named_values]
    opening_bracket, closing_bracket = text[0], text[-1]
    return f"{opening_bracket}\n" + ",\n".join(entries) + f"\n{indent}{closing_bracket}"


def read_json(path: Path) -> dict[str, Any] | None:
    """Read a JSON object. Return None if the file is missing or, with a warning, if it cannot be read."""
    content, reason = inspect_json(path)
    if reason not in (None, MISSING):
        log.warning(UNUSABLE, path, reason)
    return content


def inspect_json(path: Path) -> tuple[dict[str, Any] | None, str | None]:
    """Read a JSON object and return (content, None), or (None, reason); the reason for a missing file is `MISSING`."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return (content, None) if isinstance(content, dict) else (None, "the file has no JSON object")
    except FileNotFoundError:
        return None, MISSING
    except (OSError, ValueError, RecursionError) as error:
        return None, first_line(error)


def as_bytes(tensor: Tensor) -> memoryview:
    """Return the raw bytes of a tensor of any dtype, without a copy if the tensor is contiguous on the CPU."""
    return memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())


@rank_zero_only
def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Save tensors by name."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with replacing(path) as temporary:
        save_file(tensors, temporary)


def read_tensors(path: Path) -> dict[str, Tensor] | None:
    """Read tensors by name. Return None if the file is missing or, with a warning, if it cannot be read."""
    try:
        with safetensors.safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        return None
    except Exception as error:  # safetensors and torch raise many classes, even KeyError for an unknown dtype
        log.warning(UNUSABLE, path, first_line(error))
        return None


def key_of(**values: Any) -> str:
    """Return a cache key, 16 hex digits, of the values (plain data for JSON) that determine a result."""
    text = json.dumps({"format": FORMAT_VERSION, **values}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Cache:
    """Results of one kind in the cache folder, which are computed once on this machine and then found by their key.

        tables = Cache("speed")
        seconds = tables.get(key_of(shapes=shapes, dtype="float32"), lambda: {"seconds": measure()})["seconds"]

    A result is a JSON object or, with `tensors`, tensors by name. It is computed again if its file cannot be read.
    """

    name: str  # of a folder in the cache folder
    tensors: bool = False

    def path(self, name: str) -> Path:
        """Return the path of a file or folder, which may not exist."""
        return cache_dir() / self.name / name

    def file(self, key: str) -> Path:
        """Return the path of the file of a result."""
        return self.path(f"{key}.safetensors" if self.tensors else f"{key}.json")

    def read(self, key: str) -> dict[str, Any] | None:
        """Read a result; None if the file is missing or cannot be read."""
        return read_tensors(self.file(key)) if self.tensors else read_json(self.file(key))

    def write(self, key: str, content: dict[str, Any]) -> None:
        """Write a result on rank 0."""
        write = write_tensors if self.tensors else write_json
        write(self.file(key), content)

    def get(
        self, key: str, compute: Callable[[], dict[str, Any]], *, share: Callable[[Any], Any] = lambda content: content
    ) -> dict[str, Any]:
        """Return a result from its file, or compute and write it. `share` makes all ranks see the same file."""
        content = share(self.read(key))
        if content is None:
            content = compute()
            self.write(key, content)
        return content

    def folder(self, name: str, make: Callable[[Path], None]) -> Path:
        """Return a folder that `make` writes once: one process makes it, and others wait."""
        folder = self.path(name)
        if folder.is_dir():  # return before writing anything, because the cache may be read-only
            return folder
        with disk_errors(folder):
            folder.parent.mkdir(exist_ok=True)
            with FileLock(folder.parent / f".{name}.lock"):
                if not folder.is_dir():
                    with replacing(folder) as temporary:
                        make(temporary)
        return folder
