"""Reports: numbers compared with calculations from the records, invalid folders, and written files."""

from __future__ import annotations

import csv
import io
import json
import math
import shutil
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from scipy import stats

from gprune import report
from gprune.__main__ import run as command
from gprune.config import RunConfig, parse
from gprune.config.groups import CorporaConfig, ModelConfig
from gprune.config.running import EvaluationConfig
from gprune.corpora.load import corpus_labels
from gprune.evaluation.intervals import mean_per_token, paired_difference, paired_ratio
from gprune.models.masks import Masks
from gprune.report.card import model_card
from gprune.report.figures import LINES, curve_figures, learning_figure, perplexity_figure, ratio_figure, sparsity_lines
from gprune.report.grouping import read_runs
from gprune.report.tables import Estimate, Table, result_table
from gprune.report.task_tables import evaluation_table
from gprune.storage.files import key_of, read_json, read_tensors, write_json, write_tensors
from gprune.studies.report_command import default_output
from tests import tiny_run
from tests.studies.workbench import cells as cells_of_line
from tests.tiny_run import isolated


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    """Return the folder of a run with recovery."""
    folder = tmp_path_factory.mktemp("report")
    with isolated(folder / "cache"):
        world = tiny_run.make_world(folder)
        flags = ("--export=none", "--recovery=bias", "--sparsity.allocation=uniform", "--evaluation.num_samples=4")
        return world.run(folder / "runs", *flags, name="tiny-gprune-wanda_sp-0.5-0123abcd").path


@pytest.fixture(autouse=True)
def _isolated(tmp_path_factory):
    with isolated(tmp_path_factory.mktemp("cache")):
        yield


@pytest.fixture
def run(pristine, tmp_path):
    return Path(shutil.copytree(pristine, tmp_path / "runs" / "one"))


def edit(path: Path, change) -> None:
    """Change a JSON file of a run. It gets a valid checksum, and metrics get the key of the run's settings."""
    content = read_json(path)
    change(content)
    manifest = read_json(path.parent / "manifest.json")
    write_json(path, content, run=None if path.name == "manifest.json" else key_of(settings=manifest["settings"]))


def raise_loss(record: dict, nats: float) -> None:
    """Raise the loss of every predicted token."""
    record["perplexity"] *= math.exp(nats)
    record["nll"] += nats
    record["window_nll"] = [v + nats * (record["seq_len"] - 1) for v in record["window_nll"]]


def another(run: Path, name: str, *, seed: int | None = None, setting: float | None = None, shift: float = 0.0) -> Path:
    """Copy a run to `name` next to it, with shuffled masks.

    Args:
        seed: seed of the copy, also in its records and in the name of its text; None: that of the original.
        setting: value of `ridge`; None: that of the original.
        shift: nats per token that are added to the losses of pruned rows.
    """
    copy = Path(shutil.copytree(run, run.parent / name))

    def change_settings(manifest):
        if seed is not None:
            manifest["settings"]["run"]["seed"] = seed
            manifest["settings"]["inputs"]["text"] = {"alpha": f"sample {seed}"}
        if setting is not None:
            manifest["settings"]["ridge"] = setting

    def change_losses(metrics):
        for r in metrics["records"]:
            r["seed"] = r["seed"] if seed is None else seed
            if r["stage"] != "dense":
                raise_loss(r, shift)

    edit(copy / "manifest.json", change_settings)
    edit(copy / "metrics.json", change_losses)
    modules = copy / "modules.safetensors"
    write_tensors(modules, read_tensors(modules))  # without the key of the original run
    masks = read_tensors(copy / "masks.safetensors")
    generator = torch.Generator().manual_seed(seed or 0)
    shuffled = {n: m[torch.randperm(len(m), generator=generator)] for n, m in masks.items()}
    write_tensors(copy / "masks.safetensors", shuffled)
    return copy


def records_of(run: Path, stage: str, recovery: str = "none", *, seen: bool | None = None) -> list[dict]:
    """Return the records of a row; `seen` selects those on seen (True) or unseen (False) corpora."""
    records = json.loads((run / "metrics.json").read_text())["records"]
    of_row = [r for r in records if (r["stage"], r["recovery"]) == (stage, recovery)]
    return of_row if seen is None else [r for r in of_row if r["seen"] == seen]


def geometric_mean(records: list[dict]) -> float:
    """Return the geometric mean of the perplexities of records."""
    return float(np.exp(np.mean(np.log([r["perplexity"] for r in records]))))


def row(table: report.Table, *first_cells: str) -> dict:
    """Return {column: cell} of the only row that begins with the given cells."""
    (cells,) = [cells for cells in table.rows if tuple(cells[: len(first_cells)]) == first_cells]
    return dict(zip(table.columns, cells, strict=True))


# --- one run


def test_numbers_of_one_run_are_those_of_its_records(run):
    table = report.make([run]).tables[0]
    assert [cells[1] for cells in table.rows] == ["dense", "pruned", "recovered"]
    for recovery, stage in (("none", "pruned"), ("bias", "recovered")):
        cells = row(table, "one", stage)
        seen, unseen = (geometric_mean(records_of(run, stage, recovery, seen=s)) for s in (True, False))
        dense_seen, dense_unseen = (geometric_mean(records_of(run, "dense", seen=s)) for s in (True, False))
        assert cells["seen"].value == pytest.approx(seen, rel=1e-9)
        assert cells["unseen"].value == pytest.approx(unseen, rel=1e-9)
        assert cells["unseen"].low < unseen < cells["unseen"].high
        assert cells["unseen / dense"].value == pytest.approx(unseen / dense_unseen, rel=1e-9)
        assert cells["gap"].value == pytest.approx((unseen / dense_unseen) / (seen / dense_seen), rel=1e-9)
        pruned_nll, dense_nll = (
            {r["corpus"]: r["window_nll"] for r in records_of(run, *of, seen=False)}
            for of in ((stage, recovery), ("dense",))
        )
        # Windows have 32 tokens, and 31 of them are predicted.
        assert cells["unseen / dense"] == Estimate(*paired_ratio(pruned_nll, dense_nll, 31))
    dense = table.rows[0]
    assert dense[0] == records_of(run, "dense")[0]["model"]
    assert dense[5:] == [None, None]


def test_kl_and_agreement_are_those_of_the_records(run):
    table = next(t for t in report.make([run]).tables if t.name == "distance")
    assert "dense" not in [cells[1] for cells in table.rows]
    records = records_of(run, "pruned", seen=False)
    for column, name in (("KL", "kl"), ("agreement", "agreement")):
        estimate = row(table, "one", "pruned")[column]
        assert estimate.value == pytest.approx(np.mean([r[name] for r in records]), rel=1e-9)
        assert estimate == Estimate(*mean_per_token({r["corpus"]: r[f"window_{name}"] for r in records}, 31))
        assert estimate.low < estimate.value < estimate.high


def test_kl_and_agreement_are_omitted_for_records_without_them(run):
    """Older versions did not record them. The printed table with them fits a terminal of 80 columns."""
    records = json.loads((run / "metrics.json").read_text())["records"]
    printed = result_table(records)
    assert printed.columns[-3:] == ["unseen / dense", "KL", "agreement"]
    assert max(map(len, printed.to_terminal(80).splitlines())) <= 80
    for r in records:
        for name in ("kl", "window_kl", "agreement", "window_agreement"):
            r.pop(name, None)
    assert result_table(records).columns == printed.columns[:-2]
    edit(run / "metrics.json", lambda content: content.update(records=records))
    run_report = report.make([run])
    assert [t.rows for t in run_report.tables if t.name == "distance"] == [[]]
    assert "agreement" not in run_report.to_markdown()


def test_the_table_by_corpus_marks_seen_corpora_with_a_star(run):
    table = report.make([run]).tables[1]
    assert table.columns[3] == "alpha.txt*"
    assert [c.endswith("*") for c in table.columns[3:]] == [True, False, False]
    for r in records_of(run, "pruned"):
        name = Path(r["corpus"]).name + "*" * r["seen"]
        assert row(table, "one", "pruned")[name] == Estimate(r["perplexity"])


# --- several runs


def test_runs_that_differ_in_the_seed_become_a_mean_with_an_interval(run):
    shifts = [0.0, 0.2, 0.5]
    runs = [run, *(another(run, f"one-seed{i}", seed=i, shift=s) for i, s in enumerate(shifts) if i)]
    run_report = report.make(runs)
    (group,) = run_report.groups
    assert group.name == "one (3 seeds)"
    cells = row(run_report.tables[0], "one (3 seeds)", "pruned")
    logs = np.log(geometric_mean(records_of(run, "pruned", seen=False))) + np.array(shifts)
    low, high = stats.t.interval(0.95, 2, loc=logs.mean(), scale=stats.sem(logs))
    assert cells["seeds"] == 3
    np.testing.assert_allclose(cells["unseen"], np.exp([logs.mean(), low, high]), rtol=1e-9)
    # The dense model has the same losses for every seed, so its interval is over windows.
    dense = row(run_report.tables[0], run_report.tables[0].rows[0][0], "dense")
    assert dense["seeds"] is None
    assert dense["unseen"].low < dense["unseen"].value < dense["unseen"].high
    corpus = records_of(run, "pruned")[0]
    cell = row(run_report.tables[1], "one (3 seeds)", "pruned")[Path(corpus["corpus"]).name + "*"]
    assert cell.value == pytest.approx(corpus["perplexity"] * math.exp(np.mean(shifts)))


def test_only_runs_with_equal_settings_and_text_are_grouped_over_seeds(run):
    same_seed, other_ridge = another(run, "same-seed"), another(run, "other-ridge", seed=1, setting=0.5)
    other_seed = another(run, "other-seed", seed=1)
    names = [g.name for g in report.make([run, same_seed, other_ridge, other_seed]).groups]
    assert len(names) == 3
    assert names[1:] == ["same-seed", "other-ridge"]
    assert names[0].endswith("(2 seeds)")
    other_text = another(run, "other-text", seed=2)
    edit(other_text / "metrics.json", lambda m: [r.update(content_hash="0") for r in m["records"]])
    assert len(report.make([run, other_text]).groups) == 2


def test_a_row_over_seeds_has_the_name_of_the_first_run(run):
    runs = [another(run, f"{ridge}-{s}", seed=s, setting=ridge) for ridge in (0.1, 0.5) for s in (0, 1)]
    run_report = report.make(runs)
    assert [group.name for group in run_report.groups] == ["0.1-0 (2 seeds)", "0.5-0 (2 seeds)"]
    names = {cells[0] for cells in run_report.tables[0].rows if cells[1] == "recovered"}
    assert names == {group.name for group in run_report.groups}


def test_a_corpus_seen_by_one_seed_counts_as_seen_in_the_mean_over_seeds(run):
    """Whether training text occurs in a corpus depends on the seed. A mean over seeds needs one set of corpora."""
    other = another(run, "one-seed1", seed=1)
    leaked = records_of(run, "pruned", seen=False)[0]["corpus"]
    edit(other / "metrics.json", lambda m: [r.update(seen=True) for r in m["records"] if r["corpus"] == leaked])
    cells = row(report.make([run, other]).tables[0], "one (2 seeds)", "pruned")
    unseen = [r for r in records_of(run, "pruned", seen=False) if r["corpus"] != leaked]
    assert cells["unseen"].value == pytest.approx(geometric_mean(unseen))
    cells_of_one_run = row(report.make([run]).tables[0], "one", "pruned")
    unseen_of_one_run = records_of(run, "pruned", seen=False)
    assert cells_of_one_run["unseen"].value == pytest.approx(geometric_mean(unseen_of_one_run))


def test_a_run_given_twice_is_counted_once_and_a_copy_has_a_longer_name(run, monkeypatch):
    monkeypatch.chdir(run.parent)
    assert [r.name for r in read_runs([run, "one", "./one/"])] == ["one"]
    copy = shutil.copytree(run, run.parent / "more" / "one")
    assert [r.name for r in read_runs([run, copy])] == ["one", "more/one"]


def test_equal_dense_rows_appear_once(run):
    run_report = report.make([run, another(run, "other", setting=0.5)])
    assert [cells[1] for cells in run_report.tables[0].rows].count("dense") == 1


def test_runs_with_other_seen_corpora_have_separate_dense_rows_and_means(run):
    """The second run has seen all corpora, so the first one has two unseen corpora and the second one has none."""
    other = another(run, "other", setting=0.7)

    def mark_all_as_seen(metrics):
        for r in metrics["records"]:
            r["seen"] = True

    edit(other / "metrics.json", mark_all_as_seen)
    summary, by_corpus, *_ = report.make([run, other]).tables
    assert [cells[1] for cells in summary.rows].count("dense") == 2
    # A star in parentheses marks a corpus that only some of the runs have seen.
    assert [c.rstrip("*)").endswith("(") for c in by_corpus.columns[3:]] == [False, True, True]
    assert row(summary, "other", "recovered")["unseen"] is None


def test_the_report_begins_with_the_flags_in_which_runs_differ(run):
    other = another(run, "other", setting=0.5, seed=3)
    run_report = report.make([run, another(run, "two", seed=1), other])
    (table,) = [table for table in run_report.tables if table.name == "settings"]
    assert table.columns == ["flag", "one (2 seeds)", "other"]
    assert table.rows == [["ridge", "0.01", "0.5"], ["run.seed", "0, 1", "3"]]
    assert run_report.to_markdown().startswith("## Settings that differ")
    tables_of_equal_runs = report.make([run, another(run, "same")]).tables
    assert not [table for table in tables_of_equal_runs if table.name == "settings" and table.rows]


HASHED = "tiny-gprune-wanda_sp-0.5-"


def test_runs_with_generated_names_are_named_by_the_flags_that_differ(run):
    """Titles and rows do not contain the hash of the generated name. A name given by the user is kept."""
    runs = [another(run, f"{HASHED}{i:08x}", seed=i % 2, setting=ridge) for i, ridge in enumerate((0.1, 0.1, 0.5))]
    run_report = report.make(runs)
    assert [group.name for group in run_report.groups] == ["ridge 0.1 (2 seeds)", "ridge 0.5"]
    assert run_report.title == "ridge 0.1 (2 seeds), ridge 0.5"
    assert HASHED not in run_report.to_markdown()
    for two_seeds in runs[:2], [runs[0], another(runs[1], f"{HASHED}{9:08x}", seed=2)]:
        (group,) = report.make(two_seeds).groups
        assert group.name == f"{HASHED.removesuffix('-')} (2 seeds)"
    assert [group.name for group in report.make([run, runs[2]]).groups] == ["one", "ridge 0.5"]
    assert report.make(runs[:1]).groups[0].name == runs[0].name
    copy = another(runs[0], f"{HASHED}{7:08x}")
    assert len({group.name for group in report.make([runs[0], copy]).groups}) == 2
    dated = [another(run, f"lr{i}-2025010{i}", setting=0.1 * i) for i in (1, 2)]  # a date is no hash
    assert [group.name for group in report.make(dated).groups] == ["lr1-20250101", "lr2-20250102"]


def test_the_title_for_many_runs_has_the_flags_that_differ(run):
    runs = [another(run, f"a name that takes some room {i}", setting=0.1 * i) for i in range(1, 5)]
    assert report.make(runs).title == "4 runs that differ in ridge"


def test_learning_curves_of_several_runs_are_in_one_figure():
    """Each run has one line. A curve needs two points or more. Losses are running means."""
    runs = {}
    tokens = list(range(0, 400, 10))
    for name in "ab":
        frame = {"development/tokens": [0, 100, *[None] * 38], "development/perplexity": [9.0, 8.0, *[None] * 38]}
        frame |= {"distill/tokens": tokens, "distill/loss": [float(t % 20) for t in tokens]}
        runs[name] = pd.DataFrame(frame)
    perplexity, loss = learning_figure(runs).axes
    assert [list(line.get_ydata()) for line in perplexity.lines] == [[9.0, 8.0]] * 2
    # The losses alternate between 0 and 10, so each running mean except the first one is 5.
    assert [list(line.get_ydata()[1:]) for line in loss.lines] == [[5.0] * 39] * 2
    assert learning_figure({"a": pd.DataFrame(), "b": pd.DataFrame({"learn/tokens": [1], "learn/loss": [2]})}) is None


def test_pairs_are_compared_on_corpora_that_are_unseen_for_both(run):
    """The ratio has the same size in either order of the two runs."""
    other = another(run, "other", setting=0.5, shift=0.3)
    first, second = [r["corpus"] for r in records_of(run, "pruned", seen=False)]

    def comparison(*runs):
        (table,) = [table for table in report.make(runs).tables if table.name == "comparison"]
        return table.rows

    (both,) = comparison(run, other)
    assert both[:3] == ["one: recovered", "other: recovered", 1]
    np.testing.assert_allclose(both[3], [math.exp(-0.3)] * 3)
    for corpus, rows in ((second, 1), (first, 0)):
        edit(other / "metrics.json", lambda m, corpus=corpus: [r.update(seen=True) or raise_loss(r, 0.5)
             for r in m["records"] if r["corpus"] == corpus])  # fmt: skip
        for runs in ((run, other), (other, run)):
            compared = comparison(*runs)
            assert len(compared) == rows
            assert all(abs(math.log(ratio.value)) == pytest.approx(0.3) for *_, ratio in compared)


def test_a_model_card_has_no_local_paths_and_mentions_drift_only_if_it_was_measured(run, tmp_path):
    """Corpora have the shortest labels that are unique, such as `law/alpha.txt`."""
    records = json.loads((run / "metrics.json").read_text())["records"]
    seen = records[0]["corpus"]
    corpora = CorporaConfig(score=f"{tmp_path}/law/alpha.txt", drift=[f"{tmp_path}/two.txt", seen])
    cfg = RunConfig(corpora=corpora, recovery="bias", evaluation=EvaluationConfig(split="development"))
    card = model_card(cfg, records, run / "model")
    assert "tokens of development text per corpus" in card
    assert f"scored on law/alpha.txt, drift measured on two.txt, {Path(seen).parent.name}/alpha.txt" in card
    assert f" {Path(seen).parent.name}/alpha.txt* |" in card
    assert str(tmp_path) not in card
    assert str(Path(seen).parent) not in card
    plain = model_card(RunConfig(gprune=False, model=ModelConfig(name=str(tmp_path))), records, run / "model")
    assert "drift measured" not in plain
    assert "2603.13418" in card
    assert "2603.13418" not in plain
    assert str(tmp_path) not in plain
    assert f"# {tmp_path.name}, structurally pruned" in plain


def test_corpora_of_drift_that_are_only_scored_count_as_scored(run):
    """As in `--config best`: the scores are pooled over the corpora of drift, and drift is not measured."""
    cfg = parse(["--config", "best"])
    assert cfg.roles["score"] == cfg.corpora.drift
    assert cfg.roles["drift"] == []
    assert cfg.train_corpora == cfg.corpora.drift
    records = json.loads((run / "metrics.json").read_text())["records"]
    card = model_card(cfg, records, run / "model")
    assert "scored on wiki, web, python_code, allocation `reconstruction`" in card
    assert "drift" not in card.partition("## ")[0]
    blocks = parse(["--config", "best", "--sparsity.scope", "ffn+blocks"])
    assert blocks.roles["drift"] == cfg.corpora.drift  # blocks are chosen by the loss on this text


@pytest.mark.parametrize(
    ("name", "base", "licence"),
    [
        ("smollm2-135m", "HuggingFaceTB/SmolLM2-135M-Instruct", "apache-2.0"),
        ("tiny-random", None, "cc0-1.0"),
        ("owner/model", "owner/model", None),
        (".", None, None),
    ],
)
def test_a_model_card_has_base_model_and_licence_as_metadata_of_the_hub(run, name, base, licence):
    records = json.loads((run / "metrics.json").read_text())["records"]
    cfg = RunConfig(model=ModelConfig(name=name), recovery="none")
    data = ModelCard(model_card(cfg, records, run / "model")).data
    assert (data.base_model, data.license, data.library_name) == (base, licence, "transformers")


def test_runs_with_the_same_name_have_separate_lines_in_the_figure(run):
    """The runs of one list row with different seeds have the same name."""
    runs = [replace(r, name="same") for r in read_runs([run, another(run, "other", seed=1)])]
    lines = report.of_runs(runs).figures()["sparsity"].axes[0].get_lines()
    assert [line.get_label() for line in lines] == ["same, seed 0", "same, seed 1"]
    for r, line in zip(runs, lines, strict=True):
        assert line.get_ydata()[0] == float((~r.masks.ffn[0]).float().mean())


def zero_shot_record(**changes: object) -> dict:
    common = {"kind": "zero_shot", "task": "piqa", "split": "validation", "source": "local", "questions": 6,
              "acc": 0.5, "acc_stderr": 0.2, "acc_norm": None, "acc_norm_stderr": None, "standard_protocol": False,
              "note": "a note", "recovery": "none", "content_hash": "h", "dtype": "float32", "model": "a"}  # fmt: skip
    return common | changes


def test_zero_shot_results_are_compared_with_the_matching_dense_results(run):
    """Dense results match if model, dtype and questions are the same."""
    dense = zero_shot_record(stage="dense", correct="110110", answers=[0, 1, 3, 0, 2, 1])
    pruned = zero_shot_record(stage="pruned", correct="100110", answers=[0, 2, 0, 0, 2, 1])
    not_matching = [dense | {key: "other", "correct": "000000"} for key in ("model", "dtype", "content_hash")]
    write_json(run / "evaluation.json", {"records": [*not_matching, pruned, dense]})
    run_report = report.make([run])
    cells = row(run_report.tables[-1], "piqa", "one", "pruned")
    difference, error = paired_difference([1, 0, 0, 1, 1, 0], [1, 1, 0, 1, 1, 0])
    assert cells["against dense"] == f"{difference:+.3f} +- {error:.3f}"
    assert cells["flips"] == "33.3%: -16.7% +0.0%"  # one correct answer became wrong, and one wrong answer changed
    assert (cells["acc or perplexity"], cells["standard protocol"]) == ("0.500 +- 0.200", "no")
    assert "a note" in run_report.to_markdown()
    without_dense = evaluation_table([record | {"run": "r"} for record in (pruned, *not_matching)])
    (cells_without_dense,) = [cells for cells in without_dense.rows if cells[2] == "pruned"]
    assert run_report.tables[-1].columns[7] == "against dense"
    assert cells_without_dense[7] is None


def test_zero_shot_results_without_stored_answers_have_no_column_of_flips():
    """Older versions recorded only which answers were correct."""
    records = [zero_shot_record(stage=stage, correct="110110", run="r") for stage in ("dense", "pruned")]
    table = evaluation_table(records)
    assert "flips" not in table.columns
    assert "Flips" not in table.note


# --- tables


def test_csv_and_markdown_contain_the_same_values():
    table = Table(
        "t", "T", ["", "n", "x", "y"],
        [["a, b", 3, Estimate(1 / 3, 0.25, 0.5), 0.125], ["c", None, None, Estimate(2.0)]], {"x": 3},
    )  # fmt: skip
    assert [cells_of_line(line) for line in table.to_markdown().splitlines()[2:]] == [
        ["a, b", "3", "0.333 [0.250, 0.500]", "0.12"],
        ["c", "", "", "2.00"],
    ]
    header, first, second = csv.reader(io.StringIO(table.to_csv()))
    assert header == ["row", "n", "x", "x_low", "x_high", "y", "y_low", "y_high"]
    assert first == ["a, b", "3", str(1 / 3), "0.25", "0.5", "0.125", "", ""]
    assert second == ["c", "", "", "", "", "2.0", "", ""]


def test_labels_of_corpus_files_are_the_shortest_unique_paths():
    labels = {
        "wiki": "wiki", "/home/me/text/one.txt": "one.txt", "/home/me/text/two.txt": "text/two.txt",
        "/home/me/other/two.txt": "other/two.txt", "two.txt": "two.txt", "data/wiki": "data/wiki", "./law/": "law",
    }  # fmt: skip
    assert corpus_labels(labels) == labels
    for alike in (["wiki", "./wiki"], ["/two.txt", "two.txt"], ["/a/b.txt", "a/b.txt"]):
        assert len(set(corpus_labels(alike).values())) == 2


# --- figures and files


def test_lines_and_points_differ_in_more_than_colour(run):
    masks = {str(i): Masks([torch.tensor([True, False])], []) for i in range(3 * len(LINES))}
    lines = sparsity_lines(masks).axes[0].lines[: len(masks)]
    assert len({(line.get_linestyle(), line.get_marker()) for line in lines[: len(LINES)]}) == len(LINES)
    # With more lines than styles, styles are repeated with other colours.
    assert len({(line.get_color(), line.get_marker()) for line in lines}) == len(masks)
    records = json.loads((run / "metrics.json").read_text())["records"]
    points = [c.lines[0] for c in perplexity_figure(records).axes[0].containers]
    looks = {(point.get_marker(), point.get_markerfacecolor() == "white") for point in points}
    assert len(looks) == len(points) == 2


def test_an_estimate_just_outside_its_interval_is_drawn():
    """With one window per corpus the interval has no width, and the value may be outside by rounding."""
    low = np.nextafter(0.7, 1)
    figure = ratio_figure([("a", Estimate(0.7, low, low))], base="base")
    assert figure.axes[0].containers[0].lines[0].get_xdata().tolist() == [0.7]


def test_every_axis_is_labelled_and_every_run_and_ratio_is_drawn(run):
    run_report = report.make([run, another(run, "two", seed=1), another(run, "three", setting=0.5)])
    axes = {name: figure.axes[0] for name, figure in run_report.figures().items()}
    labels = {name: (axis.get_xlabel(), axis.get_ylabel()) for name, axis in axes.items()}
    assert labels == {
        "ratios": ("unseen perplexity / dense; 95 % interval", ""),
        "sparsity": ("block", "fraction of neurons removed"),
    }
    assert len(axes["sparsity"].lines) == 3
    assert len(axes["ratios"].get_yticklabels()) == sum(cells[6] is not None for cells in run_report.tables[0].rows)


def test_long_corpus_paths_do_not_shrink_the_figures(run):
    """A long path as label would leave no width for the axes; matplotlib warns, and warnings are errors in tests."""
    folder = "/srv/" + 8 * "a/long/way/" + "down/"
    columns = {f"development/perplexity/{folder}{name}.txt": [9.0, 8.0] for name in "abc"}
    frame = pd.DataFrame({"learn/epoch": [0, 1]} | columns)
    (curves,) = curve_figures(frame).values()
    records = json.loads((run / "metrics.json").read_text())["records"]
    points = perplexity_figure([r | {"corpus": folder + Path(r["corpus"]).name} for r in records])
    for figure in (curves, points):
        figure.savefig(io.BytesIO(), format="png")
        assert figure.axes[0].get_position().width > 0.6
    assert [text.get_text() for text in curves.legends[0].texts] == ["a.txt", "b.txt", "c.txt"]
    assert points.axes[0].get_xticklabels()[0].get_text() == "alpha.txt\nseen"


def written(folder: Path) -> set[str]:
    """Return the relative paths of all files below a folder."""
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}


@pytest.mark.slow
def test_gprune_report_prints_the_tables_and_writes_markdown_csv_and_figures_reproducibly(run, capsys):
    run_report = report.make([run])
    output = run / "report"
    assert command("report", [str(run)]) == 0
    out = capsys.readouterr().out
    assert run_report.tables[0].to_markdown() in out
    assert run_report.tables[0].to_markdown() in (output / "report.md").read_text()
    assert "windows of 32 tokens, stride 32, no BOS, float32, test text, scope ffn" in out
    assert (output / "tables" / "summary.csv").read_text() == run_report.tables[0].to_csv()
    for path in (output / "figures").glob("*.svg"):
        assert ElementTree.parse(path).getroot().tag.endswith("svg")
        with Image.open(path.with_suffix(".png")) as image:
            assert image.width > 400
    before = {p: p.read_bytes() for p in output.rglob("*") if p.is_file()}
    run_report.write(output)
    assert {p: p.read_bytes() for p in before} == before  # identical files


def test_the_default_output_folder_of_several_runs_is_in_their_common_parent(run):
    assert default_output([run, another(run, "other", setting=0.5)]) == run.parent / "report"


@pytest.mark.slow
def test_a_new_report_replaces_the_files_of_the_previous_one_and_keeps_others(run, tmp_path, capsys):
    other, output = another(run, "other", setting=0.5), tmp_path / "report"
    report.make([run, other]).write(output, ("png",))
    (output / "tables" / "mine.csv").write_text("kept")
    assert written(output) >= {"tables/comparison.csv", "figures/sparsity.png"}
    assert command("report", [str(other), "--output", str(output)]) == 0
    names = ("ratios", "perplexity", "sparsity", "heterogeneity")
    assert written(output) == (
        {"report.md", "tables/mine.csv"}
        | {f"tables/{t}.csv" for t in ("summary", "perplexity", "distance")}
        | {f"figures/{n}.{kind}" for n in names for kind in ("png", "svg")}
    )


@pytest.mark.parametrize(
    ("file", "damage", "message"),
    [
        ("metrics.json", lambda file: edit(file, lambda content: content.pop("summary")), "is not finished"),
        ("manifest.json", Path.unlink, "not a gprune run"),
        ("manifest.json", lambda file: file.write_text("{half"), "not a gprune run"),
        ("masks.safetensors", Path.unlink, "missing or damaged"),
        ("modules.safetensors", lambda file: file.write_text("x"), "missing or damaged"),
        (
            "evaluation.json",
            lambda file: file.write_text('{"records": [{"task": "piqa"}]}'),
            "Cannot read records",
        ),
    ],
)
def test_an_invalid_run_folder_is_refused_in_one_line_and_nothing_is_written(file, damage, message, run, capsys):
    good, bad = Path(shutil.copytree(run, run.parent / "good")), another(run, "bad")
    damage(bad / file)
    before = written(run.parent)
    assert message in refused([str(good), str(bad)], capsys)
    assert written(run.parent) == before


def refused(args: list[str], capsys) -> str:
    """Run a command that has to fail, and return its one line on stderr."""
    assert command("report", args) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("gprune report: ")
    return line


def test_invalid_arguments_are_refused_in_one_line(run, tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    for args, message in (
        ([], "See --help"),
        ([str(run), "--colour", "red"], "See --help"),
        ([str(tmp_path / "nowhere")], "there is no folder"),
        ([str(run), "--output", str(tmp_path / "file")], "Cannot write"),
    ):
        assert message in refused(args, capsys)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_report_reads_neither_the_model_nor_the_corpora_nor_config_yaml(run, monkeypatch):
    for name in (
        "transformers.AutoModelForCausalLM.from_pretrained",
        "gprune.corpora.load.load_corpus",
        "gprune.runs.results.config_from_mapping",
    ):
        monkeypatch.setattr(name, lambda *_, **__: pytest.fail("the report reads more than the records and masks"))
    (run / "config.yaml").unlink()
    assert report.make([run]).runs[0].seed == 0
