"""Every row of every list finds its record, and three lists have the stored numbers."""

from __future__ import annotations

import io

import pandas as pd
import pytest

from tests.snapshots import files, lists

MISSING = files.read("missing")


@pytest.mark.parametrize("listing", dict.fromkeys([*lists.LISTS, *MISSING]))
def test_the_rows_without_a_record_are_those_of_the_snapshot(listing):
    assert lists.missing(listing) == MISSING.get(listing, []), files.REGENERATE


@pytest.mark.parametrize("name", lists.FRAMES)
def test_a_list_has_the_numbers_of_the_snapshot(name):
    found = io.StringIO(lists.frame(name).to_csv(index=False))
    pd.testing.assert_frame_equal(pd.read_csv(lists.csv_of(name)), pd.read_csv(found), rtol=1e-12)
