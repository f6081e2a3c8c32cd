"""Compare the logits of a masked, a sliced and a reloaded model: they are one model, so they must be equal.

Every check of this fact is a call of `compare`: of a structure on a tiny copy (`gprune.discovery`), of a run's model
before step 1 and of its sliced model in step 9 (`gprune.method.save`), and of a folder in a fresh process
(`gprune.export.hf.check_reload`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from gprune.models.masks import Masks
from gprune.models.units import units_of
from gprune.units.structure import Units

# Limits for differences between logits of the masked and the sliced model, in standard deviations of the logits. Both
# models add the same terms in another order. The limit of float32 is for the largest difference. The limits of 16-bit
# types, which round after every operation, are for the root mean square. In bfloat16 we measured 0.02 to 0.2, largest
# in models that pruning has damaged, and 1.5e-5 with the same masks in float32. A wrong slice gives about 1.
LOGIT_LIMIT = {torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.5}
# Text in which tokenizers differ: digits, blanks, other scripts, code, contractions.
CHECK_TEXT = Path(__file__).with_name("check_text.txt").read_text(encoding="utf-8")


@dataclass(frozen=True)
class Difference:
    """Differences between logits of two models, and the scale of the logits of the first one.

    Each number is computed when it is read, because each one waits for the device.
    """

    expected: Tensor  # logits of the first model, float32
    difference: Tensor  # expected - logits of the second model

    @property
    def largest(self) -> float:
        """The largest difference; NaN if either model has NaN."""
        return float(self.difference.abs().max())

    @property
    def rms(self) -> float:
        """The root mean square of the differences."""
        return float(self.difference.square().mean().sqrt())

    @property
    def typical(self) -> float:
        """The root mean square of the differences of a token, median over tokens."""
        return float(self.difference.square().mean(-1).sqrt().median())

    def size(self, units: Sequence[Units]) -> float:
        """Return the root mean square of the differences; for mixtures of experts that of a typical token."""
        return self.typical if has_routers(units) else self.rms

    @property
    def std(self) -> float:
        """The standard deviation of the expected logits."""
        return float(self.expected.std())

    @property
    def peak(self) -> float:
        """The largest absolute value of the expected logits."""
        return float(self.expected.abs().max())


@torch.no_grad()
def compare(expected: Tensor, logits: Tensor) -> Difference:
    """Compare logits of two models for the same tokens, with equal shapes, and any dtypes and devices."""
    assert expected.shape == logits.shape, f"{tuple(expected.shape)} against {tuple(logits.shape)}"
    expected = expected.detach().float()
    return Difference(expected, expected - logits.detach().float().to(expected.device))


def has_routers(units: Sequence[Units]) -> bool:
    """Return whether a router sends tokens to experts in any layer."""
    return any(u.kind == "experts" for u in units)


def compared_windows(ids: Tensor, units: Sequence[Units]) -> Tensor:
    """Return token ids (1, T) for comparing logits; for mixtures of experts in windows of 16 tokens, (T // 16, 16).

    Rounding decides near ties between experts. The choice changes all later tokens of a window, so windows are short,
    and models are compared by a typical token.
    """
    if has_routers(units) and ids.shape[1] >= 16:
        return ids[:, : ids.shape[1] // 16 * 16].view(-1, 16)
    return ids


def random_masks(model: PreTrainedModel, *, share: float | None = None, scope: str = "attention+ffn") -> Masks:
    """Return keep masks, random for neurons, which keep at least one neuron and one KV group of each block.

    They remove a `share` of the units, or else one group and a few neurons, another number in each block. If whole
    experts are in `scope`, they also remove half of the experts, or as many as routers permit; without attention they
    keep all groups.
    """
    generator = torch.Generator().manual_seed(5)
    masks, units = Masks(), {u.key: u for u in units_of(model)}
    for u in units.values():
        if u.kind == "neurons":
            order = torch.rand(u.rows, u.count, generator=generator).argsort(1)
            removed = 3 + u.number if share is None else int(share * u.count)
            keep = order >= min(u.count - 1, removed)
            if "experts" in scope and u.rows > 1:
                experts = units[u.inside]
                groups, least = experts.step, experts.least // experts.step
                of_group = torch.rand(groups, u.rows // groups, generator=generator).argsort(1)
                keep &= (of_group < max(least, u.rows // groups // 2)).view(-1, 1)
            masks[u.key] = keep.flatten()
        elif u.kind == "kv_groups":
            removed = 1 if share is None else int(share * u.count)
            removed = removed if "attention" in scope else 0
            order = (torch.arange(u.count) - u.number) % max(1, u.count)  # other groups in each block
            masks[u.key] = order >= min(u.count - 1, removed)
    return masks
