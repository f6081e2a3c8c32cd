"""Write all snapshots again: `python -m tests.snapshots`."""

from __future__ import annotations

from tests.snapshots import commands, files, lists


def write_snapshots() -> None:
    """Write records and tables of all lists, and settings of all documented commands."""
    files.write("records", {name: lists.records(name) for name in lists.LISTS})
    files.write("tables", {name: lists.tables(name) for name in lists.LISTS})
    defaults = commands.default_settings()
    settings = {
        page: {command: commands.changed_settings(command, defaults) for command in commands.commands_in(page)}
        for page in commands.PAGES
    }
    files.write("commands", {"defaults": defaults, "pages": settings})


if __name__ == "__main__":
    write_snapshots()
