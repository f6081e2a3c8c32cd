"""Peak memory of a run by step, from formulas that `tests/pipeline/test_memory.py` compares with real runs.

The formulas count weights, gradients, moments of AdamW, statistics, activations of a batch, and logits of a chunk of
tokens.
"""

from __future__ import annotations

import math
import os

import torch

from gprune.calibration.layerwise import needs_walk
from gprune.calibration.statistics import gram_bytes
from gprune.models.autocast import count_cast_weights
from gprune.models.blocks import blocks_of, by_layer
from gprune.models.losses import CHUNK, ROWS
from gprune.pipeline.cost import error_tokens, evaluated_tokens, keeps, measured_for
from gprune.pipeline.plan import Plan
from gprune.recoveries import recovery_of

GIB = 2**30
LOWER = {  # step -> flags that lower its peak most
    "calibrate": "--corpora.batch_size 1, --model.dtype bfloat16 or --model.device_map auto",
    "learn": "--corpora.batch_size 1 or --sparsity.allocation uniform",
    "recover": "--distill.targets lora or --recovery least_squares",
    "evaluate": "--evaluation.controls '[]', --model.dtype bfloat16 or --model.device_map auto",
}


def memory_line(plan: Plan) -> str:
    """Describe the peaks, whether they fit into memory, and the flags that lower the highest peak."""
    cfg, memory = plan.cfg, plan.cfg.plan.memory
    if cfg.model.device_map is not None or cfg.model.shard:
        return "not counted with --model.device_map and --model.shard; see docs/large_models.md"
    if memory is None and plan.pricing.device_available:
        cuda, pages = plan.device.type == "cuda", ("SC_PHYS_PAGES", "SC_PAGE_SIZE")
        memory = torch.cuda.mem_get_info(plan.device)[1] if cuda else math.prod(map(os.sysconf, pages))

    peaks, where = peaks_of(plan), "this machine" if plan.device.type == "cpu" else "each GPU"
    said = f"about {', '.join(f'{peak / GIB:,.1f} ({step})' for step, peak in peaks.items())} GiB of {where}"
    if memory is None:
        return f"{said}; whether that fits: unknown without --plan.memory, as this machine has no GPU"
    if max(peaks.values()) <= memory:
        return f"{said}: fits {memory / GIB:,.1f} GiB"
    ways = LOWER[max(peaks, key=peaks.get)]
    return f"{said}: does not fit {memory / GIB:,.1f} GiB; try {ways} (docs/large_models.md)"


def peaks_of(plan: Plan) -> dict[str, float]:
    """Estimate the peak memory in bytes by step: of each device, or of all processes that share main memory.

    H is the hidden size, N the number of active neurons in the widest layer, C its attention channels, V the vocabulary
    size.
    """
    cfg, costs, blocks = plan.cfg, plan.budget.costs, blocks_of(plan.skeleton)
    config = plan.skeleton.config.get_text_config(decoder=True)
    d, cpu, w = cfg.distill, plan.device.type == "cpu", getattr(torch, cfg.model.dtype).itemsize
    evaluated = evaluated_tokens(cfg)
    H, V, C, L = config.hidden_size, config.vocab_size, max(b.channels for b in blocks), len(costs.by_layer)
    routed = getattr(config, "num_experts_per_tok", None) or 1
    N = max(sum(b.neurons * min(routed, b.experts) for b in own) for own in by_layer(blocks))
    kept, left = 1 - plan.removed / costs.in_parameters.total, plan.skeleton.num_parameters() - plan.removed
    batch, step = (math.ceil(n / cfg.processes) * cfg.corpora.seq_len for n in (cfg.corpora.batch_size, d.batch_size))
    corpora, gram = max(1, len(cfg.calibration_corpora)), gram_bytes(blocks) if "gram" in cfg.collects else 0
    walked = needs_walk(plan.skeleton, corpora=corpora, gram=gram > 0)
    held = 0 if walked or not cpu else gram * corpora  # on a GPU, or block by block, Gram matrices are not kept

    def head(width: int, *, teacher: bool) -> int:
        """Bytes of logits of a chunk, and of float32 terms for the rows that are computed at once."""
        return V * (CHUNK * width * (1 + teacher) + (ROWS if cpu else CHUNK) * (8 + 12 * teacher))

    dense = w * (left + plan.removed) + held
    forecasts = w * H * evaluated * (cpu and keeps(cfg, evaluated, H))  # in main memory also with a GPU
    # Memory besides a row's model: the dense model, and the model of the main row.
    others = dense + w * left * (len(cfg.stages) > 1) + forecasts
    autocast = cfg.trainer.precision == "bf16-mixed"
    copies = 2 * count_cast_weights(plan.skeleton) * (autocast and w == 4)  # bfloat16 copies of frozen weights
    a = 2 if autocast else w  # bytes of an activation
    learn = dense + copies + L * batch * (8 * H + 4 * a * (N + C)) + head(a, teacher=cfg.sparsity.loss == "kl")
    sums = gram / L + cpu * w * H * cfg.corpora.num_samples * cfg.corpora.seq_len if walked else gram * (not cpu)
    calibrate = dense + sums + batch * ((26 if gram else 2 * w + 8) * N + 4 * H)
    if "saliency" in cfg.collects:
        calibrate = learn + 8 * costs.in_parameters.total
    if cfg.measures_errors:  # a backward pass, and the inputs of the FFN's output projections
        kept_tokens = 2 * L * N * max(error_tokens(cfg, name) for name in measured_for(cfg))
        calibrate = max(calibrate, learn + kept_tokens, dense + kept_tokens + 40 * N**2)
    peaks = {"calibrate": calibrate} | ({"learn": learn} if cfg.learns else {})
    method = recovery_of(cfg.recovery)
    if method.learns:
        layer = step * (24 * H + 16 * (kept * N + C))
        activations = layer + L * step * 4 * H if d.checkpointing else L * layer
        learned = learned_numbers(plan, kept)
        # On a GPU AdamW updates all parameters at once, and needs a copy of them.
        most = max(activations + head(4, teacher=True), 0 if cpu else 4 * learned)
        best = 4 * learned * cpu  # a copy of the best weights so far, in main memory
        cast = copies + autocast * 2 * (H * V + learned)  # cast copies of the student's head and trained weights
        peaks["recover"] = others + held / corpora + 4 * left + 12 * learned + best + most + cast
    elif method.needs:
        n, k = max(costs.neurons), kept * max(costs.neurons)
        solving = 4 * n**2 + 8 * k**2 + (n - k) * (4 * n + 12 * k)
        peaks["recover"] = others + held / corpora + w * left + (solving if gram else 0)
    logits = cfg.evaluation.seq_len * V * (2 * w if cpu else 2 * w + 8)
    peaks["evaluate"] = others + w * left + batch * 3 * w * N + logits
    return {name: peak * (cfg.trainer.devices if cpu else 1) for name, peak in peaks.items()}


def learned_numbers(plan: Plan, kept: float) -> float:
    """Number of parameters that distillation trains if a share `kept` of the units is kept."""
    d, blocks = plan.cfg.distill, blocks_of(plan.skeleton)
    parts = [part for block in blocks for part in block.parts.values()]
    return {
        "all": sum(block.cost for block in blocks) - plan.removed,
        "mlp": kept * sum(block.unit_cost("ffn") * block.neurons for block in blocks),
        "lora": d.rank * sum(part.in_features + part.out_features for part in parts),
    }[d.targets]
