"""FrozenLMStage: a LightningModule around a language model that it must never train, save or move by accident."""

from __future__ import annotations

import lightning as L
from transformers import PreTrainedModel

from gprune.errors import UserError


class FrozenLMStage(L.LightningModule):
    """Holds the language model beside the module, not inside it.

    The model sits in a tuple, which `nn.Module` does not register as a child. So checkpoints hold the learned
    tensors only, DDP neither broadcasts nor reduces hundreds of millions of frozen parameters, and `train()` does
    not wake the model's dropout. The price: Lightning does not move it, hence the two hooks.
    """

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        assert not any(p.requires_grad for p in model.parameters()), "the language model must be frozen"
        self._frozen = (model,)

    @property
    def lm(self) -> PreTrainedModel:
        return self._frozen[0]

    def setup(self, stage: str) -> None:
        # An offloaded or sharded model has a place for every layer already.
        if getattr(self.lm, "hf_device_map", None) is None:
            self.lm.to(self.trainer.strategy.root_device)


def require_finite(value: float, what: str) -> None:
    """Raise a UserError for NaN or infinity: a number that is not one is never averaged away."""
    if not abs(value) < float("inf"):
        raise UserError(
            f"{what} is {value}; expected a finite number. Lower the learning rate, or use --model.dtype float32."
        )
