"""Quality targets: find the largest sparsity whose recovered model keeps development perplexity near dense.

Models of several sparsities are measured on development text. Masks of any sparsity follow from one calibration: from
scores, or from thresholds learned at a first sparsity. There are up to four searches, each by `find_largest_cut`:

1. For the sparsity at which thresholds are learned: with masks of the control `averaged`, otherwise of `base`, and the
   parts of `--recovery` that do not train.
2. For each control with the same recovery, to report how many parameters it needs for the same quality.
3. For the run's main row with the same recovery. If `--recovery` does not train, this is the result.
4. Starting from that result, for the main row with the complete `--recovery`, in few steps.

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
from gprune.evaluation.intervals import Interval, geometric_mean, paired_ratio
from gprune.evaluation.perplexity import PerplexityResult
from gprune.evaluation.tolerance import largest_share
from gprune.models.masks import Masks
from gprune.pipeline.cost import LEARNED_TRIES, TRIES
from gprune.pipeline.evaluate import dense_perplexity, measure_perplexity, shard_if_requested
from gprune.pipeline.recover import learned_file, shrink
from gprune.pipeline.run import Run
from gprune.pipeline.sparsity import MasksOf
from gprune.recoveries import recovery_of
from gprune.runs.folder import broadcast
from gprune.runs.numbers import Record, Stage, estimates, row_name
from gprune.sparsity.budget import Budget
from gprune.sparsity.search import SearchResult, find_largest_cut
from gprune.storage.files import content_hash, read_json, write_json

log = logging.getLogger("gprune")
FILE = "quality.json"
TOLERATED_PERCENT = 3, 10  # percent of perplexity above dense
FIRST_SPARSITY = 0.1  # sparsity of the first trial
WIDE = 0.5  # share of the requested rise by which a wide interval is above the limit
EXPONENT = 1.5  # until two models are measured, log perplexity is assumed to rise with this power of the sparsity
# Tolerance of the search: a share of the requested rise, and of the dense perplexity. The curve of SmolLM2 fluctuates
# by 0.001 from one neuron to the next.
TOLERANCE = 0.05, 0.002
TRAINED_TOLERANCE = 0.1, 0.005  # if each model has to be trained


class Trials:
    """Trials of the search: models of a run with their perplexity on development text.

    Args:
        run: the run, with the largest budget that its units allow.
        statistics: statistics by corpus.
    """

    def __init__(self, run: Run, statistics: Mapping[str, CorpusStatistics]):
        self.run, self.statistics = run, statistics
        self.requested_rise = run.cfg.sparsity.quality  # relative rise of perplexity, such as 0.03
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

    def budget(self, cut: int) -> Budget:
        """Return the budget of `cut` smallest steps, at most the largest budget."""
        return self.run.budget.removing(min(cut * self.step, self.run.budget.target))

    def results(self, masks: Masks, row: Stage, budget: Budget) -> list[PerplexityResult]:
        """Return the perplexity of a recovered model on each development text, measured or from an earlier trial.

        Args:
            masks: masks of the model.
            row: (stage, recovery).
            budget: the budget that the masks meet, for logs.
        """
        run, key = self.run, self._key(masks, row)
        learns = recovery_of(row[1]).learns
        if learns:
            self.trained.setdefault(key, masks)
        if key not in self.measured:
            name = f"{row_name(*row)} less {budget.target:,}"
            with run.folder.step("quality"), run.folder.part(name):
                trial = list(self.trained).index(key) if learns else None
                model = shard_if_requested(run, shrink(run, masks, self.statistics, row=row, trial=trial))
                run.meter.watch(model)
                results = [measure_perplexity(run, model, w, name) for w in run.text.development]
            self.measured[key] = [{n: v for n, v in vars(r).items() if v is not None} for r in results]
            self.write(measured=self.measured)
            rise = math.expm1(self.rise(results))
            log.info("%s without %.4g%% of %s: %+.2f%% of dense development perplexity",
                     row_name(*row), 100 * budget.sparsity, run.cfg.sparsity.scope, 100 * rise)  # fmt: skip
        return [PerplexityResult(**of_text) for of_text in self.measured[key]]

    def number(self, masks: Masks, row: Stage) -> int | None:
        """Return the number of a trained trial, from 1; None for a row that is not trained."""
        key = self._key(masks, row)
        return 1 + list(self.trained).index(key) if key in self.trained else None

    @staticmethod
    def _key(masks: Masks, row: Stage) -> str:
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
        self, row: Stage, masks_of: MasksOf, *, after: SearchResult | None = None, expected: float | None = None
    ) -> SearchResult:
        """Search the largest cut of a row that keeps the quality.

        Args:
            row: (stage, recovery).
            masks_of: masks of the stage as a function of the budget.
            after: an earlier search with similar models; this search starts at its result.
            expected: predicted rise of the first cut.
        """
        learns = recovery_of(row[1]).learns
        share_of_rise, share_of_dense = TRAINED_TOLERANCE if learns else TOLERANCE

        def rise(cut: int) -> float:
            budget = self.budget(cut)
            return self.rise(self.results(masks_of(budget), row, budget))

        if after is not None and after.best is not None:
            first_cut, exponent = after.best.cut, after.exponent(EXPONENT)
        else:
            first_cut, exponent = round(FIRST_SPARSITY * self.run.budget.costs.total / self.step), EXPONENT
        return find_largest_cut(
            rise, math.log1p(self.requested_rise), self.max_cut, first=first_cut, expected=expected, exponent=exponent,
            unused=min(share_of_rise, share_of_dense / self.requested_rise), tries=LEARNED_TRIES if learns else TRIES,
        )  # fmt: skip

    def search_controls(self, masks_of: Mapping[str, MasksOf]) -> dict[str, SearchResult]:
        """Search for all controls, `averaged` first. Thresholds are learned at the sparsity of the first one.

        Args:
            masks_of: masks of each stage as a function of the budget.

        Returns:
            Searches by stage: of controls in the result table, and of the first control if thresholds are learned.
        """
        cfg = self.run.cfg
        rows = {stage for stage, _ in cfg.stages} - {cfg.final}
        names = [name for name in ("averaged", "base") if name in masks_of and (name in rows or cfg.learns)]
        searches: dict[str, SearchResult] = {}
        for position, name in enumerate(names):
            if name in rows or position == 0:
                first_search = next(iter(searches.values()), None)
                searches[name] = self.search((name, cfg.training_free_recovery), masks_of[name], after=first_search)
        return searches


def with_learning_budget(run: Run, statistics: Mapping[str, CorpusStatistics], masks_of: Mapping[str, MasksOf]) -> Run:
    """Return the run with the budget at which thresholds are learned.

    For a quality target it is the budget found for the first control (the smallest cut if none keeps the quality),
    otherwise the budget of the run. The arguments are those of `with_quality_budget`.
    """
    cfg = run.cfg
    if not (cfg.sparsity.quality and cfg.learns):
        return run
    run.step(7, "Finding the share at which sparsity is learned")
    trials = Trials(run, statistics)
    first_control = "averaged" if "averaged" in masks_of else "base"
    best = trials.search((first_control, cfg.training_free_recovery), masks_of[first_control]).best
    return run.with_budget(trials.budget(best.cut if best else 1))


def with_quality_budget(run: Run, statistics: Mapping[str, CorpusStatistics], masks_of: Mapping[str, MasksOf]) -> Run:
    """Return the run with the largest budget that keeps the quality; the same run if the target is not a quality.

    The trials and the sizes of all rows are stored in `quality.json`.

    Args:
        run: the open run, with the largest budget that its units allow.
        statistics: statistics by corpus.
        masks_of: masks of each stage as a function of the budget.

    Raises:
        UserError: if even the smallest cut does not keep the quality.
    """
    cfg, s = run.cfg, run.cfg.sparsity
    if not s.quality:
        return run
    run.step(8, "Finding the share that keeps the quality")
    trials = Trials(run, statistics)
    final_masks = masks_of[cfg.final]
    untrained_row = (cfg.final, cfg.training_free_recovery)
    search_of_control = trials.search_controls(masks_of)
    untrained = trials.search(untrained_row, final_masks, after=next(iter(search_of_control.values()), None))
    result = untrained
    if untrained_row != cfg.own_row:
        expected = untrained.best.rise if untrained.best else None
        result = trials.search(cfg.own_row, final_masks, after=untrained, expected=expected)
    if result.best is None:
        smallest = trials.budget(1)
        ratio, _, _ = trials.interval(trials.results(final_masks(smallest), cfg.own_row, smallest))
        removed = f"{smallest.costs.removed(final_masks(smallest)):,} {s.currency.replace('_', ' ')}"
        raise UserError(
            f"--sparsity.target must be above {_percent(ratio)}, the change of development perplexity by the smallest "
            f"cut ({removed}); got {s.target}."
        )
    searches = {(stage, cfg.training_free_recovery): search for stage, search in search_of_control.items()}
    searches |= {untrained_row: untrained, cfg.own_row: result}
    stages = [stage for stage, _ in cfg.stages]
    sizes = [
        _size_of_row(trials, row, search, masks_of[row[0]]) for row, search in searches.items() if row[0] in stages
    ]
    is_largest = result.best.cut == trials.max_cut
    if is_largest:
        log.warning("Even the largest possible cut keeps the target %s of development perplexity.", s.target)
    kept_masks = final_masks(trials.budget(result.best.cut))
    number = trials.number(kept_masks, cfg.own_row)
    trials.write(reached={"asked": s.quality, "largest": is_largest, "trial": number, "rows": sizes})
    _remove_other_trials(trials, kept_masks)
    return run.with_budget(trials.budget(result.best.cut))


def _size_of_row(trials: Trials, row: Stage, search: SearchResult, masks_of: MasksOf) -> dict[str, Any]:
    """Return how many parameters a row needs for the requested quality.

    Args:
        trials: the measured models.
        row: (stage, recovery).
        search: result of the search for the row.
        masks_of: masks of the stage as a function of the budget.
    """
    run, name = trials.run, row_name(*row)
    if search.best is None:
        return {"row": name, "models": len(search.points)}
    budget = trials.budget(search.best.cut)
    masks = masks_of(budget)
    removed_parameters = run.budget.costs.in_parameters.removed(masks)
    ratio, low, high = trials.interval(trials.results(masks, row, budget))
    predicted_rise = search.best.predicted
    return {
        "row": name,
        "models": len(search.points),
        "share": run.budget.costs.removed(masks) / run.budget.costs.total,
        "parameters": run.model.num_parameters() - removed_parameters,
        "predicted": None if predicted_rise is None else math.exp(predicted_rise),
        "got": ratio,
        "low": low,
        "high": high,
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


def quality_entries(run: Run, records: Sequence[Record]) -> dict[str, dict[str, Any]]:
    """Return entries of the summary on quality, each with a line of text as `said`.

    `quality` is the result for a quality target; `tolerated` is the sparsity at which masks alone cost little.
    """
    entries = {"quality": quality_reached(run, records), "tolerated": tolerated_shares(run)}
    return {name: entry for name, entry in entries.items() if entry}


def tolerated_shares(run: Run) -> dict[str, Any] | None:
    """Return the largest sparsities at which masks alone raise development perplexity by at most 3 % and 10 %.

    They are interpolated on the curve that was measured after learning; None without a curve.
    """
    curve = run.folder.manifest.get("learning", {}).get("development_perplexity_by_sparsity") or {}
    means = {float(share): geometric_mean(by_corpus.values()) for share, by_corpus in curve.items() if by_corpus}
    shares = {percent: largest_share(means, 1 + percent / 100) for percent in TOLERATED_PERCENT}
    if None in shares.values():
        return None
    (lowest_percent, lowest_share), *others = shares.items()
    limits = [f"within {lowest_percent} % of dense up to {lowest_share} of {run.cfg.sparsity.scope}"]
    limits += [f"within {percent} % up to {share}" for percent, share in others if share != lowest_share]
    condition = "" if run.cfg.recovery == "none" else ", under masks without recovery"
    sentence = f"Development perplexity stays {', '.join(limits)}{condition}."
    return {"said": sentence, "shares": {str(percent): share.value for percent, share in shares.items()}}


def quality_reached(run: Run, records: Sequence[Record]) -> dict[str, Any] | None:
    """Return the ratio to dense perplexity: requested, predicted and measured, on development and on unseen text.

    None if the target is not a quality.
    """
    if not run.cfg.sparsity.quality:
        return None
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
    return reached | numbers | {"said": f"{', '.join(phrases)}.", "warnings": _warnings(run.cfg, numbers)}


def _warnings(cfg: RunConfig, numbers: Mapping[str, float]) -> list[str]:
    """Return a line for a wide interval on development text, and one if unseen text is above the limit.

    An interval is wide if its upper end is above the limit by more than half of the requested rise.
    """
    target, rise = cfg.sparsity.target, cfg.sparsity.quality
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
