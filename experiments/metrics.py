"""Metrics and baselines in the standard protocol: each metric alone and with gprune, on seen and unseen text.

    GPRUNE_DATA_DIR=mirrors python -m experiments.metrics            # resumes; prints token-hours, then Markdown
    python -m experiments.metrics --table                            # the tables again, from the records that are kept
    python -m experiments.metrics --metrics wanda_sp wifv --sparsities 0.5 --baselines -- --corpora.num_samples=8

One calibration pass (moments, Gram matrices, gradients) serves all rows. After each configuration its records are
written to `experiments/records/metrics/`; a configuration whose settings stand there is not run again. Flags of
train.py come after `--`.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import gprune
from gprune.console import Parser, guarded, quiet
from gprune.evaluation.intervals import generalisation_gap, geometric_mean, paired_bootstrap_ratio
from gprune.report.records import by_stage, row_name
from gprune.report.table import markdown
from gprune.storage.files import key_of, read_json, write_json
from gprune.studies.job import token_hours
from gprune.studies.listing import Row, flat, plain

HERE = Path(__file__).parent
RECORDS = HERE / "records" / "metrics"
METRICS = (
    "wanda_sp", "wifv", "ifv", "act_norm", "taylor", "taylor_second", "taylor_vector", "obs",
    "gaussian_sp", "magnitude", "magnitude_l1", "magnitude_down", "magnitude_down_l1", "random",
)  # fmt: skip
SPREAD = ("wanda_sp", "wifv", "ifv", "act_norm", "taylor")  # metrics anyone might have chosen
AT_OTHER_SPARSITIES = ("wanda_sp", "wifv", "act_norm", "taylor")
# As many parameters as 50 % of SmolLM2-135M's FFN, out of attention and FFN together.
BOTH = ["--sparsity.scope=attention+ffn", "--sparsity.target=0.375"]
BASELINES = {
    "wanda_sp, same cost (376 windows)": ["--corpora.num_samples=376"],
    "wanda_sp, global": ["--sparsity.allocation=global"],
    "wanda_sp, owl": ["--sparsity.allocation=owl"],
    "wanda_sp, least squares": ["--recovery=least_squares"],
    "obs, least squares": ["--importance=obs", "--recovery=least_squares"],
    "depth (ShortGPT)": ["--sparsity.allocation=depth"],
    "wifv, global": ["--importance=wifv", "--sparsity.allocation=global"],
    "wifv, global, bias (FLAP, FFN only)": [
        "--importance=wifv", "--sparsity.allocation=global", "--recovery=bias", "--corpora.recover=[wikitext2]",
    ],
    "gprune, consensus switch": ["--gprune=true", "--reliability.metric=consensus", "--evaluation.controls=[]"],
    "gprune, consensus everywhere": [
        "--gprune=true", "--reliability.metric=consensus", "--evaluation.controls=[]",
        "--reliability.sensitivity_quantile=0", "--reliability.score_quantile=1",
    ],
    # What serving asks for: widths on a grid, and one width for all blocks (exactly half of them at 50 %)
    "gprune, width multiple 64": ["--gprune=true", "--sparsity.width_multiple=64", "--evaluation.controls=[]"],
    "gprune, uniform width": ["--gprune=true", "--sparsity.uniform_width=true", "--evaluation.controls=[]"],
    "FLAP": [
        "--importance=wifv", "--sparsity.allocation=global", "--recovery=bias", "--corpora.recover=[wikitext2]", *BOTH,
    ],
    "Wanda-sp": [*BOTH],
    "LLM-Pruner, no tuning": ["--importance=taylor", "--sparsity.protect=[0,1,2,-1]", *BOTH],
}  # fmt: skip


@dataclass(frozen=True)
class Configuration:
    """One run and the name of its record."""

    name: str
    metric: str | None  # None for a baseline
    sparsity: float
    flags: tuple[str, ...]

    @cached_property
    def config(self) -> gprune.RunConfig:
        """Raises UserError, with the name, for what train.py would refuse."""
        return Row(self.name, 0, ("--config", str(HERE / "protocol.yaml"), *self.flags), {}).config

    @property
    def path(self) -> Path:
        """Where its record is or will be: never in the place of one with other settings."""
        slug = "".join(c if c.isalnum() else "-" for c in self.name.lower())
        own = RECORDS / f"{slug}-{key_of(settings=plain(self.config.settings()))[:8]}.json"
        plainly = RECORDS / f"{slug}.json"
        return plainly if not plainly.exists() or self.is_of(read_json(plainly)) else own

    def is_of(self, kept: dict[str, Any] | None) -> bool:
        """Whether a record has its settings.

        A setting that did not exist then had its default's effect. Controls are compared by the rows they left: what
        they are called, and which of them come by default, has changed.
        """
        if kept is None:
            return False
        default, before, now = (
            flat(plain(s)) for s in (gprune.RunConfig().settings(), kept["settings"], self.config.settings())
        )
        controls = {"evaluation.controls": None}
        return default | before | controls == now | controls


def configurations(
    metrics: Sequence[str], sparsities: Sequence[float], baselines: Iterable[str], flags: Sequence[str]
) -> Iterator[Configuration]:
    """50 % of all metrics first, then the baselines, then the other sparsities."""
    common = ["--export=none", "--logging.mode=disabled", "--run.dir=runs/metrics"]
    together = "--corpora.collect=[gram,saliency]"  # in the first one's pass, for all that come after it

    def of_metric(metric: str, sparsity: float) -> Configuration:
        # The control with the same corpora costs nothing but its evaluation; one metric shows what it does.
        controls = "[base,base_averaged]" if metric == METRICS[0] else "[base]"
        own = [f"--importance={metric}", f"--sparsity.target={sparsity}", f"--evaluation.controls={controls}"]
        return Configuration(f"{metric} {sparsity:g}", metric, sparsity, (*common, together, *own, *flags))

    first, *others = sparsities
    for metric in metrics:
        yield of_metric(metric, first)
    for name in baselines:
        yield Configuration(name, None, 0.5, (*common, "--gprune=false", *BASELINES[name], *flags))
    for sparsity in others:
        for metric in metrics:
            if metric in AT_OTHER_SPARSITIES:
                yield of_metric(metric, sparsity)


def run(c: Configuration) -> dict[str, Any]:
    """Run one configuration and keep its records."""
    cfg = c.config
    result = gprune.prune(cfg)
    kept = {
        "name": c.name,
        "flags": [flag for flag in c.flags if not flag.startswith(("--run.", "--logging.", "--corpora.collect"))],
        "settings": cfg.settings(),
        "summary": {k: v for k, v in result.summary.items() if k not in ("geometric_means", "unseen_over_base")},
        "records": [r | {"window_nll": [round(v, 4) for v in r["window_nll"]]} for r in result.records],
    }
    write_json(c.path, kept)
    return kept


def found(c: Configuration) -> dict[str, Any] | None:
    """The records of an earlier run with the same settings that hold every row asked for."""
    kept = read_json(c.path)
    if kept is None or not c.is_of(kept):
        return None
    held = {(r["stage"], r["recovery"]) for r in kept["records"]}
    return kept if held.issuperset(c.config.stages) else None


def rows_of(kept: dict[str, Any], reference: dict[str, list[float]] | None, seen: set[str]) -> list[list[str]]:
    """A row per stage but dense: perplexity by corpus, means, gap, and the unseen mean over two references.

    Args:
        kept: records of one configuration.
        reference: unseen window nll of the row that all are compared with; None: no such column.
        seen: the corpora that gprune uses; one division for all rows, also for those that use fewer.
    """
    table = by_stage(kept["records"])
    dense = table[("dense", "none")]
    nll = {
        key: {r["corpus"]: r["window_nll"] for r in kept["records"] if (r["stage"], r["recovery"]) == key}
        for key in table
    }
    tokens = kept["records"][0]["seq_len"] - 1
    flags = {corpus: corpus in seen for corpus in dense}
    order = sorted(dense, key=lambda corpus: corpus not in seen)
    rows = []
    for (stage, recovery), values in table.items():
        if stage == "dense":
            continue
        unseen = {corpus: nll[stage, recovery][corpus] for corpus in order if corpus not in seen}
        cells = [
            *(f"{values[corpus]:.1f}" for corpus in order),
            f"{geometric_mean(v for c, v in values.items() if c in seen):.1f}",
            f"{geometric_mean(v for c, v in values.items() if c not in seen):.1f}",
            f"{generalisation_gap(values, dense, flags):.2f}",
            _ratio(unseen, nll["base", recovery], tokens) if stage != "base" and ("base", recovery) in nll else "",
            "" if reference is None or unseen == reference else _ratio(unseen, reference, tokens),
        ]
        rows.append([kept["name"], row_name({"base": "alone"}.get(stage, stage), recovery), *cells])
    return rows


def _ratio(a: dict[str, list[float]], b: dict[str, list[float]], tokens: int) -> str:
    ratio, low, high = paired_bootstrap_ratio(a, {corpus: b[corpus] for corpus in a}, tokens)
    return f"{ratio:.3f} [{low:.3f}, {high:.3f}]"


def tables(done: Sequence[tuple[Configuration, dict[str, Any]]]) -> str:
    """Markdown: dense, the metrics by sparsity, the baselines, and what the choice of a metric is worth."""
    by_name = {c.name: kept for c, kept in done}
    start, first = done[0]
    seen = set(start.config.corpora.drift)
    dense = by_stage(first["records"])[("dense", "none")]
    order = sorted(dense, key=lambda corpus: corpus not in seen)
    head = [
        "",
        "",
        *(f"{c}*" if c in seen else c for c in order),
        "seen",
        "unseen",
        "gap",
        "/ alone",
        "/ wanda_sp alone",
    ]
    parts = ["dense: " + ", ".join(f"{corpus} {dense[corpus]:.2f}" for corpus in order)]
    for sparsity in dict.fromkeys(c.sparsity for c, _ in done):
        anchor = by_name.get(f"wanda_sp {sparsity:g}")
        reference = anchor and {
            r["corpus"]: r["window_nll"]
            for r in anchor["records"]
            if (r["stage"], r["recovery"]) == ("base", "none") and r["corpus"] not in seen
        }
        for title, chosen in (
            (f"{sparsity:.0%} of the FFN", [kept for c, kept in done if c.sparsity == sparsity and c.metric]),
            (f"Baselines, {sparsity:.0%}", [kept for c, kept in done if c.sparsity == sparsity and not c.metric]),
        ):
            rows = [row for kept in chosen for row in rows_of(kept, reference, seen)]
            if rows:
                parts.append(f"**{title}**\n\n" + markdown([head, *rows]))
        spread = metric_spread([(c, kept) for c, kept in done if c.sparsity == sparsity], seen)
        if spread:
            parts.append(spread)
    return "\n\n".join(parts)


def metric_spread(done: Sequence[tuple[Configuration, dict[str, Any]]], seen: set[str]) -> str:
    """log(max / min) of the unseen mean over `SPREAD`, alone and with gprune; empty where one of them is missing."""
    means: dict[str, list[float]] = {"base": [], "gprune": []}
    for c, kept in done:
        if c.metric in SPREAD:
            table = by_stage(kept["records"])
            for stage, values in means.items():
                values.append(geometric_mean(v for corpus, v in table[(stage, "none")].items() if corpus not in seen))
    if not means["base"] or len(means["base"]) < len(set(SPREAD) & set(METRICS)):
        return ""
    alone, ours = (math.log(max(v) / min(v)) for v in means.values())
    return (
        f"log(max / min) of the unseen mean over {', '.join(SPREAD)}: alone {alone:.3f}, with gprune {ours:.3f}, "
        f"ratio {ours / alone:.2f}"
    )


def parser() -> Parser:
    """The command line."""
    made = Parser(
        "python -m experiments.metrics",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Flags of train.py come after --, and last in every configuration.",
    )
    made.add_argument("--metrics", nargs="*", default=METRICS, help="default: all")
    made.add_argument("--sparsities", nargs="+", type=float, default=(0.5, 0.2, 0.3), help="all metrics at the first")
    made.add_argument("--baselines", nargs="*", default=tuple(BASELINES), choices=tuple(BASELINES), metavar="NAME")
    made.add_argument("--table", action="store_true", help="print what is there; run nothing")
    return made


def work(arguments: Sequence[str]) -> str:
    """Run what is missing; returns the tables."""
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    options, flags = parser().parse_args(arguments[:cut]), arguments[cut + 1 :]
    quiet()
    for name in options.metrics:
        gprune.IMPORTANCE[name]  # or UserError
    wanted = list(configurations(options.metrics, options.sparsities, options.baselines, flags))
    pending = [c for c in wanted if found(c) is None]
    if pending and not options.table:
        sys.stdout.write(token_hours(pending) + "\n")
        for c in pending:
            started = time.perf_counter()
            kept = run(c)
            sys.stdout.write(f"{c.name}: {time.perf_counter() - started:.0f} s, {len(kept['records'])} records kept\n")
            sys.stdout.flush()
    done = [(c, kept) for c in wanted if (kept := found(c)) is not None]
    return "\n" + (tables(done) if done else "No records yet.") + "\n"


def main() -> int:
    """Exit code 2 and one line for what a user can mend."""
    return guarded("experiments.metrics", lambda: work(sys.argv[1:]), stopped=". What was finished is kept.")


if __name__ == "__main__":
    sys.exit(main())
