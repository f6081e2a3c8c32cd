"""The frame of a run, compared with calculations from the records, and the tables that are pivoted from it."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from gprune.evaluation.intervals import Estimate, mean_per_token, mean_perplexity, paired_gap, paired_ratio
from gprune.report.tables import (
    Table,
    corpora_table,
    cost_table,
    format_cell,
    lines_of_rows,
    perplexity_table,
    result_table,
    summary_table,
)
from gprune.runs.numbers import COLUMNS, arithmetic_mean_over_seeds, final_lines, keyed, pool_seeds, run_frame
from tests import synthetic_run

STEPS = {"evaluate": {"seconds": 1.5, "forward_tokens": 10, "forward_backward_tokens": 0, "peak_memory_mib": 5}}


def records(shift: float = 0.0, *, seed: int = 0, corpora: tuple[str, ...] = ("wiki", "stories", "web")) -> list[dict]:
    """Return records of three stages on corpora, of which `wiki` was seen, with random losses and KL.

    `shift` is added to the losses of the final model, in nats per token.
    """
    random = np.random.default_rng(0)
    made = []
    for stage, nll in (("dense", 2.0), ("pruned", 3.0), ("recovered", 2.5 + shift)):
        for corpus in corpora:
            r = synthetic_run.record(stage, corpus, seen=corpus == "wiki", nll=nll)
            noise = random.normal(0, 3, 4)
            windows = [w + n for w, n in zip(r["window_nll"], noise, strict=True)]
            r |= {"window_nll": windows, "perplexity": math.exp(sum(windows) / 60), "seed": seed}
            if stage != "dense":
                of_windows = {"kl": list(random.random(4) * 15), "agreement": list(random.random(4) * 15)}
                r |= {f"window_{name}": values for name, values in of_windows.items()}
                r |= {name: sum(values) / 60 for name, values in of_windows.items()}
            made.append(r)
    return made


def number(frame: pd.DataFrame, stage: str, name: str, corpus: str = "") -> tuple[float, float, float]:
    """Return a number of the frame with the ends of its interval."""
    is_line = (frame["stage"] == stage) & (frame["number"] == name) & (frame["corpus"] == corpus)
    (line,) = frame[is_line].itertuples()
    return line.value, line.low, line.high


def test_the_frame_has_the_numbers_of_the_records_and_of_the_whole_model():
    made = records()
    entry = {"said": "Quality.", "numbers": {"asked": 0.05, "got": None}}
    frame = run_frame("ours", made, synthetic_run.SUMMARY | {"quality": entry}, STEPS)
    assert list(frame.columns) == COLUMNS
    assert not frame.duplicated(["stage", "corpus", "number"]).any()
    sums = {(r["stage"], r["corpus"]): r for r in made}
    dense, ours = ({c: sums[s, c]["window_nll"] for c in ("wiki", "stories", "web")} for s in ("dense", "recovered"))
    for corpus in ours:
        r = sums["recovered", corpus]
        one = {corpus: ours[corpus]}
        assert number(frame, "recovered", "perplexity", corpus)[0] == r["perplexity"]
        assert number(frame, "recovered", "perplexity", corpus) == pytest.approx(mean_perplexity(one, 15))
        assert number(frame, "recovered", "times_dense", corpus) == pytest.approx(paired_ratio(one, dense, 15))
        assert number(frame, "recovered", "kl", corpus) == pytest.approx(mean_per_token({"": r["window_kl"]}, 15))
        assert number(frame, "recovered", "agreement", corpus)[0] == r["agreement"]
    seen, unseen = {"wiki": ours["wiki"]}, {c: ours[c] for c in ("stories", "web")}
    of_seen = {"wiki": True, "stories": False, "web": False}
    kl = {c: sums["recovered", c]["window_kl"] for c in unseen}
    agreement = {c: sums["recovered", c]["window_agreement"] for c in unseen}
    for name, expected in {
        "seen": mean_perplexity(seen, 15), "unseen": mean_perplexity(unseen, 15),
        "seen_over_dense": paired_ratio(seen, dense, 15), "unseen_over_dense": paired_ratio(unseen, dense, 15),
        "gap": paired_gap(ours, dense, of_seen, 15), "unseen_kl": mean_per_token(kl, 15),
        "unseen_agreement": mean_per_token(agreement, 15, largest=1.0),
    }.items():  # fmt: skip
        assert number(frame, "recovered", name) == pytest.approx(expected)
    assert (number(frame, "dense", "parameters")[0], number(frame, "recovered", "parameters")[0]) == (100, 75)
    of_run = {"sparsity_of_model": 0.25, "seconds": 1.5, "steps/evaluate/peak_memory_mib": 5, "quality/asked": 0.05}
    assert {name: number(frame, "recovered", name)[0] for name in of_run} == of_run
    names = {stage: set(of_stage["number"]) for stage, of_stage in frame.groupby("stage")}
    assert names["dense"] == {"perplexity", "seen", "unseen", "parameters"}
    assert names["recovered"] - names["pruned"] > of_run.keys()
    assert "quality/got" not in names["recovered"]  # not measured
    windows = frame.set_index(["stage", "number", "corpus"])["windows"]
    assert (windows["pruned", "unseen", ""], windows["pruned", "kl", "web"]) == (8, 4)


def test_numbers_that_are_not_defined_have_no_line():
    made = records()
    other_tokens = [
        r | ({} if r["stage"] == "dense" else {"content_hash": "other", "kl": None, "agreement": None}) for r in made
    ]
    assert set(run_frame("ours", other_tokens)["number"]) == {"perplexity", "seen", "unseen"}
    of_unseen = run_frame("ours", [r for r in made if not r["seen"]])
    assert {"seen", "gap", "seen_over_dense"}.isdisjoint(of_unseen["number"])
    single = run_frame("ours", [r | {"window_nll": r["window_nll"][:1]} for r in made])
    assert single.query("number == 'perplexity'")["low"].isna().all()


def test_trackers_get_every_number_by_stage_and_those_of_the_final_model_again():
    frame = run_frame("ours", [r | {"corpus": f"/my text/{r['corpus']}.txt"} for r in records()], synthetic_run.SUMMARY)
    numbers = keyed(frame)
    assert numbers["final/unseen_over_dense"] == numbers["recovered/unseen_over_dense"]
    assert numbers["final/unseen_over_dense"] != numbers["pruned/unseen_over_dense"]
    assert numbers["dense/perplexity/stories.txt"] == number(frame, "dense", "perplexity", "stories.txt")[0]
    assert len(numbers) == len(frame) + len(final_lines(frame))
    assert not any(blank in key for key in numbers for blank in " +")


def test_results_of_tasks_are_numbers_of_the_dense_and_of_the_final_model():
    evaluation = [synthetic_run.ANSWERS | {"stage": stage, "acc": acc} for stage, acc in (("dense", 0.6), ("x", 0.5))]
    wikitext = {"kind": "perplexity", "task": "wikitext2", "stage": "x", "seq_len": 128, "perplexity": 9.0}
    evaluation.append(wikitext | {"low": 8, "high": 10})
    frame = run_frame("ours", records(), evaluation=evaluation)
    assert number(frame, "dense", "tasks/piqa/acc")[0] == 0.6
    assert number(frame, "recovered", "tasks/piqa/acc") == pytest.approx((0.5, 0.5 - 0.196, 0.5 + 0.196), abs=1e-4)
    assert number(frame, "recovered", "tasks/wikitext2/128/perplexity") == (9, 8, 10)
    assert not frame.query("stage == 'pruned'")["number"].str.startswith("tasks/").any()


# --- means over seeds


def test_means_over_seeds_have_intervals_over_seeds():
    shifts = [0.0, 0.2, 0.5]
    frames = [run_frame("ours", records(shift, seed=seed)) for seed, shift in enumerate(shifts)]
    means = pool_seeds(pd.concat([*frames, run_frame("single", records())], ignore_index=True))
    assert (set(means["row"]), set(means["seed"])) == ({"ours"}, {"mean"})
    logs = np.log([number(frame, "recovered", "unseen")[0] for frame in frames])
    low, high = stats.t.interval(0.95, 2, loc=logs.mean(), scale=stats.sem(logs))
    assert number(means, "recovered", "unseen") == pytest.approx(np.exp([logs.mean(), low, high]))
    # Numbers that do not depend on the seed keep their intervals over windows.
    for stage, name in (("dense", "unseen"), ("recovered", "unseen_kl")):
        assert number(means, stage, name) == number(frames[0], stage, name)
    costs = [run_frame("ours", records(seed=s), synthetic_run.SUMMARY, {"a": {"seconds": s}}) for s in (0, 1)]
    pooled = pool_seeds(pd.concat(costs, ignore_index=True))
    assert number(pooled, "recovered", "parameters")[0] == 75
    assert "seconds" not in set(pooled["number"])  # differs by seed, and is no number of a model


def test_kl_and_agreement_over_seeds_have_arithmetic_means_inside_of_their_limits():
    assert arithmetic_mean_over_seeds([0.0, 0.0]) == (0, 0, 0)
    mean, low, high = arithmetic_mean_over_seeds([0.97, 0.999, 0.96], largest=1.0)
    assert (mean, low, high) == (pytest.approx(0.97633, abs=1e-5), pytest.approx(0.92611, abs=1e-4), 1)


# --- tables


def shown(table: Table) -> pd.DataFrame:
    """Return the text of a table by its first column."""
    return table.formatted().set_index(table.columns[0])


def test_the_table_of_a_run_has_its_stages_as_columns_and_seen_corpora_first():
    frame = run_frame("ours", records(corpora=("stories", "wiki")))
    table = shown(result_table(frame))
    assert list(table.columns) == ["dense", "pruned", "recovered"]
    assert list(table.index) == [
        "wiki*", "stories", "seen", "unseen", "seen / dense", "unseen / dense", "gap", "KL", "agreement",
    ]  # fmt: skip
    assert table.loc["stories", "dense"] == f"{number(frame, 'dense', 'perplexity', 'stories')[0]:.2f}"
    ratio = number(frame, "recovered", "unseen_over_dense")
    assert table.loc["unseen / dense", "recovered"] == "{:.3f} [{:.3f}, {:.3f}]".format(*ratio)
    assert table.loc["unseen / dense", "dense"] == ""


def test_tables_of_rows_have_each_dense_model_once_and_the_final_models():
    seeds = [run_frame("ours", records(shift, seed=seed)) for seed, shift in enumerate((0.0, 0.2))]
    other = run_frame("other", records(0.1))
    frame = pd.concat([*seeds, other], ignore_index=True)
    lines = lines_of_rows(frame)
    table = shown(summary_table(lines))
    assert list(table.index) == ["dense", "ours (2 seeds)", "other"]
    ratio = number(pool_seeds(frame), "recovered", "unseen_over_dense")
    assert table.loc["ours (2 seeds)", "unseen / dense"] == "{:.3f} [{:.3f}, {:.3f}]".format(*ratio)
    by_corpus = shown(perplexity_table(lines))
    assert list(by_corpus.columns) == ["wiki*", "stories", "web"]
    assert ["[" in cell for cell in by_corpus["web"]] == [False, True, False]  # intervals over seeds alone
    all_seen = [r | {"seen": True, "perplexity": r["perplexity"] + 1} for r in records()]
    several = lines_of_rows(pd.concat([other, run_frame("larger", all_seen)], ignore_index=True))
    assert list(shown(summary_table(several)).index) == ["dense of other", "dense of larger", "other", "larger"]
    assert list(shown(perplexity_table(several)).columns) == ["wiki*", "stories(*)", "web(*)"]


def test_the_table_of_corpora_has_the_worst_corpus_and_counts_where_a_row_is_ahead():
    one, other = records(corpora=("wiki", "a", "b", "c")), records(corpora=("wiki", "a", "b", "c"))
    for r in other:
        if r["stage"] == "recovered" and r["corpus"] in ("a", "b"):
            r["window_nll"] = [nll + (3 if r["corpus"] == "a" else -3) for nll in r["window_nll"]]
    frame = pd.concat([run_frame("one", one), run_frame("other", other)], ignore_index=True)
    table = shown(corpora_table(lines_of_rows(frame)))
    assert list(table["ahead on"]) == ["2 of 3", "2 of 3"]  # the last corpus is a tie
    ratios = frame.query("stage == 'recovered' and number == 'times_dense' and not seen and row == 'other'")
    worst = ratios.loc[ratios["value"].idxmax()]
    assert list(table.loc["other", ["worst corpus", "worst / dense"]]) == [worst["corpus"], f"{worst['value']:.3f}"]


def test_many_corpora_and_the_steps_of_each_run_have_a_line_each():
    corpora = tuple(f"corpus {i}" for i in range(9))
    table = shown(perplexity_table(lines_of_rows(run_frame("mine", records(corpora=corpora)))))
    assert (list(table.columns), list(table.index)) == (["dense", "mine"], list(corpora))
    frames = [run_frame("ours", records(seed=seed), steps=STEPS) for seed in (0, 1)]
    (line,) = cost_table(frames[0]).formatted().to_numpy().tolist()
    assert line == ["evaluate", "1.5", "10", "0", "5"]
    of_seeds = cost_table(pd.concat(frames, ignore_index=True)).formatted()["step"]
    assert list(of_seeds) == ["ours, seed 0: evaluate", "ours, seed 1: evaluate"]


def test_a_cell_is_formatted_by_one_function():
    cells = [Estimate(1 / 3, 0.25, 0.5), Estimate(2.0), Estimate(2.0, math.nan, math.nan), 0.125, math.nan, None, 3]
    texts = ["0.333 [0.250, 0.500]", "2.000", "2.000", "0.125", "", "", "3"]
    assert [format_cell(cell, 3) for cell in cells] == texts


def test_names_are_escaped_in_markdown_latex_and_html():
    name = r"50 % & <b>_{x}|`y`"
    table = Table("summary", "Ratios", ["run", "gap"], [[name, 1.0]], note=name)
    page = table.to_html()
    assert "<b>" not in page
    assert "50 % &amp; &lt;b&gt;_{x}" in page
    assert table.to_latex("tab:x").count(r"50 \% \& <b>\_\{x\}|") == 2
    assert "backtick" not in table.to_latex("tab:x")
    assert table.to_markdown().splitlines()[-1].count(r"\|") == 1
