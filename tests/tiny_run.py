"""A whole run in seconds: a tiny model folder, tiny corpora, and flags of `train.py` that use them.

@pytest.fixture(scope="module")
def world(tmp_path_factory): yield from tiny_run.world(tmp_path_factory)

def test_something(world, tmp_path):
    assert main(world.args(tmp_path / "runs")) == 0
"""

from __future__ import annotations

import logging
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from gprune.cli import main
from gprune.export.hf import max_logit_difference
from gprune.pipeline import save
from gprune.runs.results import PruningResult, load_run
from tests.conftest import make_tiny_llama

WORDS = [f"{a}{b}{c}" for a in "bdfgklm" for b in "aeiou" for c in "nrst"][:124]
SPECIAL = ["<unk>", "<s>", "</s>", "<pad>"]
SEEN, UNSEEN = ("alpha", "beta", "gamma"), ("delta", "epsilon")
NEURONS = 160  # five modules of the smallest size, 32


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word of `WORDS`: 128 tokens with the special ones."""
    vocabulary = {word: i for i, word in enumerate([*SPECIAL, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


def save_tiny_model(folder: Path, **overrides: Any) -> Path:
    """A random Llama with its tokenizer, as a Hugging Face folder."""
    make_tiny_llama(**{"intermediate_size": NEURONS, **overrides}).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def write_corpus(path: Path, *, seed: int, documents: int = 36, words: int = 560) -> Path:
    """Sentences of words whose frequencies follow Zipf's law in an order that depends on the seed."""
    generator = random.Random(seed)
    order = generator.sample(WORDS, len(WORDS))
    weights = [1 / (rank + 3) for rank in range(len(order))]
    texts = []
    for _ in range(documents):
        drawn = generator.choices(order, weights, k=words)
        texts.append("\n".join(" ".join(drawn[i : i + 12]) for i in range(0, words, 12)))
    # `textfiles.split_text` cuts at the first blank line after 2000 characters.
    path.write_text("\n\n".join(texts), encoding="utf-8")
    return path


@dataclass(frozen=True)
class World:
    """What a tiny run reads: a model folder and corpora by name."""

    model: Path
    corpora: dict[str, Path]

    def names(self, *corpora: str) -> str:
        return "[" + ",".join(str(self.corpora[c]) for c in corpora) + "]"

    def args(self, runs: Path, *more: str, name: str = "run") -> list[str]:
        """Flags of a run of a few seconds; `more` are further flags, the last of equal ones wins."""
        return [
            f"--model.name={self.model}",
            f"--corpora.score={self.corpora['alpha']}",
            f"--corpora.drift={self.names(*SEEN)}",
            f"--corpora.learn={self.names('alpha', 'beta')}",
            f"--corpora.recover={self.names(*SEEN)}",
            f"--corpora.evaluate={self.names('alpha', *UNSEEN)}",
            "--corpora.num_samples=4", "--corpora.seq_len=32", "--corpora.batch_size=4",
            "--partition.num_modules=4", "--partition.steps=20", "--sparsity.epochs=1",
            "--evaluation.num_samples=2", "--evaluation.seq_len=32", "--evaluation.development_samples=1",
            "--evaluation.curve=[0.25]", "--logging.mode=disabled", "--trainer.accelerator=cpu",
            f"--run.dir={runs}", f"--run.name={name}", *more,
        ]  # fmt: skip

    def run(self, runs: Path, *more: str, name: str = "run") -> PruningResult:
        """Run the command line in this process, and read the run folder back."""
        assert main(self.args(runs, *more, name=name)) == 0
        return load_run(runs / name)


def make_world(folder: Path) -> World:
    """Model and corpora, written into a folder."""
    corpora = {}
    for seed, name in enumerate([*SEEN, *UNSEEN]):
        corpora[name] = write_corpus(folder / f"{name}.txt", seed=seed)
    return World(save_tiny_model(folder / "tiny-llama"), corpora)


@contextmanager
def isolated(cache: Path, **environment: str | None) -> Iterator[None]:
    """A cache and an environment of its own, and logging as it was: the command line sets both up for itself."""
    ours = logging.getLogger("gprune")
    before = ours.handlers, ours.propagate, ours.level
    with pytest.MonkeyPatch.context() as patch:
        for name in ("WANDB_MODE", "GPRUNE_DATA_DIR", "LOCAL_RANK"):
            patch.delenv(name, raising=False)
        patch.setenv("GPRUNE_CACHE", str(cache))
        for name, value in environment.items():
            patch.setenv(name, value) if value is not None else patch.delenv(name, raising=False)
        try:
            yield
        finally:
            ours.handlers, ours.propagate = before[:2]
            ours.setLevel(before[2])


def reload_in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spare runs the fresh process in which the export is checked: it takes longer than the rest together."""

    def check(model: torch.nn.Module, folder: Path, input_ids: torch.Tensor) -> float:
        from transformers import AutoModelForCausalLM

        again = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", trust_remote_code=True).eval()
        with torch.inference_mode():
            return max_logit_difference(model(input_ids).logits, again(input_ids).logits)

    monkeypatch.setattr(save, "check_reload", check)


def environment(cache: Path, **more: str) -> dict[str, str]:
    """Of a subprocess: one thread, its own cache, no account and no network."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("WANDB", "GPRUNE", "LOCAL_RANK"))}
    return kept | {"GPRUNE_CACHE": str(cache), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | more
