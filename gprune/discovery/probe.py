"""Measure a tiny random model: paths, inputs and outputs of modules, dependencies of rows on columns, norms, logits."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property, partial
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from gprune.discovery.tiny import is_size
from gprune.errors import UserError, first_line
from gprune.models.families import Place
from gprune.models.masks import changed, hidden_in
from gprune.models.paths import is_norm, owner_of
from gprune.models.units import REMEDY, places_in

TOKENS = (2, 32)  # number of windows, and tokens per window
Rows = dict[tuple[str, int], Tensor]  # parameter of a layer, dimension -> indices along it


@dataclass(frozen=True)
class Call:
    """One call of a module during a forward pass."""

    path: str
    entering: Tensor | None  # input hidden states; None if they are not a tensor
    returned: Tensor  # output hidden states


@dataclass
class Probe:
    """A tiny random model and a random text. Measurements restore the weights that they change.

    Attributes:
        model: the model.
        ids: the text, (B, T) int64, with ids below `end`.
        end: 100, or the size of a smaller vocabulary.
    """

    model: PreTrainedModel

    def __post_init__(self) -> None:
        # Ids below 3 may be special tokens. Some vocabularies are small, such as those of letters.
        self.end = min(100, max(4, getattr(self.config, "vocab_size", 100)))
        self.ids = torch.randint(3, self.end, TOKENS, generator=torch.Generator().manual_seed(1))

    @property
    def name(self) -> str:
        """The type of the model."""
        return self.model.config.model_type

    @cached_property
    def config(self) -> PreTrainedConfig:
        """The configuration of the text model."""
        return self.model.config.get_text_config(decoder=True)

    def logits(self, ids: Tensor | None = None, model: PreTrainedModel | None = None) -> Tensor:
        """Return logits, (B, T, V), of `ids` by `model`; by default of the probe's text and by its model."""
        model = model or self.model
        ids = self.ids if ids is None else ids
        with torch.no_grad():
            return model(input_ids=ids, use_cache=False).logits

    @cached_property
    def dense(self) -> Tensor:
        """Logits of the unchanged model, (B, T, V)."""
        return self.logits()

    # Paths

    @cached_property
    def decoder(self) -> nn.Module:
        """The module that maps ids to the hidden states for the head."""
        decoder = self.model.get_decoder()
        if not isinstance(decoder, PreTrainedModel):  # as in ModernBERT's decoder, whose head is called `decoder`
            return self.model.base_model
        head = self.model.get_output_embeddings()
        if any(module is head for module in decoder.modules()):  # as in Llama 4, where it is the whole model
            inner = [module for module in decoder.children() if isinstance(module, PreTrainedModel)]
            return inner[0] if len(inner) == 1 else decoder
        return decoder

    @property
    def decoder_path(self) -> str | None:
        """Path of the decoder in the model; None if `get_decoder` returns it."""
        if self.decoder is self.model.get_decoder():
            return None
        return next(path for path, module in self.model.named_modules() if module is self.decoder) or None

    @cached_property
    def layers_path(self) -> str:
        """Path of the layers in the decoder: the largest list of modules that the text passes.

        Lists with as many entries as the config has layers are preferred.
        """
        lists = {  # a layer has more than three modules
            path: module for path, module in self.decoder.named_modules()
            if isinstance(module, nn.ModuleList) and len(module) and len(list(module[0].modules())) > 3
        }  # fmt: skip
        called = {call.path for call in self.calls({path: layers[0] for path, layers in lists.items()})}
        called_lists = {path: layers for path, layers in lists.items() if path in called}  # excludes vision towers
        depth = getattr(self.config, "num_hidden_layers", None)
        of_depth = {path: layers for path, layers in called_lists.items() if len(layers) == depth}
        lists = of_depth or called_lists
        if not lists:
            raise UserError(
                f"Cannot find the structure of model type '{self.name}': no nn.ModuleList of decoder layers. {REMEDY}."
            )
        return max(lists, key=lambda path: sum(p.numel() for p in lists[path].parameters()))

    @cached_property
    def layers(self) -> nn.ModuleList:
        """The decoder layers."""
        return attrgetter(self.layers_path)(self.decoder)

    @cached_property
    def hidden_size(self) -> int:
        """Size of the hidden states that leave a layer."""
        return self.returned(0, "").shape[-1]

    # Inputs and outputs of modules

    def calls(self, modules: Mapping[str, nn.Module], *, gradients: bool = False) -> list[Call]:
        """Return the calls of modules in one forward pass, in the order in which they return."""
        calls: list[Call] = []

        def record(path: str, _module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
            """Forward hook of the module at a path."""
            x = args[0] if args else kwargs.get("hidden_states")
            calls.append(Call(path, x if isinstance(x, Tensor) else None, hidden_in(output)))

        with ExitStack() as hooks, torch.set_grad_enabled(gradients):
            for path, module in modules.items():
                hooks.callback(module.register_forward_hook(partial(record, path), with_kwargs=True).remove)
            self.model(input_ids=self.ids, use_cache=False)
        return calls

    def in_layer(self, index: int, paths: Iterable[str], *, gradients: bool = False) -> list[Call]:
        """Return `calls` of modules at paths in layer number `index`; '' is the layer itself."""
        modules = {path: self.layers[index].get_submodule(path) for path in paths}
        return self.calls(modules, gradients=gradients)

    def is_called(self, index: int, path: str) -> bool:
        """Return whether a module of a layer is called; some classes only read its weights."""
        return bool(self.in_layer(index, [path]))

    def returned(self, index: int, path: str) -> Tensor:
        """Return the output of a module of a layer in its first call."""
        return self.in_layer(index, [path])[0].returned

    def entering(self, index: int, path: str) -> Tensor:
        """Return the input of a module of a layer in its first call."""
        return self.in_layer(index, [path])[0].entering

    # Dependencies

    def is_affine(self, weight: Tensor, measure: Callable[[], Tensor], part: Callable[[Tensor], Tensor]) -> bool:
        """Return whether `measure()` is affine in a factor on `part(weight)`, a view of the weight."""
        values = []  # `measure()` for each factor
        with torch.no_grad():
            original = weight.clone()
            # Small, because some models clamp activations; both signs, because ReLU is linear on each side of 0.
            for factor in (-0.1, 0.0, 0.1):
                weight.copy_(original)
                part(weight).mul_(factor)
                values.append(measure())
            weight.copy_(original)
        # An affine function has equal differences for equal steps, except for rounding.
        first_step = values[1] - values[0]
        second_step = values[2] - values[1]
        rounding = 1e-4 * (first_step.abs().max() + second_step.abs().max()) + 1e-7
        return bool((first_step - second_step).abs().max() <= rounding)

    def vanishing(self, projections: Mapping[int, tuple[Tensor, int]], columns: Tensor, skip: str) -> dict[int, Rows]:
        """Return rows of parameters whose gradient vanishes if columns of output projections are zero, by layer.

        `projections` maps the number of a layer to the weight of its projection and the dimension of columns; `skip` is
        the name of this weight. Other parameters are omitted too if none or all of their rows vanish.
        """
        with torch.no_grad(), ExitStack() as restored:
            for weight, dim in projections.values():
                restored.callback(weight.copy_, weight.clone())
                weight.index_fill_(dim, columns, 0)
            gradients = self._gradients()
        vanishing_rows: dict[int, Rows] = {}
        for index in projections:
            still_live = _live(gradients[index])
            rows = {}
            for (name, dim), live in self._live_rows[index].items():
                # A parameter without a gradient is not in `still_live`.
                vanished = live & ~still_live[name, dim] if (name, dim) in still_live else live
                indices = vanished.nonzero().flatten()
                if name != skip and 0 < len(indices) < len(live):
                    rows[name, dim] = indices
            vanishing_rows[index] = rows
        return vanishing_rows

    def live(self, index: int, name: str, dim: int) -> Tensor:
        """Return which indices of a layer's parameter have a nonzero gradient, (size along dim,) bool."""
        size = self.layers[index].get_parameter(name).shape[dim]
        return self._live_rows[index].get((name, dim), torch.zeros(size, dtype=torch.bool))

    @cached_property
    def _live_rows(self) -> list[dict[tuple[str, int], Tensor]]:
        """For each layer: (parameter, dimension) -> which indices have a nonzero gradient in the unchanged model.

        Gradients up to 1e-6 of the largest one of the layer count as zero, such as those of key biases: these shift all
        scores of a token equally, so their gradients are only rounding errors.
        """
        live_rows = []
        for by_name in self._gradients():
            largest = max((float(gradient.abs().max()) for gradient in by_name.values()), default=0.0)
            live_rows.append(_live(by_name, threshold=1e-6 * largest))
        return live_rows

    def _gradients(self) -> list[dict[str, Tensor]]:
        """Return gradients of a fixed random weighting of the logits by the parameters of each layer, by name.

        Parameters that do not affect the logits are omitted.
        """
        generator = torch.Generator().manual_seed(2)
        with torch.enable_grad():
            logits = self.model(input_ids=self.ids, use_cache=False).logits
            loss = (logits * torch.randn(logits.shape, generator=generator)).sum()
            by_layer = [dict(layer.named_parameters()) for layer in self.layers]
            # By id, because layers may share parameters.
            trainable = {id(p): p for by_name in by_layer for p in by_name.values() if p.requires_grad}
            gradients = torch.autograd.grad(loss, list(trainable.values()), allow_unused=True)
        gradient_by_id = {
            key: gradient for key, gradient in zip(trainable, gradients, strict=True) if gradient is not None
        }
        return [
            {name: gradient_by_id[id(p)] for name, p in by_name.items() if id(p) in gradient_by_id}
            for by_name in by_layer
        ]

    # Checks

    def check_forward(self) -> None:
        """Raise UserError if the forward pass fails, is not deterministic, not finite or not causal."""
        failure = f"Cannot find the structure of model type '{self.name}'"
        try:
            first, second = self.logits(), self.logits()
        except Exception as error:
            raise UserError(f"{failure}: a tiny copy does not run: {first_line(error)}. {REMEDY}.") from error
        if not torch.equal(first, second):
            raise UserError(f"{failure}: two forward passes of the same input give different logits.")
        if not first.isfinite().all():
            raise UserError(f"{failure}: logits of a tiny copy with random weights are not finite. {REMEDY}.")
        other_ids = self.ids.clone()
        other_ids[:, -1] = (other_ids[:, -1] + 1) % self.end
        # Only tokens well before the changed one are compared, at least four before it.
        change = (self.logits(other_ids)[:, :-4] - first[:, :-4]).abs().max()
        if change > 1e-3 * first.abs().max():
            raise UserError(
                f"Model type '{self.name}' must be a decoder; got an encoder, in which later tokens change predictions "
                "from earlier ones. Some types have is_decoder in config.json."
            )


@contextmanager
def separable_norms(layers: nn.ModuleList) -> Iterator[None]:
    """Stop gradients through statistics of norms inside attention and FFN while the context lasts.

    Otherwise, with a norm over all heads, each head would depend on rows of all others. All these norms compute an RMS
    norm meanwhile, because only the dependencies of rows on columns are measured.
    """

    def forward(module: nn.Module, x: Tensor, *_args: object, **_kwargs: object) -> Tensor:
        # falcon_mamba has norms with a weight of another size, which they do not use.
        weight = module.weight if module.weight.shape == x.shape[-1:] else 1.0
        return x * weight / x.detach().square().mean(-1, keepdim=True).sqrt()

    with ExitStack() as stack:
        for layer in layers:
            for path, module in layer.named_modules():
                if "." in path and is_norm(module):  # norms of the layer itself have no dot in their path
                    module.__dict__["forward"] = partial(forward, module)
                    stack.callback(module.__dict__.pop, "forward")
        yield


def is_linear(module: nn.Module) -> bool:
    """Return whether a module is a linear layer, with its weight in either orientation."""
    return isinstance(module, (nn.Linear, Conv1D))


def row_dim(module: nn.Module) -> int:
    """Return the dimension of outputs in a linear layer's weight."""
    return int(isinstance(module, Conv1D))


def _live(gradients: Mapping[str, Tensor], *, threshold: float = 0.0) -> dict[tuple[str, int], Tensor]:
    """Return for each parameter and dimension which indices have a gradient larger than `threshold`."""
    live = {}
    for name, gradient in gradients.items():
        is_large = gradient.abs() > threshold
        for dim in range(gradient.dim()):
            other_dims = [d for d in range(gradient.dim()) if d != dim]
            live[name, dim] = is_large.any(other_dims) if other_dims else is_large
    return live


def common_module(names: Sequence[str]) -> str:
    """Return the path of the deepest module that contains all these parameters; '' for the layer."""
    common = []
    for components in zip(*(owner_of(name).split(".") for name in names), strict=False):
        if len(set(components)) > 1:
            break
        common.append(components[0])
    return ".".join(common)


def norm_before(probe: Probe, index: int, host: str) -> str | None:
    """Return the path of the norm whose output `host` reads, or None."""
    norms = _norm_paths(probe.layers[index])
    calls = probe.in_layer(index, dict.fromkeys([*norms, host]))
    host_input = next((call.entering for call in calls if call.path == host), None)
    norm_by_address = {call.returned.data_ptr(): call.path for call in calls if call.path in norms}
    return None if host_input is None else norm_by_address.get(host_input.data_ptr())


def first_layer_with(probe: Probe, place: Place) -> int:
    """Return the number of the first layer that has a place."""
    return next(index for index, layer in enumerate(probe.layers) if places_in(layer, [place]))


def why_it_stays(probe: Probe, index: int, place: Place) -> str:
    """Return why an FFN next to a larger one of its layer is not pruned; empty if it can be pruned.

    Metrics assume that an FFN sees all tokens, and that its output is added to the residual: directly, times a number
    for each token (a gate), or after a norm. This is not true for a small network inside of a norm or a router.
    """
    output = place.reads
    if is_linear(probe.layers[index].get_submodule(output)):
        calls = probe.in_layer(index, [output])
        if len(calls) != 1 or calls[0].returned.numel() != probe.ids.numel() * probe.hidden_size:
            return "it does not see all tokens once"
    response, shift = _response_to_shift(probe, index, output)
    if not response.numel() or not shift.numel() or response.numel() % shift.numel():
        return "its output does not join the residual"
    shift = shift.reshape(-1, 1, shift.shape[-1])  # (tokens, 1, H)
    streams = response.reshape(len(shift), -1, shift.shape[-1])  # (tokens, residual streams, H)
    # One factor for each token and stream is fitted by least squares. If such factors exist, the remainder is zero.
    factors = (streams * shift).sum(-1, keepdim=True) / shift.square().sum(-1, keepdim=True)
    remainder = (streams - factors * shift).abs().max()
    if bool(remainder <= 1e-3 * response.abs().max()):
        return ""
    return "its output does not join the residual"


def _response_to_shift(probe: Probe, index: int, output: str) -> tuple[Tensor, Tensor]:
    """Return how a layer's output changes if random numbers are added to the output of a module, and these numbers.

    Later norms of the layer return their previous outputs. Both tensors are empty unless module and layer are called
    exactly once.
    """
    layer = probe.layers[index]
    calls = probe.in_layer(index, dict.fromkeys([output, *_norm_paths(layer), ""]))
    paths = [call.path for call in calls]
    if paths.count(output) != 1 or paths.count("") != 1:
        return torch.zeros(0), torch.zeros(0)
    position = paths.index(output)
    shift = torch.randn(calls[position].returned.shape, generator=torch.Generator().manual_seed(4))
    # Reversed, so that a norm that is called several times returns its first output.
    later_norms = {call.path: call.returned for call in reversed(calls[position + 1 :]) if call.path}
    layer_output = calls[-1].returned  # the layer returns last
    with ExitStack() as hooks:
        hooks.enter_context(changed(layer.get_submodule(output), lambda y: y + shift))
        for path, previous in later_norms.items():
            hooks.enter_context(changed(layer.get_submodule(path), lambda _, previous=previous: previous))
        return probe.returned(index, "") - layer_output, shift


def _norm_paths(layer: nn.Module) -> list[str]:
    """Return the paths of all norms in a layer."""
    return [path for path, module in layer.named_modules() if is_norm(module)]


def norm_offset(norm: nn.Module) -> float:
    """Return 1.0 if a norm multiplies by 1 + its weight, else 0.0.

    The norm is called with a weight of zero. Without the bias its output is then zero only if it multiplies by the
    weight itself.
    """
    with torch.no_grad():
        weight = norm.weight.clone()
        norm.weight.zero_()
        x = torch.randn(1, 1, len(weight), generator=torch.Generator().manual_seed(0))
        bias = getattr(norm, "bias", None)
        output = hidden_in(norm(x)) - (0 if bias is None else bias)
        norm.weight.copy_(weight)
    return float(bool(output.abs().max() > 1e-3))


def logit_transform(probe: Probe) -> dict[str, Any]:
    """Return how logits are computed from head times hidden states, as fields of a record with config keys.

    Each config value whose name suggests a factor or limit is tried: division, multiplication, then c tanh(x / c). Then
    division by the ratio of the hidden size and any config value is tried, and last every module outside of the decoder
    through which hidden states may pass before the head. Sizes are not tried, because in the tiny copy they may equal a
    factor by chance.
    """
    product = None
    head = probe.model.get_output_embeddings()
    with suppress(Exception), torch.no_grad():
        hidden = probe.decoder(input_ids=probe.ids, use_cache=False).last_hidden_state
        product = head(hidden)
    logits = probe.dense
    if product is None or product.shape != logits.shape:
        return {"plain_head": False}
    settings = probe.config.to_dict()
    numbers = {
        name: float(value) for name, value in settings.items()
        if type(value) in (int, float) and value > 0 and not is_size(name)
    }  # fmt: skip
    if _is_close(logits, product):
        # A scale of 1 has no effect here, but other models of this type may have another value. Only `logits_scaling`
        # is known to be a divisor.
        scales = [name for name in ("logits_scaling", "logit_scale", "logits_scale") if numbers.get(name) == 1]
        return {"logits_scaling": "logits_scaling"} if scales == ["logits_scaling"] else {}
    keys = [name for name in numbers if any(word in name for word in ("log", "head", "scal", "cap", "mult"))]
    for key in keys:
        if _is_close(logits, product / numbers[key]):
            return {"logits_scaling": key}
        if _is_close(logits, product * numbers[key]):
            return {"logits_multiplier": key}
    for key in keys:
        limit = numbers[key]
        if _is_close(logits, (product / limit).tanh() * limit):
            return {"softcap": key}
    for key in numbers if "hidden_size" in settings else ():
        if _is_close(logits, product / (settings["hidden_size"] / numbers[key])):
            return {"logits_scaling": f"hidden_size/{key}"}
    for path in _modules_outside_decoder(probe):
        with suppress(Exception), torch.no_grad():  # a module may need other arguments
            if _is_close(logits, head(probe.model.get_submodule(path)(hidden))):
                return {"before_head": path}
    return {"plain_head": False}


def _modules_outside_decoder(probe: Probe) -> list[str]:
    """Return paths of modules that neither contain the decoder or the head nor are in one of them."""
    parts = [probe.decoder, probe.model.get_output_embeddings()]
    inside = {id(module) for part in parts for module in part.modules()}
    return [
        path for path, module in probe.model.named_modules()
        if id(module) not in inside and not any(part is inner for part in parts for inner in module.modules())
    ]  # fmt: skip


def _is_close(x: Tensor, reference: Tensor) -> bool:
    """Return whether two tensors are equal except for rounding, relative to the largest element of the first one."""
    return bool((x - reference).abs().max() <= 1e-4 * x.abs().max())
