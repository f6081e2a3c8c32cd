"""What a run reads: the frozen model and its tokenizer, and text by role."""

from __future__ import annotations

import functools
import logging
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gprune.config import RunConfig
from gprune.corpora.load import load_corpus, read_corpus
from gprune.corpora.windows import Sample, Windows, check_tokens, make_windows, opening
from gprune.errors import UserError
from gprune.export.gguf_tokenizer import tokenizer_keys
from gprune.models.loading import load_model
from gprune.models.offload import is_offloaded
from gprune.recoveries import recovery_of

log = logging.getLogger("gprune")


def check_backward(cfg: RunConfig, model: PreTrainedModel) -> None:
    """Raise UserError where a gradient is asked of a model whose weights are fetched for each pass."""
    if cfg.backward and not cfg.model.shard and is_offloaded(model):
        raise UserError(
            f"{cfg.backward}: weights that do not fit --model.max_memory are fetched for each forward pass, without "
            f"gradients; give the model more memory, or use --sparsity.allocation uniform and --importance wanda_sp."
        )


def load(cfg: RunConfig, device: torch.device) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The frozen model, on the trainer's device unless `device_map` places it, and its tokenizer."""
    m = cfg.model
    log.info("Loading %s", m.name)
    settings = m.model_dump(include={"device_map", "max_memory", "trust_remote_code"})
    model, tokenizer = load_model(m.name, dtype=getattr(torch, m.dtype), **settings)
    check_backward(cfg, model)
    if cfg.export.format == "gguf":
        tokenizer_keys(tokenizer, model.get_input_embeddings().num_embeddings)  # refuses what GGUF has no words for
    # To be sharded it stays on the CPU: each process takes its part from there.
    return model if m.device_map or m.shard else model.to(device), tokenizer


@dataclass(frozen=True)
class Text:
    """Windows by role."""

    train: Mapping[str, Windows]  # score, drift and recover, by corpus
    # One per learning corpus: `learn_samples` windows, a prefix, or an extension, of those of `train`.
    learn: list[Windows]
    # One per recovery corpus, for recoveries that learn: windows for `--distill.tokens`, likewise.
    fresh: list[Windows]
    development: list[Windows]  # one per corpus of `RunConfig.developed`
    test: list[Windows]  # one per evaluated corpus, of `evaluation.split`

    @property
    def used(self) -> list[Windows]:
        """What no evaluated text may share; curves on development text do not use it, they show it."""
        shown = {w.split for w in self.test}
        return [*self.train.values(), *self.learn, *self.fresh, *(w for w in self.development if w.split not in shown)]

    def hashes(self) -> dict[str, str]:
        """Content hash by corpus, split and role: what two sittings at one run must share."""
        roles = {"": self.train.values(), " learned": self.learn, " recovered": self.fresh}
        roles |= {" curve": self.development, " evaluated": self.test}
        return {f"{w.corpus} {w.split}{role}": w.content_hash for role, windows in roles.items() for w in windows}


def prepare_text(
    cfg: RunConfig, tokenizer: PreTrainedTokenizerBase, embeddings: int, *, without: Collection[str] = ()
) -> Text:
    """Read, tokenise and cut every corpus for its roles.

    Args:
        embeddings: of the model.
        without: corpora that are left out.

    Raises:
        UserError: for text that is not there or too short, and for a tokenizer of another model.
    """
    c, e, seed = cfg.corpora, cfg.evaluation, cfg.run.seed
    length, how = "--corpora.seq_len", {"bos": opening(tokenizer, c.bos)}
    learned = "--corpora.learn_samples" if c.learn_samples else "--corpora.num_samples"
    # Text that is measured on stays the same for every --run.seed: seeds compare methods, not test sets.
    samples = {
        "train": Sample(c.num_samples, c.seq_len, seed, **how, flags=("--corpora.num_samples", length)),
        "learn": Sample(c.learn_samples or c.num_samples, c.seq_len, seed, **how, flags=(learned, length)),
        "fresh": Sample(cfg.distilled_windows or 1, c.seq_len, seed, **how, flags=("--distill.tokens", length)),
        "development": Sample(
            e.development_samples, c.seq_len, **how, flags=("--evaluation.development_samples", length)
        ),
        "test": Sample(e.num_samples, e.seq_len, **how, flags=("--evaluation.num_samples", "--evaluation.seq_len")),
    }
    calibrated = dict.fromkeys([*cfg.calibration, *cfg.roles["recover"]])
    recovered = cfg.roles["recover"] if recovery_of(cfg.recovery).learns else []
    # A corpus may have several roles, lie behind a network, and return other text when it is asked again.
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
        development=[*windows(cfg.developed, "development", "development")],
        test=[*windows(c.evaluate, e.split, "test")],
    )
