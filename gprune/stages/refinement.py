"""Assignment refinement: soft module assignments with their own optimizer. The language model is not involved."""

from __future__ import annotations

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from gprune.partition.initial import merge_small, minimum_size
from gprune.partition.objective import ObjectiveWeights, RefinementInputs, partition_objective
from gprune.stages.base import require_finite


class AssignmentRefinement(L.LightningModule):
    """Refines hard labels by gradient descent on `partition.partition_objective`.

    Loss, in the symbols of that function: the mean over blocks of
        w_s S(P) + w_d V(P) - w_c C(P) + w_b B(P) + w_e H(P),  P = softmax(A / tau),
    with A (B, N, K) the only parameters, Adam, and tau falling geometrically from 1 to `final_tau`. A starts at
    `confidence` for a neuron's own module and 0 elsewhere: sure enough to keep the start's structure, unsure enough
    for gradients to move neurons.
    """

    def __init__(
        self,
        inputs: RefinementInputs,
        labels: list[Tensor],
        *,
        weights: ObjectiveWeights | None = None,
        steps: int = 120,
        learning_rate: float = 0.05,
        final_tau: float = 0.2,
        confidence: float = 2.0,
    ):
        super().__init__()
        self.inputs = inputs
        self.weights = weights or ObjectiveWeights()
        self.steps, self.learning_rate, self.final_tau = steps, learning_rate, final_tau
        self.start = labels
        K = 1 + max(int(y.max()) for y in labels)
        A = torch.zeros(*inputs.valid.shape, K)
        for block, y in zip(A, labels, strict=True):
            block[: len(y)] = confidence * F.one_hot(y, K)
            block[:, int(y.max()) + 1 :] = -20.0  # a block with fewer modules opens no new ones
        self.logits = nn.Parameter(A)
        self.history: list[dict[str, float]] = []

    @property
    def tau(self) -> float:
        return self.final_tau ** (self.global_step / max(self.steps - 1, 1))

    def setup(self, stage: str) -> None:
        device = self.trainer.strategy.root_device
        self.inputs = RefinementInputs(**{name: value.to(device) for name, value in vars(self.inputs).items()})

    def train_dataloader(self) -> DataLoader:
        # Every step sees all neurons of all blocks; the loader only counts steps.
        return DataLoader(range(self.steps), batch_size=1)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam([self.logits], lr=self.learning_rate)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        terms = {
            name: value.mean()
            for name, value in partition_objective(self.logits, self.tau, self.inputs, self.weights).items()
        }
        self.history.append({name: float(value.detach()) for name, value in terms.items()})
        require_finite(self.history[-1]["total"], "The objective of the refinement")
        self.log_dict({f"partition/{name}": value for name, value in self.history[-1].items()})
        return terms["total"]

    @torch.no_grad()
    def labels(self) -> list[Tensor]:
        """Hard labels per block, small modules merged as in the start; (N,) int64 each."""
        inputs = RefinementInputs(**{name: value.cpu() for name, value in vars(self.inputs).items()})
        w = self.weights
        out = []
        for index, y in enumerate(self.start):
            N = len(y)
            joint = torch.cat(
                [
                    w.similarity * inputs.embedding[index],
                    w.drift * inputs.drift[index],
                    w.consistency * inputs.shifts[index],
                ],
                1,
            )[:N]
            hard = self.logits[index, :N].detach().cpu().argmax(-1)
            K = int(y.max()) + 1
            out.append(merge_small(hard, joint, min_size=min(minimum_size(N, K), N)))
        return out

    def moved(self) -> int:
        """Neurons whose most likely module is no longer the one they started in."""
        hard = self.logits.detach().cpu().argmax(-1)
        return sum(int((h[: len(y)] != y).sum()) for h, y in zip(hard, self.start, strict=True))
