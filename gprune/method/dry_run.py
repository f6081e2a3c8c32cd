"""Text of `--dry_run`: widths, parameters, tokens, FLOPs and memory of a plan."""

from __future__ import annotations

from dataclasses import replace

import torch
from transformers import AutoTokenizer

from gprune.corpora import is_local
from gprune.features import attribute
from gprune.method.inputs import prepare_text
from gprune.method.memory import active_experts, memory_lines
from gprune.method.plan import Plan, describe_unpruned, forward_equivalents
from gprune.models.blocks import PARTS, blocks_of
from gprune.models.loading import locate_model
from gprune.sparsity.budget import Budget
from gprune.sparsity.cut import uniform_masks


def describe(plan: Plan) -> str:
    """Return the text of `--dry_run`: one line per property of a plan. Properties without a text are left out."""
    cfg, budget = plan.cfg, plan.budget
    parameters, dtype = plan.skeleton.num_parameters(), plan.pricing.exported_dtype
    lines = {
        "model": f"{cfg.model.name}: {parameters:,} parameters, {len(budget.by_layer)} blocks",
        "scope": f"{cfg.sparsity.scope}: {budget.total_parameters:,} parameters in units",
    }
    for feature in plan.features:
        lines |= attribute(feature, "lines")(plan)
    if cfg.trials:  # the sparsity is not known yet, so costs are upper bounds, as if almost nothing were removed
        plan = replace(plan, budget=plan.budget.removing(plan.budget.step))
        lines.pop("speed", None)
    else:
        lines.setdefault("widths", describe_widths(plan.budget))
    remaining = parameters - plan.removed
    size = f"{remaining * getattr(torch, dtype).itemsize / 1e6:,.1f} MB in {dtype}"
    lines |= {
        "stays": describe_unpruned(plan),
        "exports": f"{'at most ' if cfg.trials else ''}{remaining:,} parameters: {size}",
        "text": describe_text(plan),
        "learns in": f"{cfg.trainer.precision} ({plan.why_precision})",
        "evaluates": f"{1 + len(cfg.rows)} models on {len(cfg.corpora.evaluate)} corpora",
        "forward": f"at most {plan.forward_tokens:,} tokens; fewer where the cache has results",
        "and backward": f"{plan.forward_backward_tokens:,} tokens",
        "compute": f"at most {estimated_flops(plan):.2e} FLOP",
        **memory_lines(plan),
        "results": cfg.folder,
    }
    return "\n".join(f"{name:16} {line}" for name, line in lines.items() if line)


def describe_text(plan: Plan) -> str:
    """Describe which corpora have enough text for the run, by cutting the windows of the run.

    Corpora that would have to be downloaded are named and not read.
    """
    cfg, m = plan.cfg, plan.cfg.model
    corpora = dict.fromkeys([*cfg.train_corpora, *cfg.corpora.evaluate])
    to_download = [name for name in corpora if not is_local(name)]
    try:
        tokenizer = AutoTokenizer.from_pretrained(locate_model(m.name), trust_remote_code=m.trust_remote_code)
    except Exception:  # tokenizers and the hub raise many classes
        return f"not counted, because the tokenizer of {m.name} cannot be loaded"
    prepare_text(cfg, tokenizer, plan.skeleton.get_input_embeddings().num_embeddings, without=to_download)
    counted = f"{len(corpora) - len(to_download)} corpora have enough windows"
    if not to_download:
        return counted
    return f"{counted}; not counted, because they are not on this machine: {', '.join(to_download)}"


def describe_widths(budget: Budget) -> str:
    """Describe how many neurons and KV groups blocks keep if every module has the same sparsity."""
    masks = uniform_masks(budget.rest)
    kept_neurons = [int(mask.sum()) for mask in masks.ffn]
    kept_groups = [int(mask.sum()) for mask in masks.attention]
    neurons, groups = max(map(len, masks.ffn)), max(map(len, masks.attention))
    of_neurons = f"{min(kept_neurons)} to {max(kept_neurons)} of {neurons} neurons"
    of_groups = f"{min(kept_groups)} to {max(kept_groups)} of {groups} KV groups"
    grid = "" if budget.width_multiple == 1 else f", in multiples of {budget.width_multiple} neurons"
    return f"{of_neurons} and {of_groups} per block, at uniform sparsity{grid}"


def estimated_flops(plan: Plan) -> float:
    """Estimate the FLOPs of a run's passes and Gram matrices, as if nothing were pruned and all weights had gradients.

    The estimate is an upper bound of the matrix products of the model. Element-wise operations, errors of blocks and
    solvers are not counted. A multiply-add counts as 2. A token that passes forward needs

    - 2 x the weights of the blocks, of which only active experts count,
    - 4 T C per block for attention over T tokens with C channels,
    - 2 V H for the head with vocabulary size V and hidden size H.

    A backward pass needs twice as much. Gram matrices are counted by `gram_flops`; each of a token's active experts,
    with N neurons, needs a full product of 2 N^2.
    """
    cfg, blocks = plan.cfg, blocks_of(plan.skeleton)
    config = plan.skeleton.config.get_text_config(decoder=True)
    per_token = 2.0 * config.vocab_size * config.hidden_size  # products with weights
    per_attended_token = 0.0  # attention of one token to one token
    grams_per_token = 0.0  # Gram matrices, in calibration
    for block in blocks:
        sizes = {name: part.out_features * part.in_features for name, part in block.parts.items()}
        ffn = sum(size for name, size in sizes.items() if name in PARTS["ffn"])
        attention = sum(size for name, size in sizes.items() if name in PARTS["attention"])
        active = active_experts(config, block)
        per_token += 2 * (attention + ffn * active / block.experts)
        per_attended_token += 4 * block.channels
        grams_per_token += 2 * block.neurons**2 * active if block.has_experts else gram_flops(block.neurons)
        grams_per_token += gram_flops(block.channels)
    tokens = forward_equivalents(plan.forward_tokens, plan.forward_backward_tokens)
    total = tokens * (per_token + cfg.corpora.seq_len * per_attended_token)
    if cfg.evaluation.seq_len > cfg.corpora.seq_len:  # windows of evaluation are longer
        evaluated = sum(plan.evaluated_models) * cfg.evaluated_tokens
        total += evaluated * (cfg.evaluation.seq_len - cfg.corpora.seq_len) * per_attended_token
    if "gram" in cfg.collects:
        total += plan.calibration_tokens * grams_per_token
    return total


def gram_flops(channels: int) -> float:
    """FLOPs per token of `calibration.moments.add_gram` for C channels: at most C (C + 192).

    `add_gram` multiplies panels of 192 columns with all columns from the diagonal on.
    """
    return channels * (channels + min(channels, 192))
