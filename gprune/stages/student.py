"""The student of a distillation: the trained weights of a pruned model, which is converted back afterwards."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from gprune.models.families import decoder_layers, record_of
from gprune.models.modeling_pruned import find_parent
from gprune.models.paths import owner_of
from gprune.models.products import PRODUCT_MODULES
from gprune.models.units import units_of
from gprune.units.structure import Slice


class Student:
    """A pruned model whose parameters in `learned` are trained in float32. `to_plain_model` ends the training.

    This is not an `nn.Module`, so a stage with a student as attribute does not register all its weights. Matrices that
    a family stores in one tensor (gate and up, or query, key and value) are trained as separate tensors.
    """

    def __init__(
        self, model: PreTrainedModel, *, targets: Literal["mlp", "all", "lora"] = "all", rank: int = 8,
        checkpointing: bool = False,
    ):  # fmt: skip
        self.model = model
        self.targets = targets
        self.rank = rank
        self.checkpointing = checkpointing
        self.learned = nn.ParameterDict()
        self._sizes: dict[str, Tensor] = {}  # by name in `learned`: the RMS, to which learning rates are relative
        self._norm_offset = record_of(model).norm_offset  # norms multiply by this + weight
        self._dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
        self._merge_adapters: Callable[[], object] | None = None  # merges adapters into the weights
        for parameter in model.parameters():  # steps of AdamW are below the resolution of bfloat16
            parameter.data = parameter.data.float()
        if targets == "lora":
            self._learn_adapters()
        else:
            self._split_fused_tensors()
            self._learn_weights()
        # Copied to one device and stacked, so that the host waits for the devices only once.
        first_size = next(iter(self._sizes.values()))
        stacked = torch.stack([size.to(first_size.device) for size in self._sizes.values()])
        self.sizes = dict(zip(self._sizes, stacked.tolist(), strict=True))
        if checkpointing:
            self._enable_checkpointing()

    def _learn(self, name: str, parameter: nn.Parameter, size: Tensor | None = None) -> None:
        """Add a parameter to `learned` and `sizes`."""
        if size is None:
            is_gain = parameter.dim() == 1 and name.endswith("weight")
            size = rms(parameter + self._norm_offset if is_gain else parameter)
        key = name.replace(".", "_")
        self.learned[key] = parameter.requires_grad_()
        self._sizes[key] = size

    def _learn_weights(self) -> None:
        """Train the weights that `targets` names."""
        for name, parameter in trained_weights(self.model, self.targets):
            self._learn(name, parameter)

    def _split_fused_tensors(self) -> None:
        """Split fused tensors into their parts, which are trained separately until `to_plain_model`."""
        for layer, s in sliced_tensors(self.model):
            if len(s.parts) > 1:
                _parametrize(*find_parent(layer, s.path), FusedParts([rows for _, rows in s.parts], s.dim))

    def _learn_adapters(self) -> None:
        """Add PEFT's LoRA adapters to the linear layers of blocks."""
        import peft

        self.model.requires_grad_(False)
        layers, hosts = decoder_layers(self.model), adapted_layers(self.model)
        host_ids = {id(host) for host in hosts}
        rows_of_host = {
            find_parent(layer, s.path)[0]: [rows for _, rows in s.parts]
            for layer, s in sliced_tensors(self.model) if len(s.parts) > 1
        }  # fmt: skip
        config = peft.LoraConfig(
            r=self.rank,
            lora_alpha=2 * self.rank,  # PEFT multiplies B A by lora_alpha / r, which is 2
            lora_dropout=0.0,
            target_modules=[name for name, module in layers.named_modules() if id(module) in host_ids],
            fan_in_fan_out=any(isinstance(host, Conv1D) for host in hosts),
        )
        with warnings.catch_warnings(action="ignore", category=FutureWarning):  # from PEFT, about transformers
            # In a whole model with experts PEFT would replace targets in dense layers by the tensors of experts.
            adapted = peft.get_peft_model(layers, config)
        sizes = {}
        for path, module in list(self.model.named_modules()):
            if not hasattr(module, "lora_B"):
                continue
            B = module.lora_B["default"]
            rows = rows_of_host.get(module.base_layer, [])
            if rows:
                _parametrize(B, "weight", FusedParts(rows, 0))
            pairs = zip(B.named_parameters(), factor_sizes(module, rows), strict=True)
            sizes |= {f"{path}.lora_B.default.{name}": size for (name, _), size in pairs}
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                self._learn(name, parameter, sizes.get(name))
        self._merge_adapters = adapted.merge_and_unload

    def _enable_checkpointing(self) -> None:
        """Recompute the activations of each layer in the backward pass.

        Transformers does so only for layers in training mode, in which dropout is on.
        """
        for layer in decoder_layers(self.model):
            # `forward` and not `__call__`, so that hooks, such as those of sharding, run once.
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)

    @torch.no_grad()
    def to_plain_model(self) -> PreTrainedModel:
        """Return the trained model: frozen, without adapters and checkpointing, in its original dtypes."""
        for layer in decoder_layers(self.model):
            layer.__dict__.pop("forward", None)  # with checkpointing; the class has the original one
        for host in [module for module in self.model.modules() if parametrize.is_parametrized(module)]:
            for name in list(host.parametrizations):
                parametrize.remove_parametrizations(host, name, leave_parametrized=True)
                setattr(host, name, nn.Parameter(getattr(host, name)))  # PyTorch leaves a buffer for several parts
        if self._merge_adapters is not None:
            self._merge_adapters()
        for name, parameter in self.model.named_parameters():
            parameter.data = parameter.data.to(self._dtypes[name])
        return self.model.eval().requires_grad_(False)


def trained_weights(model: PreTrainedModel, targets: str) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the names and weights that distillation trains: of FFNs (`mlp`), or `all` of decoder layers, each once."""
    seen = set()  # weights may be tied to those of another layer
    layers = decoder_layers(model)
    for u in (u for u in units_of(model) if u.kind == "neurons"):
        ffn_modules = {owner_of(s.path) for s in u.slices}
        for name, parameter in layers[u.layer].named_parameters():
            # A part of a fused tensor has a name such as `mlp.gate_up_proj.parametrizations.weight.original0`.
            separator = ".parametrizations." if ".parametrizations." in name else "."
            module_name = name.rpartition(separator)[0]
            if id(parameter) not in seen and (targets == "all" or module_name in ffn_modules):
                seen.add(id(parameter))
                yield f"{u.layer}.{name}", parameter


def adapted_layers(model: PreTrainedModel) -> list[nn.Module]:
    """Return the linear layers that get LoRA adapters: those of blocks, without tensors of several experts."""
    hosts = [find_parent(layer, s.path)[0] for layer, s in sliced_tensors(model)]
    return list({id(host): host for host in hosts if isinstance(host, PRODUCT_MODULES)}.values())


def sliced_tensors(model: PreTrainedModel) -> list[tuple[nn.Module, Slice]]:
    """Return the slices of neurons and KV groups of a model, each with its layer."""
    layers = decoder_layers(model)
    return [(layers[u.layer], s) for u in units_of(model) if u.kind in ("neurons", "kv_groups") for s in u.slices]


def _parametrize(host: nn.Module, name: str, parts: FusedParts) -> None:
    """Replace a fused tensor of a module by its parts."""
    parametrize.register_parametrization(host, name, parts.to(getattr(host, name).device))


class FusedParts(nn.Module):
    """Parametrization of a fused tensor by its parts, whose `rows` of the fused tensor are counted along `dim`."""

    def __init__(self, rows: list[Tensor], dim: int):
        super().__init__()
        self.rows = rows
        self.dim = dim
        self.register_buffer("order", torch.cat(rows).argsort(), persistent=False)

    def forward(self, *parts: Tensor) -> Tensor:
        """Return the fused tensor."""
        return torch.cat(parts, self.dim).index_select(self.dim, self.order)

    def right_inverse(self, fused: Tensor) -> tuple[Tensor, ...]:
        """Return the parts of the fused tensor, contiguous as needed by fused AdamW."""
        return tuple(fused.index_select(self.dim, rows.to(fused.device)).contiguous() for rows in self.rows)


def rms(tensor: Tensor) -> Tensor:
    """Return the root mean square, () float32."""
    return tensor.detach().float().square().mean().sqrt()


def factor_sizes(host: nn.Module, rows_of_parts: list[Tensor]) -> list[Tensor]:
    """Return the size of the factor B of PEFT's W + s B A, for each part of the rows of W; B itself starts at zero.

    With rms(W) / (s sqrt(rank) rms(A)), a step of B changes W as much as a step of W would.
    """
    A, W = host.lora_A["default"].weight, host.base_layer.weight
    if host.fan_in_fan_out:
        W = W.T
    change = host.scaling["default"] * math.sqrt(len(A)) * rms(A)
    parts = rows_of_parts or [slice(None)]  # all rows of W are one part
    return [rms(W[rows]) / change for rows in parts]
