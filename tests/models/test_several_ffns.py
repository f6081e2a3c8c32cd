"""Layers with several FFNs, such as experts and a shared expert. Each FFN is a block, and a removed layer loses all."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
import torch

from experiments.architectures import example
from gprune.importance.scores import score_units
from gprune.method.dry_run import describe_unpruned
from gprune.models.agreement import random_masks
from gprune.models.families import decoder_layers
from gprune.models.surgery import kept_layers, slice_model
from gprune.models.units import units_by_layer, units_of
from gprune.recoveries import RECOVERY
from gprune.recoveries.contract import Material
from gprune.sparsity.allocation import allocate
from gprune.sparsity.budget import budget_of
from gprune.sparsity.whole_blocks import choose_layers
from tests import tiny_run
from tests.world import collect, units_of_kind

IDS = torch.randint(3, 100, (4, 24), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def shared_expert_model(tmp_path_factory):
    """A tiny Qwen2-MoE: three layers, each with four experts and a gated shared expert."""
    with tiny_run.isolated(tmp_path_factory.mktemp("cache")):
        return example("qwen2_moe")


BATCH = {"input_ids": IDS, "index": torch.arange(4)}


def logits(model, ids=IDS) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def test_statistics_of_a_shared_expert_count_all_tokens_and_least_squares_fits_it_to_its_dense_output(
    shared_expert_model,
):
    """W_K + (y - W_K x) x^T (x x^T + lambda)^-1 in float64, with all tokens x (n, kept) and y (n, H)."""
    ridge, inputs, handles = 0.05, [], []
    for layer in decoder_layers(shared_expert_model):
        down = layer.mlp.shared_expert.down_proj
        handles.append(down.register_forward_pre_hook(lambda _m, x: inputs.append(x[0].double().flatten(0, -2))))
    logits(shared_expert_model)
    for handle in handles:
        handle.remove()
    statistics = collect(shared_expert_model, [BATCH], gram=True)
    assert len(statistics.channels) == 2 * len(statistics.turned) == 12
    masks = random_masks(shared_expert_model)
    small = slice_model(shared_expert_model, masks)
    revise = RECOVERY["least_squares"].revise(Material(shared_expert_model, masks, ridge=ridge, statistics=statistics))
    for of_layer in kept_layers(shared_expert_model, small, masks):
        revise(*of_layer)
    for index, x in enumerate(inputs):
        moments = statistics.channels[f"neurons.{2 * index + 1}"].total  # the second block of the layer
        torch.testing.assert_close(moments.sum_sq, x.square().sum(0), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(moments.gram.double(), x.T @ x, rtol=1e-4, atol=1e-4)
        assert moments.count == IDS.numel()
        path, keep = f"model.layers.{index}.mlp.shared_expert.down_proj", masks.ffn[2 * index + 1]
        dense = shared_expert_model.get_submodule(path).weight.double()
        W, kept = dense[:, keep], x[:, keep]
        gram = kept.T @ kept
        damped = gram + ridge * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
        expected = W + torch.linalg.solve(damped, kept.T @ (x @ dense.T - kept @ W.T)).T
        recovered = small.get_submodule(path).weight.double()
        torch.testing.assert_close(recovered, expected, atol=1e-4 * float(expected.abs().max()), rtol=0)


def test_whole_layers_of_two_blocks_are_chosen_by_the_loss_without_them(shared_expert_model):
    units = units_of(shared_expert_model)
    kinds = [(u.kind, u.number, u.rows) for u in units_by_layer(shared_expert_model)[1][1:] if u.count]
    assert sorted(kinds) == [("experts", 2, 1), ("kv_groups", 2, 1), ("neurons", 2, 4), ("neurons", 3, 1)]
    assert budget_of(units, 0.3, scope="ffn", protect=[-1]).protected == {2}
    costs = [u.parameters for u in units if u.kind == "layer"]
    share = (costs[0] + 1) / sum(costs)
    budget = budget_of(units, share, scope="ffn+blocks", block_share=1.0)
    candidates = []

    def loss(removed: list[int]) -> float:
        candidates.append(tuple(removed))
        return -sum(removed)

    assert choose_layers(budget, loss) == [2]
    assert candidates == [(0,), (1,), (2,)]
    # The target allows to remove only one layer, so layer 0 remains.
    assert budget.without([1, 0]).removed == (1,)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("rule", ["uniform", "global", "owl"])
def test_allocations_meet_the_budget_with_layers_without_an_ffn(rule):
    model = example("nemotron_h")  # Mamba, attention or FFN
    statistics = collect(model, [BATCH])
    counts = ([u.count > 0 for u in units_of_kind(model, kind)] for kind in ("neurons", "kv_groups"))
    assert set(zip(*counts, strict=True)) == {(True, False), (False, True), (False, False)}
    budget = budget_of(units_of(model), 0.3, scope="attention+ffn")
    settings = SimpleNamespace(sparsity=SimpleNamespace(scope="attention+ffn"))
    described = describe_unpruned(SimpleNamespace(budget=budget, skeleton=model, cfg=settings))
    assert re.search(r"\d of \d layers, without units that can be removed", described)
    scores = score_units("wanda_sp", model, statistics, scope=("neurons", "kv_groups"))
    masks = allocate(rule, scores, statistics, decoder_layers(model), budget)
    removed = model.num_parameters() - slice_model(model, masks).num_parameters()
    assert 0 <= removed - budget.target < budget.largest_step
