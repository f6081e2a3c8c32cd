"""Pruning in steps: the same budget, on a model that is recovered and scored again between them."""

from __future__ import annotations

import math

import pytest
import torch

from gprune.cli import main
from gprune.models.loading import load_model
from gprune.models.masks import Masks
from gprune.models.surgery import prune, removed_parameters
from gprune.pipeline.plan import check
from gprune.runs.folder import corpus_file
from gprune.stages.distillation import DistillationStage
from gprune.stages.threshold_learning import ThresholdLearning
from gprune.storage.files import read_tensors
from tests import tiny_run


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("schedule")
    world = tiny_run.make_world(folder)
    with tiny_run.isolated(folder / "cache"), pytest.MonkeyPatch.context() as patch:
        tiny_run.quick(patch)
        yield world


STEPS = ("--sparsity.schedule=[0.2,0.35,0.5]", "--evaluation.controls=[]")
LEARNS = ("--recovery=[least_squares,distill]", "--distill.tokens=576")


def test_masks_apply_to_what_the_others_kept():
    outer = Masks([torch.tensor([True, False, True, True])], [torch.tensor([True, True])])
    inner = Masks([torch.tensor([False, True, True])], [torch.tensor([True, False])])
    found = outer.within(inner)
    assert [m.tolist() for m in (*found.ffn, *found.attention)] == [[False, False, True, True], [True, False]]
    assert outer.ffn[0].tolist() == [True, False, True, True]


@pytest.mark.parametrize(
    "flags",
    [
        ("--gprune=false", "--recovery=least_squares_sequential"),
        ("--sparsity.scope=attention+ffn", *LEARNS),
        ("--sparsity.width_multiple=8", "--gprune=false"),
    ],
)
def test_it_ends_at_the_target_with_masks_of_the_dense_model(flags, world, tmp_path):
    result = world.run(tmp_path, *STEPS, *flags)
    dense, _ = load_model(str(world.model))
    plan = check(result.config)
    removed, asked = removed_parameters(dense, result.masks), math.ceil(plan.budget.costs.total * 0.5)
    assert removed == asked if "width" not in str(flags) else 0 <= removed - asked < 8 * max(plan.budget.costs.neuron)
    sliced = prune(dense, result.masks)
    assert {n: t.shape for n, t in sliced.state_dict().items()} == {
        n: t.shape for n, t in result.model.state_dict().items()
    }
    # each step keeps some of what the one before has kept
    width = [int(mask.sum()) for mask in result.masks.ffn]
    steps = sorted((result.path / "steps").iterdir())
    assert [step.name for step in steps] == ["1-0.2", "2-0.35"]
    if "--gprune=false" not in flags:
        assert all((step / "thresholds.safetensors").is_file() for step in steps)
        assert sum(width) < sum(len(labels) for labels in result.modules.labels) < 3 * tiny_run.NEURONS
    assert result.summary["forward_backward_tokens"] == plan.forward_backward_tokens
    assert result.summary["forward_tokens"] <= plan.forward_tokens


def test_what_is_left_is_scored_again_and_the_teacher_is_the_dense_model(world, tmp_path, monkeypatch):
    teachers, texts = [], []
    real = DistillationStage.training_step

    def step(self, batch, index):
        teachers.append(sum(p.numel() for p in self.lm.parameters()))
        texts.extend(map(tuple, batch["input_ids"].tolist()))
        return real(self, batch, index)

    monkeypatch.setattr(DistillationStage, "training_step", step)
    flags = (*LEARNS, "--gprune=false", "--evaluation.controls=[]")
    once = world.run(tmp_path, *flags, name="once")
    seen, texts[:] = set(texts), []
    steps = world.run(tmp_path, *flags, STEPS[0], name="steps")
    assert set(teachers) == {sum(p.numel() for p in load_model(str(world.model))[0].parameters())}
    assert len(texts) == 18  # no window twice, and in all those of one step
    assert set(texts) == seen
    assert steps.masks != once.masks
    name = corpus_file(str(world.corpora["alpha"]))
    dense, left = (read_tensors(run.path / f"statistics/{name}.safetensors") for run in (once, steps))
    widths = {kind: found["ffn.0.0.sum_sq"].numel() for kind, found in (("dense", dense), ("left", left))}
    assert widths["left"] < widths["dense"] == tiny_run.NEURONS


def test_taken_up_it_learns_nothing_again(world, tmp_path, monkeypatch):
    first = world.run(tmp_path, *STEPS, *LEARNS)
    for stage in (DistillationStage, ThresholdLearning):
        monkeypatch.setattr(stage, "training_step", lambda *_: pytest.fail("learned again"))
    (first.path / "metrics.json").unlink()
    again = world.run(tmp_path, *STEPS, *LEARNS)
    assert again.masks == first.masks
    assert [r["nll"] for r in again.records] == [r["nll"] for r in first.records]


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        (["--sparsity.schedule=[0.4,0.3]"], "expected rising sparsities below --sparsity.target 0.5"),
        (["--sparsity.schedule=[0.6]"], "expected rising sparsities below"),
        (["--sparsity.schedule=[0.3]"], "expected --evaluation.controls [] with it"),
        ([*STEPS, *LEARNS[:1], "--distill.tokens=192"], "for each pruning step, "),
        ([*STEPS, "--gprune=false", "--sparsity.allocation=depth"], "whole blocks go in one step"),
    ],
)
def test_schedules_that_cannot_be_are_one_line(flags, why, world, tmp_path, capsys):
    assert main(world.args(tmp_path / "runs", *flags)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert why in line
    assert not (tmp_path / "runs").exists()
