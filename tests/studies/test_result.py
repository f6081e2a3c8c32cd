"""Results of lists as frames, tables and files, compared with the records."""

from __future__ import annotations

import errno
import json
import os
import shlex

import pandas as pd
import pytest

import gprune
from gprune.__main__ import run as command
from gprune.config.parse import parse
from gprune.errors import UserError
from gprune.evaluation.intervals import paired_ratio
from gprune.runs.numbers import COLUMNS, mean_over_seeds, typed
from gprune.studies import study as study_module
from gprune.studies.study import WRITERS, StudyResult
from tests.studies.workbench import COMPARE, OF_FIRST, ROWS, cells, unseen


@pytest.fixture(scope="module")
def study(bench, first):
    return gprune.load_study(first[0], records=bench.records)


def values(frame: pd.DataFrame, number: str) -> pd.Series:
    """Return a number over corpora or of the whole model, of the final model of each row."""
    lines = frame[(frame["number"] == number) & (frame["stage"] != "dense")]
    return lines.set_index("row")["value"]


def test_a_frame_has_the_frames_of_the_rows_and_the_settings_in_which_they_differ(bench, first, study):
    frame = study.to_frame()
    assert list(frame["row"].unique()) == list(ROWS)
    assert list(frame.columns[: len(COLUMNS)]) == COLUMNS
    for run, (row, record) in zip(study.runs, study.done, strict=True):
        of_row = frame[frame["row"] == row.name].reset_index(drop=True)
        pd.testing.assert_frame_equal(of_row[COLUMNS], run.frame())
        assert values(of_row, "parameters").item() == record["summary"]["parameters_after"]
        assert set(of_row["record"]) == {str(row.file)}
    settings = frame.drop_duplicates("row").set_index("row")[list(frame.columns[len(COLUMNS) : -1])]
    assert settings.loc["plain", "gprune"] == False  # noqa: E712 - a bool of NumPy
    assert list(settings["sparsity.epochs"]) == [1, 1, 2]
    assert not [name for name in settings if name.startswith(("corpora.", "run."))]
    of_one_row = gprune.load_study(first[0], records=bench.records, rows=["plain"]).to_frame()
    assert list(of_one_row.columns) == list(frame.columns)  # which do not depend on the selected rows


def test_seeds_are_one_row_with_intervals_over_them_and_comparisons_are_paired_by_seed(bench):
    rows = {"plain": {"gprune": False}, "wifv": {"gprune": False, "importance": "wifv"}}
    path = bench.write("seeds", rows, seeds=[0, 1, 2], compare=[["wifv", "plain"]])
    out = bench(path)
    _, done = bench.done(path)
    assert [(row.name, row.seed) for row, _ in done] == [(name, seed) for seed in (0, 1, 2) for name in rows]
    plain, wifv = ([record for row, record in done if row.name == name] for name in rows)
    ratios, distances = (
        [
            paired_ratio(unseen(two, "pruned", number), unseen(one, "pruned", number), 31)[0]
            for one, two in zip(plain, wifv, strict=True)
        ]
        for number in ("window_nll", "window_kl")
    )
    assert len(set(ratios)) == 3
    texts = ["{:.3f} [{:.3f}, {:.3f}]".format(*mean_over_seeds(numbers)) for numbers in (ratios, distances)]
    lines = [cells(line) for line in out.splitlines() if line.startswith("|")]
    assert ["wifv / plain", "3", *texts] in lines
    assert {"plain (3 seeds)", "wifv (3 seeds)"} < {line[0] for line in lines}
    frame = gprune.load_study(path, records=bench.records).to_frame(means=True)
    numbers = frame[(frame["row"] == "wifv") & (frame["number"] == "unseen_over_dense")].set_index("seed")
    assert list(numbers.index) == [0, 1, 2, "mean"]
    expected = mean_over_seeds(numbers["value"].iloc[:3])
    assert tuple(numbers.loc["mean", ["value", "low", "high"]]) == pytest.approx(tuple(expected))


def test_a_pair_that_names_no_row_is_refused_and_a_row_without_a_record_left_out(bench, first):
    path = bench.write("wrong", ROWS, compare=[["ours", "theirs"]])
    message = "The key compare must name rows (plain, ours, other); got 'theirs'."
    assert message in bench.refused(path, "--table")
    later = OF_FIRST | {"later": {"sparsity.target": 0.1}}
    out = bench(bench.write("later", later, compare=[["later", "ours"], *COMPARE]), "--table")
    assert "later / ours" not in out
    assert " / ".join(COMPARE[0]) in out


def test_the_key_seen_sets_the_seen_corpora_of_all_rows(bench, first):
    """`seen` must include the seen corpora of each row. Means over unseen corpora use the remaining ones."""
    delta, alpha = (str(bench.world.corpora[c]) for c in ("delta", "alpha"))
    made = study_module.make_report(*bench.done(bench.write("divided", OF_FIRST, seen=[alpha, delta])))
    by_corpus = made.frame[made.frame["corpus"] != ""].groupby("corpus")["seen"].unique()
    assert {name: list(seen) for name, seen in by_corpus.items()} == {
        "alpha.txt": [True], "delta.txt": [True], "epsilon.txt": [False],
    }  # fmt: skip
    assert "In every row alpha.txt, delta.txt count as seen" in made.summary.note
    with pytest.raises(UserError, match=r"Row 'plain': The key seen must include .*alpha"):
        study_module.make_report(*bench.done(bench.write("hidden", OF_FIRST, seen=[delta])))


def test_rows_with_different_text_are_refused_unless_their_models_differ(bench, first):
    listing, ((row, record), *others) = bench.done(first[0])
    role = next(iter(record["inputs"]["text"]))
    inputs = record["inputs"] | {"text": record["inputs"]["text"] | {role: "other"}}
    with pytest.raises(UserError, match=rf"have read different text as {role}. Remove the outdated record"):
        study_module.make_report(listing, [*others, (row, record | {"inputs": inputs})])
    # Another model may have another tokenizer, which gives other windows.
    other_model = record | {"inputs": inputs | {"model": "another"}}
    assert len(study_module.make_report(listing, [*others, (row, other_model)]).runs) == 3


def test_the_key_tables_selects_tables_and_costs_are_printed_on_request(bench, first, nothing_runs):
    path = bench.write("wanted", {"plain": OF_FIRST["plain"]}, tables=["perplexity"])
    out = bench(path, "--table", "--costs")
    assert "unseen / dense" not in out
    assert "alpha.txt*" in out
    ((_, record),) = bench.done(path)[1]
    lines = [cells(line) for line in out.splitlines()]
    for step, used in record["steps"].items():
        counts = [used[name] for name in ("forward_tokens", "forward_backward_tokens", "peak_memory_mib")]
        assert [step, f"{used['seconds']:.1f}", *map(str, counts)] in lines


def test_figures_are_drawn_from_records_with_and_without_masks(bench, first, tmp_path, nothing_runs):
    bench(first[0], "--table", "--figures", tmp_path)
    assert {"first-loss.png", "first-removed.png"} <= {p.name for p in tmp_path.iterdir()}
    listing, done = bench.done(first[0])
    report = study_module.make_report(listing, [(row, record | {"masks": None}) for row, record in done])
    assert set(report.figures) == {"loss"}


def test_rows_and_seeds_without_a_record_are_listed(bench, first, nothing_runs):
    path = bench.write("gaps", OF_FIRST | {"later": {"sparsity.target": 0.1}}, seeds=[0, 7])
    missing = "5 of 8 rows and seeds: later (seeds 0, 7); plain (seed 7); ours (seed 7); other (seed 7)."
    assert f"Without a record, so left out: {missing}" in bench(path, "--table")
    rows = gprune.load_study(path, records=bench.records).missing
    assert [(row.name, row.seed) for row in rows] == [("later", 0), *((name, 7) for name in (*ROWS, "later"))]
    assert "Without a record" not in bench(first[0], "--table")
    with pytest.raises(UserError, match=r"The rows must name rows of .*first\.yaml \(plain, ours, other\); got 'mine'"):
        gprune.load_study(first[0], rows=["mine"])


def test_files_and_commands_of_each_row_and_seed_are_printed_and_nothing_runs(bench, first, nothing_runs):
    path = bench.write("files", OF_FIRST, seeds=[0, 7])
    lines = [cells(line) for line in bench(path, "--files").splitlines() if line.startswith("| ")]
    by_row_and_seed = {(line[0], line[1]): line for line in lines[1:]}
    printed = bench(path, "--commands").strip().splitlines()
    rows = bench.rows(path)
    assert len(by_row_and_seed) == len(rows) == 6
    for row, title, line in zip(rows, printed[::3], printed[1::3], strict=True):
        of_row = by_row_and_seed[row.name, str(row.seed)]
        assert of_row[2:5] == ["float32", "32-true", str(row.file) if row.seed == 0 else "none"]
        assert title == f"# {row.name}, seed {row.seed}"
        assert parse(shlex.split(line)[2:]).settings() == row.config.settings()


@pytest.mark.parametrize("suffix", [".csv", ".html", ".json", ".md", ".tex"])
def test_the_results_are_written_in_every_format(bench, first, study, tmp_path, suffix, nothing_runs):
    path = tmp_path / f"new/t{suffix}"
    assert f"Wrote {path}." in bench(first[0], "--table", "--output", path)
    text, frame = path.read_text(encoding="utf-8"), study.to_frame()
    if suffix in (".csv", ".json"):
        read = pd.read_csv(path) if suffix == ".csv" else pd.DataFrame(json.loads(text))
        pd.testing.assert_frame_equal(typed(read)[COLUMNS], frame[COLUMNS], check_dtype=False, rtol=1e-12)
        assert list(read.columns) == list(frame.columns)
    else:
        for number in (cell for line in study.tables[0].formatted().to_numpy() for cell in line if "[" in cell):
            assert number in text
        assert "Precision of training: 32-true." in text
        assert text.count({".md": "| row ", ".tex": r"\toprule", ".html": "<table"}[suffix]) >= 2
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_a_failed_write_of_results_keeps_the_former_file(bench, first, tmp_path, monkeypatch, nothing_runs):
    path = tmp_path / "t.csv"
    path.write_text("former")

    def raise_disk_full(study: StudyResult) -> str:
        raise OSError(errno.ENOSPC, "No space left on device", "t.csv")

    monkeypatch.setitem(WRITERS, ".csv", raise_disk_full)
    bench.refused(first[0], "--table", "--output", path)
    assert path.read_text() == "former"
    assert [file.name for file in tmp_path.iterdir()] == ["t.csv"]


def test_gprune_report_accepts_rows_of_lists_and_records(bench, first, study, capsys, tmp_path):
    rows, page = [f"{first[0]}:plain", f"{first[0]}:ours"], tmp_path / "rows.html"
    options = ["--records", str(bench.records), "--output", str(tmp_path / "report")]
    assert command("report", [*rows, *options]) == 0
    printed = {line[0]: line for line in map(cells, capsys.readouterr().out.splitlines()) if len(line) == 8}
    texts = study.report.summary.formatted().set_index("row")
    assert [printed[name][1:] for name in ("plain", "ours")] == texts.loc[["plain", "ours"]].to_numpy().tolist()
    row, record = study.done[1]
    assert command("report", [str(row.file), *options]) == 0
    assert f"{record['records'][-1]['perplexity']:.2f}" in capsys.readouterr().out
    assert command("report", [*rows, *options[:2], "--html", str(page)]) == 0
    assert "<title>plain, ours</title>" in page.read_text(encoding="utf-8")


def test_a_list_can_be_a_pipe(bench, first):
    read, write = os.pipe()
    os.write(write, first[0].read_bytes())
    os.close(write)
    assert "plain" in bench(f"/dev/fd/{read}", "--files")
    os.close(read)
