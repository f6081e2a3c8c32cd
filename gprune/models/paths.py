"""Modules and tensors by their path in a layer."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from gprune.models.modeling_pruned import find_parent


def attribute_at(module: nn.Module, path: str) -> Any:
    """Return the submodule, tensor or other attribute at a dotted path, or None; for an empty path the module."""
    if not path:
        return module
    parent, name = find_parent(module, path)
    return getattr(parent, name, None)


def owner_of(path: str) -> str:
    """Return the path of the module that contains the parameter or module at a path."""
    return path.rpartition(".")[0]


def is_inside(path: str, other: str) -> bool:
    """Return whether the module at a path is the module at another path, or in it."""
    return path == other or path.startswith(f"{other}.")


def is_norm(module: nn.Module) -> bool:
    """Return whether a module is a norm with one weight per channel."""
    weight = getattr(module, "weight", None)
    return "norm" in type(module).__name__.lower() and isinstance(weight, Tensor) and weight.dim() == 1
