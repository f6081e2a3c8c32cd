"""`gprune evaluate`: runs, folders and names that can be evaluated, and the files of their records."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from gprune.__main__ import run as command
from gprune.benchmarks.zero_shot import zero_shot
from gprune.evaluation.intervals import paired_difference
from tests import tiny_run
from tests.benchmarks.conftest import hub, needs_lm_eval, questions, sentence, write_task
from tests.tiny_run import isolated


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A tiny run with its model, one without, and local data; in an environment of their own."""
    folder = tmp_path_factory.mktemp("zero-shot")
    with pytest.MonkeyPatch.context() as patch, isolated(folder / "cache"):
        tiny_run.quick(patch)
        world = tiny_run.make_world(folder)
        kept = world.run(folder / "runs", "--sparsity.allocation=uniform", name="kept")
        world.run(folder / "runs", "--export=none", "--sparsity.allocation=uniform", name="masks")
    write_task(folder, "mine", "test", questions(12))
    raw = folder / "corpora" / "wikitext2" / "wiki.test.raw"
    raw.parent.mkdir(parents=True)
    rng = np.random.default_rng(5)
    raw.write_text("\n".join(sentence(rng, 40) for _ in range(12)) + "\n")
    return SimpleNamespace(folder=folder, runs=folder / "runs", result=kept)


@pytest.fixture
def quiet_world(finished, monkeypatch):
    hub(monkeypatch, reachable=False)
    (finished.runs / "kept" / "evaluation.json").unlink(missing_ok=True)
    with isolated(finished.folder / "cache", GPRUNE_DATA_DIR=str(finished.folder)):
        yield finished


def perplexity_of(*places: Path, **options: Path) -> int:
    """The exit code of `gprune evaluate` on WikiText-2 in windows of 32 tokens."""
    more = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    return command("evaluate", [*map(str, places), "--tasks", "wikitext2", "--seq_len", "32", *more])


def records_in(path: Path) -> list[dict]:
    return json.loads(path.read_text())["records"]


def test_a_runs_model_and_its_dense_model(quiet_world, capsys):
    needs_lm_eval()
    run = quiet_world.runs / "kept"
    assert command("evaluate", [str(run), "--tasks", "mine,wikitext2", "--seq_len", "32", "--dense"]) == 0
    out = capsys.readouterr().out
    found = {(r["stage"], r["task"]): r for r in records_in(run / "evaluation.json")}
    assert set(found) == {(stage, task) for stage in ("dense", "gprune") for task in ("mine", "wikitext2")}
    (in_memory,) = zero_shot(quiet_world.result.model, quiet_world.result.tokenizer, ["mine"])
    exported = found["gprune", "mine"]
    assert in_memory.items() <= exported.items()
    assert exported["sparsity"] == 0.5
    difference, error = paired_difference(
        *([c == "1" for c in found[stage, "mine"]["correct"]] for stage in ("gprune", "dense"))
    )
    assert f"{difference:+.3f} +- {error:.3f}" in out
    ratio = found["gprune", "wikitext2"]["perplexity"] / found["dense", "wikitext2"]["perplexity"]
    assert f"x {ratio:.3f} [" in out


def test_records_are_kept_and_replaced_by_protocol(quiet_world):
    path = quiet_world.runs / "kept" / "evaluation.json"
    for seq_len, limit, expected in ((32, 2, 1), (32, 2, 1), (16, 2, 2), (32, 3, 3)):
        args = ["--tasks", "wikitext2", "--seq_len", str(seq_len), "--limit", str(limit)]
        assert command("evaluate", [str(path.parent), *args]) == 0
        assert len(records_in(path)) == expected
    assert command("evaluate", [str(path.parent), "--tasks", "wikitext2", "--seq_len", "32,16,32", "--limit", "3"]) == 0
    assert [r["seq_len"] for r in records_in(path)[-2:]] == [32, 16]
    assert len(records_in(path)) == 4  # 32 in the place of the same


def test_a_run_without_a_model_is_evaluated_under_its_masks(quiet_world, tmp_path, capsys):
    one, other = (quiet_world.runs / name for name in ("kept", "masks"))
    assert perplexity_of(one) == perplexity_of(other) == 0
    first, second = (records_in(run / "evaluation.json")[0] for run in (one, other))
    assert first["window_nll"] == pytest.approx(second["window_nll"], rel=1e-6)
    recovered = Path(shutil.copytree(other, tmp_path / "recovered"))  # masks do not hold what recovery changed
    by_hand(recovered, lambda settings: settings.update(recovery="bias"))
    assert perplexity_of(recovered) == 2
    assert "Repeat the run with --export hf" in capsys.readouterr().err


def by_hand(run: Path, change) -> None:
    """Change the settings in a manifest; files without a checksum are taken as they are."""
    for name in ("manifest", "metrics"):
        content = json.loads((run / f"{name}.json").read_text())
        content.pop("checksum", None)
        if name == "manifest":
            change(content["settings"])
        (run / f"{name}.json").write_text(json.dumps(content))


def test_one_file_holds_several_runs_and_never_takes_the_place_of_another(quiet_world, capsys, tmp_path):
    output = tmp_path / "out.json"
    for name in ("kept", "masks", "kept"):
        assert perplexity_of(quiet_world.runs / name, output=output) == 0
    folder = quiet_world.runs / "kept" / "model"
    before = sorted(folder.iterdir())
    assert perplexity_of(folder) == 0  # a folder: printed alone
    assert "| wikitext2 " in capsys.readouterr().out
    assert sorted(folder.iterdir()) == before
    for place in ("here", "there", "here"):
        folder = shutil.copytree(quiet_world.runs / "kept" / "model", tmp_path / place / "small", dirs_exist_ok=True)
        assert perplexity_of(folder, output=output) == 0
    assert sorted(r["run"] for r in records_in(output)) == ["kept", "masks", "small", "small"]
    output.write_text('{"a": 1}')
    assert perplexity_of(quiet_world.runs / "kept", output=output) == 2
    assert "Cannot read records of gprune evaluate" in capsys.readouterr().err
    assert output.read_text() == '{"a": 1}'


def test_a_model_that_is_not_the_runs_is_refused(quiet_world, capsys, tmp_path):
    changed = Path(shutil.copytree(quiet_world.runs / "kept", tmp_path / "changed"))
    weights = changed / "model" / "model.safetensors"
    save_file({n: 1.5 * t for n, t in load_file(weights).items()}, weights, metadata={"format": "pt"})
    assert perplexity_of(changed) == 2
    assert "files were changed after the export" in capsys.readouterr().err
    by_hand(changed, lambda settings: settings["inputs"].update(model="another"))
    assert command("evaluate", [str(changed), "--tasks", "wikitext2", "--seq_len", "32", "--dense"]) == 2
    assert "has other weights than the model that" in capsys.readouterr().err
    assert not (changed / "evaluation.json").exists()


def test_without_lm_eval_one_line_says_what_to_install_and_wikitext2_is_measured(quiet_world, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert perplexity_of(quiet_world.runs / "kept") == 0
    monkeypatch.setattr("gprune.benchmarks.subjects.load_model", lambda *_, **__: pytest.fail("loaded a model first"))
    assert command("evaluate", [str(quiet_world.runs / "kept"), "--tasks", "piqa"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "pip install 'gprune[lm-eval]'" in line


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["{run}", "--tasks", ","], "--tasks must have at least 1 item"),
        (["{run}", "--limit", "0"], "--limit must be 1 or more"),
        (["{run}", "--dtype", "int8"], "--dtype must be 'float32', 'bfloat16' or 'float16'; got 'int8'."),
        (["{run}", "--tasks", "wikitext2", "--seq_len", "99999"], "--seq_len must be from 2 to"),
        (["{run}", "--seq_len", "32,many"], "--seq_len[1] must be a valid integer"),
        (["{run}", "--seq_len", "32,1"], "--seq_len[1] must be 2 or more"),
        (
            ["{run}", "--tasks", "speed", "--speed_prompt", "249"],
            "--speed_prompt must be 248 tokens or less; got 249.",
        ),
        (["{run}", "--tasks", "speed", "--speed_batch", "1,0"], "--speed_batch[1] must be 1"),
        (["{run}", "--colour", "red"], "unrecognized arguments"),
        ([], "required: MODEL"),
        (["{tmp}", "--tasks", "wikitext2"], "not a gprune run"),
        (["{tmp}/empty", "--tasks", "wikitext2"], "must be a run (manifest.json) or a model folder"),
        (["{run}/model", "--tasks", "wikitext2", "--dense"], "--dense needs the folder of a run"),
        (["{tmp}/nowhere", "--tasks", "wikitext2"], "nowhere"),
    ],
)
def test_one_line_and_exit_2(args, message, quiet_world, capsys, tmp_path):
    (tmp_path / "manifest.json").write_text('{"settings": {}}')
    (tmp_path / "empty").mkdir()
    assert command("evaluate", [arg.format(run=quiet_world.runs / "kept", tmp=tmp_path) for arg in args]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
