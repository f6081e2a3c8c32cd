"""Lists of configurations: each one that ships parses; a tiny one runs, resumes, and prints what its records say."""

from __future__ import annotations

import json
import math
import re
import shlex
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

import gprune
from gprune.config import parse
from gprune.errors import UserError
from gprune.evaluation.intervals import paired_ratio
from gprune.models.masks import Masks
from gprune.report.perplexity_tables import over_seeds
from gprune.report.table import Estimate
from gprune.runs.results import FinishedRun
from gprune.studies import archive, command, figures, packing, runner
from gprune.studies import listing as lists
from gprune.studies import tables as results
from gprune.studies.ranges import spread, spread_table
from tests import tiny_run

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
LISTS = [p for p in sorted(EXPERIMENTS.rglob("*.yaml")) if "rows" in yaml.safe_load(p.read_text(encoding="utf-8"))]
ROWS = {"plain": {"gprune": False}, "ours": {}, "other": {"sparsity": {"epochs": 2}, "reliability.switch": False}}


@pytest.mark.parametrize("path", LISTS, ids=lambda path: str(path.relative_to(EXPERIMENTS)))
def test_every_list_that_ships_parses(path):
    listing = lists.Listing.read(path)
    settings = [json.dumps(row.config.settings(), sort_keys=True) for row in listing.rows]
    assert len(set(settings)) == len(settings) == len({(row.name, row.seed) for row in listing.rows})
    for row in listing.rows:
        assert row.config.run.seed == row.seed
        assert (row.config.export, row.config.logging.mode) == ("none", "disabled")


def test_all_ablations_are_rows_of_their_list():
    (listing,) = (lists.Listing.read(path) for path in LISTS if path.name == "ablations.yaml")
    files = {path.stem for path in (EXPERIMENTS / "ablations").glob("*.yaml")}
    assert {row.name for row in listing.rows} == files - {"base"} | {"base", "default"}
    files = [f"--config={EXPERIMENTS / name}.yaml" for name in ("default", "method")]
    default = parse([*files, "--evaluation.controls=[averaged]"])
    assert listing.rows[1].config.settings() == default.settings()


# --- a tiny list ------------------------------------------------------------------------------------------------


class Workbench:
    """Writes lists on the tiny world and runs the command line on them."""

    def __init__(self, world: tiny_run.World, folder: Path):
        self.world, self.folder = world, folder
        flags = [f for f in world.args(folder / "runs") if not f.startswith(("--run.name", "--logging"))]
        self.common = {name: yaml.safe_load(value) for name, value in (f[2:].split("=", 1) for f in flags)}

    def write(self, name: str, rows: dict, **content) -> Path:
        common = self.common | content.pop("common", {})
        path = self.folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump({"common": common, "rows": rows, **content}, sort_keys=False))
        return path

    def __call__(self, capsys, *arguments) -> str:
        if code := command.main([*map(str, arguments)]):
            raise SystemExit(code)
        return capsys.readouterr().out

    def refused(self, capsys, *arguments) -> str:
        """What the one line on stderr says."""
        with pytest.raises(SystemExit) as stop:
            self(capsys, *arguments)
        assert stop.value.code == 2
        err = capsys.readouterr().err
        assert err.startswith("gprune study: ")
        assert err.count("\n") == 1
        return err


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    world = tiny_run.make_world(tmp_path_factory.mktemp("world"))
    folder = tmp_path_factory.mktemp("lists")
    with tiny_run.isolated(folder / "cache"), pytest.MonkeyPatch.context() as patch:
        tiny_run.quick(patch)
        patch.setattr(lists, "OTHER_RECORDS", folder / "records")
        yield Workbench(world, folder)


COMPARE = [["ours: gprune", "ours: averaged"], ["ours: gprune", "plain: base"]]


@pytest.fixture(scope="module")
def first(bench):
    """A list of three rows, and what its first run printed."""
    path = bench.write("first", ROWS, about="Three rows", reference="plain", compare=COMPARE)
    with pytest.MonkeyPatch.context() as patch:
        written = []
        patch.setattr(sys.stdout, "write", written.append)
        assert command.main([str(path)]) == 0
    return path, "".join(written)


@pytest.fixture
def nothing_runs(monkeypatch):
    monkeypatch.setattr(gprune, "prune", lambda cfg: pytest.fail("it ran"))


def test_it_runs_keeps_records_and_prints(bench, first):
    path, out = first
    assert out.startswith("3 configurations: at most")
    for row in lists.Listing.read(path).rows:
        assert f"{row.name}, seed 0: " in out
        kept = archive.record_of(row)
        result = gprune.load_run(Path(row.config.run.dir) / row.config.run_name)
        assert packing.unpacked(kept["masks"]) == result.masks
        assert kept["settings"] == row.config.settings()
        rounded = [r | {"window_nll": [round(v, 4) for v in r["window_nll"]]} for r in result.records]
        assert kept["records"] == rounded
        assert {"name", "inputs", "environment", "steps", "summary"} <= set(kept)
        assert (kept["learning"] is None) == (row.name == "plain")
    table = [line for line in out.splitlines() if line.startswith("| ")]
    for name in ROWS:
        assert any(line.startswith(f"| {name}") for line in table)
    assert "**Three rows**" in out
    assert "Protocol: " in out


def test_it_resumes_without_running_anything_and_prints_the_same(bench, first, nothing_runs, capsys):
    path, out = first
    again = bench(capsys, path)
    assert "configurations" not in again
    assert again == out[out.index("\n**Three rows") :]
    assert bench(capsys, path, "--table") == again


def test_an_equal_row_of_another_list_is_not_run_again(bench, first, nothing_runs, capsys):
    rows = {"same by another name": {"sparsity.epochs": 2, "reliability": {"switch": False}, "logging.tags": ["x"]}}
    out = bench(capsys, bench.write("second", rows))
    assert "| same by another name" in out
    assert "configurations" not in out


def test_other_settings_and_seeds_run_again(bench, first, capsys, monkeypatch):
    path, _ = first
    ran = []
    monkeypatch.setattr(runner, "run", lambda row: ran.append((row.name, row.seed, row.config.sparsity.target)))
    monkeypatch.setattr(runner, "token_hours", lambda pending: f"{len(pending)} pending")
    assert "3 pending" in bench(capsys, path, "--", "--sparsity.target=0.4")
    assert ran == [(name, 0, 0.4) for name in ROWS]
    ran.clear()
    out = bench(capsys, path, "--seeds", "0", "7", "--only", "ours", "plain")
    assert "2 pending" in out
    assert ran == [("plain", 7, 0.5), ("ours", 7, 0.5)]
    ran.clear()
    assert "no records yet" in bench(capsys, path, "--table", "--seeds", "7")
    assert not ran


def test_new_settings_at_their_default_leave_records_what_they_were(bench, first, monkeypatch):
    """And a default that has changed since does not: its record was made with the old one."""
    row = lists.Listing.read(first[0]).rows[1]
    record = archive.record_of(row)
    settings = record["settings"]
    older = {name: value for name, value in settings.items() if name != "ridge"}
    older["sparsity"] = {name: value for name, value in settings["sparsity"].items() if name != "width_multiple"}
    for there, counts in ((older, True), (older | {"ridge": 0.5}, False), (settings | {"gone": 1}, False)):
        monkeypatch.setattr(archive, "read_json", lambda path, there=there, **_: record | {"settings": there})
        assert (archive.record_of(row) == record) == counts


def test_records_are_named_for_people_and_told_apart_by_settings(bench, first):
    (a, b, c), (d,) = (
        lists.Listing.read(path).rows
        for path in (first[0], bench.write("named", {"It's another, 50 %": {}}, common={"sparsity.target": 0.4}))
    )
    assert len({archive.path_of(row) for row in (a, b, c, d)}) == 4
    assert archive.path_of(d).name.startswith("it-s-another-50-seed0-")
    assert archive.path_of(a).name.startswith("plain-seed0-")
    same = lists.Listing.read(bench.write("same", {"x": {"gprune": False, "ridge": 0.01}})).rows[0]
    assert archive.path_of(same) == archive.path_of(a)  # by another name, with a default written out


def test_only_some_rows_and_the_reference_are_printed(bench, first, nothing_runs, capsys):
    out = bench(capsys, first[0], "--only", "ours")
    rows = [line.split("|")[1].strip() for line in out.splitlines() if line.startswith("| ")]
    assert "ours" in rows
    assert "plain" in rows  # the reference
    assert "other" not in rows


# --- shares of the work -----------------------------------------------------------------------------------------


def shares(bench, capsys, monkeypatch, path, count: int) -> list[str]:
    """What each of so many machines runs, one after the other has finished."""
    ran, done = [], set()
    monkeypatch.setattr(
        runner, "run", lambda row: (ran.append(f"{row.name}/{row.seed}"), done.add(archive.path_of(row)))
    )
    monkeypatch.setattr(runner, "token_hours", lambda pending: "")
    monkeypatch.setattr(runner, "text_of", lambda listing, rows: "")
    monkeypatch.setattr(runner, "record_of", lambda row: {} if archive.path_of(row) in done else None)
    for i in range(count):
        bench(capsys, path, "--seeds", "0", "1", "--part", f"{i + 1}/{count}")
    return ran


@pytest.mark.parametrize("count", [1, 2, 4, 9])
def test_parts_cover_all_rows_once_whenever_each_of_them_starts(count, bench, first, capsys, monkeypatch):
    """A later one finds records of an earlier one, and must still take its own share."""
    ran = shares(bench, capsys, monkeypatch, first[0], count)
    assert sorted(ran) == sorted(f"{name}/{seed}" for name in ROWS for seed in (0, 1))


def test_command_lines_cover_all_pending_rows_once(bench, first, nothing_runs, capsys):
    more = ["--", "--corpora.num_samples=6", "--sparsity.target=0.4"]
    assert bench(capsys, first[0], "--commands") == ""  # all done
    ours = bench(capsys, first[0], "--seeds", "0", "3", "--commands").splitlines()
    assert len(ours) == 3  # those of seed 3
    rows = {"a, b (50 %)": {}, "it's $HOME": {"gprune": False}}
    path = bench.write("with spaces", rows)
    found = []
    for line in bench(capsys, path, "--seeds", "0", "1", "--commands", *more).splitlines():
        python, m, module, verb, *arguments = shlex.split(line)
        assert (python, m, module, verb) == ("python", "-m", "gprune", "study")
        options = command.arguments(arguments)
        assert options.lists == [str(path)]
        assert options.flags == more[1:]
        listing = lists.Listing.read(path, seeds=options.seeds, flags=options.flags)
        found += [row for row in listing.rows if row.name in options.only]
    assert [(row.name, row.seed) for row in found] == [(name, seed) for seed in (0, 1) for name in rows]
    assert {(row.config.corpora.num_samples, row.config.sparsity.target) for row in found} == {(6, 0.4)}


def test_flags_of_train_py_come_after_two_dashes():
    options = command.arguments(["a.yaml", "b.yaml", "--seeds", "1", "2", "--only", "x", "--", "--ridge=1", "--", "z"])
    assert (options.lists, options.seeds, options.only) == (["a.yaml", "b.yaml"], [1, 2], ["x"])
    assert options.flags == ["--ridge=1", "--", "z"]
    assert command.arguments(["a.yaml", "--table"]).flags == []


def test_settings_nested_dotted_and_of_every_type_reach_the_configuration(bench):
    rows = {
        "x": {
            "sparsity": {"target": 0.3, "protect": [0, -1]}, "corpora.learn_samples": None, "gprune": False,
            "importance": "wifv", "logging.group": "a b",
        }
    }  # fmt: skip
    (row,) = lists.Listing.read(bench.write("types", rows, common={"corpora.learn_samples": 7}), seeds=[5]).rows
    cfg = row.config
    assert (cfg.sparsity.target, cfg.sparsity.protect, cfg.corpora.learn_samples) == (0.3, [0, -1], None)
    assert (cfg.gprune, cfg.importance, cfg.logging.group, cfg.run.seed) == (False, "wifv", "a b", 5)


def test_later_settings_win_protocol_common_row_and_command_line(bench):
    (bench.folder / "p.yaml").write_text("ridge: 0.1\nsparsity: {epochs: 3, target: 0.1}\n")
    (bench.folder / "r.yaml").write_text("sparsity: {target: 0.3}\n")
    path = bench.write(
        "order", {"x": {"config": "r.yaml", "importance": "wifv"}}, protocol=["p.yaml"],
        common={"ridge": 0.2, "sparsity.target": 0.2, "sparsity.epochs": 3},
    )  # fmt: skip
    (row,) = lists.Listing.read(path, flags=["--importance=wifn"]).rows
    assert (row.config.ridge, row.config.sparsity.target, row.config.importance) == (0.2, 0.2, "wifn")
    assert row.config.sparsity.epochs == 3


# --- tables -----------------------------------------------------------------------------------------------------


def done_of(path: Path, **options) -> tuple[lists.Listing, list]:
    listing = lists.Listing.read(path, **options)
    return listing, [(row, archive.record_of(row)) for row in listing.rows]


def unseen(kept: dict, stage: str, seen: set[str]) -> dict[str, list[float]]:
    return {r["corpus"]: r["window_nll"] for r in kept["records"] if r["stage"] == stage and r["corpus"] not in seen}


def test_comparisons_are_paired_over_windows(bench, first):
    listing, done = done_of(first[0])
    kept = {row.name: k for row, k in done}
    made = results.reported(listing, done)
    alpha = {str(bench.world.corpora["alpha"])}
    assert listing.compare == [tuple(pair) for pair in COMPARE]
    for (a, b), other in zip(listing.compare, (("ours", "averaged"), ("plain", "base")), strict=True):
        expected = paired_ratio(unseen(kept["ours"], "gprune", alpha), unseen(kept[other[0]], other[1], alpha), 31)
        assert results.ratios_of(made.runs, a, b) == [Estimate(*expected)]
        assert expected[0] != 1
        assert f"| {a} / {b} | 1 | {expected[0]:.3f} [{expected[1]:.3f}, {expected[2]:.3f}] |" in [
            " ".join(line.split()) for line in first[1].splitlines()
        ]


def test_rows_are_divided_by_the_reference(first):
    listing, done = done_of(first[0])
    table = results.reported(listing, done).tables[0]
    column = table.columns.index("unseen / base")
    ratios = {tuple(row[:2]): row[column] for row in table.rows}
    kept = {row.name: k for row, k in done}
    seen = {r["corpus"] for r in kept["plain"]["records"] if r["seen"]}
    expected = paired_ratio(unseen(kept["other"], "gprune", seen), unseen(kept["plain"], "base", seen), 31)
    assert ratios["other", "gprune"] == Estimate(*expected)
    assert ratios["plain", "base"] is None


def test_one_division_into_seen_and_unseen_for_all_rows(bench, first):
    """`seen` replaces what each row has used; unseen means are over the other corpora."""
    delta, alpha = (str(bench.world.corpora[c]) for c in ("delta", "alpha"))
    seen = {alpha, delta}
    path = bench.write("divided", ROWS, seen=[alpha, delta], reference="plain")
    listing, done = done_of(path)
    runs = results.reported(listing, done).runs
    assert {r["corpus"] for run in runs for r in run.records if r["seen"]} == seen
    assert not seen & {r["corpus"] for run in runs for r in run.records if not r["seen"]}
    kept = {row.name: k for row, k in done}
    expected = paired_ratio(unseen(kept["ours"], "gprune", seen), unseen(kept["plain"], "base", seen), 31)
    table = results.reported(listing, done).tables[0]
    found = {tuple(row[:2]): row[table.columns.index("unseen / base")] for row in table.rows}
    assert found["ours", "gprune"] == Estimate(*expected)
    assert "In every row alpha.txt, delta.txt count as seen" in results.text_of(listing, done)
    with pytest.raises(UserError, match=r"Row 'plain': expected text that the list calls unseen, got .*alpha"):
        results.reported(*done_of(bench.write("hidden", ROWS, seen=[delta])))


def test_seeds_are_one_row_with_an_interval_over_them(bench, capsys):
    rows = {"plain": {"gprune": False}, "wifv": {"gprune": False, "importance": "wifv"}}
    path = bench.write("seeds", rows, seeds=[0, 1, 2], compare=[["wifv: base", "plain: base"]], reference="plain")
    out = bench(capsys, path)
    assert out.startswith("5 configurations") or out.startswith("6 configurations")  # one is there already
    listing, done = done_of(path)
    assert [(row.name, row.seed) for row, _ in done] == [(name, seed) for seed in (0, 1, 2) for name in rows]
    table = results.reported(listing, done).tables[0]
    by_stage = {(row[0], row[1]): row for row in table.rows}
    assert by_stage["plain (3 seeds)", "base"][2] == by_stage["wifv (3 seeds)", "base"][2] == 3
    seen = {str(bench.world.corpora["alpha"])}
    pairs = [[k for row, k in done if row.seed == seed] for seed in (0, 1, 2)]
    ratios = [paired_ratio(unseen(b, "base", seen), unseen(a, "base", seen), 31)[0] for a, b in pairs]
    (compared,) = results.comparison_table(listing, results.reported(listing, done).runs).rows
    assert compared == ["wifv: base / plain: base", 3, over_seeds(ratios)]
    assert len(set(ratios)) == 3
    # each seed is divided by the reference's run of that seed
    column = table.columns.index("unseen / base")
    assert by_stage["wifv (3 seeds)", "base"][column] == over_seeds(ratios)
    assert by_stage["plain (3 seeds)", "base"][column] is None
    fewer = results.reported(listing, [(row, k) for row, k in done if (row.name, row.seed) != ("plain", 2)]).tables[0]
    assert {row[column] for row in fewer.rows if row[0].startswith("wifv")} == {None}  # nothing to divide by


def test_costs_of_every_step_are_printed(first, bench, capsys, nothing_runs):
    out = bench(capsys, first[0], "--table", "--costs")
    _, done = done_of(first[0])
    cells = [tuple(cell.strip() for cell in line.split("|")[1:7]) for line in out.splitlines() if line.startswith("| ")]
    for row, kept in done:
        assert {"evaluate", "save_and_check"} <= set(kept["steps"])
        for step, used in kept["steps"].items():
            (line,) = [c for c in cells if c[:2] == (f"{row.name}, seed {row.seed}", step)]
            assert line[2] == f"{used['seconds']:.1f}"
            assert line[3:5] == tuple(f"{used[f'forward{kind}_tokens']:,}" for kind in ("", "_backward"))
            assert line[5] == f"{used['peak_memory_mib']:,}"


def test_figures_are_drawn_from_records(first, bench, capsys, tmp_path, nothing_runs):
    bench(capsys, first[0], "--table", "--figures", tmp_path / "figures")
    assert {"first-means.png", "first-ratios.png", "first-stability.png"} <= {
        p.name for p in (tmp_path / "figures").iterdir()
    }


def test_a_list_says_which_tables_it_wants_and_masks_of_seeds_are_compared(bench, first, capsys):
    path = bench.write("masks", {"plain": ROWS["plain"]}, seeds=[0, 1], tables=["stability"])
    out = bench(capsys, path)
    assert "| seen" not in out
    (line,) = [line for line in out.splitlines() if line.startswith("| plain, seed 0")]
    assert [cell.strip() for cell in line.split("|")[1:4]] == ["plain, seed 0", "plain, seed 1", "ffn"]
    masks = [packing.unpacked(kept["masks"]).ffn for _, kept in done_of(path)[1]]
    jaccard = np.mean([float((a & b).sum() / (a | b).sum()) for a, b in zip(*masks, strict=True)])
    assert float(line.split("|")[4]) == pytest.approx(jaccard, abs=5e-4)
    assert jaccard < 1


def test_spreads_over_rows_of_their_base_and_of_the_result(bench, capsys):
    """log(max / min) of unseen geometric means, by hand from the records."""
    rows = {"a": {}, "b": {"importance": "wifv"}, "c": {"importance": "wifv", "recovery": "bias"}}
    groups = {"metrics": ["a", "b"], "all": ["a", "b", "c"]}
    path = bench.write("spread", rows, spread=groups)
    assert spread_table(groups, []).rows == []  # none is there yet
    out = bench(capsys, path)
    _, done = done_of(path)
    alpha = str(bench.world.corpora["alpha"])
    stages = ("base", "averaged", "gprune")
    logs = {
        (row.name, stage): np.mean([
            np.log(r["perplexity"]) for r in kept["records"]
            if (r["stage"], r["recovery"]) == (stage, row.config.recovery) and r["corpus"] != alpha
        ])
        for row, kept in done for stage in stages
    }  # fmt: skip
    for group, names in groups.items():
        base, averaged, ours = (np.ptp([logs[name, stage] for name in names]) for stage in stages)
        lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in out.splitlines()]
        (cells,) = [cells for cells in lines if cells and cells[0] == f"{group}: {', '.join(names)}"]
        for cell, expected in zip(cells[1:], (base, averaged, ours, ours / base), strict=True):
            value, low, high = map(float, re.findall(r"[\d.]+", cell))
            assert value == pytest.approx(expected, abs=6e-4)
            assert low <= high
            assert low < value * 1.5 and high > value / 1.5  # noqa: PT018


def spread_run(name: str, windows: dict[str, np.ndarray], *, seed: int = 0, stage: str = "gprune") -> FinishedRun:
    """A run of which nothing is known but the losses of windows of unseen text."""
    records = [{"stage": stage, "recovery": "none", "seen": False, "corpus": c, "seq_len": 11, "content_hash": c,
                "window_nll": list(nll)} for c, nll in windows.items()]  # fmt: skip
    settings = {"recovery": "none", "run": {"seed": seed}}
    return FinishedRun(Path(name), name, settings, records, {}, Masks([], []), None, [])


def test_an_interval_of_a_spread_covers_it():
    """Rows whose windows differ by a constant have a spread without noise; with noise it is near the truth."""
    generator = np.random.default_rng(0)
    windows = {c: generator.normal(100, 10, n) for c, n in (("a", 400), ("b", 399))}

    def run(name: str, shift: float, noise: float = 0.0, **more) -> FinishedRun:
        moved = {c: nll + shift + noise * generator.normal(0, 1, len(nll)) for c, nll in windows.items()}
        return spread_run(name, moved, **more)

    turned = spread_run("y", {c: windows[c] + 5 for c in "ba"})  # the order in which corpora are listed is nothing
    exact = spread([run("x", 0.0), turned], ["x", "y"], "gprune")
    assert torch.allclose(exact, torch.full_like(exact, 0.5))
    noisy = spread([run("x", 0.0), run("y", 5.0, 4.0)], ["x", "y"], "gprune")
    low, high = torch.quantile(noisy[1:], torch.tensor([0.025, 0.975], dtype=noisy.dtype)).tolist()
    assert low < 0.5 < high
    assert low < float(noisy[0]) < high
    assert high - low == pytest.approx(2 * 1.96 * 4 / np.sqrt(400) / 10 / np.sqrt(2), rel=0.25)  # two corpora
    # what is drawn is centred on what was found, also where many rows are alike
    alike = [run(name, 0.0, 4.0) for name in "uvwxyz"]
    drawn = spread(alike, list("uvwxyz"), "gprune")
    assert float(drawn[1:].mean()) == pytest.approx(float(drawn[0]), abs=1e-3)
    assert spread([run("x", 0.0)], ["x", "y"], "gprune") is None
    assert spread([run("x", 0.0)], ["x"], "gprune") is None


def test_a_spread_is_over_seeds_that_all_rows_have_and_over_the_same_windows():
    windows = {"a": np.arange(10.0)}
    runs = [spread_run("x", windows), spread_run("x", {"a": windows["a"] + 90}, seed=1)]
    runs.append(spread_run("y", {"a": windows["a"] + 10}))
    assert float(spread(runs, ["x", "y"], "gprune")[0]) == pytest.approx(1)  # seed 0 alone
    assert spread(runs[1:], ["x", "y"], "gprune") is None  # no seed in common
    with pytest.raises(UserError, match="the same unseen text, but x, y were not"):
        spread([runs[0], spread_run("y", {"b": windows["a"]})], ["x", "y"], "gprune")


def test_a_pair_without_common_windows_is_said_to_have_no_ratio(bench, first):
    path = bench.write("apart", ROWS, compare=[["ours: gprune", "plain: base"]], reference="plain")
    listing, done = done_of(path)
    other = [(row, kept if row.name == "ours" else elsewhere(kept)) for row, kept in done]
    assert "No ratio" not in results.text_of(listing, done)
    text = results.text_of(listing, other)
    assert "No ratio: the two have no seed in common, or were evaluated on other windows." in text
    assert re.search(r"\| ours: gprune / plain: base +\| +0 \| +\|", text)


def elsewhere(kept: dict) -> dict:
    return kept | {"records": [r | {"content_hash": "elsewhere"} for r in kept["records"]]}


def test_rows_that_have_read_other_text_are_refused(bench, first):
    listing, done = done_of(first[0])
    (row, kept), *others = done
    role = next(iter(kept["inputs"]["text"]))
    inputs = kept["inputs"] | {"text": kept["inputs"]["text"] | {role: "other"}}
    with pytest.raises(UserError, match=rf"have read other text as {role}: expected one set of files and mirrors"):
        results.reported(listing, [*others, (row, kept | {"inputs": inputs})])


def test_a_record_of_other_settings_is_never_the_place_of_a_new_one(bench, capsys):
    path = bench.write("one", {"x": {"gprune": False, "ridge": 0.5}})
    (row,) = lists.Listing.read(path).rows
    there = archive.path_of(row).with_stem(archive.path_of(row).stem + "-1")
    there.write_text(json.dumps({"settings": {"ridge": 0.7}}))
    (row,) = lists.Listing.read(path).rows
    assert archive.path_of(row) == there.with_stem(there.stem.removesuffix("-1"))
    archive.path_of(row).write_text(there.read_text())
    (row,) = lists.Listing.read(path).rows
    assert archive.path_of(row) == there.with_stem(there.stem.removesuffix("-1") + "-2")
    for file in (lists.OTHER_RECORDS / "runs").glob("x-seed0-*"):
        file.unlink()


def test_a_grid_runs_every_row_at_every_point_and_divides_by_the_base_of_its_own_budget(bench, capsys, tmp_path):
    rows = {"plain": {"gprune": False}, "ours": {}}
    grid = {"sparsity.target": [0.3, 0.5], "importance": ["wifv", "wanda_sp"]}
    path = bench.write("grid", rows, grid=grid, reference="plain",
                       compare=[["ours: gprune", "plain: base"]], common={"evaluation.controls": []})  # fmt: skip
    kept_in = tmp_path / "kept"
    out = bench(capsys, path, "--records", kept_in)
    points = [f"target {target}, importance {metric}" for target in (0.3, 0.5) for metric in ("wifv", "wanda_sp")]
    listing = lists.Listing.read(path, records=kept_in)
    assert [row.name for row in listing.rows] == [f"{row}, {point}" for row in rows for point in points]
    assert [row.config.sparsity.target for row in listing.rows] == [0.3, 0.3, 0.5, 0.5] * 2
    assert listing.compare == [(f"ours, {point}: gprune", f"plain, {point}: base") for point in points]
    assert len([*(kept_in / "runs").iterdir()]) == 8
    kept = {row.name: archive.record_of(row) for row in listing.rows}
    used = {r["corpus"] for k in kept.values() for r in k["records"] if r["seen"]}
    for point in points:
        ratio = paired_ratio(
            unseen(kept[f"ours, {point}"], "gprune", used), unseen(kept[f"plain, {point}"], "base", used), 31
        )[0]
        (line,) = [line for line in out.splitlines() if line.startswith(f"| ours, {point} ") and "[" in line][:1]
        assert f"{ratio:.3f} [" in line.split("|")[-2]
        (line,) = [line for line in out.splitlines() if line.startswith(f"| plain, {point} ") and "[" in line][:1]
        assert not line.split("|")[-2].strip()  # its own base
    alone = bench.write("alone", {"plain": {"gprune": False, "sparsity.target": 0.5}, "ours": {"sparsity.target": 0.3}},
                        reference="plain", common={"evaluation.controls": [], "importance": "wifv"})  # fmt: skip
    out = bench(capsys, alone, "--records", kept_in)  # the records are those of the grid; another budget has no ratio
    assert "kept" not in out
    (line,) = [line for line in out.splitlines() if line.startswith("| ours ") and "[" in line][:1]
    assert not line.split("|")[-2].strip()


def test_a_list_is_run_and_not_planned(bench, capsys, nothing_runs):
    path = bench.write("planned", {"x": {}})
    assert "expected no --dry_run" in bench.refused(capsys, path, "--", "--dry_run=true")
    path = bench.write("planned", {"x": {"dry_run": True}})
    assert "expected no --dry_run" in bench.refused(capsys, path)


def test_an_empty_mapping_takes_back_what_the_list_says(bench):
    common = {"sparsity.allocation": "owl", "sparsity.options": {"multiple": 3}, "evaluation": {}}
    path = bench.write("options", {"x": {}, "y": {"sparsity.options": {}}}, common=common)
    x, y = (row.config.sparsity.options for row in lists.Listing.read(path).rows)
    assert (x, y) == ({"multiple": 3}, {})


def test_a_long_name_of_a_row_is_a_file_all_the_same(bench):
    rows = lists.Listing.read(bench.write("long", {name: {} for name in ("x" * 300, "\u00e9" * 300)})).rows
    for path in map(archive.path_of, rows):
        assert len(path.name.encode()) < 255
        assert "-seed0-" in path.name


def test_a_row_is_divided_by_the_base_of_its_own_seed_alone(bench, capsys):
    path = bench.write("bases", {"plain": {"gprune": False}, "ours": {}}, reference="plain", seeds=[0, 1])
    bench(capsys, path)
    listing, done = done_of(path)
    without = [(row, kept) for row, kept in done if (row.name, row.seed) != ("plain", 1)]
    ours = [(row, kept) for row, kept in without if (row.name, row.seed) != ("ours", 0)]
    for rows, there in ((done, True), (without, False), (ours, False)):
        summary = results.reported(listing, rows).tables[0]
        found = [cells[-1] for cells in summary.rows if cells[0].startswith("ours") and cells[1] == "gprune"]
        assert [value is not None for value in found] == [there]


def test_lines_of_rows_over_the_tokens_that_each_learned_from(bench, capsys, tmp_path):
    """What comes out of each row over the dense model; gates and distillation count alike."""
    distilled = {"recovery": "distill", "distill.tokens": 96}
    rows = {"base": {"gprune": False}, "base, then": {"gprune": False, **distilled}, "all": distilled}
    common = {"evaluation.controls": []}
    path = bench.write("learned", rows, common=common, lines={"base": ["base", "base, then"], "gprune": ["all"]})
    bench(capsys, path, "--figures", tmp_path)
    assert {"learned-tokens.png", "learned-tokens.svg"} <= {p.name for p in tmp_path.iterdir()}
    listing, done = done_of(path)
    axes = figures.by_tokens(listing.lines, results.reported(listing, done).runs).axes[0]
    drawn = {c.get_label(): c.lines[0].get_xydata() for c in axes.containers}
    kept = {row.name: kept for row, kept in done}
    tokens = {name: sum(s["forward_backward_tokens"] for s in k["steps"].values()) for name, k in kept.items()}
    assert (tokens["base"], tokens["base, then"]) == (0, 96)
    assert tokens["all"] > 96
    used = {r["corpus"] for k in kept.values() for r in k["records"] if r["seen"]}
    stages = {"base": "base", "base, then": "base", "all": "gprune"}
    for line, names in listing.lines.items():
        ratios = [paired_ratio(unseen(kept[n], stages[n], used), unseen(kept[n], "dense", used), 31)[0] for n in names]
        assert drawn[line][:, 0].tolist() == [tokens[n] / 1000 for n in names]
        assert drawn[line][:, 1] == pytest.approx(ratios)
    assert figures.by_tokens({}, []) is None
    runs = results.reported(listing, done).runs
    with pytest.raises(UserError, match="one row of 'both' for each number of tokens, got base, then and again, which"):
        figures.by_tokens({"both": ["base, then", "again"]}, [*runs, replace(runs[1], name="again")])


def test_tokens_that_a_row_learned_from_do_not_depend_on_what_the_cache_had(first):
    """Those of scores, which the first row alone pays for, and of controls are left out; those of rounds are not."""
    kept = archive.record_of(lists.Listing.read(first[0]).rows[1])
    own = archive.learned_tokens(kept["steps"])
    assert own == kept["steps"]["thresholds"]["forward_backward_tokens"] > 0
    more = {
        name: {"forward_backward_tokens": 100}
        for name in ("calibrate", "steps/0.2/calibrate", "evaluate", "steps/0.2/thresholds")
    }
    assert archive.learned_tokens(kept["steps"] | more) == own + 100


def test_a_curve_has_the_ratio_of_each_row_to_its_own_base(bench, capsys, tmp_path):
    """A line per metric and stage over budgets, with the averaged control beside gprune."""
    common = {"evaluation.controls": ["base", "averaged"]}
    rows = {f"{m} {t}": {"importance": m, "sparsity.target": t} for m in ("wifv", "wanda_sp") for t in (0.5, 0.3)}
    path = bench.write("budgets", rows, common=common, curve={"over": "sparsity.target", "of": "importance"})
    bench(capsys, path, "--figures", tmp_path)
    assert {"budgets-curve.png", "budgets-curve.svg"} <= {p.name for p in tmp_path.iterdir()}
    listing, done = done_of(path)
    axes = figures.curve(listing.curve, results.reported(listing, done).runs).axes[0]
    drawn = {c.get_label(): c.lines[0].get_xydata() for c in axes.containers}
    assert set(drawn) == {f"{m}, {s}" for m in ("wifv", "wanda_sp") for s in ("gprune", "averaged")}
    used = {str(bench.world.corpora["alpha"])} | {r["corpus"] for _, k in done for r in k["records"] if r["seen"]}
    for row, kept in done:
        for stage in ("gprune", "averaged"):
            ratio = paired_ratio(unseen(kept, stage, used), unseen(kept, "base", used), 31)[0]
            at = dict(drawn[f"{row.config.importance}, {stage}"])
            assert at[row.config.sparsity.target] == pytest.approx(ratio)
    assert axes.get_xlabel() == "parameters of the scope removed"
    turned = lists.Curve(over="sparsity.width_multiple", of="sparsity.target")
    halves = results.reported(listing, [d for d in done if d[0].config.importance == "wifv"]).runs
    axes = figures.curve(turned, halves).axes[0]
    assert {c.get_label() for c in axes.containers} == {
        f"{t} removed, {s}" for t in ("30%", "50%") for s in ("gprune", "averaged")
    }
    assert (axes.get_xlabel(), axes.get_xticks().tolist()) == ("sparsity.width_multiple", [1])
    twice = bench.write("twice", rows | {"again": {"importance": "wifv", "sparsity.target": 0.3, "ridge": 0.2}},
                        common=common, curve={"over": "sparsity.target", "of": "importance"})  # fmt: skip
    bench(capsys, twice)
    with pytest.raises(UserError, match=r"one row for each sparsity.target and importance, got two of 0.3 and wifv"):
        figures.curve(listing.curve, results.reported(*done_of(twice)).runs)
    (row, kept), *others = done
    moved = [(row, kept | {"inputs": kept["inputs"] | {"model": "another", "text": {"score": "of its tokenizer"}}})]
    assert len(results.reported(listing, [*moved, *others]).runs) == len(done)  # two models cut text in two ways
    bare = [
        replace(r, records=[k for k in r.records if k["stage"] != "base"]) for r in results.reported(listing, done).runs
    ]
    assert figures.curve(listing.curve, bare) is None
    all_seen = [
        replace(r, records=[k | {"seen": True} for k in r.records]) for r in results.reported(listing, done).runs
    ]
    assert figures.curve(listing.curve, all_seen) is None
    words = lists.Curve(over="recovery", of="importance")
    with pytest.raises(UserError, match="a setting that is a number, but recovery is 'none'"):
        figures.curve(words, results.reported(listing, done).runs)
    assert figures.curve(listing.curve, []) is None
    assert "curve: expected settings" in bench.refused(capsys, bench.write("bad", rows, curve={"over": "x", "of": "y"}))


# --- tasks ------------------------------------------------------------------------------------------------------


@pytest.fixture
def measured(monkeypatch, bench):
    """Rows run with `gprune evaluate` replaced; the arguments and the configurations that it saw."""
    from gprune.benchmarks import measurement as evaluation

    calls, configs, real = [], [], gprune.prune
    (bench.folder / "evaluation.json").unlink(missing_ok=True)

    def evaluate(model, asked, *, dense=False, pruned=True):
        stages = ["dense"] * dense + ["base"] * pruned
        calls.append((asked.tasks, asked.limit, stages))
        about = {
            "kind": "zero_shot",
            "limit": asked.limit,
            "correct": "0110",
            "recovery": "none",
            "content_hash": "c",
            **dict.fromkeys(("acc", "acc_stderr", "acc_norm", "acc_norm_stderr"), 0.5),
            **{"split": "test", "dtype": "float32", "note": "", "standard_protocol": False, "questions": 4},
        }
        records = [about | {"stage": s, "task": t} for s in stages for t in asked.tasks]
        return records, bench.folder / "evaluation.json"

    monkeypatch.setattr(evaluation, "evaluate", evaluate)
    monkeypatch.setattr(gprune, "prune", lambda cfg: configs.append(cfg) or real(cfg))
    return calls, configs


def with_tasks(row):
    folder, kept = runner.run(row)
    return runner.measure_tasks(row, folder, kept) if row.wanted_tasks else kept


def test_tasks_are_measured_once_and_the_dense_model_is_shared(bench, measured):
    calls, configs = measured
    rows = {"plain": {"gprune": False}, "mended": {"gprune": False, "recovery": "bias"}}
    tasks = {"names": ["piqa", "arc_easy"], "limit": 4, "seeds": [0]}
    own = {"common": {"ridge": 0.3}}  # records of their own
    path = bench.write("tasks", rows, tasks=tasks, **own)
    listing = lists.Listing.read(path)
    kept = [with_tasks(row) for row in listing.rows]
    assert calls == [(("piqa", "arc_easy"), 4, [stage]) for stage in ("dense", "base", "base")]
    assert [cfg.export for cfg in configs] == ["none", "hf"]  # masks do not hold what recovery changed
    for row, k in zip(listing.rows, kept, strict=True):
        assert [r["stage"] for r in k["evaluation"]] == ["base"] * 2
        both = archive.as_run(row, k, None).evaluation
        assert [(r["stage"], r["run"]) for r in both] == [(s, row.name) for s in ("dense", "dense", "base", "base")]
    assert all(archive.record_of(row) for row in listing.rows)
    # a list without tasks is content with that, and prints none; one with others, or of another model, is not
    assert archive.as_run(lists.Listing.read(bench.write("none", rows, **own)).rows[0], kept[0], None).evaluation == []
    assert all(archive.record_of(row) for row in lists.Listing.read(bench.write("none", rows, **own)).rows)
    more = lists.Listing.read(bench.write("more", rows, tasks=tasks | {"limit": 9}, **own))
    assert not any(map(archive.record_of, more.rows))
    assert not any(map(archive.record_of, lists.Listing.read(path, flags=["--model.dtype=bfloat16"]).rows))
    low = lists.Listing.read(path, flags=["--model.dtype=bfloat16"]).rows[0]
    with_tasks(low)
    assert [stages for *_, stages in calls[-2:]] == [["dense"], ["base"]]  # a dense model of its own
    # other tasks lie beside these, not in their place
    other = {row.name: (archive.path_of(row), with_tasks(row)) for row in more.rows}
    assert all(kept["tasks"]["limit"] == 9 for _, kept in other.values())
    for row in lists.Listing.read(path).rows:
        assert archive.path_of(row) != other[row.name][0]
        assert archive.record_of(row)["tasks"]["limit"] == 4
    # a list that wants masks keeps the tasks, and one that wants tasks keeps the masks
    masked = bench.write("masked", {"plain": rows["plain"]}, tables=["repeatability"], **own)
    (row,) = lists.Listing.read(masked, records=bench.folder / "both").rows
    (tasked,) = lists.Listing.read(
        bench.write("tasked", {"plain": rows["plain"]}, tasks=tasks, **own), records=bench.folder / "both"
    ).rows
    for one in (row, tasked, row):
        if archive.record_of(one) is None:
            with_tasks(one)
    assert archive.record_of(row) == archive.record_of(tasked) is not None
    (only,) = (bench.folder / "both/runs").iterdir()
    # of several records of a row the one with masks serves whoever wants them
    archive.write(
        only.with_stem(f"a-{only.stem}"), archive.record_of(row) | {"masks": None, "tasks": tasks | {"limit": 9}}
    )
    assert archive.record_of(row)["masks"] is not None
    assert archive.path_of(row) == only
    # with a seed that the tasks do not name, there are none
    assert "evaluation" not in with_tasks(lists.Listing.read(path, seeds=[1]).rows[0])


@pytest.mark.parametrize("index", [0, 1])
def test_of_several_processes_none_waits_for_tasks(bench, measured, monkeypatch, capsys, index):
    """Which may take longer than torch lets a process wait: all rows of all lists come first."""
    calls, configs = measured
    met = []
    monkeypatch.setattr(runner, "processes", lambda: (index, 2))
    monkeypatch.setattr(runner, "process_index", lambda: index)
    monkeypatch.setattr(torch.distributed, "barrier", lambda: met.append((len(configs), len(calls))))
    tasks, common = {"names": ["piqa"], "limit": 4}, {"ridge": 0.4 + index / 10}
    paths = [
        bench.write(f"{name}{index}", {name: {"gprune": False, "recovery": name}}, tasks=tasks, common=common)
        for name in ("bias", "least_squares")
    ]
    said = bench(capsys, *paths)
    assert met == [(1, 0), (2, 0)]
    assert [stages for *_, stages in calls] == [[["dense"], ["base"], ["base"]], []][index]
    assert [name in said for name in ("bias, seed 0: tasks", "least_squares, seed 0: tasks")] == [index == 0] * 2
    assert [archive.record_of(row) is not None for p in paths for row in lists.Listing.read(p).rows] == [index == 0] * 2


def test_of_several_processes_two_lists_want_other_tasks_of_one_row(bench, measured, monkeypatch, capsys):
    monkeypatch.setattr(runner, "processes", lambda: (0, 2))
    monkeypatch.setattr(torch.distributed, "barrier", lambda: None)
    paths = [
        bench.write(
            f"limit{n}", {"one": {"gprune": False}}, tasks={"names": ["piqa"], "limit": n}, common={"ridge": 0.6}
        )
        for n in (4, 9)
    ]
    bench(capsys, *paths)
    kept = [archive.record_of(row) for path in paths for row in lists.Listing.read(path).rows]
    assert [k["tasks"]["limit"] for k in kept] == [4, 9]


def test_rows_are_compared_on_tasks_pair_by_pair(bench, measured, monkeypatch, capsys):
    rows = {"plain": {"gprune": False}, "mended": {"gprune": False, "recovery": "bias"}}
    path = bench.write(
        "compared", rows, tasks={"names": ["piqa"], "limit": 4}, common={"ridge": 0.5},
        compare=[["mended: base + bias", "plain: base"]],
    )  # fmt: skip
    monkeypatch.setattr("gprune.benchmarks.measurement.require_lm_eval", lambda: "0")
    bench(capsys, path)
    for row in lists.Listing.read(path).rows:
        kept = archive.read(archive.path_of(row))
        mended = row.name == "mended"
        one = kept["evaluation"][0] | {
            "recovery": "bias" if mended else "none",
            "correct": "1110" if mended else "0110",
        }
        nll = [3.0, 7.0] if mended else [2.0, 6.0]  # of two windows, each with two tokens to predict
        two = one | {"kind": "perplexity", "task": "wikitext2", "window_nll": nll, "seq_len": 3, "tokens": 4}
        two |= {"nll": sum(nll) / 4, "perplexity": math.exp(sum(nll) / 4), "low": 1.0, "high": 99.0}
        archive.write(archive.path_of(row), kept | {"evaluation": [one, two]})
    out = bench(capsys, path, "--table")
    (line,) = [line for line in out.splitlines() if line.startswith("| mended: base + bias - plain: base")]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[1:] == ["0", "+0.250 +- 0.250", "x 1.649 [1.649, 1.649]"]  # exp(1 nat over two tokens)
    (head,) = [line for line in out.splitlines() if line.startswith("| first - second")]
    assert [cell.strip() for cell in head.strip("|").split("|")] == ["first - second", "seed", "piqa", "wikitext2, 3"]


def test_tasks_that_fail_leave_the_run_and_tasks_that_cannot_be_measured_run_nothing(
    bench, measured, monkeypatch, capsys
):
    from gprune.benchmarks import measurement as evaluation

    def fails(*_, **__):
        raise UserError("no such task")

    rows, tasks = {"plain": {"gprune": False}}, {"names": ["piqa"], "seeds": None}  # null: of all seeds
    path = bench.write("failing", rows, tasks=tasks, common={"ridge": 0.4})
    monkeypatch.setattr(evaluation, "evaluate", fails)
    monkeypatch.setattr(evaluation, "require_lm_eval", lambda: "0")
    assert "no such task" in bench.refused(capsys, path)
    (row,) = lists.Listing.read(path).rows
    assert len(archive.read(archive.path_of(row))["records"]) > 0
    assert archive.record_of(row) is None
    monkeypatch.setattr(gprune, "prune", lambda cfg: pytest.fail("it ran"))
    monkeypatch.setattr(evaluation, "require_lm_eval", fails)
    assert "no such task" in bench.refused(capsys, path)


# --- files ------------------------------------------------------------------------------------------------------

SCALARS = st.one_of(st.none(), st.booleans(), st.integers(-5, 5), st.text("ab", max_size=2))
NUMBERS = st.fixed_dictionaries(
    {"stage": st.sampled_from("ab"), "recovery": st.sampled_from("ab"), "nll": st.lists(st.integers(0, 3), max_size=3)},
    optional={"own": SCALARS, "often": st.just(1)},
)


@given(numbers=st.lists(NUMBERS, max_size=8))
def test_what_is_the_same_in_several_numbers_is_kept_once_and_comes_back(numbers):
    kept = json.loads(json.dumps({"name": "x", "records": packing.folded(numbers)}))
    assert packing.unfolded(kept) == {"name": "x", "records": numbers}
    for stage in kept["records"]["stages"]:
        assert len(stage["each"]) < 2 or not any(
            all(name in own and own[name] == value for own in stage["each"]) for name, value in stage["each"][0].items()
        )


def test_the_repository_keeps_masks_where_a_table_is_about_them(bench, first, monkeypatch):
    monkeypatch.setattr(lists, "EXPERIMENTS", bench.folder)
    (row, *_) = (
        row for row in lists.Listing.read(first[0], records=bench.folder / "other").rows if row.name == "plain"
    )
    assert not row.masks
    assert with_tasks(row)["masks"] is None
    assert archive.record_of(row)["masks"] is None
    path = bench.write("of masks", {"plain": ROWS["plain"]}, tables=["repeatability"])
    (wanted,) = lists.Listing.read(path, records=bench.folder / "other").rows
    assert archive.record_of(wanted) is None  # there is a record, but without masks
    assert archive.path_of(wanted) == archive.path_of(row)
    assert with_tasks(wanted)["masks"] == archive.record_of(row)["masks"] is not None


@pytest.mark.parametrize(
    "kept",
    [
        None, [], {}, {"records": []}, {"records": {"all": {}}},
        {"records": {"all": {}, "stages": [1]}}, {"records": {"all": {}, "stages": [{"all": 1, "each": [{}]}]}},
        {"records": {"all": {}, "stages": [{"all": {}, "each": ["x"]}]}},
    ],
)  # fmt: skip
def test_what_is_no_folded_record_stays_what_it_is(kept):
    assert packing.unfolded(kept) == kept


def test_a_record_is_short_lines(first):
    """So that people and `git diff` can read it."""
    row = lists.Listing.read(first[0]).rows[1]
    lines = archive.path_of(row).read_text().splitlines()
    assert len(lines) < 100
    assert max(map(len, lines)) < archive.WIDTH + 50


# --- masks ------------------------------------------------------------------------------------------------------


@given(data=st.data(), depth=st.integers(1, 4))
def test_packed_masks_come_back(data, depth):
    def drawn() -> list[torch.Tensor]:
        sizes = [data.draw(st.integers(1, 37)) for _ in range(depth)]
        return [torch.tensor(data.draw(st.lists(st.booleans(), min_size=n, max_size=n))) for n in sizes]

    masks = Masks(drawn(), drawn())
    kept = json.loads(json.dumps(packing.packed(masks)))
    again = packing.unpacked(kept)
    assert again == masks
    assert all(m.dtype == torch.bool for m in (*again.ffn, *again.attention))


# --- what is refused --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("rows: {a: {}}\nrow: 1\n", ["row", "compare"]),
        ("about: nothing\n", ["'rows'"]),
        ("- rows\n", ["mapping"]),
        ("rows: [", ["YAML", "bad.yaml", "line 1"]),
        ("rows: {a: 3}\n", ["row 'a'", "got 3"]),
        ("rows: {a: {sparsity.target: 2}}\n", ["Row 'a'", "--sparsity.target", "got 2"]),
        ("rows: {a: {sparsity.aim: 0.2}}\n", ["Row 'a'", "sparsity.aim"]),
        ("rows: {a: {importance: wanda}}\n", ["Row 'a'", "'wanda'"]),
        ("rows: {a: {config: nowhere.yaml}}\n", ["Row 'a'", "nowhere.yaml"]),
        ("protocol: nowhere.yaml\nrows: {a: {}}\n", ["Row 'a'", "nowhere.yaml"]),
        ("rows: {a: {}}\nreference: b\n", ["reference", "(a)", "'b'"]),
        ("rows: {a: {}}\nspread: {all: [a, b]}\n", ["spread", "(a)", "'b'"]),
        ("rows: {a: {}}\ncompare: [['a: gprune', 'b: base']]\n", ["compare", "(a)", "'b'"]),
        ("rows: {a: {}, b: {}}\ncontrols: [b]\nspread: {all: [a, b]}\n", ["spread", "(a)", "'b'"]),
        ("rows: {a: {}}\ntasks: [piqa]\n", ["tasks", "names: [piqa", '["piqa"]']),
        ("rows: {a: {}}\ntasks: {limit: 3}\n", ["tasks", "names: [piqa"]),
        ("rows: {a: {}}\nspread: [a]\n", ["spread", "lists of rows by name"]),
        ("rows: {a: {}}\nspread: {all: a}\n", ["spread", "lists of rows by name"]),
        ("rows: {a: {}}\ncompare: [3]\n", ["compare", "pairs of stages", "[3]"]),
        ("rows: {a: {}}\ncommon: [x]\n", ["common", "settings by name"]),
        ("rows: {a: {}}\nseeds: [a]\n", ["seeds", "whole numbers"]),
        ("rows: {a: {}}\ntables: [[x]]\n", ["tables", "comparison"]),
        ("rows: {a: {}}\ntables: [perplexities]\n", ["tables", "comparison", "perplexities"]),
        ("rows: {a: {}}\nprotocol: 3\n", ["protocol", "a file or files"]),
        ("rows: {a: {}}\ncurve: {over: ridge}\n", ["curve", "`over` and `of`"]),
        ("rows: {a: {}}\ngrid: {model.trust_remote_code: [true]}\n", ["row 'a'", "behind --"]),
        ("rows: {a: {}}\ngrid: {model: [{trust_remote_code: true}]}\n", ["row 'a'", "behind --"]),
        ("rows: {a: {model: '{name: x/y, trust_remote_code: true}'}}\n", ["row 'a'", "the group model", "one text"]),
        ("rows: {a: {run: '{seed: 3}'}}\n", ["row 'a'", "the group run", "one text"]),
        ("rows: {a: {}}\nlines: {all: a}\n", ["lines", "lists of rows by name"]),
        ("rows: {a: {}}\nlines: {all: [b]}\n", ["lines", "expected rows (a)", "'b'"]),
        ("rows: {a: {}}\nseen: wiki\n", ["seen", "corpora"]),
        ("rows: {a: {}}\n1: {}\n", ["mapping", "got 1"]),
        ("rows: {a: {run.seed: 5}}\n", ["row 'a'", "--seeds", "got --run.seed"]),
        ("rows: {a: {}}\ncommon: {run: {seed: 5}}\n", ["--seeds", "got --run.seed"]),
        ("rows: {a: {config: 5}}\n", ["row 'a', config", "got 5"]),
        ("rows: {a: {config: {x: 1}}}\n", ["row 'a', config", "got {'x': 1}"]),
        ("rows: {a: {importance: 2020-01-01}}\n", ["Row 'a'", "2020-01-01"]),
        ("rows: {a: {}}\ntasks: {names: [piqa], limt: 100}\n", ["tasks", "limit", "limt"]),
        ("rows: {a: {}}\ntasks: {names: [piqa], seeds: 0}\n", ["tasks", "seeds"]),
        ("rows: {a: {}}\ntasks: {names: [piqa], limit: many}\n", ["tasks", "limit", "many"]),
    ],
)
def test_a_bad_list_is_one_line(content, words, bench, capsys, nothing_runs):
    path = bench.folder / "bad.yaml"
    path.write_text(content)
    line = bench.refused(capsys, path)
    assert all(word in line for word in words), line


def test_empty_keys_are_as_good_as_none_and_names_may_be_numbers(bench):
    path = bench.folder / "empty.yaml"
    empty = ("common", "compare", "spread", "controls", "seeds", "tables", "tasks", "seen", "protocol", "reference")
    path.write_text("".join(f"{key}:\n" for key in empty) + "rows: {a: , b: {}}\n")
    bare = bench.folder / "bare.yaml"
    bare.write_text("rows: {a: {}, b: {}}\n")
    found, expected = lists.Listing.read(path), lists.Listing.read(bare)
    assert replace(found, path=bare, about="bare") == expected
    path.write_text("rows: {1: {}, 0.5: {}}\ncontrols: [1]\nreference: 0.5\nspread: {2: [0.5]}\nseeds: [4, 4, 5]\n")
    found = lists.Listing.read(path)
    assert [(row.name, row.seed, row.control) for row in found.rows] == [
        ("1", 4, True), ("0.5", 4, False), ("1", 5, True), ("0.5", 5, False)
    ]  # fmt: skip
    assert (found.reference, found.spread) == (("0.5",), {"2": ["0.5"]})


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--only", "ours", "nobody"], ["--only", "plain, ours, other", "'nobody'"]),
        (["--part", "0/2"], ["--part", "'0/2'"]), (["--part", "3/2"], ["--part", "'3/2'"]),
        (["--part", "half"], ["--part", "'half'"]), (["--part", "1/2/3"], ["--part", "'1/2/3'"]),
        (["--", "--sparsity.target=0"], ["Row 'plain'", "--sparsity.target"]),
        (["--", "--run.seed=1"], ["row 'plain'", "--seeds", "got --run.seed"]),
    ],
)  # fmt: skip
def test_bad_arguments_are_one_line(arguments, words, bench, first, capsys, nothing_runs):
    line = bench.refused(capsys, first[0], *arguments)
    assert all(word in line for word in words), line


def test_a_list_that_is_not_there_is_one_line(bench, capsys):
    assert "nowhere.yaml" in bench.refused(capsys, bench.folder / "nowhere.yaml")


def test_a_stage_that_is_not_there_is_named(bench, first, capsys, nothing_runs):
    path = bench.write("stages", ROWS, compare=[["ours: best", "plain: base"]])
    line = bench.refused(capsys, path)
    assert "expected a stage of 'ours' (dense, base, averaged, gprune), got 'best'" in line


def test_compare_waits_for_rows_that_have_not_run(bench, first):
    path = bench.write("waiting", ROWS | {"later": {"sparsity.target": 0.1}}, compare=[["later: gprune", "ours: base"]])
    listing = lists.Listing.read(path)
    done = [(row, kept) for row in listing.rows if (kept := archive.record_of(row)) is not None]
    assert len(done) == 3
    assert "Comparisons" not in results.text_of(listing, done)
    with pytest.raises(UserError, match="expected a stage"):
        results.ratios_of(results.reported(listing, done).runs, "ours", "ours: base")


@pytest.mark.parametrize("more", ["--config=seed.yaml", "--run={seed: 7}"])
def test_a_seed_by_another_way_than_seeds_is_refused(bench, tmp_path, monkeypatch, capsys, more):
    """Records are named for the seed that the list gives."""
    monkeypatch.chdir(tmp_path)
    Path("seed.yaml").write_text("run: {seed: 7}")
    err = bench.refused(capsys, bench.write("seeded", {"plain": {"gprune": False}}), "--", more)
    assert "Row 'plain': expected seeds as `seeds` or --seeds, got 7 from a file or a flag." in err


def test_options_of_a_row_take_the_place_of_those_below(bench, tmp_path):
    """As in a file: options of two rules do not mix."""
    owl = {"gprune": False, "sparsity": {"allocation": "owl", "options": {"spread": 0.05}}}
    path = bench.write("options", {"owl": owl}, common={"sparsity.options": {"multiple": 3.0}})
    (row,) = lists.Listing.read(path).rows
    assert row.config.sparsity.options == {"spread": 0.05}
