"""Running lists: records, resuming, parts and tasks."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

import gprune
from gprune.benchmarks import measurement
from gprune.errors import UserError
from gprune.report.records import caption
from gprune.studies import archive, runner
from gprune.studies.archive import finished_record
from tests.studies.workbench import ROWS, cells


def test_a_study_runs_all_rows_writes_records_and_prints_tables(bench, first):
    path, out = first
    assert out.startswith("3 configurations: at most")
    for row in bench.rows(path):
        assert f"{row.name}, seed 0: " in out
        record = finished_record(row)
        result = gprune.load_run(Path(row.config.run.dir) / row.config.run_name)
        assert archive.unpack_masks(record["masks"]) == result.masks
        assert record["settings"] == row.config.settings()
        rounded = [r | {"window_nll": [round(v, 4) for v in r["window_nll"]]} for r in result.records]
        assert record["records"] == rounded
        assert record["inputs"]["model"] and record["environment"]["packages"]["torch"]  # noqa: PT018
        assert {"evaluate", "save_and_check"} <= set(record["steps"])
        assert (record["learning"] is None) == (row.name == "plain")
    table = [line for line in out.splitlines() if line.startswith("| ")]
    for name in ROWS:
        assert any(line.startswith(f"| {name}") for line in table)
    assert "**Three rows**" in out
    assert "Protocol: " in out


def test_a_finished_study_runs_nothing_and_prints_the_same_tables(bench, first, nothing_runs, capsys):
    path, out = first
    again = bench(capsys, path)
    assert "configurations" not in again
    assert again == out[out.index("\n**Three rows") :]
    assert bench(capsys, path, "--table") == again


def test_rows_with_other_settings_or_seeds_run_again(bench, first, capsys, monkeypatch):
    path, _ = first
    ran = []
    monkeypatch.setattr(runner, "run_row", lambda row: ran.append((row.name, row.seed, row.config.sparsity.target)))
    monkeypatch.setattr(runner, "token_hours", lambda pending: f"{len(pending)} pending")
    assert "3 pending" in bench(capsys, path, "--", "--sparsity.target=0.4")
    assert ran == [(name, 0, 0.4) for name in ROWS]
    ran.clear()
    assert "2 pending" in bench(capsys, path, "--seeds", "0", "7", "--only", "ours", "plain")
    assert ran == [("plain", 7, 0.5), ("ours", 7, 0.5)]
    ran.clear()
    assert "no records yet" in bench(capsys, path, "--table", "--seeds", "7")
    assert not ran


def test_only_selects_the_printed_rows_and_keeps_the_reference(bench, first, nothing_runs, capsys):
    out = bench(capsys, first[0], "--only", "ours")
    rows = {cells(line)[0] for line in out.splitlines() if line.startswith("| ")}
    assert {"ours", "plain"} <= rows  # plain is the reference
    assert "other" not in rows


@pytest.mark.parametrize("count", [1, 2, 4, 9])
def test_parts_run_every_row_once_also_if_they_start_one_after_another(count, bench, first, capsys, monkeypatch):
    """A later part finds the records of an earlier part, and must still run only its own rows."""
    done = {}
    monkeypatch.setattr(runner, "run_row", lambda row: done.setdefault(archive.find_record(row)[0], []).append(row))
    monkeypatch.setattr(runner, "token_hours", lambda pending: "")
    monkeypatch.setattr(runner, "print_results", lambda *_: None)
    monkeypatch.setattr(runner, "finished_record", lambda row: {} if archive.find_record(row)[0] in done else None)
    for i in range(count):
        bench(capsys, first[0], "--seeds", "0", "1", "--part", f"{i + 1}/{count}")
    ran = [(row.name, row.seed) for rows in done.values() for row in rows]
    assert sorted(ran) == sorted((name, seed) for name in ROWS for seed in (0, 1))


# --- tasks ------------------------------------------------------------------------------------------------------


@pytest.fixture
def measured(monkeypatch, bench):
    """Replace `gprune evaluate`, and return the calls to it and the configurations that ran."""
    calls, configs, real = [], [], gprune.prune

    def evaluate(model, options, *, dense=False, pruned=True):
        stages = [*(["dense"] if dense else []), *(["base"] if pruned else [])]
        calls.append((options.tasks, options.limit, stages))
        about = {
            "kind": "zero_shot", "limit": options.limit, "correct": "0110", "recovery": "none", "content_hash": "c",
            "split": "test", "dtype": "float32", "note": "", "standard_protocol": False, "questions": 4,
            **dict.fromkeys(("acc", "acc_stderr", "acc_norm", "acc_norm_stderr"), 0.5),
        }  # fmt: skip
        return [
            about | {"stage": s, "task": t} for s in stages for t in options.tasks
        ], bench.folder / "evaluation.json"

    monkeypatch.setattr(measurement, "evaluate", evaluate)
    monkeypatch.setattr(measurement, "require_lm_eval", lambda: "0")
    monkeypatch.setattr(gprune, "prune", lambda cfg: configs.append(cfg) or real(cfg))
    return calls, configs


def with_tasks(row):
    folder, record = runner.run_row(row)
    return runner.measure_tasks(row, folder, record) if row.tasks else record


WITH_BIAS = {"plain": {"gprune": False}, "with bias": {"gprune": False, "recovery": "bias"}}


def test_tasks_are_measured_once_per_row_and_once_for_the_shared_dense_model(bench, measured):
    calls, configs = measured
    tasks, own = {"names": ["piqa", "arc_easy"], "limit": 4}, {"common": {"ridge": 0.3}}
    path = bench.write("tasks", WITH_BIAS, tasks=tasks, **own)
    rows = bench.rows(path)
    records = [with_tasks(row) for row in rows]
    assert calls == [(("piqa", "arc_easy"), 4, [stage]) for stage in ("dense", "base", "base")]
    assert [cfg.export.format for cfg in configs] == [
        "none",
        "hf",
    ]  # recovery changes weights, which masks do not contain
    for row, record in zip(rows, records, strict=True):
        assert [r["stage"] for r in record["evaluation"]] == ["base"] * 2
        both = archive.row_to_run(row, record, None).evaluation
        assert [(r["stage"], r["run"]) for r in both] == [(s, row.name) for s in ("dense", "dense", "base", "base")]
    assert all(finished_record(row) for row in rows)
    # the records also match a list without tasks, but not lists with other tasks or another model
    without = bench.rows(bench.write("none", WITH_BIAS, **own))
    assert archive.row_to_run(without[0], records[0], None).evaluation == []
    assert all(finished_record(row) for row in without)
    more = bench.rows(bench.write("more", WITH_BIAS, tasks=tasks | {"limit": 9}, **own))
    low = bench.rows(path, flags=["--model.dtype=bfloat16"])
    assert not any(map(finished_record, [*more, *low]))
    with_tasks(low[0])
    assert [stages for *_, stages in calls[-2:]] == [["dense"], ["base"]]  # another dense model
    # records with other tasks have other files
    others = {row.name: (archive.find_record(row)[0], with_tasks(row)) for row in more}
    assert all(record["tasks"]["limit"] == 9 for _, record in others.values())
    for row in bench.rows(path):
        assert archive.find_record(row)[0] != others[row.name][0]
        assert finished_record(row)["tasks"]["limit"] == 4


def test_a_row_with_a_byte_budget_keeps_its_settings_in_the_record_with_tasks(bench, measured):
    tasks, rows = {"names": ["piqa"], "limit": 4}, {"with bias": WITH_BIAS["with bias"] | {"sparsity.target": "80KiB"}}
    (row,) = bench.rows(bench.write("bytes", rows, tasks=tasks))
    record = with_tasks(row)
    assert record["settings"] == row.config.settings()
    assert finished_record(row) is not None
    assert {r.get("cost") for r in record["records"]} == {"bytes"}
    assert "of the bytes of ffn removed" in caption(record["records"])


def test_adding_masks_to_a_record_keeps_its_tasks_and_adding_tasks_keeps_its_masks(bench, measured, tmp_path):
    tasks, plain = {"names": ["piqa"], "limit": 4}, {"plain": WITH_BIAS["plain"]}
    masked, tasked = (
        bench.rows(bench.write(name, plain, **content), records=tmp_path)[0]
        for name, content in (("masked", {"masks": True}), ("tasked", {"tasks": tasks}))
    )
    for row in (masked, tasked, masked):
        if finished_record(row) is None:
            with_tasks(row)
    assert finished_record(masked) == finished_record(tasked) is not None
    assert len([*(tmp_path / "runs").iterdir()]) == 1


def test_an_unwritable_folder_of_records_is_refused_before_any_row_runs(bench, measured, capsys, tmp_path):
    (tmp_path / "a file").touch()
    message = bench.refused(capsys, bench.write("nowhere", WITH_BIAS), "--records", tmp_path / "a file")
    assert f"Cannot write {tmp_path / 'a file'}" in message
    assert "--records" in message
    assert measured == ([], [])


def test_tasks_with_several_processes_are_refused_before_any_row_runs(bench, measured, capsys):
    path = bench.write("several", WITH_BIAS, tasks={"names": ["piqa"]}, common={"trainer.devices": 2})
    assert "must have one process for tasks; got 2" in bench.refused(capsys, path)
    assert measured == ([], [])


def test_pairs_of_rows_are_compared_on_tasks(bench, measured, capsys, tmp_path):
    compare = [["with bias: base + bias", "plain: base"]]
    path = bench.write("compared", WITH_BIAS, tasks={"names": ["piqa"], "limit": 4}, compare=compare)
    bench(capsys, path, "--records", tmp_path)
    for row in bench.rows(path, records=tmp_path):
        record, with_bias = finished_record(row), row.name == "with bias"
        answers = {"recovery": "bias", "correct": "1110"} if with_bias else {"recovery": "none", "correct": "0110"}
        one = record["evaluation"][0] | answers
        nll = [3.0, 7.0] if with_bias else [2.0, 6.0]  # of two windows, each with two tokens to predict
        two = one | {"kind": "perplexity", "task": "wikitext2", "window_nll": nll, "seq_len": 3, "tokens": 4}
        two |= {"nll": sum(nll) / 4, "perplexity": math.exp(sum(nll) / 4), "low": 1.0, "high": 99.0}
        archive.write_record(archive.find_record(row)[0], record | {"evaluation": [one, two]})
    lines = bench(capsys, path, "--table", "--records", tmp_path).splitlines()
    (line,) = [line for line in lines if line.startswith("| with bias: base + bias - plain: base")]
    assert cells(line)[1:] == ["0", "+0.250 +- 0.250", "x 1.649 [1.649, 1.649]"]  # exp(1 nat over two tokens)
    (head,) = [line for line in lines if line.startswith("| first - second")]
    assert cells(head) == ["first - second", "seed", "piqa", "wikitext2, 3"]


def test_a_failed_task_keeps_the_record_of_the_run_and_an_unavailable_task_runs_nothing(
    bench, measured, monkeypatch, capsys
):
    def fails(*_, **__):
        raise UserError("no such task")

    tasks = {"names": ["piqa"]}
    path = bench.write("failing", {"plain": {"gprune": False}}, tasks=tasks, common={"ridge": 0.4})
    monkeypatch.setattr(measurement, "evaluate", fails)
    assert "no such task" in bench.refused(capsys, path)
    (row,) = bench.rows(path)
    assert len(archive.read_record(archive.find_record(row)[0])["records"]) > 0
    assert finished_record(row) is None
    monkeypatch.setattr(gprune, "prune", lambda cfg: pytest.fail("a row was run"))
    monkeypatch.setattr(measurement, "require_lm_eval", fails)
    assert "no such task" in bench.refused(capsys, path)
