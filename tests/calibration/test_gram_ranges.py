"""Gram matrices beyond memory, collected over ranges of layers and read from files, have the bits of one pass."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from gprune.calibration.collector import Collector
from gprune.calibration.statistics import (
    CorpusStatistics,
    StatisticsCache,
    StoredGram,
    gram_bytes,
    pool_statistics,
    ranges_in_memory,
)
from gprune.errors import UserError
from gprune.method.plan import make_plan
from gprune.models.units import units_of
from gprune.storage.files import read_json, read_tensors
from tests import tiny_run
from tests.world import collect, make_tiny, make_tiny_llama


def batches(seed: int = 1) -> list[dict[str, torch.Tensor]]:
    """Windows 0 to 9 in batches of 4, 4 and 2, longer than the sliding window. Window 6 has weight 0."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 128, (10, 24), generator=generator)
    weight = torch.ones(10)
    weight[6] = 0
    parts = zip(ids.split(4), torch.arange(10).split(4), weight.split(4), strict=True)
    return [{"input_ids": part, "index": index, "weight": weights} for part, index, weights in parts]


def assert_same_bits(one: CorpusStatistics, two: CorpusStatistics) -> None:
    a, b = one.tensors(), two.tensors()
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


def assert_same_run(one, two) -> None:
    """Compare masks, losses and weights of two runs bit for bit."""
    assert one.masks == two.masks
    assert [r["nll"] for r in one.records] == [r["nll"] for r in two.records]
    for name, tensor in one.model.state_dict().items():
        assert torch.equal(two.model.state_dict()[name], tensor), name


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_statistics_of_ranges_are_together_those_of_one_pass(family):
    """Of moments, Gram matrices and gradients; with experts, of routing instead of gradients."""
    model = make_tiny(family)
    kinds = {"gram": True, "saliency": ("ffn", "attention")} if family == "llama" else {"gram": True, "routing": True}
    ranges = ranges_in_memory(units_of(model), gram_bytes(units_of(model)) // 2)
    assert len(ranges) > 1
    collected, whole = [], collect(model, batches(), **kinds)
    assert gram_bytes(units_of(model)) == sum(t.nbytes for name, t in whole.tensors().items() if name.endswith("gram"))
    for blocks in ranges:
        with Collector(model, blocks=blocks, **kinds) as collector:
            for batch in batches():
                collector.observe(batch["input_ids"], batch["index"] % 2, batch["weight"])
        collected.append(collector.compute())
    assert_same_bits(CorpusStatistics.of_ranges(collected), whole)


def test_ranges_have_whole_layers_and_fit_into_the_limit_unless_a_layer_does_not():
    units = [replace(u, layer=u.layer // 2) for u in units_of(make_tiny_llama(num_hidden_layers=6))]  # two blocks each
    of_layer = [gram_bytes([u for u in units if u.layer == layer]) for layer in range(3)]
    for limit, expected in (
        (1, [[0, 1], [2, 3], [4, 5]]), (sum(of_layer[:2]), [[0, 1, 2, 3], [4, 5]]), (sum(of_layer), [[*range(6)]]),
    ):  # fmt: skip
        assert ranges_in_memory(units, limit) == expected


# --- files


def store(model: torch.nn.Module, seeds: tuple[int, ...]) -> tuple[StatisticsCache, list[CorpusStatistics]]:
    """Store the Gram matrices of a text for each seed. Return the cache, and the statistics that read from it."""
    corpora = [str(seed) for seed in seeds]
    keys = [u.key for u in units_of(model) if u.kind in ("neurons", "kv_groups")]
    cache = StatisticsCache(dict(zip(corpora, corpora, strict=True)), {}, ("ffn",), keys)
    for corpus, seed in zip(corpora, seeds, strict=True):
        statistics = cache.store(corpus, collect(model, batches(seed), gram=True))
        cache.write(corpus, statistics, ["moments", "gram"])
    return cache, [cache.read(corpus, ["moments", "gram"]) for corpus in corpora]


def test_gram_matrices_read_from_files_equal_those_in_memory(tmp_path):
    model = make_tiny("mixtral")
    with tiny_run.isolated(tmp_path):
        _, in_files = store(model, (1, 2, 3))
        in_memory = [collect(model, batches(seed), gram=True) for seed in (1, 2, 3)]
        pooled = pool_statistics(in_files), pool_statistics(in_memory)
        for one, two in [*zip(in_files, in_memory, strict=True), pooled]:
            assert one.channels.keys() == two.channels.keys()
            for mine, theirs in ((one.channels[key], two.channels[key]) for key in two.channels):
                assert isinstance(mine.gram, StoredGram)
                assert torch.equal(mine.total.gram, theirs.gram)
                if theirs.gram.dim() == 3:  # one matrix per expert
                    assert torch.equal(mine.total.of_expert(2, 4).gram, theirs.gram[2])


def test_a_missing_gram_matrix_file_raises_a_user_error(tmp_path):
    with tiny_run.isolated(tmp_path):
        cache, (statistics,) = store(make_tiny("llama"), (1,))
        channels = statistics.channels["neurons.1"]
        channels.gram.paths[0].unlink()
        assert channels.total is not None  # the file is read on access of `gram` only
        with pytest.raises(UserError, match=r"is missing or incomplete. Remove it, and run again"):
            _ = channels.total.gram
        assert cache.read("1", ["gram"]) is None


# --- whole runs


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    yield from tiny_run.world_with_cache(tmp_path_factory.mktemp("world"))


FLAGS = [
    "--recovery=least_squares", "--sparsity.scope=attention+ffn", "--gprune=false", "--corpora.num_samples=5",
]  # fmt: skip


def test_a_run_with_gram_matrices_beyond_max_memory_has_the_same_bits(world, tmp_path, monkeypatch):
    """Three layers are collected in passes of two and one. With --model.device_map cpu no weights are offloaded."""
    ordinary = world.run(tmp_path, *FLAGS)
    limit = gram_bytes([u for u in units_of(make_plan(ordinary.config).skeleton) if u.layer < 2])
    flags = [*FLAGS, "--model.device_map=cpu", f"--model.max_memory={{cpu: {limit}B}}"]
    monkeypatch.setenv("GPRUNE_CACHE", str(tmp_path / "cache"))
    result = world.run(tmp_path, *flags, name="ranges")
    assert_same_run(result, ordinary)
    passes = [read_json(tmp_path / name / "manifest.json")["steps"]["calibrate"] for name in ("run", "ranges")]
    assert passes[1]["forward_tokens"] == 2 * passes[0]["forward_tokens"]
    assert result.summary["forward_tokens"] <= make_plan(result.config).forward_tokens

    grams = [path for path in (tmp_path / "cache" / "statistics").iterdir() if read_tensors(path).keys() == {"gram"}]
    assert len(grams) == 3 * 3 * 2  # corpora, blocks, kinds of units
    # The second run reads the statistics from the cache.
    with monkeypatch.context() as patch:
        patch.setattr(Collector, "observe", lambda *_: pytest.fail("calibrated"))
        assert_same_run(world.run(tmp_path, *flags, name="again"), ordinary)
    # The third run finds that a file is missing and computes it again.
    whole = grams[0].read_bytes()
    grams[0].unlink()
    assert_same_run(world.run(tmp_path, *flags, name="once-more"), ordinary)
    assert grams[0].read_bytes() == whole
