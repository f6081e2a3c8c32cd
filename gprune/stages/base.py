"""FrozenLMStage: a LightningModule around a language model that it must never train, save or move by accident."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import lightning as L
import torch
from torch import Tensor
from transformers import PreTrainedModel

from gprune.corpora.load import corpus_labels
from gprune.errors import UserError
from gprune.evaluation.intervals import geometric_mean
from gprune.evaluation.perplexity import WindowPerplexity, window_losses
from gprune.models.copies import sharded_copy
from gprune.runs.numbers import key_part
from gprune.stages.autocast import Autocast


class FrozenLMStage(L.LightningModule):
    """Holds the language model beside the module, not inside it.

    The model is stored in a tuple, which `nn.Module` does not register as a child. So checkpoints hold the learned
    tensors only, DDP neither broadcasts nor reduces hundreds of millions of frozen parameters, and `train()` does
    not enable the model's dropout. The price: Lightning does not move it, hence `setup` and `teardown`.

    With `shard`, and two or more processes, the stage runs a copy of the model whose layers are sharded over all of
    them. Lightning's own FSDP does not see the model, and would shard only what is registered.

    Validation measures the perplexity of `measured_model` on the windows of each validation loader. It is logged as
    `development/perplexity/<corpus>`, with the geometric mean over corpora as `development/perplexity`, so
    `EarlyStopping(monitor="development/perplexity")` and `ModelCheckpoint` work with stages that inherit this class.

    Attributes:
        curves: the prefix of the names under which a stage logs its training, such as `learn` in `learn/loss`; by
            default the name of the class.
        tokens_before: tokens that earlier stages have learned from with this model, for the axis `development/tokens`.
        development: perplexity by corpus, as the last validation measured it, after optimizer step `measured_at`.
        measured_as: the prefix of the names under which validation logs; `curve` while masks of several sparsities are
            compared.
    """

    purpose = "this stage"  # what it does, for errors
    last_loss = float("nan")  # of the global batch
    tokens_before = 0
    measured_as, measured_at = "development", None

    def __init__(self, model: PreTrainedModel, *, shard: bool = False):
        super().__init__()
        assert not any(p.requires_grad for p in model.parameters()), "the language model must be frozen"
        self._frozen = (model,)
        self._shard = shard
        self._copy: tuple[PreTrainedModel, ...] = ()  # sharded, while the stage runs
        self._tokens: Tensor | int = 0  # on the device, so that a step does not wait for it
        self._perplexities: list[WindowPerplexity] = []  # by validation loader; not registered, so not in checkpoints
        self.development: dict[str, float] = {}
        self.autocast = Autocast()

    @property
    def lm(self) -> PreTrainedModel:
        """The language model, or its sharded copy while there is one."""
        return (*self._copy, *self._frozen)[0]

    @property
    def tokens(self) -> int:
        """Number of tokens that the stage has learned from, over all processes."""
        return int(self._tokens)

    @property
    def measured_model(self) -> PreTrainedModel:
        """The model whose perplexity validation measures: the stage's `student`, or the frozen model."""
        return getattr(self, "student", self.lm)

    def setup(self, stage: str) -> None:
        """Move the frozen model to the trainer's device, or make its sharded copy."""
        device = self.trainer.strategy.root_device
        if self._shard and self.trainer.world_size > 1:
            if stage == "validate" and self.measured_model is not self.lm:
                return  # the student alone is measured
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

    def batch_loss(self, losses: Tensor, batch: Mapping[str, Tensor], name: str, *, finite: bool = True) -> Tensor:
        """The loss of a step from the losses of its windows, logged under `name` as the mean of the global batch.

        Args:
            losses: (B,) float32, nats per token.
            batch: `input_ids` (B, T); `weight` (B,), 0 for a window that only fills a process's share. Without
                weights all windows count.
            name: such as `learn/loss`.
            finite: raise a UserError unless the loss is finite.

        Returns:
            () float32, whose mean over processes is the mean over the global batch, whatever each process's share.
        """
        weight = batch.get("weight", torch.ones_like(losses))
        windows = self.trainer.strategy.reduce(weight.sum(), reduce_op="sum")
        self._tokens = self._tokens + windows.detach().double() * batch["input_ids"].shape[1]
        loss = (losses * (weight * self.trainer.world_size / windows).to(losses)).sum()
        value = self.trainer.strategy.reduce(loss.detach(), reduce_op="mean")
        self.last_loss = float(value)
        if finite:
            require_finite_loss(self.last_loss, f"The loss of {self.purpose}")
        self.log(name, value, prog_bar=True)
        return loss

    def on_validation_epoch_start(self) -> None:
        """Make a metric for each validation loader, named for the corpus of its dataset."""
        loaders = self.trainer.val_dataloaders
        loaders = loaders if isinstance(loaders, list) else [loaders]
        names = [getattr(loader.dataset, "corpora", [str(i)])[0] for i, loader in enumerate(loaders)]
        self._perplexities = [WindowPerplexity(name).to(self.device) for name in names]

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Measure a batch of development text: `input_ids` (B, T) int64, optionally `index` and `weight` (B,)."""
        ids = batch["input_ids"]
        model = self.measured_model
        nll = self.autocast.losses(self, partial(window_losses, model, ids), model, always=True).to(self.device)
        index = batch.get("index", batch_idx * len(ids) + torch.arange(len(ids), device=nll.device))
        counted = batch.get("weight", torch.ones_like(nll)).to(nll.device) > 0
        self._perplexities[dataloader_idx].update(nll, counted * (ids.shape[1] - 1), index)

    def on_validation_epoch_end(self) -> None:
        """Log `development/perplexity/<corpus>`, the geometric mean, and the tokens learned from so far."""
        measured = [metric for metric in self._perplexities if metric.update_called]
        self.development = {metric.corpus: float(metric.compute()) for metric in measured}
        if not self.development:
            return
        name, labels = f"{self.measured_as}/perplexity", corpus_labels(self.development)
        values = {f"{name}/{key_part(labels[corpus])}": value for corpus, value in self.development.items()}
        values[name] = geometric_mean(self.development.values())
        if self.measured_as == "development":
            self.measured_at = self.global_step
            values |= self.axes()
        log_exactly(self, values)

    def axes(self) -> dict[str, float]:
        """What development perplexity is drawn against, by name."""
        return {"development/tokens": float(self.tokens_before + self.tokens), f"{curves_of(self)}/tokens": self.tokens}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["learned_tokens"], checkpoint["in_float32"] = self.tokens, self.autocast.in_float32

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._tokens, self.autocast.in_float32 = checkpoint["learned_tokens"], checkpoint["in_float32"]


def curves_of(stage: L.LightningModule) -> str:
    """The prefix of a stage's curves: its attribute `curves`, or the name of its class."""
    return getattr(stage, "curves", type(stage).__name__)


def log_exactly(stage: L.LightningModule, values: Mapping[str, float]) -> None:
    """Log numbers that all processes agree on, in float64: Lightning would round a Python float to float32."""
    as_tensors = {name: torch.tensor(value, dtype=torch.float64, device=stage.device) for name, value in values.items()}
    stage.log_dict(as_tensors, sync_dist=True)


def require_finite_loss(value: float, what: str) -> None:
    """Raise a UserError for NaN or infinity, so that no mean hides it."""
    if not abs(value) < float("inf"):
        raise UserError(
            f"{what} is {value}; expected a finite number. Lower the learning rate, or use --model.dtype float32."
        )
