"""Distillation: what is left of a pruned model learns to predict as the dense model does, end to end."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from gprune.config import DistillConfig
from gprune.errors import UserError
from gprune.models.blocks import Block, Part, blocks_of, decoder_layers
from gprune.models.loading import without_weights
from gprune.models.losses import final_hidden, frozen_head_losses, softcap_of
from gprune.models.offload import gathered
from gprune.stages.base import FrozenLMStage

BETAS = (0.9, 0.95)  # of AdamW


class DistillationStage(FrozenLMStage):
    """Trains a pruned model (the student) beside the frozen dense one (the teacher).

    Loss: mean over windows of
        kl * KL(dense || pruned)           of the next token, in nats,
        + cross_entropy * cross-entropy    of the next token, in nats,
        + hidden * mean over layers and tokens of ||h - h*||^2 / ||h*||^2,  h and h* (H,) what leaves a layer of each.
    The first two go through the frozen head, chunk by chunk: no logits of a batch are held, and the teacher runs once
    per batch. AdamW's step size rises linearly, and then falls to 0. The student learns in float32 and gets its dtype
    back at the end. Only what learns is registered, so that a checkpoint holds neither the teacher nor the rest of the
    student.

    Args:
        dense: the teacher, frozen; its weights may lie on several devices, or off them.
        student: pruned; changed in place, and moved to the trainer's device as a whole.
        settings: the flags of `--distill`; all but `tokens`, which the text tells.
        shard: spread the layers of both over all processes while it learns.
    """

    purpose = "distillation"

    def __init__(
        self, dense: PreTrainedModel, student: PreTrainedModel, settings: DistillConfig, *, shard: bool = False
    ):
        super().__init__(dense, shard=shard)
        self.settings = settings
        settings.refuse(experts=any(block.has_experts for block in blocks_of(student)), shard=shard)
        layers = [len(blocks_of(model)) for model in (dense, student)]
        if settings.hidden and layers[0] != layers[1]:
            raise UserError(
                f"--distill.hidden: expected as many blocks in the pruned model as in the dense one, got {layers[1]} "
                f"of {layers[0]}; leave it 0 where whole blocks go."
            )
        self._student = (student,)
        self._whole: tuple[PreTrainedModel, ...] = ()  # the student's shape, while its layers are spread
        self._dtypes = {name: parameter.dtype for name, parameter in student.named_parameters()}
        for parameter in student.parameters():  # steps of AdamW are smaller than what bfloat16 tells apart
            parameter.data = parameter.data.float()
        self._taken_off = ExitStack()
        self.learned = nn.ParameterDict()
        self._fold: list[Callable[[], None]] = []  # what turns what was learned into plain weights
        {"vectors": self._scale, "mlp": self._open, "all": self._open, "lora": self._adapt}[settings.targets]()
        if settings.checkpointing:
            _checkpointing(student, "enable")({"use_reentrant": False})
            for hook in getattr(student, "_require_grads_hooks", ()):  # transformers 5.24 takes it off for PEFT alone
                self._taken_off.callback(hook.remove)
            for block in blocks_of(student):  # only a layer in training mode recomputes; its dropout stays off
                block.layer.training = True
                if hasattr(block.layer, "dropout"):  # OPT's layers have it as a number of their own
                    self._taken_off.callback(setattr, block.layer, "dropout", block.layer.dropout)
                    block.layer.dropout = 0.0

    @property
    def student(self) -> PreTrainedModel:
        """The pruned model, whose weights are what learns."""
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
        scale = self._learn(f"{block.index}.{part}", nn.Parameter(place.weight.new_ones(place.in_features)))

        def multiply(_module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return (inputs[0] * scale, *inputs[1:])

        def fold() -> None:
            place.set(place.weight * scale.to(place.weight.device), None)

        self._taken_off.callback(place.host.register_forward_pre_hook(multiply).remove)
        self._fold.append(fold)

    def _adapt(self) -> None:
        """Put PEFT's adapters on the linear layers of the blocks."""
        import peft

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

    def on_train_end(self) -> None:
        """Let gradients and moments go, which the Trainer would keep, and `finished` weights with them."""
        for optimizer in self.trainer.optimizers:
            optimizer.zero_grad(set_to_none=True)
            optimizer.state.clear()

    @torch.no_grad()
    def finished(self) -> PreTrainedModel:
        """The student as a plain frozen model, with what was learned in its weights."""
        self._taken_off.close()
        if self.settings.checkpointing:
            _checkpointing(self.student, "disable")()
        for fold in self._fold:
            fold()
        for name, parameter in self.student.named_parameters():
            parameter.data = parameter.data.to(self._dtypes[name])
        return self.student.eval().requires_grad_(False)

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if not (self._shard and self.trainer.world_size > 1):
            self.student.to(self.trainer.strategy.root_device)

    def configure_model(self) -> None:
        """Spread the student's layers over processes: PyTorch's `fully_shard`, with optimizer states of the parts."""
        if not self._shard or self._whole or self.trainer.world_size < 2:
            return
        from torch.distributed.fsdp import fully_shard

        self._whole = (without_weights(self.student),)
        for block in blocks_of(self.student):  # each moves to its device by itself: no device holds all of them
            # Each layer is a root, which would stay whole after a forward pass: on the device, and for who reads it.
            fully_shard(block.layer, mesh=self.device_mesh["data_parallel"], reshard_after_forward=True)
        self.student.to(self.trainer.strategy.root_device)
        self._learn_anew()

    def teardown(self, stage: str) -> None:
        """A student that was sharded is whole again, on the CPU."""
        super().teardown(stage)
        if not self._whole:
            return
        whole = self._whole[0]
        for kind, named in (
            ("_parameters", self.student.named_parameters()),
            ("_buffers", self.student.named_buffers()),
        ):
            for name, tensor in named:
                path, _, leaf = name.rpartition(".")
                kept = gathered(tensor).detach().cpu()
                getattr(whole.get_submodule(path), kind)[leaf] = nn.Parameter(kept) if kind == "_parameters" else kept
        whole.tie_weights()
        self._student, self._whole = (whole.requires_grad_(False),), ()
        self._learn_anew()

    def _learn_anew(self) -> None:
        """Register what learns: its tensors are others now."""
        self.learned = nn.ParameterDict()
        self._open()

    def configure_optimizers(self) -> dict[str, Any]:
        """AdamW, whose step size rises in the first `warmup` of the steps and then falls to 0."""
        s, steps = self.settings, self.trainer.estimated_stepping_batches
        optimizer = torch.optim.AdamW(
            self.learned.values(), lr=s.learning_rate, betas=BETAS, weight_decay=s.weight_decay
        )
        rising = max(1, math.ceil(s.warmup * steps))

        def factor(step: int) -> float:
            return min((step + 1) / rising, (steps - step) / max(1, steps - rising), 1.0)

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Loss of a batch by KL, cross-entropy and hidden states, as weighed, () float32."""
        ids, s = batch["input_ids"], self.settings
        with torch.no_grad(), watched_layers(self.lm, bool(s.hidden)) as wanted:
            dense = final_hidden(self.lm, ids).flatten(0, 1) if s.kl or s.hidden else None
        with watched_layers(self.student, bool(s.hidden)) as found:
            hidden = final_hidden(self.student, ids).flatten(0, 1)
        head, softcap = self.student.get_output_embeddings(), softcap_of(self.student)
        losses = torch.zeros(len(ids), device=hidden.device)
        for weight, targets in ((s.kl, dense), (s.cross_entropy, ids[:, 1:].flatten())):
            if weight:
                targets = targets.to(hidden.device, hidden.dtype if targets.is_floating_point() else None)
                of_tokens = frozen_head_losses(hidden, head.weight, head.bias, targets, softcap=softcap)
                losses = losses + weight * of_tokens.view(len(ids), -1).mean(1)
        if s.hidden:
            pairs = [relative_error(h, w.to(h.device)) for h, w in zip(found, wanted, strict=True)]
            losses = losses + s.hidden * torch.stack(pairs).mean(0)
        return self.batch_loss(losses, batch["weight"], "distill/loss")


def _checkpointing(model: PreTrainedModel, what: Literal["enable", "disable"]) -> Callable[..., None]:
    """The method that transformers 5.24 has renamed."""
    old, new = f"gradient_checkpointing_{what}", f"activation_checkpointing_{what}"
    return getattr(model, new if hasattr(model, new) else old)


def relative_error(found: Tensor, wanted: Tensor) -> Tensor:
    """Mean over the tokens of each window of ||h - h*||^2 / ||h*||^2, (B,) float32; both (B, T, H)."""
    # The first token is left out: in many models it carries a state a hundred times as large as all others.
    found, wanted = found[:, 1:].float(), wanted[:, 1:].float()
    return ((found - wanted).square().sum(-1) / wanted.square().sum(-1).clamp_min(1e-12)).mean(1)


@contextmanager
def watched_layers(model: PreTrainedModel, wanted: bool) -> Iterator[list[Tensor]]:
    """What leaves each decoder layer in the next forward pass, (B, T, H), first layer first; empty unless wanted."""
    seen: list[Tensor] = []

    def keep(_module: nn.Module, _inputs: tuple[Any, ...], output: Any) -> None:
        seen.append(output[0] if isinstance(output, tuple) else output)

    with ExitStack() as stack:
        for layer in decoder_layers(model) if wanted else ():
            stack.callback(layer.register_forward_hook(keep).remove)
        yield seen


def parameters_of(block: Block, scope: Literal["ffn", "all"]) -> Iterator[tuple[str, nn.Parameter]]:
    """Names and parameters of a block: of its FFN's projections, or all."""
    inside = {place.path.rpartition(".")[0] for place in block.slices if place.kind == "ffn"}
    for name, parameter in block.layer.named_parameters():
        if scope == "all" or name.rpartition(".")[0] in inside:
            yield name, parameter
