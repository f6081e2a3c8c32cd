"""The cache: results are computed once and found by their key, and files that cannot be read are computed again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gprune.storage.files import Cache, key_of
from gprune.storage.paths import cache_dir


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("GPRUNE_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("tensors", [False, True])
def test_a_result_is_computed_once_for_its_key_and_again_if_its_file_cannot_be_read(tensors):
    cache = Cache("examples", tensors=tensors)
    computed = []

    def compute() -> dict:
        computed.append(None)
        return {"x": torch.arange(3)} if tensors else {"x": [0, 1, 2]}

    for _ in range(2):
        assert list(cache.get(key_of(shape=1), compute)["x"]) == [0, 1, 2]
    assert len(computed) == 1
    cache.get(key_of(shape=2), compute)
    assert len(computed) == 2
    file = cache.file(key_of(shape=1))
    file.write_bytes(file.read_bytes()[:-3])
    cache.get(key_of(shape=1), compute)
    assert len(computed) == 3
    assert cache.read(key_of(shape=3)) is None


def test_a_folder_is_made_once_and_not_at_all_if_making_it_fails():
    made = []

    def make(folder: Path) -> None:
        folder.mkdir()
        made.append(folder)
        if len(made) == 1:
            raise RuntimeError
        (folder / "a.txt").write_text("a")

    with pytest.raises(RuntimeError):
        Cache("examples").folder("mine", make)
    for _ in range(2):
        assert (Cache("examples").folder("mine", make) / "a.txt").read_text() == "a"
    assert len(made) == 2


def test_the_cache_folder_follows_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_dir() == tmp_path / "cache"  # GPRUNE_CACHE
    monkeypatch.delenv("GPRUNE_CACHE")
    assert cache_dir() == tmp_path / "xdg/gprune"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_dir() == tmp_path / ".cache/gprune"
