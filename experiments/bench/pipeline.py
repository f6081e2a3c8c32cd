"""The steps of the method beside the bare forward and backward passes they cannot do without."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

import gprune
from gprune.calibration.collector import collect
from gprune.calibration.statistics import CorpusStatistics
from gprune.config import DistillConfig
from gprune.corpora.windows import Sample, load_windows
from gprune.importance.scores import score_units
from gprune.importance.weights import UnitWeights, ffn_weights
from gprune.models.blocks import Block, blocks_of
from gprune.models.loading import load_model
from gprune.models.losses import final_hidden, next_token_loss
from gprune.models.masks import Masks
from gprune.partition.drift import rank_drift
from gprune.partition.initial import initial_partition, parameter_embedding
from gprune.partition.objective import refinement_inputs
from gprune.partition.record import ModuleRanks
from gprune.partition.reliability import within_module_ranks
from gprune.sparsity.budget import Budget, unit_costs
from gprune.sparsity.cut import keep_masks
from gprune.sparsity.gates import gated
from gprune.sparsity.thresholds import start_thresholds
from gprune.stages.base import FrozenLMStage
from gprune.stages.distillation import DistillationStage
from gprune.stages.refinement import AssignmentRefinement
from gprune.stages.threshold_learning import Learning, ThresholdLearning

from .measure import MIB, Clock, Table, Timing, alternated, in_turn, peak_above
from .models import DTYPES, Settings, batches, model_of, random_llama, random_masks, tokens

GOALS = {
    "moments": 1.10,
    "moments and Gram": 1.6,
    "step, cross-entropy": 1.15,
    "step, mlp": 1.10,
    "step, all": 1.10,
}  # ratios
MEMORY_GOAL = 1.10  # of a step of distillation over the bare one
PARTITION_GOALS = 10.0, 2048.0  # seconds, MiB


def calibration(settings: Settings) -> list[Table]:
    """Statistics over the decoder alone, on the same batches."""
    model = model_of(settings)
    data = batches(tokens(model, settings.windows, settings.window, settings.seed), settings.batch_size)
    calls = {
        "decoder alone": lambda: decoder_alone(model, data),
        "moments": lambda: collect(model, data),
        "moments and Gram": lambda: collect(model, data, gram=True),
    }
    timing = alternated(calls, settings.repeats, settings.watch)
    count = settings.windows * settings.window
    rows = [
        [
            name, timing.median(name), count / timing.median(name), *against(timing, name, "decoder alone"),
            peak_above(call, settings.device) / MIB,
        ]
        for name, call in calls.items()
    ]  # fmt: skip
    shape = f"{settings.windows} windows of {settings.window} tokens, batches of {settings.batch_size}."
    header = ["", "seconds", "tokens/s", "over decoder", "rounds", "goal", "met", "peak above start, MiB"]
    return [Table("Calibration", f"{settings.protocol(model)} {shape}", header, rows)]


def against(timing: Timing, name: str, base: str) -> list[Any]:
    """Cells: ratio, spread, goal, met."""
    if name == base:
        return [1.0, "", None, None]
    goal, ratio = GOALS.get(name), timing.ratio(name, base)
    return [ratio, timing.spread(name, base), goal, None if goal is None else ratio <= goal]


@torch.no_grad()
def decoder_alone(model: PreTrainedModel, data: Sequence[dict[str, Tensor]]) -> None:
    """What calibration cannot do without: the decoder on every batch, without a head."""
    for batch in data:
        model.get_decoder()(input_ids=batch["input_ids"], use_cache=False)


def learning(settings: Settings) -> list[Table]:
    """A step of threshold learning over forward and activation-backward of the frozen model with the same loss."""
    model = model_of(settings)
    batch = batches(tokens(model, settings.batch_size, settings.window, settings.seed), settings.batch_size)[0]
    measures: dict[str, Callable[[], float]] = {}
    for loss in ("cross_entropy", "kl"):
        stage, name = threshold_stage(model, settings, loss), loss.replace("_", "-")
        measures[f"frozen model, {name}"] = partial(bare_step, model, batch, settings.watch, kl=loss == "kl")
        measures[f"step, {name}"] = partial(fit_step, stage, batch, settings.watch)
    timing = in_turn(measures, settings.repeats)
    count = batch["input_ids"].numel()
    plain = "frozen model, cross-entropy"
    rows = []
    for name in measures:
        same = "frozen model, " + name.split(", ")[1]
        rows.append(
            [
                name, timing.median(name), count / timing.median(name), *against(timing, name, same),
                timing.ratio(name, plain), peak_above(measures[name], settings.device) / MIB,
            ]
        )  # fmt: skip
    shape = (
        f"One step on {settings.batch_size} windows of {settings.window} tokens under Lightning's Trainer, optimizer "
        "and masks included. Over a bare pass with the same loss (of KL the teacher's forward pass too), and over the "
        "bare pass with cross-entropy."
    )
    header = ["", "seconds", "tokens/s", "over bare pass, same loss", "rounds", "goal", "met"]
    header += ["over bare pass, cross-entropy", "peak above start, MiB"]
    return [Table("Threshold learning", f"{settings.protocol(model)} {shape}", header, rows)]


def distillation(settings: Settings) -> list[Table]:
    """A step of distillation over what it cannot do without: the teacher forward, the student forward and backward."""
    dense = model_of(settings)
    batch = batches(tokens(dense, settings.batch_size, settings.window, settings.seed), settings.batch_size)[0]
    masks = random_masks(dense, settings)
    measures: dict[str, Callable[[], float]] = {}
    for targets in ("mlp", "all"):
        stage = DistillationStage(dense, gprune.apply_masks(dense, masks), DistillConfig(targets=targets))
        measures[f"bare, {targets}"] = partial(bare_distillation, stage, batch, settings.watch)
        measures[f"step, {targets}"] = partial(fit_step, stage, batch, settings.watch)
    timing, count = in_turn(measures, settings.repeats), batch["input_ids"].numel()
    rows = []
    for name in measures:
        bare = "bare, " + name.split(", ")[1]
        peaks = [peak_above(measures[n], settings.device) / MIB for n in (name, bare)]
        memory = (
            [1.0, None, None]
            if name == bare
            else [peaks[0] / peaks[1], MEMORY_GOAL, peaks[0] <= MEMORY_GOAL * peaks[1]]
        )
        rows.append(
            [name, timing.median(name), count / timing.median(name), *against(timing, name, bare), peaks[0], *memory]
        )
    shape = (
        f"One step on {settings.batch_size} windows of {settings.window} tokens under Lightning's Trainer, AdamW "
        "included, over a plain loop without an optimizer: logits of both models, their divergence, backward."
    )
    header = ["", "seconds", "tokens/s", "over bare", "rounds", "goal", "met", "peak above start, MiB"]
    header += ["memory over bare", "goal, memory", "met, memory"]
    return [Table("Distillation", f"{settings.protocol(dense)} {shape}", header, rows)]


def bare_distillation(stage: DistillationStage, batch: dict[str, Tensor], clock: Clock) -> float:
    """Forward of both models, and backward to what learns, by their own logits; its seconds."""
    ids, learned = batch["input_ids"], list(stage.learned.values())
    start = clock.now()
    with torch.no_grad():
        wanted = stage.lm(input_ids=ids, use_cache=False).logits[:, :-1].float().log_softmax(-1)
    found = stage.student(input_ids=ids, use_cache=False).logits[:, :-1].float().log_softmax(-1)
    loss = F.kl_div(found, wanted, reduction="none", log_target=True).sum(-1).mean()
    gradients = torch.autograd.grad(loss, learned)
    seconds = clock.now() - start
    del gradients
    return seconds


def threshold_stage(
    model: PreTrainedModel, settings: Settings, loss: Literal["cross_entropy", "kl"] = "cross_entropy"
) -> ThresholdLearning:
    """The stage with modules, ranks and a start drawn at random, which cost what real ones cost."""
    blocks, generator = blocks_of(model), torch.Generator().manual_seed(settings.seed)
    budget = Budget.of(unit_costs(blocks, scope="ffn"), settings.sparsity)
    K = gprune.RunConfig().partition.num_modules
    labels = [torch.arange(b.neurons) % K for b in blocks]
    scores = [torch.rand(b.neurons, generator=generator, dtype=torch.float64) for b in blocks]
    never = torch.zeros(K, dtype=torch.bool)
    p = [within_module_ranks(s, s, y, never) for s, y in zip(scores, labels, strict=True)]
    ranks = ModuleRanks(p, labels, [torch.full((b.kv_groups,), 0.5, dtype=torch.float64) for b in blocks])
    start = start_thresholds(keep_masks(budget, scores), ranks)
    return ThresholdLearning(model, ranks, start, budget, Learning(loss=loss))


class _Stopwatch(L.Callback):
    """Seconds from a batch that lies ready to the end of the optimizer's step."""

    def __init__(self, clock: Clock):
        self.clock = clock

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: ThresholdLearning, *_: object) -> None:
        self.start = self.clock.now()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: ThresholdLearning, *_: object) -> None:
        self.seconds = self.clock.now() - self.start


def fit_step(stage: FrozenLMStage, batch: dict[str, Tensor], clock: Clock) -> float:
    """One step under Lightning's Trainer, with the stage's gates on the model if it has any; its seconds."""
    watch = _Stopwatch(clock)
    trainer = trainer_for(stage.lm.device, max_steps=1, callbacks=[watch])
    with gated(stage.lm, stage.ffn_gates, stage.attention_gates) if hasattr(stage, "ffn_gates") else nullcontext():
        trainer.fit(stage, DataLoader([batch], batch_size=None))
    return watch.seconds


def trainer_for(device: torch.device, **options: Any) -> L.Trainer:
    """A Trainer that keeps nothing and says nothing."""
    return L.Trainer(
        accelerator="gpu" if device.type == "cuda" else "cpu", devices=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, **options,
    )  # fmt: skip


def bare_step(model: PreTrainedModel, batch: dict[str, Tensor], clock: Clock, *, kl: bool) -> float:
    """Forward, and backward down to the embedding, with no gate and no gradient of a weight; its seconds."""
    ids = batch["input_ids"]
    weight = batch["weight"] / batch["weight"].sum()
    asks = model.get_input_embeddings().register_forward_hook(lambda _m, _i, output: output.requires_grad_())
    start = clock.now()
    try:
        teacher = None
        if kl:
            with torch.no_grad():
                teacher = final_hidden(model, ids)
        next_token_loss(model, ids, weight, teacher=teacher).backward()
        return clock.now() - start
    finally:
        asks.remove()


def partition(settings: Settings) -> list[Table]:
    """Parameter embedding, k-means and refinement of one block with random weights: seconds, and memory above them."""
    cpu = torch.device("cpu")
    model = random_llama(hidden=settings.hidden, neurons=settings.neurons, blocks=1, heads=1, seed=settings.seed)
    weights = ffn_weights(blocks_of(model)[0])
    ranks = random_ranks(settings.neurons, 3, settings.seed)
    embedding = parameter_embedding(weights)
    labels = initial_partition(embedding, rank_drift(ranks))
    calls = {
        "parameter embedding": lambda: parameter_embedding(weights),
        "first modules": lambda: initial_partition(embedding, rank_drift(ranks)),
        "refinement": lambda: refine([embedding], [ranks], [labels], cpu, settings.refinement_steps),
        "all three": lambda: partitioned([weights], [ranks], cpu, settings.refinement_steps),
    }
    timing = alternated(calls, settings.repeats, Clock(cpu, settings.clock))
    rows = []
    for name, call in calls.items():
        seconds, peak = timing.median(name), peak_above(call, cpu) / MIB
        if name == "all three":
            most, memory = PARTITION_GOALS
            rows.append([name, seconds, most, peak, memory, seconds <= most and peak < memory])
        else:
            rows.append([name, seconds, None, peak, None, None])
    protocol = settings.protocol(model, f"One block of {settings.neurons} neurons with {settings.hidden} dimensions")
    header = ["", "seconds", "goal", "peak above weights, MiB", "goal, MiB", "met"]
    return [Table("Partition", f"{protocol} 3 corpora, {settings.refinement_steps} steps of refinement.", header, rows)]


def random_ranks(neurons: int, corpora: int, seed: int) -> Tensor:
    """(corpora, neurons) ranks in (0, 1) that agree in part, as ranks of real corpora do."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(neurons, generator=generator) + torch.rand(corpora, neurons, generator=generator) / 2
    return (scores.argsort(1).argsort(1).double() + 0.5) / neurons


def partitioned(
    weights: Sequence[UnitWeights], ranks: Sequence[Tensor], device: torch.device, steps: int
) -> list[Tensor]:
    """Modules of the blocks, as a run makes them: labels per block."""
    embeddings = [parameter_embedding(w) for w in weights]
    labels = [initial_partition(e, rank_drift(r)) for e, r in zip(embeddings, ranks, strict=True)]
    return refine(embeddings, ranks, labels, device, steps)


def refine(
    embeddings: Sequence[Tensor], ranks: Sequence[Tensor], labels: Sequence[Tensor], device: torch.device, steps: int
) -> list[Tensor]:
    """Labels after the refinement."""
    drifts = [rank_drift(r) for r in ranks]
    inputs = refinement_inputs(list(embeddings), drifts, list(ranks))
    stage = AssignmentRefinement(inputs, list(labels), steps=steps)
    trainer_for(device, max_epochs=1).fit(stage)
    return stage.labels()


def bfloat16(settings: Settings) -> list[Table]:
    """Calibration in bfloat16 beside float32: speed, and how many units a mask at 50 % decides otherwise."""
    models = {name: model_of(replace(settings, dtype=DTYPES[name])) for name in ("float32", "bfloat16")}
    dense = models["float32"]
    ids = text_of(settings, dense)
    data = batches(ids, settings.batch_size)
    passes = {"decoder alone": decoder_alone, "moments": collect}
    calls = {f"{kind}, {name}": partial(f, m, data) for kind, f in passes.items() for name, m in models.items()}
    timing = alternated(calls, settings.repeats, settings.watch)
    speed = []
    for kind in passes:
        names = [f"{kind}, {name}" for name in models]
        rates = [ids.numel() / timing.median(name) for name in names]
        speed.append([kind, *rates, timing.ratio(*names), timing.spread(*names)])
    found = {name: collect(model, data) for name, model in models.items()}
    blocks = blocks_of(dense)
    masks = {name: masks_at_half(blocks, statistics) for name, statistics in found.items()}
    halves = [masks_at_half(blocks, found["float32"], half=h) for h in (0, 1)]
    rows = [
        ["bfloat16 and float32", *differing(masks["bfloat16"], masks["float32"])],
        ["the two halves of the text, float32", *differing(*halves)],
    ]
    shape = f"{len(ids)} windows of {ids.shape[1]} tokens of {settings.corpus}, batches of {settings.batch_size}."
    protocol = settings.protocol(dense).replace("float32", "float32 and bfloat16", 1) + f" {shape}"
    return [
        Table(
            "bfloat16, speed", protocol,
            ["", "float32, tokens/s", "bfloat16, tokens/s", "bfloat16 over float32", "rounds"], speed,
        ),
        Table(
            "bfloat16, masks", "The same text; `wanda_sp`, half of each block's neurons.",
            ["masks of", "units that differ", "of", "share"], rows,
        ),
    ]  # fmt: skip


def threads(settings: Settings) -> list[Table]:
    """What the number of threads does to statistics and masks: sums of the same terms in another order."""
    model = model_of(settings)
    ids, before = text_of(settings, model), torch.get_num_threads()
    data, blocks = batches(ids, settings.batch_size), blocks_of(model)
    found, counts = {}, (1, 2, 4)
    try:
        for count in counts:
            torch.set_num_threads(count)
            found[count] = collect(model, data)
    finally:
        torch.set_num_threads(before)
    masks = {count: masks_at_half(blocks, statistics) for count, statistics in found.items()}
    rows = []
    for count in counts[1:]:
        pairs = [(a.total.mean_sq, b.total.mean_sq) for a, b in zip(found[count].ffn, found[1].ffn, strict=True)]
        relative = max(float(((a - b).abs() / b.clamp_min(1e-300)).max()) for a, b in pairs)
        rows.append([f"{count} and 1 threads", relative, *differing(masks[count], masks[1])])
    return [
        Table(
            "Threads", settings.protocol(model) + f" {len(ids)} windows of {ids.shape[1]} tokens of {settings.corpus}.",
            ["between", "largest relative difference of a mean square", "units that differ", "of", "share"], rows,
        )
    ]  # fmt: skip


def masks_at_half(blocks: Sequence[Block], statistics: CorpusStatistics, half: int | None = None) -> Masks:
    """`wanda_sp`, the same half of every block."""
    scores = score_units("wanda_sp", blocks, statistics, half=half, attention=False)
    return keep_masks(Budget.of(unit_costs(blocks, scope="ffn", uniform=True), 0.5), scores.ffn)


def differing(a: Masks, b: Masks) -> tuple[int, int, float]:
    """Neurons that only one of the masks keeps, how many there are, and the share."""
    count = sum(int((x != y).sum()) for x, y in zip(a.ffn, b.ffn, strict=True))
    of = sum(len(x) for x in a.ffn)
    return count, of, count / of


def text_of(settings: Settings, model: PreTrainedModel) -> Tensor:
    """(windows, window) tokens of a corpus, or random ones."""
    if settings.corpus == "random":
        return tokens(model, settings.windows, settings.window, settings.seed)
    _, tokenizer = load_model(settings.model)
    sample = Sample(settings.windows, settings.window, settings.seed, flags=("--windows", "--window"))
    return load_windows(settings.corpus, "train", tokenizer, sample).tokens.to(settings.device)
