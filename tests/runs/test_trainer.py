"""Trainer checks for distributed runs, and the progress bar of a stage."""

from __future__ import annotations

import io
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from lightning.fabric.accelerators import MPSAccelerator
from rich.console import Console

from gprune.config import RunConfig
from gprune.config.running import TrainerConfig
from gprune.corpora.loaders import CorpusDataModule
from gprune.corpora.windows import Windows
from gprune.errors import UserError
from gprune.method import prune as steps
from gprune.models.surgery import slice_model
from gprune.runs.trainer import RANKS, StageBar, check_trainer, placement
from gprune.screen import Screen
from gprune.stages.distillation import DistillationStage
from tests import tiny_run
from tests.world import some_masks

LEFTOVER_VARIABLES = [  # variables, number of devices, words of the message (None: accepted)
    ({"RANK": "1"}, 1, "RANK=1,"), ({"LOCAL_RANK": "2", "WORLD_SIZE": "4"}, 1, "LOCAL_RANK=2,"),
    ({"SLURM_PROCID": "3", "SLURM_NTASKS": "4"}, 1, "SLURM_PROCID=3,"), ({"NODE_RANK": "1"}, 1, "NODE_RANK=1,"),
    ({"LOCAL_RANK": "0"}, 2, "LOCAL_RANK=0,"), ({"RANK": "1"}, 2, "RANK=1,"),
    ({"SLURM_NTASKS": "1", "SLURM_JOB_NAME": "zsh"}, 2, "SLURM_NTASKS=1"),
    ({"RANK": "0", "LOCAL_RANK": "0", "SLURM_PROCID": "0", "SLURM_NTASKS": "1"}, 1, None),
    ({"WORLD_SIZE": "4"}, 1, None),
    ({"LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}, 2, None),
    ({"SLURM_NTASKS": "1", "SLURM_PROCID": "0", "SLURM_JOB_NAME": "bash"}, 2, None),
]  # fmt: skip


@pytest.mark.parametrize(("variables", "devices", "message"), LEFTOVER_VARIABLES)
def test_rank_variables_are_refused_unless_other_processes_are_expected(variables, devices, message, monkeypatch):
    for name in (*RANKS, "WORLD_SIZE", "MASTER_ADDR", "SLURM_NTASKS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    settings = {"accelerator": "cpu", "devices": devices, "num_nodes": 1, "strategy": "auto"}
    if message is None:
        check_trainer(**settings)
        return
    with pytest.raises(UserError, match=f"; got {message}.*Unset the variable") as error:
        check_trainer(**settings)
    assert error.value.rank_local  # this process reports the error itself, although its rank is not 0


@pytest.mark.parametrize(("accelerator", "device"), [("auto", "cpu"), ("gpu", None)])
def test_on_a_mac_auto_is_the_cpu_and_its_gpu_is_refused(accelerator, device, monkeypatch):
    """The Mac is simulated: without `auto` replaced by cpu, Lightning would choose its GPU."""
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(MPSAccelerator, "is_available", staticmethod(lambda: True))
    settings = placement(TrainerConfig(accelerator=accelerator))
    if device is None:
        with pytest.raises(UserError, match="must be cpu on this machine; got gpu"):
            check_trainer(**settings)
    else:
        assert check_trainer(**settings).type == device


@pytest.mark.slow
def test_a_leftover_rank_variable_ends_train_py_in_one_line(tmp_path):
    args = tiny_run.make_world(tmp_path).args(tmp_path, "--gprune=false", "--export=none", "--dry_run=true")
    (done,) = tiny_run.train(args, tmp_path, RANK="1")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert done.stderr.startswith("train.py: The number of processes must be 1 ")


@pytest.mark.parametrize(("run_of_rank_0", "missing"), [("one", [False, True]), ("another", None)])
def test_statistics_that_any_process_lacks_count_as_missing_for_all_processes(run_of_rank_0, missing, monkeypatch):
    """The simulated rank 0 lacks the second item, or works on another run, which is an error."""

    class Strategy:
        def broadcast(self, mine):
            return run_of_rank_0

        def reduce_boolean_decision(self, mine, all):
            return mine or next(others)

    others, strategy = iter([False, False, True]), Strategy()
    fabric = SimpleNamespace(launch=lambda: None, broadcast=strategy.broadcast, strategy=strategy)
    monkeypatch.setattr(steps, "launch_processes", lambda _: fabric)
    run = SimpleNamespace(cfg=RunConfig(), folder=SimpleNamespace(key="one"))
    with nullcontext() if missing else pytest.raises(UserError, match="at the same run of a list"):
        assert steps.missing_on_any_rank(run, [False, False]) == missing


def test_the_progress_bar_shows_the_stage_its_loss_and_tokens_per_second(tiny_model):
    console = Console(file=io.StringIO(), width=100, force_terminal=True, color_system=None)
    bars = []

    class RecordBar(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            console.print(screen)
            bars.append([line for line in console.file.getvalue().splitlines() if line.strip()][-1])

    stage = DistillationStage(tiny_model, slice_model(tiny_model, some_masks(tiny_model, attention=False)))
    text = [Windows("demo", "train", torch.arange(64).view(4, 16))]
    screen = Screen({0: 64}, console=console)
    trainer = L.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_model_summary=False,
        enable_progress_bar=False, use_distributed_sampler=False,
        callbacks=[StageBar(screen, "Distilling 3 numbers"), RecordBar()],
    )  # fmt: skip
    trainer.fit(stage, CorpusDataModule(train=text, batch_size=2, seed=0))
    assert [line.startswith("Distilling 3 numbers, distill/loss ") for line in bars] == [True, True]
    assert all("tokens/s" in line for line in bars), bars
