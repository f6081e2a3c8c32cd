"""Lists in W&B: new rows and rows from records, read from offline files with wandb's own reader."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from gprune.config import LoggingConfig
from gprune.studies import runner
from gprune.studies.listing import LISTS, OTHER_RECORDS, Listing
from tests import tiny_run, wandb_files

ROWS = {"base": {"gprune": False}, "no: switch/50 %": {"reliability.switch": False}}


def logged(folder: Path) -> dict[str, SimpleNamespace]:
    """Return the W&B runs below a folder, by the first word of the run id, which is part of the folder's name."""
    files = wandb_files.find(folder)
    return {path.parent.name.split("-")[3].partition("_")[0]: wandb_files.read(path) for path in files}


OFFLINE = ["--", "--logging.mode=offline", "--logging.tags=[mine]"]


@pytest.fixture(scope="module")
def finished_list(bench):
    """Return the path of a finished list, and its W&B runs."""
    path = bench.write("ablations", ROWS)
    with tiny_run.isolated(bench.folder / "cache"):
        bench(path, *OFFLINE)
    return path, logged(bench.records / "ablations")


@pytest.mark.slow
def test_rows_are_wandb_runs_in_the_group_of_their_list_with_settings_and_results(bench, finished_list, nothing_runs):
    path, wandb_runs = finished_list
    assert set(wandb_runs) == {"base", "no"}
    about, config = wandb_runs["no"].about, wandb_runs["no"].config
    assert about["display_name"] == "no  switch 50  , seed 0"
    assert (about["run_group"], about["job_type"], about["project"]) == ("ablations", "gprune", "gprune")
    tags = {"ablations", "no  switch 50  ", "mine", "wanda_sp", "ffn", "target 0.5"}
    assert tags <= set(about["tags"])
    assert config["reliability"]["switch"] is False
    assert "record" not in config
    assert any("learn/loss" in point for point in wandb_runs["no"].history)
    for wandb_run in wandb_runs.values():  # charts of the rows side by side, without one for each corpus
        charts = {name for point in wandb_run.history for name in point if name.startswith("final/")}
        assert charts == {"final/unseen", *(f"final/unseen_{name}" for name in ("agreement", "kl", "over_dense"))}
        perplexities = {name for name in wandb_run.summary if name.startswith("final/perplexity/")}
        assert perplexities == {f"final/perplexity/{name}.txt" for name in ("alpha", "delta", "epsilon")}
    assert "WANDB_DIR" not in os.environ
    assert not list((bench.folder / "runs").glob("*ablations*/wandb"))
    before = sorted((bench.records / "ablations").rglob("*"))
    bench(path, *OFFLINE)
    assert sorted((bench.records / "ablations").rglob("*")) == before  # a finished list is not logged again


@pytest.mark.slow
def test_rows_from_records_are_logged_as_records_with_the_same_numbers(bench, finished_list, nothing_runs, tmp_path):
    path, before = finished_list
    for name in ("ablations", "dense"):
        shutil.copytree(bench.records / name, tmp_path / name, ignore=shutil.ignore_patterns("wandb"))
    arguments = (path, "--records", tmp_path, *OFFLINE, f"--run.dir={tmp_path / 'other'}")
    bench(*arguments, "--logging.mode=disabled")
    assert not (tmp_path / "ablations/wandb").exists()
    bench(*arguments)
    after = logged(tmp_path / "ablations")
    for row in ("base", "no"):
        assert after[row].config["record"] is True
        assert after[row].config["environment"]["git_revision"]
        assert len(after[row].history) == 1
        for name in ("run_id", "display_name", "run_group", "tags", "job_type"):
            assert after[row].about[name] == before[row].about[name]
        final = {name for name in after[row].summary if name.startswith(("final/", "dense/"))}
        assert len(final) > 10
        for name in final:
            assert after[row].summary[name] == pytest.approx(before[row].summary[name], rel=1e-4)
    bench(*arguments, "--sparsity.target=0.5")
    assert logged(tmp_path / "ablations").keys() == after.keys()


@pytest.mark.slow
def test_tables_of_records_do_not_import_wandb(bench, finished_list, monkeypatch):
    for name in ("wandb", "gprune.runs.tracking"):
        monkeypatch.setitem(sys.modules, name, None)  # their import would fail
    bench(finished_list[0], "--table")


def test_names_groups_and_tags_of_rows_are_valid_logging_settings(bench, monkeypatch):
    monkeypatch.setenv("WANDB_TAGS", "a,b")
    rows = bench.rows(bench.write("ablations", ROWS | {"long" * 50: {}}), seeds=[3])
    for row in rows:
        cfg = runner.with_wandb_names(row)
        LoggingConfig(**cfg.logging.model_dump())
        assert cfg.logging.name.endswith(", seed 3")
        assert cfg.logging.tags[2:] == ["a", "b"]
        assert cfg.logging.group == "ablations"
    monkeypatch.setenv("WANDB_RUN_GROUP", "lab")
    assert runner.with_wandb_names(rows[0]).logging.group == "lab"
    assert runner.with_wandb_names(rows[0]).settings() == rows[0].config.settings()


def test_wandb_files_of_shipped_lists_are_not_written_next_to_the_committed_records():
    row = Listing.read(LISTS / "ablations.yaml").rows[0]
    assert runner.wandb_folder(row) == OTHER_RECORDS / "ablations"
