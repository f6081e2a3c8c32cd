"""A peer beside us: optipfair's hybrid pruning (weights and activations) on the same model, windows and sparsity."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from functools import partial
from types import ModuleType

import torch
from torch import Tensor
from transformers import PreTrainedModel

import gprune
from gprune.calibration.collector import collect
from gprune.calibration.statistics import CorpusStatistics
from gprune.corpora.windows import Sample, Windows, load_windows
from gprune.errors import UserError
from gprune.evaluation.intervals import geometric_mean
from gprune.evaluation.perplexity import perplexity
from gprune.importance.scores import score_units
from gprune.models.blocks import blocks_of
from gprune.models.loading import load_model
from gprune.models.surgery import count_parameters
from gprune.recoveries import Material, recovery_of
from gprune.sparsity.budget import Budget, unit_costs
from gprune.sparsity.cut import keep_masks

from .measure import Table, alternated
from .models import Settings, batches, model_of, tokens

UNSEEN = ("web", "stories")  # evaluated beside the corpus that both prune by


def optipfair() -> ModuleType:
    """The peer's package.

    Raises:
        UserError: where it is not installed.
    """
    try:
        import optipfair
    except ImportError as error:
        raise UserError(
            "peer: optipfair is not installed, which only this row needs; pip install optipfair."
        ) from error
    logging.getLogger("optipfair").setLevel(logging.ERROR)
    return optipfair


def peer(settings: Settings) -> list[Table]:
    """Seconds from the dense model to the pruned one, text included, and what is left of it."""
    package, model = optipfair(), model_of(settings)
    train, test = texts(settings, model)
    data = batches(train, settings.batch_size)
    calls: dict[str, Callable[[], PreTrainedModel]] = {
        "optipfair, MAW hybrid": partial(theirs, package, model, data, settings.sparsity),
        "gprune, wanda_sp": partial(ours, model, data, settings.sparsity),
        "gprune, wanda_sp and least squares": partial(ours, model, data, settings.sparsity, solved=True),
    }
    timing, base = alternated(calls, settings.repeats, settings.watch), "optipfair, MAW hybrid"
    rows = [["dense", None, None, "", count_parameters(model, "all"), *measured(model, test, settings)]]
    for name, call in calls.items():
        small = call()
        ratio = timing.ratio(name, base)
        cells = [timing.median(name), ratio, timing.spread(name, base)]
        rows.append([name, *cells, count_parameters(small, "all"), *measured(small, test, settings)])
    shape = (
        f"{len(train)} windows of {train.shape[1]} tokens of {settings.corpus}, {settings.sparsity:.0%} of each "
        f"block's neurons, the same width in each; perplexity on {len(test[0].tokens)} test windows of each corpus."
    )
    header = ["", "seconds", "over optipfair", "rounds", "parameters left"]
    header += [f"perplexity, {w.corpus}" for w in test] + ["geometric mean"]
    return [Table("A peer", f"{settings.protocol(model)} {shape}", header, rows)]


def texts(settings: Settings, model: PreTrainedModel) -> tuple[Tensor, list[Windows]]:
    """(windows, window) tokens to prune by, and windows of test text."""
    if settings.corpus == "random":
        ids = [tokens(model, settings.windows, settings.window, settings.seed + i) for i in range(2)]
        return ids[0], [Windows("random", "test", ids[1].cpu())]
    _, tokenizer = load_model(settings.model)
    sample = Sample(settings.windows, settings.window, settings.seed, flags=("--windows", "--window"))
    train = load_windows(settings.corpus, "train", tokenizer, sample).tokens.to(settings.device)
    return train, [load_windows(name, "test", tokenizer, sample) for name in (settings.corpus, *UNSEEN)]


def theirs(
    package: ModuleType, model: PreTrainedModel, data: list[dict[str, Tensor]], sparsity: float
) -> PreTrainedModel:
    """The peer's recipe: peak-to-peak magnitude of gate and up, down weighted by its inputs; in place, so on a copy."""
    return package.prune_model(
        copy.deepcopy(model), pruning_type="MLP_GLU", neuron_selection_method="MAW",
        pruning_percentage=100 * sparsity, dataloader=data, show_progress=False,
    )  # fmt: skip


def ours(
    model: PreTrainedModel, data: list[dict[str, Tensor]], sparsity: float, *, solved: bool = False
) -> PreTrainedModel:
    """The base metric, the same width in every block; and if asked output projections solved again."""
    blocks, statistics = blocks_of(model), collect(model, data, gram=solved)
    scores = score_units("wanda_sp", blocks, statistics, attention=False)
    masks = keep_masks(Budget.of(unit_costs(blocks, scope="ffn", uniform=True), sparsity), scores.ffn)
    small = gprune.apply_masks(model, masks)
    return recovered(model, small, masks, statistics) if solved else small


@torch.no_grad()
def recovered(
    model: PreTrainedModel, small: PreTrainedModel, masks: gprune.Masks, statistics: CorpusStatistics
) -> PreTrainedModel:
    """Least squares, in place."""
    revise = recovery_of("least_squares").revise(Material(model, masks, statistics=statistics))
    for dense, block in zip(blocks_of(model), blocks_of(small), strict=True):
        revise(dense, block)
    return small


def measured(model: PreTrainedModel, test: list[Windows], settings: Settings) -> list[float]:
    """Perplexities, and their geometric mean."""
    found = [perplexity(model, w, batch_size=settings.batch_size).perplexity for w in test]
    return [*found, geometric_mean(found)]
