"""Records: matching with rows, file names and contents."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import gprune
from gprune.config import flatten
from gprune.errors import UserError
from gprune.models.masks import Masks
from gprune.sparsity.allocation import reconstruction
from gprune.storage.files import key_of, read_json, write_json
from gprune.studies import archive, listing
from gprune.studies.archive import finished_record
from gprune.studies.runner import run_row
from tests.studies.workbench import ROWS, cells


@pytest.fixture
def change_stored_defaults(tmp_path, monkeypatch):
    """Function that replaces the stored table of defaults by an edited copy, until the end of the test."""

    def change(edit: Callable[[dict[str, Any]], object]) -> None:
        table = json.loads(archive.DEFAULTS.read_text())
        edit(table)
        (tmp_path / "table.json").write_text(json.dumps(table))
        monkeypatch.setattr(archive, "DEFAULTS", tmp_path / "table.json")
        archive.stored_defaults.cache_clear()

    yield change
    monkeypatch.undo()
    archive.stored_defaults.cache_clear()


def test_a_record_without_newer_settings_matches_a_row_with_their_defaults(bench, first, monkeypatch):
    """A record does not match if one of its settings has another value, or is one that this version does not have."""
    row = bench.rows(first[0])[1]
    record = finished_record(row)
    settings = record["settings"]
    older = {name: value for name, value in settings.items() if name != "ridge"}
    older["sparsity"] = {name: value for name, value in settings["sparsity"].items() if name != "uniform_width"}
    for stored_settings, matches in (
        (older, True), (older | {"ridge": 0.5}, False), (settings | {"removed": 1}, False),
    ):  # fmt: skip
        monkeypatch.setattr(
            archive,
            "read_json",
            lambda path, stored_settings=stored_settings, **_: record | {"settings": stored_settings},
        )
        assert (finished_record(row) == record) == matches


def test_a_changed_default_renames_no_record_and_changes_no_record_that_lacks_the_setting(
    bench, monkeypatch, change_stored_defaults
):
    """A row that names the former default has the record's file. A row with the new default does not match."""
    change_stored_defaults(lambda table: table["sparsity"].update(width_multiple=1))
    former, today = bench.rows(bench.write("former", {"x": {"sparsity.width_multiple": 1}, "x today": {}}))
    name_of_former, name_of_today = (archive.find_record(row)[0].stem for row in (former, today))
    settings = former.config.settings()
    stored = settings | {"sparsity": {n: v for n, v in settings["sparsity"].items() if n != "width_multiple"}}
    monkeypatch.setattr(archive, "read_json", lambda *_, **__: {"settings": stored, "records": [], "masks": None})
    read = archive.read_record(former.records)["settings"]
    assert read["sparsity"] == settings["sparsity"] != today.config.settings()["sparsity"]
    defaults = flatten(archive.stored_defaults())
    changed = {name: value for name, value in flatten(stored).items() if value != defaults.get(name)}
    key = key_of(format=archive.RECORD_FORMAT, settings=changed)[:10]
    assert name_of_former == f"x-seed0-{key}"
    assert not name_of_today.endswith(key)


def test_a_record_without_options_is_that_of_the_options_of_its_time(bench, monkeypatch):
    rows = {"x": {"sparsity.allocation": "reconstruction"}, "strong": {"sparsity.allocation": "reconstruction",
            "sparsity.options.strength": 0.75}, "weak": {"sparsity.allocation": "reconstruction",
            "sparsity.options.strength": 0.5}}  # fmt: skip
    x, strong, weak = bench.rows(bench.write("former", rows))
    settings = x.config.settings()
    stored = settings | {"sparsity": settings["sparsity"] | {"options": {}}}
    monkeypatch.setattr(archive, "read_json", lambda *_, **__: {"settings": stored, "records": [], "masks": None})
    read = archive.read_record(x.records)["settings"]
    assert read["sparsity"] == settings["sparsity"]
    monkeypatch.setitem(reconstruction.__kwdefaults__, "strength", 0.5)
    (today,) = bench.rows(bench.write("today", {"x": rows["x"]}))
    identity = archive.identifying_settings
    assert identity(read) == identity(strong.identity) != identity(today.identity) == identity(weak.identity)


def test_a_setting_that_is_gone_stays_in_its_records_and_only_another_value_than_its_default_identifies_them(
    bench, first, tmp_path, change_stored_defaults
):
    row = bench.rows(first[0])[1]
    path, record = archive.find_record(row)
    change_stored_defaults(lambda table: table["sparsity"].update(former=1))
    assert archive.find_record(row)[0] == path
    for value in (1, 2):
        settings = record["settings"] | {"sparsity": record["settings"]["sparsity"] | {"former": value}}
        archive.write_record(tmp_path / path.name, record | {"settings": settings})
        read = archive.read_record(tmp_path / path.name)
        assert read["settings"] == settings
        assert read["records"] == record["records"]
        same = archive.identifying_settings(settings) == archive.identifying_settings(row.identity)
        assert same == (value == 1)


def test_a_row_of_a_removed_setting_is_printed_from_its_record_and_names_its_commit_instead_of_running(
    bench, first, nothing_runs, capsys
):
    """The record has a value and a setting that this version does not have."""
    path, record = archive.find_record(bench.rows(first[0])[1])  # of the row `ours`
    settings = record["settings"] | {"recovery": "gone", "distill": record["settings"]["distill"] | {"former": 1}}
    stem = "gone-seed0-0123456789"
    made_by = record["environment"] | {"git_revision": "c0ffee"}
    archive.write_record(path.with_stem(stem), record | {"settings": settings, "environment": made_by})
    ours = bench.write("ours", {"plain": ROWS["plain"], "ours": ROWS["ours"]})
    listing = bench.write("gone", {"plain": ROWS["plain"], "gone": {"record": stem}})

    def rows_of(name: str, output: str) -> list[list[str]]:
        return [cells(line)[1:] for line in output.splitlines() if line.startswith(f"| {name} ")]

    assert rows_of("gone", bench(capsys, listing, "--table")) == rows_of("ours", bench(capsys, ours, "--table"))
    ((*_, made, commit),) = rows_of("gone", bench(capsys, listing, "--files"))
    assert (made, commit) == (str(path.with_stem(stem)), "c0ffee")
    frame = gprune.load_study(listing, records=bench.records).to_frame()
    assert set(frame.loc[frame["row"] == "gone", "record"]) == {str(path.with_stem(stem))}
    assert "W&B" in bench(capsys, listing, "--", "--logging.mode=offline")

    reason = f"cannot be run: its record is {path.with_stem(stem)}, made by the commit c0ffee. "
    assert f"# Row 'gone', seed 0, {reason}Settings: Unknown setting 'distill.former'" in bench(
        capsys, listing, "--commands"
    )
    for flags in (["--seeds", "1"], ["--", "--ridge=0.5"]):
        assert reason in bench.refused(capsys, listing, *flags)
        assert "| gone " not in bench(capsys, listing, "--table", *flags)
    with pytest.raises(UserError, match="The key record must be the only key of a row; got 'ridge' too"):
        bench.rows(bench.write("both", {"gone": {"record": stem, "ridge": 1}}))


def test_a_setting_that_the_stored_table_lacks_has_the_default_of_this_version(change_stored_defaults):
    expected = archive.stored_defaults()

    def remove(table: dict[str, Any]) -> None:
        del table["ridge"], table["sparsity"]["epochs"]

    change_stored_defaults(remove)
    assert archive.stored_defaults() == expected


def test_defaults_of_pruning_do_not_identify_a_row_of_a_model_made_elsewhere(bench):
    (row,) = bench.rows(bench.write("elsewhere", {"x": {"model": "some/model"}}))
    settings = row.identity
    other = settings | {"sparsity": settings["sparsity"] | {"width_multiple": 1, "target": 0.3}}
    assert archive.identifying_settings(other) == archive.identifying_settings(settings)
    assert archive.identifying_settings(settings | {"gprune": True}) != archive.identifying_settings(settings)


def test_record_names_contain_row_and_seed_and_differ_only_by_settings(bench, first):
    named = bench.write("named", {"It's another, 50 %": {}}, common={"sparsity.target": 0.4})
    paths = [archive.find_record(row)[0] for path in (first[0], named) for row in bench.rows(path)]
    assert len(set(paths)) == 4
    assert paths[0].name.startswith("plain-seed0-")
    assert paths[3].name.startswith("it-s-another-50-seed0-")
    # A row with another name and an explicit default value has the same settings, so it has the same record.
    (same,) = bench.rows(bench.write("same", {"x": {"gprune": False, "ridge": 0.01}}))
    assert archive.find_record(same)[0] == paths[0]
    for row in bench.rows(bench.write("long", {"x" * 300: {}, "\u00e9" * 300: {}}), records=bench.folder / "new"):
        name = archive.find_record(row)[0].name
        assert len(name.encode()) < 255
        assert "-seed0-" in name


@pytest.mark.parametrize("name", ["settings", "masks", "summary"])
def test_a_record_without_a_required_name_is_ignored_with_its_reason(name, bench, first, tmp_path, caplog):
    content = read_json(archive.find_record(bench.rows(first[0])[1])[0])
    del content[name]
    write_json(tmp_path / "record.json", content)
    assert archive.read_record(tmp_path / "record.json") is None
    assert f"a study record without {name}" in caplog.text


def test_an_edited_record_is_ignored_with_its_reason(bench, first, tmp_path, caplog):
    path, _ = archive.find_record(bench.rows(first[0])[1])
    (tmp_path / path.name).write_text(path.read_text().replace('"ridge":0.01', '"ridge":0.02'))
    assert archive.read_record(tmp_path / path.name) is None
    assert "does not match its checksum" in caplog.text


def test_a_file_that_is_not_the_record_of_the_row_is_never_overwritten(bench, tmp_path):
    (row,) = bench.rows(bench.write("one", {"x": {"gprune": False}}), records=tmp_path)
    path = archive.find_record(row)[0]
    path.parent.mkdir()
    path.write_text(json.dumps({"settings": {"ridge": 0.7}}))
    path.with_stem(f"{path.stem}-1").write_text("{half")
    assert archive.find_record(row)[0] == path.with_stem(f"{path.stem}-2")


def test_learned_tokens_do_not_depend_on_the_cache(bench, first):
    """Tokens of calibration are not counted. Those of calibration are 0 after the first row."""
    record = finished_record(bench.rows(first[0])[1])
    learned = record["summary"]["learned_tokens"]
    assert learned == record["steps"]["thresholds"]["forward_backward_tokens"] > 0
    assert archive.learned_tokens({"learned_tokens": {"thresholds": learned, "recovery/a": 100}}) == learned + 100


def test_a_row_that_is_not_trained_has_learned_from_no_tokens(bench, tmp_path):
    """Errors of blocks are measured by backward passes, but nothing is trained."""
    settings = {"gprune": False, "sparsity.allocation": "reconstruction", "recovery": "least_squares"}
    (row,) = bench.rows(bench.write("errors", {"errors": settings}), records=tmp_path)
    _, record = run_row(row, {})
    assert record["summary"]["forward_backward_tokens"] > 0
    assert record["summary"]["learned_tokens"] == 0


def test_committed_records_have_masks_only_if_the_list_asks_for_them(bench, first, monkeypatch):
    monkeypatch.setattr(listing, "EXPERIMENTS", bench.folder)
    rows = {"plain": ROWS["plain"]}
    (without_masks,) = bench.rows(bench.write("without", rows))
    (with_masks,) = bench.rows(bench.write("of masks", rows, masks=True))
    assert (without_masks.masks, with_masks.masks) == (False, True)
    path = archive.find_record(without_masks)[0]
    record = finished_record(without_masks)
    archive.write_record(path, record | {"masks": None})
    assert finished_record(without_masks) == record | {"masks": None}
    assert finished_record(with_masks) is None  # the record has no masks
    assert archive.find_record(with_masks)[0] == path
    archive.write_record(path, record)
    assert finished_record(with_masks) == record


def test_a_record_is_written_in_short_lines(bench, first):
    """Short lines make `git diff` readable. Only few lines are needed, since numbers share lines."""
    lines = archive.find_record(bench.rows(first[0])[1])[0].read_text().splitlines()
    assert len(lines) < 100
    assert max(map(len, lines)) < archive.LINE_WIDTH + 50


SCALARS = st.one_of(st.none(), st.booleans(), st.integers(-5, 5), st.text("ab", max_size=2))
NUMBERS = st.fixed_dictionaries(
    {"stage": st.sampled_from("ab"), "recovery": st.sampled_from("ab"), "nll": st.lists(st.integers(0, 3), max_size=3)},
    optional={"own": SCALARS, "often": st.just(1)},
)


@given(numbers=st.lists(NUMBERS, max_size=8))
def test_folding_stores_common_fields_once_and_unfolding_restores_them(numbers):
    content = json.loads(json.dumps({"name": "x", "records": archive.fold_records(numbers)}))
    assert archive.unfold_records(content) == {"name": "x", "records": numbers}
    for stage in content["records"]["stages"]:
        first, *others = stage["each"]
        for name, value in first.items():  # no field has the same value in all records of a stage
            assert not others or any(name not in fields or fields[name] != value for fields in others)


@given(data=st.data(), depth=st.integers(1, 4))
def test_unpacking_packed_masks_returns_the_same_masks(data, depth):
    def draw_masks() -> list[torch.Tensor]:
        sizes = [data.draw(st.integers(1, 37)) for _ in range(depth)]
        return [torch.tensor(data.draw(st.lists(st.booleans(), min_size=n, max_size=n))) for n in sizes]

    masks = Masks(draw_masks(), draw_masks())
    unpacked = archive.unpack_masks(json.loads(json.dumps(archive.pack_masks(masks))))
    assert unpacked == masks
    assert all(m.dtype == torch.bool for m in (*unpacked.ffn, *unpacked.attention))
