"""The groups of flags of recoveries that learn, beside `groups.py`."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Literal

from gprune.checks import AtLeast1, NonNegative, Positive, Quantile
from gprune.config.groups import Group, group
from gprune.errors import UserError


@group("distill.")
class DistillConfig(Group):
    """How a pruned model learns from the dense one, where --recovery has the link distill."""

    targets: Literal["vectors", "mlp", "all", "lora"] = "all"
    """What is trained. vectors: a scale per neuron and per attention channel, and the gains of norms, folded into the
    weights at the end. mlp: the FFN's weights. all: every weight of the decoder layers. lora: adapters, merged at the
    end (needs peft)."""
    tokens: AtLeast1 = 12_288
    """Training tokens, each used once, equally many from each of --corpora.recover: forward through the dense model,
    forward and backward through the pruned one."""
    batch_size: AtLeast1 = 1
    """Windows per step, over all devices together."""
    learning_rate: Positive = 5e-4
    """Peak step size of AdamW."""
    warmup: Quantile = 0.1
    """Share of the steps in which the step size rises; then it falls to 0."""
    weight_decay: NonNegative = 0.0
    """Of AdamW: decoupled from the gradient, times the step size."""
    kl: NonNegative = 1.0
    """Weight of the divergence from the dense model."""
    cross_entropy: NonNegative = 0.0
    """Weight of the next token's cross-entropy. With --distill.kl 0 it is plain fine-tuning."""
    hidden: NonNegative = 0.0
    """Weight of the error of each layer's output, relative to the energy of the dense layer's output."""
    clip: Positive = 1.0
    """Largest norm of the gradient."""
    rank: AtLeast1 = 8
    """lora: rank of the adapters."""
    accumulate: AtLeast1 = 1
    """Batches per optimizer step."""
    checkpointing: bool = False
    """Recompute the activations of each layer in the backward pass, to save memory."""
    points: AtLeast1 = 4
    """Measurements of development perplexity during training, equally spaced, beside one at the start."""
    keep: Literal["last", "best"] = "last"
    """Which weights are kept: those of the last step, or of the measurement with the lowest perplexity."""

    def __post_init__(self) -> None:
        if not self.kl + self.cross_entropy + self.hidden > 0:
            raise UserError(
                "--distill.kl, --distill.cross_entropy, --distill.hidden: expected one of them above 0, got 0, 0 and 0."
            )

    def refuse(self, *, experts: bool, shard: bool) -> None:
        """Raise UserError for targets that cannot learn.

        Args:
            experts: whether the model has any.
            shard: whether its layers are spread over processes.
        """
        what = f"--distill.targets {self.targets}:"
        if shard and self.targets in ("vectors", "lora"):
            raise UserError(
                f"{what} expected mlp or all with --model.shard true, whose layers are spread over processes."
            )
        if experts and self.targets == "vectors":
            raise UserError(f"{what} experts have no scales of their own; expected mlp or all.")
        if self.targets == "lora" and find_spec("peft") is None:
            raise UserError(f"{what} needs peft, which is not installed: pip install peft.")
