"""What a run did to its model, in sentences: what was removed, what it cost, and what recovery gave back."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from gprune.config import RunConfig
from gprune.evaluation.intervals import Estimate
from gprune.report import CLONE, prune_command
from gprune.report.tables import format_cell

FIRST_LOOK = "experiments/first_look.yaml"


def describe_sizes(summary: Mapping[str, Any], scope: str, dtype: str) -> str:
    """Return a sentence on what was removed, with parameters and bytes before and after."""
    before, after = summary["parameters_before"], summary["parameters_after"]
    megabytes = getattr(torch, dtype).itemsize / 1e6
    return (
        f"Removed {summary['sparsity_of_scope']:.2%} of {scope}, {summary['sparsity_of_model']:.2%} of the model: "
        f"{before:,} -> {after:,} parameters, {before * megabytes:,.1f} -> {after * megabytes:,.1f} MB in {dtype}."
    )


def describe_stages(frame: pd.DataFrame, recovery: str) -> list[str]:
    """Return a sentence per measured stage of the pruned model: its perplexity in times dense, on both kinds of text.

    That on recovery has the share of the loss on unseen text that recovery gave back, if both stages were measured.
    """
    over_dense: dict[str, dict[str, Estimate]] = {}
    for line in frame[frame["number"].isin(("unseen_over_dense", "seen_over_dense"))].itertuples():
        text = line.number.partition("_")[0]
        over_dense.setdefault(line.stage, {})[text] = Estimate(line.value, line.low, line.high)
    sentences = []
    for stage, estimates in over_dense.items():
        texts = [f"{format_cell(ratio, 3)} times dense on {text} text" for text, ratio in estimates.items()]
        when, gain = "After pruning", ""
        if stage == "recovered":
            when, gain = f"After recovery ({recovery})", _describe_gain(over_dense)
        sentences.append(f"{when}, perplexity is {' and '.join(texts)}{gain}.")
    return sentences


def _describe_gain(over_dense: Mapping[str, Mapping[str, Estimate]]) -> str:
    """Describe how much of the loss that pruning added on unseen text is gone after recovery; empty if unknown."""
    before, after = (over_dense.get(stage, {}).get("unseen") for stage in ("pruned", "recovered"))
    if before is None or after is None or before.value <= 1:
        return ""
    share = 1 - math.log(after.value) / math.log(before.value)
    return f"; recovery gave back {share:.0%} of the loss that pruning added on unseen text" if share > 0 else ""


def first_look(cfg: RunConfig) -> str:
    """Return how to compare with other methods on the default text; empty for other text."""
    if cfg.corpora != RunConfig().corpora:
        return ""
    if (CLONE / FIRST_LOOK).is_file():
        path = FIRST_LOOK if Path.cwd() == CLONE else os.fspath(CLONE / FIRST_LOOK)
        return f"Compare with other methods: gprune study {path}"
    return f"Compare with the base metric: {' '.join([*prune_command(), '--gprune', 'false'])}; gprune report RUN RUN"
