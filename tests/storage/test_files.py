"""Files and folders are replaced atomically, and damaged files are detected when they are read."""

from __future__ import annotations

import json
import os
import struct

import pytest

from gprune.errors import UserError
from gprune.storage import files
from gprune.storage.files import locked, read_json, read_tensors, replacing, write_json

KINDS = ("file", "folder")


def put(kind, place, text):
    """Create a file, or a folder with two files."""
    if kind == "folder":
        place.mkdir()
        (place / f"{text}.txt").write_text(text)
        place = place / "content.txt"
    place.write_text(text)


def content_of(kind, place):
    return (place / "content.txt" if kind == "folder" else place).read_text()


@pytest.mark.parametrize("kind", KINDS)
def test_replacing_leaves_only_the_new_file_or_folder(kind, tmp_path):
    path = tmp_path / "deep" / "thing"
    for text in ("old", "new"):
        with replacing(path) as place:
            assert place.name == "thing"
            assert not place.exists()
            put(kind, place, text)
        assert content_of(kind, path) == text
        assert list(path.parent.iterdir()) == [path]
    assert kind == "file" or not (path / "old.txt").exists()


@pytest.mark.parametrize("error", [RuntimeError("ours"), KeyboardInterrupt(), SystemExit(143)])
@pytest.mark.parametrize("kind", KINDS)
def test_an_exception_while_writing_keeps_the_old_content(kind, error, tmp_path):
    put(kind, tmp_path / "thing", "old")
    with pytest.raises(type(error)), replacing(tmp_path / "thing") as place:  # noqa: PT012
        put(kind, place, "half")
        raise error
    assert content_of(kind, tmp_path / "thing") == "old"
    assert list(tmp_path.iterdir()) == [tmp_path / "thing"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fails_at", [1, 2])
def test_a_failed_rename_restores_the_old_content(kind, fails_at, tmp_path, monkeypatch):
    """Replacing a file is one rename, replacing a folder two."""
    put(kind, tmp_path / "thing", "old")
    num_renames = 1 if kind == "file" else 2
    fail_renames(monkeypatch, {min(fails_at, num_renames)})
    with pytest.raises(UserError, match=r"Cannot write .*thing: No space left"), replacing(tmp_path / "thing") as place:
        put(kind, place, "new")
    assert content_of(kind, tmp_path / "thing") == "old"
    assert list(tmp_path.iterdir()) == [tmp_path / "thing"]


def fail_renames(monkeypatch, numbers):
    """Make the renames with these numbers fail, counted from 1."""
    calls, replace = [], os.replace

    def failing(source, target):
        calls.append(source)
        if len(calls) in numbers:
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(files.os, "replace", failing)


def test_a_folder_that_could_not_be_restored_is_restored_by_the_next_write(tmp_path, monkeypatch):
    """The state is the same as after a kill between the two renames. Also a write that fails restores the folder."""
    put("folder", tmp_path / "thing", "old")
    with monkeypatch.context() as patch, pytest.raises(UserError, match="Cannot write"):  # noqa: PT012
        fail_renames(patch, {2, 3})
        with replacing(tmp_path / "thing") as place:
            put("folder", place, "new")
    assert not (tmp_path / "thing").exists()
    with pytest.raises(RuntimeError), replacing(tmp_path / "thing"):
        raise RuntimeError
    assert content_of("folder", tmp_path / "thing") == "old"
    assert list(tmp_path.iterdir()) == [tmp_path / "thing"]


def test_a_file_replaces_no_folder_and_a_symbolic_link_but_not_its_target(tmp_path):
    put("folder", tmp_path / "thing", "old")
    with pytest.raises(UserError, match="Cannot write"), replacing(tmp_path / "thing") as place:
        place.write_text("new")
    assert content_of("folder", tmp_path / "thing") == "old"
    (tmp_path / "outside").write_text("precious")
    (tmp_path / "a.json").symlink_to(tmp_path / "outside")
    write_json(tmp_path / "a.json", {"x": 1})
    assert (tmp_path / "outside").read_text() == "precious"
    assert not (tmp_path / "a.json").is_symlink()


def test_temporary_folders_of_killed_writers_of_the_same_file_are_removed_and_locked_ones_are_kept(tmp_path):
    # `alive` is locked by another writer of a.json. `other_file` belongs to b.json, which is not written here.
    dead, alive, other_file = (tmp_path / f".{name}.tmp" for name in ("a.json.dead", "a.json.alive", "b.json.dead"))
    for folder in (dead, alive, other_file):
        folder.mkdir()
        (folder / "a.json").write_text("half")
    with locked(alive):
        with replacing(tmp_path / "a.json") as place:
            place.write_text("new")
        assert sorted(tmp_path.iterdir()) == sorted([tmp_path / "a.json", alive, other_file])
    assert (tmp_path / "a.json").read_text() == "new"


def test_a_json_file_that_two_processes_write_at_once_is_complete_at_every_moment(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"x": 0, "filler": "x" * 10_000})
    child = os.fork()
    if child == 0:
        try:
            for x in range(100):
                write_json(path, {"x": x, "filler": "x" * 10_000})
            os._exit(0)
        finally:  # the child must never return from here
            os._exit(1)
    while not (ended := os.waitpid(child, os.WNOHANG))[0]:
        write_json(path, {"x": -1, "filler": "x" * 10_000})
        assert read_json(path) is not None
    assert os.waitstatus_to_exitcode(ended[1]) == 0
    assert list(tmp_path.iterdir()) == [path]


# --- reading unreadable files


def safetensors_file(header: object, payload: bytes = bytes(8), length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + payload


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
INVALID_FILES = [  # a length without end, a list, a deep header, a terabyte, a shape that overflows, a dtype
    safetensors_file({}, length=2**63),
    safetensors_file([1]),
    safetensors_file(b"[" * 100_000),
    safetensors_file({"a": ENTRY | {"shape": [2**38], "data_offsets": [0, 2**40]}}),
    safetensors_file({"a": ENTRY | {"shape": [2**40, 2**40]}}),
    safetensors_file({"a": ENTRY | {"dtype": "F4096"}}),
]


def test_safetensors_files_with_invalid_headers_read_as_none(tmp_path):
    for number, content in enumerate(INVALID_FILES):
        (tmp_path / "a.safetensors").write_bytes(content)
        assert read_tensors(tmp_path / "a.safetensors") is None, number
