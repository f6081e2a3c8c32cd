"""The summary figures for a talk, from the committed records."""

from __future__ import annotations

import math

import pytest
from scipy.stats import t

from experiments import summary
from gprune.studies.archive import finished_record
from gprune.studies.listing import Listing

UNSEEN = ("stackexchange", "gsm8k", "stories", "python_docs")


def test_the_ratio_of_the_distillation_part_is_that_of_its_records():
    """The ratio of `best` to `base` is a geometric mean over corpora, with Student's t interval over three seeds."""
    logs = []
    for seed in (0, 1, 2):
        nll = {}
        for row in Listing.read(summary.HERE / "headline.yaml", seeds=[seed]).rows:
            if row.name in ("base", "best"):
                records = finished_record(row)["records"]
                last_stage = records[-1]["stage"]
                nll[row.name] = [r["nll"] for r in records if r["stage"] == last_stage and r["corpus"] in UNSEEN]
        logs.append(sum(a - b for a, b in zip(nll["best"], nll["base"], strict=True)) / len(UNSEEN))
    mean = sum(logs) / 3
    half_width = t.ppf(0.975, 2) * math.sqrt(sum((x - mean) ** 2 for x in logs) / 2 / 3)
    label, ratio = summary.parts()[-2]
    assert "distillation" in label
    expected = [math.exp(mean + offset) for offset in (0, -half_width, half_width)]
    assert (ratio.value, ratio.low, ratio.high) == pytest.approx(expected)


def test_every_drawn_row_is_in_its_list_and_every_part_is_drawn():
    """`parts` leaves out a row that is not in the headline's list."""
    by_tokens = {"distill.yaml": [row for rows in summary.BY_TOKENS.values() for row in rows]}
    for name, rows in [*summary.SMOLLM2.items(), *summary.GEMMA.items(), *by_tokens.items()]:
        assert set(rows or ()) <= {row.name for row in Listing.read(summary.HERE / name).rows}
    assert [label for label, _ in summary.parts()] == ["the base metric", *summary.PARTS.values(), "the dense model"]


@pytest.mark.slow
def test_the_command_writes_all_figures(tmp_path):
    assert summary.work([str(tmp_path)]).startswith(f"Drawn: {tmp_path / 'summary.png'}, {tmp_path / 'summary.svg'}, ")
    names = {f"{name}.{kind}" for name in ("summary", "distill-tokens", "sparsity-curve") for kind in ("png", "svg")}
    assert {path.name for path in tmp_path.iterdir()} == names
    assert (tmp_path / "summary.svg").read_text().count('<g id="axes_') == 4
