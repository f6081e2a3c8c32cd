"""Run folders with unreadable or malicious files, and run folders in use by another process.

Each damage is reported in one line. Unreadable files are recomputed or the run is refused. No file outside the run
folder is written, and no code from the run folder is executed.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from gprune.errors import UserError
from gprune.runs.results import load_run
from gprune.storage.files import locked, read_json, read_tensors, write_tensors
from tests import tiny_run
from tests.method.test_kill_and_resume import digests


@pytest.fixture(scope="module")
def uninterrupted(world, tmp_path_factory):
    """Return a folder with a finished run in `runs/run` and its cache in `cache`. Tests do not write to it."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    with tiny_run.isolated(folder / "cache"):
        world.run(folder / "runs")
    return folder


@pytest.fixture
def copied(uninterrupted, tmp_path):
    """Return a copy of `uninterrupted`, and use the copied cache. Its folder `outside` must stay empty."""
    for name in ("runs", "cache"):
        shutil.copytree(uninterrupted / name, tmp_path / name)
    (tmp_path / "outside").mkdir()
    with tiny_run.isolated(tmp_path / "cache"):
        yield tmp_path
    assert list((tmp_path / "outside").iterdir()) == []


def start_again(world, folder, *flags, name="run"):
    """Start the same run again, and return the exit code."""
    return tiny_run.main(world.args(folder / "runs", *flags, name=name))


# --- unreadable files ----------------------------------------------------------------------------------------------


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def write_text(file: Path) -> None:
    file.write_text("No number in here.")


RESULTS = (  # files that are recomputed
    "cache/statistics/*.safetensors", "cache/evaluations/*.json", "runs/run/*.safetensors", "runs/run/metrics.json",
    "runs/run/statistics/*.safetensors", "runs/run/masks.safetensors",
)  # fmt: skip


@pytest.mark.parametrize("damage", [truncate, write_text])
def test_unreadable_files_are_named_and_recomputed_with_identical_contents(
    damage, copied, world, uninterrupted, capsys, caplog
):
    """All files are damaged at once. Afterwards the results in the run folder have their original contents."""
    files = [file for pattern in RESULTS for file in copied.glob(pattern)]
    for file in files:
        damage(file)
        caplog.clear()
        assert (read_tensors if file.suffix == ".safetensors" else read_json)(file) is None
        (line,) = [record.getMessage() for record in caplog.records]
        assert line.startswith(f"Ignored {file}: ")
        assert "\n" not in line
    assert start_again(world, copied) == 0
    assert "Ignored " in capsys.readouterr().out
    assert digests(copied / "runs/run") == digests(uninterrupted / "runs/run")


def at(name: str, damage: Callable[[Path], object]) -> Callable[[Path], object]:
    """Return a function that damages the file `name` of a run folder."""
    return lambda run: damage(run / name)


def overwrite(name: str, content: str) -> Callable[[Path], object]:
    return lambda run: (run / name).write_text(content)


class OpensAFile:
    """Opens a file for writing when it is unpickled."""

    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self):
        return open, (str(self.file), "w")


def replace_by_pickle(name: str) -> Callable[[Path], object]:
    return lambda run: (run / name).write_bytes(pickle.dumps(OpensAFile(run.parents[1] / "outside/RAN")))


def change_masks(run: Path) -> None:
    file = run / "masks.safetensors"
    write_tensors(file, {name: ~t for name, t in read_tensors(file).items()})


UNREADABLE, NOT_A_RUN = "manifest.json cannot be read", "not a gprune run"
# The damage, the error when the run is started again, and the error of `load_run`; None: no error.
RUNS: dict[str, tuple[Callable[[Path], object], str | None, str | None]] = {
    "manifest: truncated": (at("manifest.json", truncate), UNREADABLE, NOT_A_RUN),
    "manifest: a list": (overwrite("manifest.json", "[]"), UNREADABLE, NOT_A_RUN),
    "masks: changed": (change_masks, "has other masks", None),
    "model: truncated": (at("model/model.safetensors", truncate), None, "Cannot load"),
    "thresholds: a pickle": (replace_by_pickle("thresholds.safetensors"), None, "missing or damaged"),
}


@pytest.mark.parametrize("row", RUNS)
def test_a_damaged_run_folder_is_recomputed_or_refused(row, copied, world, uninterrupted, capsys):
    damage, start_error, load_error = RUNS[row]
    run = copied / "runs/run"
    damage(run)
    if load_error is None:
        load_run(run)
    else:
        with pytest.raises(UserError, match=load_error):
            load_run(run)

    def contents() -> dict[Path, bytes]:
        """Return the files but `config.yaml`, which has the path of the folder."""
        return {file: file.read_bytes() for file in run.rglob("*") if file.is_file() and file.name != "config.yaml"}

    before = contents()
    capsys.readouterr()
    if start_error is None:
        assert start_again(world, copied) == 0
        assert row.startswith("model") or digests(run) == digests(uninterrupted / "runs/run")
    else:
        assert start_again(world, copied) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert start_error in line
        assert contents() == before


def test_loading_a_run_never_executes_python_code_of_its_model_folder(copied, monkeypatch):
    """Tries code in the configs of model and tokenizer, and in pickled weights. `load_run` asks no question."""
    monkeypatch.setattr("builtins.input", lambda *a: pytest.fail("load_run called input()"))
    run, model = copied / "runs/run", copied / "runs/run/model"
    for file in [*model.glob("*.py"), model / "evil.py"]:
        file.write_text(f"open({str(copied / 'outside/RAN')!r}, 'w')\n")
    config_file, tokenizer_file = (model / name for name in ("config.json", "tokenizer_config.json"))
    config = json.loads(config_file.read_text())
    assert load_run(run).model.config.model_type == config["model_type"]
    evil_config = {"auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}, "model_type": "evil"}
    config_file.write_text(json.dumps(config | evil_config))
    with pytest.raises(UserError, match="model"):
        load_run(run)
    config_file.write_text(json.dumps(config))
    evil_tokenizer = {"auto_map": {"AutoTokenizer": ["evil.T", None]}, "tokenizer_class": "EvilTokenizer"}
    tokenizer_file.write_text(json.dumps(json.loads(tokenizer_file.read_text()) | evil_tokenizer))
    with suppress(UserError):  # whether this is an error does not matter here
        load_run(run)
    (model / "model.safetensors").unlink()
    replace_by_pickle("model/pytorch_model.bin")(run)
    with pytest.raises(UserError, match="model"):
        load_run(run)


# --- file size limits and concurrent processes ---------------------------------------------------------------------


def forked(call) -> int:
    """Fork a child without output that exits with the return value of `call`. Return its process id."""
    child = os.fork()
    if child == 0:
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
        os._exit(call())
    return child


def exit_code(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.slow
def test_concurrent_runs_with_one_cache_have_the_results_of_a_single_run(world, tmp_path, uninterrupted):
    with tiny_run.isolated(tmp_path / "cache"):
        children = [forked(lambda n=n: start_again(world, tmp_path, name=n)) for n in ("a", "b")]
        assert [exit_code(child) for child in children] == [0, 0]
    for name in ("a", "b"):
        assert digests(tmp_path / "runs" / name) == digests(uninterrupted / "runs/run")
    for folder in ("statistics", "evaluations"):
        files = {file.name: file.read_bytes() for file in (tmp_path / "cache" / folder).iterdir()}
        assert files == {file.name: file.read_bytes() for file in (uninterrupted / "cache" / folder).iterdir()}


def test_a_locked_run_folder_is_refused_until_its_process_is_killed(copied, world, capsys):
    locked_read, locked_write = os.pipe()
    wait_read, _ = os.pipe()  # nothing is written, so reading blocks until the process is killed

    def hold_lock() -> int:
        with locked(copied / "runs/run"):
            os.write(locked_write, b"x")
            os.read(wait_read, 1)
        return 0

    child = forked(hold_lock)
    os.read(locked_read, 1)
    assert start_again(world, copied) == 2
    assert "another process uses the folder" in capsys.readouterr().err
    os.kill(child, 9)
    assert exit_code(child) == -9
    assert start_again(world, copied) == 0
