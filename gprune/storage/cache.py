"""Where caches lie."""

from __future__ import annotations

import os
from pathlib import Path

from gprune.storage.files import disk_errors
from gprune.storage.reading import expanded


def cache_dir() -> Path:
    """The cache root, created if need be: `$GPRUNE_CACHE`, or `~/.cache/gprune`.

    Raises:
        UserError: if it cannot be created.
    """
    path = expanded(os.environ.get("GPRUNE_CACHE") or "~/.cache/gprune")
    with disk_errors(path):
        path.mkdir(parents=True, exist_ok=True)
    return path
