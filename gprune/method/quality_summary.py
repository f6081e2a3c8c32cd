"""The result of a quality target: asked, predicted and measured rises of perplexity, with the worst corpora."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gprune.config import RunConfig
from gprune.corpora.load import corpus_labels
from gprune.evaluation.intervals import Estimate
from gprune.method.quality import FILE, percent, percent_with_interval, requested_rise
from gprune.method.run import Run
from gprune.runs.numbers import ByCorpus, Record, by_stage, unseen_ratio
from gprune.storage.files import read_json

WIDE = 0.5  # share of the requested rise by which a wide interval is above the limit


def quality_reached(run: Run, records: Sequence[Record]) -> dict[str, Any]:
    """Return the entry `quality` of the summary (see `numbers.entries`).

    It has requested, predicted and measured quality, on development and on unseen text. The key `numbers` has
    rises of perplexity above dense; other keys of the same names have ratios to dense.
    """
    stages = by_stage(records)
    final, dense = stages[run.cfg.final_stage], stages["dense"]
    reached = read_json(run.folder / FILE)["reached"]
    model, target = reached["model"], run.cfg.sparsity.target
    numbers = {name: model[name] for name in ("predicted", "got", "low", "high", "share")}
    limits_worst = run.cfg.sparsity.limit == "worst"
    text = "every development corpus" if limits_worst else "development text"
    phrases = [f"Quality: asked at most {target} of dense perplexity on {text}"]
    if model["predicted"]:
        phrases.append(f"predicted {percent(model['predicted'])}")
    worst = _worst_in_words(model["worst"], reached["asked"])
    got = percent_with_interval(model["got"], model["low"], model["high"])
    phrases.append(f"got {worst}" if limits_worst else f"got {got}, of which {worst}")
    unseen = unseen_ratio(final, dense)
    worst_unseen = _worst_unseen(final, dense)
    if unseen is not None:
        numbers |= {"unseen": unseen.value, "unseen_low": unseen.low, "unseen_high": unseen.high}
        phrases.append(f"on unseen text {percent_with_interval(unseen.value, unseen.low, unseen.high)}")
    if worst_unseen is not None:
        phrases.append(f"of which {_worst_in_words(worst_unseen, reached['asked'])}")
    largest = "; the largest possible cut" if reached["largest"] else ""
    phrases.append(f"removed {model['share']:.2%} of {run.cfg.sparsity.scope}{largest}")
    rises = {name: None if numbers[name] is None else numbers[name] - 1 for name in ("predicted", "got", "low", "high")}
    rises |= {
        "worst": model["worst"]["ratio"][0] - 1,
        "unseen": None if unseen is None else unseen.value - 1,
        "unseen_worst": None if worst_unseen is None else worst_unseen["ratio"][0] - 1,
    }
    entry = {
        "said": f"{', '.join(phrases)}.",
        "warnings": _warnings(run.cfg, numbers, worst_unseen),
        "numbers": {"asked": reached["asked"], **rises},
        "table": _table(reached["asked"], model, unseen, worst_unseen),
    }
    return {"quality": reached | numbers | entry | {"unseen_worst": worst_unseen}}


def _worst_unseen(final: ByCorpus, dense: ByCorpus) -> dict[str, Any] | None:
    """Return the unseen corpus whose perplexity rose most, with its ratio to dense; None without unseen text."""
    ratios = {corpus: unseen_ratio({corpus: r}, dense) for corpus, r in final.items()}
    ratios = {corpus: ratio for corpus, ratio in ratios.items() if ratio is not None}
    if not ratios:
        return None
    worst = max(ratios, key=lambda corpus: ratios[corpus].value)
    return {"corpus": worst, "ratio": list(ratios[worst])}


def _worst_in_words(worst: Mapping[str, Any], asked: float) -> str:
    """Format the worst corpus, its rise with its interval, and its distance from the limit."""
    points = 100 * (worst["ratio"][0] - 1 - asked)
    side = "above" if points > 0 else "below"
    rise = percent_with_interval(*worst["ratio"])
    return f"{rise} on {_label(worst)}, the worst corpus ({abs(points):.2f} points {side} the limit)"


def _label(worst: Mapping[str, Any]) -> str:
    """Return the short label of the worst corpus."""
    return corpus_labels([worst["corpus"]])[worst["corpus"]]


def _table(
    asked: float, model: Mapping[str, Any], unseen: Estimate | None, worst_unseen: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Return the table of the entry, with a line."""

    def in_percent(*ratios: float | None) -> list[float | None] | None:
        """Convert a ratio to dense and the ends of its interval to percent above dense."""
        return None if ratios[0] is None else [None if ratio is None else 100 * (ratio - 1) for ratio in ratios]

    cells = {
        "asked, %": 100 * asked,
        "parameters kept": model["parameters"],
        "removed, %": 100 * model["share"],
        "predicted, %": in_percent(model["predicted"]),
        "development, %": in_percent(model["got"], model["low"], model["high"]),
        "worst corpus": _label(model["worst"]),
        "worst, %": in_percent(*model["worst"]["ratio"]),
        "unseen, %": None if unseen is None else in_percent(*unseen),
        "worst unseen corpus": None if worst_unseen is None else _label(worst_unseen),
        "worst unseen, %": None if worst_unseen is None else in_percent(*worst_unseen["ratio"]),
        "models tried": model["models"],
    }
    return {
        "title": "Parameters at the same quality",
        "columns": list(cells),
        "rows": [list(cells.values())],
        "digits": {"asked, %": 1},
        "note": "The largest share that was found whose development perplexity, above dense, is at most what was "
        "asked: the mean over corpora or, with --sparsity.limit worst, every corpus. In brackets 95 % intervals: "
        "Student's t over windows, paired.",
    }


def _warnings(cfg: RunConfig, numbers: Mapping[str, float], worst_unseen: Mapping[str, Any] | None) -> list[str]:
    """Return a line for a wide interval on development text, and one if unseen text is above the limit.

    An interval is wide if its upper end is above the limit by more than half of the requested rise. The unseen text is
    the worst corpus with `--sparsity.limit worst`, otherwise the mean.
    """
    target, rise = cfg.sparsity.target, requested_rise(cfg)
    warnings = []
    if numbers["high"] > 1 + (1 + WIDE) * rise:
        warnings.append(
            f"The interval on development text reaches {percent(numbers['high'])}, far above the limit {target}: "
            "development text is too short. Raise --evaluation.development_samples, or use larger corpora."
        )
    unseen = [numbers["unseen"], numbers["unseen_low"], numbers["unseen_high"]] if "unseen" in numbers else None
    of_corpus = ""
    if cfg.sparsity.limit == "worst" and worst_unseen is not None:
        unseen, of_corpus = worst_unseen["ratio"], f" of '{_label(worst_unseen)}'"
    if unseen is not None and unseen[0] > 1 + rise:
        warnings.append(
            f"Unseen text{of_corpus} is above the limit {target}: {percent_with_interval(*unseen)}. The limit holds "
            "on development text of the corpora that the run reads. Lower --sparsity.target, or add corpora like the "
            "unseen text to --corpora.drift and --corpora.recover."
        )
    return warnings
