"""The record that is found for each row of each list, and the cells of its printed tables."""

from __future__ import annotations

import contextlib
import functools
import io
import re
from pathlib import Path

import yaml

from gprune.__main__ import main
from tests.snapshots.files import ROOT

LISTS = [
    str(path.relative_to(ROOT))
    for path in sorted((ROOT / "experiments").glob("**/*.yaml"))
    if "rows" in yaml.safe_load(path.read_text(encoding="utf-8"))
]
RULE = re.compile(r"[-:]+")  # a cell of the line below the header of a Markdown table
Cells = list[list[list[str]]]  # tables, rows, cells; the first row of a table is its header


@functools.cache
def printed(listing: str) -> str:
    """Return what `gprune study LIST --table --files` prints: a table of files, and then a title and the results.

    All paths are relative to the repository.
    """
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.chdir(ROOT):
        code = main(["study", listing, "--table", "--files"])
    assert code == 0, f"gprune study {listing} --table --files ends with {code}"
    return output.getvalue()


@functools.cache
def read_tables(listing: str) -> Cells:
    """Return the cells of the tables that `printed` has. The first table is of files."""
    return parse_tables(printed(listing))


def parse_tables(text: str) -> Cells:
    """Return the cells of the Markdown tables in a text, without spaces at their ends."""
    tables: Cells = []
    previous_line = ""
    for line in text.splitlines():
        if line.startswith("|"):
            if not previous_line.startswith("|"):
                tables.append([])
            cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
            if not all(RULE.fullmatch(cell) for cell in cells):
                tables[-1].append(cells)
        previous_line = line
    return tables


def records(listing: str) -> dict[str, str]:
    """Return 'row, seed' -> name of the record's file, or `none`."""
    header, *rows = read_tables(listing)[0]
    names = [dict(zip(header, row, strict=True)) for row in rows]
    return {f"{row['row']}, seed {row['seed']}": Path(row["record"]).name for row in names}


def tables(listing: str) -> Cells:
    """Return the cells of the result tables of a list."""
    return read_tables(listing)[1:]


def different_cells(expected: Cells, got: Cells) -> list[str]:
    """Return a line for each cell, row and table that differs."""
    lines = []
    for number, (old, new) in enumerate(zip(expected, got, strict=False), start=1):
        table = f"table {number} ('{old[0][0]}')"
        if old[0] != new[0]:
            lines.append(f"{table}: the columns were {old[0]}, now {new[0]}")
            continue
        if len(old) != len(new):
            lines.append(f"{table}: it had {len(old) - 1} rows, now {len(new) - 1}")
        for old_row, new_row in zip(old[1:], new[1:], strict=False):
            pairs = zip(old[0], old_row, new_row, strict=True)
            lines += [
                f"{table}, row '{old_row[0]}', column '{column}': it was '{before}', now '{after}'"
                for column, before, after in pairs
                if before != after
            ]
    if len(expected) != len(got):
        lines.append(f"it had {len(expected)} tables, now {len(got)}")
    return lines
