"""The table of speed: measured once for a machine and a setting, and met by a budget."""

from __future__ import annotations

import functools
import itertools
import json
import os
import re
import time

import pytest
import torch

from gprune import report
from gprune.benchmarks import speed
from gprune.cli import main
from gprune.errors import UserError
from gprune.models.blocks import blocks_of
from gprune.models.copies import without_weights
from gprune.report.run_figures import speed_figure
from gprune.sparsity.budget import Budget, unit_costs
from gprune.sparsity.cut import keep_masks
from gprune.storage.files import write_json
from tests import tiny_run
from tests.conftest import make_tiny_llama

SETTING = {"batch": 1, "prompt": 8, "generate": 2}
TABLE = {"neurons": [[1, 1e-3], [24, 3e-3], [48, 4e-3]], "groups": [[1, 3e-3], [2, 4e-3]], "rest": 2e-3, "spread": 0.0}
DENSE = 3 * 4e-3 + 2e-3  # of three blocks and the rest
TABLE["multiples"] = [[37, 4.7e-3], [40, 3.4e-3], [48, 3.88e-3]]  # 0.1 ms a neuron beyond the first, 0.06, 0.06


@pytest.fixture
def measuring(monkeypatch, tmp_path):
    """Counts measurements, which take no time."""
    made = []
    monkeypatch.setenv("GPRUNE_CACHE", str(tmp_path))
    monkeypatch.setattr(speed, "_checked", set())
    monkeypatch.setattr(speed, "dense_seconds", lambda *_: DENSE)
    monkeypatch.setattr(speed, "measure_table", lambda *_: made.append(1) or json.loads(json.dumps(TABLE)))
    return made


def table(measure=True, **more):
    dense = without_weights(make_tiny_llama())
    return speed.speed_table(dense, torch.device("cpu"), torch.float32, SETTING | more, measure=measure)


def test_a_table_is_measured_once_for_a_machine_and_a_setting(measuring, tmp_path, monkeypatch):
    assert table(measure=False) is None
    assert table() == table() == table(measure=False) == TABLE
    assert len(measuring) == 1
    table(prompt=9)
    monkeypatch.setattr(speed.platform, "node", lambda: "elsewhere")
    assert table(measure=False) is None
    table()
    assert len(measuring) == 3


def test_old_noisy_and_wrong_tables_are_measured_again_and_any_on_request(measuring, tmp_path, monkeypatch, caplog):
    def in_another_process(**more):
        """How often a table is measured by a process that begins now."""
        monkeypatch.setattr(speed, "_checked", set())
        before = len(measuring)
        dense = without_weights(make_tiny_llama())
        assert speed.speed_table(dense, torch.device("cpu"), torch.float32, SETTING, **{"measure": True} | more)
        return len(measuring) - before

    assert in_another_process() == 1
    assert in_another_process() == 0
    assert in_another_process(again=True) == 1
    assert in_another_process(again=True, measure=False) == 0
    (path,) = (tmp_path / "speed").glob("*.json")
    os.utime(path, (time.time() - 90_000,) * 2)
    assert in_another_process(measure=False) == 0
    assert in_another_process() == 1
    for ratio, times in ((0.85, 1), (0.95, 0), (1.05, 0), (1.3, 1)):
        monkeypatch.setattr(speed, "dense_seconds", lambda *_, ratio=ratio: ratio * DENSE)
        assert in_another_process() == times, ratio
    monkeypatch.setattr(speed, "dense_seconds", lambda *_: pytest.fail("a table of this process is compared"))
    table()
    monkeypatch.setattr(speed, "measure_table", lambda *_: measuring.append(1) or TABLE | {"spread": 0.24})
    caplog.clear()  # of what other tests let through
    with caplog.at_level("INFO", logger="gprune"):
        assert [in_another_process(again=True), in_another_process()] == [1, 1]
    said = [record.message for record in caplog.records]
    assert said.count("The latency table is noisy (24 %). The next run measures it again.") == 2
    assert said[2].endswith("again: repeats of the cached table differed by 24%")


@pytest.mark.slow
def test_one_measurement_of_the_dense_model_is_near_the_tables(monkeypatch):
    """Within a factor of two, in the time of this process: the machine may do other things meanwhile."""
    monkeypatch.setattr(speed, "LONG", 0.1)
    monkeypatch.setattr(speed, "Timer", functools.partial(speed.Timer, timer=time.process_time))
    dense = without_weights(make_tiny_llama())
    of = dense, torch.device("cpu"), torch.float32, SETTING
    made = speed.measure_table(*of)
    by_table = 3 * made["neurons"][-1][1] + made["rest"]
    assert 0.5 < speed.dense_seconds(*of) / by_table < 2


def sealed(**changed):
    """A table that is not as the cache has it, with the checksum of its content."""

    def edit(path):
        write_json(path, TABLE | changed)
        return path.read_text()

    return edit


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.read_text()[:40],
        lambda path: path.read_text().replace("0.002", "0.001"),
        lambda path: "",
        lambda path: "[]",
        lambda path: '{"neurons": "x"}',
        lambda path: json.dumps(TABLE),
        sealed(neurons="x"),
        sealed(groups=[[2, 4e-3], [1, 3e-3]]),
        sealed(neurons=[[1, 1e-3], [48, 0.0]]),
        sealed(spread=None),
    ],
)
def test_a_damaged_or_edited_table_is_measured_anew(damage, measuring, tmp_path):
    table()
    (path,) = (tmp_path / "speed").glob("*.json")
    path.write_text(damage(path))
    assert table() == TABLE
    assert len(measuring) == 2


def test_a_speed_is_met_to_the_step_or_says_what_is_reached():
    blocks = blocks_of(make_tiny_llama())
    costs = unit_costs(blocks, scope="attention+ffn", price=speed.price_by(TABLE, blocks))
    assert costs.prices.model == 14 * 10**9  # picoseconds of three blocks and the rest
    assert speed.price_by(TABLE | {"spread": 0.2}, blocks).neurons[0][24] < 15 * 10**8  # on a line, as points are noisy
    budget = Budget.of(costs, "1.4x")
    masks = keep_masks(budget, [torch.arange(48.0)] * 3, [torch.arange(2.0)] * 3)
    left = costs.prices.model - costs.removed(masks)
    assert 0 <= costs.prices.model / 1.4 - left < 10**9  # a KV group, the dearest unit
    with pytest.raises(UserError, match=r"^--sparsity.target must be at most \d\.\d\dx.*; got 9x"):
        Budget.of(costs, "9x")


@pytest.mark.slow
def test_a_measured_table_has_all_widths(monkeypatch):
    monkeypatch.setattr(speed, "LONG", 0.1)
    dense = without_weights(make_tiny_llama())
    measured = speed.measure_table(dense, torch.device("cpu"), torch.float32, SETTING)
    assert [n for n, _ in measured["neurons"]] == [1, 12, 24, 36, 48]
    assert [g for g, _ in measured["groups"]] == [1, 2]
    assert [n for n, _ in measured["multiples"]] == [37, 40, 48, 32]  # odd multiples of 1, 8, 16 and 32 near 36
    price = speed.price_by(measured, blocks_of(dense))
    assert all(a <= b for table in (*price.neurons, *price.groups) for a, b in itertools.pairwise(table))


FLAGS = ("--sparsity.target=1.05x", "--speed.prompt=8", "--speed.generate=2", "--gprune=false")
SAID = (
    r"Speed: asked 1\.05x, predicted \d+\.\d\dx, got \d+\.\d\dx of dense \(prefill 8 tokens, decode 2, batch 1, .*\)\."
)


@pytest.mark.slow
def test_a_run_says_asked_predicted_and_got_and_goes_on_by_its_table(measuring, world, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(speed, "LONG", 0.1)
    monkeypatch.setattr(speed, "NOISY", 0.0)
    ran = world.run(tmp_path, *FLAGS)
    (said,) = set(re.findall(SAID, out := capsys.readouterr().out))  # in the log, and in the last lines
    assert ran.summary["speed"]["said"] == said
    assert said in (tmp_path / "run/model/README.md").read_text()
    assert f"run: {said}" in report.make([tmp_path / "run"]).to_markdown()
    assert ran.summary["speed"]["predicted"] >= 1.05
    assert "The machine is busy" in out
    (tmp_path / "run/metrics.json").unlink()
    again = world.run(tmp_path, *FLAGS)
    assert (again.masks, len(measuring)) == (ran.masks, 1)
    assert again.summary["speed"] == ran.summary["speed"]
    # with its own table it resumes, though the cache is gone, and though the table is to be measured again
    monkeypatch.setenv("GPRUNE_CACHE", str(tmp_path / "elsewhere"))
    monkeypatch.setattr(speed, "measure_table", lambda *_: TABLE | {"rest": 3e-3})
    (tmp_path / "run/metrics.json").unlink()
    assert world.run(tmp_path, *FLAGS, "--speed.measure=true").masks == ran.masks
    # another machine's table is another budget, which is not mixed with this one's
    monkeypatch.setattr(speed.platform, "node", lambda: "elsewhere")
    assert main(world.args(tmp_path, *FLAGS)) == 2
    assert "it has a run with other settings: inputs.speed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("taken", "spread", "multiple", "said"),
    [
        (4.7e-3, 0.0, 8, "multiples of 8 lose no speed (loss: 1: 31.5%, 8: 0.0%, 16: 0.0%; spread of repeats: 0.0 %)"),
        (4.7e-3, 0.4, 8, "multiples of 8 lose no speed (loss: 1: 31.5%, "),  # noise hides no more than a tenth
        (4.7e-3, 0.99, 8, "multiples of 8 lose no speed"),
        (3.4e-3, 0.05, 8, "multiples of 8 lose no speed (loss: 1: 5.3%, "),
        (3.4e-3, 0.06, 1, "multiples of 1 lose 5.3% of the speed (loss: 1: 5.3%, "),
    ],
)
def test_auto_is_the_smallest_multiple_whose_loss_repeats_would_hide(taken, spread, multiple, said, caplog):
    """Of a block of 37 neurons, 37 x 0.04 ms of 4.7 ms, 31.5 %, is lost; and the line says what is lost."""
    of_37 = [[37, taken], *TABLE["multiples"][1:]]
    with caplog.at_level("INFO", logger="gprune"):
        assert speed.best_multiple(TABLE | {"spread": spread, "multiples": of_37}) == multiple
    assert said in caplog.text


def test_a_noisy_table_asks_for_no_wide_steps():
    multiples = [[37, 2.7e-3], [40, 6.4e-3], [48, 6.4e-3], [32, 4.2e-3], [64, 3e-3]]
    noisy = TABLE | {"spread": 0.99, "multiples": multiples}
    assert [speed.best_multiple(noisy), speed.best_multiple(noisy | {"spread": 0.01})] == [1, 64]


def test_auto_without_a_speed_measures_the_table_too_and_says_what_it_took(
    measuring, world, tmp_path, capsys, monkeypatch
):
    tiny_run.quick(monkeypatch)
    flags = ("--sparsity.width_multiple=auto", "--gprune=false", "--sparsity.target=30%")
    assert main(world.args(tmp_path, *flags, "--dry_run=true")) == 0
    assert "Widths in multiples of 8 lose no speed (loss: 1: 31.5%, 8: 0.0%, " in capsys.readouterr().out
    result = world.run(tmp_path, *flags)
    assert all(int(mask.sum()) % 8 == 0 for mask in result.masks.ffn)
    assert (result.summary["speed_table"], "speed" in result.summary, len(measuring)) == (TABLE, False, 1)
    assert (tmp_path / "run/figures/speed.png").exists()
    (tmp_path / "run/metrics.json").write_text(
        json.dumps({"records": result.records, "summary": result.summary | {"speed_table": {"neurons": [[1]]}}})
    )
    with pytest.raises(UserError, match=r"summary\.speed_table\.neurons\[0\]"):
        report.make([tmp_path / "run"])


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--sparsity.width_multiple=automatic", "--sparsity.width_multiple must be a valid integer"),
        ("--sparsity.width_multiple=0", "must be 1 or more; got 0"),
        ("--trainer.devices=2", "--sparsity.width_multiple auto cannot be combined with 2 processes"),
    ],
)
def test_bad_multiples_end_in_one_line(flag, message, world, tmp_path, capsys):
    assert main(world.args(tmp_path, "--sparsity.width_multiple=auto", flag)) == 2
    assert message in capsys.readouterr().err


def test_the_figure_has_blocks_by_both_units_and_what_is_never_pruned():
    figure = speed_figure(TABLE, 3)
    lines = [[line.get_xydata().tolist() for line in axes.get_lines()] for axes in figure.axes]
    assert [of[0] for of in lines] == [[[n, 3000 * t] for n, t in TABLE[kind]] for kind in ("neurons", "groups")]
    assert all({y for _, y in of[1]} == {2.0} for of in lines)


def test_a_setting_beyond_the_positions_is_refused(world, tmp_path, capsys):
    assert main(world.args(tmp_path, *FLAGS, "--speed.prompt=999")) == 2
    assert "got 1,001." in capsys.readouterr().err
