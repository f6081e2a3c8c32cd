"""Find norms, residual and size attributes around a projection, and how logits are computed from hidden states."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from typing import Any

import torch
from torch import Tensor, nn

from gprune.models.discovery.probe import Probe, changed, is_linear, is_norm, owner_of
from gprune.models.outputs import hidden_in
from gprune.models.tiny import is_size

# Attributes with these names are not updated by pruning, whatever their value is.
FIXED_PREFIXES = ("_", "num_key_value_groups", "layer_idx")


def complete_kind(
    probe: Probe, index: int, kind: dict[str, Any], scope: str, hosts: Sequence[str], output: str,
    sizes: Mapping[int, str],
) -> dict[str, Any]:  # fmt: skip
    """Add norms, attributes with sizes, and classes of modules to a kind in place, and return it."""
    layer = probe.layers[index]
    owner = kind.get("experts") or owner_of(output)
    paths = [path for path in (*hosts, output, owner) if path]
    if not owner:
        paths.append("")  # the layer itself
    kind["classes"] = {path: type(layer.get_submodule(path)).__name__ for path in dict.fromkeys(paths)}
    norm_before, norm_after = norms_around(probe, index, hosts[0], output)
    kind[f"{scope}_norm"] = norm_before
    kind[f"after_{scope}"] = None if joins_residual(probe, index, output) else norm_after or output
    kind["attributes"] = {}
    for path, module in layer.get_submodule(owner).named_modules():
        if is_linear(module):
            continue
        for name, value in vars(module).items():
            is_fixed = name.startswith(FIXED_PREFIXES) or "hidden_size" in name
            if type(value) is int and value in sizes and not is_fixed:
                attribute = ".".join(part for part in (owner, path, name) if part)
                kind["attributes"][attribute] = sizes[value]
    return kind


def norms_around(probe: Probe, index: int, host: str, output: str) -> tuple[str | None, str | None]:
    """Return the norm whose output a module reads, and the first norm after the output projection."""
    norms = _norm_paths(probe.layers[index])
    calls = probe.in_layer(index, dict.fromkeys([*norms, host, output]))
    host_input = next((call.entering for call in calls if call.path == host), None)
    norm_by_address = {call.returned.data_ptr(): call.path for call in calls if call.path in norms}
    norm_before = None if host_input is None else norm_by_address.get(host_input.data_ptr())
    output_position = next((position for position, call in enumerate(calls) if call.path == output), len(calls))
    norm_after = next((call.path for call in calls[output_position:] if call.path in norms), None)
    return norm_before, norm_after


def joins_residual(probe: Probe, index: int, output: str) -> bool:
    """Return whether the output of a projection, times a constant, is added to the residual without a norm between.

    Random numbers are added to the output, while later norms of the layer return their previous outputs. If there is no
    norm between, the output of the layer changes by these numbers times a constant.
    """
    response, shift = _response_to_shift(probe, index, output)
    if response.numel() == 0 or response.numel() != shift.numel():
        return False
    return bool(response.abs().max() > 0) and _is_multiple(response, shift)


def why_it_stays(probe: Probe, index: int, kind: Mapping[str, Any]) -> str | None:
    """Return why an FFN next to a larger one of its layer is not pruned, or None if it can be pruned.

    Metrics assume that an FFN sees all tokens, and that its output is added to the residual: directly, times a number
    for each token (a gate), or after a norm. This is not true for a small network inside of a norm or a router.
    """
    experts = kind.get("experts")
    output = experts or kind["down"]
    if experts is None:
        calls = probe.in_layer(index, [output])
        if len(calls) != 1 or calls[0].returned.numel() != probe.ids.numel() * probe.hidden_size:
            return "it does not see all tokens once"
    response, shift = _response_to_shift(probe, index, output)
    if not response.numel() or not shift.numel() or response.numel() % shift.numel():
        return "its output does not join the residual"
    shift = shift.reshape(-1, 1, shift.shape[-1])  # (tokens, 1, H)
    streams = response.reshape(len(shift), -1, shift.shape[-1])  # (tokens, residual streams, H)
    # The factor of each token is fitted by least squares. If there is a constant one, the remainder is zero.
    factors = (streams * shift).sum(-1, keepdim=True) / shift.square().sum(-1, keepdim=True)
    remainder = (streams - factors * shift).abs().max()
    if bool(remainder <= 1e-3 * response.abs().max()):
        return None
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


def _is_multiple(x: Tensor, reference: Tensor) -> bool:
    """Return whether a tensor is a multiple of a reference of the same number of elements, except for rounding."""
    flat_x = x.flatten()
    flat_reference = reference.flatten()
    factor = (flat_x @ flat_reference) / (flat_reference @ flat_reference)  # least squares
    return bool((flat_x - factor * flat_reference).abs().max() <= 1e-3 * flat_x.abs().max())


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
        # A scale of 1 has no effect here, but other models of this type may have another value.
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
