"""Lightning callbacks of stages that train: masks during validation, and curves."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import lightning as L
import torch
from torch.nn.utils import get_total_norm

from gprune.evaluation.intervals import geometric_mean, paired_ratio
from gprune.models.copies import full_tensor
from gprune.models.masks import Masks, masked
from gprune.stages.base import FrozenLMStage, curves_of, log_exactly

log = logging.getLogger("gprune")


class StepCurves(L.Callback):
    """Log tokens so far, tokens per second, the learning rate, and the gradient norm before clipping in every step.

    Attributes:
        tokens: training tokens of the fit so far, over all processes.
    """

    tokens = 0

    def on_train_batch_start(self, *_: Any) -> None:
        self._start_time = time.monotonic()

    @torch.no_grad()
    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        """Log the learning rate and the gradient norm."""
        if hasattr(pl_module, "gradient_norm"):
            norm = pl_module.gradient_norm()
        else:
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            norm = get_total_norm([p.grad for p in parameters if p.grad is not None])
        first_group = optimizer.param_groups[0]
        scale = first_group.get("size") or 1  # a relative learning rate is logged without the scale of its tensor
        prefix = curves_of(pl_module)
        pl_module.log_dict({
            f"{prefix}/gradient_norm": full_tensor(norm),
            f"{prefix}/learning_rate": float(first_group["lr"] / scale),
        })  # fmt: skip

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Log the number of tokens so far, and tokens per second."""
        tokens = batch["input_ids"].numel() * trainer.world_size
        seconds = time.monotonic() - self._start_time
        prefix = curves_of(pl_module)
        self.tokens = tokens_so_far(trainer)
        pl_module.log_dict({
            f"{prefix}/tokens": float(self.tokens),
            f"{prefix}/tokens_per_second": tokens / seconds,
        })  # fmt: skip


class ApplyMasks(L.Callback):
    """Apply hard masks to the measured model during validation.

    The gates of `ThresholdLearning` are applied only inside its training step, so validation measures the model exactly
    as it would be after pruning.

    Attributes:
        masks: function that returns the masks of the next validation; None for the dense model.
        applied: the masks that are on the model now. None outside of validation, and for the dense model.
    """

    applied: Masks | None = None

    def __init__(self, masks: Callable[[], Masks | None]):
        self.masks = masks
        self._on_model = ExitStack()

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Apply the masks of the current thresholds, which a callback such as `WeightAveraging` may have replaced."""
        if not hasattr(pl_module, "measured_model"):  # a stage that measures no language model
            return
        self.applied = self.masks()
        if self.applied is not None:
            self._on_model.enter_context(masked(pl_module.measured_model, self.applied))

    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        self._remove()

    def on_exception(self, trainer: L.Trainer, pl_module: Any, exception: BaseException) -> None:
        """Remove the masks if validation raises, because `on_validation_end` is then not called."""
        self._remove()

    def _remove(self) -> None:
        self._on_model.close()
        self.applied = None


class PerplexityCurve(L.Callback):
    """Collect development perplexity by corpus during a fit, and measure it at several sparsities afterwards.

    Attributes:
        by_step: optimizer step -> corpus -> perplexity.
    """

    def __init__(self) -> None:
        self.by_step: dict[int, dict[str, float]] = {}
        self._point: dict[str, float] = {}  # x coordinates that are logged with the sparsity being measured

    def state_dict(self) -> dict[str, Any]:
        return {"by_step": self.by_step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.by_step = state["by_step"]

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Log the x coordinates during `against_sparsity`."""
        if self._point:
            log_exactly(pl_module, self._point)

    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Store the perplexities of a validation during the fit."""
        if getattr(pl_module, "development", None) and not (self._point or trainer.sanity_checking):
            self.by_step[trainer.global_step] = pl_module.development

    def against_sparsity(
        self, trainer: L.Trainer, stage: FrozenLMStage, data: L.LightningDataModule, masks: Mapping[float, Masks | None]
    ) -> dict[float, dict[str, float]]:
        """Measure perplexity at several sparsities by `trainer.validate`, logged as `curve/perplexity/<corpus>`.

        Return sparsity -> corpus -> perplexity, lowest sparsity first.
        """
        by_sparsity = {}
        (apply_masks,) = (callback for callback in trainer.callbacks if isinstance(callback, ApplyMasks))
        masks_in_training, stage.validation_prefix = apply_masks.masks, "curve"
        for step, sparsity in enumerate(sorted(masks)):
            apply_masks.masks = lambda sparsity=sparsity: masks[sparsity]
            self._point = {"curve/sparsity": sparsity, "step": float(step)}  # Lightning reads `step` as the logged step
            trainer.validate(stage, data, verbose=False)
            by_sparsity[sparsity] = stage.development
        apply_masks.masks, stage.validation_prefix = masks_in_training, "development"
        return by_sparsity


class RisingPerplexity(PerplexityCurve):
    """A `PerplexityCurve` that warns if the mean of development perplexity over corpora rose during the fit."""

    def __init__(self) -> None:
        super().__init__()
        self.nll_per_token: dict[int, dict[str, list[float]]] = {}  # step -> corpus -> nats per token of each window

    def state_dict(self) -> dict[str, Any]:
        return {"by_step": self.by_step, "window_nll": self.nll_per_token}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.by_step, self.nll_per_token = state["by_step"], state["window_nll"]

    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Store the losses of windows."""
        super().on_validation_end(trainer, pl_module)
        if trainer.global_step in self.by_step:
            self.nll_per_token[trainer.global_step] = pl_module.development_nll

    def warn(self) -> None:
        """Log a line if perplexity is higher after the last step than before the first one."""
        if not self.by_step:
            return
        first_step, last_step = min(self.by_step), max(self.by_step)
        first, last = (geometric_mean(self.by_step[step].values()) for step in (first_step, last_step))
        if last <= first:
            return
        log.warning(
            "Development perplexity rose from %.4g at step %d to %.4g at step %d, %s. Lower --distill.learning_rate.",
            first, first_step, last, last_step, self._compare_with_noise(last_step, first_step),
        )  # fmt: skip

    def _compare_with_noise(self, last_step: int, first_step: int) -> str:
        """Return in words whether the 95 % interval of the paired ratio of perplexities is above 1."""
        last, first = self.nll_per_token[last_step], self.nll_per_token[first_step]
        if all(len(windows) == 1 for windows in last.values()):
            return "with unknown noise (one window per corpus)"
        ratio, low, high = paired_ratio(last, first, tokens_per_window=1)  # the losses of windows are per token
        return f"{'beyond' if low > 1 else 'within'} noise (ratio {ratio:.4f} [{low:.4f}, {high:.4f}])"


def tokens_so_far(trainer: L.Trainer) -> int:
    """Return the number of training tokens of the current fit, over all processes."""
    sampler = trainer.train_dataloader.batch_sampler

    def windows_in(batches: int) -> int:
        """Return the number of windows in the first batches of an epoch."""
        return min(batches * sampler.batch_size, sampler.num_windows)

    windows_per_epoch = windows_in(int(trainer.num_training_batches))
    windows = trainer.current_epoch * windows_per_epoch + windows_in(sampler.served)
    return windows * trainer.train_dataloader.dataset.tokens.shape[1]
