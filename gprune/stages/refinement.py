"""Refinement: improve the assignment of neurons to modules by gradient descent. The language model is not used."""

from __future__ import annotations

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from gprune.partition.initial import merge_small, minimum_size
from gprune.partition.objective import RefinementInputs, partition_objective
from gprune.stages.base import require_finite_loss


class AssignmentRefinement(L.LightningModule):
    """Stage that refines hard labels by gradient descent on `gprune.partition.objective.partition_objective`.

    Loss, in the symbols of that function: the mean over blocks of
        w_s S(P) + w_d V(P) - w_c C(P) + w_b B(P) + w_e H(P),  P = softmax(A / tau),
    with the parameters A (B, N, K), Adam, and tau decaying geometrically from 1 to `final_tau`. A is initialized to
    2 for a neuron's own module and 0 elsewhere: large enough to keep the structure of the initial partition, small
    enough that gradients can move neurons.

    Validation logs `partition/hard_consistency`, the consistency C of the hard labels; a random partition has about 0.

    Args:
        inputs: inputs of the objective for all blocks.
        labels: labels of the initial partition, (N,) int64 per block.
        steps: number of optimizer steps.
        learning_rate: learning rate of Adam.
        similarity_weight: w_s.
        drift_weight: w_d.
        consistency_weight: w_c.
        balance_weight: w_b.
        entropy_weight: w_e.
        final_tau: tau at the last step.
    """

    curves = "partition"

    def __init__(
        self, inputs: RefinementInputs, labels: list[Tensor], *, steps: int = 120, learning_rate: float = 0.05,
        similarity_weight: float = 1.0, drift_weight: float = 1.0, consistency_weight: float = 2.0,
        balance_weight: float = 0.1, entropy_weight: float = 0.1, final_tau: float = 0.2,
    ):  # fmt: skip
        super().__init__()
        self.save_hyperparameters(ignore=["inputs", "labels"], logger=False)
        self.inputs = inputs
        self.start = labels
        self.steps = steps
        self.learning_rate = learning_rate
        self.final_tau = final_tau
        self.weights = {
            "similarity": similarity_weight, "drift": drift_weight, "consistency": consistency_weight,
            "balance": balance_weight, "entropy": entropy_weight,
        }  # fmt: skip
        K = 1 + max(int(block_labels.max()) for block_labels in labels)  # modules of the block with most modules
        A = torch.zeros(*inputs.valid.shape, K)
        for block_logits, block_labels in zip(A, labels, strict=True):
            block_logits[: len(block_labels)] = 2 * F.one_hot(block_labels, K)
            # Softmax of -20 is almost 0, so a block with fewer than K modules gets no new ones.
            block_logits[:, int(block_labels.max()) + 1 :] = -20.0
        self.logits = nn.Parameter(A)

    @property
    def tau(self) -> float:
        """Temperature of the soft assignment at the current step."""
        return self.final_tau ** (self.global_step / max(self.steps - 1, 1))

    def setup(self, stage: str) -> None:
        self.inputs = self.inputs.to(self.trainer.strategy.root_device)

    def objective(self, logits: Tensor, tau: float) -> dict[str, Tensor]:
        """Return `total`, whose mean over blocks is minimised, and other terms to be logged, each (B,) by block.

        Override it to change a term or to add one. The logits are (B, N, K).
        """
        return partition_objective(logits, tau, self.inputs, self.weights)

    def train_dataloader(self) -> DataLoader:
        # The loader only counts steps; every step uses all neurons of all blocks.
        return DataLoader(range(self.steps), batch_size=1)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(range(1), generator=torch.Generator())  # keeps the global random state unchanged

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        """Log the consistency of the hard labels."""
        # With logits of 1e4 the softmax is exactly 0 or 1.
        hard_logits = 1e4 * F.one_hot(self.logits.argmax(-1), self.logits.shape[-1])
        terms = self.objective(hard_logits, 1.0)
        self.log("partition/hard_consistency", terms["consistency"].mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam([self.logits], lr=self.learning_rate)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Return the loss, (), and log its terms. The batch is ignored.

        Raises:
            UserError: if the loss is not finite.
        """
        by_block = self.objective(self.logits, self.tau)
        terms = {name: value.mean() for name, value in by_block.items()}
        logged = {name: float(value.detach()) for name, value in terms.items()} | {"temperature": self.tau}
        require_finite_loss(logged["total"], "The objective of the refinement")
        self.log_dict({f"partition/{name}": value for name, value in logged.items()})
        return terms["total"]

    @torch.no_grad()
    def labels(self) -> list[Tensor]:
        """Return the hard labels of each block, (N,) int64.

        Small modules are merged as in the initial partition, with K the number of modules of that partition.
        """
        inputs = self.inputs.to("cpu")
        weights = self.weights
        joint_features = torch.cat(
            [
                weights["similarity"] * inputs.embedding,
                weights["drift"] * inputs.drift,
                weights["consistency"] * inputs.shifts,
            ],
            -1,
        )
        refined = []
        for initial_labels, features, logits in zip(self.start, joint_features, self.logits.cpu(), strict=True):
            N, K = len(initial_labels), int(initial_labels.max()) + 1
            min_size = min(minimum_size(N, K), N)
            refined.append(merge_small(logits[:N].argmax(-1), features[:N], min_size=min_size))
        return refined
