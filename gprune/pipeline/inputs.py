"""Inputs of a run: the frozen model, its tokenizer, and text by role."""

from __future__ import annotations

import functools
import logging
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gprune.config import RunConfig
from gprune.corpora.load import load_corpus, read_corpus
from gprune.corpora.windows import Sample, Windows, check_tokens, leading_token, make_windows
from gprune.errors import UserError
from gprune.export.gguf_tokenizer import tokenizer_keys
from gprune.models.loading import load_model
from gprune.models.offload import is_offloaded
from gprune.recoveries import recovery_of

log = logging.getLogger("gprune")


def check_backward(cfg: RunConfig, model: PreTrainedModel) -> None:
    """Raise UserError if gradients are needed but weights of the model are offloaded."""
    if cfg.backward_flag and not cfg.model.shard and is_offloaded(model):
        raise UserError(
            f"{cfg.backward_flag} needs gradients, which offloaded weights do not have. Raise --model.max_memory, or "
            "use --sparsity.allocation uniform and --importance wanda_sp."
        )


def load_dense(cfg: RunConfig, device: torch.device) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the frozen model, on the Trainer's device unless there is a `device_map`, and its tokenizer."""
    m = cfg.model
    log.info("Loading %s", m.name)
    settings = m.model_dump(include={"device_map", "max_memory", "trust_remote_code"})
    model, tokenizer = load_model(m.name, dtype=getattr(torch, m.dtype), **settings)
    check_backward(cfg, model)
    if cfg.export.format == "gguf":
        tokenizer_keys(tokenizer, model.get_input_embeddings().num_embeddings)  # raises if GGUF cannot express it
    # A model that will be sharded stays on the CPU, from where each process copies its part.
    return model if m.device_map or m.shard else model.to(device), tokenizer


@dataclass(frozen=True)
class Text:
    """Windows by role."""

    train: Mapping[str, Windows]  # score, drift and recover, by corpus
    # One per learning corpus: `learn_samples` windows, a prefix or an extension of those in `train`.
    learn: list[Windows]
    # One per recovery corpus, for recoveries that train: windows for `--distill.tokens`.
    fresh: list[Windows]
    development: list[Windows]  # one per corpus of `RunConfig.developed`
    test: list[Windows]  # one per evaluated corpus, of `evaluation.split`

    @property
    def used(self) -> list[Windows]:
        """Text that counts as used in the leak check. Evaluation on development text does not count as use."""
        shown = {w.split for w in self.test}
        return [*self.train.values(), *self.learn, *self.fresh, *(w for w in self.development if w.split not in shown)]

    def hashes(self) -> dict[str, str]:
        """Content hash by corpus, split and role. The sessions of a run must have the same hashes."""
        roles = {"": self.train.values(), " learned": self.learn, " recovered": self.fresh}
        roles |= {" curve": self.development, " evaluated": self.test}
        return {f"{w.corpus} {w.split}{role}": w.content_hash for role, windows in roles.items() for w in windows}


def prepare_text(
    cfg: RunConfig, tokenizer: PreTrainedTokenizerBase, embeddings: int, *, without: Collection[str] = ()
) -> Text:
    """Read and tokenise every corpus, and cut the windows of its roles.

    Args:
        cfg: the configuration.
        tokenizer: the model's tokenizer.
        embeddings: number of embeddings of the model.
        without: corpora that are left out.

    Raises:
        UserError: if text is missing or too short, or the tokenizer belongs to another model.
    """
    c, e, seed = cfg.corpora, cfg.evaluation, cfg.run.seed
    length, how = "--corpora.seq_len", {"bos": leading_token(tokenizer, c.bos)}
    learned = "--corpora.learn_samples" if c.learn_samples else "--corpora.num_samples"
    # Text for evaluation does not depend on --run.seed, so that seeds do not change the test set.
    samples = {
        "train": Sample(c.num_samples, c.seq_len, seed, **how, flags=("--corpora.num_samples", length)),
        "learn": Sample(c.learn_samples or c.num_samples, c.seq_len, seed, **how, flags=(learned, length)),
        "fresh": Sample(cfg.distilled_windows or 1, c.seq_len, seed, **how, flags=("--distill.tokens", length)),
        "development": Sample(
            e.development_samples, c.seq_len, **how, flags=("--evaluation.development_samples", length)
        ),
        "test": Sample(e.num_samples, e.seq_len, **how, flags=("--evaluation.num_samples", "--evaluation.seq_len")),
    }
    calibrated = dict.fromkeys([*cfg.calibration_corpora, *cfg.roles["recover"]])
    recovered = cfg.roles["recover"] if recovery_of(cfg.recovery).learns else []
    # Cached, because a corpus may have several roles, be downloaded, and return other text in a second call.
    read = functools.cache(read_corpus)

    def windows(names: Iterable[str], split: str, role: str) -> Iterator[Windows]:
        for name in names:
            if name not in without:
                documents = load_corpus(name, split, read=read)
                cut = make_windows(documents, tokenizer, samples[role], corpus=name, split=split)
                check_tokens(cut, tokenizer, embeddings)
                yield cut

    return Text(
        train={w.corpus: w for w in windows(calibrated, "train", "train")},
        learn=[*windows(cfg.roles["learn"], "train", "learn")],
        fresh=[*windows(recovered, "train", "fresh")],
        development=[*windows(cfg.development_corpora, "development", "development")],
        test=[*windows(c.evaluate, e.split, "test")],
    )
