"""Files from strangers may waste time; they run no code, write nowhere else, and do not fill the memory."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import struct
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gprune import cli
from gprune.corpora.files import load_files
from gprune.errors import UserError
from gprune.export.source import model_folder
from gprune.models.embedded import is_complete
from gprune.runs.folder import RunFolder
from gprune.runs.results import load_run
from gprune.storage import files as artifacts
from gprune.storage.files import read_json, read_tensors, write_json, write_tensors
from tests import tiny_run

GIB = 2**30


@pytest.fixture(autouse=True)
def _quiet(monkeypatch):
    monkeypatch.setattr(artifacts.log, "warning", lambda *a: None)


def fuzzed(examples: int):
    """Time-boxed: so many examples, none of which may take long."""
    checks = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]
    return settings(max_examples=examples, deadline=timedelta(seconds=5), suppress_health_check=checks, database=None)


@contextlib.contextmanager
def little_memory(gib: float = 1.0):
    """More address space than now by so much, and no more: what asks for a terabyte gets a MemoryError."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * os.sysconf("SC_PAGESIZE") + int(gib * GIB), limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


def mutated(content: bytes) -> st.SearchStrategy[bytes]:
    """A good file with a few bytes changed, cut out or put in, or bytes that never were a file."""
    edit = st.tuples(st.integers(0, len(content)), st.integers(0, 8), st.binary(max_size=8))

    def apply(edits: list[tuple[int, int, bytes]]) -> bytes:
        found = content
        for place, gone, new in edits:
            found = found[:place] + new + found[place + gone :]
        return found

    return st.lists(edit, min_size=1, max_size=4).map(apply) | st.binary(max_size=64)


# --- safetensors and JSON ------------------------------------------------------------------------------------------


def safetensors_file(header: object, payload: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + payload


TENSOR = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
BOMBS = {
    "length 2**40": safetensors_file({}, length=2**40),
    "length 2**63": safetensors_file({}, length=2**63),
    "length 2**64 - 1": safetensors_file({}, length=2**64 - 1),
    "no length": b"\x01\x00",
    "header is a list": safetensors_file([1]),
    "header is a number": safetensors_file(3),
    "entry is a number": safetensors_file({"a": 3}),
    "entry without offsets": safetensors_file({"a": {"dtype": "F32", "shape": [2]}}, bytes(8)),
    "offsets are text": safetensors_file({"a": TENSOR | {"data_offsets": ["0", "8"]}}, bytes(8)),
    "offsets are one": safetensors_file({"a": TENSOR | {"data_offsets": [8]}}, bytes(8)),
    "offsets are negative": safetensors_file({"a": TENSOR | {"data_offsets": [-8, 0]}}, bytes(8)),
    "a terabyte": safetensors_file({"a": TENSOR | {"shape": [2**38], "data_offsets": [0, 2**40]}}, bytes(8)),
    "a shape that overflows": safetensors_file({"a": TENSOR | {"shape": [2**40, 2**40]}}, bytes(8)),
    "a shape of nothing": safetensors_file({"a": TENSOR | {"shape": [0, 2**62], "data_offsets": [0, 0]}}),
    "unknown dtype": safetensors_file({"a": TENSOR | {"dtype": "F4096"}}, bytes(8)),
    "deep": safetensors_file(b"[" * 100_000),
    "empty": safetensors_file({}),
    "no tensors": safetensors_file({"__metadata__": {"content_hash": "0"}}),
    "marks are no JSON": safetensors_file({"__metadata__": {"marks": "{"}, "a": TENSOR}, bytes(8)),
    "marks are a list": safetensors_file({"__metadata__": {"marks": "[]"}, "a": TENSOR}, bytes(8)),
    "marks are deep": safetensors_file({"__metadata__": {"marks": "[" * 100_000}, "a": TENSOR}, bytes(8)),
}


# `assets.is_complete` has safetensors check the header; what is inside is for whoever loads it.
LYING_ONLY_INSIDE = ("a shape of nothing", "marks are no JSON", "marks are a list", "marks are deep")


@pytest.mark.parametrize("bomb", BOMBS)
def test_safetensors_headers_that_lie(bomb, tmp_path):
    file = tmp_path / "a.safetensors"
    file.write_bytes(BOMBS[bomb])
    with little_memory():
        assert read_tensors(file) is None


@fuzzed(150)
@given(data=st.data())
def test_fuzzed_safetensors_are_what_was_written_or_nothing(data, tmp_path):
    file, tensors = tmp_path / "a.safetensors", {"x": torch.arange(6.0).view(2, 3), "y": torch.tensor([True, False])}
    write_tensors(file, tensors)
    file.write_bytes(data.draw(mutated(file.read_bytes())))
    found = read_tensors(file)
    assert found is None or all(torch.equal(found[name], tensors[name]) for name in tensors)


@fuzzed(150)
@given(data=st.data())
def test_fuzzed_json_is_what_was_written_or_nothing_or_has_no_checksum(data, tmp_path):
    file, content = tmp_path / "a.json", {"settings": {"a": 1.5}, "steps": {"b": {"seconds": 2}}}
    write_json(file, content)
    file.write_bytes(data.draw(mutated(file.read_bytes())))
    found = read_json(file)
    if found not in (None, content):
        assert b'"checksum"' not in file.read_bytes()
    assert isinstance(RunFolder(tmp_path).manifest, dict)


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"a":' * 100_000, "9" * 100_000, '"' + "\\ud800" * 10, "\x00", "NaN", "[1e999999]"]
)
def test_json_that_is_deep_or_long_or_no_json(text, tmp_path):
    (tmp_path / "manifest.json").write_text(text)
    with little_memory():
        assert read_json(tmp_path / "manifest.json") is None or text in ("NaN", "[1e999999]")
        assert RunFolder(tmp_path).manifest == {}


# --- text ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "line",
    ["[" * 100_000, '{"text": ' + "9" * 5000 + "}", '{"text": "\\ud800"}', '{"text": "a"', "\ufeff{}", '{"text": {}}'],
)
def test_lines_of_json_that_are_no_documents(line, tmp_path):
    (tmp_path / "a.jsonl").write_text(line + "\n")
    with pytest.raises(UserError, match=r"a\.jsonl"):
        load_files(tmp_path / "a.jsonl", "train")


# --- settings ------------------------------------------------------------------------------------------------------

YAML: dict[str, str] = {
    "python": "!!python/object/apply:os.system ['touch RAN']",
    "python in a value": "importance: !!python/object/apply:os.system ['touch RAN']",
    "a name that is code": "importance: __import__('os').system('touch RAN')",
    "class_path": "sparsity: {class_path: os.system, init_args: {command: touch RAN}}",
    "another group": "model: {class_path: subprocess.Popen, init_args: {args: [touch, RAN]}}",
    "nothing": "\x00",
    "tag": "sparsity: !!set {target, epochs}",
    "binary": "importance: !!binary YQ==",
    "infinite": "sparsity: {target: .inf}",
    "key is a list": "? [a, b]\n: 3",
    "merge": "<<: 3",
}


@pytest.mark.parametrize("row", YAML)
def test_yaml_of_a_stranger_runs_nothing(row, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.yaml").write_text(YAML[row])
    with little_memory(0.1):
        assert cli.main(["--config", "a.yaml", "--dry_run=true"]) == 2
    out, err = capsys.readouterr()
    assert "Traceback" not in out + err
    assert err.count("\n") == 1
    assert "Out of memory" not in err  # elsewhere nobody sets a limit
    assert os.listdir() == ["a.yaml"]


# --- run folders ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return tiny_run.make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def whole(world, tmp_path_factory):
    """A folder with a finished run in `runs/run` and its cache in `cache`."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch, tiny_run.isolated(folder / "cache"):
        tiny_run.quick(patch)
        world.run(folder / "runs")
    return folder


@pytest.fixture
def run(world, whole, tmp_path, monkeypatch):
    """A copy of the run, and what starts it again: `run(*flags)` gives the exit code."""
    tiny_run.quick(monkeypatch)
    shutil.copytree(whole / "runs", tmp_path / "runs")
    (tmp_path / "outside").mkdir()

    def start(*flags, name="run"):
        return tiny_run.main(world.args(tmp_path / "runs", *flags, name=name))

    start.path = tmp_path / "runs/run"
    with tiny_run.isolated(whole / "cache"):
        yield start


@pytest.mark.parametrize(
    "name", ["../outside/x", "a/../../outside/x", "/tmp/elsewhere", "..", ".", "a/b", "x/", "x\0y"]
)
def test_names_that_lead_out_of_the_folder_of_runs(name, run, tmp_path, capsys):
    assert run(name=name) == 2
    assert "--run.name" in capsys.readouterr().err
    assert list((tmp_path / "outside").iterdir()) == []
    assert [path.name for path in run.path.parent.iterdir()] == ["run"]


@pytest.mark.parametrize(
    "inside", ["masks", "statistics", "figures", "csv", "wandb", "model", "thresholds.safetensors", "model/config.json"]
)
def test_links_out_of_the_run_folder_are_refused_before_anything_is_written(inside, run, tmp_path, capsys):
    link, outside = run.path / inside, tmp_path / "outside"
    shutil.rmtree(link, ignore_errors=True)
    link.unlink(missing_ok=True)
    (outside / "config.json").write_text("{}")  # what the export takes for a former one
    link.symlink_to(outside)
    assert run("--logging.mode=offline") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{link} is a link out of the run folder" in line
    assert [path.name for path in outside.iterdir()] == ["config.json"]


def test_links_that_stay_inside_and_those_of_wandb_are_no_matter(run, tmp_path):
    (run.path / "masks").rename(run.path / "real")
    (run.path / "masks").symlink_to("real")
    (run.path / "wandb").mkdir()
    (run.path / "wandb/debug.log").symlink_to(tmp_path / "outside/log")
    assert run() == 0


def test_a_link_in_the_place_of_a_file_that_is_written_is_replaced(tmp_path):
    (tmp_path / "outside").write_text("precious")
    (tmp_path / "a.json").symlink_to(tmp_path / "outside")
    write_json(tmp_path / "a.json", {"x": 1})
    assert (tmp_path / "outside").read_text() == "precious"
    assert not (tmp_path / "a.json").is_symlink()


def test_a_model_folder_with_code_in_it_is_loaded_without_running_it(run, tmp_path, monkeypatch):
    """Neither for model nor tokenizer, not even after a question: there is nobody to ask."""
    monkeypatch.setattr("builtins.input", lambda *a: pytest.fail("it asked"))
    model, manifest = run.path / "model", json.loads((run.path / "manifest.json").read_text())
    for place in ("model", "checksum"):  # a stranger's manifest says nothing of the files
        manifest.pop(place, None)
    (run.path / "manifest.json").write_text(json.dumps(manifest))
    code = f"open({str(tmp_path / 'outside/RAN')!r}, 'w')\n"
    for file in model.glob("*.py"):
        file.write_text(code)
    (model / "evil.py").write_text(code)
    config = json.loads((model / "config.json").read_text())
    loaded = load_run(run.path)
    assert loaded.model.config.model_type == config["model_type"]
    evil = {"auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}, "model_type": "evil"}
    (model / "config.json").write_text(json.dumps(config | evil))
    with pytest.raises(UserError, match="model"):
        load_run(run.path)
    (model / "config.json").write_text(json.dumps(config))
    settings_of = json.loads((model / "tokenizer_config.json").read_text())
    evil = {"auto_map": {"AutoTokenizer": ["evil.T", None]}, "tokenizer_class": "EvilTokenizer"}
    (model / "tokenizer_config.json").write_text(json.dumps(settings_of | evil))
    with contextlib.suppress(UserError):
        load_run(run.path)
    assert list((tmp_path / "outside").iterdir()) == []


def test_pickles_in_the_place_of_weights_are_not_run(run, tmp_path):
    import pickle

    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "outside/RAN"), "w"))

    (run.path / "model/model.safetensors").unlink()
    (run.path / "model/pytorch_model.bin").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(UserError, match="model"):
        load_run(run.path)
    (run.path / "thresholds.safetensors").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(UserError):
        load_run(run.path)
    assert list((tmp_path / "outside").iterdir()) == []


@pytest.mark.parametrize("name", ["..", "../data", "a/../../secret", ".hidden", "", "x\x00y"])
def test_corpus_names_find_nothing_outside_the_folder_of_mirrors(name, tmp_path, monkeypatch):
    from gprune.corpora.load import load_corpus

    for folder in ("secret", "data/corpora/.hidden", "data/corpora"):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        (tmp_path / folder / "train.txt").write_text("secret")
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("GPRUNE_DATA_DIR", str(tmp_path / "data"))
    with pytest.raises((UserError, ValueError)):
        load_corpus(name, "train")


def test_export_finds_no_run_through_a_name(tmp_path):
    for name in ("", "..", "/", "x\x00", str(tmp_path / "nowhere")):
        with pytest.raises((UserError, ValueError)):
            model_folder(tmp_path / name if name == "" else name)


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_model_whose_weights_header_lies_is_not_complete(bomb, tmp_path):
    for name in ("config.json", "tokenizer_config.json"):
        (tmp_path / name).write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(BOMBS[bomb])
    with little_memory():
        assert not is_complete(tmp_path) or bomb in LYING_ONLY_INSIDE


@fuzzed(150)
@given(data=st.data())
def test_fuzzed_model_folders_are_complete_or_not(data, tmp_path):
    for name, content in (("config.json", b"{}"), ("tokenizer_config.json", b"{}")):
        (tmp_path / name).write_bytes(data.draw(mutated(content)))
    (tmp_path / "model.safetensors").write_bytes(data.draw(mutated(safetensors_file({"a": TENSOR}, bytes(8)))))
    assert is_complete(tmp_path) in (True, False)
