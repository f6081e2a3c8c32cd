"""The list that compares the base metric, averaged scores and gprune, on the corpora of the tiny world."""

from __future__ import annotations

import yaml

from gprune.storage.files import Cache
from gprune.studies.archive import finished_record
from gprune.studies.listing import EXPERIMENTS
from tests.studies.workbench import unseen
from tests.tiny_run import SEEN


def test_rows_of_the_first_look_share_statistics_and_dense_perplexities(bench):
    """Only the first row calibrates and evaluates the dense model; the others find both in the cache."""
    text = (EXPERIMENTS / "first_look.yaml").read_text()
    for name, corpus in zip(("wiki", "web", "python_code"), SEEN, strict=True):
        text = text.replace(name, str(bench.world.corpora[corpus]))
    content = yaml.safe_load(text)
    path = bench.write("first_look", **content, common={"recovery": "least_squares", "corpora.seq_len": 16})
    cached = set(Cache("evaluations").path("").glob("*"))
    out = bench(path)
    first, *others = records = [finished_record(row) for row in bench.rows(path)]
    assert "calibrate" in first["steps"]
    assert not any("calibrate" in record["steps"] for record in others)
    evaluated = set(Cache("evaluations").path("").glob("*")) - cached
    assert len(evaluated) <= len({r["corpus"] for r in first["records"]})  # fewer if an earlier test has evaluated some
    assert all(unseen(record, "dense") == unseen(first, "dense") for record in others)
    assert all({r["stage"] for r in record["records"]} == {"dense", "recovered"} for record in records)
    assert [line.split("|")[1].strip() for line in out.splitlines() if line.startswith("| gprune / ")] == [
        "gprune / base", "gprune / averaged"
    ]  # fmt: skip
