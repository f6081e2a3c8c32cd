"""Write all snapshots again: `python -m tests.snapshots`."""

from __future__ import annotations

from tests.snapshots import commands, files, lists


def write_snapshots() -> None:
    """Write rows without a record, frames of three lists, and settings of all documented commands."""
    files.write("missing", {name: rows for name in lists.LISTS if (rows := lists.missing(name))})
    for name in lists.FRAMES:
        lists.frame(name).to_csv(lists.csv_of(name), index=False)
    defaults = commands.default_settings()
    settings = {
        page: {command: commands.changed_settings(command, defaults) for command in commands.commands_in(page)}
        for page in commands.PAGES
    }
    files.write("commands", {"defaults": defaults, "pages": settings})


if __name__ == "__main__":
    write_snapshots()
