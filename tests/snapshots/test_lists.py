"""Every row of every list finds the same record, and every list prints the same cells."""

from __future__ import annotations

import pytest

from tests.snapshots import files, lists

RECORDS, TABLES = files.read("records"), files.read("tables")


def fail_for(listing: str, lines: list[str]) -> None:
    """Fail with the lines that differ, if any."""
    if lines:
        pytest.fail("\n".join([f"{listing}:", *lines, files.REGENERATE]), pytrace=False)


def test_the_snapshots_are_those_of_all_lists():
    assert list(RECORDS) == list(TABLES) == lists.LISTS, files.REGENERATE


@pytest.mark.parametrize("listing", lists.LISTS)
def test_every_row_finds_its_record(listing):
    expected, found = RECORDS.get(listing, {}), lists.records(listing)
    fail_for(listing, [
        f"row '{row}': the record was {expected.get(row)}, now {found.get(row)}"
        for row in dict.fromkeys([*expected, *found])
        if expected.get(row) != found.get(row)
    ])  # fmt: skip


@pytest.mark.parametrize("listing", lists.LISTS)
def test_every_list_prints_the_same_cells(listing):
    fail_for(listing, lists.different_cells(TABLES.get(listing, []), lists.tables(listing)))
