"""Parse `--sparsity.target`: a share, a size, a speedup or a quality, as exact numbers."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from fractions import Fraction
from typing import Annotated

from pydantic import BeforeValidator

from gprune.checks import format_value
from gprune.errors import UserError

NUMBER_AND_UNIT = re.compile(r"([0-9]{1,15}(?:\.[0-9]{1,9})?)(%|x|[KMB]|[KMG]i?B|)")
QUALITY = re.compile(r"\+([0-9]{1,4}(?:\.[0-9]{1,9})?)%")
MAX_RISE = 1000  # largest rise of perplexity over dense, in percent
BYTE_UNITS = {
    f"{letter}{infix}B": base**power
    for infix, base in (("", 1000), ("i", 1024))
    for power, letter in enumerate("KMG", start=1)
}
KEPT_UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9} | BYTE_UNITS  # units of a size that is kept
MIN_KEPT = 1000  # smallest size that may be kept, in parameters or bytes
MAX_RATIO = 1000  # largest speedup
CUTS = 1000  # largest number of cuts among which the search for a target in quality bisects
LEARNING_CUTS = 100  # the same for the search for the share at which thresholds are learned
HALF_BITS_PER_BYTE = 16  # byte budgets are counted in half-bits, because q8_0 takes 8.5 bits per weight
SHARE_OF_SCOPE = re.compile(r"(.+%)([a-z+]+)")  # 30%ffn is 0.3 with --sparsity.scope ffn
FORMS = (
    "a share of the scope such as 30%ffn or 0.3, a share of all parameters such as 30%, what is left such as 95M or "
    "200MiB, a speedup such as 1.4x, or a rise in perplexity such as +5% (at most +1000%)"
)


def format_cost(cost: int, currency: str) -> str:
    """Return a cost in words, such as "700,416 bytes". Costs in bytes are given in half-bits, rounded down here."""
    number = cost // HALF_BITS_PER_BYTE if currency == "bytes" else cost
    return f"{number:,} {currency.replace('_', ' ')}"


@dataclass(frozen=True)
class Target:
    """A parsed target: how much of a model's cost is to be removed."""

    setting: float | str  # the value of `--sparsity.target`
    number: Fraction  # share to remove, size to keep, speedup, or rise of perplexity as a share
    unit: str  # `share` of scope, `%` of model, `x`, `parameters` or `bytes` to keep, `quality`

    @classmethod
    def of(cls, setting: float | str) -> Target:
        """Parse a value of `--sparsity.target`."""
        # `type` and not `isinstance`, because a bool is an int.
        if type(setting) in (int, float) and 0 < setting < 1:
            return cls(setting, Fraction(str(setting)), "share")  # exact decimal: 0.1 of 30 is 3
        if isinstance(setting, str) and (rise := QUALITY.fullmatch(setting)) and 0 < Fraction(rise[1]) <= MAX_RISE:
            return cls(setting, Fraction(rise[1]) / 100, "quality")
        match = NUMBER_AND_UNIT.fullmatch(str(setting)) if type(setting) in (int, str) else None
        if match is not None:
            number, unit = Fraction(match[1]), match[2]
            if unit in KEPT_UNITS and number * KEPT_UNITS[unit] >= MIN_KEPT:
                kind = "bytes" if unit in BYTE_UNITS else "parameters"
                return cls(str(setting), number * KEPT_UNITS[unit], kind)
            if unit == "%" and 0 < number < 100:
                return cls(setting, number / 100, unit)
            if unit == "x" and 1 < number <= MAX_RATIO:
                return cls(setting, number, unit)
        raise UserError(f"--sparsity.target must be {FORMS}; got {format_value(setting)}.")

    @property
    def is_searched(self) -> bool:
        """Whether the run finds out how much is removed: the largest cut that keeps the quality."""
        return self.unit == "quality"

    def removes(self, scope: int, model: int) -> int:
        """Return the cost to remove, rounded up, from the costs of the scope and of the model."""
        if self.unit == "share":
            return math.ceil(self.number * scope)
        if self.unit == "%":
            return math.ceil(self.number * model)
        if self.unit == "x":
            kept = model / self.number
        elif self.unit == "bytes":
            kept = self.number * HALF_BITS_PER_BYTE
        else:
            kept = self.number
        return model - math.floor(kept)

    def limit(self, removed: int, scope: int, model: int, *, least: bool = False) -> str:
        """Return the limit of targets in this one's unit, such as "at most 0.9".

        `removed` is the largest cost that can be removed or, with `least`, the smallest.
        """
        kept = model - removed
        if self.unit in ("parameters", "bytes"):
            bound = "at most" if least else "at least"
            mebibytes = kept / HALF_BITS_PER_BYTE / 2**20
            return f"{bound} {kept:,}" if self.unit == "parameters" else f"{bound} {mebibytes:.1f}MiB"
        bound = "at least" if least else "at most"
        if self.unit == "x":
            hundredths = 100 * model // max(kept, 1) + least  # rounded to the side of valid targets
            return f"{bound} {hundredths / 100:.2f}x"
        share = removed / max(scope if self.unit == "share" else model, 1)
        if least:
            share = math.ceil(10_000 * share) / 10_000
        return f"{bound} {share:.4f}" if self.unit == "share" else f"{bound} {share:.2%}"


def split_scope(setting: object) -> tuple[object, str]:
    """Return a target without the scope that its share is of, and this scope: 0.3 and `ffn` for `30%ffn`."""
    match = SHARE_OF_SCOPE.fullmatch(setting) if isinstance(setting, str) else None
    if match is None or (target := Target.of(match[1])).unit != "%":
        return setting, ""
    return float(target.number), match[2]


# The type of the setting: a value that `Target.of` accepts, in the form in which it is stored.
TargetSetting = Annotated[float | str, BeforeValidator(lambda setting: Target.of(split_scope(setting)[0]).setting)]
