"""Compare training steps of gprune with plain PyTorch steps under bfloat16 autocast, and whole runs in each precision.

A bare step is that of a plain PyTorch loop: forward, loss over all logits, backward, AdamW. Both distil the same pruned
model from the same dense model. For thresholds, the dense model is frozen, and its input has a gradient.
"""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from gprune.calibration.collector import Collector
from gprune.corpora.loaders import CorpusDataModule
from gprune.corpora.windows import Windows
from gprune.errors import UserError
from gprune.evaluation.intervals import geometric_mean
from gprune.evaluation.perplexity import perplexity
from gprune.models.products import multiplies_bfloat16
from gprune.models.units import units_of
from gprune.partition.modules import ranks_in_modules
from gprune.sparsity.budget import budget_of
from gprune.sparsity.thresholds import start_thresholds
from gprune.stages.callbacks import StepCurves
from gprune.stages.distillation import DistillationStage
from gprune.stages.threshold_learning import ThresholdLearning
from gprune.storage.paths import cache_dir

from .measure import Table, in_turn
from .models import Settings, pair_of, random_masks, tokens

STEP, RUN, UNSEEN, EVALUATION = 1.15, 0.55, 0.02, 0.8  # goals
# Names and flags of whole runs. `--model.dtype` is also the precision of statistics and evaluation.
PRECISIONS = (
    ("32-true", ("--trainer.precision", "32-true")),
    ("auto", ("--trainer.precision", "auto")),
    ("auto, weights in bfloat16", ("--trainer.precision", "auto", "--model.dtype", "bfloat16")),
)
ROOT = Path(__file__).parents[2]


class Steps(L.Callback):
    """A `Trainer.fit` in a separate thread, which does one training step per call, including logged curves."""

    def __init__(self, stage: L.LightningModule, data: L.LightningDataModule, device: torch.device, precision: str):
        self.error: BaseException | None = None
        self.ended, self.go, self.done = False, threading.Semaphore(0), threading.Semaphore(0)
        trainer = L.Trainer(
            accelerator=device.type, devices=1, precision=precision, max_epochs=10**6, logger=False,
            enable_checkpointing=False, enable_model_summary=False, enable_progress_bar=False,
            use_distributed_sampler=False, callbacks=[StepCurves(), self], log_every_n_steps=1,
        )  # fmt: skip
        self.thread = threading.Thread(target=self._fit, args=(trainer, stage, data), daemon=True)

    def _fit(self, *fit: Any) -> None:
        trainer, stage, data = fit
        try:
            trainer.fit(stage, data)
        except BaseException as error:
            self.error = error
        self.done.release()

    def begin(self) -> None:
        """Start the fit, and wait until its first step begins."""
        self.thread.start()
        self._wait()

    def __call__(self) -> None:
        """Run a step until the next one begins."""
        self.go.release()
        self._wait()

    def _wait(self) -> None:
        self.done.acquire()
        if self.error is not None:
            raise self.error
        assert self.thread.is_alive(), "the fit has ended"

    def end(self) -> None:
        """Stop the fit."""
        if self.thread.is_alive():
            self.ended = True
            self.go.release()
            self.thread.join()

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> int | None:
        self.done.release()
        self.go.acquire()
        trainer.should_stop = self.ended
        return -1 if self.ended else None


def learning(settings: Settings, clock: Callable[[], float] = time.perf_counter) -> list[Table]:
    """Compare steps of distillation and threshold learning with bare steps, and evaluation with calibration."""
    pair, device = pair_of(settings), settings.device
    dense, pruned = pair.models.values()
    kept = [settings.batch_sizes[0], settings.batch_sizes[-1]]  # batch sizes of distillation and of thresholds
    rows = []
    for name, batch, bare, make in (
        ("distillation", kept[0], bare_distillation, distillation),
        ("thresholds", kept[1], bare_thresholds, thresholds),
    ):
        ids = tokens(dense, batch, settings.seq_len, settings.seed)
        text = [Windows("random", "train", tokens(dense, 8 * batch, settings.seq_len, settings.seed).cpu())]
        steps = {p: make(dense, pruned, settings, text, batch, p) for p in ("bf16-mixed", "32-true")}
        calls: dict[str, Callable[[], object]] = {"bare": bare(dense, pruned, ids), **steps}
        try:
            for step in steps.values():
                step.begin()
            timing = in_turn(calls, settings.repeats, device, clock=clock)
        finally:
            for step in steps.values():
                step.end()
        over = timing.ratio("bf16-mixed", "bare")
        row = [f"{name}, {batch} x {settings.seq_len} tokens", *(timing.median(key) for key in calls), over]
        row += [timing.range("bf16-mixed", "bare"), STEP, over <= STEP, timing.ratio("bf16-mixed", "32-true")]
        rows.append(row)
    protocol = settings.protocol(dense, pair.how)
    header = ["", "bare, s", "bf16-mixed, s", "32-true, s", "bf16-mixed / bare", "rounds", "goal", "met"]
    return [
        Table("Learning, a step", f"{protocol} {hardware(device)}", [*header, "bf16-mixed / 32-true"], rows),
        passes(settings, dense, pruned, protocol, clock),
    ]


def passes(
    settings: Settings, dense: PreTrainedModel, pruned: PreTrainedModel, protocol: str, clock: Callable[[], float]
) -> Table:
    """Time calibration, and evaluation of the dense model and of a row with KL from it, in --dtype."""
    text = Windows("random", "test", tokens(dense, settings.batch_sizes[-1], settings.seq_len, settings.seed).cpu())
    halves, forecasts = torch.arange(len(text.tokens)) % 2, []
    perplexity(dense, text, forecasts=forecasts)

    def calibrate() -> None:
        with Collector(dense, gram=True) as collector:
            collector.observe(text.tokens.to(settings.device), halves.to(settings.device))

    calls: dict[str, Callable[[], object]] = {
        "calibration": calibrate, "dense": lambda: perplexity(dense, text, forecasts=[]),
        "row": lambda: perplexity(pruned, text, forecasts=forecasts),
    }  # fmt: skip
    timing, count = in_turn(calls, settings.repeats, settings.device, clock=clock), text.tokens.numel()
    rates = {name: count / timing.median(name) for name in calls}
    # The first table of a default run has the dense model and three rows.
    share = 4 * timing.median("calibration") / (timing.median("dense") + 3 * timing.median("row"))
    header = ["calibration, tokens/s", "dense, tokens/s", "row, tokens/s", "evaluation / calibration", "goal", "met"]
    return Table(
        "Passes", f"{protocol} Evaluation: the dense model with its forecasts, and three rows with KL.", header,
        [[*rates.values(), share, EVALUATION, share >= EVALUATION]],
    )  # fmt: skip


def distillation(
    dense: PreTrainedModel, pruned: PreTrainedModel, settings: Settings, text: list[Windows], batch: int, precision: str
) -> Steps:
    """Steps of a `DistillationStage`, including the teacher's forward pass."""
    stage = DistillationStage(dense, copy.deepcopy(pruned))
    return Steps(stage, CorpusDataModule(train=text, batch_size=batch, seed=settings.seed), settings.device, precision)


def thresholds(
    dense: PreTrainedModel, pruned: PreTrainedModel, settings: Settings, text: list[Windows], batch: int, precision: str
) -> Steps:
    """Steps of `ThresholdLearning` with eight modules per block and random ranks."""
    masks, generator = random_masks(dense, settings), torch.Generator().manual_seed(settings.seed)
    budget = budget_of(units_of(dense), settings.sparsity, settings.width_multiple, scope="ffn")

    def ranks(count: int) -> Tensor:
        return (torch.randperm(count, generator=generator).double() + 0.5) / count

    labels = [torch.arange(len(mask)) % min(8, len(mask)) for mask in masks.ffn]
    modules = ranks_in_modules({key: ranks(len(mask)) for key, mask in masks.items()}, labels)
    # The model is copied, since gates of another stage would also affect this one.
    stage = ThresholdLearning(copy.deepcopy(dense), modules, start_thresholds(masks, modules), budget)
    return Steps(stage, CorpusDataModule(train=text, batch_size=batch, seed=settings.seed), settings.device, precision)


def bare_distillation(dense: PreTrainedModel, pruned: PreTrainedModel, ids: Tensor) -> Callable[[], None]:
    """Return a plain distillation step with autocast: logits of both models, KL, backward, fused AdamW."""
    student = copy.deepcopy(pruned).float()
    learned = list(student.get_decoder().layers.parameters())
    optimizer = torch.optim.AdamW([p.requires_grad_() for p in learned], lr=1e-9, fused=True)

    def step() -> None:
        with torch.autocast(ids.device.type, torch.bfloat16):
            with torch.no_grad():
                teacher = dense(input_ids=ids, use_cache=False).logits[:, :-1].flatten(0, 1).float()
            student_logits = student(input_ids=ids, use_cache=False).logits[:, :-1].flatten(0, 1).float()
            loss = F.kl_div(
                student_logits.log_softmax(-1), teacher.log_softmax(-1), log_target=True, reduction="batchmean"
            )
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def bare_thresholds(dense: PreTrainedModel, pruned: PreTrainedModel, ids: Tensor) -> Callable[[], None]:
    """Return a plain step with autocast: forward and backward through the frozen dense model to its first layer."""
    embedded = dense.get_input_embeddings()(ids).detach().requires_grad_()

    def step() -> None:
        with torch.autocast(ids.device.type, torch.bfloat16):
            logits = dense(inputs_embeds=embedded, use_cache=False).logits[:, :-1].flatten(0, 1)
            loss = F.cross_entropy(logits.float(), ids[:, 1:].flatten())
        loss.backward()
        embedded.grad = None

    return step


def hardware(device: torch.device) -> str:
    """A sentence about the value of `--trainer.precision auto` on this machine."""
    fast, why = multiplies_bfloat16(device)
    return f"`--trainer.precision auto` is {'bf16-mixed' if fast else '32-true'} here: {why}."


def whole_runs(flags: list[str], repeats: int) -> list[Table]:
    """Run `train.py` alternately in several precisions, each time with an empty cache of statistics.

    Raises:
        UserError: if a run fails.
    """
    rows = []
    for turn in range(repeats):
        order = PRECISIONS[:: -1 if turn % 2 else 1]
        made = {name: one_run([*flags, *precision]) for name, precision in order}
        for name, _ in PRECISIONS:
            run, base = made[name], made["32-true"]
            over, beside = run["seconds"] / base["seconds"], run["unseen"] / base["unseen"]
            goals = {}
            if run["evaluation"] is not None:
                goals["evaluation"] = run["evaluation"] >= EVALUATION
            if run["precision"] != base["precision"]:
                goals |= {"run": over <= RUN, "unseen": abs(beside - 1) <= UNSEEN}
            rows.append([
                f"{name} ({run['precision']}), {turn}", run["seconds"], over, run["unseen"], beside, run["evaluation"],
                ", ".join(goal for goal, is_met in goals.items() if not is_met) or "none",
            ])  # fmt: skip
    header = [
        "",
        "run, s",
        "over 32-true",
        "unseen / dense",
        "over 32-true",
        "evaluation / calibration",
        "goals missed",
    ]
    note = f"Goals: run {RUN} of 32-true, unseen / dense within {UNSEEN:.0%}, evaluation {EVALUATION}."
    about = f"`train.py {' '.join(flags)}`, {torch.get_num_threads()} threads. {note}"
    return [Table("A whole run", f"{about} {hardware(torch.device('cpu'))}", header, rows)]


def one_run(flags: list[str]) -> dict[str, Any]:
    """Run `train.py` once. Returns its seconds and results."""
    with tempfile.TemporaryDirectory() as scratch:
        cache = Path(scratch) / "cache"
        cache.mkdir()
        for kept in ("models", "wheels"):  # downloaded files
            (cache_dir() / kept).mkdir(parents=True, exist_ok=True)
            (cache / kept).symlink_to(cache_dir() / kept)
        own = ["--run.dir", scratch, "--run.name", "run"]

        done = subprocess.run(
            [sys.executable, "train.py", *flags, *own], cwd=ROOT, capture_output=True, text=True,
            check=False, env=os.environ | {"GPRUNE_CACHE": str(cache), "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        if done.returncode:
            raise UserError(f"Cannot run train.py: {done.stderr.strip().splitlines()[-1].removesuffix('.')}.")
        folder = Path(scratch) / "run"
        manifest = json.loads((folder / "manifest.json").read_text())
        records = json.loads((folder / "metrics.json").read_text())["records"]
    steps = manifest["steps"]

    def speed(name: str) -> float | None:
        return steps[name]["forward_tokens"] / steps[name]["seconds"] if name in steps else None

    final = records[-1]["stage"]
    unseen = {
        stage: geometric_mean(r["perplexity"] for r in records if r["stage"] == stage and not r["seen"])
        for stage in ("dense", final)
    }
    evaluation, calibration = speed("evaluate_pruned"), speed("calibrate")
    return {
        "seconds": sum(step["seconds"] for step in steps.values()),
        "precision": manifest["settings"]["trainer"]["precision"],
        "unseen": unseen[final] / unseen["dense"],
        "evaluation": evaluation and calibration and evaluation / calibration,
    }
