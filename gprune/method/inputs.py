"""Inputs of a run: the frozen model, its tokenizer, and text by role."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gprune.config import RunConfig
from gprune.corpora.load import load_corpus, read_corpus
from gprune.corpora.windows import Sample, Windows, check_tokens, leading_token, make_windows
from gprune.discovery import family_of
from gprune.errors import UserError
from gprune.models.gguf import tokenizer_keys
from gprune.models.loading import load_without_tokenizer
from gprune.models.offload import is_offloaded
from gprune.recoveries import recovery_learns

log = logging.getLogger("gprune")

# Of --distill.repeat auto: how often text is used, and how little of it is enough to train on.
MOST_REPEATS = 4
LEAST_TRAINING_TOKENS = 8192
# Roles of `Text` in which corpora have the shares of a mixture, with the fewest windows of a corpus: drift between two
# halves needs two.
SHARED = {"train": 2, "learn": 1, "fresh": 1}


def check_backward(cfg: RunConfig, model: PreTrainedModel) -> None:
    """Raise UserError if a step needs gradients but weights of the model are offloaded."""
    if cfg.backward_flag and is_offloaded(model):
        raise UserError(
            f"{cfg.backward_flag} needs gradients, which offloaded weights do not have. Raise --model.max_memory, or "
            "use --sparsity.allocation uniform and --importance wanda_sp."
        )


def load_dense(cfg: RunConfig, device: torch.device, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """Load the frozen model with its structure. Raise UserError if the export cannot express its tokenizer.

    The model is moved to the device of the Trainer, except with a `device_map`.
    """
    m = cfg.model
    log.info("Loading %s", m.name)
    settings = m.model_dump(include={"dtype", "device_map", "max_memory", "trust_remote_code"})
    model = load_without_tokenizer(m.name, **settings)
    family_of(model)
    check_backward(cfg, model)
    if cfg.export.format == "gguf":
        tokenizer_keys(tokenizer, model.get_input_embeddings().num_embeddings)  # raises if GGUF cannot express it
    if not m.device_map:
        model = model.to(device)
    return model


@dataclass(frozen=True)
class Text:
    """The text of a run: windows by role."""

    train: Mapping[str, Windows]  # for scores, drift and recovery, by corpus
    # One per learning corpus: `learn_samples` windows, a prefix or an extension of those in `train`.
    learn: list[Windows]
    # One per recovery corpus, for recoveries that train: windows for `--distill.tokens`.
    fresh: list[Windows]
    development: list[Windows]  # one per corpus of `RunConfig.development_corpora`
    test: list[Windows]  # one per evaluated corpus, of `evaluation.split`

    @property
    def used(self) -> list[Windows]:
        """Text that counts as used in the leak check. Development text that is also evaluated is left out."""
        evaluated_splits = {w.split for w in self.test}
        development = [w for w in self.development if w.split not in evaluated_splits]
        return [*self.train.values(), *self.learn, *self.fresh, *development]

    def hashes(self) -> dict[str, str]:
        """Content hash by corpus, split and role. The sessions of a run must have the same hashes."""
        windows_by_suffix = {
            "": self.train.values(), " learned": self.learn, " recovered": self.fresh, " curve": self.development,
            " evaluated": self.test,
        }  # fmt: skip
        return {
            f"{w.corpus} {w.split}{suffix}": w.content_hash
            for suffix, windows in windows_by_suffix.items()
            for w in windows
        }


def prepare_text(
    cfg: RunConfig, tokenizer: PreTrainedTokenizerBase, embeddings: int, *, without: Collection[str] = ()
) -> Text:
    """Read and tokenize every corpus, and cut the windows of each role.

    The roles are calibration (`Text.train`), mask learning (`learn`), distillation (`fresh`), validation
    (`development`) and evaluation (`test`). Token ids must be below `embeddings`, the rows of the model's embedding.
    Corpora in `without` are left out.
    """
    windows = window_cutter(cfg, tokenizer, embeddings, without=without)
    calibrated = dict.fromkeys([*cfg.calibration_corpora, *cfg.roles["recover"]])
    recovered = cfg.roles["recover"] if recovery_learns(cfg.recovery) else []
    return Text(
        train={w.corpus: w for w in windows(calibrated, "train")},
        learn=[*windows(cfg.roles["learn"], "learn")],
        fresh=[*windows(recovered, "fresh")],
        development=[*windows(cfg.development_corpora, "development")],
        test=[*windows(cfg.corpora.evaluate, "test")],
    )


def window_cutter(
    cfg: RunConfig, tokenizer: PreTrainedTokenizerBase, embeddings: int, *, without: Collection[str] = ()
) -> Callable[[Iterable[str], str], Iterator[Windows]]:
    """Return a function of (corpora, role) that yields the windows of each corpus; arguments as `prepare_text`.

    Each corpus is read once, because it may have several roles, be downloaded, and return other text in a second call.
    """
    samples = samples_by_role(cfg, leading_token(tokenizer, cfg.corpora.bos))
    read = functools.cache(read_corpus)
    other_splits = {"development": "development", "test": cfg.evaluation.split}

    def windows(corpora: Iterable[str], role: str) -> Iterator[Windows]:
        split = other_splits.get(role, "train")
        corpora, sample = [*corpora], samples[role]
        each = sample.num_samples
        numbers = dict.fromkeys(corpora, each)
        if role in SHARED:
            numbers = cfg.corpora.windows_of(corpora, each, least=SHARED[role])
        for corpus, number in numbers.items():
            if corpus not in without:
                documents = load_corpus(corpus, split, read=read)
                own = replace(sample, num_samples=number, per_window=sample.per_window * each / number)
                cut = make_windows(documents, tokenizer, own, corpus=corpus, split=split)
                check_tokens(cut, tokenizer, embeddings)
                yield cut

    return windows


def samples_by_role(cfg: RunConfig, bos: int | None) -> dict[str, Sample]:
    """Return number, length and random seed of the windows for each role of `Text`.

    Text for evaluation does not depend on `--run.seed`, so that seeds do not change the test set.
    """
    c, e, seed = cfg.corpora, cfg.evaluation, cfg.run.seed
    length_flag = "--corpora.seq_len"
    learn_flag = "--corpora.learn_samples" if c.learn_samples else "--corpora.num_samples"
    fewest = 2 if cfg.repeat == "auto" else None
    return {
        "train": Sample(
            c.num_samples, c.seq_len, seed, bos=bos, flags=("--corpora.num_samples", length_flag), at_least=fewest
        ),
        "learn": Sample(
            c.learn_samples or c.num_samples, c.seq_len, seed, bos=bos, flags=(learn_flag, length_flag), at_least=fewest
        ),
        "fresh": Sample(
            cfg.fresh_windows or 1,  # 0 only if no recovery trains, and then not used
            c.seq_len,
            seed,
            bos=bos,
            flags=("--distill.tokens", length_flag),
            per_window=len(c.recover) * c.seq_len,
            repeat={False: 1, "auto": MOST_REPEATS, True: math.inf}[cfg.repeat],
            least_tokens=LEAST_TRAINING_TOKENS if cfg.repeat == "auto" else 0,
        ),
        "development": Sample(
            cfg.development_windows,
            c.seq_len,
            bos=bos,
            flags=("--evaluation.development_samples", length_flag),
            at_least=2 if e.development_samples is None else None,  # a smaller corpus may have fewer by default
        ),
        "test": Sample(
            e.num_samples,
            e.seq_len,
            bos=bos,
            flags=("--evaluation.num_samples", "--evaluation.seq_len"),
            at_least=fewest,
        ),
    }
