"""Discover the structure of a type that has no record, on a tiny random copy of its class.

Set one column of an output projection to zero: every row of a parameter whose gradient was not zero before, and is
exactly zero now, belongs to the unit of that column, since nothing else can use it. One column is enough for a neuron
of an FFN. For attention, the smallest block of columns for which rows of query, key and value vanish is a KV group.

What is found is sliced on the tiny copy and has to compute what the copy computes with the units' columns at zero;
a candidate that does not is left alone. So a record holds nothing that was not checked.
"""

from __future__ import annotations

import copy
import json
import logging
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from operator import attrgetter
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.pytorch_utils import Conv1D

from gprune.errors import UserError, first_line, quoting
from gprune.models import cached_records
from gprune.models.blocks import HEADS, blocks_of
from gprune.models.families import Family
from gprune.models.lookup import auto_of, remember
from gprune.models.masks import Masks
from gprune.models.modeling_pruned import PREFIX, find
from gprune.models.surgery import prune
from gprune.models.tiny import shrunk, stock_config

log = logging.getLogger("gprune")
TOKENS = (2, 32)  # windows and tokens of the text that the tiny copy reads
REMEDY = (
    "Give it a record by hand: docs/extend.md, 'A model family', shows how, in a file that --import names; or choose a "
    "type of the table in docs/architectures.md"
)
COUNT = re.compile("head|group|kv")  # in names of what a configuration has several of
Rows = dict[tuple[str, int], Tensor]  # parameter of a layer, dimension -> indices along it


def discover(config: PreTrainedConfig) -> Family:
    """The record of a configuration's type, from the cache or found now.

    Raises:
        UserError: one line with what was found, what did not agree, and what to do.
    """
    name = config.model_type.removeprefix(PREFIX)
    check_supported(config)
    try:
        tiny = shrunk(stock_config(config))
    except Exception as error:
        raise UserError(
            f"Model type '{name}': no tiny copy can be configured: {first_line(error)}. {REMEDY}."
        ) from error
    if (record := cached_records.read(tiny)) is None:
        record = discovered(tiny)
        cached_records.write(tiny, record)
        log.info("found the structure of model type '%s' on a tiny copy", name)
    return record


def check_supported(config: PreTrainedConfig) -> None:
    """Raise UserError for a configuration that no decoder of next tokens is made from."""
    name = config.model_type.removeprefix(PREFIX)
    if getattr(config, "quantization_config", None) is not None:
        method = config.quantization_config
        values = method if isinstance(method, Mapping) else vars(method)
        method = values.get("quant_method")
        raise UserError(
            f"Model type '{name}': the checkpoint is quantised ({getattr(method, 'value', method)}); expected weights "
            "in float32, bfloat16 or float16. Prune those, and quantise what is left."
        )
    if getattr(config, "is_encoder_decoder", False):
        raise UserError(
            f"Model type '{name}' is an encoder-decoder; expected a decoder alone, which predicts next tokens."
        )
    if not has_class(config):
        raise UserError(
            f"Model type '{name}' has no class in transformers that predicts next tokens (AutoModelForCausalLM); "
            f"expected a decoder. {REMEDY}."
        )


def has_class(config: PreTrainedConfig) -> bool:
    """Whether transformers has a causal language model for this configuration's class."""
    stock = type(stock_config(config))
    return stock in MODEL_FOR_CAUSAL_LM_MAPPING or stock in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING


def tiny_model(config: PreTrainedConfig, seed: int = 0) -> PreTrainedModel:
    """A random model of a tiny configuration, on the CPU in float32; the caller's random numbers stay as they were.

    Weights are large, so that every part counts, and norms and biases are random too.
    """
    config = copy.deepcopy(config)
    for name in ("_attn_implementation", "_experts_implementation"):
        with suppress(Exception):
            setattr(config, name, "eager")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # of the CPU alone, whose state is restored
        model = auto_of(config).from_config(config, dtype=torch.float32).eval().float()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.is_floating_point():
                    parameter.add_(torch.randn(parameter.shape) * (0.2 if parameter.dim() > 1 else 0.3))
    return model


def discovered(config: PreTrainedConfig) -> Family:
    """The record of a tiny configuration's type; UserError as for `discover`."""
    name = config.model_type
    try:
        model = tiny_model(config)
    except Exception as error:
        raise UserError(f"Model type '{name}': a tiny copy cannot be made: {first_line(error)}. {REMEDY}.") from error
    with quoting(f"Model type '{name}': its structure was not found: ", f". {REMEDY}."):
        return Discovery(model).record()


@dataclass
class Discovery:
    """Finds the record of a tiny random model, which is changed meanwhile and is itself again afterwards."""

    model: PreTrainedModel
    ids: Tensor = field(init=False)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(1)
        self.ids = torch.randint(3, 100, TOKENS, generator=generator)

    # The model as a whole

    @property
    def name(self) -> str:
        """The type of the model."""
        return self.model.config.model_type

    @cached_property
    def config(self) -> PreTrainedConfig:
        """The configuration of the text model."""
        return self.model.config.get_text_config(decoder=True)

    def logits(self, ids: Tensor | None = None, model: PreTrainedModel | None = None) -> Tensor:
        """(B, T, V) of the text that is looked at."""
        with torch.no_grad():
            return (model or self.model)(input_ids=self.ids if ids is None else ids, use_cache=False).logits

    def record(self) -> Family:
        """The record; UserError where no part of the model can be pruned."""
        self._check_forward()
        base = Family(
            self.name,
            layers=self.layers_path,
            decoder=self.decoder_path,
            found=True,
            up=None,
            down=None,
            query=None,
            output=None,
        )
        found: tuple[list[dict[str, Any]], list[dict[str, Any]]] = ([], [])
        failed = []
        with _separable_norms(self.layers):
            candidates = list(self._candidates())
        for scope, kind, _ in sorted(candidates, key=lambda row: -row[2]):
            kinds = ((kind,), ()) if scope == "ffn" else ((), (kind,))
            if self._agrees(base, kinds, kind):
                found[scope == "attention"].append(kind)
            else:
                failed.append(kind.get("experts") or kind.get("down") or kind.get("output"))
        if not found[0] and not found[1]:
            why = f"{', '.join(failed)} compute something else when they are sliced" if failed else "no FFN"
            raise UserError(
                f"Model type '{self.name}': found {len(self.layers)} layers in '{self.layers_path}' of the tiny copy, "
                f"but {why}; expected an FFN whose neurons can be removed. {REMEDY}."
            )
        if not found[0]:
            raise UserError(f"Model type '{self.name}': no FFN was found in '{self.layers_path}'. {REMEDY}.")
        record = self._whole(base, found)
        if not self._agrees_whole(record):
            raise UserError(f"Model type '{self.name}': the parts that were found do not agree together. {REMEDY}.")
        return record

    def _check_forward(self) -> None:
        """Raise UserError for a forward pass that fails, is not deterministic, or is not causal."""
        try:
            first, second = self.logits(), self.logits()
        except Exception as error:
            raise UserError(
                f"Model type '{self.name}': a tiny copy does not run: {first_line(error)}. {REMEDY}."
            ) from error
        if not torch.equal(first, second):
            raise UserError(
                f"Model type '{self.name}': two forward passes differ, so no check could tell what pruning does."
            )
        if not first.isfinite().all():
            raise UserError(
                f"Model type '{self.name}': a tiny copy with random weights gives infinite logits. {REMEDY}."
            )
        changed = self.ids.clone()
        changed[:, -1] = (changed[:, -1] + 1) % 100
        if (self.logits(changed)[:, :-4] - first[:, :-4]).abs().max() > 1e-3 * first.abs().max():
            raise UserError(
                f"Model type '{self.name}' is an encoder as it is configured: later tokens change what is predicted "
                "from earlier ones; expected a decoder (some types have is_decoder in config.json)."
            )

    @cached_property
    def decoder(self) -> nn.Module:
        """What turns ids into the hidden states that the head reads."""
        decoder = self.model.get_decoder()
        return decoder if isinstance(decoder, PreTrainedModel) else self.model.base_model

    @property
    def decoder_path(self) -> str | None:
        """Where the model has it; None for what `get_decoder` returns."""
        if self.decoder is self.model.get_decoder():
            return None
        return next(path for path, module in self.model.named_modules() if module is self.decoder) or None

    @cached_property
    def layers_path(self) -> str:
        """Where the decoder has its layers."""
        lists = [
            (path, module) for path, module in self.decoder.named_modules()
            if isinstance(module, nn.ModuleList) and len(module) and len(list(module[0].modules())) > 3
        ]  # fmt: skip
        called: set[str] = set()
        with ExitStack() as stack:  # a vision tower's layers see no text
            for path, module in lists:
                stack.callback(module[0].register_forward_hook(lambda *_, path=path: called.add(path)).remove)
            self.logits()
        lists = [row for row in lists if row[0] in called]
        depth = getattr(self.config, "num_hidden_layers", None)
        lists = [row for row in lists if len(row[1]) == depth] or lists
        if not lists:
            raise UserError(f"Model type '{self.name}': no nn.ModuleList of decoder layers was found. {REMEDY}.")
        return max(lists, key=lambda row: sum(p.numel() for p in row[1].parameters()))[0]

    @cached_property
    def layers(self) -> nn.ModuleList:
        """The decoder layers."""
        return attrgetter(self.layers_path)(self.decoder)

    @cached_property
    def hidden_size(self) -> int:
        """Size of the hidden states that leave a layer."""
        seen: list[Tensor] = []
        handle = self.layers[0].register_forward_hook(lambda _m, _i, out: seen.append(_tensor(out)))
        self.logits()
        handle.remove()
        return seen[0].shape[-1]

    # Vanishing gradients

    def _gradients(self) -> list[dict[str, Tensor]]:
        """Of each layer, the gradients of its parameters by a fixed random weighting of the logits."""
        generator = torch.Generator().manual_seed(2)
        with torch.enable_grad():
            logits = self.model(input_ids=self.ids, use_cache=False).logits
            loss = (logits * torch.randn(logits.shape, generator=generator)).sum()
            named = [dict(layer.named_parameters()) for layer in self.layers]
            parameters = list({id(p): p for own in named for p in own.values() if p.requires_grad}.values())
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        by_id = {id(p): g for p, g in zip(parameters, gradients, strict=True) if g is not None}
        return [{name: by_id[id(p)] for name, p in own.items() if id(p) in by_id} for own in named]

    @cached_property
    def _before(self) -> list[dict[tuple[str, int], Tensor]]:
        # Key biases shift all scores of a token alike: their gradients are zero but for rounding.
        gradients = self._gradients()
        least = [1e-6 * max((float(g.abs().max()) for g in own.values()), default=0.0) for own in gradients]
        return [_live(own, least=bound) for own, bound in zip(gradients, least, strict=True)]

    def _vanish(self, places: Mapping[int, tuple[Tensor, int]], columns: Tensor, skip: str) -> dict[int, Rows]:
        """Rows of each layer whose gradient vanishes with these columns at zero; `places`: weight and dimension."""
        with torch.no_grad():
            saved = [(weight, weight.clone()) for weight, _ in places.values()]
            for weight, dim in places.values():
                weight.index_fill_(dim, columns, 0)
            try:
                after = self._gradients()
            finally:
                for weight, value in saved:
                    weight.copy_(value)
        found: dict[int, Rows] = {}
        for index in places:
            live, rows = _live(after[index]), {}
            for key, was in self._before[index].items():
                gone = (was & ~live[key]).nonzero().flatten() if key in live else was.nonzero().flatten()
                if key[0] != skip and len(gone) and len(gone) < len(was):
                    rows[key] = gone
            found[index] = rows
        return found

    def _candidates(self) -> Iterator[tuple[str, dict[str, Any], int]]:
        """Every output projection that has units: scope, kind (fields of a record), and its number of weights."""
        places: dict[tuple[str, str, tuple[int, ...]], dict[int, tuple[Tensor, int]]] = {}
        for index, layer in enumerate(self.layers):
            for path, weight, dim in self._outputs(layer):
                owner = _class_at(layer, path.rpartition(".")[0].rpartition(".")[0])
                places.setdefault((path, owner, tuple(weight.shape)), {})[index] = (weight, dim)
        seen: set[str] = set()
        for (path, _, _), own in places.items():
            shapes: dict[int, list[int]] = {}
            for index, (weight, dim) in own.items():
                shapes.setdefault(weight.shape[dim], []).append(index)
            for size, indices in shapes.items():
                these = {index: own[index] for index in indices}
                for scope, index, kind in self._units(path, these, size):
                    text = json.dumps(kind, sort_keys=True)
                    if text not in seen:
                        seen.add(text)
                        yield scope, kind, these[index][0].numel()

    def _outputs(self, layer: nn.Module) -> Iterator[tuple[str, Tensor, int]]:
        """Weights of a layer that may be output projections, with the dimension of their columns."""
        H = self.hidden_size
        for path, module in layer.named_modules():
            if isinstance(module, (nn.Linear, Conv1D)):
                weight = module.weight
                rows, columns = weight.shape if isinstance(module, nn.Linear) else weight.shape[::-1]
                if rows == H and columns > 1:
                    yield f"{path}.weight", weight, int(isinstance(module, nn.Linear))
            else:
                for name, parameter in module.named_parameters(recurse=False):
                    if parameter.dim() == 3 and parameter.shape[0] > 1 and H in parameter.shape[1:]:
                        _E, a, b = parameter.shape
                        if a != b:
                            yield f"{path}.{name}" if path else name, parameter, 2 if a == H else 1

    def _units(
        self, path: str, places: Mapping[int, tuple[Tensor, int]], size: int
    ) -> Iterator[tuple[str, int, dict[str, Any]]]:
        """Kinds of FFN or attention whose output projection this is, by layer."""
        index = next(iter(places))
        stacked = places[index][0].dim() == 3
        one, half = (self._vanish(places, torch.arange(1, 1 + n), path) for n in (1, size // 2))
        rest = {}
        for layer, rows in one.items():
            linear = {key: r for key, r in rows.items() if len(half[layer].get(key, ())) == len(r) * (size // 2)}
            same = all(key in linear for key in half[layer])
            if linear and same and (kind := self._ffn(layer, path, size, linear, stacked=stacked)):
                yield "ffn", layer, kind
            elif not stacked:
                rest[layer] = places[layer]
        if rest:
            yield from self._groups(path, rest, size)

    # FFN

    def _ffn(self, index: int, path: str, size: int, rows: Rows, *, stacked: bool) -> dict[str, Any] | None:
        """The kind of FFN with this output projection, if rows of weights belong to its neuron 1; else None."""
        layer, layouts = self.layers[index], {}
        for (name, dim), found in rows.items():
            length = layer.get_parameter(name).shape[dim]
            orders = {(1,): "up", (1, 1 + size): "gate | up", (2, 3): "gate up"}
            order = orders.get(tuple(found.tolist()))
            if order is None or length != size * len(found):
                return None
            layouts[name, dim] = order
        names = list(dict.fromkeys(name for name, _ in layouts))
        if len(names) != len(layouts):
            return None
        if stacked:
            return self._experts(index, path, layouts)
        weights = [(name, dim) for name, dim in layouts if name.endswith(".weight") and self._is_linear(layer, name)]
        if not weights or len(weights) > 2 or (len(weights) == 2 and any(" " in layouts[key] for key in weights)):
            return None
        hosts, down = [name.removesuffix(".weight") for name, _ in weights], path.removesuffix(".weight")
        extras = [key for key in layouts if key[0].rpartition(".")[0] not in hosts]
        if any(layouts[key] != "up" for key in extras):
            return None
        kind: dict[str, Any] = {"down": down}
        if len(hosts) == 2:
            up = self._affine(index, hosts, down)
            kind |= {"up": up, "gate": next(host for host in hosts if host != up)}
        elif " " in layouts[weights[0]]:
            order = self._fused_order(index, hosts[0], layouts[weights[0]], down)
            kind |= {"up": hosts[0], "gate": hosts[0]} | ({"layout": {hosts[0]: order}} if order != "gate | up" else {})
        else:
            kind |= {"up": hosts[0], "gate": None}
        kind["extras"] = {name: [dim, "ffn"] for name, dim in extras}
        if extras:
            return None  # a norm over neurons, whose statistics change when neurons go
        return self._completed(index, kind, "ffn", hosts, down, {size: "neurons"})

    def _is_linear(self, layer: nn.Module, name: str) -> bool:
        return isinstance(layer.get_submodule(name.rpartition(".")[0]), (nn.Linear, Conv1D))

    def _experts(self, index: int, path: str, layouts: Mapping[tuple[str, int], str]) -> dict[str, Any] | None:
        """The kind of FFN whose stacked output projections lie at this path."""
        layer = self.layers[index]
        names = [name for name, _ in layouts]
        experts = _common_module([path, *names])
        if not experts:
            return None
        weights = [key for key in layouts if layer.get_parameter(key[0]).dim() == 3]
        if len(weights) not in (1, 2):
            return None
        # Without a gate up and down look alike from their gradients; only down enters linearly.
        if not self._is_affine([layer.get_parameter(path)], lambda t: t, lambda: self._output_of(index, experts)):
            return None
        short = {name: name.removeprefix(f"{experts}.") for name in (path, *names)}
        size = layer.get_parameter(path).shape
        dim = next(d for d in (2, 1) if size[d] != self.hidden_size)
        rows = {short[name]: [along, order] for (name, along), order in layouts.items()}
        if len(weights) == 2:
            up = self._affine_tensor(index, [name for name, _ in weights], experts)
            for name, along in weights:
                rows[short[name]] = [along, "up" if name == up else "gate"]
        elif " " in layouts[weights[0]]:
            name, along = weights[0]
            order = self._fused_order_of_experts(index, name, along, layouts[weights[0]], experts)
            for key, value in layouts.items():
                if " " in value:
                    rows[short[key[0]]] = [key[1], order]
        kind = {"experts": experts, "expert_rows": rows, "expert_down": [short[path], dim]}
        return self._completed(index, kind, "ffn", [experts], experts, {size[dim]: "neurons"})

    def _output_of(self, index: int, path: str) -> Tensor:
        """What the module at a path of a layer returns for the text."""
        seen: list[Tensor] = []
        module = self.layers[index].get_submodule(path)
        handle = module.register_forward_hook(lambda _m, _i, out: seen.append(_tensor(out).detach()))
        self.logits()
        handle.remove()
        return seen[0]

    def _input_of(self, index: int, path: str) -> Tensor:
        """What enters the module at a path of a layer."""
        seen: list[Tensor] = []
        module = self.layers[index].get_submodule(path)
        handle = module.register_forward_pre_hook(lambda _m, inputs: seen.append(inputs[0].detach()))
        self.logits()
        handle.remove()
        return seen[0]

    def _is_affine(
        self, tensors: Sequence[Tensor], pick: Callable[[Tensor], Tensor], measure: Callable[[], Tensor]
    ) -> bool:
        """Whether what is measured is affine in a scale of the picked entries of tensors."""
        with torch.no_grad():
            saved = [t.clone() for t in tensors]
            values = []
            for scale in (-0.1, 0.0, 0.1):  # small: some classes clamp, and signs tell ReLU
                for t, before in zip(tensors, saved, strict=True):
                    t.copy_(before)
                    pick(t).mul_(scale)
                values.append(measure())
            for t, before in zip(tensors, saved, strict=True):
                t.copy_(before)
        first, second = values[1] - values[0], values[2] - values[1]
        return bool((first - second).abs().max() <= 1e-4 * (first.abs().max() + second.abs().max()) + 1e-7)

    def _affine(self, index: int, hosts: Sequence[str], down: str) -> str:
        """Which of two modules enters the neuron linearly: up; the other one is the gate."""
        for host in hosts:
            module = self.layers[index].get_submodule(host)
            tensors = [t for t in (module.weight, module.bias) if t is not None]
            if self._is_affine(tensors, lambda t: t, lambda: self._input_of(index, down)):
                return host
        return hosts[-1]

    def _affine_tensor(self, index: int, names: Sequence[str], experts: str) -> str:
        for name in names:
            parameter = self.layers[index].get_parameter(name)
            if self._is_affine([parameter], lambda t: t, lambda: self._output_of(index, experts)):
                return name
        return names[-1]

    def _fused_order(self, index: int, host: str, layout: str, down: str) -> str:
        """`gate | up` or `up | gate` (or unit by unit): what enters linearly is up."""
        module = self.layers[index].get_submodule(host)
        transposed = isinstance(module, Conv1D)

        def second(t: Tensor) -> Tensor:
            return _second(t, layout, int(transposed) if t.dim() > 1 else 0)

        tensors = [t for t in (module.weight, module.bias) if t is not None]
        affine = self._is_affine(tensors, second, lambda: self._input_of(index, down))
        return layout if affine else " ".join(reversed(layout.split(" ")))

    def _fused_order_of_experts(self, index: int, name: str, dim: int, layout: str, experts: str) -> str:
        parameter = self.layers[index].get_parameter(name)

        def second(t: Tensor) -> Tensor:
            return _second(t, layout, dim)

        affine = self._is_affine([parameter], second, lambda: self._output_of(index, experts))
        return layout if affine else " ".join(reversed(layout.split(" ")))

    # Attention

    def _groups(
        self, path: str, places: Mapping[int, tuple[Tensor, int]], size: int
    ) -> Iterator[tuple[str, int, dict[str, Any]]]:
        """Kinds of attention whose output projection this is: with the smallest block of columns for which rows of
        query, key and value vanish."""
        left = dict(places)
        counts = {v for n, v in self.config.to_dict().items() if type(v) is int and COUNT.search(n) and "dim" not in n}
        for width in (size // n for n in sorted(counts, reverse=True) if 1 < n < size and size % n == 0):
            if not left:
                return
            found = self._vanish(left, torch.arange(width), path)
            likely = {
                i: rows
                for i, rows in found.items()
                if sum(len(r) for (n, _), r in rows.items() if n.endswith("weight")) > width
            }
            if not likely:
                continue
            own = {i: left[i] for i in likely}
            shifted = [
                self._vanish(own, columns, path) for columns in (torch.arange(1, width), torch.arange(width - 1))
            ]
            for index, rows in likely.items():
                values = {key: {*shifted[0][index].get(key, torch.empty(0)).tolist(),
                                *shifted[1][index].get(key, torch.empty(0)).tolist()} for key in rows}  # fmt: skip
                if (kind := self._attention(index, path, size, width, rows, values)) is not None:
                    del left[index]
                    yield "attention", index, kind

    def _attention(
        self, index: int, path: str, size: int, width: int, rows: Rows, values: Mapping[tuple[str, int], set[int]]
    ) -> dict[str, Any] | None:
        """The kind of attention with this output projection, from the rows of its first KV group; None if rows of
        query, key or value are not among them."""
        layer, output, groups = self.layers[index], path.removesuffix(".weight"), size // width
        hosts = {
            name.removesuffix(".weight"): found for (name, dim), found in rows.items()
            if name.endswith(".weight") and self._is_linear(layer, name) and dim == self._row_dim(layer, name)
        }  # fmt: skip
        local = self._local_rows(index, output, list(hosts))
        if local is None:
            return None
        roles: dict[str, list[str]] = {}
        for host, found in hosts.items():
            key = f"{host}.weight", self._row_dim(layer, f"{host}.weight")
            roles[host] = [
                "query" if int(i) in local[host] else "value" if int(i) in values[key] else "key" for i in found
            ]
        by_role: dict[str, list[str]] = {
            role: [h for h in hosts if role in roles[h]] for role in ("query", "key", "value")
        }
        if (
            any(not by_role[role] for role in ("key", "value", "query"))
            or len(by_role["key"]) > 1
            or len(by_role["value"]) > 1
        ):
            return None
        queries = sorted(by_role["query"], key=lambda host: ("q" not in host.rpartition(".")[2], -hosts[host].numel()))
        chosen = {"query": queries[0], "key": by_role["key"][0], "value": by_role["value"][0]}
        kind: dict[str, Any] = dict(chosen) | {"output": output, "layout": {}}
        for host in dict.fromkeys(chosen.values()):
            length, found = _rows_of(layer.get_submodule(host)), hosts[host]
            if len(set(roles[host])) == 1:
                if found.tolist() != list(range(len(found))) or len(found) * groups != length:
                    return None
            elif (order := _order(found.tolist(), roles[host], groups, length)) is None:
                return None
            elif not (chosen["query"] == chosen["key"] == host and order == "query | key | value"):
                kind["layout"][host] = order
        if not kind["layout"]:
            del kind["layout"]
        known = {f"{host}.{part}" for host in chosen.values() for part in ("weight", "bias")}
        kind["extras"] = {}
        for (name, dim), found in rows.items():
            if name not in known:
                if (
                    found.tolist() != list(range(len(found)))
                    or len(found) * groups != layer.get_parameter(name).shape[dim]
                ):
                    return None
                kind["extras"][name] = [dim, "attention"]
        for role, name in (("query_norm", "query"), ("key_norm", "key")):
            norm = self._norm_over_heads(layer, kind["extras"], _rows_of(layer.get_submodule(chosen[name])), name)
            if norm is not None and chosen["query"] != chosen["key"]:
                kind["extras"].pop(f"{norm}.weight")
                kind[role] = norm
        d = roles[chosen["value"]].count("value")
        kind["head_dim"] = self._head_dim(layer, output, d)
        heads, kv = size // d, groups
        sizes = {size: "channels", kv * d: "kv_channels"} | {kv: "kv_groups"} | {heads: "heads"}
        return self._completed(index, kind, "attention", [chosen["value"]], output, sizes)

    def _row_dim(self, layer: nn.Module, name: str) -> int:
        return int(isinstance(layer.get_submodule(name.rpartition(".")[0]), Conv1D))

    def _norm_over_heads(self, layer: nn.Module, extras: Collection[str], length: int, role: str) -> str | None:
        """The path of a norm over all heads at once whose weights are among these parameters."""
        for name in extras:
            path, _, own = name.rpartition(".")
            over_all = own == "weight" and layer.get_parameter(name).shape == (length,)
            if over_all and _is_norm(layer.get_submodule(path)) and path.rpartition(".")[2].startswith(role[0]):
                return path
        return None

    def _local_rows(self, index: int, output: str, hosts: Sequence[str]) -> dict[str, set[int]] | None:
        """Of each module the outputs that reach the attention's output at their own token alone; None if unknown."""
        layer, seen = self.layers[index], {}
        with ExitStack() as stack:
            for host in hosts:

                def keep(_m: nn.Module, _i: Any, out: Tensor, host: str = host) -> None:
                    seen[host] = out

                stack.callback(layer.get_submodule(host).register_forward_hook(keep).remove)

            def keep_input(_m: nn.Module, inputs: Any) -> None:
                seen[""] = inputs[0]

            stack.callback(layer.get_submodule(output).register_forward_pre_hook(keep_input).remove)
            with torch.enable_grad():
                self.model(input_ids=self.ids, use_cache=False)
        B, T = self.ids.shape
        x = seen.pop("", None)
        if x is None or set(seen) != set(hosts):
            return None
        try:
            last = x.reshape(B, T, -1)[:, -1]
            gradients = torch.autograd.grad(last.square().sum(), [seen[h] for h in hosts], allow_unused=True)
        except RuntimeError:
            return None
        found = {}
        for host, gradient in zip(hosts, gradients, strict=True):
            if gradient is None or gradient.numel() % (B * T):
                return None
            others = gradient.reshape(B, T, -1)[:, :-1].abs().amax((0, 1))
            found[host] = set((others == 0).nonzero().flatten().tolist())
        return found

    def _head_dim(self, layer: nn.Module, output: str, size: int) -> str | None:
        """The attribute of a layer that holds the size of a value head."""
        parent = output.rpartition(".")[0]
        module = layer.get_submodule(parent) if parent else layer
        names = [n for n, v in vars(module).items() if type(v) is int and v == size and "head" in n and "num" not in n]
        names.sort(key=lambda n: (n != "v_head_dim", n != "head_dim", n))
        return f"{parent}.{names[0]}".lstrip(".") if names else None

    # What surrounds a projection

    def _completed(
        self, index: int, kind: dict[str, Any], scope: str, hosts: Sequence[str], output: str, sizes: Mapping[int, str]
    ) -> dict[str, Any]:
        """A kind with its norms, the attributes that keep sizes, and the classes that tell its layers."""
        layer = self.layers[index]
        owner = kind.get("experts") or output.rpartition(".")[0]
        paths = [*hosts, output, owner]
        kind["classes"] = {path: _class_at(layer, path) for path in dict.fromkeys(paths) if path}
        if not owner:
            kind["classes"][""] = type(layer).__name__
        before, after, direct = self._norms(index, hosts[0], output)
        kind[f"{scope}_norm"] = before
        kind[f"after_{scope}"] = None if direct else after or output
        parent = layer.get_submodule(owner) if owner else layer
        kind["attributes"] = {}
        for path, module in parent.named_modules():
            if isinstance(module, (nn.Linear, Conv1D)):
                continue
            for name, value in vars(module).items():
                fixed = name.startswith(("_", "num_key_value_groups", "layer_idx")) or "hidden_size" in name
                if type(value) is int and value in sizes and not fixed:
                    kind["attributes"][".".join(p for p in (owner, path, name) if p)] = sizes[value]
        return kind

    def _norms(self, index: int, host: str, output: str) -> tuple[str | None, str | None, bool]:
        """The norm before a module, the first norm after the output projection, and whether nothing follows that
        projection before the residual sum."""
        layer, order, places = self.layers[index], [], {}
        produced: dict[int, str] = {}
        keep: list[Tensor] = []
        with ExitStack() as stack:
            for path, module in layer.named_modules():
                if _is_norm(module):

                    def note(_m: nn.Module, _i: Any, out: Any, path: str = path) -> None:
                        order.append(path)
                        keep.append(_tensor(out))
                        produced[keep[-1].data_ptr()] = path

                    stack.callback(module.register_forward_hook(note).remove)

            def enters(_m: nn.Module, args: Any, kwargs: Any) -> None:
                x = args[0] if args else kwargs.get("hidden_states")
                if isinstance(x, Tensor):
                    places.setdefault("before", produced.get(x.data_ptr()))

            def leaves(_m: nn.Module, _i: Any, out: Any) -> None:
                places["after"] = len(order)

            stack.callback(layer.get_submodule(host).register_forward_pre_hook(enters, with_kwargs=True).remove)
            stack.callback(layer.get_submodule(output).register_forward_hook(leaves).remove)
            self.logits()
        later = order[places["after"] :] if "after" in places else []
        return places.get("before"), next(iter(later), None), self._direct(index, output)

    def _direct(self, index: int, output: str) -> bool:
        """Whether a layer's output is the sum of the output projection's, times a number, and something else."""
        layer, generator = self.layers[index], torch.Generator().manual_seed(3)
        results: list[Tensor] = []
        shift: Tensor | None = None
        for scale in (0.0, 1.0):

            def move(_m: nn.Module, _i: Any, out: Any, scale: float = scale) -> Any:
                nonlocal shift
                y = _tensor(out)
                if shift is None:
                    shift = torch.randn(y.shape, generator=generator)
                moved = y + scale * shift
                return (moved, *out[1:]) if isinstance(out, tuple) else moved

            with ExitStack() as stack:
                stack.callback(layer.get_submodule(output).register_forward_hook(move).remove)
                stack.callback(layer.register_forward_hook(lambda _m, _i, out: results.append(_tensor(out))).remove)
                self.logits()
        if shift is None or len(results) != 2 or results[0].numel() != shift.numel():
            return False
        # If a later norm reads the sum that this projection is added to, as an FFN's reads attention's, the sum and not
        # the layer's output tells.
        if self._sum_has(index, output):
            return True
        difference = (results[1] - results[0]).flatten()
        factor = (difference @ shift.flatten()) / (shift.flatten() @ shift.flatten())
        return bool((difference - factor * shift.flatten()).abs().max() <= 1e-3 * difference.abs().max())

    def _sum_has(self, index: int, output: str) -> bool:
        """Whether some later norm of the layer reads a sum that moves by what the projection's output moves."""
        layer, generator = self.layers[index], torch.Generator().manual_seed(4)
        inputs: list[dict[str, Tensor]] = []
        shift: Tensor | None = None
        for scale in (0.0, 1.0):
            seen: dict[str, Tensor] = {}
            on = [False]

            def move(_m: nn.Module, _i: Any, out: Any, scale: float = scale, on: list[bool] = on) -> Any:
                nonlocal shift
                y = _tensor(out)
                if shift is None:
                    shift = torch.randn(y.shape, generator=generator)
                on[0] = True
                moved = y + scale * shift
                return (moved, *out[1:]) if isinstance(out, tuple) else moved

            with ExitStack() as stack:
                stack.callback(layer.get_submodule(output).register_forward_hook(move).remove)
                for path, module in layer.named_modules():
                    if _is_norm(module):

                        def note(
                            _m: nn.Module, args: Any, path: str = path, seen: dict = seen, on: list[bool] = on
                        ) -> None:
                            if on[0] and args:
                                seen.setdefault(path, args[0])

                        stack.callback(module.register_forward_pre_hook(note).remove)
                self.logits()
            inputs.append(seen)
        for path in inputs[0]:
            a, b = inputs[0][path], inputs[1].get(path)
            if b is not None and a.numel() == shift.numel():
                difference = (b - a).flatten()
                factor = (difference @ shift.flatten()) / (shift.flatten() @ shift.flatten())
                moved = bool((difference - factor * shift.flatten()).abs().max() <= 1e-3 * difference.abs().max())
                if moved and bool(difference.abs().max() > 0) and self._is_sum(index, output, a):
                    return True
        return False

    def _is_sum(self, index: int, output: str, x: Tensor) -> bool:
        """Whether a norm's input holds more than the projection's output times a number: the residual as well."""
        y = self._output_of(index, output).flatten()
        flat = x.detach().flatten()
        if len(y) != len(flat):
            return False
        factor = (flat @ y) / (y @ y)
        return bool((flat - factor * y).abs().max() > 1e-3 * flat.abs().max())

    # The record

    def _whole(self, base: Family, found: tuple[list[dict[str, Any]], list[dict[str, Any]]]) -> Family:
        """The record of the model from the kinds of its layers."""
        fields: dict[str, Any] = {"kinds": cached_records.frozen(found)}
        norms = [(i, kind["ffn_norm"]) for kind in found[0] for i in range(len(self.layers)) if kind["ffn_norm"]]
        for index, path in norms:
            with suppress(AttributeError):
                fields["norm_offset"] = self._offset(self.layers[index].get_submodule(path))
                break
        fields |= self._logit_transform() | self._config_keys(found)
        return Family(**{name: getattr(base, name) for name in ("model_type", "layers", "decoder", "found")} | {
            "gate": None, "up": None, "down": None, "query": None, "key": None, "value": None, "output": None,
            "ffn_norm": None, "attention_norm": None} | fields)  # fmt: skip

    def _config_keys(self, found: tuple[list[dict[str, Any]], list[dict[str, Any]]]) -> dict[str, Any]:
        """Keys of the configuration that have the sizes of units; a stock folder can be written by them."""
        trial = Family(
            self.name,
            layers=self.layers_path,
            decoder=self.decoder_path,
            found=True,
            kinds=cached_records.frozen(found),
        )
        remember(self.model, trial)
        blocks = blocks_of(self.model)
        neurons = {block.neurons for block in blocks if block.neurons}
        groups = {block.kv_groups for block in blocks if block.kv_groups}
        plain = {n: v for n, v in self.config.to_dict().items() if type(v) is int}
        width = [
            n for n, v in plain.items() if {v} == neurons and any(w in n for w in ("inter", "ffn", "inner", "d_ff"))
        ]
        kv = [n for n, v in plain.items() if {v} == groups and any(w in n for w in ("kv", "key_value", "multi_query"))]
        return {"width": width[0] if width else "", "kv_heads": kv[0] if kv else None} | self._positions()

    def _positions(self) -> dict[str, Any]:
        """Whether a text may be no longer than a table of positions has rows."""
        limit = getattr(self.config, "max_position_embeddings", None)
        tables = [m for m in self.decoder.modules() if isinstance(m, nn.Embedding) and type(limit) is int]
        return {"learned_positions": any(limit <= m.num_embeddings <= limit + 2 for m in tables)}

    def _offset(self, norm: nn.Module) -> float:
        """1.0 where a norm multiplies by 1 + its weight, else 0.0."""
        with torch.no_grad():
            before = norm.weight.clone()
            norm.weight.zero_()
            x = torch.randn(1, 1, len(before), generator=torch.Generator().manual_seed(0))
            out = _tensor(norm(x)) - (0 if getattr(norm, "bias", None) is None else norm.bias)
            norm.weight.copy_(before)
        return float(bool(out.abs().max() > 1e-3))

    def _logit_transform(self) -> dict[str, Any]:
        """How the model's logits follow from head times hidden states, by the keys of its configuration."""
        head = self.model.get_output_embeddings()
        try:
            with torch.no_grad():
                product = head(self.decoder(input_ids=self.ids, use_cache=False).last_hidden_state)
        except Exception:
            return {"plain_head": False}
        logits = self.logits()
        floats = {n: float(v) for n, v in self.config.to_dict().items() if type(v) in (int, float) and v > 0}
        if product.shape != logits.shape:
            return {"plain_head": False}
        if _close(logits, product):
            named = [n for n in floats if n in ("logits_scaling", "logit_scale", "logits_scale") and floats[n] == 1]
            return {"logits_scaling": named[0]} if named == ["logits_scaling"] else {}
        words = ("log", "head", "scal", "cap", "mult")
        keys = [n for n in floats if any(word in n for word in words)]
        for name in keys:
            if _close(logits, product / floats[name]):
                return {"logits_scaling": name}
            if _close(logits, product * floats[name]):
                return {"logits_multiplier": name}
        for name in keys:
            c = floats[name]
            if _close(logits, (product / c).tanh() * c):
                return {"softcap": name}
        return {"plain_head": False}

    # Checks

    def _agrees(self, base: Family, kinds: Any, kind: dict[str, Any]) -> bool:
        """Whether the model computes the same sliced and with columns at zero; leaves out attributes that need not
        change."""
        try:
            if not self._sliced_agrees(self._trial(base, kinds)):
                return False
        except Exception as error:
            log.debug("%s: %s", kind, first_line(error))
            return False
        for path in list(kind["attributes"]):
            meaning = kind["attributes"].pop(path)
            same = False
            with suppress(Exception):
                same = self._sliced_agrees(self._trial(base, kinds))
            if not same:
                kind["attributes"][path] = meaning
        return True

    def _trial(self, base: Family, kinds: Any) -> Family:
        return Family(
            base.model_type, layers=base.layers, decoder=base.decoder, found=True, kinds=cached_records.frozen(kinds)
        )

    def _agrees_whole(self, record: Family) -> bool:
        with suppress(Exception):
            return self._sliced_agrees(record)
        return False

    def _sliced_agrees(self, record: Family) -> bool:
        """Whether random masks give the same logits as zeros in the weights and as slices."""
        masked = copy.deepcopy(self.model)
        remember(masked, record)
        masks = random_masks(masked)
        zero(masked, masks)
        expected, dense = self.logits(model=masked), self.logits()
        sliced = self.logits(model=prune(self._remembered(record), masks))
        scale = expected.abs().max()
        moved = (expected - dense).abs().max() > 1e-5 * scale
        return bool(moved and (sliced - expected).abs().max() <= 1e-3 * scale)

    def _remembered(self, record: Family) -> PreTrainedModel:
        remember(self.model, record)
        return self.model


def random_masks(model: PreTrainedModel, seed: int = 5) -> Masks:
    """Masks that remove a few neurons of each block, one more of each next one, and the first KV group of each second
    block."""
    generator = torch.Generator().manual_seed(seed)
    ffn, attention = [], []
    for block in blocks_of(model):
        order = torch.rand(block.experts, block.neurons, generator=generator).argsort(1)
        ffn.append(
            (order >= min(block.neurons - 1, 3 + block.index)).flatten()
            if block.neurons
            else torch.ones(0, dtype=torch.bool)
        )
        keep = torch.ones(block.kv_groups, dtype=torch.bool)
        if block.kv_groups > 1:
            keep[block.index % block.kv_groups] = False
        attention.append(keep)
    return Masks(ffn, attention)


@torch.no_grad()
def zero(model: PreTrainedModel, masks: Masks) -> None:
    """Set the columns of removed units to zero, in place: what a mask does, without hooks."""
    for block in blocks_of(model):
        columns = masks.channels(block)
        for scope, name in (("ffn", "down"), ("attention", "output")):
            if (part := block.parts.get(name)) is not None:
                part.set(part.weight * columns[scope], None)
        if block.output is None:
            continue
        keep = masks.attention[block.index]
        for norm, name in ((block.family.query_norm, "query"), (block.family.key_norm, "key")):
            if norm is not None:  # over all heads: with zeros its mean is over too many
                part, module = block.parts[name], block.module(norm)
                rows = keep.repeat_interleave(part.out_features // block.kv_groups)
                part.set(part.weight * rows[:, None], None)
                if part.bias is not None:
                    part.host.bias.mul_(rows)
                module.weight.mul_((rows.sum() / len(rows)).sqrt())


@contextmanager
def _separable_norms(layers: nn.ModuleList) -> Iterator[None]:
    """Let norms inside attention and FFN only multiply by their weights while the context lasts: a norm over all heads
    would let each head use the rows of all others."""
    with ExitStack() as stack:
        for layer in layers:
            for path, module in layer.named_modules():
                if "." in path and _is_norm(module):

                    def forward(x: Tensor, *rest: Any, module: nn.Module = module, **named: Any) -> Tensor:
                        return x * module.weight

                    module.__dict__["forward"] = forward
                    stack.callback(module.__dict__.pop, "forward")
        yield


def _is_norm(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return "norm" in type(module).__name__.lower() and isinstance(weight, Tensor) and weight.dim() == 1


def _tensor(out: Any) -> Tensor:
    """The hidden states in what a module returns."""
    return out if isinstance(out, Tensor) else _tensor(out[0])


def _live(gradients: Mapping[str, Tensor], *, least: float = 0.0) -> dict[tuple[str, int], Tensor]:
    """Of each parameter and dimension, which indices have a gradient that is larger than this."""
    live = {}
    for name, gradient in gradients.items():
        for dim in range(gradient.dim()):
            others = [d for d in range(gradient.dim()) if d != dim]
            large = gradient.abs() > least
            live[name, dim] = large.any(others) if others else large
    return live


def _class_at(layer: nn.Module, path: str) -> str:
    return type(layer.get_submodule(path) if path else layer).__name__


def _common(paths: Sequence[str]) -> str:
    """The deepest module that holds modules at these paths, '' for the layer."""
    split = [path.split(".") for path in paths]
    shared = []
    for names in zip(*split, strict=False):
        if len(set(names)) > 1:
            break
        shared.append(names[0])
    return ".".join(shared)


def _common_module(names: Sequence[str]) -> str:
    """The deepest module that holds parameters of these names."""
    return _common([name.rpartition(".")[0] for name in names])


def _second(tensor: Tensor, layout: str, dim: int) -> Tensor:
    """A view of the second part of a fused tensor."""
    if "|" in layout:
        return tensor.chunk(2, dim=dim)[1]
    return tensor.unflatten(dim, (-1, 2)).select(dim + 1, 1)


def _rows_of(module: nn.Module) -> int:
    return module.weight.shape[1 if isinstance(module, Conv1D) else 0]


def _order(found: Sequence[int], roles: Sequence[str], groups: int, length: int) -> str | None:
    """The layout of a module that holds several parts, from the rows of its first group and their roles."""
    runs: list[tuple[str, int, int]] = []  # role, first row, length
    for row, role in zip(found, roles, strict=True):
        if runs and runs[-1][0] == role and runs[-1][1] + runs[-1][2] == row:
            runs[-1] = (role, runs[-1][1], runs[-1][2] + 1)
        else:
            runs.append((role, row, 1))
    names = [role for role, _, _ in runs]
    if len(set(names)) != len(names) or len(found) * groups != length:
        return None
    starts, contiguous = [start for _, start, _ in runs], list(found) == list(range(len(found)))
    if contiguous:
        return " ".join(names)
    expected, place = [], 0
    for _, _, n in runs:
        expected.append(place)
        place += n * groups
    return " | ".join(names) if starts == expected else None


def _close(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).abs().max() <= 1e-4 * a.abs().max())


VERSION = transformers.__version__
__all__ = [
    "HEADS",
    "VERSION",
    "Discovery",
    "check_supported",
    "discover",
    "discovered",
    "find",
    "random_masks",
    "tiny_model",
]
