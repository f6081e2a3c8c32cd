"""Distillation: train a pruned model end to end to predict like the dense model."""

from __future__ import annotations

import logging
import math
from functools import partial
from typing import Any, Literal

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from transformers import PreTrainedModel

from gprune.config.running import RELATIVE_RATE
from gprune.errors import UserError
from gprune.models.copies import full_tensor, with_sharded_layers
from gprune.models.losses import LogitTransform, final_hidden, frozen_head_losses, same_head
from gprune.stages.base import FrozenLMStage, require_finite_loss
from gprune.stages.student import Student

log = logging.getLogger("gprune")

BETAS = (0.9, 0.95)  # betas of AdamW
MAX_SKIPPED = 5  # number of consecutive skipped steps after which training stops


class DistillationStage(FrozenLMStage):
    """Stage that trains a pruned model (the student) to predict like the frozen dense model (the teacher).

    Loss: mean over windows of
        kl * KL(dense || pruned)           of the next token, in nats,
        + cross_entropy * cross-entropy    of the next token, in nats.
    Both terms are computed from hidden states and the frozen head in chunks, so the logits of a batch are never stored,
    and the teacher runs once per batch. The learning rate of AdamW is relative to the RMS of each tensor
    (`Student.sizes`), and so are Adam's epsilon and the gradient norm. So training does not depend on factors by which
    weights can be rescaled without changing the model's function. The learning rate rises linearly and then decays to
    0. A step whose loss or gradient is not finite is skipped; training stops after `MAX_SKIPPED` consecutive ones. A
    step with a large loss is not skipped: it may be one of the few of a rare language, which would then be lost. The
    student is trained in float32 and converted back to its dtype at the end. Only trained tensors are registered, so
    checkpoints contain neither the teacher nor frozen weights of the student.

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

    Raises:
        UserError: with `kl`, if the heads of both models differ.
    """

    purpose = "distillation"
    curves = "distill"

    def __init__(
        self, dense: PreTrainedModel, student: PreTrainedModel, *, targets: Literal["mlp", "all", "lora"] = "all",
        rank: int = 8, learning_rate: float = RELATIVE_RATE, absolute_learning_rate: float | None = None,
        warmup: float = 0.1, weight_decay: float = 0.0, kl: float = 1.0, cross_entropy: float = 0.0,
        checkpointing: bool = False,
    ):  # fmt: skip
        if kl and not same_head(student, dense):
            raise UserError(
                "--distill.kl must be 0, because the pruned model's output embedding differs from that of the dense "
                f"model; got {kl:g}. Or put distill before the recovery that changes the output embedding."
            )
        super().__init__(dense)
        self.save_hyperparameters(ignore=["dense", "student"], logger=False)
        self.learning_rate = learning_rate
        self.absolute_learning_rate = absolute_learning_rate
        self.warmup = warmup
        self.weight_decay = weight_decay
        self.kl = kl
        self.cross_entropy = cross_entropy
        self._student = Student(student, targets=targets, rank=rank, checkpointing=checkpointing)
        self.learned = nn.ParameterDict(self._student.learned)
        self._whole: tuple[PreTrainedModel, ...] = ()  # both models, while sharded copies compute
        self.skipped = self.skipped_in_a_row = 0  # numbers of steps
        self._norm: Tensor | None = None  # gradient norm of the current step
        self._losses_of_step: list[float] = []  # losses of the batches of the current step

    @property
    def student(self) -> PreTrainedModel:
        """The pruned model that is trained."""
        return self._student.model

    def finished(self) -> PreTrainedModel:
        """Return the student as a plain frozen model, with adapters merged."""
        return self._student.to_plain_model()

    def setup(self, stage: str) -> None:
        """Move the teacher and the student to the Trainer's device, unless `configure_model` shards them."""
        super().setup(stage)
        if not isinstance(self.trainer.strategy, ModelParallelStrategy):
            self.student.to(self.trainer.strategy.root_device)

    def configure_model(self) -> None:
        """With Lightning's ModelParallelStrategy, use copies of both models whose layers are sharded."""
        is_attached = self._trainer is not None  # not while a checkpoint is loaded
        if not is_attached or not isinstance(self.trainer.strategy, ModelParallelStrategy) or self._whole:
            return
        device, mesh = self.trainer.strategy.root_device, self.device_mesh["data_parallel"]
        self._whole = (self.lm.cpu(), self.student.cpu())
        teacher, student = (with_sharded_layers(model, mesh).to(device) for model in self._whole)
        names = {id(parameter): name for name, parameter in self.student.named_parameters()}
        for key, parameter in self._student.learned.items():
            self.learned[key] = student.get_parameter(names[id(parameter)])
        self._frozen, self._student.model = (teacher,), student

    def teardown(self, stage: str) -> None:
        """Copy the weights of a sharded student to the whole one, after the last forward pass."""
        super().teardown(stage)
        if not self._whole:
            return
        (teacher, student), sharded, self._whole = self._whole, self.student, ()
        for parameter, part in zip(student.parameters(), sharded.parameters(), strict=True):
            parameter.data.copy_(full_tensor(part))
        self._frozen, self._student.model = (teacher,), student
        self.learned = nn.ParameterDict(self._student.learned)
        for model in (teacher, student):
            model.to(self.trainer.strategy.root_device)

    def on_train_end(self) -> None:
        """Warn of skipped steps, and free gradients and optimizer states, which the Trainer would keep."""
        if self.skipped:
            log.warning("Skipped %d of %d steps: loss or gradient not finite.", self.skipped, self.global_step)
        for optimizer in self.trainer.optimizers:
            optimizer.zero_grad(set_to_none=True)
            optimizer.state.clear()

    @property
    def sizes(self) -> list[float]:
        """Scale of each tensor's learning rate, in the order of `learned`: its RMS, or 1 if rates are absolute."""
        if self.absolute_learning_rate is not None:
            return [1.0] * len(self.learned)
        return [self._student.sizes[name] for name in self.learned]

    def configure_optimizers(self) -> dict[str, Any]:
        """Return AdamW, with linear warmup over the share `warmup` of the steps and linear decay to 0."""
        learning_rate = self.absolute_learning_rate or self.learning_rate
        groups = []
        for parameter, size in zip(self.learned.values(), self.sizes, strict=True):
            unit = size or 1.0  # a tensor of zeros has learning rate 0, so this value has no effect
            groups.append({
                "params": [parameter], "lr": learning_rate * size, "size": size,
                "weight_decay": self.weight_decay / unit, "eps": 1e-8 / unit,
            })  # fmt: skip
        fused = self.trainer.strategy.root_device.type in ("cpu", "cuda")
        optimizer = torch.optim.AdamW(groups, betas=BETAS, fused=fused)
        steps = self.trainer.estimated_stepping_batches
        warmup_steps = max(1, math.ceil(self.warmup * steps))

        def factor(step: int) -> float:
            """Return the factor of the peak learning rate in a step."""
            rising = (step + 1) / warmup_steps
            falling = (steps - step) / max(1, steps - warmup_steps)
            return min(rising, falling, 1.0)

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def gradient_norm(self) -> Tensor:
        """Return the gradient norm before clipping, () float32, with the gradient of each tensor times its `sizes`.

        It is computed once per step; the optimizer step forgets it.
        """
        if self._norm is None:
            pairs = zip(self.learned.values(), self.sizes, strict=True)
            norms = [rms * parameter.grad.norm() for parameter, rms in pairs if parameter.grad is not None]
            self._norm = full_tensor(torch.linalg.vector_norm(torch.stack(norms)))
        return self._norm

    def on_after_backward(self) -> None:
        """Collect the losses of the batches of a step (`accumulate_grad_batches`)."""
        self._losses_of_step.append(self.last_loss)

    def configure_gradient_clipping(
        self, optimizer: torch.optim.Optimizer, gradient_clip_val: float | None = None, *_: Any, **__: Any
    ) -> None:
        """Clip the gradient by its norm, or drop it if it or the loss is not finite.

        After `MAX_SKIPPED` consecutive steps without a gradient training stops.

        Raises:
            UserError: if no step was applied before them, or the loss of the last one is not finite.
        """
        norm, loss = float(self.gradient_norm()), sum(self._losses_of_step) / len(self._losses_of_step)
        self._norm, self._losses_of_step = None, []  # the next step has another gradient
        is_finite = math.isfinite(loss) and math.isfinite(norm)
        self.skipped_in_a_row = 0 if is_finite else self.skipped_in_a_row + 1
        if not is_finite:
            self.skipped += 1
            optimizer.zero_grad(set_to_none=True)  # AdamW skips parameters without a gradient
            if self.skipped_in_a_row >= MAX_SKIPPED:
                no_step_was_applied = self.skipped > self.global_step  # which does not count this step yet
                last_loss = math.nan if no_step_was_applied else loss  # NaN raises
                require_finite_loss(last_loss, "The loss of distillation", autocast=self.uses_bfloat16)
                self.trainer.should_stop = True
        elif gradient_clip_val and norm > gradient_clip_val:
            for parameter in (p for p in self.learned.values() if p.grad is not None):
                parameter.grad.mul_(gradient_clip_val / (norm + 1e-6))  # as clip_grad_norm_

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["skipped"] = [self.skipped, self.skipped_in_a_row]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self.skipped, self.skipped_in_a_row = checkpoint["skipped"]

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Return the weighted sum of KL and cross-entropy on a batch, () float32. It may be infinite or NaN."""
        losses = self.autocast_losses(partial(self._losses, batch["input_ids"]), self.lm, self.student)
        return self.batch_loss(losses, batch, "distill/loss", finite=False)

    def _losses(self, ids: Tensor) -> Tensor:
        """Return the loss of each window, (B, T) -> (B,) float32."""
        teacher_hidden = None
        if self.kl:
            with torch.no_grad():
                teacher_hidden = final_hidden(self.lm, ids).flatten(0, 1)
        hidden = final_hidden(self.student, ids).flatten(0, 1)
        head = self.student.get_output_embeddings()
        transform = LogitTransform.of(self.student)
        losses = torch.zeros(len(ids), device=hidden.device)

        def window_means(targets: Tensor) -> Tensor:
            """Return the mean loss of each window, for hidden states (KL) or tokens (cross-entropy) as targets."""
            token_losses = frozen_head_losses(hidden, head.weight, head.bias, targets, transform)
            return token_losses.view(len(ids), -1).mean(1)

        if self.kl:
            losses = losses + self.kl * window_means(teacher_hidden.to(hidden.device, hidden.dtype))
        if self.cross_entropy:
            losses = losses + self.cross_entropy * window_means(ids[:, 1:].flatten().to(hidden.device))
        return losses
