"""An ONNX graph computes what the model does, at any shape and with padding; one that does not is never written."""

from __future__ import annotations

import importlib.util
import math

import pytest
import torch

from gprune.errors import UserError
from gprune.export import export, hf, onnx
from gprune.export import job as verb
from gprune.export.command import main
from gprune.export.packages import ONNX
from tests import tiny_run
from tests.export.test_hf import make_pruned
from tests.tiny_families import make_tiny


@pytest.fixture
def folder(tmp_path):
    """Odd widths, KV groups gone, and biases where the stock model has none."""
    with tiny_run.isolated(tmp_path / "cache"):
        yield hf.save_pruned(make_pruned(recovered=True), tiny_run.tiny_tokenizer(), tmp_path / "model")


@pytest.mark.skipif(not all(map(importlib.util.find_spec, ONNX)), reason="needs the extra `onnx`")
@pytest.mark.slow
def test_a_pruned_model_as_onnx(folder, capsys):
    path = folder.with_name("model-onnx") / "model.onnx"
    assert main([str(folder), "--to", "onnx"]) == 0
    out = capsys.readouterr().out
    assert "Checked with onnxruntime on 3 x 29 tokens: max |difference of logits| " in out
    assert out.endswith(f"Wrote {path.parent}\n")
    model = make_pruned(recovered=True)
    # shapes that neither tracing nor the check has seen
    for batch, length in ((1, 1), (5, 41)):
        inputs = onnx.inputs_of(model, batch, length)
        found = torch.from_numpy(onnx.run_onnx(path, inputs))
        torch.testing.assert_close(found, model(inputs["input_ids"]).logits, atol=1e-4, rtol=0)
    # padding on the left changes nothing for the tokens after it; what stands there is not seen
    inputs = onnx.inputs_of(model, 2, 12)
    inputs["attention_mask"][:, :5] = 0
    found = torch.from_numpy(onnx.run_onnx(path, inputs))
    inputs["input_ids"][:, :5] = 7
    other = torch.from_numpy(onnx.run_onnx(path, inputs))
    torch.testing.assert_close(found[:, 5:], other[:, 5:], atol=1e-4, rtol=0)
    assert (found[:, :5] - other[:, :5]).abs().max() > 1e-2
    # and what is there is not written over
    before = path.read_bytes()
    assert main([str(folder), "--to", "onnx"]) == 2
    assert "exists already" in capsys.readouterr().err
    assert path.read_bytes() == before


@pytest.mark.parametrize(("added", "code"), [(0.0, 0), (1.0, 2), (math.nan, 2)])
def test_a_graph_that_is_off_is_removed(added, code, folder, capsys, monkeypatch):
    def written(model, path):
        path.touch()
        path.with_name(f"{path.name}.data").touch()

    model = make_pruned(recovered=True)
    monkeypatch.setattr(verb, "ONNX", ())
    monkeypatch.setattr(onnx, "write_onnx", written)
    monkeypatch.setattr(onnx, "run_onnx", lambda path, inputs: (model(**inputs).logits + added).numpy())
    assert main([str(folder), "--to", "onnx"]) == code
    there = {path.name for path in folder.parent.rglob("*onnx*")}
    assert there == ({"model-onnx", "model.onnx", "model.onnx.data"} if code == 0 else set())
    assert ("the file was removed" in capsys.readouterr().err) == (code == 2)


def test_the_output_may_be_any_folder_that_is_not_there(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(verb, "ONNX", ())
    monkeypatch.setattr(onnx, "write_onnx", lambda model, path: path.touch())
    monkeypatch.setattr(onnx, "check_onnx", lambda model, path: 0.0)
    assert export(folder, "onnx", tmp_path / "graph") == tmp_path / "graph"
    assert [path.name for path in (tmp_path / "graph").iterdir()] == ["model.onnx"]


def test_a_graph_that_would_depend_on_the_length_of_a_text_is_refused(tmp_path):
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
    with pytest.raises(UserError, match=r"one set of rotary frequencies, .* \(rope_type dynamic\)"):
        onnx.write_onnx(make_pruned(rope_parameters=rope), tmp_path / "model.onnx")


@pytest.mark.skipif(not all(map(importlib.util.find_spec, ONNX)), reason="needs the extra `onnx`")
@pytest.mark.slow
def test_what_pytorch_cannot_write_is_one_line(tmp_path, capsys):
    with tiny_run.isolated(tmp_path / "cache"):
        folder = hf.save_pruned(make_tiny("mixtral"), tiny_run.tiny_tokenizer(), tmp_path / "model")
        assert main([str(folder), "--to", "onnx"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "PyTorch cannot write model_type 'mixtral" in line
    assert [path.name for path in tmp_path.iterdir() if "onnx" in path.name] == []
