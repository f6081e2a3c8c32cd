"""What the bar of a stage says while something is learned."""

from __future__ import annotations

import io
from contextlib import nullcontext
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from rich.console import Console

from gprune.config import DistillConfig
from gprune.corpora.loaders import CorpusDataModule
from gprune.corpora.windows import Windows
from gprune.errors import UserError
from gprune.models.surgery import prune
from gprune.runs.meeting import Meeting
from gprune.runs.progress import StageBar
from gprune.screen import Screen
from gprune.stages.distillation import DistillationStage
from tests.tiny_families import some_masks


@pytest.mark.parametrize(("of_the_first", "lacking"), [("one", [False, True]), ("another", None)])
def test_processes_meet_at_one_run(of_the_first, lacking):
    """A stand-in for the first of two processes: it lacks the second thing, and is at a run of its own."""

    class Strategy:
        def broadcast(self, mine):
            return of_the_first

        def reduce_boolean_decision(self, mine, all):
            return mine or next(others)

    others = iter([False, False, True])
    meeting = Meeting("one", [False, False])
    meeting._trainer = SimpleNamespace(strategy=Strategy())
    with nullcontext() if lacking else pytest.raises(UserError, match="at different runs of a list"):
        meeting.setup("test")
        assert meeting.lacking == lacking


def test_the_bar_says_what_is_going_on_and_how_fast(tiny_model):
    console = Console(file=io.StringIO(), width=100, force_terminal=True, color_system=None)
    said = []

    class Look(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            console.print(screen)
            said.append(console.file.getvalue().splitlines()[-1])

    stage = DistillationStage(tiny_model, prune(tiny_model, some_masks(tiny_model, attention=False)), DistillConfig())
    text = [Windows("demo", "train", torch.arange(64).view(4, 16))]
    screen = Screen(console=console)
    trainer = L.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_model_summary=False,
        use_distributed_sampler=False, callbacks=[StageBar(screen, "Distilling 3 numbers"), Look()],
    )  # fmt: skip
    trainer.fit(stage, CorpusDataModule(train=text, batch_size=2, seed=0))
    assert [line.startswith("Distilling 3 numbers, distill/loss ") for line in said] == [True, True]
    assert all("tokens/s" in line for line in said), said
