"""`--model.made_elsewhere`: check, load and tokenise for a model that another tool has made."""

from __future__ import annotations

import logging
import math
import os

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gprune.config import RunConfig
from gprune.corpora.windows import Windows
from gprune.errors import UserError
from gprune.models.elsewhere import FLAG, check_elsewhere, load_elsewhere
from gprune.models.loading import fingerprint
from gprune.models.lookup import family_of
from gprune.models.losses import LogitTransform
from gprune.models.structure import check_structure
from gprune.pipeline.inputs import prepare_text
from gprune.recoveries import recovery_of

log = logging.getLogger("gprune")
GIB = 2**30


def refuse(cfg: RunConfig, dense: PreTrainedModel, device: torch.device) -> None:
    """Raise UserError if the model is incomplete, does not fit into memory, or cannot be distilled.

    Args:
        cfg: the configuration.
        dense: the dense model without weights.
        device: the device of this process.
    """
    name = cfg.model.made_elsewhere
    model = check_elsewhere(name, trust_remote_code=cfg.model.trust_remote_code)
    size = getattr(torch, cfg.model.dtype).itemsize
    needed, memory = (size * (model.num_parameters() + dense.num_parameters()), cfg.plan.memory or _memory(device))
    if needed > memory:
        need = f"it and the dense model need {needed / GIB:,.2f} GiB in {cfg.model.dtype}, of {memory / GIB:,.2f}"
        raise UserError(f"{FLAG}: Cannot load '{name}' into memory: {need}. Try --model.dtype bfloat16.")
    positions = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None) or math.inf
    tables = [module.num_embeddings for module in model.modules() if isinstance(module, torch.nn.Embedding)]
    learned = any(positions <= rows <= positions + 8 for rows in tables)  # OPT's table has two rows more
    if learned and cfg.evaluation.seq_len > positions:
        raise UserError(
            f"--evaluation.seq_len must be {positions} or less, the number of learned positions of '{name}'; got "
            f"{cfg.evaluation.seq_len}."
        )
    if recovery_of(cfg.recovery).learns:
        check_structure(model)
        if not family_of(model).plain_head:
            reason = "its logits are not the product of head and hidden states"
            raise UserError(f"{FLAG}: Cannot distil '{name}': {reason}. Use --recovery none.")


def _memory(device: torch.device) -> float:
    """Memory of a device in bytes."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    return math.prod(map(os.sysconf, ("SC_PHYS_PAGES", "SC_PAGE_SIZE")))


def prepare(
    cfg: RunConfig, device: torch.device, dense: PreTrainedModel, dense_tokenizer: PreTrainedTokenizerBase,
    test: list[Windows],
) -> tuple[list[Windows], str]:  # fmt: skip
    """Check the model against the dense model, and return the evaluated text in its tokens and its fingerprint.

    Args:
        cfg: the configuration.
        device: the device of this process.
        dense: the dense model.
        dense_tokenizer: its tokenizer.
        test: the evaluated text in the dense model's tokens.

    Raises:
        UserError: as in `_check_head` and `_text_for`.
    """
    model, tokenizer = load_other(cfg, device)
    _check_head(cfg, model, dense)
    return _text_for(cfg, model, tokenizer, dense_tokenizer, test), fingerprint(model)


def load_other(cfg: RunConfig, device: torch.device) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the frozen model on a device, and its tokenizer."""
    settings = {"dtype": getattr(torch, cfg.model.dtype), "trust_remote_code": cfg.model.trust_remote_code}
    model, tokenizer = load_elsewhere(cfg.model.made_elsewhere, **settings)
    return model.to(device), tokenizer


def _check_head(cfg: RunConfig, model: PreTrainedModel, dense: PreTrainedModel) -> None:
    """Raise UserError if a model is to be distilled but its output embedding differs from the dense model's.

    Distillation computes the logits of both models with the same head.
    """
    if not recovery_of(cfg.recovery).learns:
        return
    ours, theirs = (one.get_output_embeddings().weight for one in (model, dense))
    if not torch.equal(ours, theirs.to(ours.device)) or LogitTransform.of(model) != LogitTransform.of(dense):
        reason = f"its output embedding differs from that of '{cfg.model.name}'"
        raise UserError(f"{FLAG}: Cannot distil '{cfg.model.made_elsewhere}': {reason}. Use --recovery none.")


def _text_for(
    cfg: RunConfig, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, dense: PreTrainedTokenizerBase,
    test: list[Windows],
) -> list[Windows]:  # fmt: skip
    """Return the evaluated text in the tokens of a model; `test` itself if the tokenizer is that of the dense model.

    Two tokenizers are the same if they have the same vocabulary and give the same windows of the evaluated text.

    Args:
        cfg: the configuration.
        model: the model.
        tokenizer: its tokenizer.
        dense: the dense model's tokenizer.
        test: the evaluated text in the dense model's tokens.

    Raises:
        UserError: if the tokenizers differ and the model is to be distilled, or the tokenizer belongs to another model.
    """
    others = [corpus for corpus in cfg.train_corpora if corpus not in cfg.corpora.evaluate]
    own = prepare_text(cfg, tokenizer, model.get_input_embeddings().num_embeddings, without=others).test
    same = tokenizer.get_vocab() == dense.get_vocab()
    if same and [w.content_hash for w in own] == [w.content_hash for w in test]:
        return test
    name = cfg.model.made_elsewhere
    if recovery_of(cfg.recovery).learns:
        reason = f"its tokenizer differs from that of '{cfg.model.name}'"
        raise UserError(f"{FLAG}: Cannot distil '{name}': {reason}. Use --recovery none.")
    log.warning(
        "The tokenizers of '%s' and '%s' differ, so there is no KL, agreement, gap or ratio: perplexity is per token.",
        name, cfg.model.name,
    )  # fmt: skip
    return own
