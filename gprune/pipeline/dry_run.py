"""Text of `--dry_run`: tokens, FLOPs, expected time, memory and widths of a plan."""

from __future__ import annotations

import math
from dataclasses import replace
from datetime import timedelta

import torch
from torch.utils.benchmark import Timer
from transformers import AutoTokenizer

from gprune.benchmarks.speed import price_from_table
from gprune.config import RunConfig
from gprune.corpora import is_local
from gprune.models.blocks import PARTS, blocks_of, find_unpruned
from gprune.models.loading import locate_model
from gprune.pipeline.cost import LEARNED_TRIES, TRIES, calibration_tokens, development_tokens, passes, searches
from gprune.pipeline.inputs import prepare_text
from gprune.pipeline.memory import memory_line
from gprune.pipeline.pace import run_seconds
from gprune.pipeline.plan import Plan
from gprune.recoveries import recovery_of
from gprune.sparsity.allocation import ALLOCATION
from gprune.sparsity.budget import Budget
from gprune.sparsity.cut import uniform_masks


def describe(plan: Plan) -> str:
    """Describe a plan, one line per property."""
    cfg, budget, quality = plan.cfg, plan.budget, plan.cfg.sparsity.quality
    most = plan.removed
    if quality:  # the sparsity is not known yet; costs are upper bounds, as if almost nothing were removed
        plan = replace(plan, budget=budget.removing(budget.step))
    parameters, scope = plan.skeleton.num_parameters(), budget.costs.in_parameters.total
    dtype = plan.pricing.exported_dtype
    left = parameters - plan.removed
    lines = {
        "model": f"{cfg.model.name}: {parameters:,} parameters, {len(budget.costs.by_layer)} blocks",
        "scope": f"{cfg.sparsity.scope}: {scope:,} parameters in units",
        "blocks": f"{len(budget.costs.removed_layers)} are removed as a whole"
        if "blocks" in cfg.sparsity.scope
        else "",
        "removes": f"at most {most:,} parameters: the run finds the sparsity that keeps {cfg.sparsity.target}"
        if quality
        else f"{plan.removed:,} parameters: {plan.removed / scope:.1%} of the scope, "
        f"{plan.removed / parameters:.1%} of the model",
        "quality": searched(cfg) if quality else "",
        "speed": "" if quality else predicted_speed(plan),
        "widths": "" if quality else expected_widths(cfg, budget),
        "stays": what_stays(plan),
        "exports": f"{'at most ' if quality else ''}{left:,} parameters: "
        f"{left * getattr(torch, dtype).itemsize / 1e6:,.1f} MB in {dtype}",
        "text": counted_text(plan),
        "learns in": f"{cfg.trainer.precision} ({plan.why_precision})",
        "evaluates": f"{1 + len(cfg.stages)} models on {len(cfg.corpora.evaluate)} corpora",
        "forward": f"at most {plan.forward_tokens:,} tokens; fewer where the cache has results",
        "and backward": f"{plan.forward_backward_tokens:,} tokens",
        "compute": compute_time(plan),
        "memory": memory_line(plan),
        "results": cfg.folder,
    }
    return "\n".join(f"{name:12} {line}" for name, line in lines.items() if line)


def searched(cfg: RunConfig) -> str:
    """Describe the cost of the search for a quality target."""
    found = f"at most {searches(cfg) * TRIES} models after {cfg.training_free_recovery}, usually a third of them"
    if recovery_of(cfg.recovery).learns:
        found += f", and {LEARNED_TRIES} after {cfg.recovery}, usually 2, or more if none keeps the quality"
    corpora = ", ".join(cfg.development_corpora)
    return f"{found}, each on {development_tokens(cfg):,} tokens of development text ({corpora})"


def counted_text(plan: Plan) -> str:
    """Check that corpora on this machine have enough text, by cutting the windows of the run.

    Raises:
        UserError: if text is missing or too short.
    """
    cfg = plan.cfg
    corpora, m = dict.fromkeys([*cfg.train_corpora, *cfg.corpora.evaluate]), cfg.model
    elsewhere = [name for name in corpora if not is_local(name)]
    try:
        tokenizer = AutoTokenizer.from_pretrained(locate_model(m.name), trust_remote_code=m.trust_remote_code)
    except Exception:  # tokenizers and the hub raise many classes
        return f"not counted, because the tokenizer of {m.name} cannot be loaded"
    prepare_text(cfg, tokenizer, plan.skeleton.get_input_embeddings().num_embeddings, without=elsewhere)
    said = f"{len(corpora) - len(elsewhere)} corpora have enough windows"
    return f"{said}; not counted, because they are not on this machine: {', '.join(elsewhere)}" if elsewhere else said


def predicted_speed(plan: Plan) -> str:
    """Predict the speed at uniform sparsity from the latency table, if there is one."""
    if not plan.pricing.device_available or plan.pricing.speed is None:
        return "not measured; --sparsity.target 1.2x measures it"
    price = price_from_table(plan.pricing.speed, blocks_of(plan.skeleton))
    gone = replace(plan.budget.costs, price=price).removed(uniform_masks(plan.budget))
    return f"{price.model / (price.model - gone):.2f}x of dense by the table ({plan.cfg.speed})"


def expected_widths(cfg: RunConfig, budget: Budget) -> str:
    """Describe how many neurons and KV groups blocks keep if every module has the same sparsity."""
    if ALLOCATION[cfg.base_allocation].whole_blocks:
        return "whole blocks are removed, and part of one"
    masks = uniform_masks(budget.rest)
    n, g = ([int(mask.sum()) for mask in of_blocks] for of_blocks in (masks.ffn, masks.attention))
    neurons, groups = max(map(len, masks.ffn)), max(map(len, masks.attention))
    kept = f"{min(n)} to {max(n)} of {neurons} neurons and {min(g)} to {max(g)} of {groups}"
    return f"{kept} KV groups per block, at uniform sparsity"


def what_stays(plan: Plan) -> str:
    """Describe FFN and attention layers that are not pruned, and their size; empty if all of them are pruned."""
    costs, model = plan.budget.costs, plan.skeleton
    lacking = [("FFN", costs.neurons)] + [("attention", costs.groups)] * ("attention" in plan.cfg.sparsity.scope)
    said = [
        f"{name} of {missing} of {len(costs.by_layer)} layers, without units that can be removed"
        for name, units in lacking if (missing := sum(not any(units[b] for b in own) for own in costs.by_layer))
    ]  # fmt: skip
    for path, staying in find_unpruned(model).items():
        share = staying.parameters / model.num_parameters()
        said.append(f"{path} in {staying.layers} layers ({staying.why}): {share:.1%} of the model")
    return "; ".join(said)


def compute_time(*plans: Plan) -> str:
    """Describe FLOPs and the expected time on this machine.

    The time is measured on two blocks of the model in the precisions of the run. For large models, or with
    --plan.tflops, it is computed from the speed of matrix products of the first plan's sizes.
    """
    plan = plans[0]
    cfg, config, total = plan.cfg, plan.skeleton.config.get_text_config(decoder=True), sum(map(flops, plans))
    if cfg.plan.tflops:
        reached, how = 1e12 * cfg.plan.tflops, "--plan.tflops"
    elif None not in (measured := [run_seconds(one) for one in plans]):
        precisions = dict.fromkeys([cfg.model.dtype, cfg.trainer.precision])
        time = timedelta(seconds=math.ceil(sum(measured)))
        return (
            f"at most {total:.2e} FLOP: {time} by two blocks measured on {plan.device} ({', '.join(precisions)}); "
            "time for files and for solving least squares is not included"
        )
    elif plan.pricing.device_available:
        shape = max(plan.budget.costs.neurons), config.hidden_size
        reached = matmul_flops(plan.device, getattr(torch, cfg.model.dtype), shape)
        how = f"the speed of matrix products of {cfg.model.dtype} on {plan.device}"
    else:
        return f"at most {total:.2e} FLOP; time: unknown without --plan.tflops, as this machine has no GPU"
    time = timedelta(seconds=math.ceil(total / (reached * cfg.processes)))
    return f"at most {total:.2e} FLOP: {time} at {reached:.2e} FLOP/s per process, {how}; other work is not included"


def flops(plan: Plan) -> float:
    """Upper bound of the FLOPs of a run's passes and Gram matrices: nothing is pruned, all weights have gradients.

    A multiply-add counts as 2. A forward token needs 2 x weights of the blocks (active experts only), 4 T C for
    attention over T tokens, and 2 V H for the head. Backward needs twice as much. Gram matrices need two thirds of
    2 (N^2 + C^2).
    """
    cfg, config, blocks = plan.cfg, plan.skeleton.config.get_text_config(decoder=True), blocks_of(plan.skeleton)
    token = 2.0 * config.vocab_size * config.hidden_size
    for block in blocks:
        ffn, attention = (
            sum(part.out_features * part.in_features for name, part in block.parts.items() if name in names)
            for names in (PARTS["ffn"], PARTS["attention"])
        )
        active = min(getattr(config, "num_experts_per_tok", 1), block.experts) / block.experts
        token += 2 * (attention + ffn * active) + 4 * cfg.corpora.seq_len * block.channels
    total = passes(plan.forward_tokens, plan.forward_backward_tokens) * token
    if "gram" in cfg.collects:
        total += calibration_tokens(cfg) * sum(4 / 3 * (b.neurons**2 + b.channels**2) for b in blocks)
    return total


def matmul_flops(device: torch.device, dtype: torch.dtype, shape: tuple[int, int], *, seconds: float = 0.5) -> float:
    """Measure the FLOP/s of products of 512 tokens with a weight of a shape (out, in).

    A forward pass is slower, because of element-wise operations, attention and synchronization.
    """
    tokens, weight = (torch.ones(n, shape[1], dtype=dtype, device=device) for n in (512, shape[0]))
    timer = Timer(
        "tokens @ weight.T", globals={"tokens": tokens, "weight": weight}, num_threads=torch.get_num_threads()
    )
    return 2.0 * len(tokens) * weight.numel() / timer.blocked_autorange(min_run_time=seconds).mean
