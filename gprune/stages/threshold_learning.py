"""Threshold learning: train one sparsity threshold per module with the language model frozen."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from gprune.models.experts import without_experts
from gprune.models.losses import final_hidden, next_token_losses
from gprune.models.masks import Masks, bypassed, gated
from gprune.partition.modules import ModuleRanks
from gprune.sparsity.budget import Budget
from gprune.sparsity.cut import Cut, Removal, cut_margin, keep_masks, slots_of
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
        ffn_start, attention_start = start
        learns_thresholds = learn != "offsets"
        self.ffn_thresholds = nn.ParameterList(
            nn.Parameter(t.float(), requires_grad=learns_thresholds) for t in ffn_start
        )
        ranks_with_offsets = ranks.ffn if learn != "thresholds" else []
        self.ffn_offsets = nn.ParameterList(nn.Parameter(torch.zeros(len(p))) for p in ranks_with_offsets)
        # Thresholds of KV groups always exist, but are trained only if KV groups are in scope.
        self.attention_thresholds = nn.ParameterList(
            nn.Parameter(t.float(), requires_grad=budget.attention) for t in attention_start
        )
        for b in budget.removed:  # the loss does not depend on thresholds of removed blocks
            for learned in (self.ffn_thresholds, self.ffn_offsets, self.attention_thresholds):
                learned[b : b + 1].requires_grad_(False)
        self.ffn_gates: list[Tensor] = []
        self.attention_gates: list[Tensor] | None = [] if budget.attention else None

    @property
    def ranks(self) -> ModuleRanks:
        """Ranks of units on the device of the thresholds."""
        device = self.ffn_thresholds[0].device
        if self._ranks.labels[0].device != device:
            self._ranks = self._ranks.to(device)
            self._cut = None
        return self._ranks

    @property
    def thresholds(self) -> Thresholds:
        """Thresholds per block, (M,) float32: of modules of neurons, and of modules of KV groups."""
        return list(self.ffn_thresholds), list(self.attention_thresholds)

    @property
    def offsets(self) -> list[Tensor] | None:
        """Offsets per block, (N,) float32; None if offsets are not learned."""
        return list(self.ffn_offsets) or None

    @property
    def offset_ranks(self) -> ModuleRanks:
        """Ranks shifted by the offsets, differentiable in the offsets."""
        return self.ranks if self.offsets is None else self.ranks.with_offsets(self.offsets)

    @torch.no_grad()
    def masks(self, budget: Budget | None = None) -> Masks:
        """Compute the hard masks of the current thresholds for a budget; by default the budget of the stage."""
        margins = unit_margins(self.offset_ranks, self.thresholds)
        if budget is not None:
            return keep_masks(budget, *margins)
        if self._cut is None:
            self._cut = Cut(self.budget, self.ffn_thresholds[0].device)
        return self._cut(*margins)

    def refresh_gates(self) -> None:
        """Compute the gates of a training step: per block (N,) for neurons and (G,) for KV groups."""
        hard = self.masks()
        ranks = self.ranks
        ffn_thresholds, attention_thresholds = self._gate_thresholds(hard)
        blocks = zip(hard.ffn, self.offset_ranks.ffn, ffn_thresholds, ranks.labels, ranks.sizes, strict=True)
        self.ffn_gates[:] = [
            straight_through(keep, soft_gate(p.float(), t, labels, sizes)) for keep, p, t, labels, sizes in blocks
        ]
        if self.attention_gates is not None:
            blocks = zip(hard.attention, ranks.attention, attention_thresholds, strict=True)
            self.attention_gates[:] = [straight_through(keep, _group_gate(p.float(), t)) for keep, p, t in blocks]

    def _gate_thresholds(self, hard: Masks) -> Thresholds:
        """Return the thresholds of the soft gates, shifted so that the slope of the gates is largest at the cut.

        `recentre` has moved the cut to margin 0, so thresholds are usually not shifted. If all blocks must have the
        same width, each block has its own cut, and its thresholds are shifted by the margin of this cut.
        """
        if not self.budget.uniform:
            return self.thresholds
        with torch.no_grad():
            neuron_margins, group_margins = unit_margins(self.offset_ranks, self.thresholds)

        def shifted(thresholds: nn.ParameterList, blocks: Sequence[Removal]) -> list[Tensor]:
            """Return the thresholds of each block, shifted by the margin of the block's cut."""
            return [t + cut_margin([block]).float() for t, block in zip(thresholds, blocks, strict=True)]

        ffn = shifted(self.ffn_thresholds, slots_of(self.budget, neuron_margins, hard.ffn))
        return ffn, shifted(self.attention_thresholds, list(zip(group_margins, hard.attention, strict=True)))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return Adam, with a learning rate for thresholds and one for offsets."""
        thresholds = [p for p in (*self.ffn_thresholds, *self.attention_thresholds) if p.requires_grad]
        groups = [
            {"params": thresholds, "lr": self.learning_rate},
            {"params": list(self.ffn_offsets), "lr": self.offset_learning_rate},
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
        gates = gated(self.lm, self.ffn_gates, self.attention_gates)
        experts = without_experts(self.lm, self.budget.removed_experts)
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
        ranks, uniform = self.ranks, self.budget.uniform
        open_blocks = [b for b in range(len(ranks.labels)) if b not in self.budget.protected]
        neurons = [BlockGradient(self.ffn_thresholds[b].grad, ranks.sizes[b], uniform) for b in open_blocks]
        groups = [BlockGradient(self.attention_thresholds[b].grad, len(ranks.attention[b]), False) for b in open_blocks]
        offsets = [BlockGradient(self.ffn_offsets[b].grad, 1, uniform) for b in open_blocks if self.offsets]
        # Thresholds and offsets are centred separately.
        for gradients in ([*neurons, *groups], offsets):
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
            for offsets in self.ffn_offsets:
                offsets.clamp_(-self.offset_limit, self.offset_limit)
        self.recentre(self.masks())

    @torch.no_grad()
    def recentre(self, hard: Masks) -> None:
        """Shift all thresholds by the same amount so that the budget cuts at margin 0, without changing `hard`."""
        neuron_margins, group_margins = unit_margins(self.offset_ranks, self.thresholds)
        groups = list(zip(group_margins, hard.attention, strict=True))
        shift = cut_margin(slots_of(self.budget, neuron_margins, hard.ffn), groups)
        for t in (*self.ffn_thresholds, *self.attention_thresholds):
            t += shift.to(t.dtype)


class BlockGradient(NamedTuple):
    """Gradient of the thresholds or offsets of a block."""

    grad: Tensor | None  # (M,) for M parameters; None if they are not learned
    units: Tensor | int  # number of units that each parameter moves, (M,) or the same for all
    uses_own_mean: bool  # whether the mean over the units of this block is subtracted, not that over all blocks


def _unit_mean(blocks: Sequence[BlockGradient]) -> Tensor:
    """Return the mean gradient over units, ()."""
    units = sum((torch.ones_like(block.grad) * block.units).sum() for block in blocks)
    return sum(block.grad.sum() for block in blocks) / units


def _group_gate(p: Tensor, threshold: Tensor) -> Tensor:
    """Return `soft_gate` for ranks (G,) and a threshold (1,) of the KV groups of a block, which form one module."""
    labels = torch.zeros(len(p), dtype=torch.long, device=p.device)
    sizes = torch.full((1,), len(p), device=p.device)
    return soft_gate(p, threshold, labels, sizes)


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
