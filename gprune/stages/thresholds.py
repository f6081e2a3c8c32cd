"""Threshold learning: one sparsity threshold per module, trained around the frozen language model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from gprune.models.losses import final_hidden, next_token_losses
from gprune.models.masks import Masks
from gprune.sparsity.budget import UnitCosts
from gprune.sparsity.gates import corrected, masked, soft_gate, straight_through
from gprune.sparsity.masks import cut_margin, margins
from gprune.sparsity.thresholds import ModuleRanks, masks_from_thresholds
from gprune.stages.base import FrozenLMStage, require_finite

Corrections = tuple[list[Tensor | None], list[Tensor | None]]  # of down and output projections, one per block
Recover = Callable[[Masks], Corrections]


class ThresholdLearning(FrozenLMStage):
    """Learns t, one threshold per module (and one per block for its KV groups, when they are in scope).

    With `learn="offsets"` it learns o, one number per neuron that moves its rank, p_i' = sigmoid(logit p_i + o_i), in
    place of t: a free gate for every neuron, as in GRASPrune (arXiv 2604.19398), warm-started from the margins. With
    `both` it learns both. With `loss="kl"` the cross-entropy below gives way to KL(dense || pruned), at the price of
    one more forward pass per step. With `objective="worst"` the mean over windows gives way to sum_c q_c L_c over the
    learning corpora c, q_c growing with exp(`worst_step` x excess of c's loss over the dense model's) from step to step
    (group DRO, Sagawa et al., arXiv 1911.08731, algorithm 1, on excess losses, since corpora differ in entropy).

    With `recover` the model around which they learn is the one that recovery would leave: the units that stay make up
    for those that go, W_K x_K becomes (W_K + C) x_K, C solved anew for the current masks every `recover_every` steps. C
    is a constant to the gradient, which is then right to first order only as far as the loss is the squared error that
    C minimises: what a unit that comes back adds beyond C differs by a combination of x_K, orthogonal to that error.

    Loss: L(t) = mean over windows of the next-token cross-entropy, in nats per token, of the frozen model whose
    units are multiplied by g_i = h_i + s_i - stop(s_i), where
        h_i in {0, 1}  the hard keep mask that meets the budget (`masks.keep_masks` on logit p_i - t_m),
        s_i = sigmoid((p_i - sigmoid(t_m)) / T_m)  the soft gate, T_m = max(0.05, 1/n_m),
        p_i in (0, 1)  the unit's rank inside its module, n_m the module's size, stop the gradient stop.
    So the forward pass is the pruned model at exactly the target sparsity, and the backward pass is the soft gate's
    (straight-through). Shifting every t_m by the same amount changes no hard mask, only how far the soft gates lie
    from it. That direction is taken out of every update: thresholds are shifted until the budget cuts at margin 0,
    where s_i crosses 1/2, so the gradient is always taken at the units that are about to change sides.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        ranks: ModuleRanks,
        start: tuple[list[Tensor], list[Tensor]],
        costs: UnitCosts,
        *,
        target: int,
        width_multiple: int = 1,
        learning_rate: float = 0.1,
        learn: Literal["thresholds", "offsets", "both"] = "thresholds",
        loss: Literal["cross_entropy", "kl"] = "cross_entropy",
        objective: Literal["mean", "worst"] = "mean",
        worst_step: float = 0.1,
        corpora: Sequence[str] = (),
        recover: Recover | None = None,
        recover_every: int = 4,
        offset_learning_rate: float | None = None,
        offset_limit: float = math.inf,
        shard: bool = False,
    ):
        """
        Args:
            model: frozen.
            ranks: where units stand inside their modules.
            start: thresholds to begin with, as `start_thresholds` gives them.
            costs: of the units; `target` parameters are removed, to widths that are multiples of `width_multiple`.
            learning_rate: of Adam, in logits.
            corpora: names of the learning corpora, in the order of the batches' `corpus`; needed for `worst`.
            recover: gives per block what recovery adds to the down and output projections under masks, as
                `gates.corrected` takes it.
            offset_learning_rate: of Adam for offsets, in logits; None: as for thresholds.
            offset_limit: offsets stay within +- this many logits. Adam moves a neuron that carries nearly all of its
                block as fast as any other, and no gradient of a gate sees the cliff behind it.
            shard: spread the model over processes while it learns.
        """
        super().__init__(model, shard=shard)
        self.loss, self.objective, self.worst_step, self.corpora = loss, objective, worst_step, tuple(corpora)
        self.recover, self.recover_every = recover, recover_every
        self.corrections: Corrections = tuple([None] * len(ranks.ffn) for _ in range(2))
        self.offset_limit = offset_limit
        self.offset_learning_rate = learning_rate if offset_learning_rate is None else offset_learning_rate
        self.register_buffer("corpus_logits", torch.zeros(len(self.corpora)), persistent=False)
        self.ranks, self.costs, self.target, self.width_multiple = ranks, costs, target, width_multiple
        self.learning_rate = learning_rate
        ffn, attention = start
        thresholds_move = learn != "offsets"
        self.ffn_thresholds = nn.ParameterList(nn.Parameter(t.float(), requires_grad=thresholds_move) for t in ffn)
        self.ffn_offsets = nn.ParameterList(
            nn.Parameter(torch.zeros(len(p))) for p in (ranks.ffn if learn != "thresholds" else ())
        )
        # In scope or not, the thresholds exist; only in scope are they learned.
        self.attention_thresholds = nn.ParameterList(
            nn.Parameter(t.float(), requires_grad=costs.attention) for t in attention
        )
        self.ffn_gates: list[Tensor | None] = []
        self.attention_gates: list[Tensor | None] | None = [] if costs.attention else None
        self.refresh_gates()

    @property
    def thresholds(self) -> tuple[list[Tensor], list[Tensor]]:
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
    def masks(self, *, target: int | None = None) -> Masks:
        """The hard masks of the current thresholds, for this stage's budget or another one."""
        return masks_from_thresholds(
            self.moved_ranks,
            self.thresholds,
            self.costs,
            target=self.target if target is None else target,
            width_multiple=self.width_multiple,
        )

    def refresh_gates(self) -> Masks:
        """Recompute the gates, in place in the lists that `gates.gated` reads. Returns the hard masks."""
        hard = self.masks()
        self.ffn_gates[:] = [
            self._gate(h, p, t, y)
            for h, p, t, y in zip(hard.ffn, self.moved_ranks.ffn, self.ffn_thresholds, self.ranks.labels, strict=True)
        ]
        if self.attention_gates is not None:
            self.attention_gates[:] = [
                self._gate(h, p, t, torch.zeros(len(p), dtype=torch.long))
                for h, p, t in zip(hard.attention, self.ranks.attention, self.attention_thresholds, strict=True)
            ]
        return hard

    @torch.no_grad()
    def refresh_corrections(self, masks: Masks) -> None:
        """Solve again what recovery adds under these masks, in place in the lists that `gates.corrected` reads."""
        if self.recover is not None:
            for ours, new in zip(self.corrections, self.recover(masks), strict=True):
                ours[:] = new

    @contextmanager
    def pruned(self, masks: Masks) -> Iterator[PreTrainedModel]:
        """The model as if pruned by these masks, and recovered where this stage learns so."""
        corrections = self.recover(masks) if self.recover is not None else (None, None)
        with masked(self.lm, masks), corrected(self.lm, *corrections):
            yield self.lm

    def _gate(self, hard: Tensor, p: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        hard, p, labels = hard.to(t.device), p.to(t.device, torch.float32), labels.to(t.device)
        sizes = torch.bincount(labels, minlength=len(t))
        return straight_through(hard, soft_gate(p, t, labels, sizes))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        thresholds = [p for p in (*self.ffn_thresholds, *self.attention_thresholds) if p.requires_grad]
        groups = [
            {"params": thresholds, "lr": self.learning_rate},
            {"params": list(self.ffn_offsets), "lr": self.offset_learning_rate},
        ]
        return torch.optim.Adam([group for group in groups if group["params"]])

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        ids, teacher, dense = batch["input_ids"], None, 0.0
        with torch.no_grad(), self._dense():
            if self.loss == "kl":  # the dense model's divergence from itself is 0
                teacher = final_hidden(self.lm, ids)
            elif self.objective == "worst":
                dense = next_token_losses(self.lm, ids)
        masks = self.refresh_gates()  # a fresh graph: the one of the last step has been used
        if batch_idx % self.recover_every == 0:
            self.refresh_corrections(masks)
        # Weighted so that the mean over processes is the mean over the global batch, whatever each one's share.
        total = self.trainer.strategy.reduce(batch["weight"].sum(), reduce_op="sum")
        weight = batch["weight"] * self.trainer.world_size / total
        losses = next_token_losses(self.lm, ids, teacher=teacher)
        weight = weight.to(losses)
        value = self.trainer.strategy.reduce((losses.detach() * weight).sum(), reduce_op="mean")
        require_finite(float(value), "The loss of threshold learning")
        self.log("learn/loss", value, prog_bar=True)
        if self.objective == "worst":
            shares = self._move_to_the_worst(losses.detach() - dense, batch["corpus"], batch["weight"].to(losses))
            weight = weight * (len(shares) * shares)[batch["corpus"]]
        return (losses * weight).sum()

    def _move_to_the_worst(self, excess: Tensor, corpus: Tensor, weight: Tensor) -> Tensor:
        """q (C,), after the corpora of this batch have gained by their excess losses (B,), over all processes."""
        sums = torch.zeros(2, len(self.corpora), device=excess.device)
        sums.index_add_(1, corpus, torch.stack([excess * weight, weight]))
        total, count = self.trainer.strategy.reduce(sums, reduce_op="sum")
        self.corpus_logits += self.worst_step * total / count.clamp_min(1)  # 0 for corpora that are not in the batch
        shares = self.corpus_logits.softmax(0)
        self.log_dict({f"learn/share/{name}": q for name, q in zip(self.corpora, shares, strict=True)})
        return shares

    @contextmanager
    def _dense(self) -> Iterator[None]:
        """The dense model: what contexts have put on it lets everything through. Gates are refreshed for each step, and
        corrections are back afterwards.
        """
        before = [list(added) for added in self.corrections]
        for gates in (self.ffn_gates, self.attention_gates or [], *self.corrections):
            gates[:] = [None] * len(gates)
        try:
            yield
        finally:
            for added, kept in zip(self.corrections, before, strict=True):
                added[:] = kept

    def optimizer_step(self, *args: object, **kwargs: object) -> None:
        super().optimizer_step(*args, **kwargs)
        with torch.no_grad():
            for offsets in self.ffn_offsets:
                offsets.clamp_(-self.offset_limit, self.offset_limit)
        self._recentre(self.masks())

    @torch.no_grad()
    def _recentre(self, hard: Masks) -> None:
        """Shift all thresholds alike until the budget cuts at margin 0; no hard mask changes.

        Where all blocks are to be equally wide, each has a cut of its own, and its thresholds move by themselves.
        """
        pairs = zip(self.moved_ranks.ffn, self.ffn_thresholds, self.ranks.labels, strict=True)
        found = [margins(p, t.cpu(), y) for p, t, y in pairs]
        shift = cut_margin(hard, found)
        for b, (t, u) in enumerate(zip(self.ffn_thresholds, self.attention_thresholds, strict=True)):
            t += cut_margin(Masks(hard.ffn[b : b + 1], []), found[b : b + 1]) if self.costs.uniform else shift
            u += shift
