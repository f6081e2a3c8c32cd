"""Results of lists as frames and files, compared with the records."""

from __future__ import annotations

import csv
import errno
import io
import json
import os
import re
import shlex
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

import gprune
from gprune.__main__ import run as command
from gprune.config.parse import parse
from gprune.errors import UserError
from gprune.evaluation.intervals import paired_ratio
from gprune.report.tables import Table, mean_over_seeds
from gprune.runs.numbers import COLUMNS
from gprune.studies.archive import Found, find_record, finished_record
from gprune.studies.listing import Listing
from gprune.studies.study import WRITERS, StudyResult
from tests.studies.workbench import ROWS, cells, unseen

SUFFIXES = {".csv", ".json", ".md", ".tex", ".html"}


@pytest.fixture(scope="module")
def study(bench, first):
    return gprune.load_study(first[0], records=bench.records)


def test_a_frame_has_a_line_for_each_row_and_seed_with_the_numbers_of_its_record(bench, first, study):
    frame = study.to_frame()
    assert list(frame["row"]) == list(ROWS)
    assert list(frame.columns[: len(COLUMNS)]) == COLUMNS
    by_row = frame.set_index("row")
    done = {row.name: (row, record) for row, record in study.done}
    for name, (row, record) in done.items():
        line = by_row.loc[name]
        window_nll = unseen(record, "pruned")
        nll_of_corpora = [np.mean(nll) / 31 for nll in window_nll.values()]  # 31 predicted tokens in a window
        assert line["unseen"] == pytest.approx(np.exp(np.mean(nll_of_corpora)), rel=1e-6)
        assert line["parameters_after"] == record["summary"]["parameters_after"]
        assert line["seconds"] == pytest.approx(sum(step["seconds"] for step in record["steps"].values()))
        assert (line["stage"], line["precision"], line["record"]) == ("pruned", "32-true", str(find_record(row)[0]))
        ratio = [line[f"unseen_over_dense{end}"] for end in ("", "_low", "_high")]
        assert ratio == pytest.approx(paired_ratio(window_nll, unseen(record, "dense"), 31), rel=1e-9)
        for r in record["records"]:
            if r["stage"] == "pruned":
                label = r["corpus"].rpartition("/")[2]
                assert line[f"perplexity/{label}"] == r["perplexity"]


def test_frames_and_csv_have_means_over_seeds_beside_the_lines_per_seed(bench, first):
    """The second seed has the records of the first, with other losses of the pruned models."""
    listing = Listing.read(first[0], seeds=[0, 1], records=bench.records)
    found = []
    for row in listing.rows:
        record = finished_record(replace(row, seed=0, settings=row.settings | {"run.seed": 0}))
        if row.seed == 1:
            records = []
            for r in record["records"]:
                factor = 1 if r["stage"] == "dense" else 1.1
                records.append(r | {"seed": 1, "window_nll": [factor * nll for nll in r["window_nll"]]})
            settings = record["settings"] | {"run": record["settings"]["run"] | {"seed": 1}}
            path = record["path"].with_stem(f"{record['path'].stem}-other-seed")
            record = record | {"records": records, "settings": settings, "path": path}
        found.append(Found(row, [record], [], []))
    study = StudyResult(listing, found)
    assert repr(study) == f"StudyResult({str(first[0])!r}, 6 of 6 rows and seeds)"
    frame = pd.read_csv(io.StringIO(WRITERS[".csv"](study)))
    for name in ROWS:
        of_row = frame[frame["row"] == name]
        assert of_row["seed"].tolist() == ["0", "1", "mean"]
        expected = mean_over_seeds(of_row["unseen"].iloc[:2])
        mean = of_row.iloc[2]
        assert (mean["unseen"], mean["unseen_low"], mean["unseen_high"]) == pytest.approx(tuple(expected))
        assert mean["parameters_after"] == of_row["parameters_after"].iloc[0]
        assert pd.isna(mean["record"])
    assert study.to_frame()["seed"].tolist() == [0, 0, 0, 1, 1, 1]


def test_a_frame_has_columns_only_for_settings_in_which_rows_differ(study):
    settings = study.to_frame().set_index("row")[["gprune", "sparsity.epochs", "reliability.switch"]]
    assert settings.loc["plain", "gprune"] == False  # noqa: E712 - a bool of NumPy
    assert list(settings["sparsity.epochs"]) == [1, 1, 2]
    assert "importance" in COLUMNS
    assert not [name for name in study.to_frame().columns[len(COLUMNS) :] if name.startswith(("corpora.", "run."))]


def test_a_report_on_a_list_says_that_the_list_sets_the_seen_corpora(bench, first, tmp_path):
    seen = [str(bench.world.corpora[name]) for name in ("alpha", "delta")]
    path = bench.write("seen in a report", ROWS, seen=seen)
    assert command("report", [str(path), "--records", str(bench.records), "--output", str(tmp_path)]) == 0
    text = (tmp_path / "report.md").read_text()
    assert "In every row alpha.txt, delta.txt count as seen" in text
    assert "each run's own" not in text


def test_a_frame_with_stages_has_a_line_for_each_stage(study):
    frame = study.to_frame(stages=True)
    assert list(frame[frame["row"] == "ours"]["stage"]) == ["dense", "pruned"]
    dense = frame[frame["stage"] == "dense"]
    assert dense["unseen"].nunique() == 1
    assert dense["gap"].isna().all()
    assert set(dense["recovery"]) == {"none"}
    assert dense["importance"].isna().all()
    pd.testing.assert_frame_equal(
        frame.groupby("row", sort=False).tail(1)[COLUMNS].reset_index(drop=True), study.to_frame()[COLUMNS],
        check_dtype=False,
    )  # fmt: skip


def test_columns_do_not_depend_on_the_selected_rows(bench, first, study):
    frame_of_one_row = gprune.load_study(first[0], records=bench.records, rows=["plain"]).to_frame()
    assert list(frame_of_one_row.columns) == list(study.to_frame().columns)


def test_selecting_a_row_that_the_list_does_not_have_is_refused(first):
    with pytest.raises(UserError, match=r"The rows must name rows of .*first\.yaml \(plain, ours, other\); got 'mine'"):
        gprune.load_study(first[0], rows=["mine"])


def test_rows_and_seeds_without_a_record_are_listed(bench, first, capsys, nothing_runs, caplog):
    path = bench.write("gaps", ROWS | {"later": {"sparsity.target": 0.1}}, seeds=[0, 7])
    out = bench(capsys, path, "--table")
    message = (
        "Without a record, so left out: 5 of 8 rows and seeds: later (seeds 0, 7); plain (seed 7); ours (seed 7); "
    )
    assert message + "other (seed 7)." in out
    with caplog.at_level("WARNING", logger="gprune"):
        missing = gprune.load_study(path, records=bench.records).missing
    assert [(row.name, row.seed) for row in missing] == [
        ("later", 0), ("plain", 7), ("ours", 7), ("other", 7), ("later", 7),
    ]  # fmt: skip
    capsys.readouterr()
    assert "Without a record" not in bench(capsys, first[0], "--table")


def test_files_prints_the_record_of_each_row_and_seed_and_runs_nothing(bench, first, capsys, nothing_runs):
    path = bench.write("files", ROWS, seeds=[0, 7])
    lines = [cells(line) for line in bench(capsys, path, "--files").splitlines() if line.startswith("| ")]
    by_row_and_seed = {(line[0], line[1]): line for line in lines[1:]}
    for row in bench.rows(path):
        line = by_row_and_seed[row.name, str(row.seed)]
        assert line[2:4] == ["float32", "32-true"]
        assert line[4] == (str(find_record(row)[0]) if row.seed == 0 else "none")
    assert len(by_row_and_seed) == 6


def test_commands_prints_the_command_of_each_row_and_seed_and_runs_nothing(bench, first, capsys, nothing_runs):
    path = bench.write("commands", ROWS, seeds=[0, 7])
    printed = bench(capsys, path, "--commands").strip().splitlines()
    titles, commands = printed[::3], printed[1::3]
    assert titles == [f"# {row.name}, seed {row.seed}" for row in bench.rows(path)]
    for row, line in zip(bench.rows(path), commands, strict=True):
        assert parse(shlex.split(line)[2:]).settings() == row.config.settings()


@pytest.mark.parametrize("suffix", sorted(SUFFIXES))
def test_the_results_are_written_in_every_format(bench, first, study, capsys, tmp_path, suffix, nothing_runs):
    path = tmp_path / f"new/t{suffix}"
    out = bench(capsys, first[0], "--table", "--output", path)
    assert f"Wrote {path}." in out
    text = path.read_text(encoding="utf-8")
    frame = study.to_frame()
    if suffix == ".csv":
        read = pd.read_csv(path)
        assert list(read.columns) == list(frame.columns)
        assert list(read["unseen_over_dense_low"]) == list(frame["unseen_over_dense_low"])
        assert len(list(csv.reader(text.splitlines()))) == 1 + len(frame)
    elif suffix == ".json":
        read = json.loads(text)
        assert [line["row"] for line in read] == list(frame["row"])
        assert [line["unseen"] for line in read] == pytest.approx(list(frame["unseen"]), rel=1e-12)
    else:
        shown = study.report.tables[0]
        text_without_tags = re.sub("</?small>", "", text)
        for number in (cell for line in shown.formatted().to_numpy() for cell in line if "[" in cell):
            assert number in text_without_tags
        assert "Precision of training: 32-true." in text
        mark = {".md": "| run ", ".tex": r"\toprule", ".html": "<table"}[suffix]
        assert text.count(mark) >= 2
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_captions_in_latex_have_no_backticks():
    table = Table("summary", "Ratios", ["run", "gap"], [["a", 1.0]], note="base: the stage `base` of 100% of a_b.")
    assert r"\caption{Ratios. base: the stage base of 100\% of a\_b.}" in table.to_latex("tab:ratios")


def test_names_are_escaped_in_latex_and_html(study):
    name = r"50 % & <b>_{x}"
    table = study.tables[0]
    renamed = type(table)(**vars(table) | {"rows": [[name, *row[1:]] for row in table.rows], "note": name})
    with_renamed_rows = replace(study)
    vars(with_renamed_rows)["tables"] = [renamed]  # replaces the cached property `tables`
    assert WRITERS[".tex"](with_renamed_rows).count(r"50 \% \& <b>\_\{x\}") >= 2
    page = WRITERS[".html"](with_renamed_rows)
    assert "<b>" not in page
    assert page.count("50 % &amp; &lt;b&gt;_{x}") >= 2


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("t.xlsx", r"--output must end in one of \.csv, \.json, \.md, \.tex, \.html; got '.*t\.xlsx'\."),
        ("t", r"--output must end in one of"),
        ("folder.csv", r"--output must be the path of a file in a folder; got '.*folder\.csv'\."),
    ],
)
def test_an_invalid_output_path_is_refused_before_any_row_runs(bench, capsys, tmp_path, name, message, nothing_runs):
    (tmp_path / "folder.csv").mkdir()
    path = bench.write("never", {"new": {"sparsity.target": 0.2}})
    assert re.search(message, bench.refused(capsys, path, "--output", tmp_path / name))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["folder.csv"]


def test_output_needs_exactly_one_list_and_records(bench, first, capsys, tmp_path, nothing_runs):
    path = bench.write("empty", {"new": {"sparsity.target": 0.2}})
    assert "one list; got 2 lists" in bench.refused(capsys, first[0], path, "--output", tmp_path / "t.csv")
    assert "none yet" in bench.refused(capsys, path, "--table", "--output", tmp_path / "t.csv")
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_keeps_the_existing_file(bench, first, capsys, tmp_path, monkeypatch, nothing_runs):
    path = tmp_path / "t.csv"
    path.write_text("former")

    def raise_disk_full(study):
        raise OSError(errno.ENOSPC, "No space left on device", "t.csv")

    monkeypatch.setitem(WRITERS, ".csv", raise_disk_full)
    bench.refused(capsys, first[0], "--table", "--output", path)
    assert path.read_text() == "former"
    assert [file.name for file in tmp_path.iterdir()] == ["t.csv"]


def test_gprune_report_accepts_names_of_rows_and_prints_the_numbers_of_the_list(bench, first, study, capsys, tmp_path):
    rows = [f"{first[0]}:plain", f"{first[0]}:ours"]
    args = ["--records", str(bench.records), "--output", str(tmp_path / "report")]
    assert command("report", [*rows, *args]) == 0
    summary = capsys.readouterr().out.partition("## Perplexity by corpus")[0]
    printed = {tuple(cells(line)[:2]): cells(line) for line in summary.splitlines()}
    expected = study.report.tables[0]
    texts_by_row = {
        tuple(row[:2]): texts for row, texts in zip(expected.rows, expected.formatted().to_numpy(), strict=True)
    }
    assert printed["ours", "pruned"] == list(texts_by_row["ours", "pruned"])


def test_gprune_report_accepts_the_file_of_a_record(bench, study, capsys, tmp_path):
    row, record = study.done[1]
    args = ["--records", str(bench.records), "--output", str(tmp_path / "report")]
    assert command("report", [str(find_record(row)[0]), *args]) == 0
    assert f"{record['records'][-1]['perplexity']:.2f}" in capsys.readouterr().out


def test_gprune_report_writes_a_page_of_rows(bench, first, tmp_path):
    page, rows = tmp_path / "rows.html", [f"{first[0]}:plain", f"{first[0]}:ours"]
    assert command("report", [*rows, "--records", str(bench.records), "--html", str(page)]) == 0
    text = page.read_text(encoding="utf-8")
    assert "<title>plain, ours</title>" in text
    assert "config.yaml" not in text  # a record has no config.yaml


def test_gprune_report_refuses_unknown_rows_and_missing_files(bench, first, capsys, tmp_path):
    args = ["--records", str(bench.records), "--output", str(tmp_path / "report")]
    for arguments, message in (
        ([f"{first[0]}:mine"], "got 'mine'"),
        ([f"{tmp_path / 'no.yaml'}:mine"], "Cannot read list: there is no file"),
        ([str(tmp_path / "no.json")], "Cannot read record: there is no file"),
        ([f"{first[0]}:plain", "--seeds", "77"], "must have records; got none"),
    ):
        assert command("report", [*arguments, *args]) == 2
        assert message in capsys.readouterr().err


def test_a_list_can_be_a_pipe(bench, first, capsys):
    read, write = os.pipe()
    os.write(write, first[0].read_bytes())
    os.close(write)
    try:
        assert command("study", [f"/dev/fd/{read}", "--records", str(bench.records), "--files"]) == 0
    finally:
        os.close(read)
    assert "plain" in capsys.readouterr().out
