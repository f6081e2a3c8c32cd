"""Records: which row each is of, under what name, and what their files hold."""

from __future__ import annotations

import json

import torch
from hypothesis import given
from hypothesis import strategies as st

from gprune.models.masks import Masks
from gprune.studies import archive, listing
from gprune.studies.archive import finished_record
from tests.studies.workbench import ROWS


def test_new_settings_at_their_default_leave_records_what_they_were(bench, first, monkeypatch):
    """And a default that has changed since does not: its record was made with the old one."""
    row = bench.rows(first[0])[1]
    record = finished_record(row)
    settings = record["settings"]
    older = {name: value for name, value in settings.items() if name != "ridge"}
    older["sparsity"] = {name: value for name, value in settings["sparsity"].items() if name != "width_multiple"}
    absolute = {"distill": {"learning_rate": settings["distill"]["learning_rate"]}}  # of a version that had no others
    for there, counts in (
        (older, True), (older | {"ridge": 0.5}, False), (settings | {"gone": 1}, False), (older | absolute, False),
    ):  # fmt: skip
        monkeypatch.setattr(archive, "read_json", lambda path, there=there, **_: record | {"settings": there})
        assert (finished_record(row) == record) == counts


def test_records_are_named_for_people_and_told_apart_by_settings(bench, first):
    named = bench.write("named", {"It's another, 50 %": {}}, common={"sparsity.target": 0.4})
    paths = [archive.find_record(row)[0] for path in (first[0], named) for row in bench.rows(path)]
    assert len(set(paths)) == 4
    assert paths[0].name.startswith("plain-seed0-")
    assert paths[3].name.startswith("it-s-another-50-seed0-")
    (same,) = bench.rows(bench.write("same", {"x": {"gprune": False, "ridge": 0.01}}))
    assert archive.find_record(same)[0] == paths[0]  # by another name, with a default written out
    for row in bench.rows(bench.write("long", {"x" * 300: {}, "\u00e9" * 300: {}}), records=bench.folder / "new"):
        name = archive.find_record(row)[0].name
        assert len(name.encode()) < 255
        assert "-seed0-" in name


def test_a_file_that_is_no_record_of_the_row_is_never_the_place_of_its_record(bench, tmp_path):
    (row,) = bench.rows(bench.write("one", {"x": {"gprune": False}}), records=tmp_path)
    place = archive.find_record(row)[0]
    place.parent.mkdir()
    place.write_text(json.dumps({"settings": {"ridge": 0.7}}))
    place.with_stem(f"{place.stem}-1").write_text("{half")
    assert archive.find_record(row)[0] == place.with_stem(f"{place.stem}-2")


def test_tokens_that_a_row_learned_from_do_not_depend_on_what_the_cache_had(bench, first):
    """Those of scores, which the first row alone pays for, and of controls are left out."""
    record = finished_record(bench.rows(first[0])[1])
    own = record["summary"]["learned_tokens"]
    assert own == record["steps"]["thresholds"]["forward_backward_tokens"] > 0
    more = {name: {"forward_backward_tokens": 100} for name in ("calibrate", "evaluate", "shrink")}
    assert archive.learned_tokens(record["steps"] | more) == own + 100


def test_the_repository_keeps_masks_where_the_list_says_so(bench, first, monkeypatch):
    monkeypatch.setattr(listing, "EXPERIMENTS", bench.folder)
    one = {"plain": ROWS["plain"]}
    (plain,) = bench.rows(bench.write("without", one))
    (wanted,) = bench.rows(bench.write("of masks", one, masks=True))
    assert (plain.masks, wanted.masks) == (False, True)
    record = finished_record(plain)
    archive.write_record(archive.find_record(plain)[0], record | {"masks": None})
    assert finished_record(plain) == record | {"masks": None}
    assert finished_record(wanted) is None  # there is a record, but without masks
    assert archive.find_record(wanted)[0] == archive.find_record(plain)[0]
    archive.write_record(archive.find_record(plain)[0], record)
    assert finished_record(wanted) == record


def test_a_record_is_short_lines(bench, first):
    """So that people and `git diff` can read it."""
    lines = archive.find_record(bench.rows(first[0])[1])[0].read_text().splitlines()
    assert len(lines) < 100
    assert max(map(len, lines)) < archive.WIDTH + 50


SCALARS = st.one_of(st.none(), st.booleans(), st.integers(-5, 5), st.text("ab", max_size=2))
NUMBERS = st.fixed_dictionaries(
    {"stage": st.sampled_from("ab"), "recovery": st.sampled_from("ab"), "nll": st.lists(st.integers(0, 3), max_size=3)},
    optional={"own": SCALARS, "often": st.just(1)},
)


@given(numbers=st.lists(NUMBERS, max_size=8))
def test_what_is_the_same_in_several_numbers_is_kept_once_and_comes_back(numbers):
    content = json.loads(json.dumps({"name": "x", "records": archive.folded(numbers)}))
    assert archive.unfolded(content) == {"name": "x", "records": numbers}
    for stage in content["records"]["stages"]:
        assert len(stage["each"]) < 2 or not any(
            all(name in own and own[name] == value for own in stage["each"]) for name, value in stage["each"][0].items()
        )


@given(data=st.data(), depth=st.integers(1, 4))
def test_packed_masks_come_back(data, depth):
    def drawn() -> list[torch.Tensor]:
        sizes = [data.draw(st.integers(1, 37)) for _ in range(depth)]
        return [torch.tensor(data.draw(st.lists(st.booleans(), min_size=n, max_size=n))) for n in sizes]

    masks = Masks(drawn(), drawn())
    again = archive.unpacked(json.loads(json.dumps(archive.packed(masks))))
    assert again == masks
    assert all(m.dtype == torch.bool for m in (*again.ffn, *again.attention))
