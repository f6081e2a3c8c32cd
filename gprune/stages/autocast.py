"""How a stage computes under bfloat16 autocast: frozen weights cast once, and float32 where losses are not finite."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import lightning as L
import torch
from torch import Tensor
from transformers import PreTrainedModel

from gprune.models.autocast import CastWeights

log = logging.getLogger("gprune")


class Autocast:
    """The state of one stage under autocast; in float32 every method calls what it is given, and nothing else.

    Attributes:
        in_float32: whether losses under autocast were not finite, so that the stage goes on in float32.
    """

    def __init__(self) -> None:
        self.in_float32 = False
        self._casts: dict[int, CastWeights] = {}  # by the id of the model

    def losses(
        self, stage: L.LightningModule, compute: Callable[[], Tensor], *models: PreTrainedModel, always: bool = False
    ) -> Tensor:
        """Return `compute()`, the losses (B,) of a batch, with copies of the frozen weights of `models`.

        If any is not finite before the first optimizer step (`always`: at any step), on any process, warn and go on in
        float32.
        """
        device = stage.trainer.strategy.root_device.type
        if not torch.is_autocast_enabled(device):
            return compute()
        if not self.in_float32:
            with self.cast(*models):
                losses = compute()
            if stage.trainer.global_step > 0 and not always:
                return losses
            if stage.trainer.strategy.reduce_boolean_decision(bool(losses.isfinite().all()), all=True):
                return losses
            self.fall_back(stage)
        with torch.autocast(device, enabled=False):
            return compute()

    @contextmanager
    def cast(self, *models: PreTrainedModel) -> Iterator[None]:
        """Let models compute with copies of their frozen weights in the dtype of autocast; a no-op without autocast."""
        with ExitStack() as applied:
            for model in models:
                copies = self._casts.setdefault(id(model), CastWeights(model))
                applied.enter_context(copies.applied())
            yield

    def fall_back(self, stage: L.LightningModule) -> None:
        """Learn in float32 from now on, and say so."""
        what = getattr(stage, "purpose", type(stage).__name__)
        log.warning("The loss of %s is not finite in bfloat16: learning in float32 instead.", what)
        self.in_float32 = True
        self.clear()

    def clear(self) -> None:
        """Free the copies."""
        self._casts.clear()
