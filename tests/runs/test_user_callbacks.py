"""Callbacks and Trainer arguments that the caller brings: into every stage, resumed, and named where they fail."""

from __future__ import annotations

import csv
import importlib
import itertools
import json
import sys

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, LambdaCallback, ModelCheckpoint

from gprune.config import RunConfig, check_settings, parse
from gprune.errors import UserError
from gprune.importance import metric
from gprune.pipeline.prune import prune
from gprune.runs.results import load_run
from gprune.runs.user_callbacks import UserCallbacks
from tests import tiny_run

pytestmark = pytest.mark.usefixtures("shared_cache")

OF_LIGHTNING = [
    {"class_path": "EarlyStopping", "init_args": {"monitor": "learn/loss", "strict": False, "stopping_threshold": 1e3}},
    {"class_path": "ModelCheckpoint", "init_args": {"monitor": "learn/loss", "every_n_train_steps": 1}},
    {"class_path": "lightning.pytorch.callbacks.LearningRateMonitor"},
    {"class_path": "lightning.pytorch.callbacks.DeviceStatsMonitor"},
    {"class_path": "GradientAccumulationScheduler", "init_args": {"scheduling": {0: 2}}},
]


class Steps(L.Callback):
    """Notes every training step; with `fail`, raises KeyError after so many of threshold learning."""

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


class Pretender(L.Callback):
    """Its objects are no callbacks."""

    def __new__(cls):
        return 7


class Leaver(L.Callback):
    """Its constructor ends the process."""

    def __init__(self):
        raise SystemExit(7)


class Changer(L.Callback):
    """Changes the frozen model in a hook of a stage, past the version counters of its tensors."""

    def __init__(self, hook: str, stage: str = "CalibrationStage"):
        setattr(self, hook, self.change)
        self.stage = stage

    def change(self, trainer, pl_module, *_, by=2.0, **__):
        if type(pl_module).__name__ == self.stage:
            for p in pl_module.lm.parameters():
                p.data.mul_(by)


class Borrower(Changer):
    """Undoes its change when the stage ends."""

    def on_test_end(self, trainer, pl_module):
        self.change(trainer, pl_module, by=0.5)


def flags(world, folder, *more, callbacks=(), name="run"):
    some = [f"--trainer.callbacks={json.dumps(callbacks)}"] if callbacks else []
    return world.args(folder, "--export=none", "--evaluation.controls=[]", *some, *more, name=name)


def stages_of(steps):
    return [name for name, _ in itertools.groupby(steps, key=lambda step: step[0])]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")  # of Lightning, which the command line keeps quiet
def test_callbacks_of_lightning_serve_every_stage_and_write_into_the_run(world, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    more = ("--recovery=distill", "--distill.tokens=512", "--sparsity.epochs=4", "--trainer.profiler=simple")
    own, lambdas = Steps(), []
    brought = [own, LambdaCallback(on_test_start=lambda trainer, pl_module: lambdas.append(pl_module))]
    cfg = parse(flags(world, tmp_path, *more, callbacks=OF_LIGHTNING))
    result = prune(cfg, callbacks=brought)
    assert own.tested == ["CalibrationStage"]
    assert stages_of(own.steps) == ["AssignmentRefinement", "ThresholdLearning", "DistillationStage"]
    assert len(lambdas) == 1
    assert result.summary["stopped"] == {"thresholds": {"batches": 2, "planned": 8}}
    manifest = json.loads((result.path / "manifest.json").read_text())
    assert manifest["learning"]["steps"] == 1  # of two batches
    stages = [path.name.split("-")[0] for path in (result.path / "profiles").iterdir()]
    assert sorted(stages) == ["fit", "fit", "fit", "test", "validate", "validate"]
    with next(result.path.glob("csv/*/metrics.csv")).open() as file:
        columns = next(csv.reader(file))
    curves = ("lr-Adam", "lr-AdamW/gprune", "DeviceStatsMonitor.on_train_batch_end/gprune")
    assert all(any(column.startswith(curve) for column in columns) for curve in curves), columns
    assert next(result.path.glob("checkpoints/thresholds/*.ckpt")).is_file()
    assert not list((tmp_path / "here").iterdir())
    assert load_run(result.path).summary == result.summary
    with pytest.raises(UserError, match=r"other settings: inputs\.callbacks: .*Steps.* there, None here"):
        prune(cfg)


@pytest.mark.slow
def test_a_callback_that_raises_is_named_and_the_run_goes_on_with_its_state(world, tmp_path):
    def run(name, **how):
        cfg = parse(flags(world, tmp_path, "--sparsity.epochs=3", "--run.checkpoint_minutes=0", name=name))
        return (own := Steps(**how)), prune(cfg, callbacks=[own])

    expected, undisturbed = run("undisturbed")
    said = r"^Cannot finish ThresholdLearning, callback Steps in on_train_batch_end: KeyError: 'lost' \(test_user_"
    with pytest.raises(UserError, match=said) as caught:
        run("failed", fail=4)
    assert isinstance(caught.value.__cause__, KeyError)
    again, resumed = run("failed")
    assert again.steps == expected.steps
    pairs = zip(undisturbed.thresholds[0], resumed.thresholds[0], strict=True)
    assert all(torch.equal(*pair) for pair in pairs)


def test_objects_of_ones_own_are_shared_by_stages_and_those_with_the_state_of_a_fit_are_not(tmp_path):
    own, stopping, saving = Steps(), EarlyStopping("learn/loss"), ModelCheckpoint()
    brought = [own, stopping, saving]
    callbacks, stage = UserCallbacks(brought), type("Stage", (L.LightningModule,), {"curves": "learn"})()
    (first, *copies), second = (callbacks.of_stage(stage, "learn", tmp_path / name) for name in ("first", "second"))
    assert first is second[0] is own
    assert not {*map(id, copies)} & {*map(id, [*second, stopping, saving])}
    assert [c[2].dirpath for c in ([own, *copies], second)] == [str(tmp_path / name) for name in ("first", "second")]
    assert saving.dirpath is None
    second[2].best_model_path = "best"
    callbacks.keep_state()
    assert saving.best_model_path == "best"  # the state of the last stage
    assert UserCallbacks(brought).of_stage(stage)[2].best_model_path == ""  # the next run begins as it was given


@pytest.mark.parametrize(
    ("monitor", "stages"),
    [
        ("learn/loss", ["learn"]), ("development/perplexity", ["learn", "distill"]),
        ("partition/agreement", ["partition"]), ("mine", ["partition", "learn", "distill"]),
    ],
)  # fmt: skip
def test_a_callback_serves_the_stages_that_log_what_it_monitors(monitor, stages):
    made = {name: type("Stage", (L.LightningModule,), {"curves": name})() for name in ("partition", "learn", "distill")}
    callbacks = UserCallbacks([EarlyStopping(monitor)])
    assert [name for name, stage in made.items() if callbacks.of_stage(stage, name)] == stages


@pytest.mark.parametrize(
    ("path", "args", "said"),
    [
        ("lightning.pytorch.callbacks.EarlyStoping", {}, "'EarlyStoping'. The closest name is 'EarlyStopping'."),
        ("made_up_package.Thing", {}, "module 'made_up_package' is not imported. Add --import made_up_package."),
        ("mpl_toolkits.evil.A", {}, "module 'mpl_toolkits.evil' is not imported. Add --import mpl_toolkits.evil."),
        ("unittest.__main__.A", {}, "module 'unittest.__main__' is not imported"),
        ("numpy.f2py.__main__.A", {}, "module 'numpy.f2py.__main__' is not imported"),
        (f"{__name__}.Pretender", {}, "must be a lightning.pytorch.Callback; got 7"),
        (f"{__name__}.Leaver", {}, "Leaver: Cannot construct it: SystemExit: 7"),
        ("torch.nn.Linear", {}, "torch.nn.Linear must be a subclass of lightning.pytorch.Callback"),
        ("EarlyStopping", {}, "EarlyStopping: init_args.monitor must be given."),
        ("EarlyStopping", {"monitor": "x", "patience": "many"}, "init_args.patience must be a valid integer"),
        (
            "EarlyStopping",
            {"monitor": "x", "patient": 1},
            "init_args.patient must not be given (no such argument)",
        ),
        ("EarlyStopping", {"monitor": "x", "mode": "up"}, "MisconfigurationException: `mode` can be min, max, got up"),
        ("Timer", {"interval": "minute"}, "Timer"),
        ("RichProgressBar", {}, "found `RichProgressBar` in callbacks list"),
    ],
)
def test_a_callback_that_cannot_be_is_refused_before_anything_is_loaded(path, args, said, world, tmp_path, capfd):
    described = [{"class_path": path, "init_args": args}]
    assert tiny_run.main(flags(world, tmp_path / "runs", callbacks=described)) == 2
    error = capfd.readouterr().err
    assert error.count("\n") == 1
    assert said in error
    assert not (tmp_path / "runs").exists()


STOPPING = "--trainer.callbacks=[{class_path: EarlyStopping, init_args: {monitor: val_loss}}]"


def test_what_a_callback_of_lightning_refuses_is_one_line_of_its_own_words(world, tmp_path, capfd):
    assert tiny_run.main(flags(world, tmp_path, STOPPING)) == 2
    error = capfd.readouterr().err
    assert error.count("\n") == 1
    said = "AssignmentRefinement, callback EarlyStopping in on_validation_end: RuntimeError: Early stopping"
    assert all(words in error for words in (said, "`val_loss`", "`partition/total`")), error


def test_batches_of_calibration_may_not_be_changed_and_those_of_training_may(world, tmp_path, cache):
    def shorten(trainer, pl_module, batch, *_):
        if isinstance(batch, dict):  # the batches of the refinement hold no text
            batch["input_ids"] = batch["input_ids"][:, :8]

    cfg = parse(flags(world, tmp_path, "--corpora.num_samples=3"))  # of which the cache has nothing
    with pytest.raises(UserError, match="must not change batches of calibration"):
        prune(cfg, callbacks=[LambdaCallback(on_test_batch_start=shorten)])
    cfg = parse(flags(world, tmp_path, name="shortened"))
    path = prune(cfg, callbacks=[LambdaCallback(on_train_batch_start=shorten)]).path
    assert json.loads((path / "manifest.json").read_text())["steps"]["thresholds"]["forward_backward_tokens"] == 8 * 8


@pytest.mark.parametrize(
    ("hook", "kind"),
    [("on_test_start", Changer), ("on_test_batch_end", Changer), ("teardown", Changer), ("on_test_start", Borrower)],
)
def test_statistics_of_a_model_that_a_callback_has_changed_are_not_shared(hook, kind, world, tmp_path):
    with tiny_run.isolated(tmp_path / "cache"):
        said = rf"^Callbacks must not change the frozen model.*CalibrationStage.*\(Steps, {kind.__name__}\)"
        cfg = parse(flags(world, tmp_path, "--corpora.num_samples=3"))
        with pytest.raises(UserError, match=said):
            prune(cfg, callbacks=[Steps(), kind(hook)])
        assert not list((tmp_path / "cache").rglob("statistics/*"))
        assert not list((tmp_path / "cache").rglob("evaluations/*"))


def test_gram_matrices_of_a_changed_model_are_not_shared_either(world, tmp_path, monkeypatch):
    monkeypatch.setattr("gprune.pipeline.calibrate.needs_walk", lambda *_, **__: True)
    with tiny_run.isolated(tmp_path / "cache"):
        cfg = parse(
            flags(
                world,
                tmp_path,
                "--recovery=least_squares",
                "--gprune=false",
                f"--corpora.recover={world.names('alpha')}",
            )
        )
        with pytest.raises(UserError, match=r"changed during calibration on .*alpha"):
            prune(cfg, callbacks=[Changer("on_test_batch_end")])
        assert not list((tmp_path / "cache").rglob("statistics/*"))


def test_weights_that_change_in_learning_are_laid_to_the_callbacks_and_to_no_metric(world, tmp_path):
    with tiny_run.isolated(tmp_path / "cache"):
        cfg = parse(flags(world, tmp_path))
        with pytest.raises(UserError, match=r"changed during ThresholdLearning by one of .*\(Changer\)"):
            prune(cfg, callbacks=[Changer("on_train_batch_end", "ThresholdLearning")])
        assert not list((tmp_path / "cache").rglob("evaluations/*"))


@pytest.mark.parametrize("code", [0, 7, None])
def test_a_callback_that_ends_the_process_is_named(code, world, tmp_path):
    def leave(trainer, pl_module):
        raise SystemExit(code)

    said = rf"^Cannot finish AssignmentRefinement, callback LambdaCallback in on_train_start: SystemExit: {code} "
    with pytest.raises(UserError, match=said):
        prune(parse(flags(world, tmp_path)), callbacks=[LambdaCallback(on_train_start=leave)])


@pytest.mark.usefixtures("scratch_registry")
def test_a_metric_that_ends_the_process_is_an_error_too(world, tmp_path):
    @metric("leaving", activation_free=True)
    def leaving(weights, moments, generator):
        raise SystemExit(0)

    with pytest.raises(UserError, match=r"^Cannot finish the run: SystemExit: 0 \(.*_callbacks\.py, line \d+\)\.$"):
        prune(parse(flags(world, tmp_path, "--importance=leaving", "--gprune=false")))


def test_a_class_path_runs_no_code_of_the_working_folder(world, tmp_path, monkeypatch, capfd):
    folder = tmp_path / "mpl_toolkits_of_mine"
    folder.mkdir()
    (folder / "evil.py").write_text("raise SystemExit(0)")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.import_module(folder.name)  # as mpl_toolkits is: a namespace package, loaded
    described = [{"class_path": f"{folder.name}.evil.A"}]
    assert tiny_run.main(flags(world, tmp_path / "runs", callbacks=described)) == 2
    assert "Add --import mpl_toolkits_of_mine.evil." in capfd.readouterr().err
    assert f"{folder.name}.evil" not in sys.modules


def test_trainer_arguments_hold_in_the_stages_that_they_are_for(world, tmp_path):
    more = ("--trainer.max_steps=1", "--trainer.gradient_clip_val=1e-9", "--trainer.log_every_n_steps=2")
    seen = {}

    def look(trainer, pl_module, *_):
        norm = max(float(p.grad.norm()) for p in pl_module.parameters() if p.grad is not None)
        deterministic = torch.are_deterministic_algorithms_enabled()
        seen.setdefault(type(pl_module).__name__, []).append((norm <= 1e-9, trainer.log_every_n_steps, deterministic))

    cfg = parse(flags(world, tmp_path, *more, "--sparsity.epochs=2", "--trainer.deterministic=true"))
    prune(cfg, callbacks=[LambdaCallback(on_train_batch_end=look)])
    assert seen == {"AssignmentRefinement": [(True, 2, True)] * 20, "ThresholdLearning": [(True, 2, True)]}
    assert not torch.are_deterministic_algorithms_enabled()
    more = ("--trainer.limit_train_batches=1", "--sparsity.epochs=2")
    result = prune(parse(flags(world, tmp_path, *more, name="few")))
    assert json.loads((result.path / "manifest.json").read_text())["learning"]["steps"] == 2  # one of each epoch


def test_settings_name_what_may_change_a_result_and_no_default():
    plain = RunConfig().settings()
    assert set(plain["trainer"]) == {"world_size", "precision"}
    watching = ["--trainer.log_every_n_steps=5", "--trainer.profiler=simple", "--trainer.detect_anomaly=true"]
    assert parse(watching).settings() == plain
    changing = ["--trainer.max_steps=3", "--trainer.limit_train_batches=0.5", "--trainer.gradient_clip_val=1"]
    changing += ["--trainer.deterministic=true", "--trainer.callbacks=[{class_path: Timer}]"]
    for flag in changing:
        settings = parse([flag]).settings()
        check_settings(settings)
        assert settings["trainer"].keys() - plain["trainer"].keys() == {flag.split("=")[0].rpartition(".")[2]}
