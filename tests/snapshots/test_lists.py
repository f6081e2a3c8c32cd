"""Every row of every list finds the same record, and every list prints the same cells, also on pages of questions."""

from __future__ import annotations

import re

import pytest

from tests.snapshots import files, lists

RECORDS, TABLES = files.read("records"), files.read("tables")
OUTPUT = re.compile(r"<!-- gprune study (\S+) --table -->\n\n(.*?)\n\n<!-- end of its output -->", re.DOTALL)
PASTED = [  # page, list, output
    (path.name, *match.groups())
    for path in sorted((files.ROOT / "experiments/questions").glob("*.md"))
    for match in OUTPUT.finditer(path.read_text(encoding="utf-8"))
]


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


@pytest.mark.parametrize(("page", "listing", "pasted"), PASTED, ids=[listing for _, listing, _ in PASTED])
def test_every_table_on_a_page_is_the_output_of_its_list(page, listing, pasted):
    assert lists.results(listing) == pasted, f"paste the output of `gprune study {listing} --table` into {page}"
