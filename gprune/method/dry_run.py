"""Text of `--dry_run`: widths, parameters, bytes, tokens and peak memory of a plan.

`tests/method/test_memory.py` compares the memory with real runs. Sizes: H hidden size, V vocabulary, L layers; N active
neurons of the widest layer, and C the largest number of attention channels. `weight` is the bytes of a weight in
`--model.dtype`, and `activation` those of a number in the precision of training.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import NamedTuple

import torch
from transformers import AutoTokenizer

from gprune.calibration.block_errors import error_corpora, error_tokens
from gprune.calibration.statistics import gram_bytes
from gprune.checks import memory_limits
from gprune.corpora import is_local
from gprune.corpora.load import corpus_labels, load_corpus
from gprune.corpora.windows import count_tokens
from gprune.method.experts import expert_lines
from gprune.method.inputs import prepare_text
from gprune.method.plan import Plan, describe_unpruned, device_memory
from gprune.models.copies import skeleton
from gprune.models.experts import active_share
from gprune.models.loading import locate_model
from gprune.models.losses import CHUNK
from gprune.models.offload import bytes_per_pass
from gprune.recoveries import recovery_needs
from gprune.sparsity.budget import Budget
from gprune.sparsity.cut import uniform_masks
from gprune.stages.student import adapted_layers, trained_weights

GIB = 2**30
MEMORY_SAVERS = {  # step -> flags that lower its peak most
    "calibrate": "--corpora.batch_size 1, --model.dtype bfloat16 or --model.device_map auto",
    "errors": "--corpora.batch_size 1 or --sparsity.allocation uniform",
    "learn": "--corpora.batch_size 1 or --sparsity.allocation uniform",
    "recover": "--recovery least_squares or, with the package peft, --distill.targets lora",
    "evaluate": "--model.dtype bfloat16 or --model.device_map auto",
}


def describe(plan: Plan) -> str:
    """Return the text of `--dry_run`: one line per property of a plan. Properties without a text are left out."""
    cfg, budget = plan.cfg, plan.budget
    parameters, dtype = plan.skeleton.num_parameters(), plan.pricing.exported_dtype
    lines = {
        "model": f"{cfg.model.name}: {parameters:,} parameters, {len(budget.of_kind('layer'))} blocks",
        "scope": f"{cfg.sparsity.scope}: {budget.total_parameters:,} parameters in units",
    }
    if "blocks" in cfg.sparsity.scope:
        lines["blocks"] = f"{len(budget.removed)} are removed as a whole"
    if "experts" in cfg.sparsity.scope:
        lines |= expert_lines(plan)
    lines |= describe_target(plan)
    if cfg.searches_quality:  # the result is not known, so costs are upper bounds, as if almost nothing were removed
        plan = replace(plan, budget=plan.budget.removing(plan.budget.step))
    else:
        lines.setdefault("widths", describe_widths(plan.budget))
    stages = ["dense", *(["pruned"] if cfg.measures_pruned else []), cfg.final_stage]
    remaining = parameters - plan.removed
    size = f"{remaining * getattr(torch, dtype).itemsize / 1e6:,.1f} MB in {dtype}"
    lines |= {
        "stays": describe_unpruned(plan),
        "exports": f"{'at most ' if cfg.searches_quality else ''}{remaining:,} parameters: {size}",
        "text": describe_text(plan),
        "learns in": f"{cfg.trainer.precision} ({plan.why_precision})",
        "evaluates": f"the model on {len(cfg.corpora.evaluate)} corpora: {', '.join(stages)}",
        "forward": f"at most {plan.forward_tokens:,} tokens; fewer where the cache has results",
        "and backward": f"{plan.forward_backward_tokens:,} tokens",
        "loads": describe_loading(plan),
        **memory_lines(plan),
        "results": cfg.folder,
    }
    return "\n".join(f"{name:16} {line}" for name, line in lines.items() if line)


def describe_target(plan: Plan) -> dict[str, str]:
    """Return how many parameters are removed at uniform sparsity, or how the run searches for a quality."""
    cfg = plan.cfg
    if not cfg.searches_quality:
        return {"removes": plan.describe_removed()}
    text = f"{plan.development_tokens:,} tokens of development text ({', '.join(cfg.development_corpora)})"
    target = cfg.sparsity.target
    kept = f"{target} on every development corpus" if cfg.sparsity.limit == "worst" else target
    return {
        "removes": f"at most {plan.removed:,} parameters: the run finds the sparsity that keeps {kept}",
        "quality": f"at most {plan.searched_models} models after {cfg.training_free_recovery}, each on {text}",
    }


def describe_text(plan: Plan) -> str:
    """Describe how many tokens each corpus has and how many the run needs, one line per split.

    Corpora that would have to be downloaded are named and not read. Raise UserError if another one has too little text.
    """
    cfg, m = plan.cfg, plan.cfg.model
    corpora = dict.fromkeys([*cfg.train_corpora, *cfg.corpora.evaluate])
    to_download = [name for name in corpora if not is_local(name)]
    try:
        tokenizer = AutoTokenizer.from_pretrained(locate_model(m.name), trust_remote_code=m.trust_remote_code)
    except Exception:  # tokenizers and the hub raise many classes
        tokenizer = None
    if tokenizer is None or tokenizer.vocab_size < 2:  # for some types transformers makes an empty one from a config
        return f"not counted, because the tokenizer of {m.name} cannot be loaded"
    text = prepare_text(cfg, tokenizer, plan.skeleton.get_input_embeddings().num_embeddings, without=to_download)
    needed: dict[tuple[str, str], int] = {}
    for w in [*text.train.values(), *text.learn, *text.fresh, *text.development, *text.test]:
        needed[w.corpus, w.split] = max(needed.get((w.corpus, w.split), 0), w.tokens.numel())
    labels = corpus_labels(corpora)
    lines = [
        f"{labels[corpus]} ({split}): {count_tokens(load_corpus(corpus, split), tokenizer)} tokens, {number:,} needed"
        for (corpus, split), number in sorted(needed.items(), key=lambda item: list(corpora).index(item[0][0]))
    ]
    if to_download:
        lines.append(f"not counted, because they are not on this machine: {', '.join(to_download)}")
    return ("\n" + " " * 17).join(lines)


def describe_widths(budget: Budget) -> str:
    """Describe how many neurons and KV groups blocks keep if all of them are equally sparse."""
    masks = uniform_masks(budget.rest)
    kept_neurons = [int(mask.sum()) for mask in masks.ffn]
    kept_groups = [int(mask.sum()) for mask in masks.attention]
    neurons, groups = max(map(len, masks.ffn)), max(map(len, masks.attention))
    of_neurons = f"{min(kept_neurons)} to {max(kept_neurons)} of {neurons} neurons"
    of_groups = f"{min(kept_groups)} to {max(kept_groups)} of {groups} KV groups"
    grid = "" if budget.width_multiple == 1 else f", in multiples of {budget.width_multiple} neurons"
    return f"{of_neurons} and {of_groups} per block, at uniform sparsity{grid}"


def describe_loading(plan: Plan) -> str:
    """Describe how many bytes of weights a forward pass loads with `--model.device_map`; empty if it loads none."""
    m = plan.cfg.model
    if m.device_map is None:
        return ""
    limits = None if m.max_memory is None else memory_limits(m.max_memory)
    model = skeleton(plan.skeleton.config, type(plan.skeleton)).to(getattr(torch, m.dtype))
    loaded = bytes_per_pass(model, m.device_map, limits)
    passes = f"; {len(plan.gram_ranges)} passes of calibration, one per range of layers" if plan.gram_ranges else ""
    if not loaded:
        return passes.removeprefix("; ")
    return f"{loaded / 1e6:,.1f} MB of weights per batch, so use a large --corpora.batch_size{passes}"


class Memory(NamedTuple):
    """Bytes in one step."""

    weights: float  # of all models in memory at once, with copies for autocast
    gradients_and_optimizer: float
    gram_matrices: float
    activations: float  # with logits and cached hidden states


def memory_lines(plan: Plan) -> dict[str, str]:
    """Return the step with the highest peak, whether this machine has as much, and the four terms of the peak."""
    if plan.cfg.model.device_map is not None:
        return {"memory": "not counted with --model.device_map; see docs/large_models.md"}
    step, terms = max(estimated_peaks(plan).items(), key=lambda item: sum(item[1]))
    owner, of_owner = ("this machine", "") if plan.device.type == "cpu" else ("each GPU", " of each GPU")
    text = f"about {sum(terms) / GIB:,.1f} GiB{of_owner} in the step {step}"
    if plan.pricing.device_available:
        available = device_memory(plan.device)
        saver = "" if sum(terms) <= available else f"; try {MEMORY_SAVERS[step]} (docs/large_models.md)"
        text += f"; {owner} has {available / GIB:,.1f} GiB{saver}"
    by_term = [f"{value / GIB:,.2f} {name.replace('_', ' ')}" for name, value in terms._asdict().items()]
    return {"memory": text, "of which": f"GiB: {', '.join(by_term)}"}


def estimated_peaks(plan: Plan) -> dict[str, Memory]:
    """Estimate the memory by step: of each device, or of all processes that share main memory."""
    estimate, cfg = MemoryEstimate(plan), plan.cfg
    peaks = {"calibrate": estimate.calibrate(), "evaluate": estimate.evaluate()}
    if cfg.measures_errors:
        peaks["errors"] = estimate.measure_errors()
    if cfg.learns:
        peaks["learn"] = estimate.learn()
    if recovery_needs(cfg.recovery) or cfg.recovery_learns:
        peaks["recover"] = estimate.distill() if cfg.recovery_learns else estimate.recover()
    processes = cfg.trainer.devices if estimate.cpu else 1  # processes that share the memory
    return {step: Memory(*(processes * term for term in terms)) for step, terms in peaks.items()}


class MemoryEstimate:
    """Estimates of the terms of `Memory`, in one process."""

    def __init__(self, plan: Plan):
        cfg, budget = plan.cfg, plan.budget
        config = plan.skeleton.config.get_text_config(decoder=True)
        self.plan, self.cfg, self.budget = plan, cfg, budget
        self.cpu = plan.device.type == "cpu"
        self.H, self.V, self.L = config.hidden_size, config.vocab_size, len(budget.of_kind("layer"))
        self.C = max(len(u.slices[-1].unit) if u.reads else 0 for u in budget.of_kind("kv_groups"))
        neurons = [0.0] * self.L
        for u in budget.of_kind("neurons"):
            neurons[u.layer] += u.size * active_share(config, u)
        self.N = max(neurons)
        self.autocast = cfg.trainer.precision == "bf16-mixed"
        self.weight = getattr(torch, cfg.model.dtype).itemsize
        self.activation = 2 if self.autocast else self.weight
        self.parameters = plan.skeleton.num_parameters()
        self.kept_parameters = self.parameters - plan.removed
        self.kept_share = 1 - plan.removed / budget.total_parameters
        # Copies in bfloat16 of frozen float32 weights
        self.cast = 2 * self.parameters if self.autocast and self.weight == 4 else 0

    def tokens_of(self, batch_size: int) -> int:
        """Tokens of a batch in one process."""
        return math.ceil(batch_size / self.cfg.processes) * self.cfg.corpora.seq_len

    def layer(self, tokens: int, *, activation: int, kept_share: float = 1.0) -> float:
        """Activations of one layer that its backward pass needs, in bytes.

        A token has 4 H numbers in float32, and 4 (N + C) numbers of `activation` bytes.
        """
        return tokens * (16 * self.H + 4 * activation * (kept_share * self.N + self.C))

    def chunk_logits(self, *, teacher: bool) -> float:
        """Logits of a chunk of tokens and their gradients, with those of a teacher, in float32."""
        return 8 * CHUNK * self.V * (1 + teacher)

    @property
    def grams(self) -> float:
        """Gram matrices in memory after calibration: of all corpora on the CPU, or of one block on a GPU."""
        if "gram" not in self.cfg.needs:
            return 0
        of_one_corpus, corpora = gram_bytes(self.budget.units), max(1, len(self.cfg.calibration_corpora))
        return of_one_corpus * corpora if self.cpu else of_one_corpus / self.L

    @property
    def forecasts(self) -> float:
        """Hidden states of the dense model on the text of the evaluation; with a GPU they are in main memory."""
        tokens = self.cfg.evaluated_tokens
        return self.weight * self.H * tokens if self.cpu and self.plan.keeps_forecasts else 0

    def learn(self) -> Memory:
        """Threshold learning: activations of all layers. Gates and their moments are small."""
        layer = self.layer(self.tokens_of(self.cfg.corpora.batch_size), activation=self.activation)
        return Memory(
            weights=self.weight * self.parameters + self.cast,
            gradients_and_optimizer=0,
            gram_matrices=self.grams,
            activations=self.L * layer + self.chunk_logits(teacher=self.cfg.sparsity.loss == "kl"),
        )

    def calibrate(self) -> Memory:
        """Collecting statistics: one layer at a time or, for gradients, all layers."""
        cfg, tokens = self.cfg, self.tokens_of(self.cfg.corpora.batch_size)
        with_gradients = "saliency" in cfg.needs
        activations = self.learn().activations if with_gradients else self.layer(tokens, activation=self.weight)
        return Memory(
            weights=self.weight * self.parameters,
            # float32 sums of both halves of a corpus
            gradients_and_optimizer=8 * self.budget.total_parameters * ("saliency" in cfg.needs),
            # A GPU has those of one corpus at a time.
            gram_matrices=self.grams if self.cpu else self.L * self.grams,
            activations=activations,
        )

    def measure_errors(self) -> Memory:
        """Errors of blocks: activations of all layers, and inputs of all output projections of FFNs in bfloat16."""
        tokens = max(error_tokens(self.cfg, name) for name in error_corpora(self.cfg))
        learn = self.learn()
        return learn._replace(activations=learn.activations + 2 * self.L * self.N * tokens)

    def recover(self) -> Memory:
        """Recovery without training: equations of 12 N^2 bytes for the widest block, of N neurons."""
        return Memory(
            weights=self.weight * (self.parameters + self.kept_parameters),
            gradients_and_optimizer=0,
            gram_matrices=self.grams + 12 * max(u.count for u in self.budget.of_kind("neurons")) ** 2,
            activations=self.forecasts,
        )

    def distill(self) -> Memory:
        """Distillation of a student in float32 by AdamW."""
        d, tokens = self.cfg.distill, self.tokens_of(self.cfg.distill.batch_size)
        layer = self.layer(tokens, activation=4, kept_share=self.kept_share)
        layers = layer + self.L * tokens * 4 * self.H if d.checkpointing else self.L * layer
        trained = self.trained_parameters
        cast = self.cast + 2 * (self.H * self.V + trained) * self.autocast  # also of the student
        # Gradients and two moments. A GPU updates all weights at once, in copies.
        bytes_trained = (12 if self.cpu else 16) * trained
        return Memory(
            weights=self.weight * self.parameters + 4 * self.kept_parameters + cast,
            gradients_and_optimizer=bytes_trained / (self.cfg.processes if self.cfg.trainer.strategy == "fsdp" else 1),
            gram_matrices=self.grams,
            activations=self.forecasts + layers + self.chunk_logits(teacher=True),
        )

    @property
    def trained_parameters(self) -> float:
        """Number of parameters that distillation trains in the pruned model; adapters are those of the dense model."""
        d, model = self.cfg.distill, self.plan.skeleton
        if d.targets == "lora":
            return d.rank * sum(sum(layer.weight.shape) for layer in adapted_layers(model))
        numbers = sum(parameter.numel() for _, parameter in trained_weights(model, d.targets))
        return numbers - self.plan.removed if d.targets == "all" else numbers * self.kept_share

    def evaluate(self) -> Memory:
        """Evaluation of the pruned model: logits of one window and a copy, and on a GPU their float32 softmax."""
        logits = self.cfg.evaluation.seq_len * self.V * (2 * self.weight if self.cpu else 2 * self.weight + 8)
        tokens = self.tokens_of(self.cfg.corpora.batch_size)
        return Memory(
            weights=self.weight * (self.parameters + self.kept_parameters),
            gradients_and_optimizer=0,
            gram_matrices=self.grams,
            activations=self.forecasts + self.layer(tokens, activation=self.weight) + logits,
        )
