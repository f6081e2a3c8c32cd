"""FrozenLMStage: a LightningModule around a language model that it must never train, save or move by accident."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any, TypeVar

import lightning as L
import torch
from torch import Tensor
from transformers import PreTrainedModel

from gprune.config.groups import Group
from gprune.errors import UserError
from gprune.models.copies import sharded_copy
from gprune.stages.autocast import Autocast

G = TypeVar("G", bound=Group)


def saved_settings(stage: L.LightningModule, kind: type[G], settings: G | Mapping | None, ignore: Sequence[str]) -> G:
    """A stage's settings as its group of flags. Checkpoints hold them, and its options, for `load_from_checkpoint`.

    Args:
        settings: those, or what a checkpoint holds of them; None for the defaults.
        ignore: the constructor's other parameters, which are no plain data.
    """
    frame, ignore = inspect.currentframe().f_back, [*ignore, "settings", "shard"]
    stage.save_hyperparameters(ignore=ignore, frame=frame, logger=False)
    settings = settings if isinstance(settings, kind) else kind(**(settings or {}))
    stage.hparams["settings"] = settings.model_dump()
    return settings


class _TakeOff(L.Callback):
    """After an exception Lightning tells callbacks, and no stage."""

    def on_exception(self, trainer: L.Trainer, pl_module: FrozenLMStage, exception: BaseException) -> None:
        pl_module.hooks.close()


class FrozenLMStage(L.LightningModule):
    """Holds the language model beside the module, not inside it.

    The model sits in a tuple, which `nn.Module` does not register as a child. So checkpoints hold the learned
    tensors only, DDP neither broadcasts nor reduces hundreds of millions of frozen parameters, and `train()` does
    not wake the model's dropout. The price: Lightning does not move it, hence the two hooks.

    With `shard`, and two or more processes, the stage runs a copy of the model whose layers are sharded over all of
    them. Lightning's own FSDP does not see the model, and would shard only what is registered.
    """

    purpose = "this stage"  # what it does, for errors
    last_loss = float("nan")  # of the global batch

    def __init__(self, model: PreTrainedModel, *, shard: bool = False):
        super().__init__()
        self.hooks = ExitStack()  # on the model; taken off also after an exception
        assert not any(p.requires_grad for p in model.parameters()), "the language model must be frozen"
        self._frozen = (model,)
        self._shard = shard
        self._copy: tuple[PreTrainedModel, ...] = ()  # sharded, while the stage runs
        self.autocast = Autocast()

    @property
    def lm(self) -> PreTrainedModel:
        """The language model, or its sharded copy while there is one."""
        return (*self._copy, *self._frozen)[0]

    def configure_callbacks(self) -> list[L.Callback]:
        return [_TakeOff()]

    def setup(self, stage: str) -> None:
        device = self.trainer.strategy.root_device
        if self._shard and self.trainer.world_size > 1:
            self._copy = (sharded_copy(self._frozen[0], device, self.trainer.world_size),)
        # An offloaded or sharded model has a place for every layer already.
        elif not self._shard and getattr(self.lm, "hf_device_map", None) is None:
            self.lm.to(device)

    def teardown(self, stage: str) -> None:
        self._copy = ()
        self.autocast.clear()
        if not self._shard:
            # Lightning has moved all that is registered to the CPU, which may be only some weights of a student.
            self.to(self.trainer.strategy.root_device, non_blocking=True)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.autocast.in_float32:
            checkpoint["in_float32"] = True

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.autocast.in_float32 = checkpoint.get("in_float32", False)

    def batch_loss(self, losses: Tensor, weight: Tensor | None, name: str, *, finite: bool = True) -> Tensor:
        """The loss of a step from the losses of its windows, logged under `name` as the mean of the global batch.

        Args:
            losses: (B,) float32, nats per token.
            weight: (B,), 0 for a window that only fills up a process's share; None: all count.
            name: such as `learn/loss`.
            finite: raise a UserError unless the loss is finite.

        Returns:
            () float32, whose mean over processes is the mean over the global batch, whatever each process's share.
        """
        weight = torch.ones_like(losses) if weight is None else weight
        total = self.trainer.strategy.reduce(weight.sum(), reduce_op="sum")
        loss = (losses * (weight * self.trainer.world_size / total).to(losses)).sum()
        value = self.trainer.strategy.reduce(loss.detach(), reduce_op="mean")
        self.last_loss = float(value)
        if finite:
            require_finite_loss(self.last_loss, f"The loss of {self.purpose}")
        self.log(name, value, prog_bar=True)
        return loss


def require_finite_loss(value: float, what: str) -> None:
    """Raise a UserError for NaN or infinity, so that no mean hides it."""
    if not abs(value) < float("inf"):
        raise UserError(
            f"{what} is {value}; expected a finite number. Lower the learning rate, or use --model.dtype float32."
        )
