"""Lightning callbacks: curves of stages that learn, for the loggers."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import Logger
from torch import Tensor
from torch.nn.utils import get_total_norm
from transformers import PreTrainedModel

from gprune.corpora.load import corpus_labels
from gprune.corpora.windows import Windows
from gprune.evaluation.intervals import geometric_mean
from gprune.evaluation.perplexity import perplexity
from gprune.models.masks import Masks
from gprune.models.offload import gathered, is_sharded
from gprune.partition.modules import Modules
from gprune.partition.reliability import module_means
from gprune.runs.results import key_part
from gprune.runs.tracking import log_scalars
from gprune.sparsity.budget import Budget
from gprune.sparsity.gates import masked

log = logging.getLogger("gprune")


class StepCurves(L.Callback):
    """Logs of every step of a stage the tokens so far, tokens per second, the step size and the norm of the gradient.

    The norm is that before clipping.
    """

    def on_train_batch_start(self, *_: Any) -> None:
        self._began = time.monotonic()

    @torch.no_grad()
    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        """Note the step size and the norm of the gradient."""
        group, stage = optimizer.param_groups[0], curves_of(pl_module)
        if hasattr(pl_module, "gradient_norm"):
            norm = pl_module.gradient_norm()
        else:
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            norm = get_total_norm([p.grad for p in parameters if p.grad is not None])
        rate = group["lr"] / (group.get("size") or 1)  # of a relative step size, that without units
        pl_module.log_dict({f"{stage}/gradient_norm": gathered(norm), f"{stage}/learning_rate": float(rate)})

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        tokens, stage = batch["input_ids"].numel() * trainer.world_size, curves_of(pl_module)
        rate = tokens / (time.monotonic() - self._began)
        pl_module.log_dict({f"{stage}/tokens": tokens_so_far(trainer), f"{stage}/tokens_per_second": rate})


class PerplexityCurve(L.Callback):
    """Logs development perplexity per corpus against the epoch of learning, and against sparsity.

    Against the epoch: at the start and after each epoch, at the target sparsity. Against sparsity: at the end, with the
    stage's masks for each of `budgets`, and of the dense model at 0. Processes share the windows.

    Args:
        model: the dense model, for a stage that has no `lm`.
        masks: the stage's, for a budget.
        budgets: by sparsity, that of the target first.
    """

    def __init__(
        self, model: PreTrainedModel, windows: Sequence[Windows], masks: Callable[[Budget], Masks], *,
        budgets: dict[float, Budget], batch_size: int = 4,
    ):  # fmt: skip
        self.model, self.windows, self.masks, self.budgets, self.batch_size = model, windows, masks, budgets, batch_size
        self.by_epoch: list[dict[str, float]] = []
        self.by_sparsity: dict[float, dict[str, float]] = {}

    def state_dict(self) -> dict[str, list[dict[str, float]]]:
        return {"by_epoch": self.by_epoch}

    def load_state_dict(self, state: dict[str, list[dict[str, float]]]) -> None:
        self.by_epoch = state["by_epoch"]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not self.by_epoch:  # else it goes on from a checkpoint
            self._epoch_point(trainer, pl_module, 0)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._epoch_point(trainer, pl_module, trainer.current_epoch + 1)

    @torch.no_grad()
    def _epoch_point(self, trainer: L.Trainer, pl_module: L.LightningModule, epoch: int) -> None:
        model, masks = getattr(pl_module, "lm", self.model), self.masks(next(iter(self.budgets.values())))
        if open_gates := getattr(pl_module, "open_gates", None):
            open_gates()  # gates that are applied would come on top
        with masked(model, masks):
            self.by_epoch.append(self._measured(trainer, pl_module, model))
        tokens = tokens_so_far(trainer)
        axes = {"learn/epoch": float(epoch), "learn/tokens": tokens}
        log_perplexities(trainer, "learn", axes, self.by_epoch[-1], trainer.global_step, development_tokens=tokens)

    @torch.no_grad()
    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Runs when all gates are taken off."""
        model = getattr(pl_module, "lm", self.model)
        self.by_sparsity[0.0] = self._measured(trainer, pl_module, model)
        for sparsity, budget in self.budgets.items():
            with masked(model, self.masks(budget)) as lm:
                self.by_sparsity[sparsity] = self._measured(trainer, pl_module, lm)
        for step, (sparsity, values) in enumerate(sorted(self.by_sparsity.items())):
            log_perplexities(trainer, "curve", {"curve/sparsity": sparsity}, values, step)

    def _measured(self, trainer: L.Trainer, stage: L.LightningModule, model: PreTrainedModel) -> dict[str, float]:
        return measured_as_learned(trainer, stage, model, self.windows, self.batch_size)


class DevelopmentCurve(L.Callback):
    """Logs development perplexity per corpus of a stage's `student` against the tokens that it has learned from.

    At the start, and `points` times equally far apart, the last one at the end. Processes share the windows.

    Args:
        windows: development text.
        points: measurements after the first.
        keep: best: the student ends with the weights of the measurement whose geometric mean is lowest.
        tokens_before: that the run's own model has learned from before this stage; None for a control.
    """

    def __init__(
        self, windows: Sequence[Windows], *, points: int, keep: str = "last", batch_size: int = 4,
        tokens_before: int | None = None,
    ):  # fmt: skip
        self.windows, self.points, self.keep, self.batch_size = windows, points, keep, batch_size
        self.tokens_before = tokens_before
        self.measured: dict[int, float] = {}  # geometric mean by step
        self.best: dict[str, Tensor] = {}  # the state of the stage at the lowest mean, on the CPU
        self.due: set[int] = set()  # steps after which it measures

    def state_dict(self) -> dict[str, Any]:
        return {"measured": self.measured, "best": self.best}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.measured, self.best = state["measured"], state["best"]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        steps = trainer.estimated_stepping_batches
        points = min(self.points, steps)  # no more than there are steps
        self.due = {round(steps * point / points) for point in range(1, points + 1)}
        if not self.measured:  # else it goes on from a checkpoint
            self._measure(trainer, pl_module)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        if trainer.global_step in self.due - self.measured.keys():
            self._measure(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Put the best weights back, if they are to be kept, or if perplexity ends above where it began."""
        if trainer.global_step not in self.measured:  # learning has ended early
            self._measure(trainer, pl_module)
        means = list(self.measured.values())
        harm = bool(means) and not means[-1] <= means[0]
        if harm:
            step, best = min(self.measured.items(), key=lambda point: point[1] if math.isfinite(point[1]) else math.inf)
            log.warning(
                "Development perplexity ends at %.4g, where it began at %.4g: went back to step %d, with %.4g; lower "
                "--distill.learning_rate.", means[-1], means[0], step, best,
            )  # fmt: skip
        with torch.no_grad():
            for name, value in pl_module.state_dict().items() if harm or self.keep == "best" else ():
                value.copy_(_sharded_as(value, self.best[name]))

    @torch.no_grad()
    def _measure(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not self.windows:
            return
        values = measured_as_learned(trainer, pl_module, pl_module.student, self.windows, self.batch_size)
        tokens, stage = tokens_so_far(trainer), curves_of(pl_module)
        of_run = None if self.tokens_before is None else self.tokens_before + tokens
        axis = {f"{stage}/tokens": tokens}
        log_perplexities(trainer, stage, axis, values, trainer.global_step, development_tokens=of_run)
        mean = trainer.strategy.broadcast(geometric_mean(values.values()))
        if not self.measured or mean < min(self.measured.values()):
            self.best = {name: gathered(value).detach().cpu().clone() for name, value in pl_module.state_dict().items()}
        self.measured[trainer.global_step] = mean


def _sharded_as(value: Tensor, whole: Tensor) -> Tensor:
    """`whole`, or this process's part of it where `value` is sharded."""
    if not is_sharded(value):
        return whole
    from torch.distributed.tensor import distribute_tensor  # not at the top: not every build of torch has it

    return distribute_tensor(whole.to(value.device), value.device_mesh, value.placements)


def perplexities(model: PreTrainedModel, windows: Sequence[Windows], batch_size: int) -> dict[str, float]:
    """Perplexity by corpus; all processes have to ask for it."""
    return {w.corpus: perplexity(model, w, batch_size=batch_size, shared=True).perplexity for w in windows}


def measured_as_learned(
    trainer: L.Trainer, stage: L.LightningModule, model: PreTrainedModel, windows: Sequence[Windows], batch_size: int
) -> dict[str, float]:
    """`perplexities` in the precision in which the stage learns, if the stage is a `FrozenLMStage`."""
    measure = partial(perplexities, model, windows, batch_size)
    return stage.autocast.measured(trainer, stage, measure, model) if hasattr(stage, "autocast") else measure()


def tokens_so_far(trainer: L.Trainer) -> float:
    """Tokens that a stage has learned from, in all processes together."""
    text = trainer.train_dataloader.batch_sampler
    of_batches = [min(n * text.batch_size, text.num_windows) for n in (int(trainer.num_training_batches), text.served)]
    windows = trainer.current_epoch * of_batches[0] + of_batches[1]
    return float(windows * trainer.train_dataloader.dataset.tokens.shape[1])


def curves_of(stage: L.LightningModule) -> str:
    """What the curves of a stage begin with: its `curves`, or the name of its class."""
    return getattr(stage, "curves", type(stage).__name__)


def log_perplexities(
    trainer: L.Trainer, stage: str, axes: dict[str, float], values: dict[str, float], step: int, *,
    development_tokens: float | None = None,
) -> None:  # fmt: skip
    """Log perplexities of corpora under `<stage>/perplexity/<corpus>`, with their values on x axes.

    With `development_tokens`, that the run's model has learned from in all stages, they are a point of the run's own
    curve too, `development/perplexity`: their geometric mean.
    """
    labels = corpus_labels(values)
    points = axes | {f"{stage}/perplexity/{key_part(labels[corpus])}": value for corpus, value in values.items()}
    if development_tokens is not None and values:
        points |= {"development/tokens": development_tokens, "development/perplexity": geometric_mean(values.values())}
    log_scalars(trainer.loggers, points, step=step)


def log_modules(loggers: Sequence[Logger], modules: Modules, masks: Masks) -> None:
    """Log what was measured of each module, and its sparsity, the fraction of its neurons that the masks remove."""
    removed = [module_means(~keep, y) for keep, y in zip(masks.ffn, modules.labels, strict=True)]
    names = ("sensitivity", "noise_floor", "agreement", "sparsity")
    for step, row in enumerate(modules.rows()):
        row["sparsity"] = float(removed[row["block"]][row["module"]])
        scalars = {f"modules/{name}": float(row[name]) for name in names if row[name] is not None}
        log_scalars(loggers, {"modules/index": float(step)} | scalars, step=step)
