"""Running lists: records, resuming, parts and tasks."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

import gprune
from gprune.benchmarks import measurement
from gprune.errors import UserError
from gprune.report.tables import caption
from gprune.storage.files import Cache
from gprune.studies import archive, runner
from gprune.studies.archive import finished_record
from tests import tiny_run
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


def test_a_finished_study_runs_nothing_and_prints_the_same_tables(bench, first, nothing_runs):
    path, out = first
    output = bench(path)
    assert "configurations" not in output
    assert output == out[out.index("\n**Three rows") :]
    assert bench(path, "--table") == output
    of_ours = {cells(line)[0] for line in bench(path, "--only", "ours").splitlines() if line.startswith("| ")}
    assert of_ours & ROWS.keys() == {"ours"}


def test_rows_with_other_settings_or_seeds_run_unless_only_tables_are_printed(bench, first, monkeypatch):
    path, _ = first
    ran = []  # (row, seed, target)
    monkeypatch.setattr(runner, "run_row", lambda row, _: ran.append((row.name, row.seed, row.config.sparsity.target)))
    monkeypatch.setattr(runner, "largest_costs", lambda pending: f"{len(pending)} pending")
    assert "3 pending" in bench(path, "--", "--sparsity.target=0.4")
    assert ran == [(name, 0, 0.4) for name in ROWS]
    ran.clear()
    out = bench(path, "--seeds", "0", "7", "--only", "ours", "plain")
    assert "2 pending" in out
    assert [line.partition(";")[0] for line in out.splitlines() if line.startswith("row ")] == [
        "row 3 of 4: plain, seed 7", "row 4 of 4: ours, seed 7"  # the rows with seed 0 are finished
    ]  # fmt: skip
    assert "row 4 of 4: ours, seed 7; less than a minute left" in out
    assert ran == [("plain", 7, 0.5), ("ours", 7, 0.5)]
    ran.clear()
    assert "no records yet" in bench(path, "--table", "--seeds", "7")
    assert not ran


@pytest.mark.parametrize("count", [1, 2, 4, 9])
def test_parts_run_every_row_once_also_if_they_start_one_after_another(count, bench, first, monkeypatch):
    """A later part finds the records of an earlier part, and must still run only the rows of this part."""
    ran = []
    monkeypatch.setattr(runner, "run_row", lambda row, _: ran.append(row))
    monkeypatch.setattr(runner, "largest_costs", lambda pending: "")
    monkeypatch.setattr(runner, "print_results", lambda *_: None)
    monkeypatch.setattr(runner, "find_record", lambda row: archive.Found(row, {"masks": {}} if row in ran else None))
    for i in range(count):
        bench(first[0], "--seeds", "0", "1", "--part", f"{i + 1}/{count}")
    assert sorted((row.name, row.seed) for row in ran) == sorted((name, seed) for name in ROWS for seed in (0, 1))


STATISTICS = {  # rows that need moments; Gram matrices of three corpora; saliency of the scoring corpus
    "plain": {}, "least squares": {"recovery": "least_squares"}, "taylor": {"importance": "taylor"},
}  # fmt: skip


def test_the_first_row_collects_statistics_and_evaluates_the_dense_model_for_all_rows_of_a_list(
    bench, monkeypatch, tmp_path
):
    """A later row reads text again only if no earlier row has read it, and has the results of a run alone."""
    tokens = 4 * 32  # of one corpus
    scored = {"corpora.score": [str(bench.world.corpora[name]) for name in tiny_run.SEEN]}
    common = {"gprune": False, "ridge": 0.7, **scored}  # other settings than in other tests, so that no record exists
    together = bench.write("one pass", STATISTICS, common=common)
    monkeypatch.setenv("GPRUNE_CACHE", str(tmp_path / "together"))
    bench(together, "--records", tmp_path / "records")
    costs, results = {}, {}
    for row in bench.rows(together, records=tmp_path / "records"):
        record = archive.finished_record(row)
        step = record["steps"].get("calibrate", {})
        costs[row.name] = [step.get(f"{kind}_tokens", 0) for kind in ("forward", "forward_backward")]
        results[row.name] = [record["masks"], *(r["nll"] for r in record["records"])]
    assert costs == {"plain": [0, 3 * tokens], "least squares": [0, 0], "taylor": [0, 0]}
    assert len([*Cache("evaluations").path("").glob("*")]) == 3  # the dense model is evaluated once on each corpus
    for name in ("least squares", "taylor"):
        row = {name: STATISTICS[name] | {"run.dir": str(tmp_path / name)}}
        alone = bench.write(f"alone {name}", row, common=common)
        monkeypatch.setenv("GPRUNE_CACHE", str(tmp_path / f"cache of {name}"))
        bench(alone, "--records", tmp_path / f"records of {name}")
        (row,) = bench.rows(alone, records=tmp_path / f"records of {name}")
        record = archive.finished_record(row)
        assert sum(record["steps"]["calibrate"].get(f"{kind}_tokens", 0) for kind in ("forward", "forward_backward"))
        assert [record["masks"], *(r["nll"] for r in record["records"])] == results[name]


def test_rows_with_other_text_or_another_model_share_no_statistics(bench):
    rows = STATISTICS | {"more": {"recovery": "least_squares", "corpora.num_samples": 6}}
    plain, *others = bench.rows(bench.write("shared", rows, common={"gprune": False}))
    needs = runner.needs_of_list(plain.config, others)
    scored, *recovered = (str(bench.world.corpora[name]) for name in tiny_run.SEEN)
    assert needs == {scored: {"gram", "saliency"}, **{name: {"gram"} for name in recovered}}
    assert runner.needs_of_list(plain.config, others[-1:]) == {}


# --- tasks


@pytest.fixture
def measured(monkeypatch, bench):
    """Replace `gprune evaluate` by invented results.

    Returns:
        The calls to it, as (tasks, limit, stages), and the configurations with which `gprune.prune` was called.
    """
    calls, configs, prune = [], [], gprune.prune

    def evaluate(model, options, *, dense=False, pruned=True):
        stages = [*(["dense"] if dense else []), *(["pruned"] if pruned else [])]
        calls.append((options.tasks, options.limit, stages))
        result = {
            "kind": "zero_shot", "limit": options.limit, "correct": "0110", "correct_norm": "0110", "recovery": "none",
            "content_hash": "c", "split": "test", "dtype": "float32", "note": "", "standard_protocol": False,
            "questions": 4,
            **dict.fromkeys(("acc", "acc_stderr", "acc_norm", "acc_norm_stderr"), 0.5),
        }  # fmt: skip
        records = [result | {"stage": stage, "task": task} for stage in stages for task in options.tasks]
        return records, bench.folder / "evaluation.json"

    monkeypatch.setattr(measurement, "evaluate", evaluate)
    monkeypatch.setattr(measurement, "require_lm_eval", lambda: None)
    monkeypatch.setattr(measurement, "load_tasks", lambda *_: ({}, {}))
    monkeypatch.setattr(gprune, "prune", lambda cfg, **options: configs.append(cfg) or prune(cfg, **options))
    return calls, configs


def run_with_tasks(row):
    """Run a row, measure its tasks, and return the record."""
    folder, record = runner.run_row(row, {})
    runner.measure_tasks(row, folder, record)
    return record


WITH_BIAS = {"plain": {"gprune": False}, "with bias": {"gprune": False, "recovery": "bias"}}


def test_tasks_are_measured_once_for_each_row_and_once_for_the_dense_model(bench, measured):
    calls, configs = measured
    tasks = {"names": ["piqa", "arc_easy"], "limit": 4}
    path = bench.write("tasks", WITH_BIAS, tasks=tasks, common={"ridge": 0.3})  # other settings than in other tests
    rows = bench.rows(path)
    for row in rows:
        with_tasks = archive.row_to_run(row, run_with_tasks(row), None).evaluation
        stages = ("dense", "dense", "pruned", "pruned")
        assert [(r["stage"], r["run"]) for r in with_tasks] == [(stage, row.name) for stage in stages]
    assert calls == [(("piqa", "arc_easy"), 4, [stage]) for stage in ("dense", "pruned", "pruned")]
    # The row with recovery needs an export, because recovery changes weights, which masks do not contain.
    assert [cfg.export.format for cfg in configs] == ["none", "hf"]
    assert all(finished_record(row) for row in rows)
    (other_dtype,) = bench.rows(path, flags=["--model.dtype=bfloat16"])[:1]
    assert finished_record(other_dtype) is None
    run_with_tasks(other_dtype)
    assert [stages for *_, stages in calls[-2:]] == [["dense"], ["pruned"]]  # the dense model has another dtype too
    # Rows of another list that refer to these keep the results of its own tasks.
    others = {name: {"row": f"tasks.yaml:{name}"} for name in WITH_BIAS}
    without_tasks = bench.rows(bench.write("none", others))
    assert all(finished_record(row) and not archive.task_results(row, finished_record(row)) for row in without_tasks)
    other_tasks = bench.rows(bench.write("more", others, tasks=tasks | {"limit": 9}))
    assert not any(map(finished_record, other_tasks))
    for row in other_tasks:
        run_with_tasks(row)
    assert all(finished_record(row) for row in (*rows, *other_tasks))
    # Results of other tasks of the same list are named, and measured again only on request.
    changed = bench.write("tasks", WITH_BIAS, tasks=tasks | {"limit": 5}, common={"ridge": 0.3})
    assert f"{rows[0].tasks_file} has tasks with limit 4, not 5. It is not used; --again" in bench(changed)
    bench(changed, "--again")
    assert calls[-1] == (("piqa", "arc_easy"), 5, ["pruned"])


def test_a_row_with_a_byte_budget_keeps_its_settings_in_the_record_with_tasks(bench, measured):
    rows = {"with bias": WITH_BIAS["with bias"] | {"sparsity.target": "80KiB"}}
    (row,) = bench.rows(bench.write("bytes", rows, tasks={"names": ["piqa"], "limit": 4}))
    record = run_with_tasks(row)
    assert record["settings"] == row.config.settings()
    assert finished_record(row) is not None
    assert {r.get("cost") for r in record["records"]} == {"bytes"}
    assert "of the bytes of ffn removed" in caption(record["records"])


def test_pairs_of_rows_are_compared_on_tasks(bench, measured, tmp_path):
    compare = [["with bias", "plain"]]
    path = bench.write("compared", WITH_BIAS, tasks={"names": ["piqa"], "limit": 4}, compare=compare)
    bench(path, "--records", tmp_path)
    for row in bench.rows(path, records=tmp_path):
        if row.name == "with bias":
            stage, recovery, correct, nll = "recovered", "bias", "1110", [3.0, 7.0]
        else:
            stage, recovery, correct, nll = "pruned", "none", "0110", [2.0, 6.0]  # of two windows
        (piqa,) = archive.read_task_records(row, row.tasks_file)
        piqa |= {"stage": stage, "recovery": recovery, "correct": correct}
        wikitext = piqa | {
            "kind": "perplexity", "task": "wikitext2", "window_nll": nll, "seq_len": 3, "tokens": 4,
            "nll": sum(nll) / 4, "perplexity": math.exp(sum(nll) / 4), "low": 1.0, "high": 99.0,
        }  # fmt: skip
        archive.write_task_records(row, row.tasks_file, [piqa, wikitext])
    lines = bench(path, "--table", "--records", tmp_path).splitlines()
    (line,) = [line for line in lines if line.startswith("| with bias - plain")]
    # One more of four answers is correct. Each window has 1 nat more for two tokens, so the ratio is exp(0.5).
    assert cells(line)[1:] == ["0", "+0.250 +- 0.250", "x 1.649 [1.649, 1.649]"]
    (header,) = [line for line in lines if line.startswith("| first - second")]
    assert cells(header) == ["first - second", "seed", "piqa", "wikitext2, 3"]


def test_a_failed_task_keeps_the_record_of_the_run_and_an_unavailable_task_runs_nothing(bench, measured, monkeypatch):
    def raise_error(*_, **__):
        raise UserError("no such task")

    tasks = {"names": ["piqa"]}
    path = bench.write("failing", {"plain": {"gprune": False}}, tasks=tasks, common={"ridge": 0.4})
    monkeypatch.setattr(measurement, "evaluate", raise_error)
    assert "no such task" in bench.refused(path)
    (row,) = bench.rows(path)
    assert len(archive.read_record(row.file)["records"]) > 0
    assert finished_record(row) is None
    monkeypatch.setattr(gprune, "prune", lambda cfg: pytest.fail("a row was run"))
    monkeypatch.setattr(measurement, "require_lm_eval", raise_error)
    assert "no such task" in bench.refused(path)
