"""bfloat16 autocast in stages: frozen weights are cast once, with a fallback to float32 for losses that overflow."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import lightning as L
import torch
from torch import Tensor
from transformers import PreTrainedModel

from gprune.models.products import CastWeights

log = logging.getLogger("gprune")


class Autocast:
    """Autocast state of one stage. Without autocast, losses are computed without any change.

    Attributes:
        in_float32: whether the stage has fallen back to float32 because losses were not finite.
    """

    def __init__(self) -> None:
        self.in_float32 = False
        self._casts: dict[int, CastWeights] = {}  # id of a model -> its cast weights

    def losses(
        self, stage: L.LightningModule, compute: Callable[[], Tensor], *models: PreTrainedModel, always: bool = False
    ) -> Tensor:
        """Return the losses of a batch, (B,), that `compute` returns with cast copies of the frozen weights.

        If a loss is not finite on any process, log a warning, fall back to float32 for the rest of the stage and
        compute again.
        """
        strategy = stage.trainer.strategy
        device = strategy.root_device.type
        if not torch.is_autocast_enabled(device):
            return compute()
        if not self.in_float32:
            with self.cast(*models):
                losses = compute()
            is_checked = always or stage.trainer.global_step == 0
            if not is_checked or strategy.reduce_boolean_decision(bool(losses.isfinite().all()), all=True):
                return losses
            self.fall_back(stage)
        with torch.autocast(device, enabled=False):
            return compute()

    @contextmanager
    def cast(self, *models: PreTrainedModel) -> Iterator[None]:
        """Context manager that replaces frozen weights by copies in the dtype of autocast; a no-op without autocast."""
        with ExitStack() as applied:
            for model in models:
                copies = self._casts.setdefault(id(model), CastWeights(model))
                applied.enter_context(copies.applied())
            yield

    def fall_back(self, stage: L.LightningModule) -> None:
        """Switch the stage to float32 and log a warning."""
        purpose = getattr(stage, "purpose", type(stage).__name__)
        log.warning("The loss of %s is not finite in bfloat16. Falling back to float32.", purpose)
        self.in_float32 = True
        self.clear()

    def clear(self) -> None:
        """Free the cast copies."""
        self._casts.clear()
