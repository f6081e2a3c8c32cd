"""Read files that somebody else may have made: regular files or pipes, up to a size; find unsafe entries of folders."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from gprune.errors import quoting

MOST = 2**28  # bytes of a JSON file: 50 rows of 100,000 windows each are 100 MB


def expanded(path: Path | str) -> Path:
    """A path with the user's home for ~; unchanged, where pathlib would raise, if there is no such user."""
    return Path(os.path.expanduser(path))


def read_bytes(path: Path | str, *, pipe: bool = False) -> bytes:
    """The content of a file, or of a pipe, which a shell makes of `<(command)`; another FIFO would block for ever.

    Raises:
        OSError: as the system says; a file that is neither, or has more than `MOST` bytes, is one too.
        ValueError: for a name with NUL.
    """
    regular_file(path, pipe=pipe)
    with open(path, "rb") as file:
        content = file.read(MOST + 1)
    if len(content) > MOST:
        raise OSError(errno.EFBIG, f"expected at most {MOST:,} bytes", str(path))
    return content


def read_text(path: Path | str, *, pipe: bool = False) -> str:
    """As `read_bytes`, decoded from UTF-8; a ValueError where it is something else."""
    return read_bytes(path, pipe=pipe).decode("utf-8")


def needed_text(path: Path, expected: str) -> str:
    """As `read_text`; a UserError names the file and what it should hold if it cannot be read."""
    with quoting(f"{path}: expected {expected}, but it cannot be read (", ")."):
        return read_text(path)


def regular_file(path: Path | str, *, pipe: bool = False) -> os.stat_result:
    """What the system says of a file that can be read to its end; an OSError for a folder, device, FIFO or socket."""
    status = os.stat(path)
    if not (stat.S_ISREG(status.st_mode) or (pipe and stat.S_ISFIFO(status.st_mode))):
        raise OSError(errno.EINVAL, "expected a regular file", str(path))
    return status


def unsafe_entries(folder: Path | str) -> Iterator[tuple[str, Path]]:
    """Entries of a folder, at any depth, that lead out of it or cannot be read to an end.

    Whoever writes through such a link writes elsewhere; whoever copies its target may publish any file of the user's.

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
