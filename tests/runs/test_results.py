"""Runs of earlier versions, brought back as what they were."""

from __future__ import annotations

import shutil

import pytest

import gprune
from gprune.config import RETIRED
from gprune.errors import UserError
from gprune.runs.folder import RunFolder
from gprune.runs.results import read_run, with_defaults
from gprune.storage.files import read_json, read_tensors, write_json, write_tensors
from tests import tiny_run


@pytest.fixture(scope="module")
def recovered(tmp_path_factory):
    """A run with recovery, of which the model and all rows are there."""
    folder = tmp_path_factory.mktemp("results")
    with tiny_run.isolated(folder / "cache"), pytest.MonkeyPatch.context() as patch:
        tiny_run.quick(patch)
        world = tiny_run.make_world(folder)
        yield world.run(folder / "runs", "--sparsity.allocation=uniform", "--recovery=bias", "--export=none")


def as_of_before(folder: RunFolder, controls: list[str]) -> None:
    """Settings with these controls, and files without the marks of the run they would not fit any more."""
    manifest, metrics = read_json(folder / "manifest.json"), read_json(folder / "metrics.json")
    manifest["settings"]["evaluation"]["controls"] = controls
    write_json(folder / "manifest.json", manifest)
    write_json(folder / "metrics.json", metrics)
    for path in folder.path.rglob("*.safetensors"):
        write_tensors(path, read_tensors(path))
    config = (folder / "config.yaml").read_text()
    block = "  controls:\n" + "".join(f"  - {name}\n" for name in ("base", "averaged", "unrecovered"))
    assert block in config
    (folder / "config.yaml").write_text(config.replace(block, f"  controls: [{', '.join(controls)}]\n"))


def test_a_run_of_before_unrecovered_had_a_name_asks_for_the_rows_it_holds(recovered, tmp_path):
    assert gprune.load_run(recovered.path).config == recovered.config
    folder = RunFolder(shutil.copytree(recovered.path, tmp_path / "before"))
    as_of_before(folder, ["base", "averaged"])
    back = gprune.load_run(folder.path)
    held = list(dict.fromkeys((r["stage"], r["recovery"]) for r in back.records))
    assert held == [("dense", "none"), *back.config.stages]
    assert back.config == recovered.config
    metrics = read_json(folder / "metrics.json")
    metrics["records"] = [r for r in metrics["records"] if r["stage"] == "dense" or r["recovery"] == "bias"]
    write_json(folder / "metrics.json", metrics)
    assert gprune.load_run(folder.path).config.evaluation.controls == ["base", "averaged"]  # never asked for


def test_a_run_whose_averaged_control_had_its_former_name_is_read(recovered, tmp_path):
    folder = RunFolder(shutil.copytree(recovered.path, tmp_path / "before"))
    as_of_before(folder, ["base", "base_averaged", "unrecovered"])
    metrics = read_json(folder / "metrics.json")
    assert "averaged" in {r["stage"] for r in metrics["records"]}
    for r in metrics["records"]:
        r["stage"] = r["stage"].replace("averaged", "base_averaged")
    write_json(folder / "metrics.json", metrics)
    back = gprune.load_run(folder.path)
    assert back.config == recovered.config
    assert back.records == recovered.records


def with_settings_of_before(folder: RunFolder, settings: dict[str, object]) -> None:
    """More settings of groups, by dotted names, than there are today, in the manifest and in config.yaml."""
    manifest, metrics = read_json(folder / "manifest.json"), read_json(folder / "metrics.json")
    config = (folder / "config.yaml").read_text()
    for name, value in settings.items():
        group, _, leaf = name.partition(".")
        manifest["settings"][group][leaf] = value
        config = config.replace(f"{group}:\n", f"{group}:\n  {leaf}: {value}\n")
    write_json(folder / "manifest.json", manifest)
    write_json(folder / "metrics.json", metrics)
    for path in folder.path.rglob("*.safetensors"):
        write_tensors(path, read_tensors(path))
    (folder / "config.yaml").write_text(config)


def test_settings_that_are_gone_are_ignored_where_they_had_no_effect(recovered, tmp_path):
    folder = RunFolder(shutil.copytree(recovered.path, tmp_path / "before"))
    with_settings_of_before(folder, RETIRED)
    back = gprune.load_run(folder.path)
    assert back.config == recovered.config
    assert back.masks == recovered.masks
    today, before = (read_run(path) for path in (recovered.path, folder.path))
    assert before.all_but_seed == today.all_but_seed  # a seed like the others in a report
    with_settings_of_before(folder, {"sparsity.through": "least_squares"})
    with pytest.raises(UserError, match=r"config\.yaml was altered: .*through"):
        gprune.load_run(folder.path)


def test_settings_that_did_not_exist_then_are_at_their_defaults():
    default = {"a": 1, "group": {"b": 2, "c": [3]}, "new": {"d": 4}}
    assert with_defaults({"a": 5, "group": {"c": [6]}}, default) == {
        "a": 5, "group": {"b": 2, "c": [6]}, "new": {"d": 4},
    }  # fmt: skip
    # but for this one, which is on today and was not there then
    default = {"sparsity": {"centred": True, "target": 0.5}}
    assert with_defaults({"sparsity": {"target": 0.2}}, default) == {"sparsity": {"centred": False, "target": 0.2}}
    assert with_defaults({"sparsity": {"centred": True}}, default) == default


# In a notebook


def test_a_result_shows_itself_in_ten_lines_and_as_tables(recovered):
    shown = repr(recovered).splitlines()
    assert len(shown) <= 10
    assert str(recovered.path) in shown[0]
    assert "50.00% of ffn removed" in shown[1]
    frame, table = recovered.to_frame(), recovered.table()
    assert len(frame) == len(recovered.records)
    assert list(table.index) == [
        "dense",
        "base",
        "averaged",
        "gprune",
        *(f"{n} + bias" for n in ("base", "averaged", "gprune")),
    ]
    first = recovered.records[0]
    assert first["seen"]
    assert table.loc["dense", f"{first['corpus']}*"] == first["perplexity"]
    header, *rows = recovered._repr_markdown_().splitlines()
    assert header.count("|") == 2 + len(table.columns)
    assert len(rows) == 1 + len(table)
    assert recovered._repr_html_().count("<tr") == 1 + len(table)


def test_taking_a_run_up_removes_what_writers_left_and_nothing_of_the_users(recovered, tmp_path):
    folder = RunFolder(shutil.copytree(recovered.path, tmp_path / "copy"), key=None)
    mine = [folder / ".model.backup", folder / "masks/.notes.x.tmp", folder / "model.tmp"]
    left = [folder / ".model.ab12_xyz.tmp", folder / "masks/.base.safetensors.q1w2e3r4.tmp"]
    for path in (*mine, *left):
        path.mkdir()
        (path / "file").touch()
    settings = folder.manifest["settings"]
    with folder.opened(settings, (folder / "config.yaml").read_text()):
        assert all((path / "file").exists() for path in mine)
        assert not any(path.exists() for path in left)
