"""Whole runs of the command line on a tiny model: options, text, and dry runs. What holds for every run is tested in
`test_configurations`.
"""

from __future__ import annotations

import csv
import functools
import hashlib
import json
import math
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from scipy.stats import rankdata
from transformers import AutoModelForCausalLM

import gprune.method.inputs
import gprune.storage.files
from gprune import report
from gprune.calibration.statistics import pool_statistics
from gprune.corpora.documents import CORPORA
from gprune.corpora.windows import Windows
from gprune.errors import UserError
from gprune.importance.scores import score_units
from gprune.method.evaluate import leaks
from gprune.method.plan import make_plan
from gprune.report import sentences
from gprune.report.sentences import first_look
from gprune.units.structure import of_kind
from tests import tiny_run

pytestmark = pytest.mark.usefixtures("shared_cache")


@pytest.fixture(scope="module")
def finished(world, tmp_path_factory, shared_cache):
    """Return the result of a run with the default method."""
    return world.run(tmp_path_factory.mktemp("runs"))


@pytest.fixture
def dense(world):
    return AutoModelForCausalLM.from_pretrained(world.model).eval()


def digests(folder, *patterns):
    """Return {relative path: SHA-256} of the files that match the patterns."""
    files = sorted(file for pattern in patterns for file in folder.glob(pattern))
    assert files
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


RESULTS = ("masks.safetensors", "thresholds.safetensors", "assignment.safetensors", "modules.safetensors")


def test_the_same_seed_gives_identical_results_and_another_seed_other_masks(finished, world, tmp_path, monkeypatch):
    monkeypatch.setenv("GPRUNE_CACHE", str(tmp_path / "cache"))
    same_seed = world.run(tmp_path, name="same-seed")
    assert digests(same_seed.path, *RESULTS) == digests(finished.path, *RESULTS)
    assert [r["nll"] for r in same_seed.records] == [r["nll"] for r in finished.records]
    other_seed = world.run(tmp_path, "--run.seed=1", name="other-seed")
    assert other_seed.masks != finished.masks
    # The evaluation text does not depend on the seed.
    assert [r["content_hash"] for r in other_seed.records] == [r["content_hash"] for r in finished.records]


OPTIONS = {
    "random": "--partition.method=random",
    "drift_only": "--partition.method=drift_only",
    "no_switch": "--reliability.switch=false",
    "equal": "--sparsity.allocation=equal",
    "uniform": "--sparsity.allocation=uniform",
    "global": "--sparsity.allocation=global",
    "bias": "--recovery=bias",
    "least_squares": "--recovery=least_squares",
    "development": "--evaluation.split=development",
}


@pytest.fixture(scope="module")
def run_with_option(world, tmp_path_factory, shared_cache):
    """Return a function from a name in `OPTIONS` to the result of the run with this option, which is run once."""
    runs = tmp_path_factory.mktemp("switched")
    return functools.cache(lambda name: world.run(runs, *OPTIONS[name].split(), name=name))


def test_control_partitions_have_the_module_sizes_of_the_refined_partition(run_with_option, finished):
    for name in ("random", "drift_only"):
        for control, refined in zip(run_with_option(name).modules.labels, finished.modules.labels, strict=True):
            assert torch.equal(control.bincount(), refined.bincount())
            assert not torch.equal(control, refined)


def test_without_the_reliability_switch_no_module_is_switched(run_with_option, finished):
    assert not any(row["switched"] for row in run_with_option("no_switch").modules.rows())
    assert any(row["switched"] for row in finished.modules.rows())


def test_equal_allocation_removes_the_same_share_of_every_module(run_with_option):
    result = run_with_option("equal")
    for labels, mask in zip(result.modules.labels, result.masks.ffn, strict=True):
        for k in range(int(labels.max()) + 1):
            assert (~mask[labels == k]).float().mean() == pytest.approx(0.5, abs=1 / int((labels == k).sum()))


@pytest.mark.parametrize("name", ["uniform", "global"])
def test_with_a_fixed_allocation_modules_keep_as_many_neurons_as_in_the_base_masks(
    name, run_with_option, world, tmp_path
):
    result = run_with_option(name)
    base = world.run(tmp_path, "--gprune=false", f"--sparsity.allocation={name}", "--export=none")
    for labels, mask, base_mask in zip(result.modules.labels, result.masks.ffn, base.masks.ffn, strict=True):
        assert torch.equal(labels[mask].bincount(), labels[base_mask].bincount())
    assert {r["allocation"] for r in result.records} == {None, name}


def test_learning_starts_from_the_base_masks_that_are_allocated_by_sparsity_start(run_with_option, world, tmp_path):
    """Without a step, the learned masks of one module per block are the base masks."""
    flags = ["--partition.num_modules=1", "--reliability.switch=false", "--export=none"]
    flags.append("--sparsity.learning_rate=1e-9")
    for start in ("uniform", "global"):
        learned = world.run(tmp_path, f"--sparsity.start={start}", *flags, name=f"learned-{start}")
        base = world.run(tmp_path, "--gprune=false", f"--sparsity.start={start}", "--export=none", name=start)
        assert learned.masks == base.masks
        assert {r["allocation"] for r in base.records} == {None, start}
        assert {r["allocation"] for r in learned.records} == {None, "learned"}


def test_the_pruned_model_is_not_measured_without_the_flag_and_in_its_place_if_it_is_asked_for_later(
    world, tmp_path, run_with_option
):
    """The flag does not identify a run, so the same folder gets the missing stage. Numbers do not depend on it."""
    flags, full = ["--recovery=bias", "--export=none"], run_with_option("bias").records
    without = world.run(tmp_path, *flags, "--evaluation.before_recovery=false")
    assert without.records == [r for r in full if r["stage"] != "pruned"]
    assert make_plan(without.config).forward_tokens < make_plan(run_with_option("bias").config).forward_tokens
    assert world.run(tmp_path, *flags).records == full


def test_the_last_lines_say_what_was_removed_what_it_cost_and_what_recovery_gave_back(run_with_option, world, capsys):
    result = run_with_option("least_squares")
    capsys.readouterr()
    world.run(result.path.parent, *OPTIONS["least_squares"].split(), name="least_squares")  # only prints
    out = capsys.readouterr().out
    before, after = (result.summary[f"parameters_{when}"] for when in ("before", "after"))
    megabytes = f"{4e-6 * before:,.1f} -> {4e-6 * after:,.1f} MB in float32"
    of_model = f"{result.summary['sparsity_of_model']:.2%} of the model"
    assert f"\nRemoved 50.00% of ffn, {of_model}: {before:,} -> {after:,} parameters, {megabytes}.\n" in out
    nll = {stage: {} for stage in ("dense", "pruned", "recovered")}
    for r in result.records:
        nll[r["stage"]].setdefault(r["seen"], []).append(r["nll"])
    ratios = {}
    for stage, start in (("pruned", "After pruning"), ("recovered", "After recovery (least_squares)")):
        (line,) = (line for line in out.splitlines() if line.startswith(f"{start}, perplexity is "))
        for seen, text in ((True, "seen"), (False, "unseen")):
            means = [sum(nll[name][seen]) / len(nll[name][seen]) for name in (stage, "dense")]
            ratios[stage, seen] = means[0] - means[1]
            shown = rf"{math.exp(means[0] - means[1]):.3f} \[\d+\.\d{{3}}, \d+\.\d{{3}}\] times dense on {text} text"
            assert re.search(shown, line), line
    given_back = 1 - ratios["recovered", False] / ratios["pruned", False]
    assert ("recovery gave back" in line) == (given_back > 0 and ratios["pruned", False] > 0)
    if "recovery gave back" in line:
        assert f"recovery gave back {given_back:.0%} of the loss" in line


def test_ones_own_text_prunes_trains_and_is_reported_beside_text_that_the_run_did_not_use(world, tmp_path, capsys):
    own = world.corpora["gamma"]
    flags = [f"--corpora.text={own}", "--recovery=distill", "--distill.tokens=100000", "--distill.batch_size=64"]
    result = world.run(tmp_path / "runs", *flags)
    seen = {Path(r["corpus"]).stem: r["seen"] for r in result.records}
    assert seen == {"gamma": True, "alpha": False, "delta": False, "epsilon": False}
    out = capsys.readouterr().out
    assert f"pruning ffn, target 0.5, by text of {own}" in out
    has, trained = re.search(r"has ([\d,]+) tokens to train on, .* used 4 times, ([\d,]+) in all", out).groups()
    assert int(trained.replace(",", "")) == 4 * int(has.replace(",", "")) < 100_000
    trained_in_all = re.search(r"([\d,]+) forward and backward", out)[1]
    assert int(trained_in_all.replace(",", "")) == int(trained.replace(",", "")) + 4 * 32  # of learning thresholds


def test_a_mixture_has_its_shares_in_every_step_and_all_its_parts_count_as_seen(world, tmp_path):
    alpha, gamma = (str(world.corpora[name]) for name in ("alpha", "gamma"))
    flags = [
        f"--corpora.text={{{alpha}: 0.75, {gamma}: 0.25}}", "--gprune=false", "--recovery=least_squares+distill",
        "--sparsity.allocation=reconstruction", "--distill.tokens=256", "--corpora.num_samples=8",
    ]  # fmt: skip
    result = world.run(tmp_path / "runs", *flags)
    assert {Path(r["corpus"]).stem for r in result.records if r["seen"]} == {"alpha", "gamma"}
    tokens = {name: of_corpus.channels["neurons.0"].total.count for name, of_corpus in result.statistics.items()}
    assert tokens[alpha] == 3 * tokens[gamma] > 0
    cfg, text, _ = text_of(world, *flags)
    assert [len(windows.tokens) for windows in text.fresh] == [6, 2]
    plan = gprune.method.plan.make_plan(cfg)
    assert result.summary["forward_tokens"] <= plan.forward_tokens
    assert result.summary["forward_backward_tokens"] == plan.forward_backward_tokens


def test_on_the_default_text_a_run_names_a_command_that_compares_methods(tmp_path, monkeypatch):
    default, other_text = gprune.RunConfig(), gprune.RunConfig(corpora={"evaluate": ["wiki"]})
    monkeypatch.chdir(tmp_path)
    assert first_look(default) == f"Compare with other methods: gprune study {sentences.CLONE / sentences.FIRST_LOOK}"
    assert first_look(other_text) == ""
    monkeypatch.chdir(sentences.CLONE)
    assert first_look(default) == "Compare with other methods: gprune study experiments/first_look.yaml"
    for module in (sentences, report):  # an installed wheel has no list
        monkeypatch.setattr(module, "CLONE", tmp_path)
    assert first_look(default).startswith("Compare with the base metric: gprune prune --gprune false; gprune report ")


# --- one calibration pass for many runs -------------------------------------------------------------------------


def test_drift_and_leaks_are_measured_and_logged_once_by_a_run_that_is_resumed(world, tmp_path, monkeypatch, capsys):
    calls = []
    monkeypatch.setattr(
        "gprune.method.evaluate.leaked_share_of_windows", lambda evaluated, *_: calls.append(evaluated) or 0.5
    )
    flags = ["--recovery=bias", "--export=none"]
    with monkeypatch.context() as patch:
        patch.setattr("gprune.method.prune.prune_and_recover", interrupt)
        assert tiny_run.main(world.args(tmp_path, *flags)) == 130
    result = world.run(tmp_path, *flags)
    assert len(calls) == len(tiny_run.UNSEEN) + 1  # the evaluated corpora
    log = capsys.readouterr().out
    assert log.count("so it counts as seen") == len(tiny_run.UNSEEN)
    assert log.count("Mean rank drift") == 1
    rows = [row for file in tmp_path.rglob("metrics.csv") for row in csv.DictReader(file.open())]
    for name, times in (("modules/sensitivity", len(result.modules.rows())), ("partition/switched_share", 1)):
        assert sum(bool(row.get(name)) for row in rows) == times


def interrupt(*args, **kwargs):
    raise KeyboardInterrupt


def test_records_of_reconstruction_have_the_ridge_of_its_errors_without_least_squares_too(world, tmp_path):
    """The penalty changes the masks."""
    flags = ["--gprune=false", "--sparsity.allocation=reconstruction", "--export=none"]
    by_ridge = {ridge: world.run(tmp_path, *flags, f"--ridge={ridge}", name=f"ridge-{ridge}") for ridge in (0.01, 100)}
    for ridge, result in by_ridge.items():
        assert {r["stage"]: r["ridge"] for r in result.records} == {"dense": None, "pruned": ridge}
    assert by_ridge[0.01].masks != by_ridge[100].masks


@pytest.mark.slow
def test_kl_is_the_same_with_kept_cached_and_recomputed_dense_predictions(world, tmp_path, monkeypatch):
    """The tokens of the dense model are counted in each case."""
    monkeypatch.setenv("GPRUNE_CACHE", str(tmp_path / "cache"))
    flags, runs = ("--gprune=false", "--export=hf"), []
    tokens = 2 * 3 * 2 * 32  # of the dense and the pruned model: corpora, windows, tokens
    # The first run keeps the dense predictions in its memory, the second reads them from its cache.
    for name, max_bytes in (("kept", 2**32), ("cached", 2**32), ("recomputed", 0)):
        monkeypatch.setattr("gprune.method.plan.MAX_FORECAST_BYTES", max_bytes)
        runs.append(world.run(tmp_path, *flags, name=name))
        manifest = json.loads((runs[-1].path / "manifest.json").read_text())
        assert manifest["steps"]["evaluate"]["forward_tokens"] == tokens
        assert runs[-1].summary["forward_tokens"] <= make_plan(runs[-1].config).forward_tokens
        assert runs[-1].records == runs[0].records


def test_prune_refuses_a_dry_run_configuration(tmp_path):
    cfg = gprune.RunConfig(dry_run=True)
    cfg.run.dir = str(tmp_path)
    with pytest.raises(UserError, match=r"--dry_run must be false for gprune\.prune"):
        gprune.prune(cfg)
    assert not [*tmp_path.iterdir()]


def test_dry_run_loads_no_weights_and_writes_nothing(world, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("gprune.method.inputs.load_without_tokenizer", lambda *_, **__: pytest.fail("loaded"))
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    assert tiny_run.main(world.args(tmp_path / "runs", "--dry_run=true")) == 0
    output = capsys.readouterr().out
    lines = {line[:16].strip(): line[17:] for line in output.splitlines() if line.strip()}
    assert not (tmp_path / "runs").exists()
    assert {"model", "scope", "removes", "forward", "results"} <= lines.keys()
    assert lines["and backward"] == f"{2 * 4 * 32} tokens"  # corpora, windows, tokens
    assert lines["widths"].startswith("80 to 80 of 160 neurons and 2 to 2 of 2 KV groups per block")
    assert lines["evaluates"] == "the model on 3 corpora: dense, pruned"
    assert re.fullmatch(r"about [\d.]+ GiB in the step \w+; this machine has [\d.]+ GiB", lines["memory"])
    terms = ("weights", "gradients and optimizer", "gram matrices", "activations")
    assert re.fullmatch("GiB: " + ", ".join(rf"\d+\.\d\d {term}" for term in terms), lines["of which"])
    assert lines["text"] == "alpha.txt (train): 14,560 tokens, 128 needed"  # 26 of 36 documents of 560 words
    assert "\n                 delta.txt (test): 3,920 tokens, 64 needed\n" in output


def test_a_dry_run_names_the_corpora_whose_windows_are_not_counted(world, tmp_path, capsys):
    assert tiny_run.main(world.args(tmp_path / "runs", "--corpora.evaluate=[c4,stories]", "--dry_run=true")) == 0
    assert "not counted, because they are not on this machine: c4, stories\n" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_dry_run_accepts_gpus_that_this_machine_lacks_and_no_invalid_accelerator(world, tmp_path, capsys):
    gpus = ("--dry_run=true", "--trainer.accelerator=gpu", "--trainer.devices=8", "--trainer.num_nodes=2")
    assert tiny_run.main(world.args(tmp_path / "runs", *gpus)) == 0
    assert re.search(r"GiB of each GPU in the step \w+\n", capsys.readouterr().out)
    assert tiny_run.main(world.args(tmp_path / "runs", *gpus, "--trainer.accelerator=abacus")) == 2


@pytest.mark.parametrize("importance", ["wanda_sp", "magnitude"])
def test_switched_modules_with_metric_consensus_rank_by_the_mean_rank_over_drift_corpora(
    importance, world, tmp_path, dense
):
    """All modules keep the same fraction of neurons, and switched modules keep those with the highest mean rank.

    The ranks are those of the metric itself. `magnitude` needs no activations, so its drift is measured with another
    metric, and the ranks in the record of drift are different ones.
    """
    everywhere = ["--reliability.sensitivity_quantile=0", "--reliability.score_quantile=1"]
    flags = [f"--importance={importance}", "--reliability.metric=consensus", "--sparsity.allocation=equal"]
    result = world.run(tmp_path, *flags, *everywhere)
    assert result.modules.reliability[0].switched.any()
    scores_by_corpus = [
        of_kind(score_units(importance, dense, result.statistics[corpus], seed=0), "neurons")
        for corpus in result.config.corpora.drift
    ]
    mean_ranks = [  # by block
        torch.from_numpy((rankdata(torch.stack(scores).numpy(), axis=-1) - 0.5) / tiny_run.NEURONS).mean(0)
        for scores in zip(*scores_by_corpus, strict=True)
    ]
    pairs = zip(mean_ranks, result.modules.drift, strict=True)
    assert all(torch.allclose(rank, drift.ranks.mean(0)) for rank, drift in pairs) == (importance == "wanda_sp")
    for consensus, labels, reliability, mask in zip(
        mean_ranks, result.modules.labels, result.modules.reliability, result.masks.ffn, strict=True
    ):
        for k in reliability.switched.nonzero()[:, 0].tolist():
            kept, removed = consensus[mask & (labels == k)], consensus[~mask & (labels == k)]
            assert len(kept) == 0 or len(removed) == 0 or kept.min() >= removed.max()


def test_switched_modules_with_metric_averaged_rank_by_scores_of_the_pooled_corpora(world, tmp_path, dense):
    """All modules keep the same fraction of neurons: those with the highest scores on pooled text."""
    flags = ("--reliability.metric=averaged", "--reliability.everywhere=true", "--sparsity.allocation=equal")
    result = world.run(tmp_path, *flags)
    pool = pool_statistics(result.statistics[corpus] for corpus in result.config.corpora.drift)
    scores = of_kind(score_units(result.config.importance, dense, pool, seed=0), "neurons")
    of_scoring_corpus = result.statistics[result.config.corpora.scored[0]]
    base_scores = of_kind(score_units(result.config.importance, dense, of_scoring_corpus, seed=0), "neurons")
    in_order_of_base_scores = []
    for b, (labels, mask) in enumerate(zip(result.modules.labels, result.masks.ffn, strict=True)):
        assert bool(result.modules.reliability[b].switched.all())
        for k in range(int(labels.max()) + 1):
            kept, removed = mask & (labels == k), ~mask & (labels == k)
            assert scores[b][kept].min() >= scores[b][removed].max()
            in_order_of_base_scores.append(bool(base_scores[b][kept].min() >= base_scores[b][removed].max()))
    assert not all(in_order_of_base_scores)  # so the test can fail


# --- text of each role ------------------------------------------------------------------------------------------


def text_of(world, *flags):
    """Return the configuration of a tiny run, its text, and the tokenizer."""
    cfg = gprune.config.parse([*world.args(world.model.parent), *flags])
    tokenizer = tiny_run.tiny_tokenizer()
    return cfg, gprune.method.inputs.prepare_text(cfg, tokenizer, 128), tokenizer


def test_training_windows_are_the_calibration_windows_followed_by_new_ones(world):
    """By default training uses the four calibration windows of a corpus. Only the hash of training text changes."""
    _, eleven, _ = text_of(world, "--corpora.learn_samples=11")
    _, four, _ = text_of(world)
    _, three, _ = text_of(world, "--corpora.learn_samples=3")
    assert [w.corpus for w in eleven.learn] == [str(world.corpora[c]) for c in ("alpha", "beta")]
    for of_eleven, of_four, of_three in zip(eleven.learn, four.learn, three.learn, strict=True):
        calibration = four.train[of_eleven.corpus]
        assert eleven.train[of_eleven.corpus].content_hash == calibration.content_hash == of_four.content_hash
        assert of_eleven.tokens.shape == (11, 32)
        assert torch.equal(of_eleven.tokens[:4], calibration.tokens)
        assert torch.equal(of_three.tokens, calibration.tokens[:3])
        assert len({tuple(window.tolist()) for window in of_eleven.tokens}) == 11
    hashes, default_hashes = eleven.hashes(), four.hashes()
    assert hashes.keys() == default_hashes.keys()
    changed = {name for name in hashes if hashes[name] != default_hashes[name]}
    assert changed == {f"{w.corpus} train learned" for w in eleven.learn}


def as_run(cfg, text, tokenizer):
    """Return the attributes of an open run that the leak check uses."""
    return SimpleNamespace(cfg=cfg, text=text, tokenizer=tokenizer)


def test_training_text_that_occurs_in_an_evaluation_corpus_marks_it_as_seen(world):
    """The leak check covers the new training windows, which are not calibration text."""
    cfg, text, tokenizer = text_of(world, "--corpora.learn_samples=11")
    copied = Windows(str(world.corpora["delta"]), "test", text.learn[1].tokens[6:8])
    for training_text, is_leaked in ((text, True), (text_of(world)[1], False)):
        run = as_run(cfg, replace(training_text, test=[copied]), tokenizer)
        ((seen, share_of_13grams),) = leaks(run).values()
        assert seen == is_leaked
        assert share_of_13grams > 0.9 if is_leaked else share_of_13grams < 0.1


def test_development_text_differs_from_test_text_and_is_recorded_as_development(run_with_option, finished, world):
    result = run_with_option("development")
    assert {r["split"] for r in result.records} == {"development"}
    assert {r["split"] for r in finished.records} == {"test"}
    assert result.masks == finished.masks  # evaluation text does not affect the masks
    test_hashes, development_hashes = (
        {r["corpus"]: r["content_hash"] for r in run.records} for run in (finished, result)
    )
    assert test_hashes.keys() == development_hashes.keys()
    assert not set(test_hashes.values()) & set(development_hashes.values())
    assert {r["corpus"] for r in result.records if r["seen"]} == {str(world.corpora["alpha"])}


@pytest.mark.parametrize("split", ["test", "development", "train"])
def test_evaluation_and_development_text_are_the_same_for_every_seed_and_training_text_is_not(split, world):
    first, second = (text_of(world, f"--evaluation.split={split}", f"--run.seed={seed}")[1] for seed in (0, 1))
    for role, is_equal in (("test", True), ("development", True), ("learn", False)):
        for a, b in zip(getattr(first, role), getattr(second, role), strict=True):
            assert (a.content_hash == b.content_hash) == is_equal
    assert {w.split for w in first.test} == {split}


@pytest.mark.parametrize("split", ["development", "test"])
def test_windows_of_curves_count_as_used_only_when_test_text_is_evaluated(split, world):
    """In an evaluation on development text they are evaluation windows, which would all be marked as leaked."""
    flags = (
        f"--evaluation.split={split}",
        "--evaluation.development_samples=2",
        "--corpora.score=" + world.names("beta")[1:-1],
    )
    cfg, text, tokenizer = text_of(world, *flags)
    used = {(w.split, w.content_hash) for w in text.used}
    assert {(w.split, w.content_hash) for w in (*text.learn, *text.train.values())} <= used
    curve = {(w.split, w.content_hash) for w in text.development}
    assert len(curve) == 2
    assert (curve <= used) == (split == "test")
    shares = {corpus: share for corpus, (_, share) in leaks(as_run(cfg, text, tokenizer)).items()}
    assert max(shares.values()) < 0.1
    if split == "development":  # the windows of a curve are the first evaluated windows
        alpha = next(w for w in text.test if w.corpus == str(world.corpora["alpha"]))
        assert torch.equal(text.development[0].tokens, alpha.tokens)


def test_float32_matmul_precision_is_applied_recorded_and_restored(world, tmp_path, capsys):
    """The log, the records and the settings have the value. After the run, the process has its old setting again."""
    flags = ("--gprune=false", "--trainer.float32_matmul_precision=high")
    result = world.run(tmp_path, *flags)
    assert "float32 matrix products in precision 'high'" in capsys.readouterr().out
    assert torch.get_float32_matmul_precision() == "highest"
    assert {r["float32_matmul_precision"] for r in result.records} == {"high"}
    settings = json.loads((result.path / "manifest.json").read_text())["settings"]["trainer"]
    assert settings["float32_matmul_precision"] == "high"
    # The default is omitted, so that older runs, which have no such setting, have the same settings.
    assert "float32_matmul_precision" not in gprune.RunConfig().settings()["trainer"]


def test_a_corpus_with_several_roles_is_loaded_once(world, monkeypatch):
    """Loading may be slow or random, so development text is cut from the train text that was already loaded."""
    splits = []

    def load_and_count(split):
        splits.append(split)
        return [f"{split} text number {i} " * 30 for i in range(40)]

    monkeypatch.setitem(CORPORA._entries, "counted", load_and_count)
    roles = [f"--corpora.{role}=[counted]" for role in ("drift", "learn", "recover", "evaluate")]
    text_of(world, "--corpora.score=counted", *roles, "--recovery=distill", "--distill.tokens=64")
    assert sorted(splits) == ["test", "train"]
