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
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from gprune.errors import UserError
from gprune.export import gguf as to_gguf
from gprune.export import hf
from gprune.export import job as verb
from gprune.export.__main__ import main
from gprune.export.job import EXPORTS, LLAMA_CPP, export, find
from tests.export.test_gguf import as_in_llama_cpp, byte_tokenizer, make_pruned
from tests.tiny_run import environment, isolated, tiny_tokenizer


@pytest.fixture(autouse=True)
def _isolated(tmp_path_factory, monkeypatch):
    """Logging as it was, and no llama.cpp build unless a test pretends there is one."""
    monkeypatch.setattr(verb, "llama_cpp", lambda: None)
    with isolated(tmp_path_factory.mktemp("cache")):
        yield


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    """A finished run, as far as an export reads it."""
    run = tmp_path_factory.mktemp("runs") / "mine"
    run.mkdir()
    (run / "manifest.json").write_text(json.dumps({"settings": {}}))
    (run / "metrics.json").write_text(json.dumps({"summary": {}, "records": []}))
    hf.save_pruned(make_pruned(), byte_tokenizer(), run / "model", model_card="# Mine\n")
    return run


@pytest.fixture
def run(pristine, tmp_path):
    return Path(shutil.copytree(pristine, tmp_path / "mine"))


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
    assert main([str(run), "--to", "gguf", "--unchecked"]) == 0
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


def test_hf_is_a_copy_that_reloads_with_the_same_bits(run, token_batch):
    before = listing(run)
    folder = export(run, to="hf")
    assert folder == run / "hf"
    assert listing(run) == before | {"hf"} | {f"hf/{p.relative_to(run / 'model')}" for p in (run / "model").iterdir()}
    models = [AutoModelForCausalLM.from_pretrained(run / name, dtype="auto") for name in ("model", "hf")]
    assert torch.equal(*(model(token_batch).logits for model in models))
    assert (folder / "README.md").read_text() == "# Mine\n"
    tokenizers = [AutoTokenizer.from_pretrained(run / name) for name in ("model", "hf")]
    assert len({tuple(tokenizer("the 12").input_ids) for tokenizer in tokenizers}) == 1


def test_a_build_that_agrees_lets_the_file_through(run, monkeypatch, caplog):
    model, tokenizer = verb.load_folder(run / "model", upcast=True)
    monkeypatch.setattr(verb, "llama_cpp", lambda: "some_build")
    monkeypatch.setattr(to_gguf, "_in_llama_cpp", as_in_llama_cpp(model, tokenizer))
    with caplog.at_level("INFO", "gprune"):
        assert export(run, type="f32").is_file()
    assert "Checked with some_build on 256 tokens" in caplog.text


def test_a_build_that_disagrees_leaves_what_was_there(run, monkeypatch, capsys):
    model, tokenizer = verb.load_folder(run / "model", upcast=True)
    monkeypatch.setattr(verb, "llama_cpp", lambda: "some_build")
    monkeypatch.setattr(to_gguf, "_in_llama_cpp", as_in_llama_cpp(model, tokenizer, lambda logprobs: logprobs.roll(1)))
    before = listing(run)
    assert "computes something else than the model" in refused(capsys, run, "--to", "gguf")
    assert listing(run) == before
    (run / "model-f16.gguf").write_text("the old one")
    refused(capsys, run, "--to", "gguf", "--overwrite")
    assert (run / "model-f16.gguf").read_text() == "the old one"
    assert listing(run) == before | {"model-f16.gguf"}


def test_without_a_build_nothing_is_written(run, capsys):
    before = listing(run)
    line = refused(capsys, run, "--to", "gguf")
    assert all(f"pip install {name}" in line for name in LLAMA_CPP.values())
    assert "--unchecked" in line
    assert listing(run) == before


def test_an_existing_output_is_kept_unless_overwriting_is_asked_for(run, capsys):
    path = export(run, unchecked=True)
    path.write_text("old")
    line = refused(capsys, run, "--to", "gguf", "--unchecked")
    assert f"'{path}' exists already" in line
    assert path.read_text() == "old"
    assert main([str(run), "--to", "gguf", "--unchecked", "--overwrite"]) == 0
    assert path.read_bytes()[:4] == b"GGUF"
    folder = export(run, "hf")
    (folder / "config.json").write_text('{"model_type": "llama", "mark": 1}')
    export(run, "hf", overwrite=True)
    assert "mark" not in json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("to", EXPORTS)
def test_overwriting_never_removes_what_is_no_export(to, run, tmp_path, capsys):
    diary = tmp_path / "notes" / "diary.txt"
    diary.parent.mkdir()
    diary.write_text("dear")
    more = ["--unchecked"] if to == "gguf" else []
    assert "no former export" in refused(capsys, run, "--to", to, "--output", diary.parent, "--overwrite", *more)
    assert "not the model itself" in refused(
        capsys, run / "model", "--to", "hf", "--output", run / "model", "--overwrite"
    )
    assert diary.read_text() == "dear"
    assert (run / "model" / "config.json").is_file()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--to", "onnx"], r"Unknown export format 'onnx'. Available: hf, gguf."),
        (["--to", "ggu"], r"Did you mean 'gguf'\?"),
        (["--to", "gguf", "--unchecked", "--type", "q4"], "Unknown GGUF type 'q4'. Available: f32, f16, q8_0."),
        (["--to", "hf", "--type", "f16"], "format 'hf' has no option --type"),
        (["--to", "hf", "--unchecked"], "format 'hf' has no option --unchecked"),
        (["--to", "hf", "--output", "no/such/folder/x"], "in a folder that exists"),
        ([], "required: --to; see --help"),
        (["--to", "hf", "--colour", "red"], "unrecognized arguments: --colour red"),
    ],
)
def test_arguments_that_cannot_be(args, message, run, capsys, monkeypatch):
    monkeypatch.setattr(verb, "load_folder", lambda *_, **__: pytest.fail("loaded a model first"))
    before = listing(run)
    line = refused(capsys, run, *args)
    assert re.search(message, line), line
    assert listing(run) == before


def test_places_that_hold_no_finished_model(run, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert f"there is no '{tmp_path / 'nothing'}'" in refused(capsys, tmp_path / "nothing", "--to", "hf")
    assert "neither a run" in refused(capsys, tmp_path / "empty", "--to", "hf")
    shutil.rmtree(run / "model")
    assert "kept no model (--export none)" in refused(capsys, run, "--to", "hf")
    (run / "metrics.json").write_text(json.dumps({"records": []}))
    assert "is not finished" in refused(capsys, run, "--to", "hf")
    (run / "metrics.json").write_text("{broken")
    assert "is not finished" in refused(capsys, run, "--to", "hf")


def test_other_families_and_broken_weights_are_named(run, capsys):
    config = json.loads((run / "model" / "config.json").read_text())
    (run / "model" / "config.json").write_text(json.dumps(config | {"model_type": "bert"}))
    assert "Model family 'bert' is not supported" in refused(capsys, run, "--to", "gguf", "--unchecked")
    (run / "model" / "config.json").write_text(json.dumps(config))
    weights = run / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    before = listing(run)
    assert "cannot be loaded" in refused(capsys, run, "--to", "gguf", "--unchecked")
    assert listing(run) == before


def test_a_tokenizer_that_gguf_cannot_hold_leaves_nothing(tmp_path, capsys):
    hf.save_pruned(make_pruned(), tiny_tokenizer(), tmp_path / "model")
    line = refused(capsys, tmp_path / "model", "--to", "gguf", "--unchecked")
    assert "byte-level BPE" in line
    assert "(WordLevel)" in line
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (OSError(28, "No space left on device"), 2, "cannot write .*No space left on device"),
        (KeyboardInterrupt(), 130, "Interrupted; nothing was written"),
        (MemoryError(), 2, "Out of memory"),
    ],
)
def test_a_failure_in_the_middle_leaves_nothing(error, code, message, overwrite, run, capsys, monkeypatch):
    output = run / "model-f16.gguf"
    if overwrite:
        output.write_text("old")
    before = listing(run)
    write, calls = gguf.GGUFWriter.write_tensor_data, []

    def failing(*args, **options):
        calls.append(1)
        if len(calls) == 5:
            assert len(listing(run)) == len(before) + 1  # something is being written
            raise error
        return write(*args, **options)

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", failing)
    assert main([str(run), "--to", "gguf", "--unchecked", *(["--overwrite"] if overwrite else [])]) == code
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert re.search(message, lines[0])
    assert listing(run) == before
    assert not overwrite or output.read_text() == "old"


@pytest.mark.parametrize("to", EXPORTS)
def test_an_interrupted_last_step_puts_the_old_export_back(to, run, monkeypatch):
    options = {"unchecked": True} if to == "gguf" else {}
    output = export(run, to, **options)
    mark = output if to == "gguf" else output / "README.md"
    mark.write_text("old")
    before, replace = listing(run), os.replace

    def failing(source, target):
        if str(source).endswith(".unchecked"):
            raise PermissionError(1, "not now")
        replace(source, target)

    monkeypatch.setattr(verb.os, "replace", failing)
    if to == "hf":  # its own renames, and its check, are tested elsewhere
        monkeypatch.setattr(EXPORTS[to], "write", lambda self, source, output: output.mkdir())
    with pytest.raises(UserError, match=r"cannot write .* not now"):
        export(run, to, overwrite=True, **options)
    assert mark.read_text() == "old"
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


def test_the_command_as_it_is_typed(run, tmp_path):
    command = [sys.executable, "-m", "gprune.export.job", str(run), "--to", "gguf", "--type", "q5"]
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(command, cwd=root, env=environment(tmp_path), capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == "gprune.export.job: Unknown GGUF type 'q5'. Available: f32, f16, q8_0.\n"
    assert not done.stdout


@pytest.mark.parametrize("module", ["torch", "transformers", "gguf", "numpy"])
def test_the_verb_itself_imports_nothing_heavy(module):
    """So that a wrong argument need not wait, as far as that is up to this package."""
    code = (
        "import sys, types, importlib; g = types.ModuleType('gprune'); g.__path__ = ['gprune'];"
        "sys.modules['gprune'] = g;"
        f"importlib.import_module('gprune.export.job.__main__'); assert {module!r} not in sys.modules"
    )
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
