"""Units of a model, and a kind of unit from outside, which gprune does not know: value channels of a Llama."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

import gprune
from gprune.errors import UserError
from gprune.importance.scores import score_units
from gprune.models.masks import masked
from gprune.models.units import UNITS, units_of
from gprune.sparsity.budget import budget_of
from gprune.sparsity.cut import keep_masks
from gprune.units.structure import Slice, Units
from tests.world import collect, make_tiny_llama


def value_channels(model) -> list[Units]:
    """One set per layer: a row of v, and the columns of o by which the query heads of its KV group read it."""
    G, D = model.config.num_key_value_heads, model.config.head_dim
    channels = torch.arange(G * D)
    v = Slice("self_attn.v_proj.weight", 0, channels)
    o = Slice(
        "self_attn.o_proj.weight",
        1,
        channels.view(G, 1, D).expand(G, model.config.num_attention_heads // G, D).flatten(),
    )
    return [
        Units(f"value_channels.{i}", "value_channels", i, G * D, slices=(v, o), inputs=(v,), reads="self_attn.o_proj")
        for i in range(model.config.num_hidden_layers)
    ]


@pytest.fixture
def with_value_channels(monkeypatch):
    monkeypatch.setitem(UNITS, "llama", value_channels)
    return make_tiny_llama()


def test_a_fifth_kind_of_unit_is_scored_budgeted_cut_and_masked(with_value_channels, token_batch):
    model = with_value_channels
    statistics = collect(model, [{"input_ids": token_batch, "index": torch.arange(len(token_batch))}])
    scores = score_units("wanda_sp", model, statistics, scope=("value_channels",))
    for i, layer in enumerate(model.model.layers):
        # The reference: Wanda's score of each column of o, summed over the two query heads that share a value channel
        mean_sq = statistics.channels[f"kv_groups.{i}"].total.mean_sq.numpy()
        of_columns = np.sqrt(mean_sq) * np.abs(layer.self_attn.o_proj.weight.double().numpy()).sum(0)
        expected = of_columns.reshape(2, 2, 8).sum(1).flatten()
        mine = scores[f"value_channels.{i}"].numpy()
        np.testing.assert_allclose(mine, expected, rtol=1e-5)

    budget = budget_of(units_of(model), 0.25, scope="value_channels")
    cost = 32 + 2 * 32  # a row of v, and two columns of o
    assert budget.total == 3 * 16 * cost
    masks = keep_masks(budget, scores)
    removed = sum(int((~masks[f"value_channels.{i}"]).sum()) for i in range(3))
    assert (removed, budget.removed_by(masks)) == (12, 12 * cost)
    assert all(mask.all() for mask in (*masks.ffn, *masks.attention))
    order = torch.cat([scores[f"value_channels.{i}"] for i in range(3)]).argsort()
    assert not torch.cat([masks[f"value_channels.{i}"] for i in range(3)])[order[:12]].any()

    zeroed = make_tiny_llama()
    for i, layer in enumerate(zeroed.model.layers):
        layer.self_attn.v_proj.weight[~masks[f"value_channels.{i}"]] = 0
    with masked(model, masks):
        logits = model(token_batch).logits
    torch.testing.assert_close(logits, zeroed(token_batch).logits, rtol=1e-4, atol=1e-5)
    assert (logits - model(token_batch).logits).abs().max() > 0.01
    with pytest.raises(UserError, match=r"^Masks must keep all units of kind 'value_channels', which .*: modules of"):
        gprune.apply_masks(model, masks)


SHORT, UNKNOWN = torch.arange(15), torch.arange(16)


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (Slice("self_attn.v_proj.weight", 0, SHORT), "the unit, -1 to 15, of each of 16 indices of 'self_attn.v_proj"),
        (Slice("self_attn.v_proj.weight", 0, 1 + UNKNOWN), "got 16, from 1 to 16"),
        (Slice("self_attn.values.weight", 0, UNKNOWN), "tensors of layer 0; it has no 'self_attn.values.weight'"),
    ],
)
def test_slices_of_a_user_that_do_not_fit_the_model_are_refused(part, message, monkeypatch):
    def wrong(model) -> list[Units]:
        return [replace(u, slices=(part, *u.slices[1:])) for u in value_channels(model)]

    monkeypatch.setitem(UNITS, "llama", wrong)
    with pytest.raises(UserError, match=message):
        units_of(make_tiny_llama())
