"""Run folders: display of results, resuming, and runs of older versions."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
from lightning.pytorch.utilities import rank_zero_only

import gprune
from gprune.errors import UserError
from gprune.runs.folder import RunFolder
from gprune.storage.files import read_json, write_json
from tests import tiny_run


@pytest.fixture(scope="module")
def recovered(tmp_path_factory):
    """Return the result of a run with recovery, with its model and all rows."""
    folder = tmp_path_factory.mktemp("results")
    with tiny_run.isolated(folder / "cache"):
        world = tiny_run.make_world(folder)
        yield world.run(folder / "runs", "--sparsity.allocation=uniform", "--recovery=bias", "--export=none")


def test_a_result_has_a_repr_of_at_most_ten_lines_a_table_and_html(recovered):
    shown = repr(recovered).splitlines()
    assert len(shown) <= 10
    assert str(recovered.path) in shown[0]
    assert "50.00% of ffn removed" in shown[1]
    table = recovered.table()
    assert list(table.columns) == ["dense", "pruned", "recovered"]
    first = recovered.records[0]
    assert first["seen"]
    assert table.loc[f"{Path(first['corpus']).name}*", "dense"] == first["perplexity"]
    assert recovered._repr_html_().count("<tr") == 1 + len(table)


def test_resuming_a_run_removes_temporary_files_of_gprune_and_no_user_files(recovered, tmp_path):
    folder = RunFolder(shutil.copytree(recovered.path, tmp_path / "copy"), key=None)
    user_files = [folder / ".model.backup", folder / "statistics/.notes.x.tmp", folder / "model.tmp"]
    temporary_files = [folder / ".model.ab12_xyz.tmp", folder / "statistics/.a.safetensors.q1w2e3r4.tmp"]
    for path in (*user_files, *temporary_files):
        path.mkdir()
        (path / "file").touch()
    temporary_files.append(folder / "statistics/.metrics.json.0123abcd.tmp")
    temporary_files[-1].touch()
    settings = folder.manifest["settings"]
    with folder.in_use(settings, (folder / "config.yaml").read_text()):
        assert all((path / "file").exists() for path in user_files)
        assert not any(path.exists() for path in temporary_files)


def test_each_update_of_the_manifest_stores_the_cost_of_the_running_step(recovered, tmp_path):
    """A killed process does not end its step, so the file must have the cost before."""
    tokens = {"forward_tokens": 0}
    folder = RunFolder(shutil.copytree(recovered.path, tmp_path / "copy"), lambda: dict(tokens))
    with folder.step("long"):
        with folder.part("first"):
            tokens["forward_tokens"] += 7
        assert read_json(folder / "manifest.json")["steps"]["long"]["forward_tokens"] == 7
        tokens["forward_tokens"] += 5
    assert read_json(folder / "manifest.json")["steps"]["long"]["forward_tokens"] == 12
    assert read_json(folder / "manifest.json") == folder.manifest


def test_other_ranks_do_not_write_the_manifest_and_a_folder_that_is_removed_ends_the_run(
    recovered, tmp_path, monkeypatch
):
    folder = RunFolder(shutil.copytree(recovered.path, tmp_path / "copy"), key=None)
    before = read_json(folder / "manifest.json")
    with monkeypatch.context() as patch:
        patch.setattr(rank_zero_only, "rank", 1)
        folder.update_manifest(learned_tokens={"thresholds": 5})
    assert folder.manifest["learned_tokens"]["thresholds"] == 5
    assert read_json(folder / "manifest.json") == before
    with pytest.raises(UserError, match="the file was removed during the run"), folder.step("long"):
        shutil.rmtree(folder.path)
    assert not folder.path.exists()


@pytest.mark.parametrize("former", [{}, {"format": 4}])
def test_a_run_of_another_version_is_refused_in_one_line(recovered, tmp_path, former):
    folder = RunFolder(shutil.copytree(recovered.path, tmp_path / "older"))
    manifest = read_json(folder / "manifest.json")
    del manifest["format"]
    write_json(folder / "manifest.json", manifest | former)
    with pytest.raises(UserError, match=r"not a gprune run, or of another version \(manifest\.json: other format\)\.$"):
        gprune.load_run(folder.path)
    with pytest.raises(UserError, match="it is of another version"), folder.in_use(manifest["settings"], ""):
        pass  # would resume the run


def test_a_run_whose_import_is_missing_is_refused_with_the_import_flag(recovered, tmp_path, monkeypatch):
    """The missing module may register the model family. The message replaces that of transformers about custom code."""
    folder = RunFolder(shutil.copytree(recovered.path, tmp_path / "of a family"))
    (folder / "model").mkdir()
    environment = folder.manifest["environment"] | {"imports": ["no_such_families", "json"]}
    folder.update_manifest(environment=environment)

    def refuse(*_, **__):
        raise ValueError("The repository contains custom code which must be executed")

    monkeypatch.setattr("gprune.runs.results.load_weights", refuse)
    with pytest.raises(UserError) as error:
        gprune.load_run(folder.path)
    message = str(error.value)
    assert "the run imported no_such_families, which may register its model's family" in message
    assert "--import no_such_families" in message
    assert "custom code" not in message
    folder.update_manifest(environment=environment | {"imports": ["json"]})
    with pytest.raises(UserError, match="contains custom code"):
        gprune.load_run(folder.path)


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory can only be reset on Linux")
def test_the_peak_memory_of_a_step_does_not_include_earlier_steps(recovered, tmp_path):
    folder = RunFolder(shutil.copytree(recovered.path, tmp_path / "copy"), key=None)
    (folder / "metrics.json").unlink()  # nothing is recorded for a finished run
    with folder.step("large"), folder.step("inner"):
        b"x" * (300 * 2**20)
    with folder.step("small"):
        pass
    peaks = {name: folder.manifest["steps"][name]["peak_memory_mib"] for name in ("large", "inner", "small")}
    assert peaks["large"] == pytest.approx(peaks["inner"], abs=2)
    assert peaks["small"] < peaks["large"] - 250


def test_seconds_of_an_inner_step_with_another_name_are_not_counted_twice(recovered, tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("gprune.runs.folder.time.monotonic", lambda: now[0])
    folder = RunFolder(shutil.copytree(recovered.path, tmp_path / "copy"), key=None)
    with folder.step("outer"):
        now[0] += 1
        with folder.step("inner"):
            now[0] += 10
        with folder.step("outer"):
            now[0] += 100
    seconds = {name: folder.manifest["steps"][name]["seconds"] for name in ("outer", "inner")}
    assert seconds == {"outer": 101, "inner": 10}
