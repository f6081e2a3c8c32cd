"""The interface of features: what plan, settings, dry run and command line know about a choice that a run makes.

A feature is a metric, an allocation, the unit of a target, a currency, whole blocks, a recovery or a kind of
statistics. Settings and command line loop over the features of a run (`RunConfig.features`), plan, dry run and summary
over these and the statistics that they need (`Plan.features`). They never name one. Export formats and stages are no
features: `export/convert.py` and `registry.py` have their interfaces.
`plan` is a `method.plan.Plan`, `cfg` a `RunConfig`, and `run` a `method.run.Run`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Tokens = dict[int, tuple[int, int]]  # step of the method -> (forward, forward and backward)


class Feature:
    """Base class of features. A function or class that is registered without this base has these defaults.

    A function overrides a default by an attribute of this name, as `sparsity.allocation.allocation` sets them.
    """

    # Flags that this feature reads and other values of the same choice may not: `ridge`, or `distill` for a group. They
    # are "Ignored flags" if the chosen value does not read them. With one such as `corpora.recover` a feature gets that
    # text.
    reads: frozenset[str] = frozenset()
    also_reads: frozenset[str] = frozenset()  # flags that it reads, even if another choice would have them ignored
    needs_narrower = False  # whether it changes nothing where whole experts are removed and no single neurons or groups
    needs: frozenset[str] = frozenset()  # statistics of the dense model that it reads, such as `gram`, or `text`

    def identity(self, cfg: Any) -> dict[str, Any]:
        """Return settings, by group, that identify a run only because of this feature."""
        return {}

    def refuse_settings(self, cfg: Any) -> None:
        """Raise UserError for settings (`RunConfig`) that this feature cannot work with; called before imports."""

    def refuse(self, plan: Any) -> None:
        """Raise UserError for a model that this feature cannot work with.

        `plan.skeleton` is the dense model without weights; `plan.cfg` and `plan.budget` are set.
        """

    def budget_of(self, pricing: Any, make: Any) -> Any:
        """Return the function that makes the budget with this feature, from `make`. UserError if that is impossible.

        `make` is a functools.partial of `Budget.of`. `pricing` is a `method.plan.Pricing`.
        """
        return make

    def planned_tokens(self, plan: Any) -> Tokens:
        """Return the largest numbers of tokens that pass through the model because of this feature, by step."""
        return {}

    def lines(self, plan: Any) -> dict[str, str]:
        """Return the lines of `--dry_run` about this feature: title -> text."""
        return {}

    def add_scores(self, run: Any, scores: Any, statistics: Any) -> Any:
        """Return the `importance.scores.Scores`, with those of units that only this feature removes."""
        return scores

    def after_scoring(self, run: Any, scores: Any, statistics: Sequence[Any]) -> None:
        """Read the `importance.scores.Scores` of the run's own model, and the statistics by corpus behind them."""

    def summary(self, run: Any, masks: Any, pruned: Any) -> dict[str, Any]:
        """Return entries of the summary of a finished run."""
        return {}


DEFAULTS = Feature()


def attribute(feature: Any, name: str) -> Any:
    """Return an attribute of a feature, by default that of `Feature`."""
    return getattr(feature, name, getattr(DEFAULTS, name))
