"""Quality targets: find the largest sparsity whose recovered model keeps development perplexity near dense.

Models of several sparsities are measured on development text. Masks of any sparsity follow from one calibration: from
scores, or from thresholds learned at a first sparsity. There are up to three searches, each by `find_largest_cut`:

1. For the sparsity at which thresholds are learned, to a percentage point: with the masks of the base metric, from
   which learning starts, and the parts of `--recovery` that do not train.
2. For the run's own masks with the same recovery. If `--recovery` does not train, this is the result.
3. Starting from that result, for the run's own masks with the complete `--recovery`, in few steps.

With `--sparsity.limit worst` the rise of a model is that of its worst development corpus, otherwise the mean.

Every model is measured once. Measurements are stored in `quality.json` of the run folder, so that a resumed search
takes the same steps and gives the same bits.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

from gprune.calibration.statistics import CorpusStatistics
from gprune.config import RunConfig
from gprune.errors import UserError
from gprune.evaluation.intervals import Interval, paired_ratio
from gprune.evaluation.perplexity import PerplexityResult
from gprune.method.evaluate import dense_perplexity, measure_perplexity
from gprune.method.recover import learned_file, prune_and_recover
from gprune.method.run import Run
from gprune.models.masks import Masks
from gprune.recoveries import recovery_learns
from gprune.runs.folder import broadcast
from gprune.sparsity.budget import Budget
from gprune.sparsity.masks import MaskFunction
from gprune.sparsity.search import SearchResult, find_largest_cut
from gprune.sparsity.target import LEARNED_TRIES, TRIES, Target, format_cost
from gprune.storage.files import content_hash, read_json, write_json

log = logging.getLogger("gprune")
FILE = "quality.json"
FIRST_SPARSITY = 0.1  # sparsity of the first trial
LEARNING_RESOLUTION = 0.01  # of the sparsity at which thresholds are learned
EXPONENT = 1.5  # until two models are measured, log perplexity is assumed to rise with this power of the sparsity
# Tolerance of the search: the smaller of a share of the requested rise and a share of the dense perplexity. The curve
# of SmolLM2 fluctuates by 0.001 from one neuron to the next.
TOLERANCE = 0.05, 0.002
TRAINED_TOLERANCE = 0.1, 0.005  # if each model has to be trained


def requested_rise(cfg: RunConfig) -> float:
    """Return the relative rise of perplexity that a target in quality allows, such as 0.05 for `+5%`."""
    return float(Target.of(cfg.sparsity.target).number)


class Trials:
    """Trials of the search: models of a run with their perplexity on development text."""

    def __init__(self, run: Run, statistics: Mapping[str, CorpusStatistics]):
        self.run, self.statistics = run, statistics
        self.requested_rise = requested_rise(run.cfg)
        self.limits_worst = run.cfg.sparsity.limit == "worst"
        self.file = run.folder / FILE
        stored = self._stored()
        self.measured: dict[str, list[dict[str, Any]]] = broadcast(stored.get("measured", {}))
        self.trained: dict[str, Masks] = {}  # key -> masks of trials that are trained, in order
        with run.folder.step("quality"):
            self.dense = [dense_perplexity(run, run.model, windows, "dense") for windows in run.text.development]
        self.step = run.budget.step
        self.max_cut = math.ceil(run.budget.target / self.step)

    def cuts(self, sparsity: float) -> float:
        """Return the number of smallest steps of the budget that remove a share of the scope, not rounded."""
        return sparsity * self.run.budget.total / self.step

    def budget(self, cut: int) -> Budget:
        """Return the budget of `cut` smallest steps, at most the largest budget."""
        return self.run.budget.removing(min(cut * self.step, self.run.budget.target))

    def results(self, masks: Masks, recovery: str, budget: Budget) -> list[PerplexityResult]:
        """Return the perplexity of a recovered model on each development text, measured or from an earlier trial."""
        run, key = self.run, self._key(masks, recovery)
        if recovery_learns(recovery):
            self.trained.setdefault(key, masks)
        if key not in self.measured:
            name = f"{recovery} less {format_cost(budget.target, run.cfg.sparsity.currency)}"
            with run.folder.step("quality"), run.folder.part(name):
                trial = self.number(masks, recovery)
                model = prune_and_recover(run, masks, self.statistics, recovery=recovery, trial=trial)
                run.meter.watch(model)
                results = [measure_perplexity(run, model, w, name) for w in run.text.development]
            self.measured[key] = [{n: v for n, v in vars(r).items() if v is not None} for r in results]
            self.write(measured=self.measured)
            rise = math.expm1(self.rise(results))
            of_corpus = f" of {self.worst(results)}, the worst corpus" if self.limits_worst else ""
            log.info("Without %.4g%% of %s, recovery %s: %+.2f%% of dense development perplexity%s",
                     100 * budget.sparsity, run.cfg.sparsity.scope, recovery, 100 * rise, of_corpus)  # fmt: skip
        return [PerplexityResult(**of_text) for of_text in self.measured[key]]

    def number(self, masks: Masks, recovery: str) -> int | None:
        """Return the number of a trained trial, from 1; None for a model that is not trained."""
        key = self._key(masks, recovery)
        return 1 + list(self.trained).index(key) if key in self.trained else None

    @staticmethod
    def _key(masks: Masks, recovery: str) -> str:
        """Return the key of a model in `measured` and `trained`."""
        return f"{recovery} {content_hash(masks.tensors())}"

    def write(self, **entries: Any) -> None:
        """Add entries to `quality.json`, unless the run is finished."""
        if not self.run.folder.finished:
            write_json(self.file, self._stored() | entries)

    def _stored(self) -> dict[str, Any]:
        """Return the content of `quality.json`; empty if it is missing or cannot be read."""
        return read_json(self.file) or {}

    def rises(self, results: Sequence[PerplexityResult]) -> dict[str, float]:
        """Return the log of the ratio to dense of each corpus: the difference in nats per token."""
        pairs = zip(self.run.text.development, results, self.dense, strict=True)
        return {windows.corpus: result.nll - dense.nll for windows, result, dense in pairs}

    def rise(self, results: Sequence[PerplexityResult]) -> float:
        """Return the rise that the target limits, of log perplexity: the largest, or the mean over corpora."""
        rises = self.rises(results).values()
        return max(rises) if self.limits_worst else sum(rises) / len(rises)

    def worst(self, results: Sequence[PerplexityResult]) -> str:
        """Return the corpus whose perplexity rose most."""
        rises = self.rises(results)
        return max(rises, key=rises.__getitem__)

    def interval(self, results: Sequence[PerplexityResult], corpus: str | None = None) -> Interval:
        """Return the ratio to dense of a corpus, or of all, with its 95 % interval over windows: (ratio, low, high)."""
        text = self.run.text.development

        def by_corpus(results: Sequence[PerplexityResult]) -> dict[str, list[float]]:
            """Return corpus -> nll of each window, summed over its tokens."""
            pairs = zip(text, results, strict=True)
            return {w.corpus: result.window_nll for w, result in pairs if corpus in (None, w.corpus)}

        predicted_tokens = text[0].tokens.shape[1] - 1  # of a window
        return paired_ratio(by_corpus(results), by_corpus(self.dense), predicted_tokens)

    def search(
        self, masks_at: MaskFunction, recovery: str, *, after: SearchResult | None = None, resolution: int = 1
    ) -> SearchResult:
        """Search the largest cut that keeps the quality after a recovery, from the result of `after`.

        The search ends within the tolerance, within `resolution` cuts of one that does not keep the quality, at the
        largest cut, or after `TRIES`.
        """
        learns = recovery_learns(recovery)
        share_of_rise, share_of_dense = TRAINED_TOLERANCE if learns else TOLERANCE

        def rise(cut: int) -> float:
            """Return the rise of the recovered model without `cut` steps."""
            budget = self.budget(cut)
            return self.rise(self.results(masks_at(budget), recovery, budget))

        if after is not None and after.best is not None:
            start = {"first": after.best.cut, "expected": after.best.rise, "exponent": after.exponent(EXPONENT)}
        else:
            start = {"first": round(self.cuts(FIRST_SPARSITY)), "exponent": EXPONENT}
        return find_largest_cut(
            rise, math.log1p(self.requested_rise), self.max_cut, **start,
            unused=min(share_of_rise, share_of_dense / self.requested_rise), resolution=resolution,
            tries=LEARNED_TRIES if learns else TRIES,
        )  # fmt: skip


def with_learning_budget(run: Run, statistics: Mapping[str, CorpusStatistics], masks_at: MaskFunction) -> Run:
    """Return the run with the budget at which thresholds are learned, for a target in quality.

    It is the largest budget, to a percentage point, at which the masks of the base metric keep the quality. If there is
    none, it is one percentage point.
    """
    run.step(7, "Finding the share at which sparsity is learned")
    trials = Trials(run, statistics)
    resolution = max(1, round(trials.cuts(LEARNING_RESOLUTION)))
    best = trials.search(masks_at, run.cfg.training_free_recovery, resolution=resolution).best
    return run.with_budget(trials.budget(best.cut if best else resolution))


def with_quality_budget(run: Run, statistics: Mapping[str, CorpusStatistics], masks_at: MaskFunction) -> Run:
    """Return the run with the largest budget that keeps the quality.

    The trials and the result are stored in `quality.json`. UserError if even the smallest cut does not keep the
    quality, or the masks of the learner are for one budget.
    """
    cfg, s = run.cfg, run.cfg.sparsity
    run.step(8, "Finding the share that keeps the quality")
    if masks_at.for_one_budget:
        reason = "the masks of a quality target must follow from its thresholds"
        raise UserError(f"--sparsity.target must be a share such as 0.3 for this learner; got {s.target}: {reason}.")
    trials = Trials(run, statistics)
    search = trials.search(masks_at, cfg.training_free_recovery)
    if cfg.recovery_learns:
        search = trials.search(masks_at, cfg.recovery, after=search)
    if search.best is None:
        smallest = trials.budget(1)
        results = trials.results(masks_at(smallest), cfg.recovery, smallest)
        worst = trials.worst(results) if trials.limits_worst else None
        ratio, _, _ = trials.interval(results, worst)
        of_corpus = "" if worst is None else f" of '{worst}'"
        removed = format_cost(smallest.removed_by(masks_at(smallest)), s.currency)
        raise UserError(
            f"--sparsity.target must be above {percent(ratio)}, the change of development perplexity{of_corpus} by "
            f"the smallest cut ({removed}); got {s.target}."
        )
    is_largest = search.best.cut == trials.max_cut
    if is_largest:
        log.warning("Even the largest possible cut keeps the target %s of development perplexity.", s.target)
    budget = trials.budget(search.best.cut)
    masks = masks_at(budget)
    model = _describe_found(trials, search, budget, masks)
    trial = trials.number(masks, cfg.recovery)
    trials.write(reached={"asked": trials.requested_rise, "largest": is_largest, "trial": trial, "model": model})
    _remove_other_trials(trials, masks)
    return run.with_budget(budget)


def _describe_found(trials: Trials, search: SearchResult, budget: Budget, masks: Masks) -> dict[str, Any]:
    """Return the entry `model` of `quality.json`: its size, and its predicted and measured ratios to dense."""
    run, predicted_rise = trials.run, search.best.predicted
    results = trials.results(masks, run.cfg.recovery, budget)
    worst = trials.worst(results)
    ratio, low, high = trials.interval(results, worst if trials.limits_worst else None)
    return {
        "models": len(search.points),
        "share": run.budget.removed_by(masks) / run.budget.total,
        "parameters": run.model.num_parameters() - run.budget.parameters_removed_by(masks),
        "predicted": None if predicted_rise is None else math.exp(predicted_rise),
        "got": ratio,
        "low": low,
        "high": high,
        "worst": {"corpus": worst, "ratio": trials.interval(results, worst)},
    }


def _remove_other_trials(trials: Trials, kept_masks: Masks) -> None:
    """Remove the files and the token counts of learned tensors of trials that are not the result of the search."""
    run, recovery = trials.run, trials.run.cfg.recovery
    prefixes = {learned_file(masks, recovery) for masks in trials.trained.values()}
    others = tuple(f"{prefix}-" for prefix in prefixes - {learned_file(kept_masks, recovery)})
    for file in (run.folder / "recovery").glob("*.safetensors"):
        if f"recovery/{file.name}".startswith(others):
            file.unlink(missing_ok=True)
    learned_tokens = run.folder.manifest.get("learned_tokens", {})
    kept_tokens = {name: tokens for name, tokens in learned_tokens.items() if not name.startswith(others)}
    if kept_tokens != learned_tokens:
        run.folder.update_manifest(learned_tokens=kept_tokens, replace=True)


def percent(ratio: float) -> str:
    """Format a ratio to dense as a signed percentage."""
    return f"{100 * (ratio - 1):+.2f}%"


def percent_with_interval(ratio: float, low: float | None, high: float | None) -> str:
    """Format a ratio to dense and, if there is one, its interval as signed percentages: +1.00% [+0.50%, +1.50%]."""
    return percent(ratio) if low is None else f"{percent(ratio)} [{percent(low)}, {percent(high)}]"
