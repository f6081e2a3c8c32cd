"""Records: names and contents of their files, and which of them a row uses."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import gprune
from gprune.errors import UserError
from gprune.models.masks import Masks
from gprune.storage.files import read_json, write_json
from gprune.studies import archive, listing
from gprune.studies.archive import find_record, finished_record
from gprune.studies.runner import run_row
from tests.studies.workbench import ROWS, cells


def rows_of(name: str, output: str) -> list[list[str]]:
    """Return the cells of the lines of a row in all printed tables, without its name."""
    return [cells(line)[1:] for line in output.splitlines() if line.startswith(f"| {name} ")]


@pytest.fixture
def copied(bench, first):
    """Write a list with the row `ours` and the record of the first list's row; return the list, row and record."""

    def copy(name):
        path = bench.write(name, {"ours": ROWS["ours"]})
        (row,) = bench.rows(path)
        record = archive.write_record(row.file, finished_record(bench.rows(first[0])[1]))
        return path, row, record

    return copy


def test_records_are_named_by_list_row_and_seed_and_by_flags_that_change_settings(bench):
    path = bench.write("named", {"It's wanda_sp, 50 %": {}, "x" * 300: {}, "\u00e9" * 300: {}}, seeds=[3])
    rows = bench.rows(path)
    assert rows[0].file == bench.records / "named/It-s-wanda_sp-50-seed3.json"
    assert len({row.file for row in rows}) == 3
    assert all(len(row.file.name.encode()) < 255 for row in rows)
    for flags, folder in (
        (["--sparsity.target=0.4"], "named--sparsity.target=0.4"),
        (["--sparsity.target=0.4", "--recovery=bias"], "named--sparsity.target=0.4--recovery=bias"),
        (["--logging.mode=disabled", "--run.dir=elsewhere"], "named"),
        ([f"--sparsity.target={rows[0].config.sparsity.target}"], "named"),
    ):
        assert {row.file.parent.name for row in bench.rows(path, flags=flags)} == {folder}
    with pytest.raises(UserError, match=r"names with different letters or digits.*; got 'a b'"):
        bench.rows(bench.write("alike", {"a b": {}, "A, b": {}}))


def change_settings(record, **changes):
    """Return a record of other settings. A value that is a dictionary changes entries of a group."""
    settings = record["settings"]
    new = {name: settings[name] | value if isinstance(value, dict) else value for name, value in changes.items()}
    return record | {"settings": settings | new}


def test_a_record_without_a_setting_was_made_with_its_default(copied):
    _, row, record = copied("older")
    settings = {name: value for name, value in record["settings"].items() if name != "ridge"}
    settings["sparsity"] = {n: v for n, v in settings["sparsity"].items() if n != "uniform_width"}
    archive.write_record(row.file, record | {"settings": settings})
    assert finished_record(row) == record


def test_a_record_of_other_settings_is_named_and_run_again_only_on_request(bench, copied):
    path, row, record = copied("changed")
    for changes, words in (
        ({"removed": 1}, "--removed 1, and the row has not set"),
        ({"sparsity": {"epochs": 7}}, "--sparsity.epochs 7, and the row has 1"),
        ({"ridge": 0.5}, "--ridge 0.5, and the row has 0.01"),
    ):
        archive.write_record(row.file, change_settings(record, **changes))
        line = f"Row 'ours', seed 0: The record {row.file} was made with {words}. It is not used; --again runs the row"
        out = bench(path, "--table")
        assert line in out
        assert not rows_of("ours", out)
    assert line in bench(path)
    assert len(gprune.load_study(path, records=bench.records).to_frame()) == 0
    assert rows_of("ours", bench(path, "--again"))
    assert finished_record(row)["settings"] == record["settings"]


def test_a_damaged_record_is_named_and_not_replaced(bench, copied, nothing_runs):
    path, row, _ = copied("damaged")
    content = read_json(row.file)
    for name in ("records", "settings"):
        write_json(row.file, {key: value for key, value in content.items() if key != name})
        assert f"Row 'ours', seed 0: The record {row.file} cannot be read. It is not used; --again" in bench(path)
    copy = row.file.parent / "elsewhere/moved" / row.file.name  # the dense model's numbers are in another folder
    write_json(copy, content)
    with pytest.raises(UserError, match=f"there is no file {copy.parent.parent / 'dense'}"):
        archive.read_record(copy)


def test_a_row_of_another_list_has_its_settings_and_its_record(bench, first, nothing_runs):
    path = bench.write("shares", {"mine": {"row": "first.yaml:ours"}}, common={"ridge": 0.5})
    (row,), owner = bench.rows(path), bench.rows(first[0])[1]
    assert (row.file, row.identity, row.name, row.study) == (owner.file, owner.identity, "mine", "shares")
    mine, ours = (rows_of(name, bench(p, "--table")) for name, p in (("mine", path), ("ours", first[0])))
    assert mine[0][:4] == ours[0][:4]
    flags = ["--ridge=0.4"]
    assert bench.rows(path, flags=flags)[0].file == bench.rows(first[0], flags=flags)[1].file != row.file
    for rows, words in (
        ({"x": {"row": "first.yaml:nobody"}}, "must name a row as LIST.yaml:ROW; got 'first.yaml:nobody'"),
        ({"x": {"row": "ours"}}, "must name a row as LIST.yaml:ROW; got 'ours'"),
        ({"x": {"row": "shares.yaml:mine"}}, "'shares.yaml:mine' has that of another row"),
        ({"x": {"row": "first.yaml:ours", "ridge": 1}}, "The key row must be the only key of a row; got 'ridge' too"),
    ):
        assert words in bench.refused(bench.write("bad", rows))


def test_a_row_that_cannot_be_run_any_more_is_printed_from_its_record_and_names_its_commit(bench, first, nothing_runs):
    """The record has a value and a setting that this version does not have."""
    path = bench.write("gone", {"gone": {"commit": "c0ffee"}})
    (row,), record = bench.rows(path), finished_record(bench.rows(first[0])[1])
    archive.write_record(row.file, change_settings(record, recovery="gone", distill={"former": 1}))
    printed = [rows_of(name, bench(p, "--table")) for name, p in (("gone", path), ("ours", first[0]))]
    assert printed[0][0][:4] == printed[1][0][:4]
    reason = f"cannot be run: its record is {row.file}, made by commit c0ffee. "
    assert f"# Row 'gone', seed 0, {reason}" in bench(path, "--commands")
    for flags in (["--seeds", "1"], ["--", "--ridge=0.5"]):
        assert "only commit c0ffee can run it" in bench.refused(path, *flags)
    with pytest.raises(UserError, match="The key commit must be the only key of a row; got 'ridge' too"):
        bench.rows(bench.write("both", {"gone": {"commit": "c0ffee", "ridge": 1}}))


def test_a_row_that_is_not_trained_has_learned_from_no_tokens(bench, first, tmp_path):
    """Errors of blocks are measured by backward passes, but nothing is trained."""
    settings = {"gprune": False, "sparsity.allocation": "reconstruction", "recovery": "least_squares"}
    (row,) = bench.rows(bench.write("errors", {"errors": settings}), records=tmp_path)
    _, record = run_row(row, {})
    assert record["summary"]["forward_backward_tokens"] > 0
    assert record["summary"]["learned_tokens"] == 0
    learned = finished_record(bench.rows(first[0])[1])
    assert learned["summary"]["learned_tokens"] == learned["steps"]["thresholds"]["forward_backward_tokens"] > 0


def test_committed_records_have_masks_only_if_the_list_asks_for_them(bench, first, monkeypatch):
    monkeypatch.setattr(listing, "LISTS", bench.folder)
    rows = {"plain": ROWS["plain"]}
    (without_masks,) = bench.rows(bench.write("without", rows))
    (with_masks,) = bench.rows(bench.write("of masks", rows, masks=True))
    assert (without_masks.masks, with_masks.masks) == (False, True)
    record = finished_record(bench.rows(first[0])[0])
    for row in (with_masks, without_masks):
        archive.write_record(row.file, record | {"masks": None})
    assert find_record(with_masks).finished is None
    assert finished_record(without_masks)["masks"] is None


SCALARS = st.one_of(st.none(), st.booleans(), st.integers(-5, 5), st.text("ab", max_size=2))
FIELDS = st.fixed_dictionaries(
    {"nll": st.lists(st.integers(0, 3), max_size=3)}, optional={"own": SCALARS, "often": st.just(1)}
)
PLACES = st.lists(st.tuples(st.sampled_from("ab"), st.sampled_from("cd")), max_size=4, unique=True).map(sorted)


@given(data=st.data(), places=PLACES)
def test_folding_stores_common_fields_once_and_unfolding_restores_them(data, places):
    numbers = [{"stage": s, "recovery": "none", "corpus": corpus} | data.draw(FIELDS) for s, corpus in places]
    folded = json.loads(json.dumps(archive.fold_records(numbers)))
    assert archive.unfold_records({"name": "x", "records": folded}, None) == {"name": "x", "records": numbers}
    for stage in folded["stages"]:
        first, *others = stage["each"].values()
        for name, value in first.items():  # no field has the same value in all records of a stage
            assert not others or any(name not in fields or fields[name] != value for fields in others)


@given(data=st.data(), depth=st.integers(1, 4))
def test_unpacking_packed_masks_returns_the_same_masks(data, depth):
    def draw_masks() -> list[torch.Tensor]:
        sizes = [data.draw(st.integers(1, 37)) for _ in range(depth)]
        return [torch.tensor(data.draw(st.lists(st.booleans(), min_size=n, max_size=n))) for n in sizes]

    masks = Masks.of_blocks(draw_masks(), draw_masks())
    unpacked = archive.unpack_masks(json.loads(json.dumps(archive.pack_masks(masks))))
    assert unpacked == masks
    assert all(m.dtype == torch.bool for m in (*unpacked.ffn, *unpacked.attention))
