"""Files and folders written whole or not at all; safetensors and JSON, checked when they are read.

Nothing is ever unpickled. Of several processes only the first writes; all of them read. Whatever is written lies in a
scratch folder beside its place until it is whole, and is renamed then. A file carries the hash of its content, its name
and, where it belongs to one run, that run's key, so that a truncated, altered or foreign file is noticed and computed
again, never silently used. JSON without a checksum, as somebody writes it by hand, is accepted, except in the cache.
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
from gprune.storage.cache import disk_errors
from gprune.storage.reading import read_text, regular_file

log = logging.getLogger("gprune")
FORMAT_VERSION = 4  # part of every cache key: raise it when what is stored changes meaning
_hashed: dict[Path, tuple[int, int, int]] = {}  # inode, size and time of files whose content this process has hashed
MISSING, UNUSABLE = "it is not there", "%s is not usable (%s); going on without it."
OLD = "former"  # in a scratch folder: the folder that stood in the place of a new one, until that has taken it


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a place to write a file or a folder; on success it becomes `path`, on failure it is removed.

    What stood at `path` stays until the new one is whole, and comes back if the exchange itself fails. The place lies
    in a scratch folder beside `path` and has the name of `path`, so that what is written may name itself. Its files
    get the mode of any new file: safetensors keeps its own from all users but their owner.

    Raises:
        UserError: when the folder cannot be written or the disk is full.
    """
    with disk_errors(path), scratch_folder(path) as folder:
        new = folder / path.name
        yield new
        (folder / ".new").touch()
        mode = (folder / ".new").stat().st_mode
        for file in (new, *new.rglob("*")):
            if file.is_file() and file.stat().st_mode != mode:
                file.chmod(mode)
        if new.is_dir() and path.is_dir():  # which cannot be replaced by one call
            os.replace(path, folder / OLD)
        os.replace(new, path)


@contextmanager
def scratch_folder(path: Path) -> Iterator[Path]:
    """A locked folder beside `path`, removed at the end; those that killed processes left for `path` are removed first.

    A folder, because libraries put temporary files of their own beside the one they write. Its random name cannot be
    guessed by whoever hands us a run folder with links in it. Its lock ends with the process, however that ends, so
    one that can be locked belongs to nobody.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in path.parent.glob(f".{glob_escape(path.name)}.*.tmp"):
        with suppress(OSError), locked(left):
            _remove(left, path)
    with ExitStack() as stack:
        while True:
            folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
            stack.callback(_remove, folder, path)
            # Somebody may have taken it for abandoned in the moment before it was locked.
            with suppress(TimeoutError, FileNotFoundError, NotADirectoryError):
                stack.enter_context(locked(folder))
                if folder.exists():
                    break
        yield folder


def _remove(scratch: Path, path: Path) -> None:
    """Remove a scratch folder; what stood at `path`, if nothing has taken its place, goes back there first."""
    if (old := scratch / OLD).exists() and not path.exists():
        os.replace(old, path)
    shutil.rmtree(scratch, ignore_errors=True)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder, the file `.lock` in it, which stays there.

    Raises:
        TimeoutError: if another process holds it.
        OSError: if there is no such folder.
    """
    if folder.is_symlink() or not folder.is_dir():  # or the lock would make one
        raise NotADirectoryError(f"expected a folder, got {folder}")
    with FileLock(folder / ".lock", blocking=False):
        yield


@rank_zero_only
def write_json(path: Path, content: Any, *, run: str | None = None, width: int = 0) -> None:
    """Write JSON, an object with the key of its `run`, if any, and its checksum; what has at most `width` characters
    takes one line."""
    content = json.loads(json.dumps(content, allow_nan=False))
    if isinstance(content, dict):
        content |= {"run": run} if run else {}
        content |= {"checksum": json_hash(content, path.name)}
    text = _lines(content, width) if width else json.dumps(content, indent=1)
    with replacing(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def _lines(content: Any, width: int, margin: str = "") -> str:
    """JSON without blanks, in which what takes more than `width` characters has a line for each of its entries."""
    text = json.dumps(content, separators=(",", ":"))
    if len(text) <= width or not isinstance(content, dict | list):
        return text
    keys = [f"{json.dumps(key)}:" for key in content] if isinstance(content, dict) else [""] * len(content)
    values = content.values() if isinstance(content, dict) else content
    entries = [f"{margin} {key}{_lines(v, width, margin + ' ')}" for key, v in zip(keys, values, strict=True)]
    return f"{text[0]}\n" + ",\n".join(entries) + f"\n{margin}{text[-1]}"


def read_json(path: Path, **how: Any) -> Any:
    """As `inspected_json`, with one warning in place of the reason, and none where there is no file."""
    content, reason = inspected_json(path, **how)
    if reason not in (None, MISSING):
        log.warning(UNUSABLE, path, reason)
    return content


def inspected_json(
    path: Path,
    *,
    run: str | None = None,
    check: Callable[[Any], str | None] | None = None,
    sealed: bool = False,
) -> tuple[Any, str | None]:
    """The content and None; or None and why it is not usable: missing (`MISSING`), not whole, altered, or foreign.

    Args:
        run: the key of the run that it has to belong to, if it says whose it is.
        check: says what else is wrong.
        sealed: whether a checksum is required, as in the cache, where nobody writes by hand.
    """
    try:
        content = json.loads(read_text(path))
        if sealed and not (isinstance(content, dict) and "checksum" in content):
            raise ValueError("it has no checksum")
        if isinstance(content, dict) and "checksum" in content:
            if content.pop("checksum") != json_hash(content, path.name):
                raise ValueError("its content does not match its checksum")
            if content.pop("run", run) != run and run is not None:
                raise ValueError("it belongs to another run")
        if check and (problem := check(content)):
            raise ValueError(problem)
        return content, None
    except FileNotFoundError:
        return None, MISSING
    except (OSError, ValueError, RecursionError) as error:
        return None, first_line(error)


def json_hash(content: dict[str, Any], name: str) -> str:
    """SHA-256 (16 hex digits) over a file's name and plain content, however it is laid out."""
    return hashlib.sha256(f"{name} {json.dumps(content, sort_keys=True)}".encode()).hexdigest()[:16]


def as_bytes(tensor: Tensor) -> memoryview:
    """The raw bytes of a tensor, of any dtype, without a copy where it is contiguous on the CPU."""
    return memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())


def content_hash(tensors: dict[str, Tensor]) -> str:
    """SHA-256 over names, shapes, dtypes and bytes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype};".encode())
        digest.update(as_bytes(tensor))
    return digest.hexdigest()


@rank_zero_only
def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Save tensors with their content hash and the file's name in its metadata."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    marks = {**(metadata or {}), "content_hash": content_hash(tensors), "file": path.name}
    with replacing(path) as temporary:
        # As one entry: safetensors writes several in another order each time, and equal files should be equal bytes.
        save_file(tensors, temporary, metadata={"marks": json.dumps(marks, sort_keys=True)})


def read_tensors(path: Path, *, run: str | None = None, once: bool = False) -> dict[str, Tensor] | None:
    """The tensors, or None (with one warning unless it is missing) if the file is truncated, altered or foreign.

    `run`: the key of the run that it has to belong to. With `once`, for large files that are read again and again, the
    content is hashed only where this process has not yet, or the file is another one since.
    """
    try:
        stat = regular_file(path)
        state = (stat.st_ino, stat.st_size, stat.st_mtime_ns)
        known = once and _hashed.get(path) == state
        with safetensors.safe_open(path, "pt") as file:
            marks = json.loads((file.metadata() or {}).get("marks", "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if not known and marks.get("content_hash") != content_hash(tensors):
            raise ValueError("its content does not match its hash")
        if marks.get("file", path.name) != path.name:
            raise ValueError(f"it was written as {marks['file']}")
        if run is not None and marks.get("run", run) != run:
            raise ValueError("it belongs to another run")
    except FileNotFoundError:
        return None
    except Exception as error:  # safetensors and torch each raise their own, down to KeyError for an unknown dtype
        log.warning(UNUSABLE, path, first_line(error))
        return None
    if once:
        _hashed[path] = state
    return tensors


def key_of(**what: Any) -> str:
    """A 16-digit key of plain values that determine a result."""
    text = json.dumps({"format": FORMAT_VERSION, **what}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def file_hashes(folder: Path, pattern: str = "*") -> dict[str, str]:
    """SHA-256 (16 hex digits) of the files in a folder whose names match, by name; empty where there is none."""
    hashes = {}
    for path in sorted(folder.glob(pattern)):
        if path.is_file():  # none of devices and FIFOs
            with path.open("rb") as file:
                hashes[path.name] = hashlib.file_digest(file, "sha256").hexdigest()[:16]
    return hashes
