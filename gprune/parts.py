"""The interface of the parts of a run: what plan, settings, dry run and command line know about a feature.

A part is a value of a flag: a metric, an allocation, the unit of a target, whole blocks, a recovery. All loops are over
the parts that a run uses (`RunConfig.parts`), and no loop names a feature.
"""

from __future__ import annotations

from typing import Any

Tokens = dict[int, tuple[int, int]]  # step of the method -> (forward, forward and backward)


class Part:
    """Base class of parts. A function or class that is registered without this base has the defaults of this class."""

    # Flags that only some parts read, by name: `ridge`, `sparsity.start`, or `distill` for a group. A flag that another
    # part of the same choice reads, and no part of the run, is listed under "Ignored flags". `corpora.ROLE` is also how
    # a part asks for the text of a role.
    reads: frozenset[str] = frozenset()
    needs: frozenset[str] = frozenset()  # statistics of the dense model beyond moments, or `text`

    def refuse_settings(self, cfg: Any) -> None:
        """Raise UserError for settings (`RunConfig`) that this part cannot work with; called before imports."""

    def refuse(self, plan: Any) -> None:
        """Raise UserError for a model that this part cannot work with.

        `plan.skeleton` is the dense model without weights; `plan.cfg` and `plan.budget` are set.
        """

    def planned_tokens(self, plan: Any) -> Tokens:
        """Return the largest numbers of tokens that pass through the model because of this part, by step."""
        return {}

    def lines(self, plan: Any) -> dict[str, str]:
        """Return the lines of `--dry_run` about this part: title -> text."""
        return {}


DEFAULTS = Part()


def attribute(part: Any, name: str) -> Any:
    """Return an attribute of a part, by default that of `Part`."""
    return getattr(part, name, getattr(DEFAULTS, name))
