"""The latency table: measured once per machine and setting, and used as the cost of a speed budget."""

from __future__ import annotations

import json
import re

import pytest
import torch

from experiments.architectures import example
from gprune import report
from gprune.cli import main
from gprune.errors import UserError
from gprune.evaluation import speed
from gprune.method import evaluate
from gprune.models.families import decoder_layers
from gprune.models.masks import Masks
from gprune.models.surgery import slice_model
from gprune.models.units import units_of
from gprune.runs import trainer
from gprune.sparsity.budget import budget_of
from gprune.sparsity.cut import keep_masks
from tests import tiny_run
from tests.world import by_key, make_tiny_llama

TABLE = {"neurons": [[1, 2e-3], [24, 3e-3], [48, 4e-3]], "groups": [[1, 3.5e-3], [2, 4e-3]], "rest": 2e-3}


@pytest.fixture
def measurements(monkeypatch, tmp_path):
    """A list with one entry per measurement. Measuring is replaced by a constant table."""
    calls = []
    monkeypatch.setenv("GPRUNE_CACHE", str(tmp_path))
    monkeypatch.setattr(speed, "measure_table", lambda *_: calls.append(1) or json.loads(json.dumps(TABLE)))
    return calls


def table(attention=True):
    dense = make_tiny_llama().to("meta")
    return speed.latency_table(dense, torch.device("cpu"), torch.float32, attention)


def test_the_latency_table_is_measured_once_per_machine_and_scope(measurements, monkeypatch):
    assert table() == table() == TABLE
    assert len(measurements) == 1
    table(attention=False)
    monkeypatch.setattr(speed.platform, "node", lambda: "another-host")
    table()
    assert len(measurements) == 3


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"neurons": [[1, 2e-3], [24, 4.1e-3], [48, 4e-3]]}, "48 neurons take 4 ms, and with 24 4.1 ms"),
        ({"neurons": [[1, 2e-3], [24, 2.1e-3], [48, 4e-3]]}, "24 neurons take 2.1 ms, 1.90 times .* 1.42 times"),
        ({"groups": [[1, 3e-4], [2, 4e-3]]}, "1 groups take 0.3 ms, 13.33 times as fast .* 1.25 times fewer"),
    ],
)  # fmt: skip
def test_an_implausible_table_is_measured_again_then_refused_and_not_stored(change, reason, measurements, monkeypatch):
    """As if the wide model had been measured under load."""
    tables = [TABLE | change, TABLE | change, TABLE | change, TABLE]
    monkeypatch.setattr(speed, "measure_table", lambda *_: tables.pop(0))
    with pytest.raises(UserError, match=f"{reason}.* Run again while the machine is idle, or give --sparsity.target"):
        table()
    assert len(tables) == 2
    assert table() == table() == TABLE


def test_a_speed_budget_is_met_within_one_unit_and_an_impossible_one_reports_the_maximum():
    units = units_of(make_tiny_llama())
    price, outside = speed.costs_from_table(TABLE, units)
    options = {"scope": "attention+ffn", "price": price, "outside": outside}
    neurons = price["neurons.0"]
    assert [neurons[n] for n in (1, 24, 48)] == [0, 10**9, 2 * 10**9]  # the measured widths
    assert neurons[36] == pytest.approx(15 * 10**8)  # linear between them
    budget = budget_of(units, "1.4x", **options)
    assert budget.model == 14 * 10**9  # picoseconds of three blocks and the rest
    masks = keep_masks(budget, by_key([torch.arange(48.0)] * 3, [torch.arange(2.0)] * 3))
    remaining = budget.model - budget.removed_by(masks)
    assert 0 <= budget.model / 1.4 - remaining < 10**9  # the cost of a KV group, the most expensive unit
    with pytest.raises(UserError, match=r"^--sparsity.target must be at most \d\.\d\dx.*; got 9x"):
        budget_of(units, "9x", **options)


@pytest.mark.slow
@pytest.mark.parametrize(("attention", "groups"), [(True, [1, 2]), (False, [2])])
def test_a_measured_table_has_the_widths_that_may_be_pruned(attention, groups, monkeypatch):
    monkeypatch.setattr(speed, "ROUNDS", 1)
    measured = speed.measure_table(make_tiny_llama().to("meta"), torch.device("cpu"), torch.float32, attention)
    assert [n for n, _ in measured["neurons"]] == [1, 12, 24, 36, 48]
    assert [g for g, _ in measured["groups"]] == groups


def narrowed_llama(*widths):
    """Return a tiny model whose layers have these numbers of neurons."""
    model = make_tiny_llama()
    return slice_model(
        model, Masks.of_blocks([torch.arange(48) < n for n in widths], [torch.ones(2, dtype=torch.bool)] * 3)
    )


@pytest.mark.parametrize(
    "make_model",
    [
        lambda: narrowed_llama(48, 24, 31),
        lambda: narrowed_llama(48, 3, 3),  # like DeepSeek, in which only the first layer has a wide FFN
        lambda: example("nemotron_h"),  # most layers have no FFN
        lambda: example("qwen2_moe"),  # two FFNs of different widths in each layer
    ],
)
def test_if_time_is_proportional_to_parameters_so_are_the_prices(make_model, monkeypatch, tmp_path):
    with tiny_run.isolated(tmp_path):
        model = make_model()
        units = units_of(model)

        # a nanosecond per parameter
        monkeypatch.setattr(speed, "time_generation", lambda models: [1e-9 * m.num_parameters() for m in models])
        measured = speed.measure_table(model.to("meta"), torch.device("cpu"), torch.float32, True)
    assert speed.why_implausible(measured, units) == ""
    price, outside = speed.costs_from_table(measured, units)

    def picoseconds(count, parameters):
        """Return the prices of keeping 0, 1, ..., all units; the first one is free, as no smaller width is timed."""
        return pytest.approx([1000 * parameters * max(0, n - 1) for n in range(count + 1)], abs=5)

    for u in units:
        if u.kind in ("neurons", "kv_groups"):
            assert price[u.key] == picoseconds(u.count, u.parameters)
    layers = len(decoder_layers(model))
    model_cost = sum(table[-1] for key, table in price.items() if key.startswith("layer.")) + outside
    assert model_cost == pytest.approx(1e12 * (layers * measured["neurons"][-1][1] + measured["rest"]), rel=1e-6)


FLAGS = ("--sparsity.target=1.05x", "--gprune=false")
SPEED_LINE = (
    r"Speed: asked 1\.05x, predicted \d+\.\d\dx, got \d+\.\d\dx of dense \(prompt of 128 tokens, 32 generated, .*\)\."
)


@pytest.mark.slow
def test_a_run_reports_its_speeds_and_resumes_with_its_table_only(measurements, world, tmp_path, capsys, monkeypatch):
    """Speed is measured with the default products of torch, which a user has who loads the model, and perplexity with
    the fastest ones, on a processor on which oneDNN is faster than MKL.
    """
    monkeypatch.setattr(speed, "ROUNDS", 1)
    monkeypatch.setattr(trainer, "float32_by_onednn", lambda device: device.type == "cpu")
    used: dict[str, set[str]] = {}

    def watch(module, name):
        function = getattr(module, name)

        def watched(*args, **kwargs):
            used.setdefault(name, set()).add(torch.get_float32_matmul_precision())
            return function(*args, **kwargs)

        monkeypatch.setattr(module, name, watched)

    watch(speed, "time_generation")
    watch(speed, "measure_table")
    watch(evaluate, "perplexity")
    ran = world.run(tmp_path, *FLAGS)
    assert used == {"time_generation": {"highest"}, "measure_table": {"highest"}, "perplexity": {"medium"}}
    assert torch.get_float32_matmul_precision() == "highest"
    out = capsys.readouterr().out
    (line,) = set(re.findall(SPEED_LINE, out))  # the same line in the log and in the summary
    assert (ran.summary["speed"]["said"], ran.summary["speed"]["latency"]) == (line, TABLE)
    assert line in (tmp_path / "run/model/README.md").read_text()
    assert f"run: {line}" in report.make([tmp_path / "run"]).to_markdown()
    assert ran.summary["speed"]["predicted"] >= 1.05
    (tmp_path / "run/metrics.json").unlink()
    resumed = world.run(tmp_path, *FLAGS)
    assert (resumed.masks, len(measurements)) == (ran.masks, 1)
    assert resumed.summary["speed"] == ran.summary["speed"]
    # The table of another machine is another budget, so that the run cannot resume with it.
    monkeypatch.setattr(speed, "measure_table", lambda *_: TABLE | {"rest": 3e-3})
    monkeypatch.setattr(speed.platform, "node", lambda: "another-host")
    assert main(world.args(tmp_path, *FLAGS)) == 2
    assert "it has a run with other settings: inputs.speed" in capsys.readouterr().err
