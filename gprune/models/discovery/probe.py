"""Measure a tiny random model: paths of layers, inputs and outputs of modules, dependencies of rows on columns."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from gprune.errors import UserError, first_line
from gprune.models.outputs import hidden_in, with_hidden

TOKENS = (2, 32)  # number of windows, and tokens per window
REMEDY = (
    "Write a record in a file that --import names (docs/extend.md, 'A model family'), or choose a type in "
    "docs/architectures.md"
)
Rows = dict[tuple[str, int], Tensor]  # parameter of a layer, dimension -> indices along it


@dataclass(frozen=True)
class Call:
    """One call of a module during a forward pass."""

    path: str
    entering: Tensor | None  # input hidden states
    returned: Tensor


@dataclass
class Probe:
    """A tiny random model and a text. Measurements restore the weights that they change."""

    model: PreTrainedModel

    def __post_init__(self) -> None:
        words = min(100, max(4, getattr(self.config, "vocab_size", 100)))  # few if tokens are letters
        self.ids = torch.randint(3, words, TOKENS, generator=torch.Generator().manual_seed(1))

    @property
    def name(self) -> str:
        """The type of the model."""
        return self.model.config.model_type

    @cached_property
    def config(self) -> PreTrainedConfig:
        """The configuration of the text model."""
        return self.model.config.get_text_config(decoder=True)

    def logits(self, ids: Tensor | None = None, model: PreTrainedModel | None = None) -> Tensor:
        """Return logits, (B, T, V), of the text or other ids, by this or another model."""
        with torch.no_grad():
            return (model or self.model)(input_ids=self.ids if ids is None else ids, use_cache=False).logits

    @cached_property
    def dense(self) -> Tensor:
        """Logits of the unchanged model, (B, T, V)."""
        return self.logits()

    # Paths

    @cached_property
    def decoder(self) -> nn.Module:
        """The module that maps ids to the hidden states for the head."""
        decoder = self.model.get_decoder()
        return decoder if isinstance(decoder, PreTrainedModel) else self.model.base_model

    @property
    def decoder_path(self) -> str | None:
        """Path of the decoder in the model; None if `get_decoder` returns it."""
        if self.decoder is self.model.get_decoder():
            return None
        return next(path for path, module in self.model.named_modules() if module is self.decoder) or None

    @cached_property
    def layers_path(self) -> str:
        """Path of the layers in the decoder: the largest list of modules that the text passes."""
        lists = {
            path: module for path, module in self.decoder.named_modules()
            if isinstance(module, nn.ModuleList) and len(module) and len(list(module[0].modules())) > 3
        }  # fmt: skip
        passed = {call.path for call in self.calls({path: layers[0] for path, layers in lists.items()})}
        lists = {path: layers for path, layers in lists.items() if path in passed}  # excludes vision towers
        depth = getattr(self.config, "num_hidden_layers", None)
        lists = {path: layers for path, layers in lists.items() if len(layers) == depth} or lists
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

        def note(path: str) -> Callable[..., None]:
            def after(_module: nn.Module, args: tuple, kwargs: dict, out: Any) -> None:
                x = args[0] if args else kwargs.get("hidden_states")
                calls.append(Call(path, x if isinstance(x, Tensor) else None, hidden_in(out)))

            return after

        with ExitStack() as hooks, torch.set_grad_enabled(gradients):
            for path, module in modules.items():
                hooks.callback(module.register_forward_hook(note(path), with_kwargs=True).remove)
            self.model(input_ids=self.ids, use_cache=False)
        return calls

    def in_layer(self, index: int, paths: Iterable[str], **settings: bool) -> list[Call]:
        """Return `calls` of modules in a layer, by path; '' is the layer."""
        return self.calls({path: self.layers[index].get_submodule(path) for path in paths}, **settings)

    def is_called(self, index: int, path: str) -> bool:
        """Return whether a module of a layer is called; some classes only read its weights."""
        return bool(self.in_layer(index, [path]))

    def returned(self, index: int, path: str) -> Tensor:
        """Return the output of a module of a layer."""
        return self.in_layer(index, [path])[0].returned

    def entering(self, index: int, path: str) -> Tensor:
        """Return the input of a module of a layer."""
        return self.in_layer(index, [path])[0].entering

    # Dependencies

    def is_affine(self, weight: Tensor, measure: Callable[[], Tensor], part: Callable[[Tensor], Tensor]) -> bool:
        """Return whether a measurement is affine in the scale of a part (a view) of a weight."""
        with torch.no_grad():
            saved, values = weight.clone(), []
            for scale in (-0.1, 0.0, 0.1):  # small, because some classes clamp; both signs, to detect ReLU
                weight.copy_(saved)
                part(weight).mul_(scale)
                values.append(measure())
            weight.copy_(saved)
        first, second = values[1] - values[0], values[2] - values[1]
        return bool((first - second).abs().max() <= 1e-4 * (first.abs().max() + second.abs().max()) + 1e-7)

    def vanishing(self, places: Mapping[int, tuple[Tensor, int]], columns: Tensor, skip: str) -> dict[int, Rows]:
        """Return rows of parameters whose gradient vanishes if columns of an output projection are zero, by layer.

        Args:
            places: number of a layer -> its output projection and the dimension of columns.
            columns: the columns.
            skip: path of the projection, which is ignored.
        """
        with torch.no_grad(), ExitStack() as restored:
            for weight, dim in places.values():
                restored.callback(weight.copy_, weight.clone())
                weight.index_fill_(dim, columns, 0)
            after = self._gradients()
        found: dict[int, Rows] = {}
        for index in places:
            live, rows = _live(after[index]), {}
            for key, was in self._before[index].items():
                gone = (was & ~live[key]).nonzero().flatten() if key in live else was.nonzero().flatten()
                if key[0] != skip and len(gone) and len(gone) < len(was):
                    rows[key] = gone
            found[index] = rows
        return found

    def live(self, index: int, name: str, dim: int) -> Tensor:
        """Return which indices of a parameter have a nonzero gradient, (size along dim,) bool."""
        size = self.layers[index].get_parameter(name).shape[dim]
        return self._before[index].get((name, dim), torch.zeros(size, dtype=torch.bool))

    @cached_property
    def _before(self) -> list[dict[tuple[str, int], Tensor]]:
        # Gradients of key biases are only rounding errors, because they shift all scores of a token equally.
        gradients = self._gradients()
        least = [1e-6 * max((float(g.abs().max()) for g in own.values()), default=0.0) for own in gradients]
        return [_live(own, least=bound) for own, bound in zip(gradients, least, strict=True)]

    def _gradients(self) -> list[dict[str, Tensor]]:
        """Return gradients of a fixed random weighting of the logits by the parameters of each layer."""
        generator = torch.Generator().manual_seed(2)
        with torch.enable_grad():
            logits = self.model(input_ids=self.ids, use_cache=False).logits
            loss = (logits * torch.randn(logits.shape, generator=generator)).sum()
            named = [dict(layer.named_parameters()) for layer in self.layers]
            parameters = list({id(p): p for own in named for p in own.values() if p.requires_grad}.values())
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        by_id = {id(p): g for p, g in zip(parameters, gradients, strict=True) if g is not None}
        return [{name: by_id[id(p)] for name, p in own.items() if id(p) in by_id} for own in named]

    # Checks

    def check_forward(self) -> None:
        """Raise UserError if the forward pass fails, is not deterministic, not finite or not causal."""
        failed = f"Cannot find the structure of model type '{self.name}'"
        try:
            first, second = self.logits(), self.logits()
        except Exception as error:
            raise UserError(f"{failed}: a tiny copy does not run: {first_line(error)}. {REMEDY}.") from error
        if not torch.equal(first, second):
            raise UserError(f"{failed}: two forward passes of the same input give different logits.")
        if not first.isfinite().all():
            raise UserError(f"{failed}: logits of a tiny copy with random weights are not finite. {REMEDY}.")
        changed = self.ids.clone()
        changed[:, -1] = (changed[:, -1] + 1) % 100
        if (self.logits(changed)[:, :-4] - first[:, :-4]).abs().max() > 1e-3 * first.abs().max():
            raise UserError(
                f"Model type '{self.name}' must be a decoder; got an encoder, in which later tokens change predictions "
                "from earlier ones. Some types have is_decoder in config.json."
            )


@contextmanager
def changed(module: nn.Module, change: Callable[[Tensor], Tensor]):
    """Change the hidden states that a module returns, while the context lasts."""
    handle = module.register_forward_hook(lambda _module, _inputs, out: with_hidden(out, change(hidden_in(out))))
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def separable_norms(layers: nn.ModuleList):
    """Stop gradients through statistics of norms inside attention and FFN while the context lasts.

    Otherwise, with a norm over all heads, each head would depend on rows of all others.
    """

    def separable(module: nn.Module) -> Callable[..., Tensor]:
        return lambda x, *_rest, **_named: x * module.weight / x.detach().square().mean(-1, keepdim=True).sqrt()

    with ExitStack() as stack:
        for layer in layers:
            for path, module in layer.named_modules():
                if "." in path and is_norm(module):
                    module.__dict__["forward"] = separable(module)
                    stack.callback(module.__dict__.pop, "forward")
        yield


def is_norm(module: nn.Module) -> bool:
    """Return whether a module is a norm with one weight per channel."""
    weight = getattr(module, "weight", None)
    return "norm" in type(module).__name__.lower() and isinstance(weight, Tensor) and weight.dim() == 1


def is_linear(module: nn.Module) -> bool:
    """Return whether a module is a linear layer, with its weight in either orientation."""
    return isinstance(module, (nn.Linear, Conv1D))


def row_dim(module: nn.Module) -> int:
    """Return the dimension of outputs in a linear layer's weight."""
    return int(isinstance(module, Conv1D))


def _live(gradients: Mapping[str, Tensor], *, least: float = 0.0) -> dict[tuple[str, int], Tensor]:
    """Return for each parameter and dimension which indices have a gradient larger than `least`."""
    live = {}
    for name, gradient in gradients.items():
        large = gradient.abs() > least
        for dim in range(gradient.dim()):
            others = [d for d in range(gradient.dim()) if d != dim]
            live[name, dim] = large.any(others) if others else large
    return live


def owner_of(path: str) -> str:
    """Return the path of the module that contains the parameter or module at a path."""
    return path.rpartition(".")[0]


def common_module(names: Sequence[str]) -> str:
    """Return the path of the deepest module that contains all these parameters; '' for the layer."""
    shared = []
    for parts in zip(*(owner_of(name).split(".") for name in names), strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return ".".join(shared)
