"""Where caches lie, and what a disk that refuses says."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from gprune.errors import UserError
from gprune.storage.reading import expanded

log = logging.getLogger("gprune")


def cache_dir() -> Path:
    """The cache root, created if need be: `$GPRUNE_CACHE`, or `~/.cache/gprune`.

    Raises:
        UserError: if it cannot be created.
    """
    path = expanded(os.environ.get("GPRUNE_CACHE") or "~/.cache/gprune")
    with disk_errors(path):
        path.mkdir(parents=True, exist_ok=True)
    return path


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """A full, missing or read-only disk is the caller's to put right."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"The cache {path} cannot be used: {error}. Free space there, or set GPRUNE_CACHE to a folder "
            f"that can be written."
        ) from error
