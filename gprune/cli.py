"""The command line of `train.py` and `gprune prune`: parse flags and YAML, run, and print the result table."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from gprune.config import RunConfig
from gprune.config.parse import flags_of, parse
from gprune.config.run_config import NOT_OF_OTHERS
from gprune.console import guarded, log_to_stdout, process_index, quiet
from gprune.corpora import is_local, load_corpus
from gprune.errors import UserError
from gprune.models.names import check_model_name
from gprune.storage.cache import check_writable

log = logging.getLogger("gprune")
LEARNING = (  # flags of threshold learning
    "corpora.learn", "corpora.learn_samples", "evaluation.curve", "sparsity.learn", "sparsity.loss", "sparsity.epochs",
    "sparsity.centred", "sparsity.learning_rate", "sparsity.learner", "sparsity.offset_learning_rate",
    "sparsity.offset_limit",
)  # fmt: skip
ENDS = {  # keyword arguments of `guarded`
    "stopped": ". Finished steps are kept; the same command resumes the run.",
    "memory": "; lower --corpora.batch_size or --corpora.seq_len.",
}
SWITCHING = tuple(f"reliability.{name}" for name in ("everywhere", "metric", "sensitivity_quantile", "score_quantile"))


def main(args: Sequence[str] | None = None) -> int:
    """Run `train.py` and return the exit code: 0, 2 for a UserError, 130 for Ctrl-C."""
    return guarded("train.py", lambda: run(args, prog="train.py"), **ENDS)


def run(args: Sequence[str] | None, prog: str = "gprune prune") -> str:
    """Prune with the given flags and return the text to print: a table on rank 0, nothing on other ranks."""
    args = list(sys.argv[1:] if args is None else args)
    cfg = parse(args, prog)
    log_to_stdout()
    if idle := unread(cfg, flags_of(args)):
        log.warning("Ignored flags: %s", idle)
    check_early(cfg)
    if not cfg.dry_run:  # logged before the imports, which take seconds
        if (other := cfg.model.made_elsewhere) is not None:
            log.info("%s: measuring %s, compared with it", cfg.model.name, other)
        else:
            log.info("%s: pruning %s, target %s", cfg.model.name, cfg.sparsity.scope, cfg.sparsity.target)
    quiet()
    from lightning.pytorch.utilities.rank_zero import rank_zero_only

    from gprune.pipeline.dry_run import describe
    from gprune.pipeline.plan import check
    from gprune.pipeline.prune import prune
    from gprune.report.records import result_table
    from gprune.runs.folder import RunFolder
    from gprune.runs.tracking import how_to_look
    from gprune.sparsity.allocation import format_removed

    if cfg.dry_run:
        return describe(check(cfg)) + "\n"
    result = prune(cfg)
    if rank_zero_only.rank != 0:
        return ""
    s = result.summary
    whose = " of rank 0, which reads its share of the text" if cfg.processes > 1 else ""
    removed = "Made elsewhere"  # nothing is known about how it was made
    if "sparsity_of_scope" in s:
        scoped = s["sparsity_of_scope"], cfg.sparsity.scope, cfg.sparsity.allocation
        removed = f"Removed {format_removed(*scoped)}, {s['sparsity_of_model']:.2%} of the model"
    exported = RunFolder(result.path).manifest.get("exported_dtype", cfg.model.dtype)
    return (
        f"\n{result_table(result.records).shown()}\n\n"
        f"{removed}: {s['parameters_before']:,} -> {s['parameters_after']:,} parameters.\n"
        + (f"{s['speed']['said']}\n" if "speed" in s else "")
        + f"Tokens{whose}: {s['forward_tokens']:,} forward, {s['forward_backward_tokens']:,} forward and backward.\n"
        f"Results: {result.path}"
        + (", report.html is their page" if (result.path / "report.html").exists() else "")
        + (
            ""
            if cfg.export.format == "none" or cfg.own_row == ("model", "none")
            else f"; model: {result.path / 'model'}, in {exported}"
        )
        + f".\nCurves: {how_to_look(result.path)}.\n"
    )


def check_early(cfg: RunConfig) -> None:
    """Raise UserError for an invalid name, folder or accelerator, before the imports that take seconds."""
    cfg.validate()
    cfg.check_names()
    check_model_name(cfg.model.name)
    if cfg.sparsity.quality:
        for corpus in filter(is_local, cfg.developed):
            load_corpus(corpus, "development")  # raises if the corpus has no development split
    if not cfg.dry_run and process_index() == 0:
        check_writable(Path(cfg.folder))
    if cfg.trainer.accelerator == "gpu" and not cfg.dry_run:
        import torch

        if not (torch.cuda.is_available() or torch.backends.mps.is_available()):
            raise UserError("--trainer.accelerator must be cpu or auto if PyTorch finds no GPU; got gpu.")


def switched_off(c: RunConfig) -> Iterator[tuple[str, bool, tuple[str, ...]]]:
    """Table of ignored flags: (reason, whether it applies, flags). The name of a group means all its flags.

    Recoveries registered from Python are left out, because the flags that they read are unknown.
    """
    chain, s = set(c.recovery.split("+")), c.sparsity
    yield "--model.made_elsewhere", c.final == "model", ("gprune", *NOT_OF_OTHERS)
    solved = chain <= {"none", "bias", "least_squares", "least_squares_sequential"}
    yield "--gprune false", not c.gprune, ("partition", "reliability", *LEARNING)
    yield "--gprune false", not c.roles["drift"], ("corpora.drift",)
    yield f"--sparsity.scope {s.scope}", "blocks" not in s.scope, ("sparsity.block_share", "sparsity.block_choice")
    yield f"--sparsity.allocation {s.allocation}", not c.learns, LEARNING
    yield "--reliability.switch false", not c.reliability.switch, SWITCHING
    yield f"--recovery {c.recovery}", not c.roles["recover"], ("corpora.recover",)
    yield f"--recovery {c.recovery}", chain <= {"none", "bias", "distill"}, ("ridge",)
    yield f"--recovery {c.recovery}", solved, ("distill",)
    yield f"--distill.targets {c.distill.targets}", c.distill.targets != "lora", ("distill.rank",)
    yield "--export none", c.export.format == "none" and s.currency != "bytes", ("export.dtype",)
    yield f"--export {c.export.format}", c.export.format != "gguf", ("export.type",)
    yield "--dry_run false", not c.dry_run, ("plan",)
    yield f"--sparsity.target {c.sparsity.target}", not (c.timed_for or c.dry_run), ("speed",)


def unread(cfg: RunConfig, names: Iterable[str]) -> str:
    """Return, in one line, the flags among `names` that a run with these settings ignores, with the reason.

    The line is empty if no flag is known to be ignored.
    """
    left, reasons = set(names), {}
    for reason, holds, flags in switched_off(cfg):
        if holds and (off := sorted(n for n in left if n in flags or n.partition(".")[0] in flags)):
            reasons.setdefault(reason, []).extend(f"--{name}" for name in off)
            left.difference_update(off)
    return "; ".join(f"{', '.join(flags)} ({reason})" for reason, flags in reasons.items())
