"""A run's folder that is truncated, altered, foreign, in use, or from a stranger: noticed, said in one line, computed
again or refused; never used in silence, never a way out of the folder, and never code that runs."""

from __future__ import annotations

import json
import os
import pickle
import re
import resource
import shutil
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import safetensors.torch

from gprune.errors import UserError
from gprune.runs.results import load_run
from gprune.storage.files import locked, read_json, read_tensors, write_json, write_tensors
from tests import tiny_run
from tests.pipeline.kills import digests, left_behind


@pytest.fixture(autouse=True)
def _in_process(monkeypatch):
    tiny_run.quick(monkeypatch)


@pytest.fixture(scope="module")
def whole(world, tmp_path_factory):
    """A folder with an undisturbed run in `runs/run` and its cache in `cache`; never written to again."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch, tiny_run.isolated(folder / "cache"):
        tiny_run.quick(patch)
        world.run(folder / "runs")
    return folder


@pytest.fixture
def copied(whole, tmp_path):
    """A copy of it, with its cache in use, and a folder `outside` that nobody may write to."""
    for name in ("runs", "cache"):
        shutil.copytree(whole / name, tmp_path / name)
    (tmp_path / "outside").mkdir()
    with tiny_run.isolated(tmp_path / "cache"):
        yield tmp_path
    assert list((tmp_path / "outside").iterdir()) == []


def again(world, folder, *flags, name="run"):
    """Exit code of the same run, started once more."""
    return tiny_run.main(world.args(folder / "runs", *flags, name=name))


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
    digits = [match.start() for match in re.finditer(rb"(?<![\w.+-])[2468]", content)]
    place = len(content) - 3 if file.suffix == ".safetensors" else digits[len(digits) // 2]
    content[place] ^= 1
    file.write_bytes(content)


def text(file: Path) -> None:
    file.write_text("No number in here.")


def of_another_name(file: Path) -> None:
    """A sound file of ours with other content, which somebody gave this name."""
    other = file.with_name(f"x{file.suffix}")
    if file.suffix == ".safetensors":
        tensors = safetensors.torch.load_file(file)
        write_tensors(other, {name: t.flip(0) if t.ndim else t for name, t in tensors.items()})
    else:
        write_json(other, {name: value for name, value in json.loads(file.read_text()).items() if name != "checksum"})
    os.replace(other, file)


DAMAGES = [truncated, emptied, one_bit, text, of_another_name]
RESULTS = (  # what is computed again
    "cache/statistics/*.safetensors", "cache/evaluations/*.json", "runs/run/*.safetensors", "runs/run/metrics.json",
    "runs/run/statistics/*.safetensors", "runs/run/masks/*.safetensors",
)  # fmt: skip


def test_every_damage_to_every_file_is_noticed_by_the_readers(whole, tmp_path, caplog):
    for file in sorted(file for pattern in RESULTS for file in whole.glob(pattern)):
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
            assert "Ignored " in line
            assert "\n" not in line


@pytest.mark.parametrize(
    "damage", [one_bit, pytest.param(of_another_name, marks=pytest.mark.slow)]
)  # the others are noticed by the same two readers
def test_damaged_files_are_computed_again_to_the_same_bits(damage, copied, world, whole, capsys):
    """All files at once: whatever of them is read is said to be damaged, and all of them are as they were."""
    for pattern in RESULTS:
        for file in copied.glob(pattern):
            damage(file)
    assert again(world, copied) == 0
    assert "Ignored " in capsys.readouterr().out
    assert digests(copied / "runs/run") == digests(whole / "runs/run")


def test_files_of_another_run_are_not_taken_for_this_ones(copied, world, whole, capsys):
    """Sound files under the right names, made with another seed."""
    assert again(world, copied, "--run.seed=1", "--export=none", name="other") == 0
    own, other = copied / "runs/run", copied / "runs/other"
    for name in ("assignment.safetensors", "thresholds.safetensors", "modules.safetensors", "metrics.json"):
        assert (own / name).read_bytes() != (other / name).read_bytes()
        shutil.copy(other / name, own / name)
    with pytest.raises(UserError, match="is not finished"):
        load_run(own)
    capsys.readouterr()
    assert again(world, copied) == 0
    assert capsys.readouterr().out.count("the file belongs to another run") >= 3
    assert digests(own) == digests(whole / "runs/run")


# --- one table: what happens to a run, what the same command says of it, and what `load_run` says -----------------


def at(name: str, damage: Callable[[Path], object]) -> Callable[[Path], object]:
    return lambda run: damage(run / name)


def written(name: str, content: str) -> Callable[[Path], object]:
    return lambda run: (run / name).write_text(content)


def linked(name: str) -> Callable[[Path], object]:
    """A link in the place of a file or folder of the run, to the folder that nobody may write to."""

    def link(run: Path) -> None:
        shutil.rmtree(run / name) if (run / name).is_dir() else (run / name).unlink()
        (run / name).symlink_to(run.parents[1] / "outside")

    return link


class Evil:
    """Its pickle opens a file for writing when it is read."""

    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self):
        return open, (str(self.file), "w")


def pickled(name: str) -> Callable[[Path], object]:
    return lambda run: (run / name).write_bytes(pickle.dumps(Evil(run.parents[1] / "outside/RAN")))


def other_masks(run: Path) -> None:
    file = run / "masks/gprune.safetensors"
    write_tensors(file, {name: ~t for name, t in read_tensors(file).items()})


def older_model(run: Path) -> None:
    """As another version left it: the model is gone, and the manifest has the hash of a file that no version writes."""
    manifest = read_json(run / "manifest.json")
    manifest["model"]["of_another_version.json"] = "0" * 16
    write_json(run / "manifest.json", manifest)
    shutil.rmtree(run / "model")


def other_target(file: Path) -> None:
    file.write_text(file.read_text().replace("target: 0.5", "target: 0.4"))


DAMAGED, NO_RUN, NO_MODEL = "manifest.json is damaged", "not a gprune run", "files were changed after the export"
LINK, ALTERED = "is a link out of the folder", r"config\.yaml, which was altered"
RUNS: dict[str, tuple[Callable[[Path], object], str | None, str | None]] = {
    **{f"manifest: {damage.__name__}": (at("manifest.json", damage), DAMAGED, NO_RUN) for damage in DAMAGES},
    "manifest: a list": (written("manifest.json", "[]"), DAMAGED, NO_RUN),
    "manifest: deep": (written("manifest.json", "[" * 100_000), DAMAGED, NO_RUN),
    "manifest: other types": (written("manifest.json", '{"settings": {}, "steps": []}'), DAMAGED, NO_RUN),
    "settings: others": (
        at("config.yaml", other_target),
        None,
        rf"{ALTERED}: .*sparsity\.target: 0\.5 there, 0\.4 here",
    ),
    "settings: none": (written("config.yaml", ""), None, ALTERED),
    "settings: unknown": (written("config.yaml", "nonsense: 1"), None, ALTERED),
    "masks: others": (other_masks, "has other masks", None),
    "model: truncated": (at("model/model.safetensors", truncated), None, NO_MODEL),
    "model: one bit": (at("model/model.safetensors", one_bit), None, NO_MODEL),
    "model: another version's": (older_model, None, None),
    "thresholds: a pickle": (pickled("thresholds.safetensors"), None, "missing or damaged"),
    "model: a pickle": (pickled("model/model.safetensors"), None, NO_MODEL),
    "a link: masks": (linked("masks"), LINK, "missing or damaged"),
    "a link: thresholds": (linked("thresholds.safetensors"), LINK, "missing or damaged"),
    "a link: model": (linked("model"), LINK, NO_MODEL),
    "a pipe": (lambda run: os.mkfifo(run / "pipe"), "is neither file nor folder", None),
}


@pytest.mark.parametrize("row", RUNS)
def test_a_run_that_is_damaged(row, copied, world, whole, capsys):
    damage, refused, not_loaded = RUNS[row]
    run = copied / "runs/run"
    damage(run)
    if not_loaded is None:
        load_run(run)
    else:
        with pytest.raises(UserError, match=not_loaded):
            load_run(run)

    def content() -> dict[Path, bytes]:
        """But for the settings, which say where the folder lies."""
        return {file: file.read_bytes() for file in run.rglob("*") if file.is_file() and file.name != "config.yaml"}

    before = content()
    capsys.readouterr()
    if refused is None:
        assert again(world, copied) == 0
        assert digests(run) == digests(whole / "runs/run")
        assert load_run(run).model is not None
    else:
        assert again(world, copied) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert refused in line
        assert content() == before


def test_links_that_stay_inside_and_those_of_wandb_are_no_matter(copied, world):
    run = copied / "runs/run"
    (run / "masks").rename(run / "real")
    (run / "masks").symlink_to("real")
    (run / "wandb").mkdir()
    (run / "wandb/debug.log").symlink_to(copied / "outside/log")
    assert again(world, copied) == 0


def test_a_model_folder_with_code_in_it_is_loaded_without_running_it(copied, monkeypatch):
    """Neither for model nor tokenizer, not even after a question: there is nobody to ask."""
    monkeypatch.setattr("builtins.input", lambda *a: pytest.fail("it asked"))
    run, model = copied / "runs/run", copied / "runs/run/model"
    manifest = json.loads((run / "manifest.json").read_text())
    for place in ("model", "checksum"):  # a stranger's manifest says nothing of the files
        manifest.pop(place, None)
    (run / "manifest.json").write_text(json.dumps(manifest))
    for file in [*model.glob("*.py"), model / "evil.py"]:
        file.write_text(f"open({str(copied / 'outside/RAN')!r}, 'w')\n")
    config, tokenizer = (model / name for name in ("config.json", "tokenizer_config.json"))
    plain = json.loads(config.read_text())
    assert load_run(run).model.config.model_type == plain["model_type"]
    evil = {"auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}, "model_type": "evil"}
    config.write_text(json.dumps(plain | evil))
    with pytest.raises(UserError, match="model"):
        load_run(run)
    config.write_text(json.dumps(plain))
    evil = {"auto_map": {"AutoTokenizer": ["evil.T", None]}, "tokenizer_class": "EvilTokenizer"}
    tokenizer.write_text(json.dumps(json.loads(tokenizer.read_text()) | evil))
    with suppress(UserError):
        load_run(run)
    (model / "model.safetensors").unlink()
    pickled("model/pytorch_model.bin")(run)
    with pytest.raises(UserError, match="model"):
        load_run(run)


# --- disks and neighbours ------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_limit_on_file_sizes_stops_the_run_in_one_line_and_without_it_the_run_ends(world, tmp_path, whole):
    """The system's own refusal (EFBIG) to write more than so many bytes, wherever in the libraries that happens."""
    with tiny_run.isolated(tmp_path / "cache"):
        said = os.pipe()
        child = os.fork()
        if child == 0:
            sys.stderr, sys.stdout = os.fdopen(said[1], "w"), open(os.devnull, "w")  # noqa: SIM115
            resource.setrlimit(resource.RLIMIT_FSIZE, (9_000, resource.RLIM_INFINITY))
            code = again(world, tmp_path, "--export=none")
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
        children = [forked(lambda n=n: again(world, tmp_path, name=n)) for n in ("a", "b")]
        assert [exit_code(child) for child in children] == [0, 0]
    for name in ("a", "b"):
        assert digests(tmp_path / "runs" / name) == digests(whole / "runs/run")
    for folder in ("statistics", "evaluations"):
        files = {file.name: file.read_bytes() for file in (tmp_path / "cache" / folder).iterdir()}
        assert files == {file.name: file.read_bytes() for file in (whole / "cache" / folder).iterdir()}


def test_a_folder_in_use_is_refused_and_free_when_its_process_is_killed(copied, world, capsys):
    ready, done = os.pipe(), os.pipe()

    def hold() -> int:
        with locked(copied / "runs/run"):
            os.write(ready[1], b"x")
            os.read(done[0], 1)
        return 0

    child = forked(hold)
    os.read(ready[0], 1)
    assert again(world, copied) == 2
    assert "another process uses the folder" in capsys.readouterr().err
    os.kill(child, 9)
    assert exit_code(child) == -9
    assert again(world, copied) == 0
