"""Truncated, altered and foreign files, full disks, neighbours, vanished text, clocks that jump: noticed, said in one
line, computed again or refused, never used in silence."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import sys
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch

from gprune.errors import UserError
from gprune.pipeline import prune as pipeline
from gprune.pipeline import run as opening
from gprune.runs.results import load_run
from gprune.storage import files as artifacts
from gprune.storage.files import read_json, read_tensors, write_json, write_tensors
from tests import tiny_run
from tests.pipeline.kills import digests, left_behind


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return tiny_run.make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(autouse=True)
def _in_process(monkeypatch):
    tiny_run.quick(monkeypatch)


@pytest.fixture(scope="module")
def whole(world, tmp_path_factory):
    """A folder with an undisturbed run in `runs/run` and its cache in `cache`; never written to again."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch, tiny_run.isolated(folder / "cache"):
        tiny_run.quick(patch)
        world.run(folder / "runs", "--export=none")
    return folder


@pytest.fixture
def copied(whole, tmp_path):
    """A copy of it, with its cache in use."""
    for name in ("runs", "cache"):
        shutil.copytree(whole / name, tmp_path / name)
    with tiny_run.isolated(tmp_path / "cache"):
        yield tmp_path


def again(world, folder, *flags, name="run"):
    """Exit code of the same run, started once more."""
    return tiny_run.main(world.args(folder / "runs", "--export=none", *flags, name=name))


# --- what one file may have gone through -------------------------------------------------------------------------


def truncated(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def emptied(file: Path) -> None:
    file.write_bytes(b"")


def one_bit(file: Path) -> None:
    """The lowest bit of a byte in the payload: in JSON of the first digit of a number, so that it still parses.

    Of the last digit it may change nothing: a float of 17 digits is the same with 8 and with 9 at its end.
    """
    content = bytearray(file.read_bytes())
    digits = [found.start() for found in re.finditer(rb"(?<![\w.+-])[2468]", content)]
    place = len(content) - 3 if file.suffix == ".safetensors" else digits[len(digits) // 2]
    content[place] ^= 1
    file.write_bytes(content)


def text(file: Path) -> None:
    file.write_text("No number in here.")


def of_another_name(file: Path) -> None:
    """A sound file of ours with other content, which somebody gave this name."""
    if file.suffix == ".safetensors":
        tensors = safetensors.torch.load_file(file)
        write_tensors(file.with_name("x.safetensors"), {name: t.flip(0) for name, t in tensors.items() if t.ndim} | {
            name: t for name, t in tensors.items() if not t.ndim})  # fmt: skip
        os.replace(file.with_name("x.safetensors"), file)
    else:
        content = json.loads(file.read_text())
        content.pop("checksum")
        write_json(file.with_name("x.json"), content)
        os.replace(file.with_name("x.json"), file)


DAMAGES = [truncated, emptied, one_bit, text, of_another_name]
FILES = {  # what is computed again, and from which folder
    "statistics in the cache": ("cache/statistics", "*.safetensors"),
    "dense perplexity in the cache": ("cache/evaluations", "*.json"),
    "assignment": ("runs/run", "assignment.safetensors"),
    "thresholds": ("runs/run", "thresholds.safetensors"),
    "modules": ("runs/run", "modules.safetensors"),
    "statistics": ("runs/run/statistics", "*.safetensors"),
    "masks": ("runs/run/masks", "*.safetensors"),
    "metrics": ("runs/run", "metrics.json"),
}


def test_every_damage_to_every_file_is_noticed_by_the_readers(whole, tmp_path, caplog):
    for folder, pattern in FILES.values():
        for file in sorted((whole / folder).glob(pattern)):
            read = read_tensors if file.suffix == ".safetensors" else read_json
            assert read(file) is not None
            for damage in DAMAGES:
                copy = tmp_path / damage.__name__ / file.name
                copy.parent.mkdir(exist_ok=True)
                shutil.copy(file, copy)
                damage(copy)
                caplog.clear()
                assert read(copy) is None, (file, damage)
                (line,) = [record.getMessage() for record in caplog.records]
                assert str(copy) in line
                assert "not usable" in line
                assert "\n" not in line


@pytest.mark.parametrize("damage", [one_bit, of_another_name])  # the others are noticed by the same two readers
def test_damaged_files_are_computed_again_to_the_same_bits(damage, copied, world, whole, capsys):
    """All files at once: whatever of them is read is said to be damaged, and all of them are as they were."""
    for folder, pattern in FILES.values():
        for file in (copied / folder).glob(pattern):
            damage(file)
    assert again(world, copied) == 0
    assert "not usable" in capsys.readouterr().out
    assert digests(copied / "runs/run") == digests(whole / "runs/run")


def test_every_bit_of_a_small_file_counts(tmp_path):
    """But for the name of the checksum itself, without which content is taken as it is, unchanged."""
    content = {"records": [{"nll": 3.25, "corpus": "wiki"}], "tokens": 12}
    write_json(tmp_path / "a.json", content)
    good = (tmp_path / "a.json").read_bytes()
    for place in range(8 * len(good)):
        bad = bytearray(good)
        bad[place // 8] ^= 1 << place % 8
        (tmp_path / "a.json").write_bytes(bad)
        found = read_json(tmp_path / "a.json")
        assert found in (None, content) or {k: v for k, v in found.items() if k in content} == content
    write_tensors(tmp_path / "a.safetensors", {"x": torch.arange(5.0)})
    good = (tmp_path / "a.safetensors").read_bytes()
    for place in range(0, 8 * len(good), 3):
        bad = bytearray(good)
        bad[place // 8] ^= 1 << place % 8
        (tmp_path / "a.safetensors").write_bytes(bad)
        found = read_tensors(tmp_path / "a.safetensors")
        assert found is None or (found.keys() == {"x"} and torch.equal(found["x"], torch.arange(5.0)))


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_manifest_is_refused_in_one_line(damage, copied, world, capsys):
    file = copied / "runs/run/manifest.json"
    damage(file)
    before = file.read_bytes()
    assert again(world, copied) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "manifest.json is damaged" in line
    assert "--run.name" in line
    assert file.read_bytes() == before
    with pytest.raises(UserError, match="is no run of gprune's"):
        load_run(copied / "runs/run")


@pytest.mark.parametrize("content", ["[]", "3", '{"settings": 3}', '{"settings": {}, "steps": []}', '{"steps": {}}',
                                     '{"settings": {}, "steps": {"a": {"seconds": "x"}}}', "[" * 100_000])  # fmt: skip
def test_a_manifest_that_is_something_else_is_refused(content, copied, world, capsys):
    (copied / "runs/run/manifest.json").write_text(content)
    assert again(world, copied) == 2
    assert "manifest.json is damaged" in capsys.readouterr().err


def test_a_manifest_that_vanishes_while_the_run_goes_on_stops_it(copied, world, capsys, monkeypatch):
    (copied / "runs/run/thresholds.safetensors").unlink()
    learn = pipeline.learn_sparsity
    monkeypatch.setattr(
        pipeline, "learn_sparsity", lambda *a, **k: (copied / "runs/run/manifest.json").unlink() or learn(*a, **k)
    )
    assert again(world, copied) == 2
    assert "manifest.json vanished" in capsys.readouterr().err


def test_altered_settings_are_put_right_by_the_run_and_refused_by_load_run(copied, world):
    file = copied / "runs/run/config.yaml"
    good = file.read_text()
    file.write_text(good.replace("target: 0.5", "target: 0.4"))
    with pytest.raises(UserError, match=r"config\.yaml was altered: sparsity\.target: 0\.5 there, 0\.4 here"):
        load_run(copied / "runs/run")
    for content in ("sparsity: {target: half}", "nonsense: 1", "[", ""):
        file.write_text(content)
        with pytest.raises(UserError):
            load_run(copied / "runs/run")
    assert again(world, copied) == 0
    assert "target: 0.5\n" in file.read_text()
    load_run(copied / "runs/run")


def test_files_of_another_run_are_not_taken_for_this_ones(copied, world, whole, capsys):
    """Sound files under the right names, made with another seed."""
    assert again(world, copied, "--run.seed=1", name="other") == 0
    own, other = copied / "runs/run", copied / "runs/other"
    for name in ("assignment.safetensors", "thresholds.safetensors", "modules.safetensors", "metrics.json"):
        assert (own / name).read_bytes() != (other / name).read_bytes()
        shutil.copy(other / name, own / name)
    with pytest.raises(UserError, match="is not finished"):
        load_run(own)
    capsys.readouterr()
    assert again(world, copied) == 0
    assert capsys.readouterr().out.count("it belongs to another run") >= 3
    assert digests(own) == digests(whole / "runs/run")


def test_masks_that_are_sound_but_others_are_refused(copied, world, capsys):
    file = copied / "runs/run/masks/gprune.safetensors"
    write_tensors(file, {name: ~t for name, t in read_tensors(file).items()})
    assert again(world, copied) == 2
    assert "holds other masks" in capsys.readouterr().err


def test_a_run_without_what_its_settings_leave_is_refused_by_load_run(copied):
    file = copied / "runs/run/modules.safetensors"
    write_tensors(file, {"block_agreement": torch.zeros(3)})
    with pytest.raises(UserError, match="lacks what a run of its settings leaves"):
        load_run(copied / "runs/run")


@pytest.mark.parametrize("damage", [truncated, one_bit, text])
def test_a_damaged_model_folder_is_noticed_and_written_again(damage, world, tmp_path):
    with tiny_run.isolated(tmp_path / "cache"):
        world.run(tmp_path / "runs")
        expected = digests(tmp_path / "runs/run")
        damage(tmp_path / "runs/run/model/model.safetensors")
        with pytest.raises(UserError, match="is not what the run left there"):
            load_run(tmp_path / "runs/run")
        world.run(tmp_path / "runs")
    assert digests(tmp_path / "runs/run") == expected


def test_a_model_that_is_saved_again_leaves_no_hash_of_files_that_are_gone(world, tmp_path):
    with tiny_run.isolated(tmp_path / "cache"):
        run = world.run(tmp_path / "runs").path
        manifest = read_json(run / "manifest.json")
        manifest["model"]["of_another_version.json"] = "0" * 16
        write_json(run / "manifest.json", manifest)
        with pytest.raises(UserError, match="is not what the run left there"):
            load_run(run)
        shutil.rmtree(run / "model")
        world.run(tmp_path / "runs")
    assert load_run(run).model is not None


# --- disks ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("limit", [100, 9_000, 60_000])
def test_a_limit_on_file_sizes_stops_the_run_in_one_line_and_without_it_the_run_ends(
    limit, world, tmp_path, whole, monkeypatch
):
    """The system's own refusal (EFBIG) to write more than so many bytes, wherever in the libraries that happens.

    The largest limit stops the figures, which are drawn here for that.
    """
    monkeypatch.undo()
    tiny_run.quick(monkeypatch, draw=True)
    with tiny_run.isolated(tmp_path / "cache"):
        said = os.pipe()
        child = os.fork()
        if child == 0:
            sys.stderr, sys.stdout = os.fdopen(said[1], "w"), open(os.devnull, "w")  # noqa: SIM115
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
            code = again(world, tmp_path)
            sys.stderr.flush()
            os._exit(code)
        assert exit_code(child) == 2
        os.close(said[1])
        (line,) = os.read(said[0], 10_000).decode().splitlines()
        assert line.startswith("train.py: ")
        assert "too large" in line
        assert not left_behind(tmp_path)
        assert again(world, tmp_path) == 0
        assert digests(tmp_path / "runs/run") == digests(whole / "runs/run")


def test_what_killed_writers_left_goes_with_the_next_write_and_what_others_write_stays(tmp_path):
    path = tmp_path / "a.json"
    dead, alive = tmp_path / ".a.json.dead.tmp", tmp_path / ".a.json.alive.tmp"
    other = tmp_path / ".b.json.dead.tmp"
    for folder in (dead, alive, other):
        folder.mkdir()
        (folder / "a.json").write_text("half")
    with artifacts.locked(alive):
        write_json(path, {"x": 1})
        assert sorted(tmp_path.iterdir()) == sorted([path, alive, other])
    assert read_json(path) == {"x": 1}


# --- neighbours ----------------------------------------------------------------------------------------------------


def forked(call) -> int:
    """The id of a child that ends with the exit code `call` returns, and says nothing."""
    child = os.fork()
    if child == 0:
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
        os._exit(call())
    return child


def exit_code(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.slow
def test_runs_that_share_a_cache_at_once_have_the_bits_of_runs_alone(world, tmp_path, whole):
    with tiny_run.isolated(tmp_path / "cache"):
        children = [forked(lambda n=n: again(world, tmp_path, name=n)) for n in ("a", "b", "c")]
        assert [exit_code(child) for child in children] == [0, 0, 0]
    for name in ("a", "b", "c"):
        assert digests(tmp_path / "runs" / name) == digests(whole / "runs/run")
    for folder in ("statistics", "evaluations"):
        files = {file.name: file.read_bytes() for file in (tmp_path / "cache" / folder).iterdir()}
        assert files == {file.name: file.read_bytes() for file in (whole / "cache" / folder).iterdir()}


def test_a_folder_in_use_is_refused_and_free_when_its_process_is_killed(copied, world, capsys):
    ready, done = os.pipe(), os.pipe()

    def hold() -> int:
        with artifacts.locked(copied / "runs/run"):
            os.write(ready[1], b"x")
            os.read(done[0], 1)
        return 0

    child = forked(hold)
    os.read(ready[0], 1)
    assert again(world, copied) == 2
    assert "Another process is working in" in capsys.readouterr().err
    os.kill(child, 9)
    assert exit_code(child) == -9
    assert again(world, copied) == 0


# --- text that vanishes, clocks that jump ----------------------------------------------------------------------------


@pytest.mark.parametrize("when", ["check", "load", "calibrate"])
def test_a_mirror_that_vanishes(when, world, tmp_path, monkeypatch, capsys):
    """Between looking it up and reading it, the run is refused; once it has been read, nobody misses it."""
    mirror = tmp_path / "data/corpora/mine"
    mirror.mkdir(parents=True)
    shutil.copy(world.corpora["beta"], mirror / "train.txt")
    monkeypatch.setenv("GPRUNE_DATA_DIR", str(tmp_path / "data"))
    place = pipeline if when == "calibrate" else opening
    step = getattr(place, when)

    def vanish(*args, **kwargs):
        result = step(*args, **kwargs)
        shutil.rmtree(tmp_path / "data", ignore_errors=True)
        return result

    with tiny_run.isolated(tmp_path / "cache", GPRUNE_DATA_DIR=str(tmp_path / "data")):
        monkeypatch.setattr(place, when, vanish)
        code = again(world, tmp_path, "--gprune=false", "--corpora.score=mine")
        assert code == (0 if when == "calibrate" else 2)
        err = capsys.readouterr().err
        assert ("'mine'" in err) == (code == 2)
        assert again(world, tmp_path, "--gprune=false", "--corpora.score=mine") == 2  # it is not there any more


def test_text_that_vanishes_between_two_looks_is_one_line(tmp_path, monkeypatch):
    from gprune.corpora import files as textfiles

    folder = tmp_path / "corpus"
    folder.mkdir()
    (folder / "train.txt").write_text("text")
    with monkeypatch.context() as patch:
        patch.setattr(textfiles, "text_files", lambda path: [])
        with pytest.raises(UserError, match="vanished"):
            textfiles.load_files(folder, "train")
    listed = textfiles.text_files(folder)
    shutil.rmtree(folder)
    with monkeypatch.context() as patch:
        patch.setattr(textfiles, "text_files", lambda path: listed)
        with pytest.raises(UserError, match=r"train\.txt' cannot be read"):
            textfiles.load_files(folder, "train")
    monkeypatch.setattr(Path, "is_dir", lambda self: True)  # it was there a moment ago
    assert textfiles.text_files(folder) == []


def test_a_clock_that_jumps_back_all_the_time_changes_nothing(world, tmp_path, whole, monkeypatch):
    now = time.time()
    ticks = iter(range(10**9))
    monkeypatch.setattr(time, "time", lambda: now - 3600 * next(ticks))
    with tiny_run.isolated(tmp_path / "cache"):
        assert again(world, tmp_path) == 0
    assert digests(tmp_path / "runs/run") == digests(whole / "runs/run")
    manifest = read_json(tmp_path / "runs/run/manifest.json")
    assert all(0 <= step["seconds"] < 600 for step in manifest["steps"].values())
