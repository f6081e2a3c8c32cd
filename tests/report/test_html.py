"""The HTML page of a run and of a comparison: self-contained, complete, and working in a browser."""

from __future__ import annotations

import json
import re
import shutil
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pandas as pd
import pytest

from gprune import report
from gprune.__main__ import run as command
from gprune.report.figures import curve_figures, curve_points, learning_figure, read_curves
from gprune.report.page import write_report
from gprune.storage.files import write_json
from tests import tiny_run

pytestmark = pytest.mark.slow  # whole runs, and a browser

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
ODD = "<b>&'odd.txt"  # a corpus name that has to be escaped in HTML


@pytest.fixture(scope="module")
def runs(world, tmp_path_factory):
    """Return two runs with figures and pages."""
    folder = tmp_path_factory.mktemp("page")
    odd = Path(shutil.copy(world.corpora["delta"], folder / ODD))
    evaluate = f"--corpora.evaluate={json.dumps([str(world.corpora['alpha']), str(odd)])}"
    flags = ("--sparsity.epochs=2", "--recovery=least_squares", evaluate)
    with pytest.MonkeyPatch.context() as patch, tiny_run.isolated(folder / "cache"):
        tiny_run.draw(patch)
        return [world.run(folder / "runs", *flags, f"--run.seed={seed}", name=f"seed-{seed}") for seed in (0, 1)]


@pytest.fixture
def finished(runs):
    return runs[0]


@pytest.fixture(scope="module")
def compared(runs):
    """Return the page that compares both runs."""
    path = runs[0].path.parent / "compared.html"
    with tiny_run.isolated(path.parent / "cache"):
        assert command("report", [*(str(run.path) for run in runs), "--html", str(path)]) == 0
    return path


def parsed(path: Path) -> ElementTree.Element:
    """Parse a page as XML, without the few elements that are not XML."""
    return ElementTree.fromstring(
        re.sub(r"<(script|style)>.*?</\1>|<(meta|!DOC)[^>]*>", "", path.read_text(), flags=re.S)
    )


@pytest.mark.parametrize("which", ["one", "both"])
def test_a_page_loads_nothing_has_unique_ids_and_escapes_names(which, finished, compared):
    path = compared if which == "both" else finished.path / "report.html"
    attributes = [
        (name.rpartition("}")[2], value) for element in parsed(path).iter() for name, value in element.items()
    ]
    ids = [value for name, value in attributes if name == "id"]
    assert len(ids) == len(set(ids)) > 0
    references = [value for name, value in attributes if name in ("href", "src")]
    assert all(value.startswith(("#", "data:image/png;base64,")) for value in references)
    assert "default-src 'none'" in path.read_text()
    assert "<b>&'odd" not in path.read_text()


def test_the_page_of_a_run_has_its_numbers_figures_settings_and_commands(finished):
    text = (finished.path / "report.html").read_text()
    text_of_page = " ".join(parsed(finished.path / "report.html").itertext())
    for r in finished.records:
        assert f"{r['perplexity']:.2f}" in text_of_page
    for words in (f"{finished.summary['parameters_after']:,}", ODD, "seed: 0", "what next", "save_and_check"):
        assert words.lower() in text_of_page.lower(), words
    assert f'from_pretrained("{finished.path / "model"}", trust_remote_code=True)' in text_of_page
    assert text.count("<svg") == 3 + 3  # figures of the run, and curves of training
    assert f"windows of {finished.records[0]['seq_len']} tokens" in text_of_page


def test_the_page_of_a_run_has_the_size_of_its_weights(finished):
    text_of_page = " ".join(" ".join(parsed(finished.path / "report.html").itertext()).split())
    weights = (finished.path / "model/model.safetensors").stat().st_size
    (megabytes,) = re.findall(r"Weights in float32: ([\d.]+) MB", text_of_page)
    assert float(megabytes) == pytest.approx(weights / 1e6, abs=0.06)
    assert "experiments.engines" in text_of_page


def test_figures_use_the_text_colour_of_the_page_and_pages_are_reproducible(finished, tmp_path):
    text = (finished.path / "report.html").read_text()
    for drawing in re.findall(r"<svg.*?</svg>", text, re.DOTALL):
        assert "currentColor" in drawing
        assert not re.search("#000000|#ffffff", drawing)
    assert write_report(report.make([finished.path]), tmp_path / "again.html").read_text() == text


def test_curves_of_a_resumed_run_are_concatenated(tmp_path):
    for version, rows in enumerate([{"step": [0, 1], "learn/loss": [3.0, 2.0]}, {"step": [2], "learn/loss": [1.0]}]):
        (tmp_path / f"csv/version_{version}").mkdir(parents=True)
        pd.DataFrame(rows).to_csv(tmp_path / f"csv/version_{version}/metrics.csv", index=False)
    line = curve_points(read_curves(tmp_path), "step", "learn/loss")
    assert line.to_numpy().tolist() == [[0, 3], [1, 2], [2, 1]]
    assert list(curve_figures(read_curves(tmp_path))) == ["Loss while sparsity is learned"]


def test_curves_of_a_resumed_run_drop_repeated_steps():
    """Points at 8 and 16 tokens were logged twice, because the run resumed from an earlier checkpoint."""
    frame = pd.DataFrame({
        "distill/tokens": [0.0, 8, 16, 8, 16, 24], "distill/loss": [5.0, 4, 3.1, 4, 3, 2],
        "development/perplexity/a": [9.0, 8, 7, 8, 7, 6],
    })  # fmt: skip
    points = curve_points(frame, "distill/tokens", "distill/loss")
    assert points.to_numpy().tolist() == [[0, 5], [8, 4], [16, 3], [24, 2]]
    losses, perplexities = (figure.axes[0].lines for figure in curve_figures(frame).values())
    assert [list(line.get_ydata()) for line in losses] == [[5, 4, 3, 2]]
    assert [list(line.get_ydata()) for line in perplexities] == [[9, 8, 7, 6]]


def test_curves_of_a_quality_target_are_those_of_the_trial_that_is_the_runs_model(tmp_path):
    """Two trials are trained, after thresholds. The second one is the run's model."""
    nan = float("nan")
    columns = {
        "development/tokens": [0.0, 8, *[nan] * 4],
        "development/perplexity": [9.0, 8, *[nan] * 4],
        "trial_1/distill/tokens": [nan, nan, 16, 24, nan, nan],
        "trial_1/distill/loss": [nan, nan, 5, 4, nan, nan],
        "trial_2/distill/tokens": [*[nan] * 4, 16, 24],
        "trial_2/distill/loss": [*[nan] * 4, 3, 2],
        "trial_2/development/tokens": [*[nan] * 4, 16, 24],
        "trial_2/development/perplexity": [*[nan] * 4, 7, 6],
    }
    (tmp_path / "csv/version_0").mkdir(parents=True)
    pd.DataFrame(columns).to_csv(tmp_path / "csv/version_0/metrics.csv", index=False)
    reached = {"asked": 0.1, "largest": False, "trial": 2, "model": {"models": 2}}
    write_json(tmp_path / "quality.json", {"measured": {}, "reached": reached})
    perplexity, loss = learning_figure({"run": read_curves(tmp_path)}).axes
    assert [list(line.get_ydata()) for line in perplexity.lines] == [[9, 8, 7, 6]]
    assert [list(line.get_ydata()) for line in loss.lines] == [[3, 2]]


@pytest.mark.parametrize("content", ["", "step,learn/loss\n1,2,3,4\n1\n", "a,b\n1,2\n", "step,learn/loss\nx,y\nz,1\n"])
def test_unreadable_curves_are_omitted(content, tmp_path):
    (tmp_path / "csv/version_0").mkdir(parents=True)
    (tmp_path / "csv/version_0/metrics.csv").write_text(content)
    assert curve_figures(read_curves(tmp_path)) == {}


def test_a_record_of_a_list_has_no_curves_and_no_warning(tmp_path, caplog):
    record = tmp_path / "row-seed0.json"
    record.write_text("{}")
    assert read_curves(record).empty
    assert caplog.records == []


# --- in a browser --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="no playwright to drive a browser with")
    if CHROMIUM is None:
        pytest.skip("no chromium on this machine")
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.mark.parametrize(
    ("which", "scheme", "width"), [("one", "light", 390), ("one", "dark", 1280), ("both", "dark", 390)]
)
def test_a_browser_shows_a_page_without_requests_messages_or_accessibility_violations(
    browser, which, scheme, width, finished, compared
):
    path = compared if which == "both" else finished.path / "report.html"
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    requests, messages = [], []
    page.on("request", lambda request: requests.append(request.url))
    page.on("console", lambda message: messages.append(message.text))
    page.goto(path.as_uri())
    for details in page.query_selector_all("details"):
        details.evaluate("element => element.open = true")
    assert (requests, messages) == ([path.as_uri()], [])
    assert page.evaluate("document.documentElement.scrollWidth") <= width  # only tables and figures scroll sideways
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert background == {"light": "rgb(255, 255, 255)", "dark": "rgb(20, 23, 27)"}[scheme]
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="no axe-core").Axe()
    violations = axe.run(page).response["violations"]
    assert [f"{v['id']}: {v['nodes'][0]['html'][:200]}" for v in violations] == []
    page.close()


def test_a_click_or_the_enter_key_sorts_a_table(browser, compared):
    page = browser.new_page()
    page.goto(compared.as_uri())
    table = page.locator("table").first
    header = table.locator("th", has_text="unseen").first
    column = header.evaluate("element => element.cellIndex")

    def sort_keys():
        cells = table.locator(f"tbody tr > :nth-child({column + 1})")
        return [float(key) for key in cells.evaluate_all("all => all.map(e => e.dataset.key)")]

    for order in ("ascending", "descending"):
        header.locator("button").click()
        assert sort_keys() == sorted(sort_keys(), reverse=order == "descending")
        assert header.get_attribute("aria-sort") == order
    header.locator("button").focus()
    page.keyboard.press("Enter")
    assert header.get_attribute("aria-sort") == "ascending"
    page.close()


def test_tables_fit_a_wide_screen_and_show_a_scroll_hint_on_a_narrow_one(browser, compared):
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.goto(compared.as_uri())
    boxes = page.locator(".wide:has(table):visible")
    is_scrollable = "all => all.map(box => box.scrollWidth > box.clientWidth + 1)"
    assert not any(boxes.evaluate_all(is_scrollable))
    interval = page.locator("td small").first
    assert interval.inner_text().startswith("[")
    page.set_viewport_size({"width": 390, "height": 844})
    page.locator(".wide.more").first.wait_for(state="attached")  # not by a function, which the page's policy refuses
    hints = boxes.evaluate_all("all => all.map(box => getComputedStyle(box, '::before').content.includes('sideways'))")
    assert hints == boxes.evaluate_all(is_scrollable)
    assert any(hints)
    page.close()
