"""Stages of users in a run, and built-in stages with any Trainer and from checkpoints."""

from __future__ import annotations

import functools
import importlib
import linecache
import re
import sys

import lightning as L
import pytest
import torch
import yaml
from torch.utils.data import DataLoader

import gprune
from gprune.__main__ import main as gprune_main
from gprune.checks import Positive
from gprune.config import RunConfig
from gprune.errors import UserError
from gprune.method.prune import checked_labels
from gprune.models.losses import next_token_losses
from gprune.models.masks import Masks, gated
from gprune.models.surgery import slice_model
from gprune.recoveries import Recovery, recovery
from gprune.sparsity.cut import keep_masks
from gprune.stages.calibration import CalibrationStage
from gprune.stages.distillation import DistillationStage
from gprune.stages.refinement import AssignmentRefinement
from gprune.stages.threshold_learning import ThresholdLearning
from tests import tiny_run
from tests.stages.test_refinement import planted, refinement
from tests.stages.test_threshold_learning import make_stage, sampled_tokens, trainer_of
from tests.world import hooks_of, restored, some_masks


class GateLearner(L.LightningModule):
    """A learner without a base class of gprune: a sigmoid gate per neuron."""

    instances: tuple = ()  # arguments of each instance

    def __init__(self, model, ranks, start, budget, *, epochs: int, rate: Positive = 0.1, kind: str = "a"):
        super().__init__()
        type(self).instances += ((rate, kind, epochs),)
        self.model, self.ranks, self.rate = (model,), ranks, rate
        self.shifts = torch.nn.ParameterList(torch.zeros(len(p)) for p in ranks.p.values())

    def margins(self):
        pairs = zip(self.ranks.p.items(), self.shifts, strict=True)
        return {key: torch.logit(p.float()) + shift for (key, p), shift in pairs if key.startswith("neurons.")}

    def training_step(self, batch, batch_idx):
        with gated(self.model[0], {key: m.sigmoid() for key, m in self.margins().items()}) as model:
            return next_token_losses(model, batch["input_ids"]).mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.rate)

    def masks(self, budget):
        return keep_masks(budget, self.margins())


CALLS = []  # of the classes below


class Swapped(AssignmentRefinement):
    def labels(self):
        CALLS.append(("steps", self.steps, self.final_tau))
        return [int(y.max()) - y for y in self.start]


class Doubled(CalibrationStage):
    def __init__(self, *args, times: int = 2, **kwargs):
        super().__init__(*args, **kwargs)
        CALLS.append(("times", times))


class Masked:
    """A class that cannot be a learner, because it is no LightningModule."""

    masks = ()


@pytest.fixture
def own_recoveries():
    """Register two recoveries, and remove them afterwards."""
    with restored(gprune.RECOVERY):

        @recovery("heal")
        class Heal(Recovery):
            def __init__(self, *, factor: float = 1.0):
                self.factor = factor

            def tune(self, material, pruned):
                CALLS.append(("factor", self.factor))
                return pruned

        @recovery("scaled")
        def scaled(weight, keep, moments, ridge, *, by=1):
            return weight[:, keep] * by, None

        yield


@pytest.mark.slow
def test_a_run_uses_stages_of_the_user_with_their_arguments_and_records_them(
    own_recoveries, world, cache, tmp_path, monkeypatch
):
    CALLS.clear()
    monkeypatch.setattr(GateLearner, "instances", ())
    flags = ["--recovery=[scaled,heal]", "--options.heal.factor=2", "--options.scaled.by=1.5",
             "--evaluation.before_recovery=false"]  # fmt: skip

    def run(rate, name="run"):
        stages = {
            "refiner": functools.partial(Swapped, final_tau=0.5),
            "learner": functools.partial(GateLearner, rate=rate, kind="b"),
            "calibrator": functools.partial(Doubled, times=3),
        }
        return gprune.prune(gprune.config.parse(world.args(tmp_path, *flags, name=name)), **stages)

    with tiny_run.isolated(cache):
        first = run(50)
        assert GateLearner.instances[-1] == (50, "b", 1)
        assert {("times", 3), ("factor", 2), ("steps", 10, 0.5)} == set(CALLS)
        resumed = run(50)
        assert (len(GateLearner.instances), resumed.masks) == (1, first.masks)  # loaded instead of trained again
        with pytest.raises(UserError, match=r"other settings: stages\.learner\.arguments\.rate: 50 there, 1e-09 here"):
            run(1e-9)
        unlearned = run(1e-9, name="unlearned")
        built_in = world.run(tmp_path, "--evaluation.before_recovery=false", name="built-in")
    assert first.thresholds is None
    assert built_in.thresholds is not None
    assert first.masks != unlearned.masks  # with a rate of 50 the masks change
    assert [int(y.max()) for y in first.modules.labels] == [int(y.max()) for y in built_in.modules.labels]
    row = next(r for r in first.records if r["recovery"] == "scaled+heal")
    learner = {"class": f"{__name__}.GateLearner", "arguments": {"rate": 50, "kind": "b"}}
    assert (row["scaled"], row["heal"], row["stages"]["learner"]) == ({"by": 1.5}, {"factor": 2}, learner)
    with pytest.raises(UserError, match=r"must be given again: gprune\.prune\(cfg, calibrator=\.\.\.\)"):
        gprune.prune(first.config)


MODULE = """
import functools
from gprune.stages.calibration import CalibrationStage
from gprune.stages.threshold_learning import ThresholdLearning

steps = []

class Mine(CalibrationStage):
    def test_step(self, *args):
        steps.append({number})
        super().test_step(*args)

{kind} = {value}
"""


@pytest.fixture
def write_module(tmp_path, monkeypatch):
    """Return a function that writes a module with a stage, and imports it as in a new process."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    written = []

    def write(name, *, kind, value, number=1):
        (tmp_path / f"{name}.py").write_text(MODULE.format(number=number, kind=kind, value=value))
        linecache.checkcache()
        sys.modules.pop(name, None)
        written.append(name)
        return importlib.import_module(name)

    yield write
    for name in written:
        sys.modules.pop(name, None)


def test_an_edited_calibrator_collects_its_statistics_again(world, cache, tmp_path, write_module):
    flags = ["--stages=my_calibrator", "--recovery=none", "--gprune=false", "--export=none"]
    collected = []
    for name, number in (("first", 1), ("same", 1), ("edited", 2)):
        module = write_module("my_calibrator", kind="calibrator", value="Mine", number=number)
        with tiny_run.isolated(cache):
            world.run(tmp_path, *flags, name=name)
        collected.append(bool(module.steps))
    assert collected == [True, False, True]


def test_a_list_compares_two_learners(world, cache, tmp_path, write_module):
    for name, rate in (("slow_learner", 1e-9), ("fast_learner", 30.0)):
        value = f"functools.partial(ThresholdLearning, learning_rate={rate})"
        write_module(name, kind="learner", value=value)
    common = {flag.removeprefix("--").partition("=")[0]: yaml.safe_load(flag.partition("=")[2])
              for flag in world.args(tmp_path, "--recovery=none", "--evaluation.before_recovery=false")
              if not flag.startswith(("--run.name", "--export", "--run.seed"))}  # fmt: skip
    rows = {"slow": {"stages": "slow_learner"}, "fast": {"stages": "fast_learner"}}
    (tmp_path / "learners.yaml").write_text(yaml.safe_dump({"common": common, "rows": rows}))
    with tiny_run.isolated(cache):
        assert gprune_main(["study", str(tmp_path / "learners.yaml"), "--records", str(tmp_path / "records")]) == 0
        frame = gprune.load_study(tmp_path / "learners.yaml", records=tmp_path / "records").to_frame()
    assert set(frame["row"]) == {"slow", "fast"}
    of_final = frame[(frame["stage"] == "pruned") & (frame["number"] == "unseen")]
    slow, fast = (set(of_final[of_final["row"] == row]["value"]) for row in ("slow", "fast"))
    assert slow != fast


def test_a_configuration_is_not_changed_by_its_run_and_can_be_changed_for_the_next_one(world, cache, tmp_path):
    cfg = gprune.config.parse(world.args(tmp_path, "--recovery=none", "--gprune=false", "--export=none"))
    cfg.run.name = None
    before = cfg.model_dump()
    with tiny_run.isolated(cache):
        first = gprune.prune(cfg)
        assert cfg.model_dump() == before
        cfg.sparsity.target = 0.25
        second = gprune.prune(cfg)
    assert first.path != second.path


@pytest.mark.parametrize(
    ("learner", "message"),
    [
        ("GateLearner", "A learner must be a LightningModule class with the method masks, or a functools.partial"),
        (CalibrationStage, "A learner must be a LightningModule class with the method masks"),
        (Masked, "A learner must be a LightningModule class with the method masks"),
        (functools.partial(GateLearner, 1), "A learner must be a LightningModule class"),
        (
            functools.partial(GateLearner, rat=1),
            "The arguments of learner must name options of 'GateLearner' (epoc",
        ),
        (functools.partial(GateLearner, rate=0), "The arguments of learner.rate must be more than 0; got 0."),
        (functools.partial(GateLearner, kind=1), "The arguments of learner.kind must be a valid string"),
    ],
)
def test_an_invalid_stage_from_python_is_refused_before_anything_is_loaded(learner, message):
    with pytest.raises(UserError, match="^" + re.escape(message)):
        gprune.prune(RunConfig(), learner=learner)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda labels: labels[1:], "a list with the labels of each of 3 blocks; got [tensor("),
        (lambda labels: None, "a list with the labels of each of 3 blocks; got null."),
        (lambda labels: [*labels, labels[0]], "a list with the labels of each of 3 blocks; got [tensor("),
        (lambda labels: [y + 1 for y in labels], "modules from 0 to K - 1 in each block"),
        (lambda labels: iter(labels), None),
    ],
)
def test_labels_of_a_refiner_must_have_every_block_and_number_modules_from_0(change, message):
    labels = [torch.tensor([0, 1, 1])] * 3
    if message is None:
        refined = checked_labels("mine", change(labels), labels)
        assert torch.equal(torch.stack(refined), torch.stack(labels))
        return
    with pytest.raises(UserError, match="^Refiner 'mine' must return " + re.escape(message)):
        checked_labels("mine", change(labels), labels)


INVALID = {
    "off budget": (lambda m: Masks.of_blocks([k | True for k in m.ffn], m.attention), "masks on budget"),
    "of another shape": (
        lambda m: Masks.of_blocks([k[:-1] for k in m.ffn], m.attention),
        "masks of 'neurons.0'",
    ),
    "none": (lambda m: None, "got NoneType"),
    "thresholds": (lambda m: m, "thresholds of 'neurons.0' .* not finite"),
}


class Invalid(GateLearner):
    """A learner whose masks are changed by the test, with invalid thresholds."""

    change = None
    thresholds = property(lambda self: {key: float("nan") * torch.ones(k) for key, k in self.ranks.modules.items()})

    def masks(self, budget):
        return type(self).change(super().masks(budget))


@pytest.mark.parametrize(("change", "message"), INVALID.values(), ids=INVALID)
def test_invalid_masks_and_thresholds_of_a_learner_are_refused(change, message, world, cache, tmp_path, monkeypatch):
    monkeypatch.setattr(Invalid, "change", change)
    cfg = gprune.config.parse(world.args(tmp_path))
    with tiny_run.isolated(cache), pytest.raises(UserError, match=f"Learner 'Invalid'.*{message}"):
        gprune.prune(cfg, learner=Invalid)


def test_a_learner_with_masks_for_one_budget_is_refused_for_a_quality_target(world, cache, tmp_path):
    cfg = gprune.config.parse(world.args(tmp_path, "--sparsity.target=+20%", "--evaluation.development_samples=2"))
    message = "--sparsity.target must be a share such as 0.3 for this learner; got +20%"
    with tiny_run.isolated(cache), pytest.raises(UserError, match=re.escape(message)):
        gprune.prune(cfg, learner=GateLearner)


# --- built-in stages with any Trainer


class Tempered(ThresholdLearning):
    """A subclass with another option, which a checkpoint must contain."""

    def __init__(self, *args, beta: float = 1.0, **kwargs):
        super().__init__(*args, **kwargs)
        self.beta = beta


class Hooks(L.Callback):
    """Count the hooks of the model before the last training step."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.count = hooks_of(pl_module.lm)


def windows_of(model) -> DataLoader:
    return DataLoader([{"input_ids": ids} for ids in sampled_tokens(model)], batch_size=4)


def test_threshold_learning_works_with_any_trainer_and_reloads_from_a_checkpoint(tiny_model, tmp_path):
    untrained = make_stage(tiny_model, centred=True, lr=0.5)
    start = {key: t.detach().clone() for key, t in untrained.thresholds.items()}
    inputs = {"model": tiny_model, "ranks": untrained.ranks, "start": start, "budget": untrained.budget}
    stage, hooks = Tempered(**inputs, learning_rate=0.5, loss="kl", beta=0.5), Hooks()
    trainer = trainer_of(hooks)
    trainer.fit(stage, windows_of(tiny_model))
    assert (hooks.count, hooks_of(tiny_model)) == (0, 0)  # gates are attached only during a training step
    assert stage.masks() != untrained.masks()
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    loaded = Tempered.load_from_checkpoint(tmp_path / "a.ckpt", **inputs)
    assert (loaded.masks(), loaded.learning_rate, loaded.loss, loaded.beta) == (stage.masks(), 0.5, "kl", 0.5)


def test_assignment_refinement_reloads_from_a_checkpoint(tmp_path):
    inputs, _, start = planted([120, 90], [3, 2], seed=0)
    stage = refinement(inputs, start, steps=30, final_tau=0.5)
    trainer = trainer_of()
    trainer.fit(stage)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    loaded = AssignmentRefinement.load_from_checkpoint(tmp_path / "a.ckpt", inputs=inputs, labels=start)
    assert (loaded.steps, loaded.final_tau) == (30, 0.5)
    assert all(torch.equal(a, b) for a, b in zip(loaded.labels(), stage.labels(), strict=True))


def test_distillation_reloads_from_a_checkpoint(tiny_model, tmp_path):
    def pruned():
        return slice_model(tiny_model, some_masks(tiny_model, attention=False))

    stage, trainer = DistillationStage(tiny_model, pruned(), learning_rate=0.01), trainer_of()
    trainer.fit(stage, windows_of(tiny_model))
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    loaded = DistillationStage.load_from_checkpoint(tmp_path / "a.ckpt", dense=tiny_model, student=pruned())
    assert loaded.hparams == stage.hparams
    trained, reloaded = (s.finished().state_dict() for s in (stage, loaded))
    assert all(torch.equal(trained[name], reloaded[name]) for name in trained)
    assert not torch.equal(trained["model.layers.0.mlp.up_proj.weight"], pruned().model.layers[0].mlp.up_proj.weight)
