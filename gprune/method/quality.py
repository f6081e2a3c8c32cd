"""A target in quality: the largest cut whose model keeps development perplexity near that of the dense model.

A cut is a cost that is removed. Cuts are multiples of a thousandth of the scope, rounded up to whole steps of the
budget. A bisection measures about ten of them: the model is pruned, recovered by the parts of `--recovery` that do not
train, and measured on development text. The largest measured cut within the limit is the result. With
`--sparsity.limit worst` the limit holds for the worst development corpus, otherwise for the mean.

If thresholds are learned, an earlier search finds the cut at which they are learned, to a hundredth of the scope. It
has the masks of the base metric, from which learning starts.

`quality.json` of the run folder has the losses of each model, so that a resumed search measures no model again.
"""

from __future__ import annotations

import logging
import math
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from transformers import PreTrainedModel

from gprune.calibration.statistics import CorpusStatistics
from gprune.corpora.load import corpus_labels
from gprune.errors import UserError
from gprune.evaluation.intervals import Estimate, Nll, paired_ratio
from gprune.method.evaluate import dense_perplexity, measure_perplexity
from gprune.method.recover import prune_and_recover
from gprune.method.run import Run
from gprune.models.masks import Masks
from gprune.runs.folder import broadcast
from gprune.runs.numbers import Record, by_stage
from gprune.sparsity.budget import Budget
from gprune.sparsity.masks import MaskFunction
from gprune.sparsity.target import CUTS, LEARNING_CUTS, Target, format_cost
from gprune.storage.files import read_json, write_json

log = logging.getLogger("gprune")
FILE = "quality.json"
TEXTS = {"development": "on development text", "trained": "after training", "unseen": "on unseen text"}


class Rise(NamedTuple):
    """Perplexity above that of the dense model, as a share, with 95 % intervals over windows."""

    mean: Estimate  # over corpora
    worst: Estimate  # of the worst corpus
    worst_corpus: str

    @classmethod
    def of(cls, model: Nll, dense: Nll, seq_len: int) -> Rise:
        """Return the rise from the losses of windows of `seq_len` tokens."""

        def above_dense(nll: Nll) -> Estimate:
            ratio = paired_ratio(nll, dense, seq_len - 1)
            return Estimate(*(None if value is None else value - 1 for value in ratio))

        by_corpus = {corpus: above_dense({corpus: nll}) for corpus, nll in model.items()}
        worst = max(by_corpus, key=lambda corpus: by_corpus[corpus].value)
        return cls(above_dense(model), by_corpus[worst], worst)

    def limited(self, limit: str) -> float:
        """Return the rise that a `--sparsity.limit` is about."""
        return self.worst.value if limit == "worst" else self.mean.value

    @property
    def worst_label(self) -> str:
        """The short name of the worst corpus."""
        return corpus_labels([self.worst_corpus])[self.worst_corpus]

    def __str__(self) -> str:
        if self.worst == self.mean:  # there is one corpus
            return percent(self.mean)
        return f"{percent(self.mean)} ({self.worst.value:+.2%} on {self.worst_label}, the worst corpus)"


def percent(rise: Estimate) -> str:
    """Format a rise and, if there is one, its interval: +1.00% [+0.50%, +1.50%]."""
    interval = "" if rise.low is None else f" [{rise.low:+.2%}, {rise.high:+.2%}]"
    return f"{rise.value:+.2%}{interval}"


def allowed_rise(run: Run) -> float:
    """Return the rise of perplexity that the target allows, such as 0.05 for `+5%`."""
    return float(Target.of(run.cfg.sparsity.target).number)


def development_nll(run: Run, name: str, model: Callable[[], PreTrainedModel]) -> Nll:
    """Return corpus -> loss of each development window of a model, measured or from `quality.json`."""
    file = run.folder / FILE
    measured = broadcast(read_json(file) or {})
    if name not in measured:
        with run.folder.step("quality"), run.folder.part(name):
            evaluated, text = model(), run.text.development
            if evaluated is run.model:  # its tokens are counted since the run was opened
                results = [dense_perplexity(run, evaluated, windows, name) for windows in text]
            else:
                with run.meter.watch(evaluated):
                    results = [measure_perplexity(run, evaluated, windows, name) for windows in text]
        measured[name] = {w.corpus: result.window_nll for w, result in zip(text, results, strict=True)}
        write_json(file, measured)
    return measured[name]


def measure_cut(
    run: Run, statistics: Mapping[str, CorpusStatistics], masks_at: MaskFunction, budget: Budget, prefix: str
) -> Rise:
    """Return the rise of the model that is pruned to a budget, after the recovery without training."""
    cfg = run.cfg

    def model() -> PreTrainedModel:
        return prune_and_recover(run, masks_at(budget), statistics, recovery=cfg.training_free_recovery)

    dense = development_nll(run, "dense", lambda: run.model)
    nll = development_nll(run, f"{prefix}{name_of(run, budget)}", model)
    rise = Rise.of(nll, dense, cfg.corpora.seq_len)
    log.info("Without %.4g%% of %s: perplexity %s on development text", 100 * budget.sparsity, cfg.sparsity.scope, rise)
    return rise


def name_of(run: Run, budget: Budget) -> str:
    """Return the name in `quality.json` of the model that is pruned to a budget."""
    return f"without {format_cost(budget.target, run.cfg.sparsity.currency)}"


def search(
    run: Run, statistics: Mapping[str, CorpusStatistics], masks_at: MaskFunction, cuts: range, prefix: str = ""
) -> int:
    """Return how many of the cuts, which increase, keep the quality. The largest of them was measured."""

    def rise(cut: int) -> float:
        of_cut = measure_cut(run, statistics, masks_at, run.budget.removing(cut), prefix)
        return of_cut.limited(run.cfg.sparsity.limit)

    return bisect_right(cuts, allowed_rise(run), key=rise)


def cuts_of(budget: Budget, number: int) -> range:
    """Return the cuts of a search: at most `number`, a multiple of the budget's step apart, up to the largest one."""
    distance = budget.step * math.ceil(budget.total / (number * budget.step))
    return range(distance, budget.target + distance, distance)


def with_learning_budget(run: Run, statistics: Mapping[str, CorpusStatistics], masks_at: MaskFunction) -> Run:
    """Return the run with the budget at which thresholds are learned, for a target in quality.

    It is the largest one at which the masks of the base metric keep the quality, and the smallest one if none does.
    """
    run.step(7, "Finding the share at which sparsity is learned")
    cuts = cuts_of(run.budget, LEARNING_CUTS)
    number = search(run, statistics, masks_at, cuts, "base metric ")
    return run.with_budget(run.budget.removing(cuts[max(0, number - 1)]))


def with_quality_budget(run: Run, statistics: Mapping[str, CorpusStatistics], masks_at: MaskFunction) -> Run:
    """Return the run with the largest budget that keeps the quality.

    UserError if even the smallest cut does not keep the quality, or the masks of the learner are for one budget.
    """
    s = run.cfg.sparsity
    run.step(8, "Finding the share that keeps the quality")
    if masks_at.for_one_budget:
        reason = "the masks of a quality target must follow from its thresholds"
        raise UserError(f"--sparsity.target must be a share such as 0.3 for this learner; got {s.target}: {reason}.")
    cuts = cuts_of(run.budget, CUTS)
    number = search(run, statistics, masks_at, cuts)
    if number == 0:
        smallest = run.budget.removing(cuts[0])
        rise = measure_cut(run, statistics, masks_at, smallest, "")
        of_corpus = f" of '{rise.worst_corpus}'" if s.limit == "worst" else ""
        removed = format_cost(smallest.removed_by(masks_at(smallest)), s.currency)
        raise UserError(
            f"--sparsity.target must be above {rise.limited(s.limit):+.2%}, the change of development "
            f"perplexity{of_corpus} by the smallest cut ({removed}); got {s.target}."
        )
    if number == len(cuts):
        log.warning("Even the largest possible cut keeps the target %s of development perplexity.", s.target)
    return run.with_budget(run.budget.removing(cuts[number - 1]))


def quality_entry(run: Run, records: Sequence[Record], masks: Masks, parameters: int) -> dict[str, Any]:
    """Return the entry `quality` of the summary (see `numbers.entries`).

    It has what was asked, the removed share, the parameters of the final model, and the rise of perplexity: on
    development text as the search measured it and after training, and on unseen text.
    """
    cfg, s, asked = run.cfg, run.cfg.sparsity, allowed_rise(run)
    measured = read_json(run.folder / FILE)
    dense = measured["dense"]
    rises = {"development": Rise.of(measured[name_of(run, run.budget)], dense, cfg.corpora.seq_len)}
    if cfg.recovery_learns:
        rises["trained"] = Rise.of(measured["recovered"], dense, cfg.corpora.seq_len)
    stages = by_stage(records)
    unseen, unseen_dense = (
        {corpus: r["window_nll"] for corpus, r in stages[stage].items() if not r["seen"]}
        for stage in (cfg.final_stage, "dense")
    )
    if unseen:
        rises["unseen"] = Rise.of(unseen, unseen_dense, cfg.evaluation.seq_len)
    share = run.budget.removed_by(masks) / run.budget.total
    limited = "on every corpus" if s.limit == "worst" else "in the mean over corpora"
    said = f"Quality: asked at most {s.target} of dense perplexity {limited}, and removed {share:.2%} of {s.scope}"
    numbers: dict[str, Any] = {"asked": asked, "share": share}
    cells: dict[str, Any] = {"asked, %": 100 * asked, "parameters kept": parameters, "removed, %": 100 * share}
    warnings = []
    for name, rise in rises.items():
        said += f"; {TEXTS[name]} {rise}"
        numbers |= {name: list(rise.mean), f"{name}_worst": list(rise.worst)}
        cells[f"{name}, %"] = in_percent(rise.mean)
        if name != "trained":
            worst = "worst" if name == "development" else f"worst {name}"
            cells |= {f"{worst} corpus": rise.worst_label, f"{worst}, %": in_percent(rise.worst)}
        if rise.limited(s.limit) > asked:
            warnings.append(
                f"Perplexity {TEXTS[name]} is above the limit {s.target}: {rise}. The limit holds on development text "
                "before training. Lower --sparsity.target, or add text of this kind to --corpora.recover."
            )
    table = {
        "title": "Parameters at the same quality",
        "columns": list(cells),
        "rows": [list(cells.values())],
        "digits": {"asked, %": 1},
        "note": "The largest share that was found whose perplexity on development text, before training, is at most so "
        "much above dense as was asked: in the mean over corpora or, with --sparsity.limit worst, on every corpus. In "
        "brackets 95 % intervals: Student's t over windows, paired.",
    }
    return {"quality": {"said": f"{said}.", "warnings": warnings, "numbers": numbers, "table": table}}


def in_percent(rise: Estimate) -> list[float | None]:
    """Return a rise and its interval in percent."""
    return [None if value is None else 100 * value for value in rise]
