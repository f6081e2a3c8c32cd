"""The verb: the right folder goes to the right place, whole or not at all, and what cannot be is one line."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import gguf
import pytest

from gprune.errors import UserError
from gprune.export import EXPORTS, export, gguf_check, hf
from gprune.export import job as verb
from gprune.export.command import main
from gprune.export.job import find
from gprune.export.packages import LLAMA_CPP
from tests import made_up
from tests.export.test_gguf import as_in_llama_cpp, byte_tokenizer, make_pruned
from tests.tiny_run import environment, isolated, tiny_tokenizer

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _isolated(tmp_path_factory, monkeypatch):
    """Logging as it was, and no llama.cpp build unless a test pretends there is one."""
    monkeypatch.setattr(verb, "has_llama_cpp", lambda: False)
    with isolated(tmp_path_factory.mktemp("cache")):
        yield


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    """A finished run, as far as an export reads it."""
    run = tmp_path_factory.mktemp("runs") / "mine"
    made_up.write_run(run)
    hf.save_pruned(make_pruned(), byte_tokenizer(), run / "model", model_card="# Mine\n")
    return run


@pytest.fixture
def run(pristine, tmp_path):
    return Path(shutil.copytree(pristine, tmp_path / "mine"))


OLD = "GGUF of gprune's"  # as far as a mark goes


def listing(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def refused(capsys, *args):
    """The one line on stderr of a command that exits with 2."""
    assert main([str(arg) for arg in args]) == 2
    output = capsys.readouterr()
    lines = output.err.splitlines()
    assert len(lines) == 1
    assert "Wrote" not in output.out
    return lines[0]


def test_gguf_of_a_run_lies_in_the_run(run, capsys):
    before = listing(run)
    assert main([str(run), "--unchecked"]) == 0
    output = capsys.readouterr()
    assert output.out.splitlines()[-1] == f"Wrote {run / 'model-f16.gguf'}"
    assert not output.err
    assert listing(run) == before | {"model-f16.gguf"}
    fields = gguf.GGUFReader(run / "model-f16.gguf").fields
    assert fields["general.name"].contents() == "mine"
    assert fields["deci.feed_forward_length"].contents() == [1, 32, 47]


def test_a_model_folder_is_exported_beside_itself(run, tmp_path):
    moved = Path(shutil.copytree(run / "model", tmp_path / "other"))
    assert export(moved, unchecked=True, type="q8_0") == tmp_path / "other-q8_0.gguf"
    elsewhere = tmp_path / "a name.bin"
    assert export(str(moved), "gguf", str(elsewhere), unchecked=True, type="f32") == elsewhere
    assert elsewhere.stat().st_size > (tmp_path / "other-q8_0.gguf").stat().st_size
    assert {p.name for p in tmp_path.iterdir()} == {"mine", "other", "other-q8_0.gguf", "a name.bin"}


def test_a_build_that_agrees_lets_the_file_through(run, monkeypatch, caplog):
    model, tokenizer = verb.load_folder(run / "model")
    monkeypatch.setattr(verb, "has_llama_cpp", lambda: True)
    monkeypatch.setattr(gguf_check, "in_llama_cpp", as_in_llama_cpp(model, tokenizer))
    with caplog.at_level("INFO", "gprune"):
        assert export(run, type="f32").is_file()
    assert "Checked with llama-cpp-py-sync on 256 tokens" in caplog.text


def test_a_build_that_disagrees_leaves_what_was_there(run, monkeypatch, capsys):
    model, tokenizer = verb.load_folder(run / "model")
    monkeypatch.setattr(verb, "has_llama_cpp", lambda: True)
    monkeypatch.setattr(
        gguf_check, "in_llama_cpp", as_in_llama_cpp(model, tokenizer, lambda logprobs: logprobs.roll(1))
    )
    before = listing(run)
    assert "computes something else than the model" in refused(capsys, run)
    assert listing(run) == before
    (run / "model-f16.gguf").write_text("the old one")
    refused(capsys, run, "--overwrite")
    assert (run / "model-f16.gguf").read_text() == "the old one"
    assert listing(run) == before | {"model-f16.gguf"}


def test_without_a_build_nothing_is_written(run, capsys):
    before = listing(run)
    line = refused(capsys, run)
    assert f"pip install {LLAMA_CPP}" in line
    assert "--unchecked" in line
    assert listing(run) == before


def test_an_existing_output_is_kept_unless_overwriting_is_asked_for(run, capsys):
    path = export(run, unchecked=True)
    path.write_text(OLD)
    line = refused(capsys, run, "--unchecked")
    assert f"'{path}' exists already" in line
    assert path.read_text() == OLD
    assert main([str(run), "--unchecked", "--overwrite"]) == 0
    assert path.read_bytes()[:4] == b"GGUF"


@pytest.mark.parametrize("to", EXPORTS)
def test_overwriting_never_removes_what_is_no_export(to, run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(verb, "ONNX", ())
    diary = tmp_path / "notes" / "diary.txt"
    diary.parent.mkdir()
    diary.write_text("dear")
    more = ["--overwrite", *(["--unchecked"] if to == "gguf" else [])]
    assert "no former export" in refused(capsys, run, "--to", to, "--output", diary.parent, *more)
    assert "no former export" in refused(capsys, run / "model", "--to", to, "--output", run / "model", *more)
    assert diary.read_text() == "dear"
    assert (run / "model" / "config.json").is_file()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--to", "hf"], r"Unknown export format 'hf'. Available: gguf, onnx."),
        (["--to", "ggu"], r"Did you mean 'gguf'\?"),
        (["--unchecked", "--type", "q4"], "Unknown GGUF type 'q4'. Available: f32, f16, q8_0, q4_k_m."),
        (["--to", "onnx", "--type", "f16"], "format 'onnx' has no option --type"),
        (["--to", "onnx", "--unchecked"], "format 'onnx' has no option --unchecked"),
        (["--unchecked", "--output", "no/such/folder/x"], "in a folder that exists"),
        (["--colour", "red"], "unrecognized arguments: --colour red; see --help"),
    ],
)
def test_arguments_that_cannot_be(args, message, run, capsys, monkeypatch):
    monkeypatch.setattr(verb, "load_folder", lambda *_, **__: pytest.fail("loaded a model first"))
    before = listing(run)
    line = refused(capsys, run, *args)
    assert re.search(message, line), line
    assert line.startswith("gprune export: ")
    assert listing(run) == before


def test_without_the_packages_of_onnx_nothing_is_written(run, capsys, monkeypatch):
    monkeypatch.setattr(verb, "ONNX", ("onnx_of_tomorrow", "json"))
    before = listing(run)
    line = refused(capsys, run, "--to", "onnx")
    assert "onnx_of_tomorrow is missing: `pip install onnx_of_tomorrow json`" in line
    assert listing(run) == before


def test_places_that_hold_no_finished_model(run, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert f"there is no '{tmp_path / 'nothing'}'" in refused(capsys, tmp_path / "nothing")
    assert "neither a run" in refused(capsys, tmp_path / "empty")
    shutil.rmtree(run / "model")
    assert "kept no model (--export none)" in refused(capsys, run)
    (run / "metrics.json").write_text(json.dumps({"records": []}))
    assert "is not finished" in refused(capsys, run)
    (run / "metrics.json").write_text("{broken")
    assert "is not finished" in refused(capsys, run)


def test_other_families_and_broken_weights_are_named(run, capsys):
    config = json.loads((run / "model" / "config.json").read_text())
    (run / "model" / "config.json").write_text(json.dumps(config | {"model_type": "bert"}))
    assert "Model family 'bert' is not supported" in refused(capsys, run, "--unchecked")
    (run / "model" / "config.json").write_text(json.dumps(config))
    weights = run / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    before = listing(run)
    assert "cannot be loaded" in refused(capsys, run, "--unchecked")
    assert listing(run) == before


def test_a_tokenizer_that_gguf_cannot_hold_leaves_nothing(tmp_path, capsys):
    hf.save_pruned(make_pruned(), tiny_tokenizer(), tmp_path / "model")
    line = refused(capsys, tmp_path / "model", "--unchecked")
    assert "byte-level BPE" in line
    assert "(WordLevel)" in line
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (OSError(28, "No space left on device"), 2, "Cannot write .*No space left on device"),
        (KeyboardInterrupt(), 130, "Interrupted; nothing was written"),
        (MemoryError(), 2, "Out of memory"),
    ],
)
def test_a_failure_in_the_middle_leaves_nothing(error, code, message, overwrite, run, capsys, monkeypatch):
    output = run / "model-f16.gguf"
    if overwrite:
        output.write_text(OLD)
    before = listing(run)
    write, calls = gguf.GGUFWriter.write_tensor_data, []

    def failing(*args, **options):
        calls.append(1)
        if len(calls) == 5:
            assert [path for path in listing(run) - before if path.endswith(".tmp/model-f16.gguf")]  # being written
            raise error
        return write(*args, **options)

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", failing)
    assert main([str(run), "--unchecked", *(["--overwrite"] if overwrite else [])]) == code
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert re.search(message, lines[0])
    assert listing(run) == before
    assert not overwrite or output.read_text() == OLD


@pytest.mark.parametrize("to", EXPORTS)
def test_an_interrupted_last_step_puts_the_old_export_back(to, run, monkeypatch):
    """A file and a folder; what they hold does not matter here."""

    def write(self, source, output):
        place = output if to == "gguf" else output / "model.onnx"
        place.parent.mkdir(exist_ok=True)
        place.write_text("new")

    options = {"unchecked": True} if to == "gguf" else {}
    monkeypatch.setattr(verb, "ONNX", ())
    monkeypatch.setattr(EXPORTS[to], "write", write)
    output = export(run, to, **options)
    mark = output if to == "gguf" else output / "model.onnx"
    mark.write_text(OLD)
    before, replace = listing(run), os.replace

    def failing(source, target):
        if Path(source).name == output.name and Path(source).parent.suffix == ".tmp":
            raise PermissionError(1, "not now")
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", failing)
        with pytest.raises(UserError, match=r"Cannot write .* not now"):
            export(run, to, overwrite=True, **options)
    assert mark.read_text() == OLD
    assert listing(run) == before
    export(run, to, overwrite=True, **options)
    assert mark.read_text() == "new"
    assert listing(run) == before


def test_find_takes_runs_and_model_folders(run):
    assert find(run) == find(str(run))
    assert (find(run).folder, find(run).run, find(run).name) == (run / "model", run, "mine")
    assert (find(run / "model").folder, find(run / "model").run) == (run / "model", None)


def test_help_names_every_format(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert all(f"  {name} " in text and EXPORTS[name].__doc__.splitlines()[0] in text for name in EXPORTS)


@pytest.mark.slow
def test_the_command_as_it_is_typed(run, tmp_path):
    command = [sys.executable, "-m", "gprune", "export", str(run), "--type", "q5"]
    done = subprocess.run(command, cwd=ROOT, env=environment(tmp_path), capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == "gprune export: Unknown GGUF type 'q5'. Available: f32, f16, q8_0, q4_k_m.\n"
    assert not done.stdout


def test_a_wrong_flag_does_not_wait_for_heavy_modules():
    """As far as that is up to the command: the package `gprune` itself imports them."""
    code = (
        "import sys, types; g = types.ModuleType('gprune'); g.__path__ = ['gprune']; sys.modules['gprune'] = g\n"
        "from gprune.__main__ import main\n"
        "assert main(['export', 'x', '--colour', 'red']) == main(['export', 'no/such/run']) == 2\n"
        "print(*{'torch', 'transformers', 'gguf', 'numpy'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "", done.stderr
    assert done.stderr.count("gprune export: ") == done.stderr.count("\n") == 2
