"""Kinds of units that `--sparsity.scope` can name, and what other parts of a run need to know about each."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:  # the kinds are imported to check flags, which should not wait for PyTorch
    from gprune.sparsity.budget import Budget


class Unit:
    """A kind of unit. The defaults are those of neurons and KV groups, which masks of the budget remove."""

    flags: ClassVar[tuple[str, ...]] = ()  # settings of `--sparsity` that only runs with this kind in scope read

    def reads_drift(self, sparsity: Any) -> bool:
        """Return whether units are chosen on text of `--corpora.drift`, with these settings of `--sparsity`."""
        return False

    def forward_passes(self, sparsity: Any, budget: Budget) -> int:
        """Return how many forward passes the choice needs, over a window of each of `--corpora.drift`."""
        return 0

    def describe(self, budget: Budget) -> str:
        """Return what a dry run prints about these units in a budget; empty if the widths say it."""
        return ""


UNITS: dict[str, Unit] = {"attention": Unit(), "ffn": Unit()}


def units_in(scope: str) -> dict[str, Unit]:
    """Return the kinds of units in a `--sparsity.scope`, by name."""
    return {name: UNITS[name] for name in scope.split("+")}
