"""Evidence that the two learned parts do what their names say, on the embedded model.

    python -m experiments.evidence --seeds 0 1 2          # about ten minutes on two cores; prints Markdown

1. Refinement. Modules are made from drift measured on 16 windows per corpus and judged on 16 other windows: Kendall
   agreement inside modules (pair-weighted), the same beyond what the spread of ranks gives away (range-matched), for
   k-means' start, the refined modules, and random and drift-only partitions of the refined sizes; blocks won.
2. Threshold learning. Cross-entropy of the hard masks on the whole calibration set and on development text, at the
   start (the base allocation) and at the end.
3. Straight-through gradients beside finite differences, for a sample of thresholds: of the loss under soft gates, and
   of the loss under hard gates, where a step of half a logit moves whole neurons.
"""

from __future__ import annotations

import argparse
import tempfile

import torch

import gprune
from gprune import cli, steps
from gprune.architectures import blocks_of
from gprune.collector import collect
from gprune.corpora import load_corpus
from gprune.data import make_windows
from gprune.drift import module_agreements, pair_weighted_mean, range_matched_agreement
from gprune.evaluation.perplexity import perplexity
from gprune.gates import gated, masked, soft_gate
from gprune.importance import score_units
from gprune.losses import next_token_loss
from gprune.masks import margins
from gprune.partition import same_sizes_by_drift, shuffled_partition
from gprune.preparation import check, load, prepare_text
from gprune.report import markdown
from gprune.session import opened
from gprune.stages.sparsity import masks_from_thresholds, start_thresholds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    seeds = parser.parse_args().seeds
    cli.quiet()
    refinement, learning = [], []
    for seed in seeds:
        cfg = gprune.RunConfig()
        cfg.run.seed, cfg.logging.mode, cfg.evaluation.curve = seed, "disabled", []
        cfg.evaluation.development_samples = 8
        with tempfile.TemporaryDirectory() as folder:
            cfg.run.dir = folder
            rows, losses, cosines = one_seed(cfg, gradients=seed == seeds[0])
        refinement += rows
        learning += losses
        if cosines is not None:
            gradient_rows = cosines
    print_tables(refinement, learning, gradient_rows)


def one_seed(cfg: gprune.RunConfig, *, gradients: bool):
    """Rows of the three tables for one seed."""
    plan = check(cfg)
    model, tokenizer = load(cfg, plan.device)
    text = prepare_text(cfg, tokenizer)
    with opened(cfg, model, text) as run:
        blocks = blocks_of(model)
        # 32 windows, of which the first half makes the modules and the second half judges them
        windows = {
            c: make_windows(
                load_corpus(c, "train"), tokenizer, corpus=c, split="train",
                num_samples=2 * cfg.corpora.num_samples, seq_len=cfg.corpora.seq_len, seed=cfg.run.seed,
            ).tokens.chunk(2)
            for c in cfg.corpora.drift
        }  # fmt: skip
        made, judged = ({c: collect(model, batches(w[half])) for c, w in windows.items()} for half in (0, 1))
        drift = steps.measure_drift(cfg, blocks, made)
        labels = {"refined": steps.partition_neurons(cfg, run, blocks, drift)}
        cfg.partition.method = "initial"
        labels["start"] = steps.initial_and_refined(cfg, run, blocks, drift)
        cfg.partition.method = "refined"
        labels["random"] = [shuffled_partition(y, seed=b) for b, y in enumerate(labels["refined"])]
        labels["drift only"] = [same_sizes_by_drift(y, d.drift) for y, d in zip(labels["refined"], drift, strict=True)]
        rows = judge(cfg, blocks, judged, labels)

        # Learning, as in a run
        statistics = made
        scores = score_units(cfg.importance, blocks, statistics[cfg.corpora.score], seed=cfg.run.seed)
        source = statistics[cfg.corpora.score]
        base = steps.base_masks(cfg, blocks, scores, source, plan.costs, plan.target)
        modules, ranks = steps.rank_inside_modules(cfg, run, blocks, statistics, scores, drift, labels["refined"])
        start = start_thresholds(base, ranks)
        _, masks = steps.learn_sparsity(cfg, run, model, text, modules, ranks, base, plan.costs, plan.target)
        losses = []
        first = masks_from_thresholds(ranks, start, plan.costs, target=plan.target)
        for name, windows_list in (
            ("calibration", text.learn), ("development", text.development)
        ):  # fmt: skip
            values = {}
            for label, m in (("base", base), ("start", first), ("learned", masks)):
                with masked(model, m):
                    values[label] = sum(perplexity(model, w).nll for w in windows_list) / len(windows_list)
            losses.append({"seed": cfg.run.seed, "text": name, **values})
        cosines = compare_gradients(model, ranks, start, text) if gradients else None
    return rows, losses, cosines


def batches(tokens: torch.Tensor, size: int = 4):
    for i, part in enumerate(tokens.split(size)):
        yield {"input_ids": part, "index": torch.arange(len(part)) + i * size}


def judge(cfg, blocks, statistics, labels):
    """Agreement of each partition on text that drift was not computed from, and blocks won against the refined one."""
    by_corpus = [score_units(cfg.importance, blocks, s, seed=cfg.run.seed).ffn for s in statistics.values()]
    scores = [torch.stack([s[b] for s in by_corpus]) for b in range(len(blocks))]
    found = {}
    for name, partition in labels.items():
        tau = torch.tensor(
            [
                pair_weighted_mean(module_agreements(s, y), torch.bincount(y))
                for s, y in zip(scores, partition, strict=True)
            ]
        )
        matched = torch.tensor([range_matched_agreement(s, y) for s, y in zip(scores, partition, strict=True)])
        found[name] = (tau, matched)
    rows = []
    for name, (tau, matched) in found.items():
        won = "" if name == "refined" else f"{int((found['refined'][0] > tau).sum())} of {len(blocks)}"
        won_matched = "" if name == "refined" else f"{int((found['refined'][1] > matched).sum())} of {len(blocks)}"
        rows.append([str(cfg.run.seed), name, f"{tau.mean():.3f}", won, f"{matched.mean():.3f}", won_matched])
    return rows


def compare_gradients(model, ranks, start, text, *, sample: int = 32, step: float = 0.5):
    """Cosines between the straight-through gradient and central differences, over a sample of thresholds."""
    ids = torch.cat([w.tokens[:1] for w in text.train.values()])
    ffn = [t.clone().float().requires_grad_() for t in start[0]]
    sizes = [torch.bincount(y) for y in ranks.labels]

    def gates(thresholds, kind):
        if kind == "hard":
            return [(margins(p, t, y) > 0).float() for p, t, y in zip(ranks.ffn, thresholds, ranks.labels, strict=True)]
        return [
            soft_gate(p.float(), t, y, n) for p, t, y, n in zip(ranks.ffn, thresholds, ranks.labels, sizes, strict=True)
        ]

    soft, hard = gates(ffn, "soft"), gates(ffn, "hard")
    with gated(model, [(s - s.detach()) + h for s, h in zip(soft, hard, strict=True)]):
        next_token_loss(model, ids).backward()
    generator = torch.Generator().manual_seed(0)
    places = [(b, k) for b, t in enumerate(ffn) for k in range(len(t))]
    chosen = [places[i] for i in torch.randperm(len(places), generator=generator)[:sample]]
    exact = torch.tensor([ffn[b].grad[k] for b, k in chosen])
    rows = []
    for kind in ("soft", "hard"):
        differences = []
        with torch.no_grad():
            for b, k in chosen:
                values = []
                for sign in (1, -1):
                    moved = [t.detach().clone() for t in ffn]
                    moved[b][k] += sign * step
                    with gated(model, gates(moved, kind)):
                        values.append(float(next_token_loss(model, ids)))
                differences.append((values[0] - values[1]) / (2 * step))
        cosine = torch.cosine_similarity(exact, torch.tensor(differences), dim=0)
        same_sign = float((exact.sign() == torch.tensor(differences).sign()).float().mean())
        rows.append([kind, str(sample), f"{step}", f"{cosine:.3f}", f"{same_sign:.2f}"])
    return rows


def print_tables(refinement, learning, gradients) -> None:
    print("\n### Refinement, judged on other windows of the drift corpora\n")
    header = ["seed", "partition", "Kendall τ", "refined wins", "range-matched", "refined wins (range-matched)"]
    print(markdown([header, *refinement]))
    print("\n### Threshold learning: cross-entropy of the hard masks, nats per token, mean of the learning corpora\n")
    rows = [
        [str(r["seed"]), r["text"], *(f"{r[k]:.3f}" for k in ("base", "start", "learned")),
         f"{r['learned'] - r['base']:+.3f}", f"{r['learned'] - r['start']:+.3f}"]
        for r in learning
    ]  # fmt: skip
    print(markdown([["seed", "text", "base", "start", "learned", "learned - base", "learned - start"], *rows]))
    print("\n### Straight-through gradient against central differences\n")
    print(markdown([["gates of the differences", "thresholds", "step", "cosine", "same sign"], *gradients]))


if __name__ == "__main__":
    main()
