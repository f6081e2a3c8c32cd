"""Fixtures of all tests.

Modules that import PyTorch are imported in functions, because pytest-xdist also loads this file in the process that
only distributes the tests.
"""

from __future__ import annotations

import os

# One thread for each test process, and for each process that a test starts: tiny models are not faster with two, and
# `-n auto` already starts one process per core.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import gc
import subprocess
import sys
from pathlib import Path

import hypothesis
import pytest

# Deadlines would depend on the load of the machine.
hypothesis.settings.register_profile("gprune", deadline=None, max_examples=40)
hypothesis.settings.load_profile("gprune")


def pytest_collectstart() -> None:
    """Import everything before the first test module, without garbage collection, which takes a quarter of the time.

    `tests.world` needs the registry of metrics as it is before any test registers one.
    """
    gc.disable()
    import gprune.method.prune  # noqa: F401
    import tests.world  # noqa: F401


def pytest_collection_finish() -> None:
    """Exclude imported objects from garbage collection, and let forked processes make their thread pool at once.

    Without this, traversing all objects of torch, transformers and lightning each time takes long.
    """
    gc.collect()
    gc.freeze()
    gc.enable()

    # PyTorch makes its thread pool again at the first use after a fork. Of two threads that load weights at once, one
    # could find no pool ("pool INTERNAL ASSERT FAILED"), so the only thread of the child makes it.
    if torch := sys.modules.get("torch"):
        os.register_at_fork(after_in_child=lambda: torch.set_num_threads(torch.get_num_threads()))


@pytest.fixture(scope="session", autouse=True)
def _quick_runs():
    """Let runs reload their export in this process and draw nothing, unless a test asks for it."""
    from tests import tiny_run

    with pytest.MonkeyPatch.context() as patch:
        tiny_run.quick(patch)
        yield


@pytest.fixture
def fresh_process(monkeypatch):
    """Reload exports in a fresh process, as for users."""
    monkeypatch.setattr("gprune.export.hf.subprocess", subprocess)


@pytest.fixture
def tiny_model():
    """Return a `LlamaForCausalLM`."""
    from tests.world import make_tiny_llama

    return make_tiny_llama()


@pytest.fixture
def token_batch():
    """(6, 32) int64 token ids."""
    import torch

    return torch.randint(3, 128, (6, 32), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Return a `tiny_run.World`: a tiny model and synthetic text on disk."""
    from tests import tiny_run

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
    from gprune.importance import IMPORTANCE
    from tests.world import restored

    with restored(IMPORTANCE):
        yield
