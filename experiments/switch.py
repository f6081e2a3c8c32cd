"""What should unreliable modules switch to? In the standard protocol, on text never reported.

    GPRUNE_DATA_DIR=mirrors python -m experiments.switch             # a few minutes; prints Markdown

1. Order inside modules: Kendall tau, weighted by pairs, between each activation-free metric and the importance that
   `wanda_sp` and `taylor` give on text that nothing else here reads, over all modules and over the switched ones.
   `random` is the zero; the scoring corpus' own `wanda_sp` is what the switch gives up. `consensus`, the mean rank
   over the drift corpora, is no activation-free metric: it averages the distributions where the others ignore them.
2. Perplexity over dense, geometric means, of masks at 50 % of the FFN under the base metric's allocation: with the
   switched modules, and with all modules, ranked by the metric.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from experiments.evidence import batches
from gprune import cli, steps
from gprune.architectures import blocks_of
from gprune.collector import collect
from gprune.corpora import load_corpus
from gprune.data import make_windows
from gprune.drift import fractional_ranks, module_agreements, pair_weighted_mean
from gprune.evaluation.perplexity import geometric_mean, perplexity
from gprune.gates import masked
from gprune.importance import IMPORTANCE, score_units
from gprune.preparation import JOIN, check, load, prepare_text
from gprune.reliability import assess_reliability, within_module_ranks
from gprune.report import markdown
from gprune.session import opened
from gprune.stages.sparsity import ModuleRanks, masks_from_thresholds, start_thresholds

PROTOCOL = Path(__file__).parent / "protocol.yaml"
JUDGES = ("code", "multilingual")  # embedded; neither calibrates nor is reported in any table


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, prog="python -m experiments.switch"
    )
    parser.add_argument("flags", nargs="*", help="further flags of train.py, after --")
    flags = parser.parse_args().flags
    cli.quiet()
    quiet = ["--logging.mode=disabled", "--run.dir=runs/switch", "--sparsity.allocation=uniform"]
    cfg = cli.parse(["--config", str(PROTOCOL), *quiet, *flags])
    plan = check(cfg)
    model, tokenizer = load(cfg, plan.device)
    text = prepare_text(cfg, tokenizer)
    with opened(cfg, model, text) as run:
        order, masks = compare(cfg, run, plan, model, tokenizer, text)
    sys.stdout.write("\n" + markdown(order) + "\n\n" + markdown(masks) + "\n")


def compare(cfg, run, plan, model, tokenizer, text):
    """Rows of the two tables."""
    blocks, free = blocks_of(model), [name for name in IMPORTANCE if IMPORTANCE[name].activation_free]
    statistics = steps.calibrate(cfg, run, model, text)
    source = statistics[cfg.corpora.score]
    scores = score_units(cfg.importance, blocks, source, attention=False)
    base = steps.base_masks(cfg, blocks, scores, source, plan.costs, plan.target)
    drift = steps.measure_drift(cfg, blocks, statistics)
    labels = steps.partition_neurons(cfg, run, blocks, drift)
    r = cfg.reliability
    reliability = assess_reliability(
        labels, [fractional_ranks(s) for s in scores.ffn], [d.drift for d in drift], [d.floor for d in drift],
        sensitivity_quantile=r.sensitivity_quantile, score_quantile=r.score_quantile,
    )  # fmt: skip
    switched = [record.switched for record in reliability]

    def windows(corpus, split, samples, seed):
        return make_windows(
            load_corpus(corpus, split), tokenizer, corpus=corpus, split=split, num_samples=samples,
            seq_len=cfg.corpora.seq_len, seed=seed, join=JOIN,
        )  # fmt: skip

    judged = {}
    for corpus in JUDGES:
        tokens = windows(corpus, "train", 16, 0).tokens
        judged[corpus] = collect(model, batches(tokens, cfg.corpora.batch_size), saliency=("ffn",))
    truth = {
        (name, corpus): score_units(name, blocks, s, attention=False).ffn
        for name in ("wanda_sp", "taylor")
        for corpus, s in judged.items()
    }
    fallback = {name: score_units(name, blocks, source, attention=False).ffn for name in free}
    fallback["consensus"] = [d.ranks.mean(0) for d in drift]

    order = [
        ["rank inside modules by", *(f"{n}, {which}" for n in ("wanda_sp", "taylor") for which in ("all", "switched"))]
    ]
    for name, by in [("wanda_sp on the scoring corpus", scores.ffn), *fallback.items()]:
        cells = []
        for judge in ("wanda_sp", "taylor"):
            for keep in ([torch.ones_like(s) for s in switched], switched):
                taus = [agreement(by, truth[judge, corpus], labels, keep) for corpus in JUDGES]
                cells.append(f"{sum(taus) / len(taus):.3f}")
        order.append([name, *cells])

    texts = {
        "development": [windows(c, "development", 8, 0) for c in cfg.corpora.learn],
        "never used": [windows(c, "development", 3, 0) for c in JUDGES],
    }
    dense = {w.corpus: perplexity(model, w).perplexity for group in texts.values() for w in group}

    def relative(masks):
        with masked(model, masks):
            return [
                f"{geometric_mean(perplexity(model, w).perplexity / dense[w.corpus] for w in group):.2f}"
                for group in texts.values()
            ]

    header = [f"{which}: {kind}" for which in ("switched", "everywhere") for kind in texts]
    rows = [["metric of the modules", *header], ["base metric, no modules", *relative(base), "", ""]]
    everywhere = [torch.ones_like(s) for s in switched]
    for name, by in fallback.items():
        cells = []
        for which in (switched, everywhere):
            p = [within_module_ranks(s, f, y, w) for s, f, y, w in zip(scores.ffn, by, labels, which, strict=True)]
            ranks = ModuleRanks(p, labels, [fractional_ranks(s) for s in scores.attention])
            start = start_thresholds(base, ranks)
            cells += relative(masks_from_thresholds(ranks, start, plan.costs, target=plan.target))
        rows.append([name, *cells])
    return order, rows


def agreement(mine, theirs, labels, keep) -> float:
    """Kendall tau inside the modules to `keep`, weighted by pairs, over all blocks."""
    values, sizes = [], []
    for a, b, y, chosen in zip(mine, theirs, labels, keep, strict=True):
        values.append(module_agreements(torch.stack([a, b]), y)[chosen])
        sizes.append(torch.bincount(y)[chosen])
    return pair_weighted_mean(torch.cat(values), torch.cat(sizes))


if __name__ == "__main__":
    main()
