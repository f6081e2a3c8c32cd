"""`gprune evaluate`: the runs, folders and names that it accepts, and the files that it writes records to."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from gprune.__main__ import run as command
from gprune.benchmarks import measurement
from gprune.benchmarks.subjects import load_dense_of_run
from gprune.benchmarks.tasks import load_tasks, measure_tasks
from gprune.errors import UserError
from gprune.evaluation.intervals import paired_difference
from gprune.models.offload import is_offloaded
from gprune.storage.files import read_json, write_json
from tests import tiny_run
from tests.benchmarks.conftest import questions, sentence, write_tasks
from tests.tiny_run import isolated


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A tiny run with an exported model, a tiny run without one, and local data, in an isolated environment."""
    folder = tmp_path_factory.mktemp("zero-shot")
    with isolated(folder / "cache"):
        world = tiny_run.make_world(folder)
        kept = world.run(folder / "runs", "--sparsity.allocation=uniform", name="kept")
        world.run(folder / "runs", "--export=none", "--sparsity.allocation=uniform", name="masks")
    raw = folder / "corpora" / "wikitext2" / "wiki.test.raw"
    raw.parent.mkdir(parents=True)
    rng = np.random.default_rng(5)
    raw.write_text("\n".join(sentence(rng, 40) for _ in range(12)) + "\n")
    return SimpleNamespace(folder=folder, runs=folder / "runs", result=kept)


@pytest.fixture
def offline_runs(finished):
    """The finished runs, without an `evaluation.json` in the run `kept`."""
    (finished.runs / "kept" / "evaluation.json").unlink(missing_ok=True)
    with isolated(finished.folder / "cache", GPRUNE_DATA_DIR=str(finished.folder)):
        yield finished


@pytest.fixture
def mine(offline_runs, only):
    """The finished runs, and the local tasks `mine` and `other`."""
    write_tasks(offline_runs.folder, mine={"test": questions(12)}, other={"test": questions(12, seed=1)})
    return offline_runs


def exit_code_of_wikitext2(*models: Path, **options: Path) -> int:
    """The exit code of `gprune evaluate` on WikiText-2 in windows of 32 tokens."""
    flags = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    return command("evaluate", [*map(str, models), "--tasks", "wikitext2", "--seq_len", "32", *flags])


def records_in(path: Path) -> list[dict]:
    return json.loads(path.read_text())["records"]


def test_dense_and_pruned_model_are_compared_on_all_tasks_that_can_be_measured(mine, capsys):
    """The flag `--dense` evaluates the dense model too. A task that cannot be measured does not end the others."""
    run = mine.runs / "kept"
    assert command("evaluate", [str(run), "--tasks", "mine,nowhere,other,wikitext2", "--seq_len", "32", "--dense"]) == 2
    printed = capsys.readouterr()
    (line,) = printed.err.splitlines()
    assert "Cannot load task 'nowhere': " in line
    records = {(r["stage"], r["task"]): r for r in records_in(run / "evaluation.json")}
    tasks = ("mine", "other", "wikitext2")
    assert set(records) == {(stage, task) for stage in ("dense", "pruned") for task in tasks}
    (in_memory,) = measure_tasks(mine.result.model, mine.result.tokenizer, load_tasks(["mine"])[0]["mine"])
    exported = records["pruned", "mine"]
    assert in_memory.items() <= exported.items()
    assert exported["sparsity"] == 0.5
    pruned_correct, dense_correct = ([c == "1" for c in records[s, "mine"]["correct"]] for s in ("pruned", "dense"))
    difference, error = paired_difference(pruned_correct, dense_correct)
    assert f"{difference:+.3f} +- {error:.3f}" in printed.out
    ratio = records["pruned", "wikitext2"]["perplexity"] / records["dense", "wikitext2"]["perplexity"]
    assert f"x {ratio:.3f} [" in printed.out
    assert "| all tasks " in printed.out  # the mean of the tasks
    assert command("evaluate", [str(run), "--tasks", "nowhere,elsewhere"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("gprune evaluate: Cannot measure 2 tasks: Cannot load task 'nowhere': ")
    assert "Cannot load task 'elsewhere'" in line


def test_a_record_is_replaced_only_by_a_record_of_the_same_protocol(offline_runs):
    path = offline_runs.runs / "kept" / "evaluation.json"
    # The second evaluation has the protocol of the first and replaces its record. Another window length or limit is
    # another protocol, whose record is added.
    for seq_len, limit, num_records in ((32, 2, 1), (32, 2, 1), (16, 2, 2), (32, 3, 3)):
        args = ["--tasks", "wikitext2", "--seq_len", str(seq_len), "--limit", str(limit)]
        assert command("evaluate", [str(path.parent), *args]) == 0
        assert len(records_in(path)) == num_records
    assert command("evaluate", [str(path.parent), "--tasks", "wikitext2", "--seq_len", "32,16,32", "--limit", "3"]) == 0
    assert [r["seq_len"] for r in records_in(path)[-2:]] == [32, 16]
    assert len(records_in(path)) == 4  # the record of 32 tokens was replaced, that of 16 tokens was added


def test_a_run_without_exported_model_is_evaluated_with_the_masked_dense_model(offline_runs):
    exported, masks_only = (offline_runs.runs / name for name in ("kept", "masks"))
    assert exit_code_of_wikitext2(exported) == exit_code_of_wikitext2(masks_only) == 0
    expected, record = (records_in(run / "evaluation.json")[0] for run in (exported, masks_only))
    assert record["window_nll"] == pytest.approx(expected["window_nll"], rel=1e-6)


def edit_settings(run: Path, change) -> None:
    """Edit the settings in a manifest."""
    manifest = read_json(run / "manifest.json")
    change(manifest["settings"])
    write_json(run / "manifest.json", manifest)


def test_a_run_whose_weights_are_not_known_is_refused(offline_runs, tmp_path, capsys):
    """The masks of a run do not contain its recovered weights, and the dense weights may have changed after the run."""
    for name, change, flags, message in (
        ("masks", lambda s: s.update(recovery="bias"), [], "Repeat the run with --export hf"),
        ("kept", lambda s: s["inputs"].update(model="x"), ["--dense"], "has other weights than the model that"),
    ):
        run = Path(shutil.copytree(offline_runs.runs / name, tmp_path / name))
        (run / "evaluation.json").unlink(missing_ok=True)
        edit_settings(run, change)
        assert command("evaluate", [str(run), "--tasks", "wikitext2", "--seq_len", "32", *flags]) == 2
        assert message in capsys.readouterr().err
        assert not (run / "evaluation.json").exists()


def test_an_output_file_has_one_record_for_each_run_and_model_folder(offline_runs, tmp_path, capsys):
    output = tmp_path / "out.json"
    for name in ("kept", "masks", "kept"):
        assert exit_code_of_wikitext2(offline_runs.runs / name, output=output) == 0
    # Folders of the same name at two places are two models. The third evaluation replaces the record of the first.
    for parent in ("here", "there", "here"):
        folder = tmp_path / parent / "small"
        shutil.copytree(offline_runs.runs / "kept" / "model", folder, dirs_exist_ok=True)
        assert exit_code_of_wikitext2(folder, output=output) == 0
    assert sorted(r["run"] for r in records_in(output)) == ["kept", "masks", "small", "small"]
    # Without the flag, results of a model folder are printed and not written.
    before = sorted(folder.iterdir())
    capsys.readouterr()
    assert exit_code_of_wikitext2(folder) == 0
    assert "| wikitext2 " in capsys.readouterr().out
    assert sorted(folder.iterdir()) == before


def test_wikitext2_works_without_lm_eval_and_other_tasks_name_the_package_to_install(offline_runs, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert exit_code_of_wikitext2(offline_runs.runs / "kept") == 0
    monkeypatch.setattr("gprune.benchmarks.subjects.load_model", lambda *_, **__: pytest.fail("loaded a model first"))
    assert command("evaluate", [str(offline_runs.runs / "kept"), "--tasks", "piqa"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "pip install 'gprune[lm-eval]'" in line


# --- Models larger than one device

TASKS = ["--tasks", "mine,wikitext2", "--seq_len", "32"]


def numbers_of(path: Path) -> dict[str, object]:
    """Return the answers and the losses of windows in a file of records, by task."""
    return {r["task"]: r.get("window_nll") or r["correct"] for r in records_in(path)}


def test_an_offloaded_model_has_the_results_of_the_model_in_memory(mine, tmp_path, monkeypatch):
    run, measured = mine.runs / "kept", []
    measure = measurement._measure
    monkeypatch.setattr(measurement, "_measure", lambda model, *rest: measured.append(model) or measure(model, *rest))
    in_memory, offloaded = tmp_path / "memory.json", tmp_path / "offloaded.json"
    assert command("evaluate", [str(run), *TASKS, "--output", str(in_memory)]) == 0
    placed = ["--device_map", "auto", "--max_memory", "{cpu: 100KB}"]
    assert command("evaluate", [str(run), *TASKS, *placed, "--output", str(offloaded)]) == 0
    # The limits of the run's own settings are used without flags.
    own = shutil.copytree(run, tmp_path / "run")
    edit_settings(own, lambda settings: settings["model"].update(device_map="auto"))
    config = (own / "config.yaml").read_text()
    limits = "device_map: auto\n  max_memory: {cpu: 100KB}"
    (own / "config.yaml").write_text(re.sub(r"device_map: null\n  max_memory: null", limits, config))
    assert command("evaluate", [str(own), "--tasks", "mine"]) == 0
    assert [is_offloaded(model) for model in measured] == [False, False, True, True, True]
    assert numbers_of(offloaded) == numbers_of(in_memory)


CODE = "from pathlib import Path\nPath({ran!r}).touch()\nfrom transformers import LlamaConfig, LlamaForCausalLM\n"


def test_trust_remote_code_in_a_manifest_does_not_run_the_models_code(tmp_path):
    folder = tiny_run.save_tiny_model(tmp_path / "model")
    auto_map = {"AutoConfig": "code.LlamaConfig", "AutoModelForCausalLM": "code.LlamaForCausalLM"}
    config = json.loads((folder / "config.json").read_text()) | {"model_type": "strange", "auto_map": auto_map}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text(CODE.format(ran=str(tmp_path / "ran")))
    model = {"name": str(folder), "dtype": "float32", "trust_remote_code": True}
    with pytest.raises(UserError, match=r"^--model\.name.* configuration"):
        load_dense_of_run(tmp_path, {"model": model, "inputs": {"model": "x"}}, torch.float32)
    assert not (tmp_path / "ran").exists()
