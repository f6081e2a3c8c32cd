"""A stage whose losses are not finite under autocast continues in float32 with a warning."""

from __future__ import annotations

import logging

import lightning as L
import pytest
import torch

from gprune.corpora.loaders import CorpusDataModule
from gprune.corpora.windows import Windows
from gprune.models.surgery import slice_model
from gprune.stages.distillation import DistillationStage
from tests.world import some_masks

WARNING = "The loss of distillation is not finite in bfloat16. Falling back to float32."


def distill(dense, *, precision, validated=False):
    """Train a student on eight windows, optionally after a validation. Return the learned state and the stage."""
    stage = DistillationStage(dense, slice_model(dense, some_masks(dense, attention=False)))
    text = [Windows("demo", "train", torch.arange(128).view(8, 16))]
    development = [Windows("demo", "development", torch.arange(32).view(2, 16))] if validated else []
    data = CorpusDataModule(train=text, validation=development, batch_size=2, seed=0)
    trainer = L.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_model_summary=False,
        enable_progress_bar=False, use_distributed_sampler=False, precision=precision,
    )  # fmt: skip
    if validated:
        trainer.validate(stage, data, verbose=False)
    trainer.fit(stage, data)
    return {name: t.clone() for name, t in stage.state_dict().items()}, stage


def warnings_of(caplog):
    """Warnings of gprune's logger."""
    return [r.message for r in caplog.records if r.name == "gprune" and r.levelno >= logging.WARNING]


@pytest.fixture
def overflowing(tiny_model):
    """A dense model whose second block overflows only in bfloat16."""

    def overflow(_module, _inputs, output):
        return output * float("inf") if torch.is_autocast_enabled("cpu") else output

    handle = tiny_model.model.layers[1].mlp.register_forward_hook(overflow)
    yield tiny_model
    handle.remove()


@pytest.mark.parametrize("validated", [False, True])
def test_distillation_falls_back_to_float32_if_losses_overflow_in_bfloat16(validated, overflowing, caplog):
    with caplog.at_level(logging.WARNING, logger="gprune"):
        learned, stage = distill(overflowing, precision="bf16-mixed", validated=validated)
    assert warnings_of(caplog) == [WARNING]
    assert stage.in_float32
    expected, float32_stage = distill(overflowing, precision="32-true", validated=validated)
    assert not float32_stage.in_float32  # it did not have to fall back
    assert all(torch.equal(learned[name], t) for name, t in expected.items())


def test_distillation_with_finite_losses_uses_bfloat16(tiny_model, caplog):
    learned, stage = distill(tiny_model, precision="bf16-mixed")
    expected, _ = distill(tiny_model, precision="32-true")
    assert (warnings_of(caplog), stage.in_float32) == ([], False)
    assert any(not torch.equal(learned[name], t) for name, t in expected.items())


def test_the_fallback_to_float32_is_saved_in_checkpoints(overflowing):
    _, stage = distill(overflowing, precision="bf16-mixed")
    checkpoint = {}
    stage.on_save_checkpoint(checkpoint)
    resumed = DistillationStage(overflowing, slice_model(overflowing, some_masks(overflowing, attention=False)))
    resumed.on_load_checkpoint(checkpoint)
    assert resumed.in_float32
