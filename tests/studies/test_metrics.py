"""The list of metrics, and its records, of which nobody kept the masks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from gprune.studies.archive import as_run, record_of
from gprune.studies.listing import Listing
from gprune.studies.tables import reported, text_of
from tests import built_in

LIST = Path(__file__).parents[2] / "experiments" / "questions" / "metrics.yaml"


@pytest.fixture(scope="module")
def listing():
    return Listing.read(LIST)


@pytest.fixture(scope="module")
def done(listing):
    """Rows of the five metrics that anyone might have chosen, with their records."""
    return [(row, record_of(row)) for row in listing.rows if row.name in listing.ranges["metrics"]]


def test_every_built_in_metric_is_a_row_or_ranks_as_one_that_is(listing):
    rows = {row.name for row in listing.rows}
    missing = {name for name in built_in.METRICS if f"{name} 0.5" not in rows}
    assert missing == {"wifn"}  # neurons rank as by wanda_sp
    for row in listing.rows:
        assert row.name.split(" ")[0] not in built_in.METRICS or row.name.startswith(row.config.importance)


def test_the_records_that_are_kept_here_are_those_of_todays_rows(listing):
    """experiments/README.md quotes them."""
    there = [row.name for row in listing.rows if record_of(row) is not None]
    assert len(there) == 32
    assert {row.name for row in listing.rows} - set(there) == {
        "gprune, consensus switch", "gprune, width multiple 64", "gprune, uniform width", "Wanda-sp",
        "LLM-Pruner, no tuning",
    }  # fmt: skip


def test_records_without_masks_are_left_out_of_tables_and_figures_of_masks(listing, done):
    assert [as_run(row, kept, listing.seen).masks for row, kept in done] == [None] * 5
    made = reported(listing, done)
    assert all(table.rows == [] for table in made.tables if table.name in ("sparsity", "stability", "repeatability"))
    assert set(made.figures()) == {"means", "ratios"}
    everything = replace(listing, tables=tuple(table.name for table in made.tables))
    assert "Jaccard" not in text_of(everything, done)


def test_metrics_lie_closer_together_with_gprune_than_alone(listing, done):
    """What the log quotes: log(max / min) alone, with gprune, and their ratio."""
    (line,) = [line for line in text_of(listing, done).splitlines() if line.startswith("| metrics: ")]
    cells = [cell.split()[0] if cell.strip() else None for cell in line.split("|")[2:-1]]
    assert cells == ["0.238", None, "0.188", "0.791"]
