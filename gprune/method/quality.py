"""Quality targets: find the largest sparsity whose recovered model keeps development perplexity near dense.

Models of several sparsities are measured on development text. Masks of any sparsity follow from one calibration: from
scores, or from thresholds learned at a first sparsity. There are up to three searches, each by `find_largest_cut`:

1. For the sparsity at which thresholds are learned, to a percentage point: with masks of the control `averaged`,
   otherwise of `base`, and the parts of `--recovery` that do not train.
2. For the run's main row with the same recovery. If `--recovery` does not train, this is the result.
3. Starting from that result, for the main row with the complete `--recovery`, in few steps.

Controls are not searched for: they have the budget of the main row. Every model is measured once. Measurements are
stored in `quality.json` of the run folder, so that a resumed search takes the same steps and gives the same bits.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

from gprune.calibration.statistics import CorpusStatistics
from gprune.config import RunConfig
from gprune.errors import UserError
from gprune.evaluation.intervals import Estimate, Interval, paired_ratio
from gprune.evaluation.perplexity import PerplexityResult
from gprune.method.evaluate import dense_perplexity, measure_perplexity, shard_if_requested
from gprune.method.recover import learned_file, prune_and_recover
from gprune.method.run import Run
from gprune.models.masks import Masks
from gprune.recoveries import recovery_learns
from gprune.runs.folder import broadcast
from gprune.runs.numbers import Record, ResultRow, estimates, row_name
from gprune.sparsity.budget import Budget
from gprune.sparsity.masks import StageMasks
from gprune.sparsity.search import SearchResult, find_largest_cut
from gprune.sparsity.target import LEARNED_TRIES, TRIES, Target
from gprune.storage.files import content_hash, read_json, write_json

log = logging.getLogger("gprune")
FILE = "quality.json"
FIRST_SPARSITY = 0.1  # sparsity of the first trial
LEARNING_RESOLUTION = 0.01  # of the sparsity at which thresholds are learned
WIDE = 0.5  # share of the requested rise by which a wide interval is above the limit
EXPONENT = 1.5  # until two models are measured, log perplexity is assumed to rise with this power of the sparsity
# Tolerance of the search: a share of the requested rise, and of the dense perplexity. The curve of SmolLM2 fluctuates
# by 0.001 from one neuron to the next.
TOLERANCE = 0.05, 0.002
TRAINED_TOLERANCE = 0.1, 0.005  # if each model has to be trained


def requested_rise(cfg: RunConfig) -> float | None:
    """Return the relative rise of perplexity that the target allows (0.05 for `+5%`); None for other targets."""
    target = Target.of(cfg.sparsity.target)
    return float(target.number) if target.is_searched else None


class Trials:
    """Trials of the search: models of a run with their perplexity on development text."""

    def __init__(self, run: Run, statistics: Mapping[str, CorpusStatistics]):
        self.run, self.statistics = run, statistics
        self.requested_rise = requested_rise(run.cfg)
        self.file = run.folder / FILE
        stored = self._stored()
        self.measured: dict[str, list[dict[str, Any]]] = broadcast(stored.get("measured", {}))
        self.trained: dict[str, Masks] = {}  # key -> masks of trials that are trained, in order
        with run.folder.step("quality"):
            model = shard_if_requested(run, run.model)
            self.dense = [
                dense_perplexity(run, model, w, "dense", measure=measure_perplexity) for w in run.text.development
            ]
        self.step = run.budget.step
        self.max_cut = math.ceil(run.budget.target / self.step)

    def cuts(self, sparsity: float) -> float:
        """Return the number of smallest steps that remove a share of the scope."""
        return sparsity * self.run.budget.total / self.step

    def budget(self, cut: int) -> Budget:
        """Return the budget of `cut` smallest steps, at most the largest budget."""
        return self.run.budget.removing(min(cut * self.step, self.run.budget.target))

    def results(self, masks: Masks, row: ResultRow, budget: Budget) -> list[PerplexityResult]:
        """Return the perplexity of a recovered model on each development text, measured or from an earlier trial."""
        run, key = self.run, self._key(masks, row)
        learns = recovery_learns(row[1])
        if learns:
            self.trained.setdefault(key, masks)
        if key not in self.measured:
            name = f"{row_name(*row)} less {budget.target:,}"
            with run.folder.step("quality"), run.folder.part(name):
                trial = list(self.trained).index(key) if learns else None
                model = shard_if_requested(run, prune_and_recover(run, masks, self.statistics, row=row, trial=trial))
                run.meter.watch(model)
                results = [measure_perplexity(run, model, w, name) for w in run.text.development]
            self.measured[key] = [{n: v for n, v in vars(r).items() if v is not None} for r in results]
            self.write(measured=self.measured)
            rise = math.expm1(self.rise(results))
            log.info("%s without %.4g%% of %s: %+.2f%% of dense development perplexity",
                     row_name(*row), 100 * budget.sparsity, run.cfg.sparsity.scope, 100 * rise)  # fmt: skip
        return [PerplexityResult(**of_text) for of_text in self.measured[key]]

    def number(self, masks: Masks, row: ResultRow) -> int | None:
        """Return the number of a trained trial, from 1; None for a row that is not trained."""
        key = self._key(masks, row)
        return 1 + list(self.trained).index(key) if key in self.trained else None

    @staticmethod
    def _key(masks: Masks, row: ResultRow) -> str:
        """Return the key of a model in `measured` and `trained`."""
        return f"{row[1]} {content_hash(masks.tensors())}"

    def write(self, **entries: Any) -> None:
        """Add entries to `quality.json`, unless the run is finished."""
        if not self.run.folder.finished:
            write_json(self.file, self._stored() | entries, run=self.run.folder.key)

    def _stored(self) -> dict[str, Any]:
        """Return the content of `quality.json`; empty if it is missing, invalid, or of another run."""
        return read_json(self.file, run=self.run.folder.key) or {}

    def rise(self, results: Sequence[PerplexityResult]) -> float:
        """Return the log of the ratio to dense: the mean over corpora of the difference in nats per token."""
        differences = [result.nll - dense.nll for result, dense in zip(results, self.dense, strict=True)]
        return sum(differences) / len(self.dense)

    def interval(self, results: Sequence[PerplexityResult]) -> Interval:
        """Return the ratio to dense with its paired 95 % interval over windows: (ratio, lower, upper)."""
        text = self.run.text.development

        def by_corpus(results: Sequence[PerplexityResult]) -> dict[str, list[float]]:
            return {w.corpus: result.window_nll for w, result in zip(text, results, strict=True)}

        predicted_tokens = text[0].tokens.shape[1] - 1  # of a window
        return paired_ratio(by_corpus(results), by_corpus(self.dense), predicted_tokens)

    def search(
        self, row: ResultRow, masks_of: StageMasks, *, after: SearchResult | None = None, resolution: int = 1
    ) -> SearchResult:
        """Search the largest cut of a row (stage, recovery) that keeps the quality, from the result of another search.

        The search ends within `resolution` cuts of one that does not keep the quality.
        """
        learns = recovery_learns(row[1])
        share_of_rise, share_of_dense = TRAINED_TOLERANCE if learns else TOLERANCE

        def rise(cut: int) -> float:
            budget = self.budget(cut)
            return self.rise(self.results(masks_of(budget), row, budget))

        if after is not None and after.best is not None:
            start = {"first": after.best.cut, "expected": after.best.rise, "exponent": after.exponent(EXPONENT)}
        else:
            start = {"first": round(self.cuts(FIRST_SPARSITY)), "exponent": EXPONENT}
        return find_largest_cut(
            rise, math.log1p(self.requested_rise), self.max_cut, **start,
            unused=min(share_of_rise, share_of_dense / self.requested_rise), resolution=resolution,
            tries=LEARNED_TRIES if learns else TRIES,
        )  # fmt: skip


def with_learning_budget(
    run: Run, statistics: Mapping[str, CorpusStatistics], masks_of: Mapping[str, StageMasks]
) -> Run:
    """Return the run with the budget at which thresholds are learned; the same run if the target is not a quality.

    It is the largest budget, to a percentage point, at which masks of a control keep the quality. If there is none, it
    is one percentage point.
    """
    cfg = run.cfg
    if requested_rise(cfg) is None or not cfg.learns:
        return run
    run.step(7, "Finding the share at which sparsity is learned")
    trials = Trials(run, statistics)
    control = "averaged" if "averaged" in masks_of else "base"
    resolution = max(1, round(trials.cuts(LEARNING_RESOLUTION)))
    best = trials.search((control, cfg.training_free_recovery), masks_of[control], resolution=resolution).best
    return run.with_budget(trials.budget(best.cut if best else resolution))


def with_quality_budget(
    run: Run, statistics: Mapping[str, CorpusStatistics], masks_of: Mapping[str, StageMasks]
) -> Run:
    """Return the run with the largest budget that keeps the quality; the same run if the target is not a quality.

    It is searched for with models of the main row. The trials and the result are stored in `quality.json`. UserError if
    even the smallest cut does not keep the quality, or the masks of the learner are for one budget.
    """
    cfg, s = run.cfg, run.cfg.sparsity
    if requested_rise(cfg) is None:
        return run
    run.step(8, "Finding the share that keeps the quality")
    masks_at = masks_of[cfg.main_stage]
    if masks_at.for_one_budget:
        reason = "the masks of a quality target must follow from its thresholds"
        raise UserError(f"--sparsity.learner {s.learner} needs a share such as 0.3 as target: {reason}.")
    trials = Trials(run, statistics)
    untrained_row = (cfg.main_stage, cfg.training_free_recovery)
    search = trials.search(untrained_row, masks_at)
    if untrained_row != cfg.own_row:
        search = trials.search(cfg.own_row, masks_at, after=search)
    if search.best is None:
        smallest = trials.budget(1)
        ratio, _, _ = trials.interval(trials.results(masks_at(smallest), cfg.own_row, smallest))
        removed = f"{smallest.removed_by(masks_at(smallest)):,} {s.currency.replace('_', ' ')}"
        raise UserError(
            f"--sparsity.target must be above {_percent(ratio)}, the change of development perplexity by the smallest "
            f"cut ({removed}); got {s.target}."
        )
    is_largest = search.best.cut == trials.max_cut
    if is_largest:
        log.warning("Even the largest possible cut keeps the target %s of development perplexity.", s.target)
    budget = trials.budget(search.best.cut)
    masks = masks_at(budget)
    rows = [_size_of_main_row(trials, search, budget, masks)]
    trial = trials.number(masks, cfg.own_row)
    trials.write(reached={"asked": trials.requested_rise, "largest": is_largest, "trial": trial, "rows": rows})
    _remove_other_trials(trials, masks)
    return run.with_budget(budget)


def _size_of_main_row(trials: Trials, search: SearchResult, budget: Budget, masks: Masks) -> dict[str, Any]:
    """Return how many parameters the main row needs for the requested quality."""
    run, row = trials.run, trials.run.cfg.own_row
    predicted_rise = search.best.predicted
    ratio, low, high = trials.interval(trials.results(masks, row, budget))
    return {
        "row": row_name(*row),
        "models": len(search.points),
        "share": run.budget.removed_by(masks) / run.budget.total,
        "parameters": run.model.num_parameters() - run.budget.parameters_removed_by(masks),
        "predicted": None if predicted_rise is None else math.exp(predicted_rise),
        "got": ratio,
        "low": low,
        "high": high,
    }


def _remove_other_trials(trials: Trials, kept_masks: Masks) -> None:
    """Remove the files and the token counts of learned tensors of trials that are not the result of the search."""
    run, row = trials.run, trials.run.cfg.own_row
    prefixes = {learned_file(masks, row) for masks in trials.trained.values()}
    others = tuple(f"{prefix}-" for prefix in prefixes - {learned_file(kept_masks, row)})
    for file in (run.folder / "recovery").glob("*.safetensors"):
        if f"recovery/{file.name}".startswith(others):
            file.unlink(missing_ok=True)
    learned_tokens = run.folder.manifest.get("learned_tokens", {})
    kept_tokens = {name: tokens for name, tokens in learned_tokens.items() if not name.startswith(others)}
    if kept_tokens != learned_tokens:
        run.folder.update_manifest(learned_tokens=kept_tokens, replace=True)


def quality_reached(run: Run, records: Sequence[Record]) -> dict[str, Any]:
    """Return the entry `quality` of the summary (see `numbers.entries`); empty unless the target is a quality.

    It has requested, predicted and measured quality, on development and on unseen text. `numbers` are rises of
    perplexity above dense; the others are ratios to dense.
    """
    if requested_rise(run.cfg) is None:
        return {}
    reached = read_json(run.folder / FILE, run=run.folder.key)["reached"]
    main_row = reached["rows"][-1]
    numbers = {name: main_row[name] for name in ("predicted", "got", "low", "high", "share")}
    phrases = [f"Quality: asked at most {run.cfg.sparsity.target} of dense perplexity on development text"]
    if main_row["predicted"]:
        phrases.append(f"predicted {_percent(main_row['predicted'])}")
    phrases.append(f"got {_percent_with_interval(main_row['got'], main_row['low'], main_row['high'])}")
    unseen = estimates(records, run.cfg.own_row, None)["unseen_over_dense"]
    if unseen is not None:
        numbers |= {"unseen": unseen.value, "unseen_low": unseen.low, "unseen_high": unseen.high}
        phrases.append(f"on unseen text {_percent_with_interval(unseen.value, unseen.low, unseen.high)}")
    limit = "; the largest possible cut" if reached["largest"] else ""
    phrases.append(f"removed {main_row['share']:.2%} of {run.cfg.sparsity.scope}{limit}")
    rises = {name: None if numbers[name] is None else numbers[name] - 1 for name in ("predicted", "got", "low", "high")}
    entry = {
        "said": f"{', '.join(phrases)}.",
        "warnings": _warnings(run.cfg, numbers),
        "numbers": {"asked": reached["asked"], **rises, "unseen": None if unseen is None else unseen.value - 1},
        "table": _table(reached["asked"], main_row, unseen),
    }
    return {"quality": reached | numbers | entry}


def _table(asked: float, row: Mapping[str, Any], unseen: Estimate | None) -> dict[str, Any]:
    """Return the table of the entry, with the run's own row."""

    def percent(*ratios: float | None) -> list[float | None] | None:
        """Convert a ratio to dense and the ends of its interval to percent above dense."""
        return None if ratios[0] is None else [None if ratio is None else 100 * (ratio - 1) for ratio in ratios]

    cells = {
        "row": row["row"],
        "asked, %": 100 * asked,
        "parameters kept": row["parameters"],
        "removed, %": 100 * row["share"],
        "predicted, %": percent(row["predicted"]),
        "development, %": percent(row["got"], row["low"], row["high"]),
        "unseen, %": None if unseen is None else percent(*unseen),
        "models tried": row["models"],
    }
    return {
        "title": "Parameters at the same quality",
        "columns": list(cells),
        "rows": [list(cells.values())],
        "digits": {"asked, %": 1},
        "note": "The largest share that was found whose development perplexity, above dense, is at most what was "
        "asked. In brackets 95 % intervals: Student's t over windows, paired.",
    }


def _warnings(cfg: RunConfig, numbers: Mapping[str, float]) -> list[str]:
    """Return a line for a wide interval on development text, and one if unseen text is above the limit.

    An interval is wide if its upper end is above the limit by more than half of the requested rise.
    """
    target, rise = cfg.sparsity.target, requested_rise(cfg)
    warnings = []
    if numbers["high"] > 1 + (1 + WIDE) * rise:
        warnings.append(
            f"The interval on development text reaches {_percent(numbers['high'])}, far above the limit {target}: "
            "development text is too short. Raise --evaluation.development_samples, or use larger corpora."
        )
    if numbers.get("unseen", 0) > 1 + rise:
        interval = _percent_with_interval(numbers["unseen"], numbers["unseen_low"], numbers["unseen_high"])
        warnings.append(
            f"Unseen text is above the limit {target}: {interval}. The limit holds on development text of the corpora "
            "that the run reads. Lower --sparsity.target, or add corpora like the unseen text to --corpora.drift and "
            "--corpora.recover."
        )
    return warnings


def _percent(ratio: float) -> str:
    """Format a ratio to dense as a signed percentage."""
    return f"{100 * (ratio - 1):+.2f}%"


def _percent_with_interval(ratio: float, low: float | None, high: float | None) -> str:
    """Format a ratio to dense and, if there is one, its interval as signed percentages: +1.00% [+0.50%, +1.50%]."""
    return _percent(ratio) if low is None else f"{_percent(ratio)} [{_percent(low)}, {_percent(high)}]"
