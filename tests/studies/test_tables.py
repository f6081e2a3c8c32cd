"""Tables of lists, compared with the records and with calculations by hand."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import pytest

from gprune.__main__ import run as command
from gprune.errors import UserError
from gprune.evaluation.intervals import paired_ratio
from gprune.report.grouping import group_by_seed
from gprune.report.tables import (
    Estimate,
    arithmetic_mean_over_seeds,
    corpora_table,
    group_frame,
    mean_over_seeds,
    perplexity_table,
)
from gprune.studies import study
from gprune.studies.listing import Listing
from tests.studies.workbench import COMPARE, ROWS, cells, fake_run, unseen
from tests.tiny_run import on_a_terminal


def test_comparisons_are_paired_over_windows(bench, first):
    listing, done = bench.done(first[0])
    records = {row.name: record for row, record in done}
    runs = study.make_report(listing, done).runs
    assert listing.content.compare == COMPARE
    for (a, b), row in zip(listing.content.compare, ("plain", "other"), strict=True):
        expected_cells = [f"{a} / {b}", "1"]
        for number in ("nll", "kl"):
            of_gprune = unseen(records["ours"], "pruned", f"window_{number}")
            of_reference = unseen(records[row], "pruned", f"window_{number}")
            ratio, low, high = paired_ratio(of_gprune, of_reference, 31)
            assert study.pair_ratios(runs, a, b, number) == [Estimate(ratio, low, high)]
            assert ratio != 1
            expected_cells.append(f"{ratio:.3f} [{low:.3f}, {high:.3f}]")
        assert expected_cells in [cells(line) for line in first[1].splitlines()]


def test_the_key_seen_sets_the_seen_corpora_of_all_rows(bench, first):
    """`seen` must include the seen corpora of each row. Means over unseen corpora use the remaining ones."""
    delta, alpha = (str(bench.world.corpora[c]) for c in ("delta", "alpha"))
    listing, done = bench.done(bench.write("divided", ROWS, seen=[alpha, delta]))
    report = study.make_report(listing, done)
    by_corpus = {r["corpus"]: r["seen"] for run in report.runs for r in run.records}
    assert by_corpus == {name: name in (alpha, delta) for name in by_corpus}
    epsilon = str(bench.world.corpora["epsilon"])
    nll = {}  # losses of windows of the only unseen corpus
    for stage in ("dense", "pruned"):
        nll[stage] = {epsilon: unseen(done[1][1], stage)[epsilon]}
    table = report.tables[0]
    ratios = {tuple(row[:2]): row[table.columns.index("unseen / dense")] for row in table.rows}
    assert ratios["ours", "pruned"] == Estimate(*paired_ratio(nll["pruned"], nll["dense"], 31))
    notes = [table.note for table in study.study_tables(listing, report)]
    assert any("In every row alpha.txt, delta.txt count as seen" in note for note in notes)
    with pytest.raises(UserError, match=r"Row 'plain': The key seen must include .*alpha"):
        study.make_report(*bench.done(bench.write("hidden", ROWS, seen=[delta])))


def test_tables_have_bold_headers_on_a_terminal(bench, first):
    args = [str(first[0]), "--table", "--costs", "--records", str(bench.records)]
    text = on_a_terminal(lambda: command("study", args), 100)
    assert re.search(r"\x1b\[1m.* peak MiB", text)
    assert "\\x1b" not in text


def test_seeds_are_one_row_with_an_interval_over_them(bench, capsys):
    rows = {"plain": {"gprune": False}, "wifv": {"gprune": False, "importance": "wifv"}}
    path = bench.write("seeds", rows, seeds=[0, 1, 2], compare=[["wifv", "plain"]])
    bench(capsys, path)
    listing, done = bench.done(path)
    assert [(row.name, row.seed) for row, _ in done] == [(name, seed) for seed in (0, 1, 2) for name in rows]
    table = study.make_report(listing, done).tables[0]
    by_row = {(row[0], row[1]): row for row in table.rows}
    assert by_row["plain (3 seeds)", "pruned"][2] == by_row["wifv (3 seeds)", "pruned"][2] == 3
    by_seed = [[record for row, record in done if row.seed == seed] for seed in (0, 1, 2)]
    ratios, distances = (
        [
            paired_ratio(unseen(wifv, "pruned", number), unseen(plain, "pruned", number), 31)[0]
            for plain, wifv in by_seed
        ]
        for number in ("window_nll", "window_kl")
    )
    (compared,) = study.compare_table(listing, study.make_report(listing, done).runs).rows
    assert compared == ["wifv / plain", 3, mean_over_seeds(ratios), mean_over_seeds(distances)]
    assert len(set(ratios)) == 3


def test_costs_of_every_step_are_printed(bench, first, capsys, nothing_runs):
    out = bench(capsys, first[0], "--table", "--costs")
    lines = [cells(line) for line in out.splitlines() if line.startswith("| ")]
    for row, record in bench.done(first[0])[1]:
        for step, used in record["steps"].items():
            (line,) = [line for line in lines if line[0] == f"{row.name}, seed {row.seed}: {step}"]
            counts = [used[name] for name in ("forward_tokens", "forward_backward_tokens", "peak_memory_mib")]
            assert line[1:] == [f"{used['seconds']:.1f}", *map(str, counts)]


def test_the_key_tables_selects_the_printed_tables(bench, first, capsys):
    out = bench(capsys, bench.write("wanted", {"plain": ROWS["plain"]}, tables=["perplexity"]))
    assert "unseen / dense" not in out
    assert "* seen: the corpus" in out


def test_the_table_final_has_one_line_for_each_row(bench, first, capsys):
    out = bench(capsys, bench.write("final", ROWS, tables=["final"]), "--table")
    lines = [cells(line) for line in out.splitlines() if line.startswith("| ")]
    assert [line[:2] for line in lines[1:]] == [["plain", "pruned"], ["ours", "pruned"], ["other", "pruned"]]
    assert lines[0][2:5] == ["seeds", "seen", "unseen"]


def test_pairs_with_missing_rows_are_omitted_and_pairs_without_common_windows_have_no_ratio(bench, first):
    compare = [["later", "ours"], ["ours", "plain"]]
    listing, done = bench.done(bench.write("apart", ROWS | {"later": {"sparsity.target": 0.1}}, compare=compare))
    table = study.compare_table(listing, study.make_report(listing, done).runs)
    assert [row[:2] for row in table.rows] == [["ours / plain", 1]]
    assert table.note == "exp(KL): of KL(dense || row) per token on the same windows."
    with_other_windows = []
    for row, record in done:
        if row.name == "plain":
            record = record | {"records": [r | {"content_hash": "other"} for r in record["records"]]}
        with_other_windows.append((row, record))
    runs = study.make_report(listing, with_other_windows).runs
    table = study.compare_table(listing, runs)
    assert table.rows == [["ours / plain", 0, None]]
    assert table.note == "No ratio: the two have no seed in common, or were evaluated on other windows."


def test_the_name_of_a_row_compares_its_final_model(bench):
    """A row with a recovery was also measured before it, as another stage."""
    unrecovered, recovered = {"beta": [30.0, 35.0]}, {"beta": [20.0, 26.0]}
    before = fake_run("ours", {"pruned": unrecovered}).records
    ours = fake_run("ours", {"recovered": recovered}, recovery="bias")
    ours = replace(ours, records=[*before, *ours.records])
    runs = [ours, fake_run("plain", {"pruned": {"beta": [21.0, 25.0]}})]
    final = study.pair_ratios(runs, "ours", "plain")
    assert final == study.pair_ratios(runs, "ours: recovered", "plain: pruned")
    assert final == [Estimate(*paired_ratio(recovered, {"beta": [21.0, 25.0]}, 10))]
    assert final != study.pair_ratios(runs, "ours: pruned", "plain")
    rows = {"a": {"gprune": False}, "a: base": {"ridge": 0.5}}
    with pytest.raises(UserError, match=r"one meaning; got 'a: base', a row and a stage of row 'a'"):
        Listing.read(bench.write("shared name", rows, compare=[["a", "a: base"]]))


def test_comparing_a_stage_that_a_row_does_not_have_is_refused(bench, first):
    runs = study.make_report(*bench.done(first[0])).runs
    with pytest.raises(UserError, match=r"stage of 'ours' \(dense, pruned\); got 'best'"):
        study.pair_ratios(runs, "ours: best", "ours: pruned")


def test_rows_with_different_text_are_refused_unless_their_models_differ(bench, first):
    listing, ((row, record), *others) = bench.done(first[0])
    role = next(iter(record["inputs"]["text"]))
    inputs = record["inputs"] | {"text": record["inputs"]["text"] | {role: "other"}}
    with pytest.raises(UserError, match=rf"have read different text as {role}. Remove the outdated record"):
        study.make_report(listing, [*others, (row, record | {"inputs": inputs})])
    # Another model may have another tokenizer, which gives other windows.
    other_model = record | {"inputs": inputs | {"model": "another"}}
    assert len(study.make_report(listing, [*others, (row, other_model)]).runs) == 3


def test_figures_are_drawn_from_records_with_and_without_masks(bench, first, capsys, tmp_path, nothing_runs):
    bench(capsys, first[0], "--table", "--figures", tmp_path)
    assert {f"first-{name}.png" for name in ("ratios", "sparsity")} <= {p.name for p in tmp_path.iterdir()}
    listing, done = bench.done(first[0])
    report = study.make_report(listing, [(row, record | {"masks": None}) for row, record in done])
    assert set(report.figures()) == {"ratios"}


def test_kl_and_agreement_over_seeds_have_arithmetic_means_inside_of_their_limits():
    assert arithmetic_mean_over_seeds([0.0, 0.0]) == (0, 0, 0)
    mean, low, high = arithmetic_mean_over_seeds([0.97, 0.999, 0.96], largest=1.0)
    assert (mean, high) == (pytest.approx(0.97633, abs=1e-5), 1)
    assert low == pytest.approx(0.92611, abs=1e-4)


def test_a_row_that_does_not_depend_on_the_seed_keeps_its_interval_over_windows():
    """Two seeds with the same losses would have an interval over seeds without width."""
    losses = {"dense": {"a": [20, 21]}, "pruned": {"a": [24, 27]}}
    one, two = (fake_run("magnitude", losses, seed=seed) for seed in (0, 1))
    changed = fake_run("magnitude", losses | {"pruned": {"a": [24, 28]}}, seed=1)

    def interval(*runs):
        (line,) = (
            group_frame(group_by_seed(runs)).query("row == 'pruned' and number == 'unseen_over_dense'").itertuples()
        )
        return line.value, line.low, line.high

    assert interval(one, two) == interval(one)
    assert interval(one)[1] < interval(one)[0]
    assert interval(one, changed) != interval(one)


def test_the_table_of_corpora_has_the_worst_corpus_and_counts_where_a_row_is_ahead():
    """Losses are nats of one window of 10 predicted tokens, so a ratio to dense is exp(difference / 10)."""
    dense = {"a": [20], "b": [20], "c": [20]}
    first = {"a": [30], "b": [32], "c": [24]}
    second = {"a": [28], "b": [33], "c": [24]}
    runs = []
    for name, losses in (("first", first), ("second", second)):
        run = fake_run(name, {"dense": dense, "pruned": losses})
        runs.append(replace(run, records=[r | {"seen": r["corpus"] == "c"} for r in run.records]))
    table = corpora_table(group_by_seed(runs))
    lines = [[cell.value if isinstance(cell, Estimate) else cell for cell in row] for row in table.rows]
    first_ratios, second_ratios = ([math.exp(x) for x in logs] for logs in ((0.4, 1.1, 1.2), (0.4, 1.05, 1.3)))
    for line, name, (seen_ratio, ratio, worst) in zip(
        lines, ("first", "second"), (first_ratios, second_ratios), strict=True
    ):
        assert line == [
            name,
            "pruned",
            1,
            *map(pytest.approx, (seen_ratio, ratio)),
            "b",
            pytest.approx(worst),
            "1 of 2",
        ]


def test_the_table_of_perplexities_has_a_line_per_corpus_if_there_are_many():
    corpora = [f"corpus {number}" for number in range(9)]
    run = fake_run("mine", {stage: {c: [20 + n] for n, c in enumerate(corpora)} for stage in ("dense", "pruned")})
    groups = group_by_seed([run])
    table = perplexity_table(groups, group_frame(groups))
    assert table.columns == ["corpus", "dense", "mine"]
    assert [row[0] for row in table.rows] == corpora
    assert [row[2].value for row in table.rows] == pytest.approx([math.exp(2 + n / 10) for n in range(9)])
