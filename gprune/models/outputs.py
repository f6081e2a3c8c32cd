"""Outputs of decoder layers: hidden states, or a tuple or list that begins with them."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def hidden_in(out: Any) -> Tensor:
    """Return the hidden states in the output of a module."""
    return out if isinstance(out, Tensor) else hidden_in(out[0])


def with_hidden(out: Any, hidden: Tensor) -> Any:
    """Return the output of a module with other hidden states."""
    return hidden if isinstance(out, Tensor) else type(out)([hidden, *out[1:]])
