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
# Both bounds were measured on all types in transformers: masks change logits by 0.07 or more of the largest logit, and
# masked and sliced models differ by at most 2e-5 of that change.
MIN_MASK_EFFECT = 1e-4  # relative to the largest logit; smaller changes may be rounding errors
MAX_SLICING_ERROR = 1e-3  # relative to the mask effect


@dataclass(frozen=True)
class Agreement:
    """Largest differences of logits, relative to the largest logit of the masked model."""

    mask_effect: float  # between the masked and the dense model
    slicing_error: float  # between the masked and the sliced model

    @property
    def holds(self) -> bool:
        """Whether the mask has an effect, and the masked and the sliced model agree."""
        has_effect = self.mask_effect > MIN_MASK_EFFECT
        return has_effect and self.slicing_error <= MAX_SLICING_ERROR * self.mask_effect


def compare_masked_and_sliced(probe: Probe, record: Family) -> Agreement:
    """Register `record` for the probe's model, and compare logits with random masks applied by hooks and slicing.

    The registration remains after the call. Weights of the model do not change.
    """
    remember(probe.model, record)
    masks = random_masks(probe.model)
    with masked(probe.model, masks):
        masked_logits = probe.logits()
    sliced_logits = probe.logits(model=prune(probe.model, masks))
    largest = masked_logits.abs().max()
    mask_effect = (probe.dense - masked_logits).abs().max() / largest
    slicing_error = (sliced_logits - masked_logits).abs().max() / largest
    return Agreement(float(mask_effect), float(slicing_error))


def is_correct(probe: Probe, record: Family) -> bool:
    """Return whether a record is correct, and register it for the probe's model.

    A record is correct if the masked and the sliced model agree and watchers of experts get the correct tokens. Any
    exception, such as a failed slicing, means that it is not.
    """
    try:
        return compare_masked_and_sliced(probe, record).holds and watchers_get_tokens(probe)
    except Exception as error:
        log.debug("%s: %s", record, first_line(error))
        return False


def watchers_get_tokens(probe: Probe) -> bool:
    """Return whether watchers of experts are called with the correct tokens; True without experts.

    A watcher sets activations to zero from a given token on. The logits of this or a later token must change, and those
    of earlier tokens must not.
    """
    blocks = [block for block in blocks_of(probe.model) if block.has_experts]
    first_zeroed = probe.ids.numel() * 3 // 4  # any position with tokens on both sides

    def zero_later_tokens(x: Tensor, _expert: int, tokens: Tensor) -> Tensor:
        """Watcher that sets activations to zero from token `first_zeroed` on."""
        return x * (tokens < first_zeroed)[:, None]

    with ExitStack() as watches:
        for block in blocks:
            watches.callback(watch_experts(block.down.host, zero_later_tokens, block.family.expert_down).remove)
        difference = (probe.logits() - probe.dense).abs().flatten(0, 1).amax(-1)  # (B x T,)
        is_changed = difference > MIN_MASK_EFFECT * probe.dense.abs().max()
    return not blocks or bool(is_changed[first_zeroed:].any() and not is_changed[:first_zeroed].any())


def random_masks(model: PreTrainedModel, share: float | None = None, seed: int = 5) -> Masks:
    """Return keep masks, random for neurons, which keep at least one neuron and one KV group of each block."""
    generator = torch.Generator().manual_seed(seed)
    ffn, attention = [], []
    for block in blocks_of(model):
        order = torch.rand(block.experts, block.neurons, generator=generator).argsort(1)
        neurons = 3 + block.index if share is None else int(share * block.neurons)
        ffn.append((order >= min(block.neurons - 1, neurons)).flatten())
        kv_groups = 1 if share is None else int(share * block.kv_groups)
        order = (torch.arange(block.kv_groups) - block.index) % max(1, block.kv_groups)  # other groups in each block
        attention.append(order >= min(block.kv_groups - 1, kv_groups))
    return Masks(ffn, attention)
