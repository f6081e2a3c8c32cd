"""The command line of `train.py` and `gprune prune`: parse flags and YAML, run, and print the result table."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from gprune.config import RunConfig
from gprune.config.parse import given_flags, parse
from gprune.console import log_to_stdout, process_index, quiet, run_guarded
from gprune.corpora import is_local, load_corpus
from gprune.errors import UserError
from gprune.models.embedded import check_model_name
from gprune.storage.paths import check_writable

if TYPE_CHECKING:
    from gprune.runs.results import PruningResult

log = logging.getLogger("gprune")
MESSAGE_ENDINGS = {  # keyword arguments of `run_guarded`
    "stopped": ". Finished steps are kept; the same command resumes the run.",
    "memory": "; lower --corpora.batch_size or --corpora.seq_len.",
}


def main(args: Sequence[str] | None = None) -> int:
    """Run `train.py` and return the exit code (see `run_guarded`)."""
    flags = sys.argv[1:] if args is None else args
    return run_guarded("train.py", lambda: run(flags, prog="train.py"), **MESSAGE_ENDINGS)


def run(args: Sequence[str], prog: str = "gprune prune") -> str:
    """Prune with the given flags and return the text to print: the results on rank 0, or the plan of a dry run."""
    cfg = parse(args, prog)
    log_to_stdout()
    cfg.check_used(given_flags(args))
    check_early(cfg)
    if not cfg.dry_run:  # logged before the imports, which take seconds
        what = cfg.model.name, cfg.sparsity.scope, cfg.sparsity.target, ", ".join(cfg.train_corpora)
        log.info("%s: pruning %s, target %s, by text of %s", *what)
    quiet()
    from lightning.pytorch.utilities.rank_zero import rank_zero_only

    from gprune.method.dry_run import describe
    from gprune.method.plan import make_plan
    from gprune.method.prune import prune

    if cfg.dry_run:
        return describe(make_plan(cfg)) + "\n"
    result = prune(cfg)
    return _describe_result(cfg, result) if rank_zero_only.rank == 0 else ""


def _describe_result(cfg: RunConfig, result: PruningResult) -> str:
    """Return the text that is printed after a run: result table, sizes, ratios to dense, tokens, paths of results."""
    from gprune.report.sentences import describe_sizes, describe_stages, first_look
    from gprune.report.tables import result_table
    from gprune.runs.folder import RunFolder
    from gprune.runs.numbers import entries, run_frame
    from gprune.runs.tracking import curves_hint

    summary, frame = result.summary, run_frame(result.path.name, result.records)
    said = [line for entry in entries(summary).values() for line in (entry["said"], *entry.get("warnings", ()))]
    dtype = RunFolder(result.path).manifest.get("exported_dtype", cfg.model.dtype)
    forward, backward = summary["forward_tokens"], summary["forward_backward_tokens"]
    results = f"Results: {result.path}"
    if (result.path / "report.html").exists():
        results += ", report.html is their page"
    if cfg.export.format != "none":
        results += f"; model: {result.path / 'model'}, in {dtype}"
    lines = [
        f"\n{result_table(frame).for_stdout()}\n",
        describe_sizes(summary, cfg.sparsity.scope, dtype),
        *describe_stages(frame, cfg.recovery),
        *(f"\n{line}" if "\n" in line else line for line in said),
        f"Tokens: {forward:,} forward, {backward:,} forward and backward.",
        f"{results}.",
        f"Curves: {curves_hint(result.path)}.",
        first_look(cfg),
    ]
    return "\n".join(filter(None, lines)) + "\n\n"


def check_early(cfg: RunConfig) -> None:
    """Raise UserError for an unknown corpus or model, or an invalid folder or accelerator, before the slow imports."""
    cfg.check_names()
    check_model_name(cfg.model.name)
    if cfg.searches_quality:
        for corpus in filter(is_local, cfg.development_corpora):
            load_corpus(corpus, "development")  # raises if the corpus has no development split
    if not cfg.dry_run and process_index() == 0:
        check_writable(Path(cfg.folder))
    if cfg.trainer.accelerator == "gpu" and not cfg.dry_run:
        import torch

        if not (torch.cuda.is_available() or torch.backends.mps.is_available()):
            raise UserError("--trainer.accelerator must be cpu or auto if PyTorch finds no GPU; got gpu.")
