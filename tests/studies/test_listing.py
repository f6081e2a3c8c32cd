"""List files: shipped lists parse, settings override each other in order, and invalid lists are refused."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
import yaml

from gprune import report
from gprune.__main__ import run as command
from gprune.config import parse
from gprune.studies import listing
from gprune.studies.listing import Listing

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
LISTS = [p for p in sorted(EXPERIMENTS.rglob("*.yaml")) if "rows" in yaml.safe_load(p.read_text(encoding="utf-8"))]


@pytest.mark.parametrize("path", LISTS, ids=lambda path: str(path.relative_to(EXPERIMENTS)))
def test_rows_of_a_shipped_list_have_different_settings_no_export_and_a_command_with_their_settings(path):
    rows = Listing.read(path).rows
    settings = [json.dumps(row.identity, sort_keys=True) for row in rows]
    assert len(set(settings)) == len(settings) == len({(row.name, row.seed) for row in rows})
    for row in rows:
        assert row.config.run.seed == row.seed
        if row.commit is not None:  # cannot be run
            continue
        assert row.config.export.format == "none"
        program, script, *flags = shlex.split(row.command)
        if row.made_elsewhere is not None:
            code, *flags = flags
            assert f"gprune.measure('{row.made_elsewhere}', '{row.config.model.name}', " in code
        assert (program, script) == ("python", "train.py" if row.made_elsewhere is None else "-c")
        assert parse(flags).settings() == row.config.settings(), row.name


def test_the_command_of_a_wheel_is_gprune_prune_and_has_the_imported_modules(bench, monkeypatch, tmp_path):
    (row,) = bench.rows(bench.write("commanded", {"x": {"sparsity.target": 0.3}}))
    monkeypatch.setattr(report, "CLONE", tmp_path)  # no train.py
    monkeypatch.setattr(report, "IMPORTED", ["my_metric.py"])
    assert shlex.split(row.command)[:3] == ["gprune", "prune", "--import=my_metric.py"]
    assert "--sparsity.target=0.3" in row.command


def test_all_ablations_are_rows_of_their_list_and_the_row_default_is_the_default_method():
    (listing,) = (Listing.read(path) for path in LISTS if path.name == "ablations.yaml")
    files = {path.stem for path in (EXPERIMENTS / "ablations").glob("*.yaml")}
    others = {"default", "averaged", "base, bias", "base, least squares"}
    assert {row.name for row in listing.rows} == files | others
    files = [f"--config={EXPERIMENTS / name}.yaml" for name in ("default", "method")]
    default = parse([*files, "--trainer.precision=32-true"])
    (row,) = [row for row in listing.rows if row.name == "default"]
    assert row.config.settings() == default.settings()


def test_settings_override_in_the_order_protocol_file_common_row_command_line(bench):
    (bench.folder / "p.yaml").write_text("ridge: 0.1\nsparsity: {epochs: 3, target: 0.1}\nexport: hf\n")
    (bench.folder / "r.yaml").write_text("sparsity: {target: 0.3}\n")
    path = bench.write(
        "order", {"x": {"config": "r.yaml", "importance": "wifv"}}, protocol=["p.yaml"],
        common={"ridge": 0.2, "sparsity.target": 0.2, "sparsity.epochs": 3},
    )  # fmt: skip
    (row,) = bench.rows(path, flags=["--importance=ifv", "--distill.rank", "4"])
    cfg = row.config
    assert (cfg.ridge, cfg.sparsity.target, cfg.importance, cfg.distill.rank) == (0.2, 0.2, "ifv", 4)
    assert (cfg.sparsity.epochs, cfg.export.format) == (3, "none")


def test_rows_of_a_named_protocol_have_different_run_folders(bench):
    rows = {"a": {}, "b": {"gprune": False}, "c": {"config": "smoke", "ridge": 1}}
    path = bench.write("named", rows, protocol="smoke")
    assert len({row.config.folder for row in bench.rows(path, seeds=[0, 1])}) == 6


def test_row_names_can_be_numbers_repeated_seeds_count_once_and_empty_keys_equal_missing_ones(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("rows: {1: {}, 0.5: {}}\nseeds: [4, 4, 5]\n")
    rows = Listing.read(path).rows
    assert [(row.name, row.seed) for row in rows] == [("1", 4), ("0.5", 4), ("1", 5), ("0.5", 5)]
    empty = "".join(f"{key}:\n" for key in ("common", "compare", "tables", "tasks", "seen", "protocol"))
    path.write_text(f"{empty}rows: {{1: , 0.5: {{}}}}\nseeds: [4, 5]\n")
    assert Listing.read(path).rows == rows


def test_a_list_or_record_of_the_project_that_is_not_there_is_refused_with_its_place(capsys, tmp_path, monkeypatch):
    def refused(*arguments):
        assert command(*arguments) == 2
        return capsys.readouterr().err

    monkeypatch.chdir(tmp_path)
    missing = [
        ("study", ["experiments/lists/headline.yaml", "--table"]), ("report", ["experiments/lists/headline.yaml:base"]),
        ("study", ["experiments/questions/headline.yaml"]),
    ]  # fmt: skip
    missing_record = "report", ["experiments/lists/records/nowhere.json"]
    for arguments in missing:
        assert refused(*arguments).endswith(f" The file of the project is {listing.LISTS / 'headline.yaml'}.\n")
    assert refused(*missing_record).endswith(f" Lists and records of the project are in {listing.LISTS}.\n")
    monkeypatch.setattr(listing, "EXPERIMENTS", tmp_path / "experiments")  # as in an installed wheel
    monkeypatch.setattr(listing, "LISTS", tmp_path / "experiments/lists")
    for arguments in (*missing, missing_record):
        line = refused(*arguments)
        assert line.endswith("in experiments/ of its repository, and not in the installed package.\n")
        assert line.count("\n") == 1
