"""`--corpora.score` with several corpora: units are scored on their pooled statistics."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from gprune.calibration.statistics import pool_statistics
from gprune.config import RunConfig, parse
from gprune.config.groups import CorporaConfig
from gprune.errors import UserError
from gprune.importance.scores import score_units

pytestmark = pytest.mark.usefixtures("shared_cache")


def test_one_corpus_or_a_list_or_all_corpora_of_drift_can_be_given():
    configs = [
        CorporaConfig(score="wiki"), CorporaConfig(score=["wiki"]), parse(["--corpora.score=wiki"]).corpora,
        CorporaConfig(score=["wiki", "web"]), parse(["--corpora.score", "[wiki,web]"]).corpora,
        parse(["--corpora.score=null", "--corpora.drift=[web,wiki]"]).corpora,
    ]  # fmt: skip
    one, several = ["wiki"], ["wiki", "web"]
    assert [corpora.scored for corpora in configs] == [one, one, one, several, several, ["web", "wiki"]]
    with pytest.raises(UserError, match="must name at least one corpus; got an empty list"):
        CorporaConfig(score=[])
    with pytest.raises(UserError, match="must name each corpus once"):
        CorporaConfig(score=["wiki", "wiki"])


def test_settings_name_a_single_corpus_as_text_and_the_corpora_that_null_means():
    assert RunConfig(corpora={"score": ["web"]}).settings() == RunConfig(corpora={"score": "web"}).settings()
    assert RunConfig(corpora={"score": ["web"]}).settings()["corpora"]["score"] == "web"
    all_of_drift = RunConfig(corpora={"score": None, "drift": ["wiki", "web"]})
    assert all_of_drift.settings()["corpora"]["score"] == ["wiki", "web"]


@pytest.mark.parametrize("config", ["trained", "untrained"])
def test_shipped_configurations_without_modules_score_on_all_corpora(config):
    cfg = parse(["--config", config])
    assert cfg.method == "base"
    assert cfg.base_corpora == list(cfg.corpora.shares)
    assert len(cfg.base_corpora) == 5
    assert cfg.roles["learn"] == []


def test_a_run_without_modules_keeps_the_units_with_the_highest_scores_of_all_corpora(world, tmp_path):
    flags = ["--gprune=false", f"--corpora.score={world.names('alpha', 'beta')}", "--sparsity.scope=attention+ffn"]
    result = world.run(tmp_path, *flags)
    assert result.modules is None is result.thresholds
    model = AutoModelForCausalLM.from_pretrained(world.model)
    alpha, beta = (result.statistics[str(world.corpora[name])] for name in ("alpha", "beta"))
    highest_kept = []  # of both statistics
    for statistics in (pool_statistics([alpha, beta]), alpha):
        scope, kept = ("neurons", "kv_groups"), []
        for key, scores in score_units(result.config.importance, model, statistics, scope=scope).items():
            keep = result.masks[key]
            kept.append(bool(keep.all() or scores[keep].min() >= scores[~keep].max()))
        highest_kept.append(all(kept))
    assert highest_kept == [True, False]


def test_thresholds_of_modules_that_rank_by_all_corpora_are_those_of_modules_that_switch(world, tmp_path):
    corpora = world.names("alpha", "beta", "gamma")
    shared = ["--partition.method=initial", "--sparsity.learn=both", f"--corpora.drift={corpora}"]
    new = world.run(tmp_path, *shared, f"--corpora.score={corpora}", "--reliability.switch=false", name="new")
    switch = ["--reliability.everywhere=true", "--reliability.metric=averaged"]
    old = world.run(tmp_path, *shared, *switch, name="old")
    assert new.masks == old.masks
    assert set(new.modules.ranks.modules.values()) != {1}  # so that the start of learning matters
    assert all(torch.equal(of_new, old.thresholds[key]) for key, of_new in new.thresholds.items())
