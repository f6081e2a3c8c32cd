"""A file or a folder is there whole or not at all, and what stood in its place stays until then."""

from __future__ import annotations

import os

import pytest

from gprune.errors import UserError
from gprune.storage import files
from gprune.storage.files import replacing

KINDS = ("file", "folder")


def put(kind, place, text):
    """A file, or a folder with two files."""
    if kind == "folder":
        place.mkdir()
        (place / f"{text}.txt").write_text(text)
        place = place / "content.txt"
    place.write_text(text)


def said(kind, place):
    return (place / "content.txt" if kind == "folder" else place).read_text()


@pytest.mark.parametrize("kind", KINDS)
def test_the_new_one_takes_the_place_of_the_old_one_and_nothing_else_is_left(kind, tmp_path):
    path = tmp_path / "deep" / "thing"
    for text in ("old", "new"):
        with replacing(path) as place:
            assert place.name == "thing"
            assert not place.exists()
            put(kind, place, text)
        assert said(kind, path) == text
        assert list(path.parent.iterdir()) == [path]
    assert kind == "file" or not (path / "old.txt").exists()


@pytest.mark.parametrize("error", [RuntimeError("ours"), KeyboardInterrupt(), SystemExit(143)])
@pytest.mark.parametrize("kind", KINDS)
def test_what_breaks_off_leaves_the_old_one(kind, error, tmp_path):
    put(kind, tmp_path / "thing", "old")
    with pytest.raises(type(error)), replacing(tmp_path / "thing") as place:  # noqa: PT012
        put(kind, place, "half")
        raise error
    assert said(kind, tmp_path / "thing") == "old"
    assert list(tmp_path.iterdir()) == [tmp_path / "thing"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fails_at", [1, 2])
def test_an_exchange_that_fails_puts_the_old_one_back(kind, fails_at, tmp_path, monkeypatch):
    """A file is exchanged by one rename, a folder by two."""
    put(kind, tmp_path / "thing", "old")
    fail_renames(monkeypatch, {min(fails_at, 1 if kind == "file" else 2)})
    with pytest.raises(UserError, match=r"Cannot write .*thing: No space left"), replacing(tmp_path / "thing") as place:
        put(kind, place, "new")
    assert said(kind, tmp_path / "thing") == "old"
    assert list(tmp_path.iterdir()) == [tmp_path / "thing"]


def fail_renames(monkeypatch, which):
    """Let the renames of these numbers fail."""
    calls, replace = [], os.replace

    def failing(source, target):
        calls.append(source)
        if len(calls) in which:
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(files.os, "replace", failing)


def test_what_cannot_be_put_back_at_once_is_kept_and_put_back_by_the_next_write(tmp_path, monkeypatch):
    put("folder", tmp_path / "thing", "old")
    with monkeypatch.context() as patch, pytest.raises(UserError, match="Cannot write"):  # noqa: PT012
        fail_renames(patch, {2, 3})
        with replacing(tmp_path / "thing") as place:
            put("folder", place, "new")
    assert not (tmp_path / "thing").exists()
    with pytest.raises(RuntimeError), replacing(tmp_path / "thing"):
        raise RuntimeError
    assert said("folder", tmp_path / "thing") == "old"
    assert list(tmp_path.iterdir()) == [tmp_path / "thing"]


def test_a_folder_lost_by_a_kill_in_the_middle_of_the_exchange_comes_back(tmp_path):
    """As it lies after a kill between the two renames: the old one in the scratch folder, nothing in its place."""
    scratch = tmp_path / ".thing.dead.tmp"
    scratch.mkdir()
    put("folder", scratch / files.OLD, "old")
    put("folder", scratch / "thing", "new")
    with pytest.raises(RuntimeError), replacing(tmp_path / "thing"):  # noqa: PT012
        assert said("folder", tmp_path / "thing") == "old"
        raise RuntimeError
    assert said("folder", tmp_path / "thing") == "old"
    assert list(tmp_path.iterdir()) == [tmp_path / "thing"]


def test_a_file_never_takes_the_place_of_a_folder(tmp_path):
    put("folder", tmp_path / "thing", "old")
    with pytest.raises(UserError, match="Cannot write"), replacing(tmp_path / "thing") as place:
        place.write_text("new")
    assert said("folder", tmp_path / "thing") == "old"
