"""Write the files of a finished run in milliseconds, without running anything: for tests of code that reads runs."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from gprune.config import RunConfig
from gprune.storage.files import FORMAT_VERSION, write_json, write_tensors

BLOCKS, NEURONS, GROUPS = 2, 8, 2


def settings(**changes: Any) -> dict[str, Any]:
    """Return the settings of a run of the base metric, as in a manifest. `changes` replace entries."""
    plain = json.loads(json.dumps(RunConfig(gprune=False, recovery="none", sparsity={"target": 0.5}).settings()))
    return plain | {"inputs": {"model": "0123456789abcdef", "text": {"wiki train": "fedcba9876543210"}}} | changes


def record(stage: str, corpus: str, *, seen: bool, nll: float = 2.0, windows: int = 4) -> dict[str, Any]:
    """Return a record of `metrics.json`.

    Args:
        nll: mean loss in nats per token.
        windows: number of windows of 16 tokens, an even number so that `nll` is their mean.
    """
    # Windows with 15 predicted tokens have alternately 10 % more and 10 % less than the mean loss.
    window_nll = [nll * 15 * (1 + 0.1 * (-1) ** n) for n in range(windows)]
    return {
        "stage": stage, "importance": None if stage == "dense" else "wanda_sp", "allocation": None, "partition": None,
        "switch": None, "recovery": "none", "sparsity": 0.0 if stage == "dense" else 0.5, "scope": "ffn",
        "model": "a model", "corpora": {}, "corpus": corpus, "split": "test", "seen": seen, "leaked_13grams": 0.0,
        "perplexity": math.exp(nll), "nll": nll, "tokens": 15 * windows, "window_nll": window_nll, "seq_len": 16,
        "stride": 16, "bos": False, "join": "\n\n", "seed": 0, "dtype": "float32", "content_hash": f"of {corpus}",
    }  # fmt: skip


def records(stages: Sequence[str] = ("dense", "pruned")) -> list[dict[str, Any]]:
    """Return records on a seen and an unseen corpus. The loss rises by half a nat from stage to stage."""
    return [
        record(stage, corpus, seen=corpus == "wiki", nll=2 + n / 2)
        for n, stage in enumerate(stages)
        for corpus in ("wiki", "stories")
    ]


ANSWERS = {  # a record of `evaluation.json`
    "kind": "zero_shot", "task": "piqa", "stage": "pruned", "recovery": "none", "split": "test", "dtype": "float32",
    "note": "", "standard_protocol": True, "content_hash": "h", "questions": 4, "acc": 0.5, "acc_stderr": 0.1,
    "acc_norm": None, "acc_norm_stderr": None, "correct": "0101", "bos": False, "model": "a model",
}  # fmt: skip
SUMMARY = {
    "sparsity_of_scope": 0.5, "sparsity_of_model": 0.25, "parameters_before": 100, "parameters_after": 75,
    "forward_tokens": 10, "forward_backward_tokens": 0,
}  # fmt: skip


def write_run(folder: Path, **changes: Any) -> Path:
    """Write manifest, metrics and masks into a folder, and return the folder. `changes` replace settings."""
    run_settings = settings(**changes)
    steps = {"evaluate": {"seconds": 1.5, "forward_tokens": 10, "forward_backward_tokens": 0, "peak_memory_mib": 5}}
    write_json(
        folder / "manifest.json",
        {"format": FORMAT_VERSION, "settings": run_settings, "environment": {}, "steps": steps},
    )
    write_json(folder / "metrics.json", {"summary": SUMMARY, "records": records()})
    masks = {f"ffn.{b}": torch.arange(NEURONS) % 2 == b % 2 for b in range(BLOCKS)}
    masks |= {f"attention.{b}": torch.ones(GROUPS, dtype=torch.bool) for b in range(BLOCKS)}
    write_tensors(folder / "masks.safetensors", masks)
    return folder
