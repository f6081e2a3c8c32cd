"""A target in quality: the largest cut that keeps development perplexity near dense, on a tiny model that was trained."""

from __future__ import annotations

import json
import math
import random
from contextlib import contextmanager

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from gprune.corpora.load import load_corpus
from gprune.corpora.windows import Sample, make_windows
from gprune.importance.scores import score_units
from gprune.models.blocks import blocks_of
from gprune.pipeline import quality
from gprune.sparsity.allocation import allocate
from gprune.sparsity.budget import Budget, unit_costs
from gprune.sparsity.gates import masked
from tests import tiny_run
from tests.pipeline.test_prune import counted_forwards
from tests.tiny_run import WORDS, World

DEVELOPMENT = 4  # windows of each corpus


def write_chain(path, successors, *, seed, documents=36, words=560):
    """Text in which a word says which one is likely to be next: what an FFN can learn, and pruning takes away."""
    generator = random.Random(seed)
    texts = []
    for _ in range(documents):
        drawn = [generator.choice(WORDS)]
        for _ in range(words):
            drawn.append(successors[drawn[-1]] if generator.random() < 0.8 else generator.choice(WORDS))
        texts.append("\n".join(" ".join(drawn[i : i + 12]) for i in range(0, words, 12)))
    path.write_text("\n\n".join(texts), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> World:
    """A tiny model that was trained on text like that of its corpora, in some seconds."""
    folder, generator = tmp_path_factory.mktemp("trained"), random.Random(0)
    successors = dict(zip(WORDS, generator.sample(WORDS, len(WORDS)), strict=True))
    names = [*tiny_run.SEEN, *tiny_run.UNSEEN]
    corpora = {name: write_chain(folder / f"{name}.txt", successors, seed=i) for i, name in enumerate(names)}
    text = write_chain(folder / "training.txt", successors, seed=99, documents=60).read_text()
    place = tiny_run.save_tiny_model(folder / "model", initializer_range=0.05, tie_word_embeddings=False)
    model = AutoModelForCausalLM.from_pretrained(place)
    ids = torch.tensor(tiny_run.tiny_tokenizer()(text)["input_ids"])
    windows = ids[: len(ids) // 32 * 32].view(-1, 32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    torch.manual_seed(0)
    for _ in range(250):
        batch = windows[torch.randint(len(windows), (32,))]
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(place)
    return World(place, corpora)


@pytest.fixture(autouse=True)
def _isolated(cache, monkeypatch):
    tiny_run.quick(monkeypatch)
    with tiny_run.isolated(cache):
        yield


@pytest.fixture
def to_the_step(monkeypatch):
    """Searches that end at the last step of the grid that keeps the quality."""
    monkeypatch.setattr(quality, "UNUSED", (0.0, 0.0))
    monkeypatch.setattr(quality, "TRIES", 100)


@contextmanager
def counted_stages():
    """Names of the stages that are trained."""
    names, fit = [], L.Trainer.fit

    def counting(trainer, stage, *args, **kwargs):
        names.append(type(stage).__name__)
        return fit(trainer, stage, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(L.Trainer, "fit", counting)
        yield names


def asking(target, *more):
    return [f"--sparsity.target={target}", f"--evaluation.development_samples={DEVELOPMENT}", *more]


@torch.no_grad()
def log_perplexity(world, corpora, model) -> float:
    """log of the geometric mean over corpora of perplexity on development text, by the model's own logits in float64."""
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


def test_the_share_is_that_of_a_scan_over_all_shares(trained, dense, tmp_path, to_the_step):
    result = trained.run(tmp_path, *asking("+20%", "--gprune=false"))
    statistics, blocks = result.statistics[result.config.corpora.score], blocks_of(dense)
    scores = score_units("wanda_sp", blocks_of(AutoModelForCausalLM.from_pretrained(trained.model)), statistics, seed=0)
    whole, neuron = Budget.of(unit_costs(blocks, scope="ffn"), "+20%"), blocks[0].unit_cost("ffn")
    own, ratios = log_perplexity(trained, ["alpha"], dense), {}
    for cut in range(1, 2 * tiny_run.NEURONS):
        with masked(dense, allocate("uniform", scores, statistics, blocks, whole.removing(cut * neuron))):
            ratios[cut] = math.exp(log_perplexity(trained, ["alpha"], dense) - own)
    gone = sum(int((~keep).sum()) for keep in result.masks.ffn)
    assert ratios[gone] <= 1.2 < ratios[gone + 1]
    assert gone == max(cut for cut, ratio in ratios.items() if ratio <= 1.2), (
        "the curve rises here, so it is the largest"
    )
    assert result.summary["quality"]["got"] == pytest.approx(ratios[gone], rel=1e-5)
    assert result.summary["sparsity_of_scope"] == result.summary["quality"]["share"] == gone / (3 * tiny_run.NEURONS)


def test_after_training_the_quality_is_kept_and_nothing_is_trained_twice(trained, dense, tmp_path):
    flags = asking("+10%", "--recovery=[least_squares,distill]", "--distill.tokens=1536", "--sparsity.epochs=2")
    with counted_stages() as trained_stages:
        result = trained.run(tmp_path, *flags)
    found = result.summary["quality"]
    rows = {row["row"]: row for row in found["rows"]}
    own = rows["gprune + least_squares+distill"]
    assert list(rows) == ["averaged + least_squares", "base + least_squares", "gprune + least_squares", own["row"]]
    ratio = log_perplexity(trained, tiny_run.SEEN, result.model) - log_perplexity(trained, tiny_run.SEEN, dense)
    assert 1 < found["got"] <= 1.1
    assert math.exp(ratio) == pytest.approx(found["got"], rel=1e-4), "the saved model is the one that was measured"
    assert found["low"] < found["got"] < found["high"]
    assert trained_stages.count("DistillationStage") == own["models"] + 2, "its own trials, and two controls"
    left = list((result.path / "recovery").glob("*.safetensors"))
    assert len(left) == 3, "what the other trials have learned is gone"
    with counted_forwards() as seen:
        again = trained.run(tmp_path, *flags)
    assert again.summary == result.summary
    assert sum(seen) < 500, "a finished run is read"
