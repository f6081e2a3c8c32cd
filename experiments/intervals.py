"""Coverage of 95 % intervals over few windows: percentile bootstrap, BCa, and Student's t.

python -m experiments.intervals [--repeats 1000]

The true value is known, since windows are drawn with replacement from those of a committed record: losses of the rows
`gates` and `base` of the headline, on four corpora. Intervals of three quantities are tested: the perplexity of one
model, the paired ratio of two models, and the gap between two corpora and the other two.
"""

from __future__ import annotations

import argparse
import math
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from scipy import stats

from gprune.studies.archive import finished_record
from gprune.studies.listing import Listing

HEADLINE = Path(__file__).parent / "headline.yaml"
UNSEEN = ("stackexchange", "gsm8k", "stories", "python_docs")
DRAWS = 2000
Interval = tuple[float, float]


def losses() -> list[dict[str, np.ndarray]]:
    """Losses (32,) in nats per token by corpus, of the headline's `gates` and `base`, seed 0, on the same windows."""
    records = {row.name: finished_record(row) for row in Listing.read(HEADLINE, seeds=[0]).rows}
    return [
        {
            r["corpus"]: np.array(r["window_nll"]) / (r["seq_len"] - 1)
            for r in records[name]["records"] if r["stage"] != "dense" and r["corpus"] in UNSEEN
        }
        for name in ("gates", "base")
    ]  # fmt: skip


def percentile(samples: Sequence[np.ndarray], weights: np.ndarray, rng: np.random.Generator) -> Interval:
    """Percentile bootstrap interval of 2,000 resamples. Corpora are resampled separately."""
    return bootstrapped(samples, weights, rng, "percentile")


def bca(samples: Sequence[np.ndarray], weights: np.ndarray, rng: np.random.Generator) -> Interval:
    """Efron's BCa bootstrap interval, which corrects for bias and skewness."""
    return bootstrapped(samples, weights, rng, "BCa")


def bootstrapped(samples: Sequence[np.ndarray], weights: np.ndarray, rng: np.random.Generator, method: str) -> Interval:
    """Bootstrap interval by `scipy.stats.bootstrap`."""

    def statistic(*parts: np.ndarray, axis: int = -1) -> np.ndarray:
        return sum(w * part.mean(axis=axis) for w, part in zip(weights, parts, strict=True))

    interval = stats.bootstrap(
        samples, statistic, n_resamples=DRAWS, method=method, vectorized=True, rng=rng, confidence_level=0.95
    ).confidence_interval
    return interval.low, interval.high


def student(samples: Sequence[np.ndarray], weights: np.ndarray, rng: np.random.Generator) -> Interval:
    """Student's t interval with the degrees of freedom of Welch and Satterthwaite."""
    parts = np.array([w**2 * part.var(ddof=1) / len(part) for w, part in zip(weights, samples, strict=True)])
    freedom = parts.sum() ** 2 / (parts**2 / (np.array([len(part) for part in samples]) - 1)).sum()
    half = stats.t.ppf(0.975, freedom) * math.sqrt(parts.sum())
    point = sum(w * part.mean() for w, part in zip(weights, samples, strict=True))
    return point - half, point + half


METHODS: dict[str, Callable[..., Interval]] = {"percentile": percentile, "BCa": bca, "Student's t": student}


def coverage(population: Sequence[np.ndarray], weights: np.ndarray, windows: int, repeats: int) -> list[float]:
    """Share of intervals that contain the true value, by method. All methods get the same samples."""
    rng = np.random.default_rng(0)
    truth = sum(w * part.mean() for w, part in zip(weights, population, strict=True))
    hits = np.zeros(len(METHODS))
    for _ in range(repeats):
        samples = [rng.choice(part, windows) for part in population]
        for i, method in enumerate(METHODS.values()):
            low, high = method(samples, weights, rng)
            hits[i] += low <= truth <= high
    return (hits / repeats).tolist()


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=1000, help="samples per row (default: %(default)s)")
    repeats = parser.parse_args().repeats
    if repeats < 1:
        parser.error(f"--repeats must be 1 or more; got {repeats}")
    warnings.simplefilter("ignore")  # samples of three equal windows give NaN intervals, which count as misses
    one, other = losses()
    ratio, mean = [one[c] - other[c] for c in UNSEEN], np.full(4, 0.25)
    rows = {
        "perplexity, 4 corpora": ([one[c] for c in UNSEEN], mean),
        "perplexity, 1 corpus": ([one["stories"]], np.ones(1)),
        "ratio, 4 corpora": (ratio, mean),
        "gap, 2 over 2 corpora": (ratio, np.array([0.5, 0.5, -0.5, -0.5])),
    }
    print(f"| number | windows of each | {' | '.join(METHODS)} |\n|---|---:|{'---:|' * len(METHODS)}")
    for name, (population, weights) in rows.items():
        for windows in (3, 6, 12, 32):
            shares = coverage(population, weights, windows, repeats)
            print(f"| {name} | {windows} | {' | '.join(f'{share:.1%}' for share in shares)} |", flush=True)


if __name__ == "__main__":
    main()
