"""Fixtures for tests of lists: a tiny world, and a finished list of three rows."""

from __future__ import annotations

import pytest

from tests import tiny_run
from tests.studies.workbench import COMPARE, ROWS, Workbench


@pytest.fixture(scope="package")
def bench(tmp_path_factory):
    world = tiny_run.make_world(tmp_path_factory.mktemp("world"))
    folder = tmp_path_factory.mktemp("lists")
    with tiny_run.isolated(folder / "cache"):
        yield Workbench(world, folder)


@pytest.fixture(scope="package")
def first(bench):
    """Return the path of a list of three rows, and the output of its first run."""
    path = bench.write("first", ROWS, about="Three rows", compare=COMPARE)
    return path, bench(path)


@pytest.fixture
def nothing_runs(monkeypatch):
    """Fail if a row is run."""
    for name in ("gprune.prune", "gprune.method.measure.measure_records"):
        monkeypatch.setattr(name, lambda *_, **__: pytest.fail("a row was run"))
