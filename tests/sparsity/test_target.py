"""Targets in shares, parameters, bytes and other costs: which values are valid, and that each is met within a step."""

from __future__ import annotations

import re
from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gprune.cli import main
from gprune.config import RunConfig
from gprune.config.parse import parse
from gprune.errors import UserError
from gprune.importance.scores import score_units
from gprune.method.plan import make_plan
from gprune.models.families import decoder_layers
from gprune.models.surgery import slice_model
from gprune.models.units import units_of
from gprune.sparsity.allocation import allocate, checked_masks
from gprune.sparsity.budget import Budget, budget_of
from gprune.sparsity.cut import keep_masks
from gprune.sparsity.price import COST, Price, parameter_costs, price_of
from gprune.sparsity.target import HALF_BITS_PER_BYTE, Target
from tests.world import by_key, collect, make_tiny_llama, restored, units_without_model


@pytest.mark.parametrize(
    ("value", "unit", "number"),
    [
        (0.1, "share", Fraction(1, 10)), (1e-9, "share", Fraction(1, 10**9)), ("30%", "%", Fraction(3, 10)),
        ("95M", "parameters", 95 * 10**6), ("1.5B", "parameters", 15 * 10**8), (95000000, "parameters", 95 * 10**6),
        ("200MiB", "bytes", 200 * 2**20), ("1.5GB", "bytes", 15 * 10**8), ("3KiB", "bytes", 3072),
    ],
)  # fmt: skip
def test_targets_with_units_are_parsed_exactly(value, unit, number):
    target = Target.of(value)
    assert (target.unit, target.number) == (unit, number)
    assert Target.of(target.setting) == target
    parsed = parse(["--sparsity.target", str(value)]).sparsity.target
    assert parsed == (value if unit == "share" else str(value))


@pytest.mark.parametrize(
    ("flags", "target"),
    [("--sparsity.target 30%ffn", 0.3), ("--sparsity.target 12.5%ffn", 0.125),
     ("--sparsity.target 20%ffn+attention --sparsity.scope attention+ffn", 0.2),
     ("--sparsity.scope ffn+layers --sparsity.target 20%ffn+blocks", 0.2)],
)  # fmt: skip
def test_a_share_may_name_the_scope_that_it_is_of(flags, target):
    cfg = parse(flags.split())
    assert cfg.sparsity.target == target
    cfg.sparsity.target = "15%ffn"
    assert cfg.sparsity.target == 0.15


@pytest.mark.parametrize("target", ["30%attention+ffn", "30%model"])
def test_a_share_of_another_scope_is_refused(target):
    message = f"--sparsity.target must be a share of --sparsity.scope ffn; got {target}."
    with pytest.raises(UserError, match=re.escape(message)):
        parse(["--sparsity.target", target])


INVALID = [
    "-3M", "1e400", "200 MiB", "30 %", "0%", "100%", "half", "%", "M", "0M", "3", "1e3M", "٣M", "5TiB", "0x",
    "1x", "0.9x", "x", "2X",
]  # fmt: skip


@pytest.mark.parametrize("value", [*INVALID, 0, 1, 1.5, -1, True, None, [0.5], float("nan"), float("inf"), 10**20])
def test_invalid_targets_are_refused_in_one_line(value):
    with pytest.raises(UserError, match=r"\A--sparsity\.target must be a share .*; got .*\.\Z"):
        RunConfig(sparsity={"target": value})


# --- each cost is met within a step


@pytest.fixture(scope="module")
def scored():
    """A tiny model with 4 KV groups, its statistics and scores."""
    model = make_tiny_llama(num_key_value_heads=4)
    tokens = torch.randint(3, 128, (6, 32), generator=torch.Generator().manual_seed(1))
    statistics = collect(model, [{"input_ids": tokens, "index": torch.arange(6)}])
    return model, statistics, score_units("wanda_sp", model, statistics, scope=("neurons", "kv_groups"))


def costs_in(model, name: str, **weights) -> tuple[Price, int]:
    """Price of units, and of everything outside of them, by the cost `name` or with these `weights` of parameters."""
    units = units_of(model)
    return price_of(parameter_costs(model, units, **weights) if weights else COST[name](model, units), units)


def priced(model, costs: tuple[Price, int], value, *, scope: str = "attention+ffn", **options) -> Budget:
    price, outside = costs
    return budget_of(units_of(model), value, scope=scope, price=price, outside=outside, **options)


def irregular_costs(model) -> tuple[Price, int]:
    """Costs that increase with the width in irregular steps, some of which are zero."""
    generator = torch.Generator().manual_seed(3)

    def table(units: int) -> list[int]:
        return [0, *torch.randint(0, 90, (units,), generator=generator).cumsum(0).tolist()]

    units = units_of(model)
    price = {u.key: table(u.count) for kind in ("neurons", "kv_groups") for u in units if u.kind == kind}
    of_layers = {f"layer.{b}": [0, price[f"neurons.{b}"][-1] + price[f"kv_groups.{b}"][-1] + 7] for b in range(3)}
    return price | of_layers, 500


@pytest.mark.parametrize("rule", ["uniform", "global", "owl"])
@pytest.mark.parametrize("equal_widths", [False, True])
@pytest.mark.parametrize(("value", "cost"), [
    ("30%", "parameters"), ("24K", "parameters"), ("40KiB", "bytes"), (0.4, "kv_cache"), (0.4, "curved"),
    ("20%", "curved"),
])  # fmt: skip
def test_allocations_meet_targets_in_each_cost_within_a_step(value, cost, equal_widths, rule, scored):
    model, statistics, scores = scored
    size = {"weight": lambda p: HALF_BITS_PER_BYTE * (4 if p.ndim < 2 else 2)} if cost == "bytes" else {}
    costs = irregular_costs(model) if cost == "curved" else costs_in(model, cost, **size)
    for multiple in (1, 8):
        budget = priced(model, costs, value, width_multiple=multiple, uniform=equal_widths)
        masks = allocate(rule, scores, statistics, decoder_layers(model), budget)
        checked_masks(COST, rule, masks, budget)  # raises unless masks exceed the target by less than a step
        small = slice_model(model, masks)
        remaining, number = budget.model - budget.removed_by(masks), Target.of(value).number
        if cost == "bytes":
            half_bits = sum(p.numel() * size["weight"](p) for p in small.parameters())
            assert remaining == half_bits <= HALF_BITS_PER_BYTE * number
        if cost == "parameters":
            assert remaining == small.num_parameters() <= (number if value == "24K" else (1 - number) * budget.model)
        if cost == "kv_cache":
            assert all(bool(m.all()) for m in masks.ffn)  # neurons have no KV cache
        assert budget.parameters_removed_by(masks) == model.num_parameters() - small.num_parameters()


@settings(max_examples=60)
@given(data=st.data())
def test_masks_for_a_cost_by_width_equal_the_documented_rule(data):
    """One unit at a time, lowest margin first, until the tables' costs add up to the target."""
    neurons = data.draw(st.lists(st.integers(2, 12), min_size=1, max_size=3))
    tables = [[0, *torch.tensor(data.draw(st.lists(st.integers(0, 9), min_size=n, max_size=n))).cumsum(0).tolist()]
              for n in neurons]  # fmt: skip
    price = {f"kv_groups.{b}": [0, 0] for b in range(len(tables))}
    for b, table in enumerate(tables):
        price |= {f"neurons.{b}": table, f"layer.{b}": [0, table[-1]]}
    everything = budget_of([u for b, n in enumerate(neurons) for u in units_without_model(b, n)], price=price)
    max_target = everything.removable
    target = data.draw(st.integers(1, max_target)) if max_target else 0
    margins = [torch.tensor(data.draw(st.lists(st.integers(-3, 3), min_size=n, max_size=n))).double() for n in neurons]
    budget = replace(everything, target=target)
    masks = keep_masks(budget, by_key(margins))
    order = sorted((float(m[i]), b, i) for b, m in enumerate(margins) for i in range(len(m)))
    removed, spent = [[] for _ in neurons], 0  # indices of each block, cost
    for _, b, i in order:
        n = len(removed[b])
        if spent < target and n < neurons[b] - 1:
            spent += tables[b][-1 - n] - tables[b][-2 - n]
            removed[b].append(i)
    assert [(~m).nonzero()[:, 0].tolist() for m in masks.ffn] == list(map(sorted, removed))
    assert budget.removed_by(masks) == spent >= target


@pytest.mark.parametrize(
    ("value", "cost", "message"),
    [
        ("200M", "parameters", "cannot remove anything: the scope has 13,824 parameters, the model"),
        ("200MB", "bytes", "cannot remove anything: the scope has 27,648 bytes, the model 54,720 bytes"),
        (0.3, "kv_cache", "cannot remove anything: the scope has 0, the model 96"),
        ("90%", "parameters", r"must be at most \d\d\.\d\d%, .*; got 90%\."),
        ("2K", "parameters", r"must be at least \d+,\d{3}, .*; got 2K\."),
        ("30%", "kv_cache", r"must be at most 0\.00%, .*; got 30%\."),
    ],
)  # fmt: skip
def test_impossible_targets_are_refused_with_the_limit(value, cost, message, tiny_model):
    costs = costs_in(tiny_model, cost, **({"weight": lambda p: 2 * HALF_BITS_PER_BYTE} if cost == "bytes" else {}))
    with pytest.raises(UserError, match=f"^--sparsity.target .*{message}"):
        priced(tiny_model, costs, value, scope="ffn")


def test_a_registered_cost_is_counted_by_the_budget(scored):
    model, _, _ = scored
    with restored(COST):

        @COST.register("groups_alone")
        def groups_alone(model, units):
            return {u.key: 1 for u in units if u.kind == "kv_groups"}

        budget = priced(model, costs_in(model, "groups_alone"), "50%")
        masks = keep_masks(budget, by_key([torch.zeros(48)] * 3, [torch.arange(4.0)] * 3))
        assert [int(m.sum()) for m in masks.attention] == [2, 2, 2]
        assert RunConfig(sparsity={"target": 0.5, "cost": "groups_alone"}).sparsity.currency == "groups_alone"


@pytest.mark.parametrize(
    "costs",
    [
        1.5, {"neurons.0": 1.5}, {"neurons.0": 1, "layer.0": 4.5}, {"neurons.0": [0, 0.5]}, {"rest": 0.5},
        {"kv_groups.0": -1}, {"rest": -1}, {"neurons.0": [0, 1, 2]}, {"neurons.00": 1},
    ],
)  # fmt: skip
def test_an_invalid_registered_cost_is_refused_by_name(costs, world, tmp_path, capsys):
    with restored(COST):
        COST.register("odd")(lambda model, units: costs)
        assert main(world.args(tmp_path, "--sparsity.cost=odd")) == 2
    assert "Cannot compute cost 'odd': " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("export", "remedy"),
    [
        ({"format": "hf", "dtype": "float32"}, " With --export.dtype bfloat16 the weights take half the bytes."),
        ({"format": "hf", "dtype": "bfloat16"}, ""),
        (
            {"format": "gguf"},
            " With --export.type q8_0 --sparsity.width_multiple 32 the weights take about half the bytes.",
        ),
    ],
)
def test_an_impossible_byte_target_names_a_smaller_export_format_if_there_is_one(export, remedy):
    sparsity = {"target": "100KiB", "width_multiple": 32}
    with pytest.raises(UserError) as error:
        make_plan(RunConfig(model={"name": "tiny-random"}, export=export, sparsity=sparsity))
    assert re.search(r"at least [\d.]+MiB, .*; got 100KiB\.(.*)$", str(error.value))[1] == remedy
