"""The task `speed`: rates from seconds, beside the dense model, in table, card, tracker and records of lists."""

from __future__ import annotations

import json

import pytest

from gprune import report
from gprune.benchmarks import speed, throughput
from gprune.benchmarks.command import main
from gprune.benchmarks.measurement import task_numbers
from gprune.benchmarks.speed import Taken
from gprune.runs.results import load_run
from gprune.studies.archive import record_of
from tests import tiny_run
from tests.studies.workbench import Workbench, cells


@pytest.fixture
def timed(monkeypatch):
    """The n-th measurement: the first model takes n seconds for prompts and 0.5 for a step, the second half of both."""
    calls = []

    def seconds(models, *, batch, prompt, generate):
        calls.append((len(models), batch, prompt))
        return [Taken(len(calls) / k, 0.5 / k, 9.0) for k in range(1, len(models) + 1)], 0.01

    monkeypatch.setattr(throughput, "seconds", seconds)
    return calls


def evaluated(capsys, *args) -> dict[str, list[str]]:
    """Rows of the table of speed, by stage and batch."""
    capsys.readouterr()
    assert main([str(args[0]), "--tasks", "speed", *args[1:]]) == 0
    rows = [cells(line) for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    return {" ".join(row[:2]): row[2:] for row in rows[1:]}


def test_rates_are_of_a_batch_together_and_divided_where_both_took_turns(world, tmp_path, timed, capsys, monkeypatch):
    tiny_run.quick(monkeypatch)
    run = tmp_path / "run"
    world.run(tmp_path, "--gprune=false")
    rows = evaluated(capsys, run, "--dense", "--speed_prompt", "20", "--speed_batch", "1,4")
    assert timed == [(2, 1, 20), (2, 4, 20)]
    note = rows["dense 1"][-1]
    assert note.startswith("prompts of 20 tokens, 1 thread")
    assert rows == {
        "dense 1": ["20.0", "2.0", "1000.0", "", "", note], "base 1": ["40.0", "4.0", "500.0", "2.00", "2.00", note],
        "dense 4": ["40.0", "8.0", "2000.0", "", "", note], "base 4": ["80.0", "16.0", "1000.0", "2.00", "2.00", note],
    }  # fmt: skip
    (table,) = (t for t in report.make([run]).tables if t.name == "throughput")
    assert table.to_text() in (run / "model/README.md").read_text()
    assert load_run(run).model is not None  # whose card is the run's own
    records = json.loads((run / "evaluation.json").read_text())["records"]
    numbers = task_numbers(records)
    assert (numbers["rows/dense/speed/4/prefill"], numbers["final/speed/4/first_token"]) == (40.0, 1.0)
    assert evaluated(capsys, run, "--speed_prompt", "20")["base 1"][3:5] == ["", ""]  # alone, at another time
    assert len(json.loads((run / "evaluation.json").read_text())["records"]) == 5  # in the place of the former one


@pytest.mark.slow
def test_a_list_measures_each_row_beside_the_dense_model(bench, timed, capsys):
    path = bench.write("fast", {"plain": {"gprune": False}}, tasks={"names": ["speed"], "speed_batch": [2]})
    table = bench(capsys, path).split("Prefill of prompts")[0].strip().splitlines()[-2:]
    assert timed == [(2, 2, 128)]
    assert [cells(line)[:2] + cells(line)[5:7] for line in table] == [
        ["dense", "2", "", ""],
        ["base", "2", "2.00", "2.00"],
    ]
    (row,) = bench.rows(path)
    assert [r["stage"] for r in record_of(row)["evaluation"]] == ["dense", "base"]


@pytest.fixture
def bench(world, tmp_path, monkeypatch):
    tiny_run.quick(monkeypatch)
    return Workbench(world, tmp_path)


@pytest.mark.slow
def test_two_models_take_turns(world, tmp_path, capsys, monkeypatch):
    tiny_run.quick(monkeypatch)
    monkeypatch.setattr(speed, "LONG", 0.1)
    world.run(tmp_path, "--gprune=false")
    rows = evaluated(capsys, tmp_path / "run", "--dense", "--speed_prompt", "200", "--speed_batch", "2")
    prefill, decode, first, *ratios = map(float, rows["base 2"][:-1])
    assert prefill == pytest.approx(400 / first * 1000, rel=0.02)
    assert decode > 0
    assert all(0.2 < ratio < 5 for ratio in ratios)
