"""Threshold learning: train one sparsity threshold per module with the language model frozen."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from gprune.models.experts import without_experts
from gprune.models.families import decoder_layers
from gprune.models.losses import final_hidden, next_token_losses
from gprune.models.masks import Masks, bypassed, gated
from gprune.partition.modules import ModuleRanks
from gprune.sparsity.budget import Budget
from gprune.sparsity.cut import Cut, cut_margin, keep_masks, slots_of
from gprune.sparsity.thresholds import Thresholds, unit_margins
from gprune.stages.base import FrozenLMStage


class ThresholdLearning(FrozenLMStage):
    """Stage that learns a threshold t per module, and one per block for its KV groups if they are in scope.

    With `learn="offsets"` it learns o instead, one number per neuron that shifts its rank, p_i' = sigmoid(logit p_i +
    o_i). This is a free gate for every neuron as in GRASPrune (arXiv 2604.19398), initialized from the margins. With
    `both` it learns t and o. With `loss="kl"` the loss is KL(dense || pruned), which needs one more forward pass per
    step.

    Loss: L(t) = mean over windows of the next-token cross-entropy, in nats per token, of the frozen model whose
    units are multiplied by g_i = h_i + s_i - stop(s_i), where
        h_i in {0, 1}  the hard keep mask that meets the budget (`cut.keep_masks` on logit p_i - t_m),
        s_i = sigmoid((p_i - sigmoid(t_m)) / T_m)  the soft gate, T_m = max(0.05, 1/n_m),
        p_i in (0, 1)  the unit's rank inside its module, n_m the module's size; stop() blocks the gradient.
    So the forward pass is the pruned model on budget, and the backward pass uses the gradient of
    the soft gate (straight-through). Adding a constant to all t_m changes no hard mask, only the distance of the soft
    gates from it. After every update the thresholds are therefore shifted so that the budget cuts at margin 0, where
    s_i = 1/2. So gradients are largest for the units closest to the cut.

    Opening any unit lowers the loss, and Adam's steps depend on signs more than on sizes. Without correction Adam moves
    all thresholds in the same direction, which changes no mask. With `centred` the mean gradient over units is
    subtracted first (over the units of a block if all blocks must have the same width).

    Args:
        model: the frozen language model.
        ranks: ranks of units inside their modules.
        start: initial thresholds, such as `start_thresholds`.
        budget: how much has to be removed.
        learn: the learned parameters: `thresholds`, `offsets` or `both`.
        loss: `cross_entropy` of the next token, or `kl`, the KL divergence from the dense model.
        learning_rate: learning rate of Adam for thresholds, in logits.
        offset_learning_rate: learning rate of Adam for offsets, in logits.
        offset_limit: largest offset, in logits.
        centred: whether to subtract the mean gradient over units.
    """

    purpose = "threshold learning"
    curves = "learn"

    def __init__(
        self, model: PreTrainedModel, ranks: ModuleRanks, start: Thresholds, budget: Budget, *,
        learn: Literal["thresholds", "offsets", "both"] = "thresholds",
        loss: Literal["cross_entropy", "kl"] = "cross_entropy", learning_rate: float = 0.1,
        offset_learning_rate: float = 0.05, offset_limit: float = 1.2, centred: bool = True,
    ):  # fmt: skip
        super().__init__(model)
        self.save_hyperparameters(ignore=["model", "ranks", "start", "budget"], logger=False)
        self._ranks = ranks
        self.budget = budget
        self.loss = loss
        self.centred = centred
        self.learning_rate = learning_rate
        self.offset_learning_rate = offset_learning_rate
        self.offset_limit = offset_limit
        self._cut: Cut | None = None  # cached cut of the budget, on the device of the thresholds
        # Parameters by position, because names of parameters must not have dots. Neurons always have thresholds, and
        # other units learn them if they are in scope. Layers that are removed have no influence on the loss.
        units = {u.key: u for u in budget.units}
        self.keys, lost = list(start), set(budget.removed)
        self.with_offsets = [key for key in start if learn != "thresholds" and units[key].kind == "neurons"]
        self.learned_thresholds, self.learned_offsets = nn.ParameterList(), nn.ParameterList()
        for key, t in start.items():
            u = units[key]
            learns = learn != "offsets" if u.kind == "neurons" else u.kind in budget.finer
            self.learned_thresholds.append(nn.Parameter(t.float(), requires_grad=learns and u.layer not in lost))
        for key in self.with_offsets:
            zeros = torch.zeros(len(ranks.p[key]))
            self.learned_offsets.append(nn.Parameter(zeros, requires_grad=units[key].layer not in lost))
        self.gates: dict[str, Tensor] = {}  # of the units in scope

    @property
    def ranks(self) -> ModuleRanks:
        """Ranks of units on the device of the thresholds."""
        device = self.learned_thresholds[0].device
        if next(iter(self._ranks.labels.values())).device != device:
            self._ranks = self._ranks.to(device)
            self._cut = None
        return self._ranks

    @property
    def thresholds(self) -> dict[str, nn.Parameter]:
        """Thresholds of modules by key of units, (K,) float32."""
        return dict(zip(self.keys, self.learned_thresholds, strict=True))

    @property
    def offsets(self) -> dict[str, nn.Parameter]:
        """Offsets of neurons by key, (N,) float32; empty if offsets are not learned."""
        return dict(zip(self.with_offsets, self.learned_offsets, strict=True))

    @property
    def offset_ranks(self) -> ModuleRanks:
        """Ranks shifted by the offsets, differentiable in the offsets."""
        return self.ranks.with_offsets(self.offsets) if self.with_offsets else self.ranks

    @torch.no_grad()
    def masks(self, budget: Budget | None = None) -> Masks:
        """Compute the hard masks of the current thresholds for a budget; by default the budget of the stage."""
        margins = unit_margins(self.offset_ranks, self.thresholds)
        if budget is not None:
            return keep_masks(budget, margins)
        if self._cut is None:
            self._cut = Cut(self.budget, self.learned_thresholds[0].device)
        return self._cut(margins)

    def refresh_gates(self) -> None:
        """Compute the gates of a training step: (rows x count,) by key, of the units in scope."""
        hard = self.masks()
        ranks, p, thresholds = self.ranks, self.offset_ranks.p, self._gate_thresholds(hard)
        for u in self.budget.units:
            if u.kind in self.budget.finer:
                of_module = thresholds[u.key], ranks.labels[u.key], ranks.sizes[u.key]
                self.gates[u.key] = straight_through(hard[u.key], soft_gate(p[u.key].float(), *of_module))

    def _gate_thresholds(self, hard: Masks) -> Mapping[str, Tensor]:
        """Return the thresholds of the soft gates, shifted so that the slope of the gates is largest at the cut.

        `recentre` has moved the cut to margin 0, so thresholds are usually not shifted. If all blocks must have the
        same width, each block has its own cut, and its thresholds are shifted by the margin of this cut.
        """
        if not self.budget.uniform:
            return self.thresholds
        with torch.no_grad():
            slots = slots_of(self.budget, unit_margins(self.offset_ranks, self.thresholds), hard)
        kinds = self.budget.finer
        return {key: t + cut_margin({key: slots[key]}, kinds).float() for key, t in self.thresholds.items()}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return Adam, with a learning rate for thresholds and one for offsets."""
        groups = [
            {"params": [p for p in self.learned_thresholds if p.requires_grad], "lr": self.learning_rate},
            {"params": list(self.learned_offsets), "lr": self.offset_learning_rate},
        ]
        return torch.optim.Adam([group for group in groups if group["params"]])

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Return the loss of the gated model on a batch, () float32: cross-entropy or KL (`--sparsity.loss`).

        Raises:
            UserError: if the loss is not finite.
        """
        losses = self.autocast_losses(partial(self._losses, batch["input_ids"]), self.lm, check_always=True)
        return self.batch_loss(losses, batch, "learn/loss")

    def _losses(self, ids: Tensor) -> Tensor:
        """Return the loss of each window, (B, T) -> (B,) float32."""
        teacher = None
        if self.loss == "kl":
            with torch.no_grad():
                teacher = final_hidden(self.lm, ids)
        self.refresh_gates()  # the autograd graph of the last step was freed
        gates = gated(self.lm, self.gates, self.budget.units)
        experts = without_experts(decoder_layers(self.lm), self.budget.units, self.budget.removed_experts)
        with bypassed(self.lm, self.budget.removed), experts, gates:
            return next_token_losses(self.lm, ids, teacher=teacher)

    def axes(self) -> dict[str, float]:
        """Return the values of the x axes, with the number of epochs as `learn/epoch`."""
        trainer = self.trainer
        epochs = 0.0
        if self.global_step:  # before the first step the Trainer may not know the number of batches
            steps_per_epoch = math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches)
            epochs = self.global_step / steps_per_epoch
        return super().axes() | {"learn/epoch": epochs}

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Centre the gradients, if the stage does so."""
        if self.centred:
            self.centre()

    @torch.no_grad()
    def centre(self) -> None:
        """Subtract the mean gradient over units from the gradients of thresholds and of offsets, in place.

        A shift of all units by the same amount changes no mask. Protected blocks are left out. If all blocks must have
        the same width, neurons compete inside their block only, so the mean of their block is subtracted. KV groups
        compete with all neurons in either case.
        """
        finest, offsets = self.budget.finer[-1], self.offsets
        of_thresholds, of_offsets = [], []
        units = {u.key: u for u in self.budget.units if u.layer not in self.budget.protected}
        for key, t in self.thresholds.items():
            if key in units:
                uses_own_mean = self.budget.uniform and units[key].kind == finest
                of_thresholds.append(UnitGradient(t.grad, self.ranks.sizes[key], uses_own_mean))
                if key in offsets:
                    of_offsets.append(UnitGradient(offsets[key].grad, 1, uses_own_mean))
        # Thresholds and offsets are centred separately.
        for gradients in (of_thresholds, of_offsets):
            learned = [gradient for gradient in gradients if gradient.grad is not None]
            if not learned:
                continue
            common_mean = _unit_mean(learned)
            for gradient in learned:
                mean = _unit_mean([gradient]) if gradient.uses_own_mean else common_mean
                gradient.grad.sub_(mean * gradient.units)

    def optimizer_step(self, *args: object, **kwargs: object) -> None:
        """Update the parameters, limit the offsets, and move the cut to margin 0."""
        super().optimizer_step(*args, **kwargs)
        with torch.no_grad():
            for offsets in self.learned_offsets:
                offsets.clamp_(-self.offset_limit, self.offset_limit)
        self.recentre(self.masks())

    @torch.no_grad()
    def recentre(self, hard: Masks) -> None:
        """Shift all thresholds by the same amount so that the budget cuts at margin 0, without changing `hard`."""
        slots = slots_of(self.budget, unit_margins(self.offset_ranks, self.thresholds), hard)
        shift = cut_margin(slots, self.budget.finer)
        for t in self.learned_thresholds:
            t += shift.to(t.dtype)


class UnitGradient(NamedTuple):
    """Gradient of the thresholds or offsets of units."""

    grad: Tensor | None  # (M,) for M parameters; None if they are not learned
    units: Tensor | int  # number of units that each parameter moves, (M,) or the same for all
    uses_own_mean: bool  # whether the mean over these units is subtracted, not that over all blocks


def _unit_mean(gradients: Sequence[UnitGradient]) -> Tensor:
    """Return the mean gradient over units, ()."""
    units = sum((torch.ones_like(g.grad) * g.units).sum() for g in gradients)
    return sum(g.grad.sum() for g in gradients) / units


def soft_gate(p: Tensor, thresholds: Tensor, labels: Tensor, sizes: Tensor) -> Tensor:
    """Return the differentiable mask sigmoid((p_i - sigmoid(t_m)) / T_m), (N,), with T_m = max(0.05, 1 / n_m).

    p are within-module ranks (N,) in (0, 1), and labels (N,) are modules in [0, K). Thresholds t (K,) are logits:
    sigmoid(t_m) is the share of the module that is removed. Sizes n are (K,) units per module.
    """
    temperature = (1 / sizes.to(p.dtype)).clamp_min(0.05)
    return torch.sigmoid((p - torch.sigmoid(thresholds)[labels]) / temperature[labels])


def straight_through(hard: Tensor, soft: Tensor) -> Tensor:
    """Return the value of `hard` with the gradient of `soft` (Bengio et al., arXiv 1308.3432)."""
    return (soft - soft.detach()) + hard.to(soft.dtype)  # in this order the value is exactly 0 or 1
