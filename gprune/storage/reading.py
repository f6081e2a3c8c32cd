"""Read untrusted files: regular files or pipes up to a size limit. Find unsafe entries of folders."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from gprune.errors import quoting

MOST = 2**28  # bytes of a JSON file: 50 rows of 100,000 windows each are 100 MB


def expanded(path: Path | str) -> Path:
    """Expand ~ in a path. If there is no such user, the path is unchanged (pathlib would raise)."""
    return Path(os.path.expanduser(path))


def read_bytes(path: Path | str, *, pipe: bool = False) -> bytes:
    """Read the bytes of a file.

    Args:
        pipe: whether a pipe is allowed, such as `<(command)` in a shell. Other FIFOs could block forever.

    Raises:
        OSError: if the file cannot be read, is not a regular file (or pipe), or has more than `MOST` bytes.
        ValueError: if the name has a NUL character.
    """
    regular_file(path, pipe=pipe)
    with open(path, "rb") as file:
        content = file.read(MOST + 1)
    if len(content) > MOST:
        raise OSError(errno.EFBIG, f"the file has more than {MOST:,} bytes", str(path))
    return content


def read_text(path: Path | str, *, pipe: bool = False) -> str:
    """Read a file as `read_bytes` and decode it as UTF-8; ValueError if that is not possible."""
    return read_bytes(path, pipe=pipe).decode("utf-8")


def needed_text(path: Path, expected: str) -> str:
    """Read a file as `read_text`. If that fails, raise a UserError with the file and its expected content."""
    with quoting(f"Cannot read {path}: ", f". The file must hold {expected}."):
        return read_text(path)


def regular_file(path: Path | str, *, pipe: bool = False) -> os.stat_result:
    """Return the status of a regular file; OSError for a folder, device, FIFO or socket."""
    status = os.stat(path)
    if not (stat.S_ISREG(status.st_mode) or (pipe and stat.S_ISFIFO(status.st_mode))):
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return status


def unsafe_entries(folder: Path | str) -> Iterator[tuple[str, Path]]:
    """Find entries of a folder, at any depth, that are links out of the folder or special files.

    Writing through such a link changes files elsewhere, and copying its target may publish any file of the user.

    Yields:
        "a link out of the folder", or "neither file nor folder" for FIFOs, devices and links to them; and the path.
    """
    root = os.path.realpath(folder)
    for place, folders, files in os.walk(root):
        for path in (os.path.join(place, name) for name in (*folders, *files)):
            if os.path.exists(path) and not (os.path.isfile(path) or os.path.isdir(path)):
                yield "neither file nor folder", Path(path)
            elif os.path.islink(path) and not os.path.realpath(path).startswith(root + os.sep):
                yield "a link out of the folder", Path(path)
