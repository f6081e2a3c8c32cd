"""The script behind the table of metrics, on a tiny model: it resumes, keeps records, and compares like with like."""

from __future__ import annotations

import json
import sys

import pytest

import gprune
from experiments import metrics
from gprune import cli
from gprune.storage.files import read_json, write_json
from tests import built_in, tiny_run


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """`main(...)` of the script with its records in a folder of their own; returns what it printed."""
    world = tiny_run.make_world(tmp_path_factory.mktemp("world"))
    folder = tmp_path_factory.mktemp("metrics")
    with tiny_run.isolated(folder / "cache"), pytest.MonkeyPatch.context() as patch:
        tiny_run.quick(patch)
        patch.setattr(metrics, "RECORDS", folder / "records")

        def main(capsys, *arguments, flags=()):
            own = [f for f in world.args(folder / "runs") if not f.startswith("--run.name")]
            patch.setattr(sys, "argv", ["metrics", *arguments, "--", *own, *flags])
            assert metrics.main() == 0
            return capsys.readouterr().out

        main.records = folder / "records"
        main.recover = str(world.corpora["alpha"])
        yield main


ARGUMENTS = [
    *("--metrics", *metrics.SPREAD, "random"), *("--sparsities", "0.5", "0.3"),
    *("--baselines", "wanda_sp, global", "depth (ShortGPT)"),
]  # fmt: skip


def test_every_built_in_metric_is_in_the_table_or_ranks_as_one_that_is():
    assert set(built_in.METRICS) - set(metrics.METRICS) == {"wifn"}  # neurons rank as by wanda_sp
    assert set(metrics.SPREAD) | set(metrics.AT_OTHER_SPARSITIES) <= set(metrics.METRICS)


def test_all_configurations_parse_and_have_names_of_their_own():
    found = list(metrics.configurations(metrics.METRICS, (0.5, 0.2, 0.3), metrics.BASELINES, []))
    assert len({c.path for c in found}) == len(found) == 14 + len(metrics.BASELINES) + 2 * 4
    assert all(c.config.sparsity.target == c.sparsity for c in found if c.metric)
    assert all(c.config.gprune == c.name.startswith("gprune") for c in found if c.metric is None)


def test_it_runs_keeps_records_and_resumes(table, capsys, monkeypatch):
    out = table(capsys, *ARGUMENTS)
    assert "12 configurations: at most" in out  # six metrics at 50 %, two baselines, four metrics at 30 %
    kept = sorted(path.name for path in table.records.iterdir())
    assert len(kept) == 12
    assert {"wanda-sp-0-5.json", "depth--shortgpt-.json", "taylor-0-3.json"} <= set(kept)
    record = json.loads((table.records / "wanda-sp-0-5.json").read_text())
    assert {r["stage"] for r in record["records"]} == {"dense", "base", "base_averaged", "gprune"}
    assert all(len(r["window_nll"]) == 2 for r in record["records"])
    assert out.count("log(max / min)") == 1  # at 30 % one of the five is not run
    lines = [line for line in out.splitlines() if line.startswith("| ") and "alone" in line]
    assert sum(line.startswith("| wanda_sp 0.5") for line in lines) == 1
    monkeypatch.setattr(gprune, "prune", lambda cfg: pytest.fail("it ran again"))
    again = table(capsys, *ARGUMENTS)
    assert "configurations: at most" not in again
    assert again[again.index("dense:") :] == out[out.index("dense:") :]


def test_other_settings_are_run_again_and_the_table_runs_nothing(table, capsys, monkeypatch):
    table(capsys, *ARGUMENTS)
    monkeypatch.setattr(gprune, "prune", lambda cfg: pytest.fail("it ran"))
    out = table(capsys, "--table", "--metrics", "random", flags=["--run.seed=1"])
    assert "No records yet." in out
    ran = []
    monkeypatch.setattr(gprune, "prune", lambda cfg: ran.append(cfg.run.seed) or pytest.skip("far enough"))
    with pytest.raises(pytest.skip.Exception):
        table(capsys, "--metrics", "random", "--baselines", flags=["--run.seed=1"])
    assert ran == [1]


def test_other_settings_never_take_the_place_of_a_record(table, capsys):
    table(capsys, *ARGUMENTS)
    before = (table.records / "random-0-5.json").read_text()
    table(capsys, "--metrics", "random", "--baselines", flags=["--ridge=0.5"])
    assert (table.records / "random-0-5.json").read_text() == before
    (other,) = table.records.glob("random-0-5-*.json")
    assert read_json(other)["settings"]["ridge"] == 0.5
    out = table(capsys, "--table", "--metrics", "random", "--baselines", flags=["--ridge=0.5"])
    assert "| random 0.5 " in out
    other.unlink()


def test_rows_are_divided_into_seen_and_unseen_by_what_gprune_uses(table, capsys):
    """A base run has seen one corpus only; its row still stands beside gprune's on the same division."""
    table(capsys, *ARGUMENTS)
    kept = json.loads((table.records / "depth--shortgpt-.json").read_text())
    corpora = [r["corpus"] for r in kept["records"] if r["stage"] == "dense"]
    seen = {corpora[0], corpora[1]}
    (row,) = metrics.rows_of(kept, None, seen)
    values = {r["corpus"]: r["perplexity"] for r in kept["records"] if r["stage"] == "base"}
    assert row[:2] == ["depth (ShortGPT)", "alone"]
    assert float(row[-5]) == pytest.approx((values[corpora[0]] * values[corpora[1]]) ** 0.5, abs=0.06)
    assert float(row[-4]) == pytest.approx(values[corpora[2]], abs=0.06)


def test_records_of_before_controls_had_these_names_are_found(table, capsys, monkeypatch):
    """What `unrecovered` asks for, runs of then left without being asked; a row that is not there is not made up."""
    arguments = ["--metrics", "--baselines", "depth (ShortGPT)", "wifv, global, bias (FLAP, FFN only)"]
    flags = ["--corpora.recover=[" + table.recover + "]"]
    out = table(capsys, *arguments, flags=flags)
    monkeypatch.setattr(gprune, "prune", lambda cfg: pytest.fail("it ran again"))
    for path in table.records.glob("*.json"):
        kept = read_json(path)
        if not kept["settings"]["gprune"]:
            kept["settings"]["evaluation"]["controls"] = ["base", "base_averaged"]
            write_json(path, kept)
    again = table(capsys, *arguments, flags=flags)
    assert again[again.index("dense:") :] == out[out.index("dense:") :]
    path = table.records / "wifv--global--bias--flap--ffn-only-.json"
    kept = read_json(path)
    kept["records"] = [r for r in kept["records"] if (r["stage"], r["recovery"]) != ("base", "none")]
    write_json(path, kept)
    assert "wifv, global, bias" not in table(capsys, "--table", *arguments, flags=flags)


def test_the_records_that_are_kept_here_are_those_of_todays_configurations(monkeypatch):
    """experiments/README.md quotes them."""
    monkeypatch.setattr(metrics, "RECORDS", metrics.HERE / "records" / "metrics")
    wanted = list(metrics.configurations(metrics.METRICS, (0.5, 0.2, 0.3), metrics.BASELINES, []))
    there = [c.name for c in wanted if c.path.exists()]
    assert len(there) >= 32
    assert [c.name for c in wanted if metrics.found(c) is not None] == there


@pytest.mark.parametrize(
    "arguments",
    [["--tabel"], ["--baselines", "nothing"], ["--metrics", "nothing"], ["--table", "--", "--nothing=1"], ["stray"]],
)
def test_arguments_that_cannot_be_are_one_line(arguments, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["metrics", *arguments])
    monkeypatch.setattr(gprune, "prune", lambda cfg: pytest.fail("it ran"))
    assert metrics.main() == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("experiments.metrics: ")
    assert err.count("\n") == 1


def test_interrupted_is_130(capsys, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(sys, "argv", ["metrics", "--table"])
    monkeypatch.setattr(metrics, "found", interrupt)
    assert metrics.main() == 130
    assert capsys.readouterr().err.count("\n") == 1


def test_without_the_reference_metric_nothing_is_divided_by_another(table, capsys):
    table(capsys, *ARGUMENTS)
    out = table(capsys, "--table", "--metrics", "random", "--baselines")
    rows = [line for line in out.splitlines() if line.startswith("| random 0.5")]
    assert len(rows) == 2
    assert all(line.split("|")[-2].strip() == "" for line in rows)


def test_help_says_how_to_run(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["metrics", "--help"])
    with pytest.raises(SystemExit) as stop:
        metrics.main()
    assert stop.value.code == 0
    assert "GPRUNE_DATA_DIR" in capsys.readouterr().out
    assert cli.parse(["--config", str(metrics.HERE / "protocol.yaml")]).corpora.num_samples == 32
