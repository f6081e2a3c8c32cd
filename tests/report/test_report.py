"""Reports of runs: their groups, comparisons, model card, figures, page and files, and invalid folders."""

from __future__ import annotations

import math
import re
import shutil
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image

from gprune import report
from gprune.__main__ import run as command
from gprune.config import RunConfig
from gprune.config.groups import CorporaConfig, ModelConfig
from gprune.config.running import EvaluationConfig
from gprune.corpora.load import corpus_labels
from gprune.evaluation.intervals import Estimate, paired_difference, paired_ratio
from gprune.models.masks import Masks
from gprune.report.card import model_card
from gprune.report.figures import LINES, curve_points, interval_lengths, loss_figure, read_curves, removed_figure
from gprune.report.grouping import read_runs
from gprune.report.page import compare_table, write_report
from gprune.report.task_tables import evaluation_table
from gprune.storage.files import read_json, write_json
from gprune.studies.report_command import default_output
from tests import synthetic_run

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
ODD = "<b>&'odd.txt"  # a corpus name that has to be escaped


@pytest.fixture
def run(tmp_path):
    return written(tmp_path / "runs" / "one")


def written(folder: Path, *, seed: int = 0, shift: float = 0.0, ridge: float = 0.01, **changes) -> Path:
    """Write a finished run, and return its folder.

    Args:
        seed: seed of the run, also in its records and in the name of its text.
        shift: nats per token that are added to the losses of the pruned model.
        changes: entries of the records to replace.
    """
    inputs = {"model": "0123456789abcdef", "text": {"wiki train": f"sample {seed}"}}
    settings = synthetic_run.settings()
    synthetic_run.write_run(folder, run=settings["run"] | {"seed": seed}, ridge=ridge, inputs=inputs)
    records = []
    for r in synthetic_run.records():
        own = shift if r["stage"] != "dense" else 0.0
        window_nll = [nll + own * (r["seq_len"] - 1) for nll in r["window_nll"]]
        moved = {"seed": seed, "window_nll": window_nll, "perplexity": r["perplexity"] * math.exp(own)}
        records.append(r | moved | changes)
    edit(folder / "metrics.json", lambda content: content.update(records=records))
    return folder


def edit(path: Path, change) -> None:
    """Change a JSON file of a run."""
    content = read_json(path)
    change(content)
    write_json(path, content)


def window_nll(run: Path, stage: str) -> dict[str, list[float]]:
    """Return the losses of windows of unseen corpora."""
    records = read_json(run / "metrics.json")["records"]
    return {r["corpus"]: r["window_nll"] for r in records if r["stage"] == stage and not r["seen"]}


# --- several runs


def test_only_runs_with_equal_settings_and_text_are_grouped_over_seeds(run):
    folders = [run, written(run.parent / "same-seed"), written(run.parent / "other-ridge", seed=1, ridge=0.5)]
    folders += [written(run.parent / "other-seed", seed=1), written(run.parent / "text", seed=2, content_hash="0")]
    assert default_output(folders) == run.parent / "report"
    made = report.make(folders)
    assert [(r.name, r.seed) for r in made.runs] == [
        ("one", 0), ("one", 1), ("same-seed", 0), ("other-ridge", 1), ("text", 2),
    ]  # fmt: skip
    (summary,) = [table for table in made.tables if table.name == "summary"]
    assert [cells[0] for cells in summary.rows][-4:] == ["one (2 seeds)", "same-seed", "other-ridge", "text"]
    (table,) = [table for table in report.make([folders[0], folders[2]]).tables if table.name == "settings"]
    assert (table.columns, table.rows) == (["flag", "one", "other-ridge"], [["ridge", "0.01", "0.5"]])


def test_a_corpus_seen_by_one_seed_counts_as_seen_in_the_mean_over_seeds(run):
    """Whether training text occurs in a corpus depends on the seed. A mean over seeds needs one set of corpora."""
    other = written(run.parent / "other", seed=1, seen=True)
    frame = report.make([run, other]).frame
    assert set(frame.query("corpus == 'stories'")["seen"]) == {True}
    assert "unseen" not in set(frame["number"])
    assert "unseen" in set(report.make([run]).frame["number"])


def test_a_run_given_twice_is_counted_once_and_a_copy_has_a_longer_name(run, monkeypatch):
    monkeypatch.chdir(run.parent)
    assert [r.name for r in read_runs([run, "one", "./one/"])] == ["one"]
    copy = shutil.copytree(run, run.parent / "more" / "one")
    assert [r.name for r in read_runs([run, copy])] == ["one", "more/one"]


def test_pairs_are_compared_on_text_unseen_by_both_with_paired_intervals(run):
    other = written(run.parent / "other", shift=0.3, ridge=0.5)
    runs = report.make([run, other]).runs
    (row,) = compare_table(runs, [("other", "one")]).rows
    assert row[:2] == ["other / one", 1]
    assert row[2] == pytest.approx(paired_ratio(window_nll(other, "pruned"), window_nll(run, "pruned"), 15))
    assert row[2].value == pytest.approx(math.exp(0.3))
    # Rows without a run have no line. Other windows, another seed and text that one has seen give no ratio.
    assert compare_table(runs, [("other", "missing")]).rows == []
    for changes in ({"content_hash": "0"}, {"seen": True}):
        changed = written(run.parent / str(changes), ridge=0.5, **changes)
        (row,) = compare_table(report.make([run, changed]).runs, [("one", changed.name)]).rows
        assert row[1:] == [0, None], changes
    far = written(run.parent / "far", seed=7, ridge=0.5)
    table = compare_table(report.make([run, far]).runs, [("one", "far")])
    assert table.rows[0][1:] == [0, None]
    assert "no seed in common" in table.note


# --- tasks


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
    made = report.make([run])
    (table,) = [table for table in made.tables if table.name == "evaluation"]
    (cells,) = [dict(zip(table.columns, row, strict=True)) for row in table.rows if row[2] == "pruned"]
    difference, error = paired_difference([1, 0, 0, 1, 1, 0], [1, 1, 0, 1, 1, 0])
    assert cells["against dense"] == f"{difference:+.3f} +- {error:.3f}"
    assert cells["flips"] == "33.3%: -16.7% +0.0%"  # one correct answer became wrong, and one wrong answer changed
    assert (cells["acc or perplexity"], cells["standard protocol"]) == ("0.500 +- 0.200", "no")
    assert "a note" in made.to_markdown()
    without_dense = evaluation_table([record | {"run": "r"} for record in (pruned, *not_matching)])
    (cells_without_dense,) = [row for row in without_dense.rows if row[2] == "pruned"]
    assert cells_without_dense[7] is None
    without_answers = [{k: v for k, v in r.items() if k != "answers"} | {"run": "r"} for r in (dense, pruned)]
    table = evaluation_table(without_answers)  # of older versions, which recorded only which answers were correct
    assert "flips" not in table.columns
    assert "Flips" not in table.note


# --- the model card


def test_a_model_card_has_no_local_paths_and_mentions_drift_only_if_it_was_measured(run, tmp_path):
    """Corpora have the shortest labels that are unique, such as `law/alpha.txt`."""
    edit(run / "metrics.json", lambda m: [r.update(corpus=f"{run}/alpha.txt") for r in m["records"] if r["seen"]])
    (finished,) = read_runs([run])
    corpora = CorporaConfig(score=f"{tmp_path}/law/alpha.txt", drift=[f"{tmp_path}/two.txt", f"{run}/alpha.txt"])
    cfg = RunConfig(corpora=corpora, recovery="bias", evaluation=EvaluationConfig(split="development"))
    card = model_card(cfg, finished, run / "model")
    assert "tokens of development text per corpus" in card
    assert "scored on law/alpha.txt, drift measured on two.txt, one/alpha.txt" in card
    assert "| one/alpha.txt* " in card
    assert str(tmp_path) not in card
    plain = model_card(RunConfig(gprune=False, model=ModelConfig(name=str(tmp_path))), finished, run / "model")
    assert "drift measured" not in plain
    assert "2603.13418" in card
    assert "2603.13418" not in plain
    assert str(tmp_path) not in plain
    assert f"# {tmp_path.name}, structurally pruned" in plain


def test_a_model_card_has_base_model_and_licence_as_metadata_of_the_hub(run):
    for name, base, licence in (
        ("smollm2-135m", "HuggingFaceTB/SmolLM2-135M-Instruct", "apache-2.0"), ("tiny-random", None, "cc0-1.0"),
        ("owner/model", "owner/model", None), (".", None, None),
    ):  # fmt: skip
        cfg = RunConfig(model=ModelConfig(name=name), recovery="none")
        data = ModelCard(model_card(cfg, *read_runs([run]), run / "model")).data
        assert (data.base_model, data.license, data.library_name) == (base, licence, "transformers")


def test_labels_of_corpus_files_are_the_shortest_unique_paths():
    labels = {
        "wiki": "wiki", "/home/me/text/one.txt": "one.txt", "/home/me/text/two.txt": "text/two.txt",
        "/home/me/other/two.txt": "other/two.txt", "two.txt": "two.txt", "data/wiki": "data/wiki", "./law/": "law",
    }  # fmt: skip
    assert corpus_labels(labels) == labels
    for alike in (["wiki", "./wiki"], ["/two.txt", "two.txt"], ["/a/b.txt", "a/b.txt"]):
        assert len(set(corpus_labels(alike).values())) == 2


# --- figures


def test_figures_draw_the_numbers_of_the_frame_and_name_their_axes(run):
    made = report.make([run, written(run.parent / "two", ridge=0.5, shift=0.2)])
    loss, removed = (made.figures[name].axes[0] for name in ("loss", "removed"))
    ratios = made.frame.query("number == 'times_dense'")
    for name, points in zip(("one", "two"), loss.containers, strict=True):
        drawn = dict(zip(("wiki", "stories"), points.lines[0].get_ydata(), strict=True))
        assert drawn == ratios[ratios["row"] == name].set_index("corpus")["value"].to_dict()
    assert [text.get_text() for text in loss.get_xticklabels()] == ["wiki\nseen", "stories\nunseen"]
    assert loss.get_ylabel() == "perplexity, times dense"
    assert list(removed.lines[0].get_ydata()) == [0.5, 0.5]
    assert (removed.get_xlabel(), removed.get_ylabel()) == ("layer", "share of neurons removed")


def test_the_figure_of_removed_shares_accepts_layers_without_a_mask_shows_modules_and_lines_that_differ():
    masks = Masks.of_blocks([torch.tensor([True, False, False, False]), torch.ones(0, dtype=torch.bool)], [])
    axes = removed_figure({"one": masks}, [torch.tensor([0, 0, 1, 1]), torch.tensor([])]).axes[0]
    assert list(axes.lines[0].get_ydata()) == [0.75, 0]
    assert axes.collections[0].get_offsets().tolist() == [[0, 0.5], [0, 1]]
    lines = removed_figure({str(i): masks for i in range(3 * len(LINES))}).axes[0].lines[: 3 * len(LINES)]
    assert len({(line.get_linestyle(), line.get_marker()) for line in lines[: len(LINES)]}) == len(LINES)
    assert len({(line.get_color(), line.get_marker()) for line in lines}) == len(lines)  # styles are repeated


def test_intervals_that_are_missing_or_exclude_their_value_by_rounding_are_drawn():
    low = np.nextafter(0.7, 1)
    lengths = interval_lengths([Estimate(0.7, low, low), Estimate(1.0), Estimate(1.0, 0.75, 1.5)])
    assert lengths.tolist() == [[0, 0, 0.25], [pytest.approx(0, abs=1e-9), 0, 0.5]]


def test_long_corpus_paths_do_not_shrink_the_figure(run):
    """A long path as label would leave no width for the axes; matplotlib warns, and warnings are errors in tests."""
    folder = "/srv/" + 8 * "a/long/way/" + "down/"
    edit(run / "metrics.json", lambda m: [r.update(corpus=folder + r["corpus"]) for r in m["records"]])
    figure = loss_figure(report.make([run]).frame)
    figure.savefig(run / "figure.png")
    assert figure.axes[0].get_position().width > 0.5
    assert figure.axes[0].get_xticklabels()[0].get_text() == "wiki\nseen"


def test_curves_of_a_resumed_run_are_concatenated_and_unreadable_ones_omitted(run):
    def write(version, content):
        (run / f"csv/version_{version}").mkdir(parents=True, exist_ok=True)
        (run / f"csv/version_{version}/metrics.csv").write_text(content)

    write(0, "step,learn/loss\n0,3\n1,2\n2,9\n")
    write(1, "step,learn/loss\n2,1\n")  # a repeated step
    line = curve_points(read_curves(run), "step", "learn/loss")
    assert line.to_numpy().tolist() == [[0, 3], [1, 2], [2, 1]]
    shutil.rmtree(run / "csv")
    for content in ("", "step,learn/loss\n1,2,3,4\n1\n", "a,b\n1,2\n", "step,learn/loss\nx,y\nz,1\n"):
        write(0, content)
        assert "learning" not in report.make([run]).figures


# --- the page


@pytest.fixture
def pages(run):
    """Return the pages of a run with a corpus whose name has to be escaped, and of two runs."""
    edit(run / "metrics.json", lambda m: [r.update(corpus=ODD) for r in m["records"] if not r["seen"]])
    both = [run, written(run.parent / "two", ridge=0.5)]
    return [write_report(report.make(runs), run.parent / f"{len(runs)}.html") for runs in ([run], both)]


def parsed(path: Path) -> ElementTree.Element:
    """Parse a page as XML, without the few elements that are not XML."""
    text = re.sub(r"<style>.*?</style>|<(meta|!DOC)[^>]*>", "", path.read_text(), flags=re.S)
    return ElementTree.fromstring(re.sub(r"(<img[^>]*)>", r"\1/>", text))


def test_pages_are_valid_load_nothing_and_have_the_numbers_of_the_frame(run, pages):
    for path in pages:
        page = parsed(path)
        links = [value for e in page.iter() for name, value in e.items() if name in ("href", "src")]
        assert len(links) >= 2
        assert all(value.startswith("data:image/png;base64,") for value in links)
        assert "<b>&'odd" not in path.read_text()
        assert "Made by gprune" in "".join(page.itertext())
    texts = " ".join(parsed(pages[0]).itertext())
    frame = report.make([run]).frame
    for line in frame.query("number == 'perplexity'").itertuples():
        assert f"{line.value:.2f}" in texts
    (ratio,) = frame.query("number == 'unseen_over_dense'").itertuples()
    assert f"{ratio.value:.3f} [{ratio.low:.3f}, {ratio.high:.3f}] times dense on unseen text" in texts
    for words in ("100 -> 75 parameters", ODD, "seed: 0", "windows of 16 tokens", "What next", str(run)):
        assert words in texts, words
    assert write_report(report.make([run]), run / "again.html").read_text() == pages[0].read_text()


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
def test_a_browser_shows_pages_without_requests_messages_or_accessibility_violations(pages):
    playwright = pytest.importorskip("playwright.sync_api", reason="no playwright to drive a browser with")
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="no axe-core").Axe()
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        for path in pages:
            page = browser.new_page(viewport={"width": 390, "height": 900})
            requests, messages = [], []
            page.on("request", lambda request, urls=requests: urls.append(request.url))
            page.on("console", lambda message, texts=messages: texts.append(message.text))
            page.goto(path.as_uri())
            assert ([url for url in requests if not url.startswith("data:")], messages) == ([path.as_uri()], [])
            assert page.evaluate("document.documentElement.scrollWidth") <= 390  # only tables scroll sideways
            violations = axe.run(page).response["violations"]
            assert [f"{v['id']}: {v['nodes'][0]['html'][:200]}" for v in violations] == []
        browser.close()


# --- the command and its files


def files_in(folder: Path) -> set[str]:
    """Return the relative paths of all files below a folder."""
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}


@pytest.mark.slow
def test_gprune_report_prints_the_tables_and_writes_markdown_the_frame_and_figures_reproducibly(run, capsys):
    assert command("report", [str(run)]) == 0
    out, output, made = capsys.readouterr().out, run / "report", report.make([run])
    assert made.tables[0].to_markdown() in out
    assert made.tables[0].to_markdown() in (output / "report.md").read_text()
    assert "windows of 16 tokens, stride 16, no BOS, float32, test text, scope ffn" in out
    assert (output / "numbers.csv").read_text() == made.frame.to_csv(index=False)
    assert files_in(output) == {"report.md", "numbers.csv", "figures/loss.png", "figures/removed.png"}
    with Image.open(output / "figures/loss.png") as image:
        assert image.width > 400
    before = {p: p.read_bytes() for p in output.rglob("*") if p.is_file()}
    report.make([run]).write(output)
    assert {p: p.read_bytes() for p in before} == before
    assert (run / "report.html").exists()


DAMAGED = [  # file of a run, damage, a part of the message
    ("metrics.json", lambda file: edit(file, lambda content: content.pop("summary")), "is not finished"),
    ("manifest.json", Path.unlink, "not a gprune run"),
    ("manifest.json", lambda file: file.write_text("{half"), "not a gprune run"),
    ("masks.safetensors", Path.unlink, "missing or damaged"),
    ("evaluation.json", lambda file: file.write_text("[]"), "Cannot read records"),
]


def test_an_invalid_run_folder_is_refused_in_one_line_and_nothing_is_written(run, capsys):
    for number, (file, damage, message) in enumerate(DAMAGED):
        bad = written(run.parent / f"bad {number}")
        damage(bad / file)
        before = files_in(run.parent)
        assert command("report", [str(run), str(bad)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("gprune report: ")
        assert message in line
        assert files_in(run.parent) == before


def test_a_report_reads_neither_the_model_nor_the_corpora_nor_config_yaml(run, monkeypatch):
    for name in (
        "transformers.AutoModelForCausalLM.from_pretrained",
        "gprune.corpora.load.load_corpus",
        "gprune.runs.results.config_from_mapping",
    ):
        monkeypatch.setattr(name, lambda *_, **__: pytest.fail("the report reads more than the records and masks"))
    assert not (run / "config.yaml").exists()
    assert report.make([run]).runs[0].seed == 0
