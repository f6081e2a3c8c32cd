"""Find norms, residual and size attributes around a projection, and how logits are computed from hidden states."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from typing import Any

import torch
from torch import Tensor, nn

from gprune.models.discovery.probe import Probe, changed, is_linear, is_norm, owner_of
from gprune.models.outputs import hidden_in


def completed(
    probe: Probe, index: int, kind: dict[str, Any], scope: str, hosts: Sequence[str], output: str,
    sizes: Mapping[int, str],
) -> dict[str, Any]:  # fmt: skip
    """Add norms, attributes with sizes, and classes of modules to a kind, and return it.

    Args:
        probe: the tiny model.
        index: number of the layer.
        kind: fields of a record.
        scope: `ffn` or `attention`.
        hosts: modules that read the hidden states, after a norm.
        output: the output projection, or the experts.
        sizes: values of attributes that change by pruning -> the meaning of the value, such as `neurons`.
    """
    layer = probe.layers[index]
    owner = kind.get("experts") or owner_of(output)
    paths = [path for path in (*hosts, output, owner) if path] + ([] if owner else [""])
    kind["classes"] = {path: type(layer.get_submodule(path)).__name__ for path in dict.fromkeys(paths)}
    before, after = norms_around(probe, index, hosts[0], output)
    kind[f"{scope}_norm"] = before
    kind[f"after_{scope}"] = None if joins_residual(probe, index, output) else after or output
    kind["attributes"] = {}
    for path, module in layer.get_submodule(owner).named_modules():
        for name, value in {} if is_linear(module) else vars(module).items():
            fixed = name.startswith(("_", "num_key_value_groups", "layer_idx")) or "hidden_size" in name
            if type(value) is int and value in sizes and not fixed:
                kind["attributes"][".".join(p for p in (owner, path, name) if p)] = sizes[value]
    return kind


def norms_around(probe: Probe, index: int, host: str, output: str) -> tuple[str | None, str | None]:
    """Return the norm whose output a module reads, and the first norm after the output projection."""
    norms = _norms(probe.layers[index])
    calls = probe.in_layer(index, dict.fromkeys([*norms, host, output]))
    x = next((call.entering for call in calls if call.path == host), None)
    produced = {call.returned.data_ptr(): call.path for call in calls if call.path in norms}
    left = next((place for place, call in enumerate(calls) if call.path == output), len(calls))
    after = next((call.path for call in calls[left:] if call.path in norms), None)
    return None if x is None else produced.get(x.data_ptr()), after


def joins_residual(probe: Probe, index: int, output: str) -> bool:
    """Return whether the output of a projection, times a constant, is added to the residual without a norm between.

    Random numbers are added to the output, while later norms of the layer return their previous outputs. If there is no
    norm between, the output of the layer changes by these numbers times a constant.
    """
    moved, shift = _moved(probe, index, output)
    return 0 < moved.numel() == shift.numel() and bool(moved.abs().max() > 0) and _multiple(moved, shift)


def why_it_stays(probe: Probe, index: int, kind: Mapping[str, Any]) -> str | None:
    """Return why an FFN next to a larger one of its layer is not pruned, or None if it can be pruned.

    Metrics assume that an FFN sees all tokens, and that its output is added to the residual: directly, times a number
    for each token (a gate), or after a norm. This is not true for a small network inside of a norm or a router.
    """
    experts, output = kind.get("experts"), kind.get("experts") or kind["down"]
    calls = probe.in_layer(index, [output])
    if experts is None and (len(calls) != 1 or calls[0].returned.numel() != probe.ids.numel() * probe.hidden_size):
        return "it does not see all tokens once"
    moved, shift = _moved(probe, index, output)
    if not moved.numel() or not shift.numel() or moved.numel() % shift.numel():
        return "its output does not join the residual"
    each = shift.reshape(-1, 1, shift.shape[-1])  # one row per token; some types have several residual streams
    streams = moved.reshape(len(each), -1, shift.shape[-1])
    times = (streams * each).sum(-1, keepdim=True) / each.square().sum(-1, keepdim=True)
    if bool((streams - times * each).abs().max() <= 1e-3 * moved.abs().max()):
        return None
    return "its output does not join the residual"


def _moved(probe: Probe, index: int, output: str) -> tuple[Tensor, Tensor]:
    """Return the change of a layer's output if random numbers are added to the output of a module; and these numbers.

    Later norms of the layer return their previous outputs. Both tensors are empty unless module and layer are called
    exactly once.
    """
    layer = probe.layers[index]
    norms, module = _norms(layer), layer.get_submodule(output)
    still = probe.in_layer(index, dict.fromkeys([output, *norms, ""]))
    paths = [call.path for call in still]
    if paths.count(output) != 1 or paths.count("") != 1:
        return torch.zeros(0), torch.zeros(0)
    first = paths.index(output)
    later = {call.path: call.returned for call in reversed(still[first + 1 :]) if call.path}
    shift = torch.randn(still[first].returned.shape, generator=torch.Generator().manual_seed(4))
    with ExitStack() as hooks:
        hooks.enter_context(changed(module, lambda y: y + shift))
        for path, returned in later.items():
            hooks.enter_context(changed(layer.get_submodule(path), lambda _, returned=returned: returned))
        return probe.returned(index, "") - still[-1].returned, shift


def _multiple(x: Tensor, of: Tensor) -> bool:
    """Return whether a tensor is a multiple of another one."""
    x, of = x.flatten(), of.flatten()
    return bool((x - (x @ of) / (of @ of) * of).abs().max() <= 1e-3 * x.abs().max())


def _norms(layer: nn.Module) -> list[str]:
    return [path for path, module in layer.named_modules() if is_norm(module)]


def norm_offset(norm: nn.Module) -> float:
    """Return 1.0 if a norm multiplies by 1 + its weight, else 0.0."""
    with torch.no_grad():
        before = norm.weight.clone()
        norm.weight.zero_()
        x = torch.randn(1, 1, len(before), generator=torch.Generator().manual_seed(0))
        out = hidden_in(norm(x)) - (0 if getattr(norm, "bias", None) is None else norm.bias)
        norm.weight.copy_(before)
    return float(bool(out.abs().max() > 1e-3))


def logit_transform(probe: Probe) -> dict[str, Any]:
    """Return how logits are computed from head times hidden states, as fields of a record with config keys."""
    unknown = {"plain_head": False}
    product = None
    with suppress(Exception), torch.no_grad():
        hidden = probe.decoder(input_ids=probe.ids, use_cache=False).last_hidden_state
        product = probe.model.get_output_embeddings()(hidden)
    logits = probe.dense
    if product is None or product.shape != logits.shape:
        return unknown
    numbers = {n: float(v) for n, v in probe.config.to_dict().items() if type(v) in (int, float) and v > 0}
    if _close(logits, product):
        named = [n for n in numbers if n in ("logits_scaling", "logit_scale", "logits_scale") and numbers[n] == 1]
        return {"logits_scaling": named[0]} if named == ["logits_scaling"] else {}
    keys = [n for n in numbers if any(word in n for word in ("log", "head", "scal", "cap", "mult"))]
    for name in keys:
        if _close(logits, product / numbers[name]):
            return {"logits_scaling": name}
        if _close(logits, product * numbers[name]):
            return {"logits_multiplier": name}
    for name in keys:
        c = numbers[name]
        if _close(logits, (product / c).tanh() * c):
            return {"softcap": name}
    return unknown


def _close(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).abs().max() <= 1e-4 * a.abs().max())
