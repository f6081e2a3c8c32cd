"""FrozenLMStage, the base class of stages: a LightningModule with a frozen language model that is not saved."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import ExitStack
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
from gprune.models.products import CastWeights
from gprune.runs.numbers import key_part

log = logging.getLogger("gprune")


class FrozenLMStage(L.LightningModule):
    """LightningModule with a frozen language model that is not registered as a submodule.

    The model is stored in a tuple, which `nn.Module` does not register. So checkpoints contain only learned tensors,
    DDP neither broadcasts nor reduces hundreds of millions of frozen parameters, and `train()` does not enable the
    model's dropout. Lightning does not move such a model between devices, so `setup` does it.

    Validation measures the perplexity of `measured_model` on the windows of each validation loader. It is logged as
    `development/perplexity/<corpus>`, with the geometric mean over corpora as `development/perplexity`, so
    `EarlyStopping(monitor="development/perplexity")` and `ModelCheckpoint` work with stages that inherit this class.

    Args:
        model: the frozen language model.

    Attributes:
        curves: prefix of logged training metrics, such as `learn` in `learn/loss`. Default: the name of the class.
        tokens_before: training tokens of earlier stages with this model, for the axis `development/tokens`.
        development: perplexity by corpus from the last validation.
        development_nll: negative log-likelihood per token of each window, by corpus, from the last validation.
        measured_at: optimizer step of the last validation.
        validation_prefix: prefix of logged validation metrics; `curve` during the sweep over sparsities.
    """

    purpose = "this stage"  # the stage's name in messages
    last_loss = float("nan")  # loss of the last global batch
    tokens_before = 0
    validation_prefix = "development"
    measured_at: int | None = None
    in_float32 = False  # whether the stage continues without autocast, because a loss was not finite

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        assert not any(p.requires_grad for p in model.parameters()), "the language model must be frozen"
        self._frozen = (model,)
        self._tokens: Tensor | int = 0  # a tensor on the device, which avoids a synchronization in each step
        self._perplexities: list[WindowPerplexity] = []  # one per validation loader; a list keeps them unregistered
        self.development: dict[str, float] = {}
        self.development_nll: dict[str, list[float]] = {}
        self._cast_weights: dict[int, CastWeights] = {}  # by id of a model: its frozen weights in the dtype of autocast

    @property
    def lm(self) -> PreTrainedModel:
        """The language model."""
        return self._frozen[0]

    @property
    def tokens(self) -> int:
        """Number of training tokens so far, over all processes."""
        return int(self._tokens)

    @property
    def measured_model(self) -> PreTrainedModel:
        """The model that validation measures: the stage's `student`, or the frozen model."""
        return getattr(self, "student", self.lm)

    def setup(self, stage: str) -> None:
        """Move the frozen model to the Trainer's device. The layers of an offloaded model are on their devices."""
        if getattr(self.lm, "hf_device_map", None) is None:
            self.lm.to(self.trainer.strategy.root_device)

    def teardown(self, stage: str) -> None:
        """Free the copies of weights, and move registered tensors back to the Trainer's device.

        Lightning calls this hook last, after the final forward pass, and has already moved the stage to the CPU.
        Registered tensors may be only some of a student's weights, and the others are still on the device.
        """
        self._cast_weights.clear()
        self.to(self.trainer.strategy.root_device, non_blocking=True)

    def autocast_losses(
        self, compute: Callable[[], Tensor], *models: PreTrainedModel, check_always: bool = False
    ) -> Tensor:
        """Return the losses of a batch, (B,), that `compute` returns. With autocast, frozen weights of the given
        models are cast once.

        If a loss is not finite under autocast on any process, the stage continues in float32, with a warning. Losses
        are checked before the first optimizer step, or with `check_always` in every call.
        """
        strategy = self.trainer.strategy
        device = strategy.root_device.type
        if not torch.is_autocast_enabled(device):
            return compute()
        if not self.in_float32:
            with ExitStack() as applied:
                for model in models:
                    copies = self._cast_weights.setdefault(id(model), CastWeights(model))
                    applied.enter_context(copies.applied())
                losses = compute()
            is_checked = check_always or self.trainer.global_step == 0
            if not is_checked or strategy.reduce_boolean_decision(bool(losses.isfinite().all()), all=True):
                return losses
            log.warning("The loss of %s is not finite in bfloat16. Falling back to float32.", self.purpose)
            self.in_float32 = True
            self._cast_weights.clear()
        with torch.autocast(device, enabled=False):
            return compute()

    def batch_loss(self, losses: Tensor, batch: Mapping[str, Tensor], name: str, *, finite: bool = True) -> Tensor:
        """Compute the loss of a training step from the losses of its windows, and log the mean of the global batch.

        Args:
            losses: (B,) float32, nats per token.
            batch: `input_ids` (B, T) and optionally `weight` (B,), which is 0 for windows that pad the batch.
            name: name of the logged metric, such as `learn/loss`.
            finite: whether to raise UserError if the loss is not finite.

        Returns:
            () float32. The mean over processes is the mean over the global batch, even if processes have different
            numbers of windows.

        Raises:
            UserError: if the loss is not finite, and `finite` is true.
        """
        weight = batch.get("weight", torch.ones_like(losses))
        windows = self.trainer.strategy.reduce(weight.sum(), reduce_op="sum")
        self._tokens = self._tokens + windows.detach().double() * batch["input_ids"].shape[1]
        # Times the number of processes, because the mean over processes divides by it.
        loss = (losses * (weight * self.trainer.world_size / windows).to(losses)).sum()
        value = self.trainer.strategy.reduce(loss.detach(), reduce_op="mean")
        self.last_loss = float(value)
        if finite:
            require_finite_loss(self.last_loss, f"The loss of {self.purpose}", autocast=self.uses_bfloat16)
        self.log(name, value, prog_bar=True)
        return loss

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Compute gradients, so that those of an optimizer step are the mean over its batches.

        Lightning divides the loss of each batch by `accumulate_grad_batches`, also in the last step of an epoch, which
        may have fewer batches.
        """
        accumulate, batch = self.trainer.accumulate_grad_batches, self.trainer.fit_loop.batch_idx
        first_of_step = batch - batch % accumulate
        batches_of_step = min(accumulate, self.trainer.num_training_batches - first_of_step)
        super().backward(loss * (accumulate / batches_of_step), *args, **kwargs)

    @property
    def uses_bfloat16(self) -> bool:
        """Whether losses are computed in bfloat16 by autocast."""
        return self.trainer.precision == "bf16-mixed" and not self.in_float32

    def on_validation_epoch_start(self) -> None:
        """Create a perplexity metric for the corpus of each validation loader."""
        loaders = self.trainer.val_dataloaders
        loaders = loaders if isinstance(loaders, list) else [loaders]
        names = [getattr(loader.dataset, "corpora", [str(i)])[0] for i, loader in enumerate(loaders)]
        self._perplexities = [WindowPerplexity(name).to(self.device) for name in names]

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Update the perplexity of a corpus by a development batch.

        Args:
            batch: `input_ids` (B, T) int64; optionally `index` (B,), positions of the windows in the corpus, and
                `weight` (B,), which is 0 for windows that pad the batch.
            batch_idx: number of the batch.
            dataloader_idx: number of the validation loader.
        """
        ids = batch["input_ids"]
        model = self.measured_model
        nll = self.autocast_losses(partial(window_losses, model, ids), model, check_always=True).to(self.device)
        positions = batch_idx * len(ids) + torch.arange(len(ids), device=nll.device)
        index = batch.get("index", positions)
        is_counted = batch.get("weight", torch.ones_like(nll)).to(nll.device) > 0
        self._perplexities[dataloader_idx].update(nll, is_counted * (ids.shape[1] - 1), index)

    def on_validation_epoch_end(self) -> None:
        """Log `development/perplexity/<corpus>`, the geometric mean, and the number of training tokens so far."""
        updated = [metric for metric in self._perplexities if metric.update_called]
        self.development = {metric.corpus: float(metric.compute()) for metric in updated}
        self.development_nll = {metric.corpus: metric.nll_per_token for metric in updated}
        if not self.development:
            return
        name = f"{self.validation_prefix}/perplexity"
        labels = corpus_labels(self.development)
        values = {f"{name}/{key_part(labels[corpus])}": value for corpus, value in self.development.items()}
        values[name] = geometric_mean(self.development.values())
        if self.validation_prefix == "development":
            self.measured_at = self.global_step
            values |= self.axes()
        log_exactly(self, values)

    def axes(self) -> dict[str, float]:
        """Return the values of the x axes for development perplexity, by name."""
        return {"development/tokens": float(self.tokens_before + self.tokens), f"{curves_of(self)}/tokens": self.tokens}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["learned_tokens"] = self.tokens
        checkpoint["in_float32"] = self.in_float32

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._tokens = checkpoint["learned_tokens"]
        self.in_float32 = checkpoint["in_float32"]


def curves_of(stage: L.LightningModule) -> str:
    """Return the prefix of a stage's logged metrics: its attribute `curves`, or the name of its class."""
    return getattr(stage, "curves", type(stage).__name__)


def log_exactly(stage: L.LightningModule, values: Mapping[str, float]) -> None:
    """Log numbers in float64 that are equal on all processes. Lightning would round a Python float to float32."""
    as_tensors = {name: torch.tensor(value, dtype=torch.float64, device=stage.device) for name, value in values.items()}
    stage.log_dict(as_tensors, sync_dist=True)


def require_finite_loss(value: float, what: str, *, autocast: bool = False) -> None:
    """Raise UserError if a loss is NaN or infinite."""
    if not abs(value) < float("inf"):
        flag = "--trainer.precision 32-true" if autocast else "--model.dtype float32"
        remedy = f"Lower the learning rate, or use {flag}"
        raise UserError(f"{what} must be a finite number; got {value}. {remedy}.")
