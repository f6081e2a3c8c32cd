"""The table and the figure of the README, from the committed records."""

from __future__ import annotations

import functools

import pytest
from PIL import Image

from experiments import readme
from experiments.summary import HERE
from gprune.studies.listing import Listing


def test_every_row_of_the_table_and_the_figure_is_in_its_list():
    drawn = [*readme.SMOLLM2_LINES.values(), *readme.GEMMA_LINES.values()]
    names = functools.cache(lambda path: {row.name for row in Listing.read(HERE / path).rows})
    for path, row, *_ in filter(None, [place for places in (*readme.ROWS.values(), *drawn) for place in places]):
        assert row in names(path), f"{path} has no row {row}"


def test_cells_are_times_dense():
    lines = {line[0]: line[1:] for line in readme.table().rows}
    before, after, *_ = map(float, filter(None, lines["recommended"]))
    assert 1 < after < before
    assert lines["one corpus"][1] is None  # was not trained under this protocol


def test_every_row_has_the_command_that_measures_it():
    printed = readme.work(["--commands"])
    assert 'gprune study experiments/lists/parts.yaml --only "averaged"' in printed
    assert all(f"# {label}: " in printed for label, *_ in readme.table().rows)


@pytest.mark.slow
def test_the_figure_is_small(tmp_path):
    assert readme.work(["--figures", str(tmp_path)]) == f"Drawn: {tmp_path / 'readme.png'}.\n"
    (path,) = tmp_path.iterdir()
    assert path.stat().st_size < 100_000
    with Image.open(path) as picture:
        assert picture.width > 1500
