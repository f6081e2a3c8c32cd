"""The task `speed`: tokens per second and ratios to the dense model in table, model card, tracker and study records."""

from __future__ import annotations

import json

import pytest

from gprune import report
from gprune.__main__ import run as command
from gprune.benchmarks.subjects import task_numbers
from gprune.evaluation import speed
from gprune.report.task_tables import format_rate
from gprune.runs.results import load_run
from gprune.studies.archive import finished_record
from tests.studies.workbench import Workbench, cells


@pytest.fixture
def timings(monkeypatch):
    """Fake times: in call n, the first model takes n s for prefill and 0.5 s to decode, the second takes half."""
    calls = []

    def seconds(models, *, batch, prompt, generate):
        calls.append((len(models), batch, prompt))
        shares = [1 / k for k in range(1, len(models) + 1)]
        return ([len(calls) * s for s in shares], [0.5 * s for s in shares], shares), 0.01

    monkeypatch.setattr(speed, "time_generation", seconds)
    return calls


def evaluated(capsys, *args) -> dict[str, list[str]]:
    """The rate and the ratio of each row of the table, by task, stage and batch."""
    capsys.readouterr()
    assert command("evaluate", [str(args[0]), "--tasks", "speed", *args[1:]]) == 0
    rows = [cells(line) for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    return {" ".join((row[0], row[2], row[4])): [row[5], row[7]] for row in rows[1:]}


def test_rates_are_for_the_whole_batch_and_have_a_ratio_if_the_dense_model_was_timed_too(
    world, tmp_path, timings, capsys
):
    run = tmp_path / "run"
    world.run(tmp_path, "--gprune=false")
    rows = evaluated(capsys, run, "--dense", "--speed_prompt", "20", "--speed_batch", "1,4")
    assert timings == [(2, 1, 20), (2, 4, 20)]
    assert rows == {
        "decode dense 1": ["2.0 tokens/s, 0.500 s", ""], "decode base 1": ["4.0 tokens/s, 0.250 s", "x 2.000"],
        "decode dense 4": ["8.0 tokens/s, 0.500 s", ""], "decode base 4": ["16.0 tokens/s, 0.250 s", "x 2.000"],
        "prefill dense 1": ["20.0 tokens/s, 1.000 s", ""], "prefill base 1": ["40.0 tokens/s, 0.500 s", "x 2.000"],
        "prefill dense 4": ["40.0 tokens/s, 2.000 s", ""], "prefill base 4": ["80.0 tokens/s, 1.000 s", "x 2.000"],
    }  # fmt: skip
    assert [t.name for t in report.make([run]).tables][-1] == "evaluation"
    rows_of_card = [cells(line) for line in (run / "model/README.md").read_text().splitlines() if "| prefill " in line]
    (fast,) = (row for row in rows_of_card if row[2] == "base" and row[4] == "4")
    assert (fast[5], fast[7]) == ("80.0 tokens/s, 1.000 s", "x 2.000")
    assert load_run(run).model is not None  # the new card does not invalidate the model
    numbers = task_numbers(json.loads((run / "evaluation.json").read_text())["records"])
    assert (numbers["rows/dense/prefill/4/tokens_per_second"], numbers["final/decode/1/seconds"]) == (40.0, 0.25)
    alone = evaluated(capsys, run, "--speed_prompt", "20", "--speed_batch", "1")
    assert alone["prefill base 1"] == ["6.7 tokens/s, 3.000 s", ""]  # no ratio to an earlier dense model
    assert len(json.loads((run / "evaluation.json").read_text())["records"]) == 8  # earlier records were replaced


@pytest.fixture
def bench(world, tmp_path):
    return Workbench(world, tmp_path)


@pytest.mark.slow
def test_a_study_measures_the_speed_of_each_row_and_its_dense_model(bench, timings, capsys):
    path = bench.write("fast", {"plain": {"gprune": False}}, tasks={"names": ["speed"]})
    out = bench(capsys, path)
    assert timings == [(2, 1, 128), (2, 8, 128)]
    assert out.count(" x 2.000 |") == 4
    (row,) = bench.rows(path)
    assert [r["stage"] for r in finished_record(row)["evaluation"]] == ["dense"] * 4 + ["base"] * 4


@pytest.mark.slow
def test_measured_rates_of_two_models_are_consistent_with_their_seconds(world, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(speed, "MAX_SECONDS", 0.1)
    world.run(tmp_path, "--gprune=false")
    rows = evaluated(capsys, tmp_path / "run", "--dense", "--speed_prompt", "200", "--speed_batch", "2")
    records = json.loads((tmp_path / "run/evaluation.json").read_text())["records"]
    unrounded = {r["task"]: r for r in records if r["stage"] == "base"}
    # Tokens of a batch of two: prompts of 200 tokens, or one generated token each.
    for task, tokens in (("prefill", 400), ("decode", 2)):
        assert unrounded[task]["tokens_per_second"] == pytest.approx(tokens / unrounded[task]["seconds"], rel=0.2)
        assert rows[f"{task} base 2"][0] == format_rate(unrounded[task])
    assert all(0.2 < float(ratio.removeprefix("x ")) < 5 for name, (_, ratio) in rows.items() if "base" in name)
