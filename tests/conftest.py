"""Fixtures and helpers of all tests: tiny random models without downloads."""

from __future__ import annotations

import os

# One thread for each test process, and for each process that a test starts: tiny models are not faster with two, and
# `-n auto` already starts one process per core.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import gc
import subprocess
from collections.abc import Iterable
from pathlib import Path

import hypothesis
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import gprune.method.prune  # noqa: F401 - import everything before `pytest_collection_finish`
from gprune.calibration.collector import Collector
from gprune.calibration.statistics import CorpusStatistics
from gprune.export import hf
from gprune.importance import IMPORTANCE
from tests import registries

# Deadlines would depend on the load of the machine.
hypothesis.settings.register_profile("gprune", deadline=None, max_examples=40)
hypothesis.settings.load_profile("gprune")


def pytest_collection_finish() -> None:
    """Exclude imported objects from garbage collection.

    Calibration collects garbage after each corpus. Without this, traversing all objects of torch, transformers and
    lightning each time takes 40 % of a tiny run.
    """
    gc.collect()
    gc.freeze()


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


@pytest.fixture(scope="session", autouse=True)
def _quick_runs():
    """Let runs reload their export in this process and draw nothing, unless a test asks for it."""
    from tests import tiny_run  # imported here, because it imports this module

    with pytest.MonkeyPatch.context() as patch:
        tiny_run.quick(patch)
        yield


@pytest.fixture
def fresh_process(monkeypatch):
    """Reload exports in a fresh process, as for users."""
    monkeypatch.setattr(hf, "subprocess", subprocess)


@pytest.fixture
def tiny_model() -> LlamaForCausalLM:
    return make_tiny_llama()


@pytest.fixture
def token_batch() -> torch.Tensor:
    """(6, 32) int64 token ids."""
    return torch.randint(3, 128, (6, 32), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Return a `tiny_run.World`: a tiny model and synthetic text on disk."""
    from tests import tiny_run  # imported here, because it imports this module

    return tiny_run.make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    """Return the cache folder for the runs of a module."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def shared_cache(cache):
    """Share one cache among the runs of a module, so each kind of statistics is collected once."""
    from tests import tiny_run

    with tiny_run.isolated(cache):
        yield


@pytest.fixture
def scratch_registry():
    """Remove metrics that a test registers after the test."""
    with registries.restored(IMPORTANCE):
        yield
