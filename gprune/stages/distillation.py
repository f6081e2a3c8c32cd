"""Distillation: train a pruned model end to end to predict like the dense model."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from gprune.config.running import RELATIVE_RATE
from gprune.models.losses import LogitTransform, final_hidden, frozen_head_losses
from gprune.models.offload import gathered
from gprune.stages.base import FrozenLMStage, require_finite_loss
from gprune.stages.student import Student

log = logging.getLogger("gprune")

BETAS = (0.9, 0.95)  # betas of AdamW
REMEMBERED, PROPORTION = 20, 10  # number of steps in the median; largest multiple of the median
IN_A_ROW = 5  # number of consecutive skipped steps after which training stops


class Proportion:
    """Detect steps whose loss or gradient norm is an outlier.

    A value is an outlier if it is not finite, or above `PROPORTION` times the median of the last `REMEMBERED` steps (if
    there are at least `IN_A_ROW`).
    """

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.norms: list[float] = []
        self.left_out = self.in_a_row = 0

    def holds(self, loss: float, norm: float) -> bool:
        """Return whether a step is to be taken; otherwise count it as skipped."""
        pairs = ((loss, self.losses), (norm, self.norms))
        if all(math.isfinite(v) and (len(seen) < IN_A_ROW or v <= PROPORTION * median(seen)) for v, seen in pairs):
            for value, seen in pairs:
                seen[:] = [*seen, value][-REMEMBERED:]
            self.in_a_row = 0
        else:
            self.left_out += 1
            self.in_a_row += 1
        return self.in_a_row == 0


class DistillationStage(FrozenLMStage):
    """Stage that trains a pruned model (the student) to predict like the frozen dense model (the teacher).

    Loss: mean over windows of
        kl * KL(dense || pruned)           of the next token, in nats,
        + cross_entropy * cross-entropy    of the next token, in nats.
    Both terms are computed from hidden states and the frozen head in chunks, so the logits of a batch are never stored,
    and the teacher runs once per batch. The learning rate of AdamW is relative to the RMS of each tensor
    (`Student.sizes`), and so are Adam's epsilon and the gradient norm. So training does not depend on factors by which
    weights can be rescaled without changing the model's function. The learning rate rises linearly and then decays to
    0. A step with an outlier of loss or gradient (`Proportion`) is skipped; training stops after `IN_A_ROW` consecutive
    ones. The student is trained in float32 and converted back to its dtype at the end. Only trained tensors are
    registered, so checkpoints contain neither the teacher nor frozen weights of the student.

    Args:
        dense: the frozen teacher; its weights may be on several devices, or offloaded.
        student: the pruned model; changed in place, and moved to the Trainer's device.
        targets: trained weights: `mlp` (the FFN), `all` (all weights of the decoder layers) or `lora`.
        rank: rank of the adapters of `lora`.
        learning_rate: peak learning rate of AdamW, relative to the RMS of each tensor.
        absolute_learning_rate: peak learning rate in the units of the weights; if given, `learning_rate` is ignored.
        warmup: share of the steps in which the learning rate rises.
        weight_decay: weight decay of AdamW.
        kl: weight of the KL divergence from the dense model.
        cross_entropy: weight of the next-token cross-entropy.
        checkpointing: whether to recompute the activations of each layer in the backward pass.
        shard: whether to shard the layers of both models over all processes.
        kept: cache of the final hidden states of `dense` by batch of tokens, which this stage reads and extends.
        count: called with the negative number of tokens whose states are computed again although another row has
            counted them.
    """

    purpose, curves = "distillation", "distill"

    def __init__(
        self, dense: PreTrainedModel, student: PreTrainedModel, *, targets: Literal["mlp", "all", "lora"] = "all",
        rank: int = 8, learning_rate: float = RELATIVE_RATE, absolute_learning_rate: float | None = None,
        warmup: float = 0.1, weight_decay: float = 0.0, kl: float = 1.0, cross_entropy: float = 0.0,
        checkpointing: bool = False, shard: bool = False, kept: dict[bytes, Tensor] | None = None,
        count: Callable[[int], None] | None = None,
    ):  # fmt: skip
        super().__init__(dense, shard=shard)
        self.save_hyperparameters(ignore=["dense", "student", "shard", "kept", "count"], logger=False)
        self._kept, self._count = kept, count
        self.learning_rate, self.absolute_learning_rate = learning_rate, absolute_learning_rate
        self.warmup, self.weight_decay, self.kl, self.cross_entropy = warmup, weight_decay, kl, cross_entropy
        self._student = Student(student, targets=targets, rank=rank, checkpointing=checkpointing)
        self.learned = self._student.learned
        self.proportion = Proportion()
        self._norm: Tensor | None = None  # gradient norm of the current step

    @property
    def student(self) -> PreTrainedModel:
        """The pruned model that is trained."""
        return self._student.model

    def finished(self) -> PreTrainedModel:
        """Return the student as a plain frozen model, with adapters merged."""
        return self._student.plain()

    @property
    def _shards(self) -> bool:
        return self._shard and self.trainer.world_size > 1

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if not self._shards:
            self.student.to(self.trainer.strategy.root_device)

    def configure_model(self) -> None:
        """Shard the student's layers over processes, and so the optimizer's states."""
        if self._shards and not self._student.sharded:
            self._student.shard(self.device_mesh["data_parallel"], self.trainer.strategy.root_device)
            self.learned = self._student.learned

    def teardown(self, stage: str) -> None:
        """Gather a sharded student on the CPU."""
        super().teardown(stage)
        if self._student.sharded:
            self._student.gather()
            self.learned = self._student.learned

    def on_train_end(self) -> None:
        """Free gradients and optimizer states, which the Trainer would keep together with their weights."""
        if self.proportion.left_out:
            log.warning(
                "Skipped %d of %d steps: loss or gradient not finite, or above %d times the median of %d steps.",
                self.proportion.left_out, self.global_step, PROPORTION, REMEMBERED,
            )  # fmt: skip
        for optimizer in self.trainer.optimizers:
            optimizer.zero_grad(set_to_none=True)
            optimizer.state.clear()

    @property
    def sizes(self) -> list[float]:
        """Scale of each tensor's learning rate, in the order of `learned`: its RMS, or 1 for absolute rates."""
        absolute = self.absolute_learning_rate is not None
        return [1.0 if absolute else self._student.sizes[name] for name in self.learned]

    def configure_optimizers(self) -> dict[str, Any]:
        """AdamW with linear warmup over the share `warmup` of the steps and linear decay to 0."""
        steps, rate = self.trainer.estimated_stepping_batches, self.absolute_learning_rate or self.learning_rate
        groups = []
        for parameter, size in zip(self.learned.values(), self.sizes, strict=True):
            unit = size or 1.0  # a tensor of zeros has learning rate 0, so this value has no effect
            rest = {"weight_decay": self.weight_decay / unit, "eps": 1e-8 / unit}
            groups.append({"params": [parameter], "lr": rate * size, "size": size, **rest})
        fused = self.trainer.strategy.root_device.type in ("cpu", "cuda")
        optimizer = torch.optim.AdamW(groups, betas=BETAS, fused=fused)
        rising = max(1, math.ceil(self.warmup * steps))

        def factor(step: int) -> float:
            return min((step + 1) / rising, (steps - step) / max(1, steps - rising), 1.0)

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def gradient_norm(self) -> Tensor:
        """Gradient norm before clipping, with each tensor's gradient scaled by its RMS; () float32, cached per step."""
        if self._norm is None:
            sized = zip(self.learned.values(), self.sizes, strict=True)
            norms = [size * p.grad.norm() for p, size in sized if p.grad is not None]
            self._norm = gathered(torch.linalg.vector_norm(torch.stack(norms)))
        return self._norm

    def configure_gradient_clipping(
        self, optimizer: torch.optim.Optimizer, gradient_clip_val: float | None = None, *_: Any, **__: Any
    ) -> None:
        """Clip the gradient by its norm, or drop it if the step is an outlier."""
        norm, self._norm = float(self.gradient_norm()), None
        if not self.proportion.holds(self.last_loss, norm):
            optimizer.zero_grad(set_to_none=True)  # AdamW skips parameters without a gradient
            if self.proportion.in_a_row >= IN_A_ROW:
                require_finite_loss(self.last_loss if self.proportion.norms else math.nan, "The loss of distillation")
                self.trainer.should_stop = True
        elif gradient_clip_val and norm > gradient_clip_val:
            for parameter in (p for p in self.learned.values() if p.grad is not None):
                parameter.grad.mul_(gradient_clip_val / (norm + 1e-6))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["proportion"] = vars(self.proportion)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        vars(self.proportion).update(checkpoint["proportion"])

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Weighted sum of KL and cross-entropy on a batch, () float32."""
        losses = self.autocast.losses(self, partial(self._losses, batch["input_ids"]), self.lm, self.student)
        return self.batch_loss(losses, batch, "distill/loss", finite=False)

    def _losses(self, ids: Tensor) -> Tensor:
        """Loss of each window, (B, T) -> (B,) float32."""
        dense = self._teacher_hidden(ids).flatten(0, 1) if self.kl else None
        hidden = final_hidden(self.student, ids).flatten(0, 1)
        head, transform = self.student.get_output_embeddings(), LogitTransform.of(self.student)
        losses = torch.zeros(len(ids), device=hidden.device)
        for weight, targets in ((self.kl, dense), (self.cross_entropy, ids[:, 1:].flatten())):
            if weight:
                targets = targets.to(hidden.device, hidden.dtype if targets.is_floating_point() else None)
                of_tokens = frozen_head_losses(hidden, head.weight, head.bias, targets, transform)
                losses = losses + weight * of_tokens.view(len(ids), -1).mean(1)
        return losses

    @torch.no_grad()
    def _teacher_hidden(self, ids: Tensor) -> Tensor:
        """Final hidden states of the teacher, (B, T - 1, H) in its dtype, from the cache or computed."""
        if self._kept is None:
            return final_hidden(self.lm, ids)
        key = ids.cpu().numpy().tobytes() + b"float32" * self.autocast.in_float32
        if key not in self._kept:
            self._kept[key] = final_hidden(self.lm, ids).cpu()
            if self._count is not None:
                self._count(-ids.numel())
        return self._kept[key]
