"""Lightning callbacks: masks on the frozen model while a stage runs, and perplexity curves for the loggers."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

import lightning as L
import torch
from lightning.pytorch.loggers import Logger
from transformers import PreTrainedModel

from gprune.corpora.windows import Windows
from gprune.evaluation.perplexity import perplexity
from gprune.models.masks import Masks
from gprune.partition.record import Modules
from gprune.partition.reliability import module_means
from gprune.runs.tracking import log_scalars, log_table
from gprune.sparsity.budget import Budget
from gprune.sparsity.gates import gated, masked
from gprune.stages.thresholds import ThresholdLearning


class ApplyMasks(L.Callback):
    """Applies a stage's gates to its frozen model while `fit` lasts, and takes them off again, also after an exception.

    A notebook that interrupts learning gets its model back bit for bit.
    """

    def __init__(self) -> None:
        self._context = ExitStack()

    def on_fit_start(self, trainer: L.Trainer, pl_module: ThresholdLearning) -> None:
        self._context.enter_context(gated(pl_module.lm, pl_module.ffn_gates, pl_module.attention_gates))

    def on_fit_end(self, trainer: L.Trainer, pl_module: ThresholdLearning) -> None:
        self._context.close()

    def on_exception(self, trainer: L.Trainer, pl_module: ThresholdLearning, exception: BaseException) -> None:
        self._context.close()

    def teardown(self, trainer: L.Trainer, pl_module: ThresholdLearning, stage: str) -> None:
        self._context.close()  # for an exception before the first hook; closing twice is harmless


class PerplexityCurve(L.Callback):
    """Logs development perplexity per corpus against the epoch of learning, and against sparsity.

    Against the epoch: at the start and after each epoch, at the target sparsity. Against sparsity: at the end, with the
    learned thresholds at each of `budgets`, and of the dense model at 0. Only process 0 computes.
    """

    def __init__(self, windows: Sequence[Windows], *, budgets: dict[float, Budget], batch_size: int = 4):
        self.windows, self.budgets, self.batch_size = windows, budgets, batch_size
        self.by_epoch: list[dict[str, float]] = []
        self.by_sparsity: dict[float, dict[str, float]] = {}

    def on_train_start(self, trainer: L.Trainer, pl_module: ThresholdLearning) -> None:
        self._epoch_point(trainer, pl_module, 0)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: ThresholdLearning) -> None:
        self._epoch_point(trainer, pl_module, trainer.current_epoch + 1)

    @torch.no_grad()
    def _epoch_point(self, trainer: L.Trainer, pl_module: ThresholdLearning, epoch: int) -> None:
        if not trainer.is_global_zero:
            return
        pl_module.refresh_gates()
        self.by_epoch.append(self._perplexities(pl_module.lm))
        self._log(trainer, "learn", {"learn/epoch": float(epoch)}, self.by_epoch[-1], trainer.global_step)

    @torch.no_grad()
    def on_fit_end(self, trainer: L.Trainer, pl_module: ThresholdLearning) -> None:
        """Runs after ApplyMasks has taken its gates off: callbacks are called in order."""
        if not trainer.is_global_zero:
            return
        self.by_sparsity[0.0] = self._perplexities(pl_module.lm)
        for sparsity, budget in self.budgets.items():
            with masked(pl_module.lm, pl_module.masks(budget)) as lm:
                self.by_sparsity[sparsity] = self._perplexities(lm)
        for step, (sparsity, values) in enumerate(sorted(self.by_sparsity.items())):
            self._log(trainer, "curve", {"curve/sparsity": sparsity}, values, step)

    def _perplexities(self, model: PreTrainedModel) -> dict[str, float]:
        return {w.corpus: perplexity(model, w, batch_size=self.batch_size).perplexity for w in self.windows}

    @staticmethod
    def _log(trainer: L.Trainer, stage: str, axis: dict[str, float], values: dict[str, float], step: int) -> None:
        points = {f"{stage}/perplexity/{corpus}": value for corpus, value in values.items()}
        log_scalars(trainer.loggers, axis | points, step=step)


def log_modules(loggers: Sequence[Logger], modules: Modules, masks: Masks) -> None:
    """Log the table `modules`, and for each module the scalars of its row.

    A module's sparsity is the fraction of its neurons that the masks remove.
    """
    removed = [module_means(~keep, y) for keep, y in zip(masks.ffn, modules.labels, strict=True)]
    rows = [row | {"sparsity": float(removed[row["block"]][row["module"]])} for row in modules.rows()]
    log_table(loggers, "modules", rows)
    names = ("sensitivity", "noise_floor", "agreement", "sparsity")
    for step, row in enumerate(rows):
        scalars = {f"modules/{name}": float(row[name]) for name in names if row[name] is not None}
        log_scalars(loggers, {"modules/index": float(step)} | scalars, step=step)
