"""Check a record on a tiny model: masking by hooks and slicing must give the same logits."""

from __future__ import annotations

import logging
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from gprune.errors import first_line
from gprune.models.blocks import blocks_of
from gprune.models.discovery.probe import Probe
from gprune.models.experts import watch_experts
from gprune.models.families import Family
from gprune.models.gating import masked
from gprune.models.lookup import remember
from gprune.models.masks import Masks
from gprune.models.surgery import prune

log = logging.getLogger("gprune")
NOISE = 1e-4  # share of the largest logit that may be rounding; masks change types in transformers by 0.07 or more
SMALL = 1e-3  # allowed share of the change by a mask; types in transformers differ by at most 2e-5


@dataclass(frozen=True)
class Agreement:
    """Largest differences of logits, relative to the largest logit."""

    moved: float  # between masked and dense
    differs: float  # between masked and sliced

    @property
    def holds(self) -> bool:
        """Whether masked and sliced logits agree, and the mask has an effect."""
        return self.moved > NOISE and self.differs <= SMALL * self.moved


def agreement(probe: Probe, record: Family) -> Agreement:
    """Compare the masked and the sliced model by a record, with random masks."""
    remember(probe.model, record)
    masks = random_masks(probe.model)
    with masked(probe.model, masks):
        expected = probe.logits()
    sliced = probe.logits(model=prune(probe.model, masks))
    moved, differs = (float((other - expected).abs().max() / expected.abs().max()) for other in (probe.dense, sliced))
    return Agreement(moved, differs)


def agrees(probe: Probe, record: Family) -> bool:
    """Return whether a record is correct; False if slicing fails."""
    try:
        return agreement(probe, record).holds and watchers_get_tokens(probe)
    except Exception as error:
        log.debug("%s: %s", record, first_line(error))
        return False


def watchers_get_tokens(probe: Probe) -> bool:
    """Return whether watchers of experts are called with the correct tokens.

    A watcher zeroes activations from a given token on. Logits must change after this token, and not before.
    """
    experts = [block for block in blocks_of(probe.model) if block.has_experts]
    first = probe.ids.numel() * 3 // 4

    def only_before(x: Tensor, _expert: int, tokens: Tensor) -> Tensor:
        return x * (tokens < first)[:, None]

    with ExitStack() as watches:
        for block in experts:
            watches.callback(watch_experts(block.down.host, only_before, block.family.expert_down).remove)
        changed = (probe.logits() - probe.dense).abs().flatten(0, 1).amax(-1) > NOISE * probe.dense.abs().max()
    return not experts or bool(changed[first:].any() and not changed[:first].any())


def random_masks(model: PreTrainedModel, seed: int = 5) -> Masks:
    """Return masks that remove three or more neurons of each block, and one KV group of blocks that have several."""
    generator = torch.Generator().manual_seed(seed)
    ffn, attention = [], []
    for block in blocks_of(model):
        order = torch.rand(block.experts, block.neurons, generator=generator).argsort(1)
        ffn.append((order >= min(block.neurons - 1, 3 + block.index)).flatten())
        keep = torch.ones(block.kv_groups, dtype=torch.bool)
        if block.kv_groups > 1:
            keep[block.index % block.kv_groups] = False
        attention.append(keep)
    return Masks(ffn, attention)
