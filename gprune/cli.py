"""The command line of train.py: flags and YAML to a run, and the table at the end."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence

from gprune.config.parse import flags_of, parse
from gprune.config.unread import unread
from gprune.console import guarded, quiet, speak

log = logging.getLogger("gprune")


def main(args: Sequence[str] | None = None) -> int:
    """Run `train.py`; returns the exit code: 0, 2 for something the caller can put right, 130 for Ctrl-C."""
    return guarded(
        "train.py",
        lambda: run(args),
        stopped=". What was finished is kept; the same command takes up from there.",
        memory="; lower --corpora.batch_size or --corpora.seq_len.",
    )


def run(args: Sequence[str] | None) -> str:
    """Prune as the flags say; returns what is printed: the table of the first process, nothing of the others."""
    args = list(sys.argv[1:] if args is None else args)
    cfg = parse(args)
    speak()
    if idle := unread(cfg, flags_of(args)):
        log.warning("Given, and not read by this run: %s", idle)
    if not cfg.dry_run:  # before what takes seconds to import
        log.info("%s: pruning %s, target %s", cfg.model.name, cfg.sparsity.scope, cfg.sparsity.target)
        log.info("Into %s", cfg.folder)
    quiet()
    from lightning.pytorch.utilities.rank_zero import rank_zero_only

    from gprune.pipeline.dry_run import describe
    from gprune.pipeline.plan import check
    from gprune.pipeline.prune import prune
    from gprune.report.records import result_table
    from gprune.runs.folder import RunFolder
    from gprune.runs.tracking import how_to_look
    from gprune.sparsity.allocation import removed_in_words

    if cfg.dry_run:
        return describe(check(cfg)) + "\n"
    result = prune(cfg)
    if rank_zero_only.rank != 0:
        return ""
    s = result.summary
    whose = " of the first process, which has its share of the text" if cfg.processes > 1 else ""
    removed = removed_in_words(s["sparsity_of_scope"], cfg.sparsity.scope, cfg.sparsity.allocation)
    exported = RunFolder(result.path).manifest.get("exported_dtype", cfg.model.dtype)
    return (
        f"\n{result_table(result.records).shown()}\n\n"
        f"Removed {removed}, {s['sparsity_of_model']:.2%} of the model: "
        f"{s['parameters_before']:,} -> {s['parameters_after']:,} parameters.\n"
        + (f"{s['speed']['said']}\n" if "speed" in s else "")
        + f"Tokens{whose}: {s['forward_tokens']:,} forward, {s['forward_backward_tokens']:,} forward and backward.\n"
        f"Everything is in {result.path}"
        + (", and its page is report.html" if (result.path / "report.html").exists() else "")
        + ("" if cfg.export.format == "none" else f"; the model in {result.path / 'model'}, in {exported}")
        + f".\nCurves: {how_to_look(result.path)}.\n"
    )
