"""Expected time of a run: seconds per token of forward passes and training steps, measured on a few blocks."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from gprune.checks import select_options
from gprune.config import DistillConfig
from gprune.corpora.windows import Windows
from gprune.errors import first_line
from gprune.evaluation.perplexity import Forecast, perplexity
from gprune.models.autocast import CastWeights
from gprune.models.blocks import blocks_of, decoder_layers
from gprune.models.losses import final_hidden, next_token_losses
from gprune.models.masks import Masks
from gprune.models.products import fast_products
from gprune.models.surgery import prune
from gprune.pipeline.cost import caches_teacher, calibration_tokens, evaluated_tokens, fresh_tokens
from gprune.pipeline.plan import Plan
from gprune.recoveries import recovery_of
from gprune.sparsity.allocation import ALLOCATION
from gprune.sparsity.cut import uniform_masks
from gprune.sparsity.gates import gated
from gprune.stages.student import Student

log = logging.getLogger("gprune")
# Number of blocks, with random weights, that are timed. The weights of two small blocks stay in the processor's cache:
# by two blocks of SmolLM2, a training step in bfloat16 seems 1.5 times as fast as the step of the whole model is.
MIN_TIMED_BLOCKS, MAX_TIMED_BLOCKS = 2, 6
LONG_CALL = 1.0  # seconds after which a call is not repeated
MAX_TIMED_PARAMETERS = 3 * 10**8  # in blocks, embeddings and head, so that a dry run takes about a minute or less


class Pace(NamedTuple):
    """Seconds per token of one model."""

    forward: float  # blocks, in --model.dtype
    evaluated: float  # blocks, head, softmax and KL, in --model.dtype
    developed: float  # the same in the precision of training
    teacher: float  # blocks in the precision of training, without gradients
    learned: float  # forward, backward and optimizer step
    salient: float  # forward and backward in --model.dtype; 0 if the run does not collect saliency


def run_seconds(plan: Plan) -> float | None:
    """Estimate the seconds of passes, training and Gram matrices of a run on this machine; None if not measured.

    Reading, writing, and solving least squares are not included.
    """
    cfg = plan.cfg
    whole_blocks = ALLOCATION[cfg.base_allocation].whole_blocks
    if (
        not num_timed_blocks(plan)
        or whole_blocks
        or not plan.pricing.device_available
        or cfg.model.device_map is not None
    ):
        return None
    try:
        dense, pruned = _measured_paces(plan)
        gram = _gram_seconds(plan) if "gram" in cfg.collects else 0.0
    except Exception as error:  # code of a model may raise any class; the plan is complete without a time
        log.debug("The time of blocks cannot be measured: %s", first_line(error))
        return None
    seconds = _seconds_before_recovery(plan, dense) + calibration_tokens(cfg) * gram
    trial_forward, trial_trained = plan.tokens.get(8, (0, 0))  # trials for a quality target
    seconds += trial_forward * pruned.evaluated + trial_trained * pruned.learned
    return (seconds + _seconds_of_rows(plan, dense, pruned)) / cfg.processes


def num_timed_blocks(plan: Plan) -> int:
    """Return how many blocks are timed; 0 if even the smallest number of blocks is too large to time."""
    layers = len(plan.budget.costs.by_layer)
    block_parameters = sum(block.cost for block in blocks_of(plan.skeleton)) / layers
    tables = {plan.skeleton.get_input_embeddings().weight, plan.skeleton.get_output_embeddings().weight}  # one if tied
    embeddings_and_head = sum(table.numel() for table in tables)
    affordable = int((MAX_TIMED_PARAMETERS - embeddings_and_head) / block_parameters)
    return min(MAX_TIMED_BLOCKS, affordable, layers) if affordable >= MIN_TIMED_BLOCKS else 0


def _seconds_before_recovery(plan: Plan, dense: Pace) -> float:
    """Estimate the seconds of passes in steps 1, 2 and 7, which all compute the dense model."""
    calibration, saliency = plan.tokens[1]
    block_choice, block_errors = plan.tokens[2]
    curve, learning = plan.tokens[7]
    kl_teacher = learning if plan.cfg.sparsity.loss == "kl" else 0  # is included in `curve`
    return (
        (calibration + block_choice) * dense.forward
        + saliency * dense.salient
        + (block_errors + learning) * dense.learned
        + (curve - kl_teacher) * dense.developed
        + kl_teacher * dense.teacher
    )


def _seconds_of_rows(plan: Plan, dense: Pace, pruned: Pace) -> float:
    """Estimate the seconds of passes in steps 9 and 10: recovery and evaluation of all rows.

    Args:
        plan: the plan, with the tokens of the two steps.
        dense: seconds per token of the dense model.
        pruned: seconds per token of a pruned model.
    """
    cfg, config = plan.cfg, plan.skeleton.config.get_text_config(decoder=True)
    forward = sum(plan.tokens[step][0] for step in (9, 10))
    trained = sum(plan.tokens[step][1] for step in (9, 10))
    evaluated = evaluated_tokens(cfg) * len(cfg.stages)
    dense_evaluated = min(max(0, forward - evaluated), evaluated_tokens(cfg))
    distilled = sum(recovery_of(recovery).uses_teacher for _, recovery in cfg.stages)
    teacher_passes = min(1, distilled) if caches_teacher(cfg, config.hidden_size) else distilled
    teacher = fresh_tokens(cfg) * teacher_passes
    development = max(0, forward - evaluated - dense_evaluated - teacher)
    return (
        evaluated * pruned.evaluated
        + dense_evaluated * dense.evaluated
        + teacher * dense.teacher
        + development * pruned.developed
        + trained * pruned.learned
    )


def _measured_paces(plan: Plan) -> tuple[Pace, Pace]:
    """Return the paces of the dense model, which learns gates, and of a pruned model, which is distilled."""
    cfg, d = plan.cfg, plan.cfg.distill
    kept_share = 1 - plan.removed / plan.budget.costs.in_parameters.total
    settings = (
        cfg.model.name, cfg.model.dtype, cfg.trainer.precision, cfg.corpora.batch_size, d.batch_size,
        cfg.corpora.seq_len, cfg.evaluation.seq_len, round(kept_share, 2), cfg.sparsity.scope, d.targets, d.rank,
        d.checkpointing, "saliency" in cfg.collects,
    )  # fmt: skip
    if settings not in _PACES:
        _PACES[settings] = _time_blocks(plan)
    return _PACES[settings]


_PACES: dict[tuple, tuple[Pace, Pace]] = {}  # cache, because rows of a study list share settings


def _time_blocks(plan: Plan) -> tuple[Pace, Pace]:
    """Time a dense and a pruned model of a few blocks with random weights."""
    cfg, budget, layers = plan.cfg, plan.budget, num_timed_blocks(plan)
    dtype, vocabulary = getattr(torch, cfg.model.dtype), plan.skeleton.config.get_text_config(decoder=True).vocab_size

    def random_windows(count: int, length: int) -> Tensor:
        return torch.randint(vocabulary, (count, length), device=plan.device)

    with torch.random.fork_rng(devices=[]), torch.no_grad():
        dense = type(plan.skeleton)(_with_layers(plan.skeleton.config, layers)).to(plan.device, dtype)
        dense = dense.eval().requires_grad_(False)
        masks = uniform_masks(budget)
        blocks = sum(len(layer) for layer in budget.costs.by_layer[:layers])
        pruned = prune(dense, Masks(masks.ffn[:blocks], masks.attention[:blocks]))
        evaluated = random_windows(cfg.corpora.batch_size, cfg.evaluation.seq_len)
        learned = random_windows(cfg.corpora.batch_size, cfg.corpora.seq_len)
        distilled = random_windows(cfg.distill.batch_size, cfg.corpora.seq_len)
    forecasts: list[Forecast] = []
    perplexity(dense, Windows("random", "test", evaluated.cpu()), forecasts=forecasts)
    gated_step, student_step = _gated_step(dense, learned), _student_step(pruned, distilled, cfg.distill)
    return (
        _time_model(plan, dense, evaluated, [], gated_step, learned.numel()),
        _time_model(plan, pruned, evaluated, forecasts, student_step, distilled.numel()),
    )


def _time_model(
    plan: Plan, model: PreTrainedModel, text: Tensor, forecasts: list[Forecast], step: Callable[[bool], None],
    step_tokens: int,
) -> Pace:  # fmt: skip
    """Time one model of a few blocks, and scale the seconds of its blocks to all blocks of the plan.

    Args:
        plan: gives the number of blocks, the device, and the precision of training.
        model: the dense or the pruned model of a few blocks.
        text: evaluated windows, (B, T) int64.
        forecasts: the dense model's forecasts of the text, for KL; empty for the dense model.
        step: a training step; its argument is as for `_gated_step`.
        step_tokens: number of tokens of a training step.
    """
    scale = len(plan.budget.costs.by_layer) / len(decoder_layers(model))

    def evaluate() -> None:
        perplexity(model, Windows("random", "test", text.cpu()), forecasts=forecasts)

    def forward() -> None:
        with torch.no_grad():
            final_hidden(model, text)

    def per_token(whole: Callable[[], object], blocks: Callable[[], object], tokens: int) -> tuple[float, float]:
        """Return seconds per token of the whole model and of its blocks alone, for all blocks of the plan.

        Args:
            whole: a call of the model of a few blocks, with everything outside of them.
            blocks: the same without head and loss.
            tokens: number of tokens of a call.
        """
        whole_seconds, block_seconds = _seconds(whole, plan.device), _seconds(blocks, plan.device)
        outside_blocks = max(0.0, whole_seconds - block_seconds)
        return (outside_blocks + scale * block_seconds) / tokens, scale * block_seconds / tokens

    evaluated_pace, forward_pace = per_token(evaluate, forward, text.numel())
    salient_pace = 0.0
    if "saliency" in plan.cfg.collects:
        salient_pace, _ = per_token(partial(step, True), partial(step, False), step_tokens)
    with _training_precision(plan, model):
        developed_pace, teacher_pace = per_token(evaluate, forward, text.numel())
        learned_pace, _ = per_token(partial(step, True), partial(step, False), step_tokens)
    return Pace(forward_pace, evaluated_pace, developed_pace, teacher_pace, learned_pace, salient_pace)


def _with_layers(config: PreTrainedConfig, layers: int) -> PreTrainedConfig:
    """Return the configuration of a model that has only the first layers."""
    small, blocks = copy.deepcopy(config), config.num_hidden_layers
    small.num_hidden_layers = layers
    for name, value in list(vars(small).items()):
        if isinstance(value, list) and len(value) == blocks:  # per-layer settings, such as layer_types
            setattr(small, name, value[:layers])
    return small


@contextmanager
def _training_precision(plan: Plan, model: PreTrainedModel) -> Iterator[None]:
    """Context with the precision of training, including cast copies of frozen weights."""
    if plan.cfg.trainer.precision != "bf16-mixed":
        yield
        return
    with torch.autocast(plan.device.type, torch.bfloat16), CastWeights(model).applied():
        yield


def _gated_step(model: PreTrainedModel, ids: Tensor) -> Callable[[bool], None]:
    """Return a training step for gates of a frozen model on token ids (B, T).

    The argument of the step is whether the loss is computed by the head. Otherwise it is the mean of hidden states.
    """
    blocks = blocks_of(model)
    gates = [torch.ones(b.neurons * b.experts, device=ids.device, requires_grad=True) for b in blocks]

    def step(head: bool) -> None:
        with torch.enable_grad(), gated(model, gates):
            losses = next_token_losses(model, ids) if head else final_hidden(model, ids).float()
            losses.mean().backward()

    return step


def _student_step(model: PreTrainedModel, ids: Tensor, settings: DistillConfig) -> Callable[[bool], None]:
    """Return a distillation step with AdamW, for a copy of a model with its own hidden states as teacher.

    The argument of the step is whether the loss is KL by the head. Otherwise it is the mean of hidden states.
    """
    with torch.enable_grad():
        student = Student(copy.deepcopy(model), **select_options(Student, dict(settings)))
    casts = CastWeights(student.model)  # of weights that are not trained
    with torch.no_grad():
        teacher = final_hidden(student.model, ids)
    fused = ids.device.type in ("cpu", "cuda")
    optimizer = torch.optim.AdamW(list(student.learned.values()), lr=1e-12, fused=fused)  # hardly changes the weights

    def step(head: bool) -> None:
        """Compute loss and gradients, and update the student."""
        with torch.enable_grad(), casts.applied():
            if head:
                losses = next_token_losses(student.model, ids, teacher=teacher)
            else:
                losses = final_hidden(student.model, ids).float()
            losses.mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def _gram_seconds(plan: Plan) -> float:
    """Seconds per token of all float32 Gram matrices.

    Each takes two thirds of the time of a full matrix product, which is measured for the widest block. Activations in
    bfloat16 are multiplied by AMX if the processor has it.
    """
    blocks = blocks_of(plan.skeleton)
    widest = max(block.neurons for block in blocks)
    activations = torch.ones(512, widest, device=plan.device, dtype=getattr(torch, plan.cfg.model.dtype))
    inputs = activations.float()
    with fast_products(activations):
        full_product = _seconds(lambda: inputs.T @ inputs, plan.device) / len(inputs)
    squares = sum(b.neurons**2 * b.experts + b.channels**2 for b in blocks)
    return 2 / 3 * full_product * squares / widest**2


def _seconds(call: Callable[[], object], device: torch.device, *, at_least: float = 0.15) -> float:
    """Median time of a call, which is repeated at least three times and for `at_least` seconds.

    If the first call takes `LONG_CALL` seconds, its time is returned, because a warm-up then hardly matters.
    """

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    def timed() -> float:
        start = now()
        call()
        return now() - start

    warm_up = timed()
    if warm_up >= LONG_CALL:
        return warm_up
    times: list[float] = []
    while len(times) < 3 or sum(times) < at_least:
        times.append(timed())
    return median(times)
