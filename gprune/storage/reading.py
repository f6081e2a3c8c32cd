"""Read untrusted files: regular files or pipes up to a size limit. Find unsafe entries of folders."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from gprune.errors import quoting

MAX_BYTES = 2**28  # limit of a file: the JSON of 50 rows of 100,000 windows each has 100 MB


def expanded(path: Path | str) -> Path:
    """Expand ~ in a path. If there is no such user, the path is unchanged (pathlib would raise)."""
    return Path(os.path.expanduser(path))


def read_bytes(path: Path | str, *, pipe: bool = False) -> bytes:
    """Read the bytes of a file.

    Args:
        path: path of the file.
        pipe: whether a pipe is allowed, such as `<(command)` in a shell. Other FIFOs could block forever.

    Raises:
        OSError: if the file cannot be read, is not a regular file (or pipe), or has more than `MAX_BYTES` bytes.
        ValueError: if the name has a NUL character.
    """
    regular_file(path, pipe=pipe)
    with open(path, "rb") as file:
        content = file.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise OSError(errno.EFBIG, f"the file has more than {MAX_BYTES:,} bytes", str(path))
    return content


def read_text(path: Path | str, *, pipe: bool = False) -> str:
    """Read a UTF-8 file with the limits and errors of `read_bytes`; ValueError if it is not UTF-8."""
    return read_bytes(path, pipe=pipe).decode("utf-8")


def read_required_text(path: Path, expected: str) -> str:
    """Read a UTF-8 file.

    Args:
        path: path of the file.
        expected: what the file must contain, for the error.

    Raises:
        UserError: if the file cannot be read.
    """
    with quoting(f"Cannot read {path}: ", f". The file must hold {expected}."):
        return read_text(path)


def regular_file(path: Path | str, *, pipe: bool = False) -> os.stat_result:
    """Return the status of a regular file, or of a FIFO if `pipe` is true.

    Raises:
        OSError: for anything else, such as a folder, a device or a socket.
    """
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
    for parent, folders, files in os.walk(root):
        for name in (*folders, *files):
            path = os.path.join(parent, name)
            is_special = os.path.exists(path) and not (os.path.isfile(path) or os.path.isdir(path))
            if is_special:
                yield "neither file nor folder", Path(path)
            elif os.path.islink(path) and not os.path.realpath(path).startswith(root + os.sep):
                yield "a link out of the folder", Path(path)
