"""Quality targets: the largest cut within a rise of development perplexity, on a tiny trained model."""

from __future__ import annotations

import json
import math
import random
import re
from contextlib import contextmanager

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from gprune import report
from gprune.config.parse import parse
from gprune.corpora.load import load_corpus
from gprune.corpora.windows import Sample, make_windows
from gprune.importance.scores import score_units
from gprune.method import quality
from gprune.method.plan import make_plan
from gprune.models.blocks import blocks_of
from gprune.models.masks import masked
from gprune.report.figures import read_curves
from gprune.runs.results import load_run
from gprune.sparsity.allocation import allocate
from gprune.sparsity.budget import Budget, block_units
from tests import tiny_run
from tests.method.test_prune import counted_forwards
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


@pytest.fixture
def search_to_the_last_step(monkeypatch):
    """Make searches continue to the last grid point that meets the target."""
    monkeypatch.setattr(quality, "TOLERANCE", (0.0, 0.0))
    monkeypatch.setattr(quality, "TRIES", 100)


@contextmanager
def counted_stages():
    """Yield a list that receives the class name of each stage that is trained."""
    names, fit = [], L.Trainer.fit

    def fit_and_record(trainer, stage, *args, **kwargs):
        names.append(type(stage).__name__)
        return fit(trainer, stage, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(L.Trainer, "fit", fit_and_record)
        yield names


def with_target(target, *more):
    """Return flags with a quality target, such as `+5%`."""
    return [f"--sparsity.target={target}", f"--evaluation.development_samples={DEVELOPMENT}", *more]


@torch.no_grad()
def log_perplexity(world, corpora, model) -> float:
    """Return the mean over corpora of log perplexity on development text, in float64 from the logits."""
    tokenizer, losses = tiny_run.tiny_tokenizer(), []
    for corpus in corpora:
        sample = Sample(DEVELOPMENT, 32, bos=None, flags=("", ""))
        documents = load_corpus(str(world.corpora[corpus]), "development")
        ids = make_windows(documents, tokenizer, sample, corpus=corpus, split="development").tokens
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].double()
        losses.append(float(F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())))
    return sum(losses) / len(losses)


@pytest.fixture(scope="module")
def dense(trained):
    return AutoModelForCausalLM.from_pretrained(trained.model).double().eval()


def test_the_removed_share_equals_that_of_an_exhaustive_search(trained, dense, tmp_path, search_to_the_last_step):
    result = trained.run(tmp_path, *with_target("+20%", "--gprune=false"))
    statistics, blocks = result.statistics[result.config.corpora.scored[0]], blocks_of(dense)
    scores = score_units("wanda_sp", blocks_of(AutoModelForCausalLM.from_pretrained(trained.model)), statistics, seed=0)
    budget, neuron_cost = Budget.of(block_units(blocks, scope="ffn"), "+20%"), blocks[0].unit_cost("ffn")
    dense_log_perplexity = log_perplexity(trained, ["alpha"], dense)
    ratios = {}  # perplexity over that of the dense model, by the number of removed neurons
    for cut in range(1, 2 * tiny_run.NEURONS):
        with masked(dense, allocate("uniform", scores, statistics, blocks, budget.removing(cut * neuron_cost))):
            ratios[cut] = math.exp(log_perplexity(trained, ["alpha"], dense) - dense_log_perplexity)
    removed = sum(int((~keep).sum()) for keep in result.masks.ffn)
    assert ratios[removed] <= 1.2 < ratios[removed + 1]
    # The curve is monotonic here, so the last share within the target is the largest one.
    assert removed == max(cut for cut, ratio in ratios.items() if ratio <= 1.2)
    assert result.summary["quality"]["got"] == pytest.approx(ratios[removed], rel=1e-5)
    assert result.summary["sparsity_of_scope"] == result.summary["quality"]["share"] == removed / (3 * tiny_run.NEURONS)


def ratios_by_corpus(trained, dense, masks, corpora) -> dict[str, float]:
    """Return the perplexity of a masked model over that of the dense model for each corpus, in float64."""
    with masked(dense, masks):
        pruned = {corpus: log_perplexity(trained, [corpus], dense) for corpus in corpora}
    return {corpus: math.exp(pruned[corpus] - log_perplexity(trained, [corpus], dense)) for corpus in corpora}


def test_the_limit_worst_holds_for_every_corpus_and_not_a_step_further(
    trained, dense, tmp_path, search_to_the_last_step, monkeypatch, capsys
):
    """All output names the worst corpus. A limit of the mean allows at least as large a cut."""
    calls = []

    def recorded(run, statistics, masks_at):
        calls.append(masks_at)
        return quality.with_quality_budget(run, statistics, masks_at)

    monkeypatch.setattr("gprune.method.prune.with_quality_budget", recorded)
    scored = ",".join(str(trained.corpora[corpus]) for corpus in tiny_run.SEEN)
    flags = with_target("+20%", "--gprune=false", f"--corpora.score=[{scored}]")
    result = trained.run(tmp_path, *flags, "--sparsity.limit=worst", name="worst")
    texts = output_and_pages(result, capsys)
    (masks_at,) = calls
    blocks = blocks_of(dense)
    budget, neuron_cost = Budget.of(block_units(blocks, scope="ffn"), "+20%"), blocks[0].unit_cost("ffn")
    removed = sum(int((~keep).sum()) for keep in result.masks.ffn)
    here, further = (
        ratios_by_corpus(trained, dense, masks_at(budget.removing(cut * neuron_cost)), tiny_run.SEEN)
        for cut in (removed, removed + 1)
    )
    assert max(here.values()) <= 1.2 < max(further.values())
    reached = result.summary["quality"]
    worst = max(here, key=here.__getitem__)
    assert reached["got"] == pytest.approx(here[worst], rel=1e-5)
    assert reached["model"]["worst"]["corpus"] == str(trained.corpora[worst])
    points = 100 * (1.2 - reached["got"])
    named = f"on {worst}.txt, the worst corpus ({points:.2f} points below the limit)"
    assert named in reached["said"]
    assert "+20% of dense perplexity on every development corpus" in reached["said"]
    assert all(any(named in line for line in text) if isinstance(text, list) else named in text for text in texts)
    (table,) = (table for table in report.make([result.path]).tables if table.name == "quality")
    cells = dict(zip(table.columns, table.rows[0], strict=True))
    assert cells["worst corpus"] == f"{worst}.txt"
    assert cells["worst, %"].value == pytest.approx(100 * (here[worst] - 1), rel=1e-3)
    # The mean limit allows a larger cut, and names the corpus that is worse than the mean.
    mean = trained.run(tmp_path, *flags, name="mean").summary["quality"]
    assert mean["share"] >= reached["share"]
    assert mean["model"]["worst"]["ratio"][0] >= mean["got"]
    assert "the worst corpus (" in mean["said"]


def test_a_limit_that_no_mask_meets_on_one_corpus_names_it_with_its_value(trained, dense, tmp_path, capsys):
    """Widths are 160 or 128, so the smallest cut removes 32 neurons of 96 parameters from each of three blocks."""
    coarse_grid = ("--gprune=false", "--sparsity.width_multiple=128", "--sparsity.uniform_width=true")
    scored = ",".join(str(trained.corpora[corpus]) for corpus in tiny_run.SEEN)
    flags = with_target("+0.0000001%", *coarse_grid, f"--corpora.score=[{scored}]", "--sparsity.limit=worst")
    args = trained.args(tmp_path, *flags)
    capsys.readouterr()
    assert tiny_run.main(args) == 2
    (line,) = capsys.readouterr().err.splitlines()
    found = re.search(
        r"must be above \+([0-9.]+)%, the change of development perplexity of '(.*)' by the smallest", line
    )
    trials = json.loads((tmp_path / "run/quality.json").read_text())["measured"]
    (measured,) = trials.values()
    corpora = dict(zip(tiny_run.SEEN, measured, strict=True))
    rises = {}
    for corpus, of_corpus in corpora.items():
        rises[corpus] = of_corpus["nll"] - log_perplexity(trained, [corpus], dense)
    worst = max(rises, key=rises.__getitem__)
    assert found[2] == str(trained.corpora[worst])
    assert float(found[1]) == pytest.approx(100 * math.expm1(rises[worst]), abs=0.01)


def test_the_target_holds_after_training_and_no_model_is_trained_twice(trained, dense, tmp_path):
    flags = with_target("+10%", "--recovery=[least_squares,distill]", "--distill.tokens=1536", "--sparsity.epochs=2")
    with counted_stages() as trained_stages:
        result = trained.run(tmp_path, *flags)
    quality_summary = result.summary["quality"]
    model = quality_summary["model"]
    rise = log_perplexity(trained, tiny_run.SEEN, result.model) - log_perplexity(trained, tiny_run.SEEN, dense)
    assert 1 < quality_summary["got"] <= 1.1
    assert math.exp(rise) == pytest.approx(quality_summary["got"], rel=1e-4), "the saved model is the measured one"
    assert quality_summary["low"] < quality_summary["got"] < quality_summary["high"]
    # Each model of the search is trained once.
    assert trained_stages.count("DistillationStage") == model["models"]
    weights = list((result.path / "recovery").glob("*.safetensors"))
    assert len(weights) == 1, "only the weights of the model that was found are kept"
    # The record has the training tokens of this trial, without those of other trials.
    assert model["models"] > 1
    manifest = json.loads((result.path / "manifest.json").read_text())
    learned_at_first = manifest["learned_tokens"]["thresholds"]
    assert learned_at_first == manifest["steps"]["thresholds"]["forward_backward_tokens"]
    assert sum(manifest["learned_tokens"].values()) == learned_at_first + 1536
    # Figures have the curves of this trial, although it was not the first one.
    perplexities = read_curves(result.path)["development/perplexity"].dropna()
    assert perplexities.iloc[-1] == pytest.approx(
        math.exp(log_perplexity(trained, tiny_run.SEEN, result.model)), rel=1e-4
    )
    with counted_forwards() as tokens:
        restarted = trained.run(tmp_path, *flags)
    assert restarted.summary == result.summary
    assert sum(tokens) < 500, "a finished run is loaded"
    assert_tokens_are_planned(result)


def assert_tokens_are_planned(result) -> None:
    """A run processes at most the planned tokens."""
    plan = make_plan(result.config)
    assert 0 < result.summary["forward_tokens"] <= plan.forward_tokens
    assert result.summary["forward_backward_tokens"] <= plan.forward_backward_tokens


@pytest.mark.parametrize(
    "flags",
    [
        ["--sparsity.width_multiple=16", "--recovery=bias"],
        ["--recovery=least_squares", "--sparsity.scope=attention+ffn", "--sparsity.learn=both"],
        ["--sparsity.scope=attention+ffn", "--sparsity.cost=kv_cache"],
        ["--sparsity.scope=ffn+blocks"],
        ["--sparsity.uniform_width=true"],
        ["--sparsity.allocation=global", "--sparsity.protect=[0,-1]"],
    ],
    ids=lambda flags: flags[-1],
)
def test_a_quality_target_holds_together_with_other_constraints_and_recoveries(flags, trained, dense, tmp_path):
    result = trained.run(tmp_path, *with_target("+15%", *flags))
    quality_summary = result.summary["quality"]
    corpora = tiny_run.SEEN if result.config.gprune else ["alpha"]
    rise = log_perplexity(trained, corpora, result.model) - log_perplexity(trained, corpora, dense)
    assert math.exp(rise) == pytest.approx(quality_summary["got"], rel=1e-4)
    assert quality_summary["got"] <= 1.15
    if "bias" not in flags[-1]:  # the search does not count the biases that the recovery adds
        assert quality_summary["model"]["parameters"] == result.summary["parameters_after"]
    narrowed_widths = {int(keep.sum()) for keep in result.masks.ffn} - {tiny_run.NEURONS}
    if "width_multiple" in flags[0]:
        assert narrowed_widths
        assert not any(width % 16 for width in narrowed_widths)
    if "uniform" in flags[0]:
        assert len(narrowed_widths) == 1
    if "protect" in flags[-1]:
        assert narrowed_widths
        assert all(bool(result.masks.ffn[block].all()) for block in (0, -1))
    if "kv_cache" in flags[-1]:
        assert not narrowed_widths
        # Three blocks have two KV groups each.
        assert sum(int((~keep).sum()) for keep in result.masks.attention) == quality_summary["share"] * 6


def test_thresholds_are_learned_where_the_base_masks_reach_the_target(trained, dense, tmp_path, monkeypatch):
    calls = []

    def recorded(run, statistics, masks_at):
        learning = quality.with_learning_budget(run, statistics, masks_at)
        calls.append((masks_at, learning.budget))
        return learning

    monkeypatch.setattr("gprune.method.prune.with_learning_budget", recorded)
    result = trained.run(tmp_path, *with_target("+15%"))
    assert result.thresholds is not None
    ((masks_at, budget),) = calls

    def ratio(target):
        with masked(dense, masks_at(budget.removing(target))):
            pruned = log_perplexity(trained, tiny_run.SEEN, dense)
        return math.exp(pruned - log_perplexity(trained, tiny_run.SEEN, dense))

    percentage_point = budget.total // 100
    assert ratio(budget.target) <= 1.15 < ratio(budget.target + percentage_point)
    assert_tokens_are_planned(result)


class Killed(BaseException):
    """Simulates a killed process: no code catches it."""


KILLED = with_target("+10%", "--recovery=[least_squares,distill]", "--distill.tokens=1536")


@pytest.fixture(scope="module")
def uninterrupted(trained, shared_cache, tmp_path_factory):
    """Return the result of a run with a search, which finds the measurements of the dense model in the cache."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    trained.run(folder, *with_target("+50%", "--gprune=false", "--recovery=least_squares"), name="fills-the-cache")
    return trained.run(folder, *KILLED, name="uninterrupted")


def test_a_run_killed_during_the_search_resumes_to_identical_results(uninterrupted, trained, tmp_path, monkeypatch):
    """The run is killed before it recovers a model of the search, after it has recovered four models."""
    calls, original = [], quality.prune_and_recover

    def prune_and_kill(*args, **kwargs):
        calls.append(kwargs)
        if len(calls) > 4:
            raise Killed
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(quality, "prune_and_recover", prune_and_kill)
        with pytest.raises(Killed):
            trained.run(tmp_path, *KILLED)
    with counted_stages() as stages:
        resumed = trained.run(tmp_path, *KILLED)
    assert resumed.summary["quality"] == uninterrupted.summary["quality"]
    for name in ("masks.safetensors", "thresholds.safetensors", "recovery/*"):
        of_resumed, of_uninterrupted = (contents(result.path, name) for result in (resumed, uninterrupted))
        assert of_resumed == of_uninterrupted, name
    assert resumed.records == uninterrupted.records
    assert [resumed.summary[n] for n in TOKENS] == [uninterrupted.summary[n] for n in TOKENS]
    assert "CalibrationStage" not in stages


TOKENS = ("forward_tokens", "forward_backward_tokens")


def contents(folder, pattern):
    """Return the tensors of files by name, without the metadata."""
    return {file.name: {k: v.tolist() for k, v in load_file(file).items()} for file in sorted(folder.glob(pattern))}


def test_the_perplexity_of_the_dense_model_is_cached_for_later_runs(trained, tmp_path):
    trained.run(tmp_path, *with_target("+12%", "--gprune=false"), name="first")
    second = trained.run(tmp_path, *with_target("+13%", "--gprune=false"), name="second")
    steps = json.loads((second.path / "manifest.json").read_text())["steps"]
    assert steps["quality"]["forward_tokens"] == second.summary["quality"]["model"]["models"] * DEVELOPMENT * 32
    assert "calibrate" not in steps


def test_a_target_that_the_smallest_cut_misses_is_refused(trained, tmp_path, capsys):
    """Widths are 160 or 128, so the smallest cut removes 32 neurons of 96 parameters from each of three blocks."""
    coarse_grid = ("--gprune=false", "--sparsity.width_multiple=128", "--sparsity.uniform_width=true")
    args = trained.args(tmp_path, *with_target("+0.0000001%", *coarse_grid))
    capsys.readouterr()
    assert tiny_run.main(args) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "the change of development perplexity by the smallest cut (9,216 parameters)" in error
    assert not (tmp_path / "run/masks.safetensors").exists()


def test_a_very_loose_target_gives_the_largest_possible_cut(trained, tmp_path):
    """Every block keeps at least one neuron."""
    result = trained.run(tmp_path, *with_target("+1000%", "--gprune=false"))
    quality_summary = result.summary["quality"]
    assert quality_summary["largest"]
    assert "the largest possible cut" in quality_summary["said"]
    assert [int(keep.sum()) for keep in result.masks.ffn] == [1, 1, 1]


def args_by_default(world, tmp_path, *flags) -> list[str]:
    """Return the flags of a tiny run without `--evaluation.development_samples`."""
    return [flag for flag in world.args(tmp_path, *flags) if not flag.startswith("--evaluation.development_samples")]


def test_a_quality_target_uses_more_development_text_by_default_and_all_of_a_small_corpus(trained, tmp_path):
    """The small corpus has one development document, with text for four windows of 32 tokens."""
    alpha, small_corpus = trained.corpora["alpha"], tmp_path / "small.jsonl"
    words = alpha.read_text().split()
    documents = [" ".join(words[start : start + 140]) for start in range(0, 16 * 140, 140)]
    small_corpus.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
    flags = ["--sparsity.target=+20%", "--gprune=false", "--recovery=least_squares"]
    flags += [f"--corpora.recover=[{alpha},{small_corpus}]", f"--corpora.evaluate=[{alpha}]"]
    assert tiny_run.main(args_by_default(trained, tmp_path, *flags)) == 0
    trials = json.loads((tmp_path / "run/quality.json").read_text())["measured"].values()
    assert {tuple(len(of_corpus["window_nll"]) for of_corpus in trial) for trial in trials} == {(8, 4)}


def test_by_default_a_quality_target_uses_eight_development_windows_and_another_target_two(trained, tmp_path):
    cfg = parse(args_by_default(trained, tmp_path))
    assert cfg.settings()["evaluation"]["development_samples"] == 2
    cfg.sparsity.target = "+5%"
    assert cfg.settings()["evaluation"]["development_samples"] == 8


def output_and_pages(result, capsys) -> list[list[str] | str]:
    """Return the lines that a run printed, its report as Markdown, its page, and its model card."""
    run_report = report.make([result.path])
    markdown, model_card = run_report.to_markdown().replace("\\", ""), (result.path / "model/README.md").read_text()
    return [capsys.readouterr().out.splitlines(), markdown, run_report.to_html(), model_card]


def test_a_wide_interval_is_warned_of_on_a_line_of_its_own(trained, tmp_path, capsys):
    result = trained.run(tmp_path, *with_target("+10%", "--gprune=false", "--evaluation.development_samples=2"))
    reached = result.summary["quality"]
    assert reached["got"] <= 1.1
    assert reached["high"] > 1.15
    warning = reached["warnings"][0]
    assert warning.startswith(
        f"The interval on development text reaches {100 * (reached['high'] - 1):+.2f}%, far above"
    )
    assert all(warning in text for text in output_and_pages(result, capsys))


def test_unseen_text_above_the_limit_is_warned_of_on_a_line_of_its_own(trained, tmp_path, capsys):
    """On random words the model predicts no better than chance, so that pruning does no harm there."""
    random_words = tiny_run.write_corpus(tmp_path / "random.txt", seed=7)
    result = trained.run(tmp_path, *with_target("+10%", "--gprune=false", f"--corpora.score={random_words}"))
    reached = result.summary["quality"]
    assert reached["unseen"] > 1.1
    (warning,) = reached["warnings"]
    assert warning.startswith(f"Unseen text is above the limit +10%: {100 * (reached['unseen'] - 1):+.2f}%")
    assert all(warning in text for text in output_and_pages(result, capsys))


def test_a_corpus_without_development_text_is_refused_before_a_model_is_loaded(trained, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("gprune.method.run.load_dense", lambda *_: pytest.fail("a model was loaded"))
    short_corpus = tmp_path / "short.txt"
    short_corpus.write_text("\n\n".join(["bana bani bano banu " * 200] * 5))
    assert tiny_run.main(trained.args(tmp_path / "runs", *with_target("+5%", f"--corpora.score={short_corpus}"))) == 2
    assert "must have 15 or more documents" in capsys.readouterr().err


def test_a_dry_run_prints_the_cost_of_the_search(trained, tmp_path, capsys):
    flags = with_target("+5%", "--recovery=[least_squares,distill]", "--distill.tokens=1536", "--dry_run=true")
    assert tiny_run.main(trained.args(tmp_path, *flags)) == 0
    output = capsys.readouterr().out
    assert "the run finds the sparsity that keeps +5%" in output
    assert "at most 24 models after least_squares and 4 models after least_squares+distill" in output
    assert f"each on {3 * DEVELOPMENT * 32:,} tokens of development text" in output


def test_a_dry_run_says_that_every_corpus_is_limited(trained, tmp_path, capsys):
    flags = with_target("+5%", "--sparsity.limit=worst", "--dry_run=true")
    assert tiny_run.main(trained.args(tmp_path, *flags)) == 0
    assert "the run finds the sparsity that keeps +5% on every development corpus" in capsys.readouterr().out


def test_the_reached_quality_is_in_the_summary_frame_report_and_page(uninterrupted):
    result = uninterrupted
    quality_summary = result.summary["quality"]
    numbers = result.to_frame().query("number.str.startswith('quality/')").set_index("number")
    assert numbers.loc["quality/got", "value"] == pytest.approx(quality_summary["got"] - 1)
    assert numbers.loc["quality/asked", "value"] == 0.1
    assert set(numbers["stage"]) == {result.config.final_stage}
    assert load_run(result.path).summary == result.summary
    run_report = report.make([result.path])
    assert quality_summary["said"] in run_report.to_markdown().replace("\\", "")
    (table,) = (t for t in run_report.tables if t.name == "quality")
    (row,) = table.rows
    assert row[1] == result.summary["parameters_after"]
    page = run_report.to_html()
    assert quality_summary["said"] in page
    assert "Parameters at the same quality" in page


@pytest.mark.slow
def test_two_processes_meet_the_target_and_measure_the_first_models_like_one(trained, tmp_path):
    flags = with_target("+15%", "--gprune=false", "--recovery=[least_squares,distill]", "--distill.tokens=768")
    flags += ["--export=none", "--trainer.devices=2", "--trainer.strategy=ddp"]
    first, second = tiny_run.train(trained.args(tmp_path, *flags), tmp_path, processes=2)
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    assert load_run(tmp_path / "run").summary["quality"]["got"] <= 1.15
    trained.run(tmp_path, *flags[:-2], name="alone")
    of_two, of_one = (json.loads((tmp_path / name / "quality.json").read_text()) for name in ("run", "alone"))
    # The models of the first search have masks of `base`, which do not depend on training.
    first_models = [of["measured"].items() for of in (of_two, of_one)]
    for (masks, results), (expected_masks, expected) in list(zip(*first_models, strict=False))[:2]:
        assert masks == expected_masks
        for result, of_corpus in zip(results, expected, strict=True):  # sums over processes differ by rounding
            assert result["window_nll"] == pytest.approx(of_corpus["window_nll"], rel=1e-6)
