"""Paths that the user names, the cache folder, and errors of disks. Without PyTorch, because checks of flags use it."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import safetensors

from gprune.errors import UserError, quoting


def expanded(path: Path | str) -> Path:
    """Expand ~ in a path. If there is no such user, the path is unchanged (pathlib would raise)."""
    return Path(os.path.expanduser(path))


def read_required_text(path: Path, expected: str) -> str:
    """Read a UTF-8 file. If it cannot be read, raise UserError with what the file must hold (`expected`)."""
    with quoting(f"Cannot read {path}: ", f". The file must hold {expected}."):
        return path.read_text(encoding="utf-8")


def cache_dir() -> Path:
    """Return the cache folder `$GPRUNE_CACHE`, or `gprune` in `$XDG_CACHE_HOME` (`~/.cache`), and create it."""
    path = expanded(os.environ.get("GPRUNE_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "gprune"))
    with disk_errors(path):
        path.mkdir(parents=True, exist_ok=True)
    return path


def check_writable(folder: Path) -> None:
    """Raise UserError unless a folder, or its nearest existing parent, is writable.

    A temporary folder is created there and removed again.
    """
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    with disk_errors(folder), tempfile.TemporaryDirectory(prefix=".gprune-", dir=existing):
        pass


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Context manager that converts errors of a full, missing or read-only disk to a UserError that names `path`."""
    try:
        yield
    except (OSError, safetensors.SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        places = "a run's results: --run.dir; records: --records; an export: --output; caches: $GPRUNE_CACHE"
        remedy = f"Free space or choose another place ({places}). Finished work is kept"
        raise UserError(f"Cannot write {path}: {reason}. {remedy}.") from error
