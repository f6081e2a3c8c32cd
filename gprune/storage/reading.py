"""Read files that the user names."""

from __future__ import annotations

import os
from pathlib import Path

from gprune.errors import quoting


def expanded(path: Path | str) -> Path:
    """Expand ~ in a path. If there is no such user, the path is unchanged (pathlib would raise)."""
    return Path(os.path.expanduser(path))


def read_required_text(path: Path, expected: str) -> str:
    """Read a UTF-8 file. If it cannot be read, raise UserError with what the file must hold (`expected`)."""
    with quoting(f"Cannot read {path}: ", f". The file must hold {expected}."):
        return path.read_text(encoding="utf-8")
