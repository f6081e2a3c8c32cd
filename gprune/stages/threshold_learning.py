"""Threshold learning: one sparsity threshold per module, trained around the frozen language model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from gprune.models.losses import final_hidden, next_token_losses
from gprune.models.masks import Masks
from gprune.partition.modules import ModuleRanks
from gprune.sparsity.budget import Budget
from gprune.sparsity.cut import Cut, cut_margin
from gprune.sparsity.gates import bypassed, gated, soft_gate, straight_through
from gprune.sparsity.thresholds import Thresholds, masks_from_thresholds, unit_margins
from gprune.stages.base import FrozenLMStage


class ThresholdLearning(FrozenLMStage):
    """Learns t, one threshold per module (and one per block for its KV groups, when they are in scope).

    With `learn="offsets"` it learns instead o, one number per neuron that moves its rank, p_i' = sigmoid(logit p_i +
    o_i): a free gate for every neuron, as in GRASPrune (arXiv 2604.19398), warm-started from the margins. With `both`
    it learns t and o. With `loss="kl"` the loss is KL(dense || pruned), at the price of one more forward pass per step.

    Loss: L(t) = mean over windows of the next-token cross-entropy, in nats per token, of the frozen model whose
    units are multiplied by g_i = h_i + s_i - stop(s_i), where
        h_i in {0, 1}  the hard keep mask that meets the budget (`cut.keep_masks` on logit p_i - t_m),
        s_i = sigmoid((p_i - sigmoid(t_m)) / T_m)  the soft gate, T_m = max(0.05, 1/n_m),
        p_i in (0, 1)  the unit's rank inside its module, n_m the module's size, stop the gradient stop.
    So the forward pass is the pruned model at exactly the target sparsity, and the backward pass is the soft gate's
    (straight-through). Shifting every t_m by the same amount changes no hard mask, only the distance of the soft gates
    from it. So after every update thresholds are shifted until the budget cuts at margin 0, where s_i crosses 1/2: the
    gradient is always taken at the units that are about to change sides.

    Opening any unit lowers the loss, and Adam steps by signs more than by sizes: left to itself it moves all thresholds
    the same way, which changes no mask. With `centred` the mean gradient over units is subtracted first (over the units
    of a block, where all blocks have to be equally wide).

    Args:
        model: frozen.
        ranks: of units inside their modules.
        start: thresholds to begin with, such as `start_thresholds`.
        budget: the number of parameters that have to go.
        learn: what is learned: `thresholds`, `offsets` or `both`.
        loss: `cross_entropy` of the next token, or `kl`: the divergence from the dense model.
        learning_rate: Adam's step size of the thresholds, in logits.
        offset_learning_rate: Adam's step size of the offsets, in logits.
        offset_limit: the largest offset, in logits.
        centred: subtract the mean gradient over units.
        shard: shard the model over processes while it learns.
    """

    purpose, curves = "threshold learning", "learn"

    def __init__(
        self, model: PreTrainedModel, ranks: ModuleRanks, start: Thresholds, budget: Budget, *,
        learn: Literal["thresholds", "offsets", "both"] = "thresholds",
        loss: Literal["cross_entropy", "kl"] = "cross_entropy", learning_rate: float = 0.1,
        offset_learning_rate: float = 0.05, offset_limit: float = 1.2, centred: bool = True, shard: bool = False,
    ):  # fmt: skip
        super().__init__(model, shard=shard)
        self.save_hyperparameters(ignore=["model", "ranks", "start", "budget", "shard"], logger=False)
        self._ranks, self.budget = ranks, budget
        self.learn, self.loss, self.centred = learn, loss, centred
        self.learning_rate, self.offset_learning_rate = learning_rate, offset_learning_rate
        self.offset_limit = offset_limit
        self._cut: Cut | None = None  # of the budget, on the device of the thresholds
        ffn, attention = start
        moves = learn != "offsets"
        self.ffn_thresholds = nn.ParameterList(nn.Parameter(t.float(), requires_grad=moves) for t in ffn)
        self.ffn_offsets = nn.ParameterList(
            nn.Parameter(torch.zeros(len(p))) for p in (ranks.ffn if learn != "thresholds" else ())
        )
        # Thresholds of KV groups always exist, but they are learned only in scope.
        self.attention_thresholds = nn.ParameterList(
            nn.Parameter(t.float(), requires_grad=budget.costs.attention) for t in attention
        )
        for b in budget.costs.gone:  # nothing depends on them
            for learned in (self.ffn_thresholds, self.ffn_offsets, self.attention_thresholds):
                learned[b : b + 1].requires_grad_(False)
        self.ffn_gates: list[Tensor] = []
        self.attention_gates: list[Tensor] | None = [] if budget.costs.attention else None

    @property
    def ranks(self) -> ModuleRanks:
        """On the device of the thresholds, where they stay until Lightning moves those."""
        device = self.ffn_thresholds[0].device
        if self._ranks.labels[0].device != device:
            self._ranks, self._cut = self._ranks.to(device), None
        return self._ranks

    @property
    def thresholds(self) -> Thresholds:
        """(M,) float32 of each block: those of its neurons' modules, those of its KV groups' modules."""
        return list(self.ffn_thresholds), list(self.attention_thresholds)

    @property
    def offsets(self) -> list[Tensor] | None:
        """(N,) per block, or None where none are learned."""
        return list(self.ffn_offsets) or None

    @property
    def moved_ranks(self) -> ModuleRanks:
        """The ranks after offsets, differentiable in them."""
        return self.ranks if self.offsets is None else self.ranks.moved(self.offsets)

    @torch.no_grad()
    def masks(self, budget: Budget | None = None) -> Masks:
        """The hard masks of the current thresholds, for this stage's budget or another one, on their device."""
        if budget is not None:
            return masks_from_thresholds(self.moved_ranks, self.thresholds, budget)
        neurons, groups = unit_margins(self.moved_ranks, self.thresholds)
        self._cut = self._cut or Cut(self.budget, neurons[0].device)
        return self._cut(neurons, groups)

    def refresh_gates(self) -> None:
        """Compute the gates of a training step: (N,) for the neurons of each block, (G,) for its KV groups."""
        hard, ranks, moved = self.masks(), self.ranks, self.moved_ranks.ffn
        neurons, groups = self._at_the_cut(hard)
        parts = zip(hard.ffn, moved, neurons, ranks.labels, ranks.sizes, strict=True)
        self.ffn_gates[:] = [straight_through(h, soft_gate(p.float(), t, y, n)) for h, p, t, y, n in parts]
        if self.attention_gates is not None:
            parts = zip(hard.attention, ranks.attention, groups, strict=True)
            self.attention_gates[:] = [straight_through(h, _group_gate(p.float(), t)) for h, p, t in parts]

    def _at_the_cut(self, hard: Masks) -> Thresholds:
        """The thresholds by which soft gates are steepest where the budget cuts.

        That is margin 0 (`recentre`). Where all blocks have to be equally wide, each block has a cut of its own.
        """
        if not self.budget.costs.uniform:
            return self.thresholds
        with torch.no_grad():
            neurons, groups = unit_margins(self.moved_ranks, self.thresholds)
        kinds = ((self.ffn_thresholds, neurons, hard.ffn), (self.attention_thresholds, groups, hard.attention))
        return tuple(
            [t + cut_margin(Masks([keep], []), [margin]).float() for t, margin, keep in zip(*kind, strict=True)]
            for kind in kinds
        )

    def configure_optimizers(self) -> torch.optim.Optimizer:
        thresholds = [p for p in (*self.ffn_thresholds, *self.attention_thresholds) if p.requires_grad]
        groups = [
            {"params": thresholds, "lr": self.learning_rate},
            {"params": list(self.ffn_offsets), "lr": self.offset_learning_rate},
        ]
        return torch.optim.Adam([group for group in groups if group["params"]])

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """() float32: the loss of the gated model on a batch, by cross-entropy or KL, as `--sparsity.loss` says."""
        losses = self.autocast.losses(self, partial(self._losses, batch["input_ids"]), self.lm)
        return self.batch_loss(losses, batch, "learn/loss")

    def _losses(self, ids: Tensor) -> Tensor:
        """The loss of each window, (B, T) -> (B,) float32."""
        teacher = None
        if self.loss == "kl":
            with torch.no_grad():
                teacher = final_hidden(self.lm, ids)
        self.refresh_gates()  # a fresh graph: the last step has used up its own
        gates = gated(self.lm, self.ffn_gates, self.attention_gates)
        with bypassed(self.lm, self.budget.costs.gone), gates:
            return next_token_losses(self.lm, ids, teacher=teacher)

    def axes(self) -> dict[str, float]:
        """The axes of every stage, and epochs so far as `learn/epoch`."""
        trainer, epochs = self.trainer, 0.0
        if self.global_step:  # else a Trainer may not have seen the training text yet
            epochs = self.global_step / math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches)
        return super().axes() | {"learn/epoch": epochs}

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        if self.centred:
            self.centre()

    @torch.no_grad()
    def centre(self) -> None:
        """Take the mean gradient of a unit off the gradients of thresholds, and of offsets, in place.

        What moves all units alike changes no mask. Blocks that keep everything take no part. Where all blocks have to
        be equally wide, neurons compete inside their block, and it is their block's mean that they lose; KV groups, of
        which every block keeps equally many, compete with all neurons.
        """
        costs, ranks = self.budget.costs, self.ranks
        open_blocks = [b for b in range(len(ranks.sizes)) if b not in costs.protected]
        # Of each block: the gradient (M,), how many units each number moves, and whether they lose their own mean.
        neurons = [(self.ffn_thresholds[b].grad, ranks.sizes[b], costs.uniform) for b in open_blocks]
        groups = [(self.attention_thresholds[b].grad, len(ranks.attention[b]), False) for b in open_blocks]
        offsets = [(self.ffn_offsets[b].grad, 1, costs.uniform) for b in open_blocks if self.offsets]
        for kind in ([*neurons, *groups], offsets):
            learned = [(grad, units, own) for grad, units, own in kind if grad is not None]
            common = _unit_mean(learned) if learned else None
            for grad, units, own in learned:
                grad.sub_((_unit_mean([(grad, units, own)]) if own else common) * units)

    def optimizer_step(self, *args: object, **kwargs: object) -> None:
        super().optimizer_step(*args, **kwargs)
        with torch.no_grad():
            for offsets in self.ffn_offsets:
                offsets.clamp_(-self.offset_limit, self.offset_limit)
        self.recentre(self.masks())

    @torch.no_grad()
    def recentre(self, hard: Masks) -> None:
        """Shift all thresholds by the same amount until the budget cuts at margin 0; the masks `hard` do not change."""
        neurons, groups = unit_margins(self.moved_ranks, self.thresholds)
        shift = cut_margin(hard, neurons, self.budget.costs.of_experts, groups)
        for t in (*self.ffn_thresholds, *self.attention_thresholds):
            t += shift.to(t.dtype)


def _unit_mean(blocks: Sequence[tuple[Tensor, Tensor | int, bool]]) -> Tensor:
    """The mean gradient of a unit, ()."""
    total = sum((torch.ones_like(grad) * units).sum() for grad, units, _ in blocks)
    return sum(grad.sum() for grad, *_ in blocks) / total


def _group_gate(p: Tensor, threshold: Tensor) -> Tensor:
    """`soft_gate` of a block's KV groups, which are one module."""
    labels = torch.zeros(len(p), dtype=torch.long, device=p.device)
    return soft_gate(p, threshold, labels, torch.full((1,), len(p), device=p.device))
