"""A stage whose losses are not finite under autocast goes on in float32, and says so."""

from __future__ import annotations

import logging

import lightning as L
import pytest
import torch

from gprune.corpora.loaders import CorpusDataModule
from gprune.corpora.windows import Windows
from gprune.models.blocks import blocks_of
from gprune.models.surgery import prune
from gprune.stages.distillation import DistillationStage
from tests.tiny_families import some_masks

SAID = "The loss of distillation is not finite in bfloat16. Falling back to float32."


def distilled(dense, *, precision, measured=False):
    """What a student has learned from eight windows, `measured` on development text before, and its stage."""
    stage = DistillationStage(dense, prune(dense, some_masks(dense, attention=False)))
    text = [Windows("demo", "train", torch.arange(128).view(8, 16))]
    development = [Windows("demo", "development", torch.arange(32).view(2, 16))] if measured else []
    data = CorpusDataModule(train=text, validation=development, batch_size=2, seed=0)
    trainer = L.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_model_summary=False,
        enable_progress_bar=False, use_distributed_sampler=False, precision=precision,
    )  # fmt: skip
    if measured:
        trainer.validate(stage, data, verbose=False)
    trainer.fit(stage, data)
    return {name: t.clone() for name, t in stage.state_dict().items()}, stage


def said(caplog):
    """Warnings of gprune."""
    return [r.message for r in caplog.records if r.name == "gprune" and r.levelno >= logging.WARNING]


@pytest.fixture
def overflowing(tiny_model):
    """A dense model whose second block overflows in bfloat16 alone."""

    def overflow(_module, _inputs, output):
        return output * float("inf") if torch.is_autocast_enabled("cpu") else output

    handle = blocks_of(tiny_model)[1].layer.mlp.register_forward_hook(overflow)
    yield tiny_model
    handle.remove()


@pytest.mark.parametrize("measured", [False, True])
def test_losses_that_bfloat16_cannot_hold_are_learned_in_float32(measured, overflowing, caplog):
    with caplog.at_level(logging.WARNING, logger="gprune"):
        learned, stage = distilled(overflowing, precision="bf16-mixed", measured=measured)
    assert said(caplog) == [SAID]
    assert stage.autocast.in_float32
    expected, other = distilled(overflowing, precision="32-true", measured=measured)
    assert not other.autocast.in_float32
    assert all(torch.equal(learned[name], t) for name, t in expected.items())


def test_finite_losses_stay_in_bfloat16(tiny_model, caplog):
    learned, stage = distilled(tiny_model, precision="bf16-mixed")
    expected, _ = distilled(tiny_model, precision="32-true")
    assert (said(caplog), stage.autocast.in_float32) == ([], False)
    assert any(not torch.equal(learned[name], t) for name, t in expected.items())


def test_a_checkpoint_remembers_float32(overflowing):
    _, stage = distilled(overflowing, precision="bf16-mixed")
    checkpoint = {}
    stage.on_save_checkpoint(checkpoint)
    resumed = DistillationStage(overflowing, prune(overflowing, some_masks(overflowing, attention=False)))
    resumed.on_load_checkpoint(checkpoint)
    assert resumed.autocast.in_float32
