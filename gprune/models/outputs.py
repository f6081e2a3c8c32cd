"""What decoder layers return: hidden states, alone or first in a tuple or list."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def hidden_in(out: Any) -> Tensor:
    """The hidden states in what a module returns."""
    return out if isinstance(out, Tensor) else hidden_in(out[0])


def with_hidden(out: Any, hidden: Tensor) -> Any:
    """What a module returns, with other hidden states in place of its own."""
    return hidden if isinstance(out, Tensor) else type(out)([hidden, *out[1:]])
