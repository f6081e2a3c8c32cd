"""A tiny random Llama without downloads, its statistics, and the number of its hooks."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from gprune.calibration.collector import Collector
from gprune.calibration.statistics import CorpusStatistics


def make_tiny_llama(**overrides) -> LlamaForCausalLM:
    """Return a random Llama with grouped-query attention (4 query heads, 2 KV groups), in float32, frozen."""
    settings = {
        "vocab_size": 128,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 256,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        # With the usual 0.02, the logits of a random model hardly depend on the FFN.
        "initializer_range": 0.25,
    } | overrides
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**settings)).eval().requires_grad_(False)


def collect(
    model: PreTrainedModel, batches: Iterable[dict[str, torch.Tensor]], *, gram: bool = False, saliency=(),
    routing: bool = False,
) -> CorpusStatistics:  # fmt: skip
    """Return the statistics of a corpus from one pass over its batches.

    Args:
        batches: with `input_ids` (B, T), optionally `weight` (B,), and the half of each window in `half` (B,); without
            `half`, windows alternate between halves by their `index` (B,).
    """
    with Collector(model, gram=gram, saliency=saliency, routing=routing) as collector:
        for batch in batches:
            half = batch["half"] if "half" in batch else batch["index"] % 2
            collector.observe(batch["input_ids"], half, batch.get("weight"))
    return collector.compute()


def hooks_of(model: torch.nn.Module) -> int:
    """Return the number of forward hooks and forward pre-hooks of all modules."""
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())
