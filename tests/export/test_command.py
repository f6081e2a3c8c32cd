"""`gprune export`: paths of GGUF files, their check in llama.cpp, atomic writes, and one-line errors."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import gguf
import pytest

from gprune.__main__ import run as command
from gprune.export import convert, export, hf
from gprune.export.convert import load_folder
from gprune.models import gguf as gguf_files
from gprune.models.surgery import slice_model
from gprune.storage.files import write_json
from tests import synthetic_run
from tests.export.test_gguf import SIZE, byte_tokenizer, fake_in_llama_cpp, make_pruned
from tests.tiny_run import isolated, tiny_tokenizer
from tests.world import make_tiny_llama, masks_keeping

# Sizes of a model whose rows fit the blocks of all types.
WIDE = {
    "hidden_size": 256, "intermediate_size": 1024, "num_attention_heads": 8, "head_dim": 32, "vocab_size": SIZE,
}  # fmt: skip
ROOT = Path(__file__).resolve().parents[2]
EXISTING = "GGUF of somebody's"  # an existing file; only its first bytes are read


@pytest.fixture(autouse=True)
def _isolated(tmp_path_factory, monkeypatch):
    """Restore logging, and hide any llama.cpp build."""
    monkeypatch.setattr(gguf_files, "has_llama_cpp", lambda: False)
    with isolated(tmp_path_factory.mktemp("cache")):
        yield


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    """The files of a finished run that an export reads."""
    run = tmp_path_factory.mktemp("runs") / "mine"
    write_run_of(run, make_dense(tmp_path_factory.mktemp("dense")), make_pruned())
    return run


def make_dense(folder, **sizes):
    """Save the config of a dense model, and return the folder."""
    make_tiny_llama(**{"vocab_size": SIZE} | sizes).config.save_pretrained(folder)
    return folder


def write_run_of(run, dense, pruned):
    """Write the files of a finished run of a dense model that an export reads."""
    synthetic_run.write_run(run, model=synthetic_run.settings()["model"] | {"name": str(dense)})
    hf.save_pruned(pruned, byte_tokenizer(), run / "model")


@pytest.fixture
def run(pristine, tmp_path):
    return Path(shutil.copytree(pristine, tmp_path / "mine"))


def listing(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def error_line(capsys, *args, code=2):
    """The one line on stderr of a command that exits with `code`."""
    assert command("export", [str(arg) for arg in args]) == code
    output = capsys.readouterr()
    (line,) = output.err.splitlines()
    assert "Wrote" not in output.out
    assert line.startswith("gprune export: ")
    return line


def test_gguf_files_are_written_next_to_the_model_by_default(run, capsys):
    before = listing(run)
    assert command("export", [str(run)]) == 0
    output = capsys.readouterr()
    assert output.out.splitlines()[-1] == f"Wrote {run / 'model-f16.gguf'}"
    assert not output.err
    assert listing(run) == before | {"model-f16.gguf"}
    fields = gguf.GGUFReader(run / "model-f16.gguf").fields
    assert fields["general.name"].contents() == "mine"
    assert fields["deci.feed_forward_length"].contents() == [1, 32, 47]
    assert command("export", [str(run), "--type", "F32"]) == 0
    assert (run / "model-f32.gguf").is_file()


def test_a_model_folder_and_an_output_path_can_be_given(run, tmp_path):
    moved = Path(shutil.copytree(run / "model", tmp_path / "other"))
    assert export(moved, type="q8_0") == tmp_path / "other-q8_0.gguf"
    assert export(str(moved), str(tmp_path / "a name.bin")) == tmp_path / "a name.bin"
    assert (tmp_path / "a name.bin").is_file()


def test_a_decilm_folder_is_written_next_to_the_model_and_checked(tmp_path, capsys):
    run = tmp_path / "mine"
    model = make_tiny_llama(vocab_size=SIZE)
    pruned = slice_model(model, masks_keeping([1, 32, 47], [2, 2, 2]))
    write_run_of(run, make_dense(tmp_path / "dense"), pruned)
    assert command("export", [str(run), "--format", "nemotron-nas", "--check"]) == 0
    printed = capsys.readouterr().out
    assert printed.splitlines()[-1] == f"Wrote {run / 'model-nemotron-nas'}"
    assert "largest difference of logits 0\n" in printed
    assert "vLLM and transformers can read its widths" in printed
    assert "exists already" in error_line(capsys, run, "--format", "nemotron-nas")
    assert command("export", [str(run), "--format", "nemotron-nas", "--overwrite"]) == 0
    capsys.readouterr()
    assert "got q8_0" in error_line(capsys, run, "--format", "nemotron-nas", "--type", "q8_0")


def narrowed(dense, width):
    """Remove neurons from two of three blocks of a model with the sizes `WIDE`."""
    return slice_model(dense, masks_keeping([width, width, 1024], [2, 2, 2], of_neurons=1024, of_groups=2))


@pytest.mark.parametrize(("type", "width", "fits"), [("f16", 1000, True), ("q8_0", 992, True), ("q8_0", 1000, False)])
def test_export_prints_the_size_and_warns_of_rows_that_have_a_larger_type(type, width, fits, tmp_path, capsys):
    """Rows of 1,000 numbers do not fit the blocks of q8_0, so they are stored in float16."""
    hf.save_pruned(narrowed(make_tiny_llama(**WIDE), width), byte_tokenizer(), tmp_path / "model")
    assert command("export", [str(tmp_path / "model"), "--type", type]) == 0
    output, file = capsys.readouterr().out, tmp_path / f"model-{type}.gguf"
    assert f"Size: {file.stat().st_size / 1e6:.1f} MB\n" in output
    assert ("Prune with --sparsity.width_multiple 32." not in output) == fits
    assert output.splitlines()[-1] == f"Wrote {file}"


def test_a_gguf_file_that_fails_the_check_in_llama_cpp_is_not_written(run, monkeypatch, capsys):
    model, tokenizer = load_folder(run / "model")
    before = listing(run)

    def fake_llama_cpp(change):
        monkeypatch.setattr(gguf_files, "has_llama_cpp", lambda: True)
        monkeypatch.setattr(gguf_files, "score_in_llama_cpp", fake_in_llama_cpp(model, tokenizer, change))

    fake_llama_cpp(lambda logprobs: logprobs.roll(1))
    assert "differ from the model's by KL" in error_line(capsys, run, "--check")
    assert listing(run) == before
    path = run / "model-f16.gguf"
    path.write_text(EXISTING)
    error_line(capsys, run, "--check", "--overwrite")
    assert path.read_text() == EXISTING
    fake_llama_cpp(lambda logprobs: logprobs)
    assert command("export", [str(run), "--check", "--overwrite"]) == 0
    assert "Checked in llama.cpp on 256 tokens: KL" in capsys.readouterr().out
    assert path.read_bytes().startswith(b"GGUF\x03")
    assert listing(run) == before | {"model-f16.gguf"}


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--check"], "needs a llama.cpp build to check the file. Run `pip install llama-cpp-py-sync`"),
        (["--type", "q4_k_m"], "needs a llama.cpp build to quantise to q4_k_m"),
        (["--type", "q4"], "Unknown GGUF type 'q4'. Available: f32, f16, q8_0, q4_k_m"),
        (["--output", "no/such/folder/x"], "--output must be in an existing folder"),
        (["--output", "DIARY"], "exists already"),
        (["--output", "DIARY", "--overwrite"], "exists already"),
        (["--output", "MODEL", "--overwrite"], "exists already"),
        (["--colour", "red"], "unrecognized arguments: --colour red"),
    ],
)
def test_invalid_arguments_of_export_are_refused_and_change_no_files(args, message, run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(convert, "load_folder", lambda *_, **__: pytest.fail("loaded a model first"))
    diary = tmp_path / "diary.txt"
    diary.write_text("dear")
    before = listing(tmp_path)
    line = error_line(capsys, run, *({"DIARY": diary, "MODEL": run / "model"}.get(arg, arg) for arg in args))
    assert re.search(message, line), line
    assert listing(tmp_path) == before
    assert diary.read_text() == "dear"


def test_folders_without_a_finished_model_are_refused(run, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    for name in ("nothing", "empty"):
        expected = "must be a run (manifest.json) or a model folder (config.json); got"
        assert f"{expected} '{tmp_path / name}'" in error_line(capsys, tmp_path / name)
    shutil.rmtree(run / "model")
    assert "the run has no model (--export none)" in error_line(capsys, run)
    write_json(run / "metrics.json", {"records": []})
    assert "is not finished" in error_line(capsys, run)


def test_models_that_cannot_be_exported_are_refused_with_the_reason(run, tmp_path, capsys):
    config, weights = run / "model" / "config.json", run / "model" / "model.safetensors"
    before, content = listing(run), config.read_text()
    config.write_text(json.dumps({"model_type": "bert"}))
    assert "Model type 'bert' must be a decoder; got an encoder" in error_line(capsys, run)
    config.write_text(content)
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "cannot be loaded" in error_line(capsys, run)
    assert listing(run) == before
    hf.save_pruned(make_pruned(), tiny_tokenizer(), tmp_path / "words")
    before = listing(tmp_path)
    assert "got another one (WordLevel)" in error_line(capsys, tmp_path / "words")
    assert listing(tmp_path) == before


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (OSError(28, "No space left on device"), 2, "Cannot write .*No space left on device"),
        (KeyboardInterrupt(), 130, "Interrupted; nothing was written"),
        (MemoryError(), 2, "Out of memory"),
    ],
)
def test_a_failure_while_writing_leaves_the_existing_export_unchanged(error, code, message, run, capsys, monkeypatch):
    output = run / "model-f16.gguf"
    output.write_text(EXISTING)
    before, write, calls = listing(run), gguf.GGUFWriter.write_tensor_data, []

    def failing(*args, **options):
        calls.append(1)
        if len(calls) == 5:  # in the middle of the file
            assert any(path.endswith(".tmp/model-f16.gguf") for path in listing(run) - before)
            raise error
        return write(*args, **options)

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", failing)
    assert re.search(message, error_line(capsys, run, "--overwrite", code=code))
    assert listing(run) == before
    assert output.read_text() == EXISTING


def test_invalid_arguments_are_refused_without_importing_torch():
    """The package `gprune` is replaced by an empty module, since importing it imports PyTorch."""
    code = (
        "import sys, types; g = types.ModuleType('gprune'); g.__path__ = ['gprune']; sys.modules['gprune'] = g\n"
        "from gprune.__main__ import main\n"
        "for args in (['x', '--colour', 'red'], ['no/such/run'], ['.', '--type', 'q9']):\n"
        "    assert main(['export', *args]) == 2\n"
        "print(*{'torch', 'transformers', 'gguf', 'numpy'} & sys.modules.keys())"
    )
    process = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert process.stdout.strip() == "", process.stderr  # none of these packages was imported
    assert process.stderr.count("gprune export: ") == process.stderr.count("\n") == 3
