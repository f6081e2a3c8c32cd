"""`--model.made_elsewhere`: check, load and tokenise for a model that another tool has made."""

from __future__ import annotations

import logging
import math

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gprune.config import RunConfig
from gprune.corpora.windows import Windows
from gprune.errors import UserError
from gprune.models.elsewhere import FLAG, check_elsewhere, load_elsewhere
from gprune.models.loading import fingerprint
from gprune.models.losses import same_head
from gprune.models.structure import check_structure, why_not_measurable
from gprune.pipeline.inputs import prepare_text
from gprune.pipeline.pricing import device_memory
from gprune.recoveries import recovery_of

log = logging.getLogger("gprune")
GIB = 2**30


def check_model(cfg: RunConfig, dense: PreTrainedModel, device: torch.device) -> None:
    """Raise UserError if the model is incomplete, does not fit into memory, or cannot be distilled.

    Args:
        cfg: the configuration of the run.
        dense: the dense model without weights.
        device: the device of this process.
    """
    name = cfg.model.made_elsewhere
    model = check_elsewhere(name, trust_remote_code=cfg.model.trust_remote_code)
    bytes_per_parameter = getattr(torch, cfg.model.dtype).itemsize
    needed = bytes_per_parameter * (model.num_parameters() + dense.num_parameters())
    memory = cfg.plan.memory or device_memory(device)
    if needed > memory:
        reason = f"it and the dense model need {needed / GIB:,.2f} GiB in {cfg.model.dtype}, of {memory / GIB:,.2f}"
        raise UserError(f"{FLAG}: Cannot load '{name}' into memory: {reason}. Try --model.dtype bfloat16.")
    positions = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None) or math.inf
    table_sizes = [module.num_embeddings for module in model.modules() if isinstance(module, torch.nn.Embedding)]
    # Tables of position embeddings may have a few rows more than positions; OPT's table has two more.
    has_learned_positions = any(positions <= size <= positions + 8 for size in table_sizes)
    if has_learned_positions and cfg.evaluation.seq_len > positions:
        raise UserError(
            f"--evaluation.seq_len must be {positions} or less, the number of learned positions of '{name}'; got "
            f"{cfg.evaluation.seq_len}."
        )
    if recovery_of(cfg.recovery).learns:
        check_structure(model)
        if (why := why_not_measurable(model)) is not None:
            raise UserError(f"{FLAG}: Cannot distil '{name}': {why}. Use --recovery none.")


def prepare(
    cfg: RunConfig, device: torch.device, dense: PreTrainedModel, dense_tokenizer: PreTrainedTokenizerBase,
    test: list[Windows],
) -> tuple[list[Windows], str]:  # fmt: skip
    """Check the model against the dense model, and prepare the evaluated text for it.

    Args:
        cfg: the configuration of the run.
        device: the device of this process.
        dense: the dense model.
        dense_tokenizer: the tokenizer of the dense model.
        test: the evaluated text in the dense model's tokens.

    Returns:
        The evaluated text in the model's tokens, and the fingerprint of the model.

    Raises:
        UserError: as in `_check_head` and `_tokenized_for`.
    """
    model, tokenizer = load_model_made_elsewhere(cfg, device)
    _check_head(cfg, model, dense)
    return _tokenized_for(cfg, model, tokenizer, dense_tokenizer, test), fingerprint(model)


def load_model_made_elsewhere(cfg: RunConfig, device: torch.device) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the model of `--model.made_elsewhere`, frozen and on a device, and its tokenizer."""
    settings = {"dtype": getattr(torch, cfg.model.dtype), "trust_remote_code": cfg.model.trust_remote_code}
    model, tokenizer = load_elsewhere(cfg.model.made_elsewhere, **settings)
    return model.to(device), tokenizer


def _check_head(cfg: RunConfig, model: PreTrainedModel, dense: PreTrainedModel) -> None:
    """Raise UserError if a model is to be distilled but its head differs from the dense model's.

    Distillation computes the logits of both models with the same head: the output embedding, and the scale and the
    limit of logits if the family has them.
    """
    if not recovery_of(cfg.recovery).learns:
        return
    if not same_head(model, dense):
        reason = f"its output embedding differs from that of '{cfg.model.name}'"
        raise UserError(f"{FLAG}: Cannot distil '{cfg.model.made_elsewhere}': {reason}. Use --recovery none.")


def _tokenized_for(
    cfg: RunConfig, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase,
    dense_tokenizer: PreTrainedTokenizerBase, test: list[Windows],
) -> list[Windows]:  # fmt: skip
    """Return the evaluated text in the tokens of a model; `test` itself if the tokenizer is that of the dense model.

    Two tokenizers are the same if they have the same vocabulary and give the same windows of the evaluated text.

    Args:
        cfg: the configuration of the run.
        model: the model of `--model.made_elsewhere`.
        tokenizer: the tokenizer of the model.
        dense_tokenizer: the tokenizer of the dense model.
        test: the evaluated text in the dense model's tokens.

    Raises:
        UserError: if the tokenizers differ and the model is to be distilled, or the tokenizer belongs to another model.
    """
    not_evaluated = [corpus for corpus in cfg.train_corpora if corpus not in cfg.corpora.evaluate]
    embeddings = model.get_input_embeddings().num_embeddings
    model_text = prepare_text(cfg, tokenizer, embeddings, without=not_evaluated).test
    same_vocabulary = tokenizer.get_vocab() == dense_tokenizer.get_vocab()
    if same_vocabulary and [w.content_hash for w in model_text] == [w.content_hash for w in test]:
        return test
    name = cfg.model.made_elsewhere
    if recovery_of(cfg.recovery).learns:
        reason = f"its tokenizer differs from that of '{cfg.model.name}'"
        raise UserError(f"{FLAG}: Cannot distil '{name}': {reason}. Use --recovery none.")
    log.warning(
        "The tokenizers of '%s' and '%s' differ, so there is no KL, agreement, gap or ratio: perplexity is per token.",
        name, cfg.model.name,
    )  # fmt: skip
    return model_text
