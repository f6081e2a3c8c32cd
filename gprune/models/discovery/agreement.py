"""Whether a record is right: a tiny model computes the same masked by hooks and sliced."""

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
NOISE = 1e-4  # of the largest logit: less may be rounding; types of transformers move by 0.07 and more
SMALL = 1e-3  # of what a mask changes: types of transformers differ by 2e-5 and less


@dataclass(frozen=True)
class Agreement:
    """Largest differences of logits, as shares of the largest logit."""

    moved: float  # masked and dense
    differs: float  # masked and sliced

    @property
    def holds(self) -> bool:
        """Whether masked and sliced differ by little of what the mask changes."""
        return self.moved > NOISE and self.differs <= SMALL * self.moved


def agreement(probe: Probe, record: Family) -> Agreement:
    """How far the masked and the sliced model agree, with random masks and by this record."""
    remember(probe.model, record)
    masks = random_masks(probe.model)
    with masked(probe.model, masks):
        expected = probe.logits()
    sliced = probe.logits(model=prune(probe.model, masks))
    moved, differs = (float((other - expected).abs().max() / expected.abs().max()) for other in (probe.dense, sliced))
    return Agreement(moved, differs)


def agrees(probe: Probe, record: Family) -> bool:
    """Whether a record is right; False where the model cannot be sliced by it at all."""
    try:
        return agreement(probe, record).holds and watchers_get_tokens(probe)
    except Exception as error:
        log.debug("%s: %s", record, first_line(error))
        return False


def watchers_get_tokens(probe: Probe) -> bool:
    """Whether watchers of experts are told which tokens their activations are of: nothing changes before the token from
    which on a watcher zeroes them, and something afterwards."""
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
    """Masks that remove a few neurons of each block, one more of each next one, and a KV group of each block that has
    several."""
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
