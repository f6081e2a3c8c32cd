"""All ablations of the small settings in one table.

    python -m experiments.ablations                       # about half an hour on two cores; resumes; prints Markdown

Each row is a run folder of its own and shares the calibration of the others. Controls: `base` and `base averaged`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import gprune
from gprune import cli
from gprune.evaluation.perplexity import paired_bootstrap_ratio
from gprune.report import by_stage, generalisation_gap, geometric_mean, markdown

HERE = Path(__file__).parent
ROWS = (
    "recovery_least_squares", "random_partition", "no_switch", "no_refinement", "base_allocation", "uniform_sparsity",
    "drift_only", "learn_on_score_corpus", "single_drift_corpus", "recovery_bias",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("flags", nargs="*", help="further flags of train.py, after --")
    flags = parser.parse_args().flags
    cli.quiet()
    default = gprune.prune(cli.parse([*flags]))
    base_nll = unseen_nll(default.records, "base", "none")
    rows = [["run", "stage", "recovery", "seen", "unseen", "gap", "unseen / base"]]
    rows += table_rows("default", default.records, base_nll, ("base", "base_averaged", "gprune"))
    for name in ROWS:
        result = gprune.prune(cli.parse(["--config", str(HERE / "ablations" / f"{name}.yaml"), *flags]))
        stages = ("base", "gprune") if name.startswith("recovery") else ("gprune",)
        rows += table_rows(name, result.records, base_nll, stages, recovered=name.startswith("recovery"))
        print(markdown(rows[:1] + rows[-len(stages) :]), flush=True)
    print("\n" + markdown(rows))


def unseen_nll(records, stage, recovery):
    """Summed nll per window of every unseen corpus."""
    return {
        r["corpus"]: r["window_nll"]
        for r in records
        if not r["seen"] and r["stage"] == stage and r["recovery"] == recovery
    }


def table_rows(name, records, base_nll, stages, *, recovered=False):
    """One row per stage: geometric means, gap, and the unseen mean over `base` with its 95 % interval."""
    table, seen = by_stage(records), {r["corpus"]: r["seen"] for r in records}
    tokens = records[0]["seq_len"] - 1
    rows = []
    for (stage, recovery), values in table.items():
        if stage not in stages or (recovered and recovery == "none"):
            continue
        # An ablation that uses fewer corpora sees fewer; rows are compared on what the default run has not seen.
        ratio, low, high = paired_bootstrap_ratio(unseen_on(records, stage, recovery, base_nll), base_nll, tokens)
        rows.append(
            [
                name, stage, recovery,
                f"{geometric_mean(v for c, v in values.items() if c not in base_nll):.1f}",
                f"{geometric_mean(values[c] for c in base_nll):.1f}",
                f"{generalisation_gap(values, table[('dense', 'none')], {c: c not in base_nll for c in seen}):.2f}",
                f"{ratio:.3f} [{low:.3f}, {high:.3f}]",
            ]
        )  # fmt: skip
    return rows


def unseen_on(records, stage, recovery, base_nll):
    """The same corpora as `base_nll`, whether or not this run saw them."""
    return {
        r["corpus"]: r["window_nll"]
        for r in records
        if r["corpus"] in base_nll and r["stage"] == stage and r["recovery"] == recovery
    }


if __name__ == "__main__":
    main()
