"""A model made elsewhere in a run: checked before anything is loaded, read, and measured beside the dense model."""

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
from gprune.models.lookup import family_of
from gprune.models.losses import LogitTransform
from gprune.models.structure import check_structure
from gprune.pipeline.inputs import prepare_text
from gprune.recoveries import recovery_of

log = logging.getLogger("gprune")
GIB = 2**30


def refuse(cfg: RunConfig, dense: PreTrainedModel, device: torch.device) -> None:
    """Raise UserError for a model made elsewhere that does not load whole, does not fit, or cannot be distilled.

    Args:
        dense: without weights.
    """
    name = cfg.model.made_elsewhere
    model = check_elsewhere(name, trust_remote_code=cfg.model.trust_remote_code)
    size = getattr(torch, cfg.model.dtype).itemsize
    needed, memory = (size * (model.num_parameters() + dense.num_parameters()), cfg.plan.memory or _memory(device))
    if needed > memory:
        have = f"it and the dense model need {needed / GIB:,.2f} GiB in {cfg.model.dtype}, of {memory / GIB:,.2f}"
        raise UserError(f"{FLAG}: '{name}' is larger than memory: {have}; try --model.dtype bfloat16.")
    positions = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None) or math.inf
    tables = [module.num_embeddings for module in model.modules() if isinstance(module, torch.nn.Embedding)]
    learned = any(positions <= rows <= positions + 8 for rows in tables)  # OPT's has two rows more
    if learned and cfg.evaluation.seq_len > positions:
        raise UserError(
            f"--evaluation.seq_len must be at most {positions}, the positions that '{name}' has learned; got "
            f"{cfg.evaluation.seq_len}."
        )
    if recovery_of(cfg.recovery).learns:
        check_structure(model)
        if not family_of(model).plain_head:
            raise UserError(f"{FLAG}: '{name}': its logits are not head times hidden states; expected --recovery none.")


def _memory(device: torch.device) -> float:
    """Bytes of a device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    return math.prod(map(os.sysconf, ("SC_PHYS_PAGES", "SC_PAGE_SIZE")))


def load(cfg: RunConfig, device: torch.device) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The frozen model on a device, and its tokenizer."""
    settings = {"dtype": getattr(torch, cfg.model.dtype), "trust_remote_code": cfg.model.trust_remote_code}
    model, tokenizer = load_elsewhere(cfg.model.made_elsewhere, **settings)
    return model.to(device), tokenizer


def check_teachable(cfg: RunConfig, model: PreTrainedModel, dense: PreTrainedModel) -> None:
    """Raise UserError if a model is to learn from the dense one and has another output embedding.

    Distillation computes the logits of both with one head.
    """
    if not recovery_of(cfg.recovery).learns:
        return
    ours, theirs = (one.get_output_embeddings().weight for one in (model, dense))
    if not torch.equal(ours, theirs.to(ours.device)) or LogitTransform.of(model) != LogitTransform.of(dense):
        raise UserError(
            f"{FLAG}: '{cfg.model.made_elsewhere}' has another output embedding than '{cfg.model.name}', so it cannot "
            f"learn from it; expected --recovery none."
        )


def text_for(
    cfg: RunConfig, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, dense: PreTrainedTokenizerBase,
    test: list[Windows],
) -> list[Windows]:  # fmt: skip
    """The evaluated text in a model's own tokens: the windows `test` where its tokenizer is the dense model's.

    Two tokenizers are the same if they have the same vocabulary and cut the evaluated text into the same windows.

    Raises:
        UserError: for another tokenizer where the model is to learn from the dense one, and for a tokenizer of another
            model.
    """
    others = [corpus for corpus in cfg.used if corpus not in cfg.corpora.evaluate]
    own = prepare_text(cfg, tokenizer, model.get_input_embeddings().num_embeddings, without=others).test
    same = tokenizer.get_vocab() == dense.get_vocab()
    if same and [w.content_hash for w in own] == [w.content_hash for w in test]:
        return test
    name = cfg.model.made_elsewhere
    if recovery_of(cfg.recovery).learns:
        raise UserError(
            f"{FLAG}: '{name}' has another tokenizer than '{cfg.model.name}', so it cannot learn from it; expected "
            f"--recovery none."
        )
    log.warning(
        "'%s' has another tokenizer than '%s': no KL, agreement, gap or ratio, as its perplexity is of other tokens.",
        name, cfg.model.name,
    )  # fmt: skip
    return own
