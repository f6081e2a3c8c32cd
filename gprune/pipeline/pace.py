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
from gprune.models.blocks import blocks_of
from gprune.models.losses import final_hidden, next_token_losses
from gprune.models.masks import Masks
from gprune.models.surgery import prune
from gprune.pipeline.cost import caches_teacher, calibration_tokens, evaluated_tokens, fresh_tokens
from gprune.pipeline.plan import Plan
from gprune.recoveries import recovery_of
from gprune.sparsity.allocation import ALLOCATION
from gprune.sparsity.cut import uniform_masks
from gprune.sparsity.gates import gated
from gprune.stages.student import Student

log = logging.getLogger("gprune")
TIMED_BLOCKS = 2  # number of blocks, with random weights, that are timed
MOST = 3 * 10**8  # limit of the parameters in blocks, embeddings and head, so that a dry run takes less than a minute


class Pace(NamedTuple):
    """Seconds per token of one model."""

    forward: float  # blocks, in --model.dtype
    evaluated: float  # blocks, head, softmax and KL, in --model.dtype
    developed: float  # the same in the precision of training
    teacher: float  # blocks in the precision of training, without gradients
    learned: float  # forward, backward and optimizer step


def run_seconds(plan: Plan) -> float | None:
    """Estimate the seconds of passes, training and Gram matrices of a run on this machine; None if not measured.

    Reading, writing, and solving least squares are not included.
    """
    cfg, config = plan.cfg, plan.skeleton.config.get_text_config(decoder=True)
    numbers = sum(block.cost for block in blocks_of(plan.skeleton)) / config.num_hidden_layers * TIMED_BLOCKS
    too_many = numbers + 2 * config.vocab_size * config.hidden_size > MOST
    whole_blocks = ALLOCATION[cfg.base_allocation].whole_blocks
    if too_many or whole_blocks or not plan.pricing.device_available or cfg.model.device_map is not None:
        return None
    try:
        dense, pruned = _paces(plan)
        gram = _gram_seconds(plan) if "gram" in cfg.collects else 0.0
    except Exception as error:  # code of a model may raise any class; the plan is complete without a time
        log.debug("The time of two blocks cannot be measured: %s", first_line(error))
        return None
    (calibrated, salient), (tried, erred), (curve, learned) = (plan.tokens[step] for step in (1, 2, 7))
    seconds = (calibrated + tried) * dense.forward + (salient + erred) * dense.learned
    seconds += calibration_tokens(cfg) * gram
    teacher = learned if cfg.sparsity.loss == "kl" else 0
    seconds += (curve - teacher) * dense.developed + teacher * dense.teacher + learned * dense.learned
    forward, trained = plan.tokens.get(8, (0, 0))  # trials for a quality target
    seconds += forward * pruned.evaluated + trained * pruned.learned
    forward, trained = (sum(plan.tokens[step][kind] for step in (9, 10)) for kind in (0, 1))
    rows = evaluated_tokens(cfg) * len(cfg.stages)
    of_dense = min(max(0, forward - rows), evaluated_tokens(cfg))
    distilled = sum(recovery_of(recovery).uses_teacher for _, recovery in cfg.stages)
    teacher = fresh_tokens(cfg) * (min(1, distilled) if caches_teacher(cfg, config.hidden_size) else distilled)
    rest = max(0, forward - rows - of_dense - teacher)  # development text
    seconds += rows * pruned.evaluated + of_dense * dense.evaluated + teacher * dense.teacher
    return (seconds + rest * pruned.developed + trained * pruned.learned) / cfg.processes


def _paces(plan: Plan) -> tuple[Pace, Pace]:
    """Return the paces of the dense model, which learns gates, and of a pruned model, which is distilled."""
    cfg = plan.cfg
    kept = 1 - plan.removed / plan.budget.costs.in_parameters.total
    batches = cfg.corpora.batch_size, cfg.distill.batch_size, cfg.corpora.seq_len, cfg.evaluation.seq_len
    d = cfg.distill
    setting = (
        cfg.model.name, cfg.model.dtype, cfg.trainer.precision, *batches, round(kept, 2), cfg.sparsity.scope, d.targets,
        d.rank, d.checkpointing,
    )  # fmt: skip
    if setting not in _PACES:
        _PACES[setting] = _time_blocks(plan)
    return _PACES[setting]


_PACES: dict[tuple, tuple[Pace, Pace]] = {}  # cache, because rows of a study list share settings


def _time_blocks(plan: Plan) -> tuple[Pace, Pace]:
    """Time a dense and a pruned model of `TIMED_BLOCKS` blocks with random weights."""
    cfg, budget = plan.cfg, plan.budget
    dtype, vocabulary = getattr(torch, cfg.model.dtype), plan.skeleton.config.get_text_config(decoder=True).vocab_size
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        dense = type(plan.skeleton)(_fewer_blocks(plan.skeleton.config)).to(plan.device, dtype)
        dense = dense.eval().requires_grad_(False)
        masks = uniform_masks(budget)
        count = sum(len(own) for own in budget.costs.by_layer[:TIMED_BLOCKS])  # blocks
        few = Masks(masks.ffn[:count], masks.attention[:count])
        small = prune(dense, few)

        def windows(count: int, length: int) -> Tensor:
            return torch.randint(vocabulary, (count, length), device=plan.device)

        text = windows(cfg.corpora.batch_size, cfg.evaluation.seq_len)
        batch, step = (windows(n, cfg.corpora.seq_len) for n in (cfg.corpora.batch_size, cfg.distill.batch_size))
    forecasts: list[Forecast] = []
    perplexity(dense, Windows("random", "test", text.cpu()), forecasts=forecasts)
    steps = {"dense": _gated_step(dense, batch), "pruned": _student_step(small, step, cfg.distill)}
    paces, scale = [], len(budget.costs.by_layer) / TIMED_BLOCKS
    for name, model, beside, trained in (("dense", dense, [], batch), ("pruned", small, forecasts, step)):

        def evaluate(model: PreTrainedModel = model, beside: list[Forecast] = beside) -> None:
            perplexity(model, Windows("random", "test", text.cpu()), forecasts=beside)

        def forward(model: PreTrainedModel = model) -> None:
            with torch.no_grad():
                final_hidden(model, text)

        def per_token(whole: Callable[[], object], body: Callable[[], object], tokens: int) -> tuple[float, float]:
            """Return seconds per token of the whole model, and of all its blocks."""
            most, least = _seconds(whole, plan.device), _seconds(body, plan.device)
            return (max(0.0, most - least) + scale * least) / tokens, scale * least / tokens

        evaluated, alone = per_token(evaluate, forward, text.numel())
        with _learning(plan, model):
            developed, teacher = per_token(evaluate, forward, text.numel())
            learned, _ = per_token(partial(steps[name], True), partial(steps[name], False), trained.numel())
        paces.append(Pace(alone, evaluated, developed, teacher, learned))
    return tuple(paces)


def _fewer_blocks(config: PreTrainedConfig) -> PreTrainedConfig:
    """Return the configuration of a model with `TIMED_BLOCKS` blocks."""
    few, blocks = copy.deepcopy(config), config.num_hidden_layers
    few.num_hidden_layers = min(TIMED_BLOCKS, blocks)
    for name, value in list(vars(few).items()):
        if isinstance(value, list) and len(value) == blocks:  # per-layer settings, such as layer_types
            setattr(few, name, value[:TIMED_BLOCKS])
    return few


@contextmanager
def _learning(plan: Plan, model: PreTrainedModel) -> Iterator[None]:
    """Context with the precision of training, including cast copies of frozen weights."""
    if plan.cfg.trainer.precision != "bf16-mixed":
        yield
        return
    with torch.autocast(plan.device.type, torch.bfloat16), CastWeights(model).applied():
        yield


def _gated_step(model: PreTrainedModel, ids: Tensor) -> Callable[[bool], None]:
    """Return a training step for gates of a frozen model; without `head` the loss is the mean of hidden states."""
    blocks = blocks_of(model)
    gates = [torch.ones(b.neurons * b.experts, device=ids.device, requires_grad=True) for b in blocks]

    def step(head: bool) -> None:
        with torch.enable_grad(), gated(model, gates):
            (next_token_losses(model, ids) if head else final_hidden(model, ids).float()).mean().backward()

    return step


def _student_step(model: PreTrainedModel, ids: Tensor, settings: DistillConfig) -> Callable[[bool], None]:
    """Return a distillation step with AdamW, for a copy of a model with its own hidden states as teacher."""
    with torch.enable_grad():
        student = Student(copy.deepcopy(model), **select_options(Student, dict(settings)))
    learned = list(student.learned.values())
    with torch.no_grad():
        teacher = final_hidden(student.model, ids)
    optimizer = torch.optim.AdamW(learned, lr=1e-12, fused=ids.device.type in ("cpu", "cuda"))

    def step(head: bool) -> None:
        """One step with KL as loss, or without `head` with the mean of hidden states."""
        with torch.enable_grad():
            if head:
                losses = next_token_losses(student.model, ids, teacher=teacher)
            else:
                losses = final_hidden(student.model, ids).float()
            losses.mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def _gram_seconds(plan: Plan) -> float:
    """Seconds per token of all float32 Gram matrices; each needs two thirds of a full matrix product."""
    widest = max(block.neurons for block in blocks_of(plan.skeleton))
    inputs = torch.ones(512, widest, device=plan.device)
    squares = sum(b.neurons**2 * b.experts + b.channels**2 for b in blocks_of(plan.skeleton))
    return 2 / 3 * _seconds(lambda: inputs.T @ inputs, plan.device) / len(inputs) * squares / widest**2


def _seconds(call: Callable[[], object], device: torch.device, *, at_least: float = 0.15) -> float:
    """Median time of a call, which is repeated at least three times and for `at_least` seconds."""

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    call()
    times: list[float] = []
    while len(times) < 3 or sum(times) < at_least:
        start = now()
        call()
        times.append(now() - start)
    return median(times)
