"""Lightning callbacks of the stages that learn: masks for validation, curves, and the best weights."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from gprune.evaluation.intervals import geometric_mean
from gprune.models.masks import Masks
from gprune.models.offload import gathered
from gprune.sparsity.gates import masked
from gprune.stages.base import FrozenLMStage, curves_of, log_exactly

log = logging.getLogger("gprune")


class StepCurves(L.Callback):
    """Log of every step of a stage the tokens so far, tokens per second, the step size and the norm of the gradient.

    The norm is that before clipping.
    """

    def on_train_batch_start(self, *_: Any) -> None:
        self._began = time.monotonic()

    @torch.no_grad()
    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        """Log the step size and the norm of the gradient."""
        group, stage = optimizer.param_groups[0], curves_of(pl_module)
        if hasattr(pl_module, "gradient_norm"):
            norm = pl_module.gradient_norm()
        else:
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            norm = get_total_norm([p.grad for p in parameters if p.grad is not None])
        rate = group["lr"] / (group.get("size") or 1)  # for relative step sizes the dimensionless rate
        pl_module.log_dict({f"{stage}/gradient_norm": gathered(norm), f"{stage}/learning_rate": float(rate)})

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        tokens, stage = batch["input_ids"].numel() * trainer.world_size, curves_of(pl_module)
        rate = tokens / (time.monotonic() - self._began)
        pl_module.log_dict({f"{stage}/tokens": tokens_so_far(trainer), f"{stage}/tokens_per_second": rate})


class ApplyMasks(L.Callback):
    """Put hard masks on the frozen model before each validation, and take them off afterwards.

    The gates of `ThresholdLearning` are on the model only inside its training step, so that validation sees the masks
    alone: the pruned model as it will be.

    Args:
        masks: called at the start of each validation; None: the dense model is measured.
    """

    def __init__(self, masks: Callable[[], Masks | None]):
        self.masks = masks
        self._applied = ExitStack()

    def on_validation_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        if hasattr(pl_module, "measured_model") and (masks := self.masks()) is not None:
            self._applied.enter_context(masked(pl_module.measured_model, masks))

    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        self._applied.close()

    def on_exception(self, trainer: L.Trainer, pl_module: Any, exception: BaseException) -> None:
        self._applied.close()


class PerplexityCurve(L.Callback):
    """Collect development perplexity by corpus: over a fit by optimizer step, and after it against sparsity.

    Attributes:
        by_step: perplexity by corpus, by the optimizer step at which it was measured.
        by_sparsity: the same by sparsity, from `against_sparsity`.
    """

    def __init__(self) -> None:
        self.by_step: dict[int, dict[str, float]] = {}
        self.by_sparsity: dict[float, dict[str, float]] = {}
        self._point: dict[str, float] = {}  # of the curve against sparsity that is measured at the moment

    def state_dict(self) -> dict[str, Any]:
        return {"by_step": self.by_step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.by_step = state["by_step"]

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        if self._point:
            log_exactly(pl_module, self._point)

    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        if getattr(pl_module, "development", None) and not (self._point or trainer.sanity_checking):
            self.by_step[trainer.global_step] = pl_module.development

    def against_sparsity(
        self, trainer: L.Trainer, stage: FrozenLMStage, data: L.LightningDataModule, masks: Mapping[float, Masks | None]
    ) -> None:
        """Measure perplexity under masks by sparsity with `trainer.validate`, as `curve/perplexity/<corpus>`.

        Args:
            trainer: of the fit, with an `ApplyMasks` among its callbacks.
            masks: by sparsity; None for the dense model.
        """
        (apply,) = (one for one in trainer.callbacks if isinstance(one, ApplyMasks))
        stage.measured_as = "curve"
        for step, sparsity in enumerate(sorted(masks)):
            apply.masks = lambda sparsity=sparsity: masks[sparsity]
            self._point = {"curve/sparsity": sparsity, "step": float(step)}  # Lightning's key for the place on the axis
            trainer.validate(stage, data, verbose=False)
            self.by_sparsity[sparsity] = stage.development


class BestWeights(PerplexityCurve):
    """A `PerplexityCurve` that keeps the weights at which the geometric mean of development perplexity was lowest."""

    def __init__(self) -> None:
        super().__init__()
        self.best: dict[str, Tensor] = {}  # state of the stage at the lowest mean, whole tensors on the CPU

    def state_dict(self) -> dict[str, Any]:
        return {"by_step": self.by_step, "best": self.best}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.by_step, self.best = state["by_step"], state["best"]

    @property
    def means(self) -> dict[int, float]:
        """Geometric mean over corpora by optimizer step, infinite where it is not finite."""
        means = {step: geometric_mean(values.values()) for step, values in self.by_step.items()}
        return {step: mean if math.isfinite(mean) else math.inf for step, mean in means.items()}

    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        super().on_validation_end(trainer, pl_module)
        *earlier, now = self.means.values() or [math.nan]
        if self.by_step and (not earlier or now < min(earlier)):
            self.best = {name: gathered(value).detach().cpu().clone() for name, value in pl_module.state_dict().items()}

    @torch.no_grad()
    def restore(self, stage: L.LightningModule, *, keep: str) -> None:
        """Load the best weights if `keep` is `best`, or if perplexity ends above where it began."""
        steps, means = list(self.means), list(self.means.values())
        harm = bool(means) and not means[-1] <= means[0]
        if harm:
            best = min(self.means, key=self.means.get)
            log.warning(
                "Development perplexity ends at %.4g, where it began at %.4g: went back to step %d, with %.4g; lower "
                "--distill.learning_rate.", means[-1], means[0], best, self.means[best],
            )  # fmt: skip
        if steps and (harm or keep == "best"):
            stage.load_state_dict(self.best)


def tokens_so_far(trainer: L.Trainer) -> float:
    """Tokens that a stage has learned from, in all processes together."""
    text = trainer.train_dataloader.batch_sampler
    of_batches = [min(n * text.batch_size, text.num_windows) for n in (int(trainer.num_training_batches), text.served)]
    windows = trainer.current_epoch * of_batches[0] + of_batches[1]
    return float(windows * trainer.train_dataloader.dataset.tokens.shape[1])
