"""Callbacks and Trainer arguments of the user: in every stage, after resuming, and in error messages."""

from __future__ import annotations

import csv
import importlib
import itertools
import json
import sys

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, LambdaCallback, ModelCheckpoint

from gprune.config import RunConfig, parse
from gprune.errors import UserError
from gprune.method.prune import prune
from gprune.runs.results import load_run
from gprune.runs.trainer import UserCallbacks
from tests import tiny_run

pytestmark = pytest.mark.usefixtures("shared_cache")

LIGHTNING_CALLBACKS = [
    {"class_path": "EarlyStopping", "init_args": {"monitor": "learn/loss", "strict": False, "stopping_threshold": 1e3}},
    {"class_path": "ModelCheckpoint", "init_args": {"monitor": "learn/loss", "every_n_train_steps": 1}},
    {"class_path": "lightning.pytorch.callbacks.LearningRateMonitor"},
    {"class_path": "lightning.pytorch.callbacks.DeviceStatsMonitor"},
    {"class_path": "GradientAccumulationScheduler", "init_args": {"scheduling": {0: 2}}},
]


class Steps(L.Callback):
    """Record the stages that are tested, and every training step as (stage, global step).

    Args:
        fail: raise KeyError after this step of threshold learning; None: never.
    """

    def __init__(self, fail: int | None = None):
        self.steps, self.tested, self.fail = [], [], fail

    def on_test_start(self, trainer, pl_module):
        self.tested.append(type(pl_module).__name__)

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.steps.append((type(pl_module).__name__, trainer.global_step))
        if self.fail == trainer.global_step and type(pl_module).__name__ == "ThresholdLearning":
            raise KeyError("lost")

    def state_dict(self):
        return {"steps": self.steps}

    def load_state_dict(self, state):
        self.steps = state["steps"]


def flags(world, folder, *more, callbacks=(), name="run"):
    """Return the flags of a run without export and early evaluation. `callbacks` are dictionaries with class paths."""
    callback_flags = [f"--trainer.callbacks={json.dumps(callbacks)}"] if callbacks else []
    return world.args(folder, "--export=none", "--evaluation.before_recovery=false", *callback_flags, *more, name=name)


def stages_of(steps):
    """Return the names of stages in order, from the steps that `Steps` recorded."""
    return [name for name, _ in itertools.groupby(steps, key=lambda step: step[0])]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")  # of Lightning, which the command line keeps quiet
def test_callbacks_of_lightning_work_in_every_stage_and_write_into_the_run_folder(world, tmp_path, monkeypatch):
    """Threshold learning has four epochs of two batches. EarlyStopping ends it after the first one, because the loss is
    below the `stopping_threshold`.
    """
    monkeypatch.setenv("GPRUNE_CACHE", str(tmp_path / "cache"))  # empty, so that calibration runs
    working_folder = tmp_path / "working-folder"
    working_folder.mkdir()
    monkeypatch.chdir(working_folder)
    more = ("--recovery=distill", "--distill.tokens=512", "--sparsity.epochs=4", "--trainer.profiler=simple")
    steps, tested = Steps(), []
    callbacks_of_user = [steps, LambdaCallback(on_test_start=lambda trainer, pl_module: tested.append(pl_module))]
    cfg = parse(flags(world, tmp_path, *more, callbacks=LIGHTNING_CALLBACKS))
    result = prune(cfg, callbacks=callbacks_of_user)
    assert steps.tested == ["CalibrationStage"]
    assert stages_of(steps.steps) == ["AssignmentRefinement", "ThresholdLearning", "DistillationStage"]
    assert len(tested) == 1
    assert result.summary["stopped"] == {"thresholds": {"batches": 2, "planned": 8}}
    manifest = json.loads((result.path / "manifest.json").read_text())
    assert manifest["learning"]["steps"] == 1  # the gradients of two batches are accumulated
    stages = [path.name.split("-")[0] for path in (result.path / "profiles").iterdir()]
    assert sorted(stages) == ["fit", "fit", "fit", "test", "validate", "validate"]
    with next(result.path.glob("csv/*/metrics.csv")).open() as file:
        columns = next(csv.reader(file))
    curves = ("lr-Adam", "lr-AdamW", "DeviceStatsMonitor.on_train_batch_end/cpu_percent")
    assert all(any(column.startswith(curve) for column in columns) for curve in curves), columns
    assert next(result.path.glob("checkpoints/thresholds/*.ckpt")).is_file()
    assert not list(working_folder.iterdir())
    assert load_run(result.path).summary == result.summary


def test_a_run_with_callbacks_is_not_resumed_without_them(world, tmp_path):
    cfg = parse(flags(world, tmp_path, "--gprune=false"))
    prune(cfg, callbacks=[Steps()])
    with pytest.raises(UserError, match=r"other settings: inputs\.callbacks: .*Steps.* there, not set here"):
        prune(cfg)


class StepsInNumPy(Steps):
    """With a state that torch.load refuses: a NumPy number."""

    def state_dict(self):
        return {"steps": self.steps, "best": np.float64(1)}


@pytest.mark.slow
def test_a_callback_that_raises_is_named_and_its_state_is_restored_on_resuming(world, tmp_path, caplog):
    """A checkpoint whose callback state cannot be loaded is ignored, so the stage is trained from the start."""

    def run(name, fail=None, kind=Steps):
        cfg = parse(flags(world, tmp_path, "--sparsity.epochs=3", "--run.checkpoint_minutes=0", name=name))
        callback = kind(fail)
        return callback, prune(cfg, callbacks=[callback])

    expected, uninterrupted = run("uninterrupted")
    message = r"^Cannot finish ThresholdLearning, callback Steps.* in on_train_batch_end: KeyError: 'lost' \(test_user_"
    trained_again = [step for step in expected.steps if step[0] == "ThresholdLearning"]
    for kind, steps in ((Steps, expected.steps), (StepsInNumPy, trained_again)):
        with pytest.raises(UserError, match=message) as caught:
            run(kind.__name__, fail=4, kind=kind)
        assert isinstance(caught.value.__cause__, KeyError)
        callback, resumed = run(kind.__name__, kind=kind)
        assert callback.steps == steps
        assert all(torch.equal(t, resumed.thresholds[key]) for key, t in uninterrupted.thresholds.items())
    assert "the state of a callback or the stage has objects that torch.load refuses" in caplog.text


def test_stages_share_user_callbacks_and_get_copies_of_callbacks_with_fit_state(tmp_path):
    """`Steps` is shared. EarlyStopping and ModelCheckpoint have state of one fit, so each stage gets copies.

    Afterwards the user's objects have the state of the last stage. The next run starts from their original state.
    """
    steps, stopping, saving = Steps(), EarlyStopping("learn/loss"), ModelCheckpoint()
    callbacks_of_user = [steps, stopping, saving]
    callbacks, stage = UserCallbacks(callbacks_of_user), type("Stage", (L.LightningModule,), {"curves": "learn"})()
    first, second = (callbacks.of_stage(stage, "learn", tmp_path / name) for name in ("first", "second"))
    assert first[0] is second[0] is steps
    assert not {*map(id, first[1:])} & {*map(id, [*second, stopping, saving])}
    assert [first[2].dirpath, second[2].dirpath] == [str(tmp_path / name) for name in ("first", "second")]
    assert saving.dirpath is None
    second[2].best_model_path = "best"
    callbacks.keep_state()
    assert saving.best_model_path == "best"
    assert UserCallbacks(callbacks_of_user).of_stage(stage)[2].best_model_path == ""


def test_a_callback_is_used_only_in_stages_that_log_its_monitored_metric():
    """A metric without a known prefix may be logged by any stage."""
    names = ("partition", "learn", "distill")
    all_stages = {name: type("Stage", (L.LightningModule,), {"curves": name})() for name in names}
    for monitor, expected in (
        ("learn/loss", ("learn",)), ("development/perplexity", ("learn", "distill")),
        ("partition/hard_consistency", ("partition",)), ("mine", names),
    ):  # fmt: skip
        callbacks = UserCallbacks([EarlyStopping(monitor)])
        assert tuple(name for name, stage in all_stages.items() if callbacks.of_stage(stage, name)) == expected


def test_callbacks_may_change_training_batches(world, tmp_path):
    def shorten(trainer, pl_module, batch, *_):
        if isinstance(batch, dict):  # the batches of the refinement contain no text
            batch["input_ids"] = batch["input_ids"][:, :8]

    cfg = parse(flags(world, tmp_path, name="shortened"))
    path = prune(cfg, callbacks=[LambdaCallback(on_train_batch_start=shorten)]).path
    steps = json.loads((path / "manifest.json").read_text())["steps"]
    assert steps["thresholds"]["forward_backward_tokens"] == 8 * 8  # windows of two corpora, tokens


def test_a_class_path_imports_no_module_of_the_working_folder(world, tmp_path, monkeypatch, capfd):
    folder = tmp_path / "mpl_toolkits_of_mine"
    folder.mkdir()
    (folder / "evil.py").write_text("raise SystemExit(0)")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.import_module(folder.name)  # a loaded namespace package, like mpl_toolkits
    callbacks = [{"class_path": f"{folder.name}.evil.A"}]
    assert tiny_run.main(flags(world, tmp_path / "runs", callbacks=callbacks)) == 2
    assert "Add --import mpl_toolkits_of_mine.evil." in capfd.readouterr().err
    assert f"{folder.name}.evil" not in sys.modules


def test_trainer_arguments_apply_in_the_stages_that_they_are_for(world, tmp_path):
    more = ("--trainer.max_steps=1", "--trainer.gradient_clip_val=1e-9", "--trainer.log_every_n_steps=2")
    recorded = {}  # {stage: [(whether gradients were clipped, log_every_n_steps, deterministic) of each step]}

    def record_step(trainer, pl_module, *_):
        norm = max(float(p.grad.norm()) for p in pl_module.parameters() if p.grad is not None)
        deterministic = torch.are_deterministic_algorithms_enabled()
        step = (norm <= 1e-9, trainer.log_every_n_steps, deterministic)
        recorded.setdefault(type(pl_module).__name__, []).append(step)

    cfg = parse(flags(world, tmp_path, *more, "--sparsity.epochs=2", "--trainer.deterministic=true"))
    prune(cfg, callbacks=[LambdaCallback(on_train_batch_end=record_step)])
    # `max_steps` limits only stages that train on text.
    assert recorded == {"AssignmentRefinement": [(True, 2, True)] * 10, "ThresholdLearning": [(True, 2, True)]}
    assert not torch.are_deterministic_algorithms_enabled()


def test_settings_have_only_trainer_arguments_that_change_results_and_no_defaults():
    plain = RunConfig().settings()
    assert set(plain["trainer"]) == {"world_size", "precision"}
    without_effect = [
        "--trainer.log_every_n_steps=5", "--trainer.profiler=simple", "--trainer.detect_anomaly=true",
        "--trainer.deterministic=false", "--trainer.max_steps=null", "--trainer.enable_progress_bar=true",
    ]  # fmt: skip
    assert parse(without_effect).settings() == plain
    with_effect = [
        "--trainer.max_steps=3", "--trainer.limit_train_batches=0.5", "--trainer.gradient_clip_val=1",
        "--trainer.deterministic=true", "--trainer.callbacks=[{class_path: Timer}]",
    ]  # fmt: skip
    for flag in with_effect:
        settings = parse([flag]).settings()
        assert settings["trainer"].keys() - plain["trainer"].keys() == {flag.split("=")[0].rpartition(".")[2]}
