"""The student of a distillation: what of a pruned model learns, and the way back to a plain frozen model."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from gprune.config import DistillConfig
from gprune.models.blocks import Block, Part, blocks_of
from gprune.models.copies import without_weights
from gprune.models.offload import gathered

if TYPE_CHECKING:  # not every build of torch has it
    from torch.distributed.device_mesh import DeviceMesh


class Student:
    """A pruned model of which `learned` learns, in float32; `plain` ends the learning.

    It is no `nn.Module`, so that a stage that holds one does not register its weights.

    Args:
        model: changed in place.
        settings: the flags of `--distill`: `targets`, `rank` and `checkpointing`.
    """

    def __init__(self, model: PreTrainedModel, settings: DistillConfig):
        self.model, self.settings = model, settings
        self.learned = nn.ParameterDict()
        self._dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
        self._unsharded: PreTrainedModel | None = None  # the model without weights, while its layers are sharded
        self._undo = ExitStack()  # removes hooks and restores attributes
        self._fold: list[Callable[[], None]] = []  # functions that multiply scales or adapters into the weights
        for parameter in model.parameters():  # steps of AdamW are smaller than what bfloat16 tells apart
            parameter.data = parameter.data.float()
        if settings.targets == "vectors":
            self._learn_vectors()
        elif settings.targets == "lora":
            self._learn_adapters()
        else:
            self._learn_weights()
        if settings.checkpointing:
            self._recompute()

    @property
    def sharded(self) -> bool:
        """Whether each process holds only its part of every layer."""
        return self._unsharded is not None

    def _learn(self, name: str, parameter: nn.Parameter) -> nn.Parameter:
        self.learned[name.replace(".", "_")] = parameter.requires_grad_()
        return parameter

    def _learn_weights(self) -> None:
        """All weights of decoder layers, or those of their FFNs; registered again when sharding has replaced them."""
        self.learned = nn.ParameterDict()
        for block in blocks_of(self.model):
            ffn = {place.path.rpartition(".")[0] for place in block.slices if place.kind == "ffn"}
            for name, parameter in block.layer.named_parameters():
                if self.settings.targets == "all" or name.rpartition(".")[0] in ffn:
                    self._learn(f"{block.index}.{name}", parameter)

    def _learn_vectors(self) -> None:
        """A scale on each channel that enters an output projection, and the gains of norms."""
        for block in blocks_of(self.model):
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

        self._undo.callback(place.host.register_forward_pre_hook(multiply).remove)
        self._fold.append(fold)

    def _learn_adapters(self) -> None:
        """PEFT's adapters of rank `settings.rank` on the linear layers of blocks."""
        import peft

        blocks = blocks_of(self.model)
        hosts = {id(part.host) for block in blocks for part in block.parts.values() if isinstance(part, Part)}
        names = [name for name, module in self.model.named_modules() if id(module) in hosts]
        rank = self.settings.rank
        config = peft.LoraConfig(
            r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules=names,
            fan_in_fan_out=blocks[0].family.transposed,
        )  # fmt: skip
        with warnings.catch_warnings(action="ignore", category=FutureWarning):  # PEFT's, about transformers
            adapted = peft.get_peft_model(self.model, config)
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                self._learn(name, parameter)
        self.model = adapted.get_base_model()
        self._fold.append(lambda: setattr(self, "model", adapted.merge_and_unload()))

    def _recompute(self) -> None:
        """Let layers compute their activations again in the backward pass, in place of keeping them."""
        _checkpointing(self.model, "enable")({"use_reentrant": False})
        for hook in getattr(self.model, "_require_grads_hooks", ()):  # transformers 5.24 removes it only for PEFT
            self._undo.callback(hook.remove)
        for block in blocks_of(self.model):  # only a layer in training mode recomputes; its dropout stays off
            block.layer.training = True
            if hasattr(block.layer, "dropout"):  # OPT's layers have it as a number of their own
                self._undo.callback(setattr, block.layer, "dropout", block.layer.dropout)
                block.layer.dropout = 0.0

    def shard(self, mesh: DeviceMesh, device: torch.device) -> None:
        """Shard the decoder layers over processes by PyTorch's `fully_shard`; only weights can learn then."""
        from torch.distributed.fsdp import fully_shard  # not every build of torch has it

        self._unsharded = without_weights(self.model)
        for block in blocks_of(self.model):  # each moves to its device by itself: no device holds all of them
            # By default a layer that is a root stays gathered after its forward pass: on the device, and for readers.
            fully_shard(block.layer, mesh=mesh, reshard_after_forward=True)
        self.model.to(device)
        self._learn_weights()

    def gather(self) -> None:
        """Put sharded layers together again, on the CPU."""
        whole = self._unsharded
        for kind, tensors in (("_parameters", self.model.named_parameters()), ("_buffers", self.model.named_buffers())):
            for name, tensor in tensors:
                path, _, leaf = name.rpartition(".")
                value = gathered(tensor).detach().cpu()
                parent = whole.get_submodule(path)
                getattr(parent, kind)[leaf] = nn.Parameter(value) if kind == "_parameters" else value
        whole.tie_weights()
        self.model, self._unsharded = whole.requires_grad_(False), None
        self._learn_weights()

    @torch.no_grad()
    def plain(self) -> PreTrainedModel:
        """The model with what was learned in its weights: frozen, without hooks, in the dtypes that it came in."""
        self._undo.close()
        if self.settings.checkpointing:
            _checkpointing(self.model, "disable")()
        for fold in self._fold:
            fold()
        for name, parameter in self.model.named_parameters():
            parameter.data = parameter.data.to(self._dtypes[name])
        return self.model.eval().requires_grad_(False)


def _checkpointing(model: PreTrainedModel, what: Literal["enable", "disable"]) -> Callable[..., None]:
    """The method that transformers 5.24 has renamed."""
    old, new = f"gradient_checkpointing_{what}", f"activation_checkpointing_{what}"
    return getattr(model, new if hasattr(model, new) else old)
