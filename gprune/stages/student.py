"""The student of a distillation: select the trained weights of a pruned model, and convert it back afterwards."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from gprune.models.blocks import Block, Part, blocks_of, decoder_layers
from gprune.models.copies import share_hooks, without_weights
from gprune.models.lookup import decoder_of
from gprune.models.modeling_pruned import find_parent
from gprune.models.offload import gathered
from gprune.models.parts import names_in, part_row_indices

if TYPE_CHECKING:  # not every build of torch has it
    from torch.distributed.device_mesh import DeviceMesh


class Student:
    """A pruned model whose parameters in `learned` are trained in float32. `plain` ends the training.

    This is not an `nn.Module`, so a stage with a student as attribute does not register all its weights. `sizes` has
    the RMS of each trained tensor before training, by name, to which learning rates are relative. Matrices that a
    family stores in one tensor (gate and up, or query, key and value) are trained as separate tensors.

    Args:
        model: the pruned model, which is changed in place.
        targets: `mlp`: weights of FFNs; `all`: all weights of decoder layers; `lora`: adapters.
        rank: rank of adapters.
        checkpointing: recompute the activations of each layer in the backward pass.
    """

    def __init__(
        self, model: PreTrainedModel, *, targets: Literal["mlp", "all", "lora"] = "all", rank: int = 8,
        checkpointing: bool = False,
    ):  # fmt: skip
        self.model, self.targets, self.rank, self.checkpointing = model, targets, rank, checkpointing
        self.learned = nn.ParameterDict()
        self._sizes: dict[str, Tensor] = {}
        self._paths: list[tuple[int, str]] = []  # of trained weights: number of the layer, and name in it
        self._norm_offset = blocks_of(model)[0].family.norm_offset  # norms multiply by this + weight
        self._dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
        self._unsharded: PreTrainedModel | None = None  # copy without weights, while layers are sharded
        self._undo = ExitStack()  # removes hooks and restores attributes
        self._merge: Callable[[], PreTrainedModel] | None = None  # merges adapters into the weights
        for parameter in model.parameters():  # steps of AdamW are below the resolution of bfloat16
            parameter.data = parameter.data.float()
        if targets == "lora":
            self._learn_adapters()
        else:
            self._take_apart()
            self._learn_weights()
        sizes = [size.to(next(iter(self._sizes.values())).device) for size in self._sizes.values()]
        self.sizes = dict(zip(self._sizes, torch.stack(sizes).tolist(), strict=True))  # synchronises only once
        if checkpointing:
            self._recompute()

    @property
    def sharded(self) -> bool:
        """Whether each process has only a part of every layer."""
        return self._unsharded is not None

    def _learn(self, name: str, parameter: nn.Parameter, size: Tensor | None = None) -> None:
        key, is_gain = name.replace(".", "_"), parameter.dim() == 1 and name.endswith("weight")
        self.learned[key] = parameter.requires_grad_()
        self._sizes[key] = rms(parameter + self._norm_offset if is_gain else parameter) if size is None else size

    def _learn_weights(self) -> None:
        """Train all weights of decoder layers, or only those of FFNs."""
        for block in blocks_of(self.model):
            ffn = {place.path.rpartition(".")[0] for place in block.slices if place.kind == "ffn"}
            for name, parameter in block.layer.named_parameters():
                host = name.rpartition(".parametrizations." if ".parametrizations." in name else ".")[0]
                tied = any(parameter is other for other in self.learned.values())  # tied to another layer
                if not tied and (self.targets == "all" or host in ffn):
                    self._learn(f"{block.layer_index}.{name}", parameter)
                    self._paths.append((block.layer_index, name))

    def _learn_again(self) -> None:
        """Register weights that have replaced the trained ones."""
        layers, self.learned = decoder_layers(self.model), nn.ParameterDict()
        for index, name in self._paths:
            weight = layers[index].get_parameter(name)
            self.learned[f"{index}.{name}".replace(".", "_")] = weight.requires_grad_()

    def _take_apart(self) -> None:
        """Split fused tensors into their parts, which are trained separately, until `plain`."""
        for block in blocks_of(self.model):
            for host, rows in fused_rows(block).items():
                self._register(host, "weight", Pieces(rows, int(isinstance(host, Conv1D))))
                if host.bias is not None:
                    self._register(host, "bias", Pieces(rows, 0))
            if block.has_experts:
                for tensor, (dim, layout) in block.family.expert_rows.items():
                    if len(names := names_in(layout)) > 1:  # gate and up in one tensor
                        host, name = find_parent(block.down.host, tensor)
                        rows = part_row_indices(layout, dict.fromkeys(names, block.neurons), block.neurons)
                        self._register(host, name, Pieces(list(rows.values()), dim))

    def _register(self, host: nn.Module, name: str, pieces: Pieces) -> None:
        parametrize.register_parametrization(host, name, pieces.to(getattr(host, name).device))

    def _learn_adapters(self) -> None:
        """Add PEFT's LoRA adapters to the linear layers of blocks."""
        import peft

        blocks = blocks_of(self.model)
        hosts = {id(part.host) for block in blocks for part in block.parts.values() if isinstance(part, Part)}
        names = [name for name, module in self.model.named_modules() if id(module) in hosts]
        rank, fused = self.rank, {host: rows for block in blocks for host, rows in fused_rows(block).items()}
        config = peft.LoraConfig(
            r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules=names,
            fan_in_fan_out=any(part.transposed for part in blocks[0].parts.values() if isinstance(part, Part)),
        )  # fmt: skip
        with warnings.catch_warnings(action="ignore", category=FutureWarning):  # from PEFT, about transformers
            adapted = peft.get_peft_model(self.model, config)
        sizes = {}
        for path, host in list(self.model.named_modules()):
            if hasattr(host, "lora_B"):
                B, rows = host.lora_B["default"], fused.get(host.base_layer, [])
                if rows:
                    self._register(B, "weight", Pieces(rows, 0))
                goals = zip(B.named_parameters(), factor_sizes(host, rows), strict=True)
                sizes |= {f"{path}.lora_B.default.{name}": size for (name, _), size in goals}
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                self._learn(name, parameter, sizes.get(name))
        self.model, self._merge = adapted.get_base_model(), adapted.merge_and_unload

    def _recompute(self) -> None:
        """Enable activation checkpointing of layers."""
        _checkpointing(self.model, "enable")({"use_reentrant": False})
        for hook in getattr(self.model, "_require_grads_hooks", ()):  # transformers 5.24 removes it only for PEFT
            self._undo.callback(hook.remove)
        for block in blocks_of(self.model):  # only layers in training mode recompute; dropout stays off
            block.layer.training = True
            if hasattr(block.layer, "dropout"):  # OPT's layers have it as a number
                self._undo.callback(setattr, block.layer, "dropout", block.layer.dropout)
                block.layer.dropout = 0.0

    def shard(self, mesh: DeviceMesh, device: torch.device) -> None:
        """Shard the decoder layers over processes by PyTorch's `fully_shard`. Not possible with adapters."""
        from torch.distributed.fsdp import fully_shard  # not every build of torch has it

        self._unsharded = without_weights(self.model)
        for layer in decoder_layers(self.model):  # one at a time, so that no device has all of them in memory
            # By default a root module stays gathered after its forward pass.
            fully_shard(layer, mesh=mesh, reshard_after_forward=True)
        self.model.to(device)
        self._learn_again()

    def gather(self) -> None:
        """Gather sharded layers on the CPU."""
        whole = self._unsharded
        for kind, tensors in (("_parameters", self.model.named_parameters()), ("_buffers", self.model.named_buffers())):
            for name, tensor in tensors:
                path, _, leaf = name.rpartition(".")
                value = gathered(tensor).detach().cpu()
                parent = whole.get_submodule(path)
                getattr(parent, kind)[leaf] = nn.Parameter(value) if kind == "_parameters" else value
        whole.tie_weights()
        share_hooks(decoder_of(whole), decoder_of(self.model))
        self.model, self._unsharded = whole.requires_grad_(False), None
        self._learn_again()

    @torch.no_grad()
    def plain(self) -> PreTrainedModel:
        """Return the trained model: frozen, without adapters and hooks, in its original dtypes."""
        self._undo.close()
        if self.checkpointing:
            _checkpointing(self.model, "disable")()
        for host in [module for module in self.model.modules() if parametrize.is_parametrized(module)]:
            for name in list(host.parametrizations):
                parametrize.remove_parametrizations(host, name, leave_parametrized=True)
                setattr(host, name, nn.Parameter(getattr(host, name)))  # PyTorch leaves a buffer for several pieces
        if self._merge is not None:
            self.model = self._merge()
        for name, parameter in self.model.named_parameters():
            parameter.data = parameter.data.to(self._dtypes[name])
        return self.model.eval().requires_grad_(False)


def fused_rows(block: Block) -> dict[nn.Module, list[Tensor]]:
    """Return rows of each part in the fused linear layers of a block."""
    hosts: dict[nn.Module, list[Tensor]] = {}
    for part in block.parts.values():
        if isinstance(part, Part) and part.rows is not None:
            hosts.setdefault(part.host, []).append(part.rows)
    return hosts


class Pieces(nn.Module):
    """Parametrization of a fused tensor by its parts, which have `rows` along `dim`."""

    def __init__(self, rows: list[Tensor], dim: int):
        super().__init__()
        self.rows, self.dim = rows, dim
        self.register_buffer("order", torch.cat(rows).argsort(), persistent=False)

    def forward(self, *parts: Tensor) -> Tensor:
        """Return the fused tensor."""
        return torch.cat(parts, self.dim).index_select(self.dim, self.order)

    def right_inverse(self, whole: Tensor) -> tuple[Tensor, ...]:
        """Return the parts, contiguous as needed by fused AdamW."""
        return tuple(whole.index_select(self.dim, rows.to(whole.device)).contiguous() for rows in self.rows)


def rms(tensor: Tensor) -> Tensor:
    """Return the root mean square, () float32."""
    return tensor.detach().float().square().mean().sqrt()


def factor_sizes(host: nn.Module, fused: list[Tensor]) -> list[Tensor]:
    """Return the size of the factor B of PEFT's W + s B A, for each part of the rows of W; B itself starts at zero.

    With rms(W) / (s sqrt(rank) rms(A)), a step of B changes W as much as a step of W would.
    """
    A, W = host.lora_A["default"].weight, host.base_layer.weight
    W = W.T if host.fan_in_fan_out else W
    change = host.scaling["default"] * math.sqrt(len(A)) * rms(A)
    return [rms(W[rows]) / change for rows in fused or [slice(None)]]


def _checkpointing(model: PreTrainedModel, what: Literal["enable", "disable"]) -> Callable[..., None]:
    """Return a method to enable or disable checkpointing, which transformers 5.24 has renamed."""
    old, new = f"gradient_checkpointing_{what}", f"activation_checkpointing_{what}"
    return getattr(model, new if hasattr(model, new) else old)
