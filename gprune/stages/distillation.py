"""Distillation: what is left of a pruned model learns to predict as the dense model does, end to end."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from gprune.errors import UserError
from gprune.models.blocks import Block, Part, blocks_of
from gprune.models.losses import final_hidden, frozen_head_losses, softcap_of
from gprune.recovery import Material, Recovery, recovery
from gprune.stages.base import FrozenLMStage

Targets = Literal["vectors", "mlp", "all", "lora"]


@dataclass(frozen=True)
class Distillation:
    """How a pruned model is distilled: the flags of `--distill` by the same names.

    Attributes:
        targets: vectors, a scale per neuron and per attention channel and the gains of norms, folded into the weights
            at the end; mlp, the FFN's weights; all, every weight of the decoder layers; lora, adapters on the linear
            layers (PEFT), merged at the end.
        learning_rate: the highest of AdamW; it rises linearly for `warmup` of the steps, and then falls to 0.
        batch_size: windows per step.
        kl, cross_entropy: weights of KL(dense || pruned) and of the next token's cross-entropy.
        clip: largest norm of the gradient.
        rank: of the adapters; alpha is twice as much.
    """

    targets: Targets = "mlp"
    batch_size: int = 2
    learning_rate: float = 3e-4
    warmup: float = 0.1
    weight_decay: float = 0.0
    kl: float = 1.0
    cross_entropy: float = 0.0
    clip: float = 1.0
    rank: int = 8


class DistillationStage(FrozenLMStage):
    """Trains a pruned model (the student) beside the frozen dense one (the teacher).

    Loss: mean over windows of `kl` times KL(dense || pruned) of the next token, plus `cross_entropy` times its
    cross-entropy, in nats. Both go through the frozen head, chunk by chunk: no logits of a batch are held, and the
    teacher runs once per batch. AdamW with betas 0.9 and 0.95. The student learns in float32 and gets its dtype back at
    the end. Only what learns is registered, so that a checkpoint holds neither the teacher nor the rest of the student.
    """

    purpose = "distillation"

    def __init__(self, dense: PreTrainedModel, student: PreTrainedModel, settings: Distillation):
        super().__init__(dense)
        self.settings = settings
        self._student = (student,)
        self._dtypes = {name: parameter.dtype for name, parameter in student.named_parameters()}
        for parameter in student.parameters():  # steps of AdamW are smaller than what bfloat16 tells apart
            parameter.data = parameter.data.float()
        self._taken_off = ExitStack()
        self.learned = nn.ParameterDict()
        self._fold: list[Callable[[], None]] = []  # what turns what was learned into plain weights
        {"vectors": self._scale, "mlp": self._open, "all": self._open, "lora": self._adapt}[settings.targets]()

    @property
    def student(self) -> PreTrainedModel:
        return self._student[0]

    def _learn(self, name: str, parameter: nn.Parameter) -> nn.Parameter:
        self.learned[name.replace(".", "_")] = parameter.requires_grad_()
        return parameter

    def _open(self) -> None:
        """Let the FFN's weights, or all of a decoder layer's, learn."""
        for block in blocks_of(self.student):
            for name, parameter in parameters_of(block, "ffn" if self.settings.targets == "mlp" else "all"):
                self._learn(f"{block.index}.{name}", parameter)

    def _scale(self) -> None:
        """Put a scale on what enters every output projection, and let the gains of norms learn."""
        for block in blocks_of(self.student):
            for part in ("down", "output"):
                self._scale_inputs(block, part)
            for name, parameter in block.layer.named_parameters():
                if parameter.dim() == 1 and name.endswith("weight"):
                    self._learn(f"{block.index}.{name}", parameter)

    def _scale_inputs(self, block: Block, part: str) -> None:
        place = block.parts[part]
        if not isinstance(place, Part):
            raise UserError("--distill.targets vectors: experts have no scales of their own; expected mlp or all.")
        scale = self._learn(f"{block.index}.{part}", nn.Parameter(place.weight.new_ones(place.in_features)))

        def multiply(_module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return (inputs[0] * scale, *inputs[1:])

        def fold() -> None:
            place.set(place.weight * scale.to(place.weight.device), None)

        self._taken_off.callback(place.host.register_forward_pre_hook(multiply).remove)
        self._fold.append(fold)

    def _adapt(self) -> None:
        """Put PEFT's adapters on the linear layers of the blocks."""
        try:
            import peft
        except ImportError as error:
            raise UserError("--distill.targets lora: needs peft, which is not installed: pip install peft.") from error
        blocks = blocks_of(self.student)
        hosts = {id(part.host) for block in blocks for part in block.parts.values() if isinstance(part, Part)}
        names = [name for name, module in self.student.named_modules() if id(module) in hosts]
        rank = self.settings.rank
        config = peft.LoraConfig(
            r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules=names,
            fan_in_fan_out=blocks[0].family.transposed,
        )  # fmt: skip
        with warnings.catch_warnings(action="ignore", category=FutureWarning):  # PEFT's, about transformers
            adapted = peft.get_peft_model(self.student, config)
        for name, parameter in self.student.named_parameters():
            if parameter.requires_grad:
                self._learn(name, parameter)
        self._student = (adapted.get_base_model(),)
        self._fold.append(lambda: setattr(self, "_student", (adapted.merge_and_unload(),)))

    @torch.no_grad()
    def finished(self) -> PreTrainedModel:
        """The student as a plain frozen model, with what was learned in its weights."""
        self._taken_off.close()
        for fold in self._fold:
            fold()
        for name, parameter in self.student.named_parameters():
            parameter.data = parameter.data.to(self._dtypes[name])
        return self.student.eval().requires_grad_(False)

    def setup(self, stage: str) -> None:
        super().setup(stage)
        self.student.to(self.trainer.strategy.root_device)

    def configure_optimizers(self) -> dict[str, Any]:
        s, steps = self.settings, self.trainer.estimated_stepping_batches
        optimizer = torch.optim.AdamW(
            self.learned.values(), lr=s.learning_rate, betas=(0.9, 0.95), weight_decay=s.weight_decay
        )
        rising = max(1, math.ceil(s.warmup * steps))

        def factor(step: int) -> float:
            return min((step + 1) / rising, (steps - step) / max(1, steps - rising), 1.0)

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        ids, s = batch["input_ids"], self.settings
        hidden, head = final_hidden(self.student, ids).flatten(0, 1), self.student.get_output_embeddings()
        losses = torch.zeros(len(hidden), device=hidden.device)
        for weight, targets_of in ((s.kl, self._dense_hidden), (s.cross_entropy, lambda ids: ids[:, 1:].flatten())):
            if weight:
                found = frozen_head_losses(
                    hidden, head.weight, head.bias, targets_of(ids), softcap=softcap_of(self.student)
                )
                losses = losses + weight * found
        return self.batch_loss(losses.view(len(ids), -1).mean(1), batch["weight"], "distill/loss")

    @torch.no_grad()
    def _dense_hidden(self, ids: Tensor) -> Tensor:
        return final_hidden(self.lm, ids).flatten(0, 1).to(ids.device, torch.float32)


def parameters_of(block: Block, scope: Literal["ffn", "all"]) -> Iterator[tuple[str, nn.Parameter]]:
    """Names and parameters of a block: of its FFN's projections, or all."""
    inside = {place.path.rpartition(".")[0] for place in block.slices if place.kind == "ffn"}
    for name, parameter in block.layer.named_parameters():
        if scope == "all" or name.rpartition(".")[0] in inside:
            yield name, parameter


@recovery("distill")
class Distill(Recovery):
    """KL to the dense model on text of `corpora.recover`, end to end: `DistillationStage` as a link of a run."""

    learns = True
    sharded = placed = False

    def tune(self, material: Material, pruned: PreTrainedModel) -> PreTrainedModel:
        settings = material.settings.get("distill", Distillation())
        stage = DistillationStage(material.dense, pruned, settings)
        what = f"Distilling {sum(p.numel() for p in stage.learned.values()):,} numbers"
        material.fit(what, stage, clip=settings.clip, batch_size=settings.batch_size)
        return stage.finished()

    def tokens(self, text: int, fresh: int, *, attention: bool) -> tuple[int, int]:
        """The teacher forward, the student forward and backward."""
        return fresh, fresh

    def memory(self, blocks: Sequence[Block], hidden: int, *, attention: bool) -> tuple[int, int]:
        """In float32: all weights that are left, their gradients, and two moments each, at most."""
        return 0, 16 * sum(block.cost for block in blocks)
