"""Parse `--sparsity.target`: a share, a size, a speedup or a quality, as exact numbers."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from fractions import Fraction
from typing import Annotated

from pydantic import BeforeValidator

from gprune.checks import shown
from gprune.errors import UserError

FORM = re.compile(r"([0-9]{1,15}(?:\.[0-9]{1,9})?)(%|x|[KMB]|[KMG]i?B|)")
QUALITY = re.compile(r"\+([0-9]{1,4}(?:\.[0-9]{1,9})?)%")
WORST = 1000  # largest rise of perplexity over dense, in percent
SIZES = {f"{letter}{i}B": base**n for i, base in (("", 1000), ("i", 1024)) for n, letter in enumerate("KMG", start=1)}
LEFT = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9} | SIZES
HALF_BITS = 16  # unit of budgets in bytes, 1/16 byte: GGUF's q8_0 has 8.5 bits per weight
FORMS = (
    "a share of the scope between 0 and 1, a share of all parameters such as 30%, what is left such as 95M or 200MiB, "
    "a speedup such as 1.4x, or a rise in perplexity such as +5% (at most +1000%)"
)


@dataclass(frozen=True)
class Target:
    """A parsed target: how much of a model's cost is to be removed."""

    asked: float | str  # the value in the settings
    number: Fraction  # share to remove, size to keep, speedup, or rise of perplexity as a share
    unit: str  # `share` of scope, `%` of model, `x`, `parameters` or `bytes` to keep, `quality`

    @classmethod
    def of(cls, asked: float | str) -> Target:
        """Parse a number or text. Raise UserError for anything else than a target."""
        if type(asked) in (int, float) and 0 < asked < 1:
            return cls(asked, Fraction(str(asked)), "share")  # exact decimal: 0.1 of 30 is 3
        if isinstance(asked, str) and (rise := QUALITY.fullmatch(asked)) and 0 < Fraction(rise[1]) <= WORST:
            return cls(asked, Fraction(rise[1]) / 100, "quality")
        parts = FORM.fullmatch(str(asked) if type(asked) in (int, str) else "")
        number, unit = (Fraction(parts[1]), parts[2]) if parts else (Fraction(0), "%")
        if unit in LEFT and (left := number * LEFT[unit]) >= 1000:
            return cls(str(asked), left, "bytes" if unit in SIZES else "parameters")
        if (unit == "%" and 0 < number < 100) or (unit == "x" and 1 < number <= 1000):
            return cls(asked, number / (100 if unit == "%" else 1), unit)
        raise UserError(f"--sparsity.target must be {FORMS}; got {shown(asked)}.")

    def removes(self, scope: int, model: int) -> int:
        """Return the cost to be removed, rounded up, from the costs of scope and model."""
        if self.unit in ("share", "%"):
            return math.ceil(self.number * (scope if self.unit == "share" else model))
        left = {"x": model / self.number, "bytes": self.number * HALF_BITS}.get(self.unit, self.number)
        return model - math.floor(left)

    def limit(self, most: int, scope: int, model: int) -> str:
        """Return the limit of the target in its unit, such as "at most 0.9", if at most `most` can be removed."""
        left = model - most
        if self.unit in ("parameters", "bytes"):
            return f"at least {left:,}" if self.unit == "parameters" else f"at least {left / HALF_BITS / 2**20:.1f}MiB"
        x = f"{100 * model // max(left, 1) / 100:.2f}x" if self.unit == "x" else f"{most / model:.2%}"
        return f"at most {most / max(scope, 1):.4f}" if self.unit == "share" else f"at most {x}"


Asked = Annotated[float | str, BeforeValidator(lambda asked: Target.of(asked).asked)]  # the type of the setting
