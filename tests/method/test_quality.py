"""Quality targets: the largest cut within a rise of development perplexity, on a tiny trained model."""

from __future__ import annotations

import json
import math
import random
import re
from pathlib import Path

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from gprune import report
from gprune.calibration.statistics import pool_statistics
from gprune.config.parse import parse
from gprune.corpora.load import load_corpus
from gprune.corpora.windows import Sample, make_windows
from gprune.importance.scores import score_units
from gprune.method import quality
from gprune.method.plan import make_plan
from gprune.models.families import decoder_layers
from gprune.models.masks import masked
from gprune.models.units import units_of
from gprune.runs.results import load_run
from gprune.sparsity.allocation import allocate
from gprune.sparsity.budget import budget_of
from tests import tiny_run
from tests.tiny_run import WORDS, World

DEVELOPMENT = 4  # windows of each corpus


def write_chain(path, successors, *, seed, documents=36, words=560):
    """Write text in which a word is followed by its successor with probability 0.8, and else by a random word.

    An FFN can learn this, and loses it by pruning.
    """
    generator = random.Random(seed)
    texts = []
    for _ in range(documents):
        text = [generator.choice(WORDS)]
        for _ in range(words):
            text.append(successors[text[-1]] if generator.random() < 0.8 else generator.choice(WORDS))
        texts.append("\n".join(" ".join(text[i : i + 12]) for i in range(0, words, 12)))
    path.write_text("\n\n".join(texts), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> World:
    """Return a tiny model that was trained for some seconds on text like that of its corpora."""
    folder, generator = tmp_path_factory.mktemp("trained"), random.Random(0)
    successors = dict(zip(WORDS, generator.sample(WORDS, len(WORDS)), strict=True))
    names = [*tiny_run.SEEN, *tiny_run.UNSEEN]
    corpora = {name: write_chain(folder / f"{name}.txt", successors, seed=i) for i, name in enumerate(names)}
    text = write_chain(folder / "training.txt", successors, seed=99, documents=60).read_text()
    model_folder = tiny_run.save_tiny_model(folder / "model", initializer_range=0.05, tie_word_embeddings=False)
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    ids = torch.tensor(tiny_run.tiny_tokenizer()(text)["input_ids"])
    windows = ids[: len(ids) // 32 * 32].view(-1, 32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    torch.manual_seed(0)
    for _ in range(250):
        batch = windows[torch.randint(len(windows), (32,))]
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(model_folder)
    return World(model_folder, corpora)


pytestmark = pytest.mark.usefixtures("shared_cache")


def with_target(target, *more):
    """Return flags with a quality target, such as `+5%`."""
    return [f"--sparsity.target={target}", f"--evaluation.development_samples={DEVELOPMENT}", *more]


@pytest.fixture(scope="module")
def rise(trained):
    """Return a function: the rise of perplexity on development text above dense, of a model or of masks, by corpus.

    It is computed in float64 from the logits.
    """
    dense, sample = (
        AutoModelForCausalLM.from_pretrained(trained.model).double().eval(),
        Sample(DEVELOPMENT, 32, bos=None),
    )
    windows = {}
    for corpus in tiny_run.SEEN:
        documents = load_corpus(str(trained.corpora[corpus]), "development")
        made = make_windows(documents, tiny_run.tiny_tokenizer(), sample, corpus=corpus, split="development")
        windows[corpus] = made.tokens

    @torch.no_grad()
    def nll(model, corpus):
        logits = model(input_ids=windows[corpus], use_cache=False).logits[:, :-1].double()
        return float(F.cross_entropy(logits.flatten(0, 1), windows[corpus][:, 1:].flatten()))

    nll_of_dense = {corpus: nll(dense, corpus) for corpus in windows}

    def above_dense(pruned):
        if isinstance(pruned, torch.nn.Module):
            return {corpus: nll(pruned, corpus) - nll_of_dense[corpus] for corpus in windows}
        with masked(dense, pruned):
            return above_dense(dense)

    return above_dense


def mean(rises) -> float:
    """Return the rise of the geometric mean over corpora, from the rises of log perplexity."""
    return math.expm1(sum(rises.values()) / len(rises))


def worst(rises) -> float:
    return math.expm1(max(rises.values()))


LIMITS = {"mean": mean, "worst": worst}  # --sparsity.limit -> what it limits


def numbers_of(result) -> dict[str, float | list[float]]:
    return result.summary["quality"]["numbers"]


def test_the_removed_share_is_the_largest_within_the_limit(trained, rise, tmp_path, capsys):
    """The model has 480 neurons, so the resolution of a thousandth is one neuron."""
    flags = with_target("+20%", "--gprune=false", f"--corpora.score={trained.names(*tiny_run.SEEN)}")
    results = {limit: trained.run(tmp_path, *flags, f"--sparsity.limit={limit}", name=limit) for limit in LIMITS}
    model = AutoModelForCausalLM.from_pretrained(trained.model)
    statistics = pool_statistics(results["mean"].statistics.values())
    scores = score_units("wanda_sp", model, statistics, seed=0)
    budget = budget_of(units_of(model), "+20%", scope="ffn")
    neuron_cost = budget.price["neurons.0"][1]
    rises = {}  # by the number of removed neurons
    found = {limit: sum(int((~keep).sum()) for keep in result.masks.ffn) for limit, result in results.items()}
    for cut in {*range(1, 3 * tiny_run.NEURONS - 2, 16), *found.values(), *(removed + 1 for removed in found.values())}:
        rises[cut] = rise(
            allocate("uniform", scores, statistics, decoder_layers(model), budget.removing(cut * neuron_cost))
        )
    for limit, result in results.items():
        removed = found[limit]
        limited = {cut: LIMITS[limit](of_cut) for cut, of_cut in rises.items()}
        assert limited[removed] <= 0.2 < limited[removed + 1]
        # The mean is monotonic here, so the last cut within the target is the largest one.
        assert limit == "worst" or removed == max(cut for cut, of_cut in limited.items() if of_cut <= 0.2)
        numbers, rises_found = result.summary["quality"]["numbers"], rises[removed]
        assert numbers["share"] == result.summary["sparsity_of_scope"] == removed / (3 * tiny_run.NEURONS)
        assert numbers["development"][0] == pytest.approx(mean(rises_found), rel=1e-4)
        assert numbers["development_worst"][0] == pytest.approx(worst(rises_found), rel=1e-4)
        assert f"on {max(rises_found, key=rises_found.get)}.txt, the worst corpus" in result.summary["quality"]["said"]
        models = json.loads((result.path / "quality.json").read_text())
        assert len(models) <= 10, "at most 9, as 477 neurons can be removed, and the dense model"
    printed = capsys.readouterr().out
    assert all(result.summary["quality"]["said"] in printed for result in results.values())
    lines = result.to_frame().query("number.str.startswith('quality/')").set_index("number")
    assert lines.loc["quality/asked", "value"] == 0.2
    assert lines.loc["quality/development", ["value", "low", "high"]].tolist() == numbers["development"]
    (table,) = (table for table in report.make([result.path]).tables if table.name == "quality")
    cells = dict(zip(table.columns, table.rows[0], strict=True))
    assert cells["parameters kept"] == result.summary["parameters_after"]
    assert cells["worst, %"].value == pytest.approx(100 * worst(rises_found), rel=1e-4)


@pytest.mark.parametrize("limit", LIMITS)
def test_a_target_that_the_smallest_cut_misses_is_refused(limit, trained, tmp_path, capsys):
    """Widths are 160 or 128, so the smallest cut removes 32 neurons of 96 parameters from each of three blocks."""
    flags = ["--gprune=false", "--sparsity.width_multiple=128", "--sparsity.uniform_width=true"]
    flags += [f"--sparsity.limit={limit}", f"--corpora.score={trained.names(*tiny_run.SEEN)}"]
    args = trained.args(tmp_path, *with_target("+0.0000001%", *flags))
    capsys.readouterr()
    assert tiny_run.main(args) == 2
    (error,) = capsys.readouterr().err.splitlines()
    of_corpus = " of '(.*)'" if limit == "worst" else ""
    found = re.search(rf"above \+([0-9.]+)%, the change of development perplexity{of_corpus} by the smallest", error)
    assert "smallest cut (9,216 parameters)" in error
    models, predicted = json.loads((tmp_path / "run/quality.json").read_text()), DEVELOPMENT * 31
    dense, pruned = models["dense"], models["without 9,216 parameters"]
    rises = {corpus: (sum(nll) - sum(dense[corpus])) / predicted for corpus, nll in pruned.items()}
    assert float(found[1]) == pytest.approx(100 * LIMITS[limit](rises), abs=0.01)
    assert limit == "mean" or found[2] == max(rises, key=rises.get)
    assert not (tmp_path / "run/masks.safetensors").exists()


def test_a_very_loose_target_gives_the_largest_possible_cut(trained, tmp_path, capsys):
    """Every block keeps at least one neuron."""
    result = trained.run(tmp_path, *with_target("+1000%", "--gprune=false"))
    assert "Even the largest possible cut keeps the target +1000%" in "".join(capsys.readouterr())
    assert [int(keep.sum()) for keep in result.masks.ffn] == [1, 1, 1]


@pytest.mark.parametrize(
    "flags",
    [
        ["--sparsity.width_multiple=16", "--recovery=bias"],
        ["--recovery=least_squares", "--sparsity.scope=attention+ffn", "--sparsity.learn=both"],
        ["--sparsity.scope=attention+ffn", "--sparsity.cost=kv_cache"],
        ["--sparsity.scope=ffn+blocks", "--gprune=false"],
    ],
    ids=lambda flags: flags[-1],
)
def test_the_saved_model_has_the_measured_quality_with_other_constraints_and_recoveries(flags, trained, rise, tmp_path):
    result = trained.run(tmp_path, *with_target("+15%", *flags))
    read = [Path(corpus).stem for corpus in result.config.development_corpora]
    rises = {corpus: of_corpus for corpus, of_corpus in rise(result.model).items() if corpus in read}
    assert mean(rises) == pytest.approx(numbers_of(result)["development"][0], abs=1e-4)
    assert numbers_of(result)["development"][0] <= 0.15


def test_thresholds_are_learned_where_the_base_masks_reach_the_target(trained, rise, tmp_path, monkeypatch):
    calls = []

    def recorded(run, statistics, masks_at):
        learning = quality.with_learning_budget(run, statistics, masks_at)
        calls.append((masks_at, learning.budget))
        return learning

    monkeypatch.setattr("gprune.method.prune.with_learning_budget", recorded)
    result = trained.run(tmp_path, *with_target("+15%"))
    assert result.thresholds is not None
    ((masks_at, budget),) = calls
    further = budget.removing(budget.target + 5 * budget.step)  # five of 480 neurons are 1.04 %
    assert mean(rise(masks_at(budget))) <= 0.15 < mean(rise(masks_at(further)))
    plan = make_plan(result.config)
    assert 0 < result.summary["forward_tokens"] <= plan.forward_tokens
    assert 0 < result.summary["forward_backward_tokens"] <= plan.forward_backward_tokens


def test_the_result_of_a_search_is_trained_once_and_measured_again(trained, rise, tmp_path, monkeypatch):
    stages, fit = [], L.Trainer.fit

    def fit_and_record(trainer, stage, *args, **kwargs):
        stages.append(type(stage).__name__)
        return fit(trainer, stage, *args, **kwargs)

    monkeypatch.setattr(L.Trainer, "fit", fit_and_record)
    result = trained.run(tmp_path, *with_target("+10%", "--recovery=[least_squares,distill]", "--distill.tokens=1536"))
    assert stages.count("DistillationStage") == 1
    numbers = numbers_of(result)
    assert numbers["development"][0] <= 0.1
    assert numbers["trained"][0] == pytest.approx(mean(rise(result.model)), abs=1e-4)
    manifest = json.loads((result.path / "manifest.json").read_text())
    assert manifest["learned_tokens"]["recovery/DistillationStage"] == 1536


def test_a_quality_target_uses_more_development_text_by_default_and_all_of_a_small_corpus(trained, tmp_path):
    """The small corpus has one development document, with text for four windows of 32 tokens."""
    alpha, small_corpus = trained.corpora["alpha"], tmp_path / "small.jsonl"
    words = alpha.read_text().split()
    documents = [" ".join(words[start : start + 140]) for start in range(0, 16 * 140, 140)]
    small_corpus.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
    flags = ["--sparsity.target=+20%", "--gprune=false", "--recovery=least_squares"]
    flags += [f"--corpora.recover=[{alpha},{small_corpus}]", f"--corpora.evaluate=[{alpha}]"]
    args = [f for f in trained.args(tmp_path, *flags) if not f.startswith("--evaluation.development_samples")]
    assert parse(args).settings()["evaluation"]["development_samples"] == 8
    args_of_a_share = [arg for arg in args if not arg.startswith("--sparsity.target")]
    assert parse(args_of_a_share).settings()["evaluation"]["development_samples"] == 2
    assert tiny_run.main(args) == 0
    dense = json.loads((tmp_path / "run/quality.json").read_text())["dense"]
    assert [len(windows) for windows in dense.values()] == [8, 4]


def test_unseen_text_above_the_limit_is_warned_of_on_a_line_of_its_own(trained, tmp_path, capsys):
    """On random words the model predicts no better than chance, so that pruning does no harm there."""
    random_words = tiny_run.write_corpus(tmp_path / "random.txt", seed=7)
    result = trained.run(tmp_path, *with_target("+10%", "--gprune=false", f"--corpora.score={random_words}"))
    (warning,) = result.summary["quality"]["warnings"]
    assert numbers_of(result)["unseen"][0] > 0.1
    rise = f"{numbers_of(result)['unseen'][0]:+.2%}"
    assert warning.startswith(f"Perplexity on unseen text is above the limit +10%: {rise}")
    run_report, model_card = report.make([result.path]), (result.path / "model/README.md").read_text()
    markdown = run_report.to_markdown().replace("\\", "")
    assert all(warning in text for text in (capsys.readouterr().out, markdown, run_report.to_html(), model_card))


def test_a_corpus_without_development_text_is_refused_before_a_model_is_loaded(trained, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("gprune.method.run.load_dense", lambda *_: pytest.fail("a model was loaded"))
    short_corpus = tmp_path / "short.txt"
    short_corpus.write_text("\n\n".join(["bana bani bano banu " * 200] * 5))
    assert tiny_run.main(trained.args(tmp_path / "runs", *with_target("+5%", f"--corpora.score={short_corpus}"))) == 2
    assert "must have 15 or more documents" in capsys.readouterr().err


def test_a_dry_run_prints_the_cost_of_the_search(trained, tmp_path, capsys):
    flags = ["--sparsity.limit=worst", "--recovery=[least_squares,distill]", "--distill.tokens=1536", "--dry_run=true"]
    assert tiny_run.main(trained.args(tmp_path, *with_target("+5%", *flags))) == 0
    output = capsys.readouterr().out
    assert "the run finds the sparsity that keeps +5% on every development corpus" in output
    assert f"at most 17 models after least_squares, each on {3 * DEVELOPMENT * 32:,} tokens" in output


@pytest.mark.slow
def test_two_processes_find_the_same_share_as_one(trained, tmp_path):
    flags = with_target("+15%", "--gprune=false", "--recovery=[least_squares,distill]", "--distill.tokens=192")
    flags += ["--export=none", "--trainer.devices=2", "--trainer.strategy=ddp"]
    first, second = tiny_run.train(trained.args(tmp_path, *flags), tmp_path, processes=2)
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    alone = numbers_of(trained.run(tmp_path, *flags[:-2], name="alone"))
    assert numbers_of(load_run(tmp_path / "run"))["development"] == pytest.approx(alone["development"], rel=1e-4)
