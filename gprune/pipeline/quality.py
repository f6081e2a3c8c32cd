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
from gprune.errors import UserError
from gprune.evaluation.intervals import geometric_mean, paired_ratio
from gprune.evaluation.perplexity import PerplexityResult
from gprune.evaluation.tolerance import largest_share
from gprune.models.masks import Masks
from gprune.pipeline.cost import LEARNED_TRIES, TRIES
from gprune.pipeline.evaluate import dense_perplexity, measure_perplexity, spread
from gprune.pipeline.recover import Stage, learned_file, shrink
from gprune.pipeline.run import Run
from gprune.pipeline.sparsity import MasksOf
from gprune.recoveries import recovery_of
from gprune.runs import schema
from gprune.runs.folder import broadcast
from gprune.runs.numbers import Record, estimates, row_name
from gprune.sparsity.budget import Budget
from gprune.sparsity.search import SearchResult, find_largest_cut
from gprune.storage.files import content_hash, read_json, write_json

log = logging.getLogger("gprune")
FILE = "quality.json"
TOLERATED = 3, 10  # percent of perplexity above dense
FIRST = 0.1  # sparsity of the first trial
EXPONENT = 1.5  # assumed exponent of log perplexity in the sparsity, until two models are measured
# Tolerance of the search: a share of the requested rise, and of the dense perplexity. The curve of SmolLM2 fluctuates
# by 0.001 from one neuron to the next.
UNUSED = 0.05, 0.002
UNUSED_LEARNED = 0.1, 0.005  # if each model has to be trained


class Trials:
    """Trials of the search: models of a run with their perplexity on development text.

    Args:
        run: the run, with the largest budget that its units allow.
        statistics: statistics by corpus.
    """

    def __init__(self, run: Run, statistics: Mapping[str, CorpusStatistics]):
        self.run, self.statistics, self.asked = run, statistics, run.cfg.sparsity.quality
        self.file = run.folder / FILE
        known = read_json(self.file, run=run.folder.key, check=schema.QualityTrials.problem) or {}
        self.measured: dict[str, list[dict[str, Any]]] = broadcast(known.get("measured", {}))
        self.trained: dict[str, Masks] = {}  # key -> masks of trials that are trained, in order
        with run.folder.step("quality"):
            model = spread(run, run.model)
            self.dense = [
                dense_perplexity(run, model, w, "dense", measure=measure_perplexity) for w in run.text.development
            ]
        self.step = run.budget.step
        self.most = math.ceil(run.budget.target / self.step)

    def budget(self, cut: int) -> Budget:
        """Return the budget of `cut` smallest steps, at most the largest budget."""
        return self.run.budget.removing(min(cut * self.step, self.run.budget.target))

    def results(self, masks: Masks, row: Stage, budget: Budget) -> list[PerplexityResult]:
        """Return the perplexity of a recovered model on each development text, measured or from an earlier trial."""
        run, key = self.run, f"{row[1]} {content_hash(masks.tensors())}"
        learns = recovery_of(row[1]).learns
        if learns:
            self.trained.setdefault(key, masks)
        if key not in self.measured:
            name = f"{row_name(*row)} less {budget.target:,}"
            with run.folder.step("quality"), run.folder.part(name):
                trial = list(self.trained).index(key) if learns else None
                model = spread(run, shrink(run, masks, self.statistics, row=row, trial=trial))
                run.meter.watch(model)
                results = [measure_perplexity(run, model, w, name) for w in run.text.development]
            self.measured[key] = [{n: v for n, v in vars(r).items() if v is not None} for r in results]
            self.write(measured=self.measured)
            rise = math.expm1(self.rise(results))
            log.info("%s without %.4g%% of %s: %+.2f%% of dense development perplexity",
                     row_name(*row), 100 * budget.sparsity, run.cfg.sparsity.scope, 100 * rise)  # fmt: skip
        return [PerplexityResult(**of_text) for of_text in self.measured[key]]

    def write(self, **entries: Any) -> None:
        """Add entries to `quality.json`, unless the run is finished."""
        if not self.run.folder.finished:
            known = read_json(self.file, run=self.run.folder.key, check=schema.QualityTrials.problem) or {}
            write_json(self.file, known | entries, run=self.run.folder.key)

    def rise(self, results: Sequence[PerplexityResult]) -> float:
        """Return the log of the ratio to dense: the mean over corpora of the difference in nats per token."""
        return sum(r.nll - d.nll for r, d in zip(results, self.dense, strict=True)) / len(self.dense)

    def interval(self, results: Sequence[PerplexityResult]) -> tuple[float, float, float]:
        """Return exp of `rise` with its paired 95 % interval over windows."""
        text = self.run.text.development
        own, dense = ({w.corpus: r.window_nll for w, r in zip(text, of, strict=True)} for of in (results, self.dense))
        return paired_ratio(own, dense, text[0].tokens.shape[1] - 1)

    def search(
        self, row: Stage, masks_of: MasksOf, *, after: SearchResult | None = None, expected: float | None = None
    ) -> SearchResult:
        """Search the largest cut of a row that keeps the quality.

        Args:
            row: (stage, recovery).
            masks_of: masks of the stage as a function of the budget.
            after: an earlier search with similar models; this search starts at its result.
            expected: the rise that is expected there.
        """
        learns = recovery_of(row[1]).learns
        share, of_dense = UNUSED_LEARNED if learns else UNUSED

        def rise(cut: int) -> float:
            budget = self.budget(cut)
            return self.rise(self.results(masks_of(budget), row, budget))

        begun = after is not None and after.best is not None
        first = after.best.cut if begun else round(FIRST * self.run.budget.costs.total / self.step)
        return find_largest_cut(
            rise, math.log1p(self.asked), self.most, first=first, expected=expected,
            exponent=after.exponent(EXPONENT) if begun else EXPONENT, unused=min(share, of_dense / self.asked),
            tries=LEARNED_TRIES if learns else TRIES,
        )  # fmt: skip

    def controls(self, masks_of: Mapping[str, MasksOf]) -> dict[str, SearchResult]:
        """Search for all controls, `averaged` first. Thresholds are learned at the sparsity of the first one."""
        cfg = self.run.cfg
        rows = {stage for stage, _ in cfg.stages} - {cfg.final}
        names = [name for name in ("averaged", "base") if name in masks_of and (name in rows or cfg.learns)]
        names = [name for i, name in enumerate(names) if name in rows or i == 0]
        found: dict[str, SearchResult] = {}
        for name in names:
            row = name, cfg.training_free_recovery
            found[name] = self.search(row, masks_of[name], after=next(iter(found.values()), None))
        return found


def with_learning_budget(run: Run, statistics: Mapping[str, CorpusStatistics], masks_of: Mapping[str, MasksOf]) -> Run:
    """Return the run with the budget at which thresholds are learned.

    For a quality target it is the budget found for the first control, otherwise the budget of the run.
    """
    cfg = run.cfg
    if not (cfg.sparsity.quality and cfg.learns):
        return run
    run.step(7, "Finding the share at which sparsity is learned")
    trials = Trials(run, statistics)
    first = "averaged" if "averaged" in masks_of else "base"
    best = trials.search((first, cfg.training_free_recovery), masks_of[first]).best
    return run.within(trials.budget(best.cut if best else 1))


def with_quality_budget(run: Run, statistics: Mapping[str, CorpusStatistics], masks_of: Mapping[str, MasksOf]) -> Run:
    """Return the run with the largest budget that keeps the quality; the same run if the target is not a quality.

    Raises:
        UserError: if even the smallest cut does not keep the quality.
    """
    cfg, s = run.cfg, run.cfg.sparsity
    if not s.quality:
        return run
    run.step(8, "Finding the share that keeps the quality")
    trials = Trials(run, statistics)
    final, unlearned = masks_of[cfg.final], (cfg.final, cfg.training_free_recovery)
    controls = trials.controls(masks_of)
    found = searched = trials.search(unlearned, final, after=next(iter(controls.values()), None))
    if unlearned != cfg.own_row:
        expected = searched.best.rise if searched.best else None
        found = trials.search(cfg.own_row, final, after=searched, expected=expected)
    if found.best is None:
        least = trials.budget(1)
        worse = trials.interval(trials.results(final(least), cfg.own_row, least))[0]
        removed = f"{least.costs.removed(final(least)):,} {s.currency.replace('_', ' ')}"
        raise UserError(
            f"--sparsity.target must be above {_percent(worse)}, the change of development perplexity by the smallest "
            f"cut ({removed}); got {s.target}."
        )
    rows = {(name, unlearned[1]): one for name, one in controls.items()} | {unlearned: searched, cfg.own_row: found}
    listed = [stage for stage, _ in cfg.stages]
    same = [_needed(trials, row, one, masks_of[row[0]]) for row, one in rows.items() if row[0] in listed]
    reached = {"asked": s.quality, "largest": found.best.cut == trials.most, "rows": same}
    if reached["largest"]:
        log.warning("Even the largest possible cut keeps the target %s of development perplexity.", s.target)
    trials.write(reached=reached)
    _forget(trials, found, final)
    return run.within(trials.budget(found.best.cut))


def _needed(trials: Trials, row: Stage, found: SearchResult, masks_of: MasksOf) -> dict[str, Any]:
    """Return how many parameters a row keeps at the requested quality (`schema.SameQuality`)."""
    run, name = trials.run, row_name(*row)
    if found.best is None:
        return {"row": name, "models": len(found.points)}
    budget = trials.budget(found.best.cut)
    masks = masks_of(budget)
    units = run.budget.costs.in_parameters
    got, low, high = trials.interval(trials.results(masks, row, budget))
    predicted = found.best.predicted
    return {
        "row": name,
        "models": len(found.points),
        "share": run.budget.costs.removed(masks) / run.budget.costs.total,
        "parameters": run.model.num_parameters() - units.removed(masks),
        "predicted": None if predicted is None else math.exp(predicted),
        "got": got,
        "low": low,
        "high": high,
    }


def _forget(trials: Trials, found: SearchResult, masks_of: MasksOf) -> None:
    """Remove the learned tensors of trials that are not the result."""
    run, name = trials.run, trials.run.cfg.recovery
    own = learned_file(masks_of(trials.budget(found.best.cut)), name)
    for path in {learned_file(masks, name) for masks in trials.trained.values()} - {own}:
        for file in (run.folder / path).parent.glob(f"{(run.folder / path).name}-*.safetensors"):
            file.unlink(missing_ok=True)


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
    means = {float(share): geometric_mean(of.values()) for share, of in curve.items() if of}
    shares = {percent: largest_share(means, 1 + percent / 100) for percent in TOLERATED}
    if None in shares.values():
        return None
    (least, first), *others = shares.items()
    words = [f"within {least} % of dense up to {first} of {run.cfg.sparsity.scope}"]
    words += [f"within {percent} % up to {share}" for percent, share in others if share != first]
    unrecovered = "" if run.cfg.recovery == "none" else ", under masks without recovery"
    said = f"Development perplexity stays {', '.join(words)}{unrecovered}."
    return {"said": said, "shares": {str(p): share.value for p, share in shares.items()}}


def quality_reached(run: Run, records: Sequence[Record]) -> dict[str, Any] | None:
    """Return the ratio to dense perplexity: requested, predicted and measured, on development and on unseen text.

    None if the target is not a quality.
    """
    if not run.cfg.sparsity.quality:
        return None
    reached = read_json(run.folder / FILE, run=run.folder.key, check=schema.QualityTrials.problem)["reached"]
    own, unseen = reached["rows"][-1], estimates(records, run.cfg.own_row, None)["unseen_over_dense"]
    numbers = {name: own[name] for name in ("predicted", "got", "low", "high", "share")}
    got = f"{_percent(own['got'])} [{_percent(own['low'])}, {_percent(own['high'])}]"
    said = [f"Quality: asked at most {run.cfg.sparsity.target} of dense perplexity on development text"]
    said += [f"predicted {_percent(own['predicted'])}"] if own["predicted"] else []
    said += [f"got {got}"]
    if unseen is not None:
        numbers |= {"unseen": unseen.value, "unseen_low": unseen.low, "unseen_high": unseen.high}
        ends = _percent(unseen.low), _percent(unseen.high)
        said += [f"on unseen text {_percent(unseen.value)} [{ends[0]}, {ends[1]}]"]
    limit = "; the largest possible cut" if reached["largest"] else ""
    removed = f"removed {own['share']:.2%} of {run.cfg.sparsity.scope}{limit}"
    return reached | numbers | {"said": f"{', '.join([*said, removed])}."}


def _percent(ratio: float) -> str:
    """Format a ratio to dense as a signed percentage."""
    return f"{100 * (ratio - 1):+.2f}%"
