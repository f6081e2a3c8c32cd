"""The latency table: measured once per machine and setting, and used as the cost of a speed budget."""

from __future__ import annotations

import itertools
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
from gprune.models.blocks import blocks_of, decoder_layers
from gprune.models.copies import without_weights
from gprune.models.masks import Masks
from gprune.models.surgery import slice_model
from gprune.runs import trainer
from gprune.sparsity.budget import Budget, block_units
from gprune.sparsity.cut import keep_masks
from tests import tiny_run
from tests.world import make_tiny_llama

SETTING = {"batch": 1, "prompt": 8, "generate": 2}
TABLE = {"neurons": [[1, 1e-3], [24, 3e-3], [48, 4e-3]], "groups": [[1, 3e-3], [2, 4e-3]], "rest": 2e-3, "spread": 0.0}
TABLE["multiples"] = [[37, 4.7e-3], [40, 3.4e-3], [48, 3.88e-3]]  # less 1 ms and per neuron: 0.1, 0.06, 0.06 ms


@pytest.fixture
def measurements(monkeypatch, tmp_path):
    """A list with one entry per measurement. Measuring is replaced by a constant table."""
    calls = []
    monkeypatch.setenv("GPRUNE_CACHE", str(tmp_path))
    monkeypatch.setattr(speed, "measure_table", lambda *_: calls.append(1) or json.loads(json.dumps(TABLE)))
    return calls


def table(measure=True, **more):
    dense = without_weights(make_tiny_llama())
    return speed.speed_table(dense, torch.device("cpu"), torch.float32, SETTING | more, measure=measure)


def test_the_latency_table_is_measured_once_per_machine_and_setting(measurements, monkeypatch):
    assert table(measure=False) is None
    assert table() == table() == table(measure=False) == TABLE
    assert len(measurements) == 1
    table(prompt=9)
    monkeypatch.setattr(speed.platform, "node", lambda: "another-host")
    assert table(measure=False) is None
    table()
    assert len(measurements) == 3


def test_a_speed_budget_is_met_within_one_unit_and_an_impossible_one_reports_the_maximum():
    blocks = blocks_of(make_tiny_llama())
    costs, outside = speed.costs_from_table(TABLE, blocks)
    units = block_units(blocks, scope="attention+ffn", costs=costs)
    neurons = costs[0].neurons
    assert [neurons[n] for n in (1, 24, 48)] == [0, 2 * 10**9, 3 * 10**9]  # the measured widths
    assert neurons[36] == pytest.approx(25 * 10**8)  # linear between them
    budget = Budget.of(units, "1.4x", outside=outside)
    assert budget.model == 14 * 10**9  # picoseconds of three blocks and the rest
    masks = keep_masks(budget, [torch.arange(48.0)] * 3, [torch.arange(2.0)] * 3)
    remaining = budget.model - budget.removed_by(masks)
    assert 0 <= budget.model / 1.4 - remaining < 10**9  # the cost of a KV group, the most expensive unit
    with pytest.raises(UserError, match=r"^--sparsity.target must be at most \d\.\d\dx.*; got 9x"):
        Budget.of(units, "9x", outside=outside)


@pytest.mark.slow
def test_a_measured_table_has_all_sampled_widths_and_multiples(monkeypatch):
    monkeypatch.setattr(speed, "MAX_SECONDS", 0.1)
    dense = without_weights(make_tiny_llama())
    measured = speed.measure_table(dense, torch.device("cpu"), torch.float32, SETTING)
    assert [n for n, _ in measured["neurons"]] == [1, 12, 24, 36, 48]
    assert [g for g, _ in measured["groups"]] == [1, 2]
    assert [n for n, _ in measured["multiples"]] == [37, 40, 48, 32]  # odd multiples of 1, 8, 16 and 32 near 36
    costs, _ = speed.costs_from_table(measured, blocks_of(dense))
    tables = [table for of_block in costs for table in (of_block.neurons, of_block.groups)]
    assert all(a <= b for table in tables for a, b in itertools.pairwise(table))


def narrowed_llama(*widths):
    """Return a tiny model whose layers have these numbers of neurons."""
    model = make_tiny_llama()
    return slice_model(model, Masks([torch.arange(48) < n for n in widths], [torch.ones(2, dtype=torch.bool)] * 3))


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
        blocks = blocks_of(model)

        def time_by_parameters(models, **_):
            """Return a nanosecond per parameter."""
            seconds = [1e-9 * m.num_parameters() for m in models]
            return (seconds, seconds, seconds), 1e-6

        monkeypatch.setattr(speed, "time_generation", time_by_parameters)
        measured = speed.measure_table(without_weights(model), torch.device("cpu"), torch.float32, SETTING)
    costs, outside = speed.costs_from_table(measured, blocks)

    def picoseconds(units, parameters):
        """Return the prices of keeping 0, 1, ..., all units; the first one is free, as no smaller width is timed."""
        return pytest.approx([1000 * parameters * max(0, n - 1) for n in range(units + 1)], abs=5)

    for b, of_block in zip(blocks, costs, strict=True):
        assert of_block.neurons == picoseconds(b.neurons, b.unit_cost("ffn"))
        assert of_block.groups == picoseconds(b.kv_groups, b.unit_cost("attention"))
    layers = len(decoder_layers(model))
    model_cost = sum(of_block.whole for of_block in costs) + outside
    assert model_cost == pytest.approx(1e12 * (layers * measured["neurons"][-1][1] + measured["rest"]), rel=1e-6)
    assert speed.best_multiple(measured) in speed.MULTIPLES


FLAGS = ("--sparsity.target=1.05x", "--speed.prompt=8", "--speed.generate=2", "--gprune=false")
SPEED_LINE = (
    r"Speed: asked 1\.05x, predicted \d+\.\d\dx, got \d+\.\d\dx of dense \(prefill 8 tokens, decode 2, batch 1, .*\)\."
)


@pytest.mark.slow
def test_a_run_reports_its_speeds_and_resumes_with_its_table(measurements, world, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(speed, "MAX_SECONDS", 0.1)
    monkeypatch.setattr(speed, "BUSY", 0.0)
    ran = world.run(tmp_path, *FLAGS)
    out = capsys.readouterr().out
    (line,) = set(re.findall(SPEED_LINE, out))  # the same line in the log and in the summary
    assert ran.summary["speed"]["said"] == line
    assert line in (tmp_path / "run/model/README.md").read_text()
    assert f"run: {line}" in report.make([tmp_path / "run"]).to_markdown()
    assert ran.summary["speed"]["predicted"] >= 1.05
    assert "The machine is busy" in out
    (tmp_path / "run/metrics.json").unlink()
    resumed = world.run(tmp_path, *FLAGS)
    assert (resumed.masks, len(measurements)) == (ran.masks, 1)
    assert resumed.summary["speed"] == ran.summary["speed"]
    # A run resumes with its own table, even if the cache is missing and a new measurement is requested.
    monkeypatch.setenv("GPRUNE_CACHE", str(tmp_path / "empty"))
    monkeypatch.setattr(speed, "measure_table", lambda *_: TABLE | {"rest": 3e-3})
    (tmp_path / "run/metrics.json").unlink()
    assert world.run(tmp_path, *FLAGS, "--speed.measure=true").masks == ran.masks
    # The table of another machine is another budget, so that the run cannot resume with it.
    monkeypatch.setattr(speed.platform, "node", lambda: "another-host")
    assert main(world.args(tmp_path, *FLAGS)) == 2
    assert "it has a run with other settings: inputs.speed" in capsys.readouterr().err


def test_speed_is_measured_with_the_default_products_of_torch_and_perplexity_with_the_fastest(
    measurements, world, tmp_path, monkeypatch
):
    """On a processor on which oneDNN is faster than MKL. A user who loads the model has the default products."""
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
    world.run(tmp_path, *FLAGS)
    assert used == {"time_generation": {"highest"}, "measure_table": {"highest"}, "perplexity": {"medium"}}
    assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.parametrize(
    ("seconds_of_37", "multiple", "message"),
    [
        (4.7e-3, 8, "multiples of 8 lose 0.0 % of the speed (loss: 1: 31.5%, 8: 0.0%, 16: 0.0%)"),
        (3.4e-3, 8, "multiples of 8 lose 0.0 % of the speed (loss: 1: 5.3%, "),
        (3.35e-3, 1, "multiples of 1 lose 3.9 % of the speed (loss: 1: 3.9%, "),
    ],
)
def test_auto_multiple_is_the_smallest_one_that_loses_at_most_5_percent_of_the_speed(
    seconds_of_37, multiple, message, caplog
):
    """A neuron costs 0.1 ms in a block of 37 neurons and 0.06 ms in blocks of 40 and 48 neurons.

    So a block of 37 neurons loses 37 x 0.04 ms of its 4.7 ms, 31.5 %.
    """
    multiples = [[37, seconds_of_37], *TABLE["multiples"][1:]]
    with caplog.at_level("INFO", logger="gprune"):
        assert speed.best_multiple(TABLE | {"multiples": multiples}) == multiple
    assert message in caplog.text


def test_auto_multiple_without_a_speed_target_measures_and_reports_the_table(measurements, world, tmp_path, capsys):
    flags = ("--sparsity.width_multiple=auto", "--gprune=false", "--sparsity.target=30%")
    assert main(world.args(tmp_path, *flags, "--dry_run=true")) == 0
    assert "Widths in multiples of 8 lose 0.0 % of the speed (loss: 1: 31.5%, 8: 0.0%, " in capsys.readouterr().out
    result = world.run(tmp_path, *flags)
    assert all(int(mask.sum()) % 8 == 0 for mask in result.masks.ffn)
    assert result.summary["speed_table"] == TABLE | {"layers": 3}
    assert ("speed" in result.summary, len(measurements)) == (False, 1)


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        (
            "--sparsity.width_multiple=defalt",
            "--sparsity.width_multiple must be a whole number, default or auto; got 'defalt'.",
        ),
        ("--sparsity.width_multiple=0", "must be 1 or more; got 0"),
        ("--trainer.devices=2", "--sparsity.width_multiple auto cannot be combined with 2 processes"),
    ],
)
def test_invalid_width_multiples_are_refused(flag, message, world, tmp_path, capsys):
    assert main(world.args(tmp_path, "--sparsity.width_multiple=auto", flag)) == 2
    assert message in capsys.readouterr().err


def test_speed_prompts_longer_than_the_models_positions_are_refused(world, tmp_path, capsys):
    assert main(world.args(tmp_path, *FLAGS, "--speed.prompt=999")) == 2
    assert "got 1,001." in capsys.readouterr().err
