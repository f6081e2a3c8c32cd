"""Peak memory of a run by step, from formulas that `tests/pipeline/test_memory.py` compares with real runs.

The formulas count weights, gradients, moments of AdamW, statistics, activations of a batch, and logits of a chunk of
tokens.
"""

from __future__ import annotations

import math

import torch

from gprune.calibration.layerwise import needs_walk
from gprune.calibration.statistics import gram_bytes
from gprune.models.autocast import count_cast_weights
from gprune.models.blocks import blocks_of, by_layer
from gprune.models.losses import CHUNK, rows_at_once
from gprune.pipeline.cost import active_experts, error_corpora, error_tokens, evaluated_tokens, fits_cache
from gprune.pipeline.plan import Plan
from gprune.pipeline.pricing import device_memory
from gprune.recoveries import recovery_of

GIB = 2**30
MEMORY_SAVERS = {  # step -> flags that lower its peak most
    "calibrate": "--corpora.batch_size 1, --model.dtype bfloat16 or --model.device_map auto",
    "learn": "--corpora.batch_size 1 or --sparsity.allocation uniform",
    "recover": "--distill.targets lora or --recovery least_squares",
    "evaluate": "--evaluation.controls '[]', --model.dtype bfloat16 or --model.device_map auto",
}


def memory_line(plan: Plan) -> str:
    """Describe the peaks, whether they fit into memory, and the flags that lower the highest peak."""
    cfg = plan.cfg
    if cfg.model.device_map is not None or cfg.model.shard:
        return "not counted with --model.device_map and --model.shard; see docs/large_models.md"
    available = cfg.plan.memory
    if available is None and plan.pricing.device_available:
        available = device_memory(plan.device)
    peaks = estimated_peaks(plan)
    owner = "this machine" if plan.device.type == "cpu" else "each GPU"
    by_step = ", ".join(f"{peak / GIB:,.1f} ({step})" for step, peak in peaks.items())
    estimate = f"about {by_step} GiB of {owner}"
    if available is None:
        return f"{estimate}; whether that fits: unknown without --plan.memory, as this machine has no GPU"
    if max(peaks.values()) <= available:
        return f"{estimate}: fits {available / GIB:,.1f} GiB"
    flags = MEMORY_SAVERS[max(peaks, key=peaks.get)]
    return f"{estimate}: does not fit {available / GIB:,.1f} GiB; try {flags} (docs/large_models.md)"


def estimated_peaks(plan: Plan) -> dict[str, float]:
    """Estimate the peak memory in bytes by step: of each device, or of all processes that share main memory."""
    estimate, cfg = MemoryEstimate(plan), plan.cfg
    peaks = {"calibrate": estimate.calibrate()}
    if cfg.learns:
        peaks["learn"] = estimate.learn()
    recovery = recovery_of(cfg.recovery)
    if recovery.learns:
        peaks["recover"] = estimate.distill()
    elif recovery.needs:
        peaks["recover"] = estimate.solve()
    peaks["evaluate"] = estimate.evaluate()
    processes = cfg.trainer.devices if estimate.cpu else 1  # processes that share the memory
    return {name: peak * processes for name, peak in peaks.items()}


class MemoryEstimate:
    """Peak memory of the steps of one process, in bytes.

    Short names: hidden size H, vocabulary size V, number of layers L; N active neurons in the widest layer, and C its
    attention channels; `weight` and `activation` are the bytes of one number. Factors of these sizes are bytes per
    token: 24 H, for example, are six float32 vectors of the hidden size.
    """

    def __init__(self, plan: Plan):
        cfg, costs, blocks = plan.cfg, plan.budget.costs, blocks_of(plan.skeleton)
        config = plan.skeleton.config.get_text_config(decoder=True)
        self.plan, self.cfg, self.costs = plan, cfg, costs
        self.cpu = plan.device.type == "cpu"
        self.H, self.V, self.L = config.hidden_size, config.vocab_size, len(costs.by_layer)
        self.C = max(block.channels for block in blocks)
        self.N = max(
            sum(block.neurons * active_experts(config, block) for block in layer) for layer in by_layer(blocks)
        )
        self.autocast = cfg.trainer.precision == "bf16-mixed"
        self.weight = getattr(torch, cfg.model.dtype).itemsize
        self.activation = 2 if self.autocast else self.weight
        self.kept_share = 1 - plan.removed / costs.in_parameters.total
        self.kept_parameters = plan.skeleton.num_parameters() - plan.removed
        self.batch_tokens = math.ceil(cfg.corpora.batch_size / cfg.processes) * cfg.corpora.seq_len
        self.gram = gram_bytes(blocks) if "gram" in cfg.collects else 0  # of one corpus
        self.corpora = max(1, len(cfg.calibration_corpora))
        self.layer_by_layer = needs_walk(plan.skeleton, corpora=self.corpora, gram=self.gram > 0)
        # On a GPU, or if statistics are collected layer by layer, Gram matrices do not stay in memory.
        self.grams_of_all_corpora = 0 if self.layer_by_layer or not self.cpu else self.gram * self.corpora
        # bfloat16 copies of frozen float32 weights
        self.cast_copies = 2 * count_cast_weights(plan.skeleton) * (self.autocast and self.weight == 4)

    @property
    def dense(self) -> float:
        """The dense model, and Gram matrices that stay in memory."""
        return self.weight * (self.kept_parameters + self.plan.removed) + self.grams_of_all_corpora

    @property
    def other_models(self) -> float:
        """Memory besides a row's model: the dense model with its forecasts, and the model of the main row."""
        main_row = self.weight * self.kept_parameters * (len(self.cfg.stages) > 1)
        tokens = evaluated_tokens(self.cfg)
        in_same_memory = self.cpu and fits_cache(self.cfg, tokens, self.H)  # with a GPU they are in main memory
        forecasts = self.weight * self.H * tokens * in_same_memory
        return self.dense + main_row + forecasts

    def head(self, bytes_per_logit: int, *, teacher: bool) -> int:
        """Logits of a chunk of tokens, of student and teacher, and float32 terms of the rows computed at once."""
        rows = rows_at_once(self.plan.device, self.V)
        return self.V * (CHUNK * bytes_per_logit * (1 + teacher) + rows * (8 + 12 * teacher))

    def learn(self) -> float:
        """Threshold learning: the dense model, activations of all layers for the backward pass, and the head."""
        activations = self.L * self.batch_tokens * (8 * self.H + 4 * self.activation * (self.N + self.C))
        head = self.head(self.activation, teacher=self.cfg.sparsity.loss == "kl")
        return self.dense + self.cast_copies + activations + head

    def calibrate(self) -> float:
        """Collecting statistics, or measuring errors of blocks if that needs more."""
        cfg, c = self.cfg, self.cfg.corpora
        if "saliency" in cfg.collects:
            peak = self.learn() + 8 * self.costs.in_parameters.total
        else:
            if self.layer_by_layer:  # Gram matrices of one layer, and hidden states of the corpus in main memory
                hidden_states = self.cpu * self.weight * self.H * c.num_samples * c.seq_len
                sums = self.gram / self.L + hidden_states
            else:  # Gram matrices of one corpus, which on a CPU are counted in `dense`
                sums = self.gram * (not self.cpu)
            per_neuron = 26 if self.gram else 2 * self.weight + 8
            peak = self.dense + sums + self.batch_tokens * (per_neuron * self.N + 4 * self.H)
        if cfg.measures_errors:  # a backward pass, and bfloat16 inputs of all output projections of FFNs
            tokens = max(error_tokens(cfg, name) for name in error_corpora(cfg))
            inputs = 2 * self.L * self.N * tokens
            peak = max(peak, self.learn() + inputs, self.dense + inputs + 40 * self.N**2)
        return peak

    def distill(self) -> float:
        """Distillation with AdamW."""
        d = self.cfg.distill
        tokens = math.ceil(d.batch_size / self.cfg.processes) * self.cfg.corpora.seq_len
        layer_activations = tokens * (24 * self.H + 16 * (self.kept_share * self.N + self.C))
        if d.checkpointing:  # all activations of one layer, and the inputs of every layer
            activations = layer_activations + self.L * tokens * 4 * self.H
        else:
            activations = self.L * layer_activations
        trained = trained_parameters(self.plan, self.kept_share)
        # On a GPU AdamW updates all parameters at once, and needs a copy of them.
        update = 0 if self.cpu else 4 * trained
        backward_or_update = max(activations + self.head(4, teacher=True), update)
        best_weights = 4 * trained * self.cpu * (d.keep == "best")  # a copy of the best weights so far, in main memory
        cast = self.cast_copies + self.autocast * 2 * (self.H * self.V + trained)  # of the student too
        student = 4 * self.kept_parameters + 12 * trained  # float32 weights, gradients and moments
        pooled_grams = self.grams_of_all_corpora / self.corpora
        return self.other_models + pooled_grams + student + best_weights + backward_or_update + cast

    def solve(self) -> float:
        """Least squares: the pruned model, and the matrices of the widest block's equations."""
        neurons = max(self.costs.neurons)
        kept_neurons = self.kept_share * neurons
        matrices = 4 * neurons**2 + 8 * kept_neurons**2 + (neurons - kept_neurons) * (4 * neurons + 12 * kept_neurons)
        pooled_grams = self.grams_of_all_corpora / self.corpora
        pruned = self.weight * self.kept_parameters
        return self.other_models + pooled_grams + pruned + (matrices if self.gram else 0)

    def evaluate(self) -> float:
        """Evaluation of a row: activations of a batch, and logits of one window."""
        per_logit = 2 * self.weight if self.cpu else 2 * self.weight + 8
        logits = self.cfg.evaluation.seq_len * self.V * per_logit
        activations = self.batch_tokens * 3 * self.weight * self.N
        return self.other_models + self.weight * self.kept_parameters + activations + logits


def trained_parameters(plan: Plan, kept_share: float) -> float:
    """Number of parameters that distillation trains in a model that keeps a share of its units."""
    d, blocks = plan.cfg.distill, blocks_of(plan.skeleton)
    parts = [part for block in blocks for part in block.parts.values()]
    return {
        "all": sum(block.cost for block in blocks) - plan.removed,
        "mlp": kept_share * sum(block.unit_cost("ffn") * block.neurons for block in blocks),
        "lora": d.rank * sum(part.in_features + part.out_features for part in parts),
    }[d.targets]
