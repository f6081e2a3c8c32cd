"""Layer-by-layer calibration gives the same bits as a pass through the whole decoder, for every family."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gprune.calibration import OUTPUT_PROJECTIONS
from gprune.calibration import layerwise as walking
from gprune.calibration.layerwise import Walk
from gprune.calibration.statistics import CorpusStatistics, StoredGram, gram_bytes, pool_statistics
from gprune.errors import UserError
from gprune.models.blocks import blocks_of
from gprune.models.masks import masked
from gprune.storage.files import read_tensors, write_tensors
from tests import tiny_run
from tests.tiny_families import TYPES, make_tiny, some_masks
from tests.tiny_llama import collect


def batches(seed: int = 1) -> list[dict[str, torch.Tensor]]:
    """Windows 0 to 9 in batches of 4, 4 and 2, longer than the sliding window. Window 6 has weight 0."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 128, (10, 24), generator=generator)
    weight = torch.ones(10)
    weight[6] = 0
    parts = zip(ids.split(4), torch.arange(10).split(4), weight.split(4), strict=True)
    return [{"input_ids": part, "index": index, "weight": weights} for part, index, weights in parts]


def walk_over(model: torch.nn.Module, text: list[dict[str, torch.Tensor]]) -> Walk:
    """A layerwise pass over batches, whose halves alternate by window."""
    walk = Walk(model)
    for batch in text:
        walk.add(batch["input_ids"], batch["index"] % 2, batch["weight"])
    return walk


def assert_same_bits(one: CorpusStatistics, two: CorpusStatistics) -> None:
    a, b = one.tensors(), two.tensors()
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


@pytest.mark.parametrize("family", TYPES)
def test_layerwise_statistics_equal_those_of_whole_forward_passes_bit_for_bit(family):
    model = make_tiny(family)
    expected = collect(model, batches(), gram=True)
    assert_same_bits(walk_over(model, batches()).statistics(gram=True), expected)
    assert float(expected.attention[0].total.count) == 9 * 24
    assert not any("forward" in module.__dict__ for module in model.modules())  # no patched forward remains


@pytest.mark.parametrize("family", TYPES)
def test_layerwise_logits_equal_the_models_with_and_without_masks(family):
    model, batch = make_tiny(family), batches()[0]["input_ids"]
    walk = Walk(model)
    walk.add(batch)
    assert torch.equal(next(walk.logits()), model(batch, use_cache=False).logits)
    with masked(model, some_masks(model, attention=True)):
        walk = Walk(model)
        walk.add(batch)
        logits = next(walk.logits())
        assert torch.equal(logits, model(batch, use_cache=False).logits)
    assert not torch.equal(logits, model(batch, use_cache=False).logits)


def test_attention_masks_and_position_embeddings_are_stored_once_for_all_batches():
    def num_stored_tensors(walk: Walk) -> int:
        return len({id(tensor) for pool in walk._pool.values() for tensor in pool})

    model = make_tiny("gemma2")  # two kinds of layers
    one_batch, five_batches = walk_over(model, batches()[:1]), walk_over(model, batches()[:1] * 5)
    assert num_stored_tensors(five_batches) == num_stored_tensors(one_batch)


def test_layers_are_restored_after_an_exception():
    model = make_tiny("llama")
    handle = model.model.layers[1].mlp.register_forward_pre_hook(lambda *_: 1 / 0)
    walk = walk_over(model, batches())
    with pytest.raises(ZeroDivisionError):
        walk.statistics()
    handle.remove()
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    assert_same_bits(walk_over(model, batches()).statistics(), collect(model, batches()))


# --- Gram matrices in files


def statistics_with_stored_grams(model, tmp_path: Path, seed: int) -> CorpusStatistics:
    """Layerwise statistics with Gram matrices in files, one file for each block and kind of projection."""

    def store(block, grams):
        paths = {kind: tmp_path / f"{seed}-{kind}-{block.index}.safetensors" for kind in grams}
        for kind, gram in grams.items():
            write_tensors(paths[kind], {"gram": gram})
        return {kind: StoredGram((path,)) for kind, path in paths.items()}

    return walk_over(model, batches(seed)).statistics(gram=True, store=store)


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_gram_matrices_read_from_files_equal_those_in_memory(family, tmp_path):
    model = make_tiny(family)
    in_files = [statistics_with_stored_grams(model, tmp_path, seed) for seed in (1, 2, 3)]
    in_memory = [collect(model, batches(seed), gram=True) for seed in (1, 2, 3)]
    pooled = pool_statistics(in_files), pool_statistics(in_memory)
    for one, two in [*zip(in_files, in_memory, strict=True), pooled]:
        for kind in OUTPUT_PROJECTIONS:
            for mine, theirs in zip(getattr(one, kind), getattr(two, kind), strict=True):
                assert isinstance(mine.gram, StoredGram)
                assert torch.equal(mine.total.gram, theirs.gram)
                if theirs.gram.dim() == 3:  # one matrix per expert
                    assert torch.equal(mine.total.of_expert(2, 4).gram, theirs.gram[2])


def test_a_missing_gram_matrix_file_raises_a_user_error(tmp_path):
    statistics = statistics_with_stored_grams(make_tiny("llama"), tmp_path, 1)
    (tmp_path / "1-ffn-1.safetensors").unlink()
    assert statistics.ffn[1].total is not None  # the file is read on access of `gram` only
    with pytest.raises(UserError, match=r"1-ffn-1\.safetensors is missing or incomplete.*Run the same command again"):
        _ = statistics.ffn[1].total.gram


def test_gram_bytes_equals_the_size_of_the_gram_tensors():
    for family in ("llama", "mixtral"):
        model = make_tiny(family)
        tensors = collect(model, batches(), gram=True).tensors()
        assert gram_bytes(blocks_of(model)) == sum(t.nbytes for name, t in tensors.items() if name.endswith("gram"))


# --- whole runs


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    yield from tiny_run.world_with_cache(tmp_path_factory.mktemp("world"))


FLAGS = [
    "--recovery=least_squares", "--sparsity.scope=attention+ffn", "--gprune=false",
    "--corpora.num_samples=5",
]  # fmt: skip


@pytest.fixture(scope="module")
def ordinary(world, tmp_path_factory):
    return world.run(tmp_path_factory.mktemp("ordinary"), *FLAGS)


def assert_same_run(one, two) -> None:
    """Compare masks, losses and weights of two runs bit for bit."""
    assert one.masks == two.masks
    assert [r["nll"] for r in one.records] == [r["nll"] for r in two.records]
    for name, tensor in one.model.state_dict().items():
        assert torch.equal(two.model.state_dict()[name], tensor), name


@pytest.mark.slow
def test_a_run_with_gram_matrices_in_files_has_the_same_bits_also_from_a_damaged_cache(
    world, ordinary, tmp_path, monkeypatch
):
    monkeypatch.setattr(walking, "GRAMS_IN_MEMORY", 1)
    monkeypatch.setenv("GPRUNE_CACHE", str(tmp_path / "cache"))
    result = world.run(tmp_path, *FLAGS)
    assert_same_run(result, ordinary)
    grams = [path for path in (tmp_path / "cache" / "statistics").iterdir() if read_tensors(path).keys() == {"gram"}]
    assert len(grams) == 3 * 3 * 2  # corpora, blocks, kinds
    # The second run reads the statistics from the cache.
    with monkeypatch.context() as patch:
        patch.setattr(Walk, "add", lambda *_: pytest.fail("calibrated"))
        assert_same_run(world.run(tmp_path, *FLAGS, name="again"), ordinary)
    # The third run detects a damaged file in the cache and computes it again.
    whole = grams[0].read_bytes()
    grams[0].write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert_same_run(world.run(tmp_path, *FLAGS, name="once-more"), ordinary)
    assert grams[0].read_bytes() == whole
