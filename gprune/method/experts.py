"""Scores of whole experts, and what a dry run and a summary tell about them.

By default every layer keeps the same number of experts, chosen by their scores, so that the exported folder is a stock
model (`sparsity/experts.py`).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any

from gprune.calibration.statistics import CorpusStatistics
from gprune.importance.metrics import EXPERT_IMPORTANCE
from gprune.importance.scores import Scores, idle_experts
from gprune.method.plan import Plan
from gprune.method.run import Run
from gprune.models.masks import Masks
from gprune.recoveries import RECOVERY
from gprune.recoveries.contract import Projection
from gprune.sparsity.target import format_cost
from gprune.units.structure import parts_of_key, unit_key

log = logging.getLogger("gprune")


def store_scores(run: Run, scores: Scores, statistics: Sequence[CorpusStatistics]) -> None:
    """Write the scores of experts, and warn of experts that no token reaches.

    These are removed first, unless the metric ignores activations; then there is no warning.
    """
    run.folder.write(
        "experts", {f"scores.{parts_of_key(key)[1]}": of_units for key, of_units in scores.experts.items()}
    )
    is_blind = EXPERT_IMPORTANCE[run.cfg.sparsity.expert_metric].activation_free
    if not is_blind and (idle := idle_experts(run.budget.units, statistics)):
        log.warning("No calibration token reaches these experts, which are removed first: %s", idle)


def expert_lines(plan: Plan) -> dict[str, str]:
    """Return the lines of `--dry_run`: the experts that remain, those that the router needs, and the overshoot."""
    budget = plan.budget
    routers = [u for u in budget.of_kind("experts") if unit_key("layer", u.layer) not in budget.lost]
    if not routers:
        return {"experts": "whole blocks take all layers with experts"}
    kept = [u.count - len(budget.lost.get(u.key, ())) for u in routers]
    needed, experts, groups = [u.least for u in routers], [u.count for u in routers], max(u.step for u in routers)
    text = f"{span(kept)} of {span(experts)} remain in each of {len(kept)} layers; routers need {span(needed)}"
    if groups > 1:
        text += f", the same number in each of {groups} groups"
    if "experts" not in budget.equal or len(set(kept)) > 1:
        text += "; layers may differ, so the folder needs its modelling file"
    lines = {"experts": f"{text}{overshoot(plan)}"}
    if budget.finer:
        return lines
    widths = "all neurons of these experts remain"
    recoveries = plan.cfg.recovery.split("+")
    if without_effect := [name for name in recoveries if isinstance(RECOVERY[name], Projection)]:
        widths += f", so --recovery {'+'.join(without_effect)} changes nothing"
    return lines | {"widths": widths}


def experts_entry(run: Run, masks: Masks) -> dict[str, Any]:
    """Return the entry `experts` of the summary: scores of experts and the removed ones by layer, and a sentence."""
    removed, scores, stored = {}, {}, run.folder.read("experts") or {}
    experts = run.budget.of_kind("experts")
    for u in experts:
        if masks.blocks[u.number]:
            layer = str(u.layer)
            removed[layer] = (~masks.kept(u)).nonzero()[:, 0].tolist()
            of_layer = stored[f"scores.{u.number}"].tolist()
            scores[layer] = [score if math.isfinite(score) else None for score in of_layer]  # JSON has no -inf
    if not removed:  # whole blocks have taken all layers with experts
        return {}
    counts = [len(experts) for experts in removed.values()]
    total = max(u.count for u in experts)
    said = f"{span(counts)} of {total} experts are removed in each of {len(counts)} layers{overshoot(run.plan)}."
    numbers = {"removed": sum(counts), "kept": sum(map(len, scores.values())) - sum(counts)}
    entry = {"said": said, "metric": run.cfg.sparsity.expert_metric, "removed": removed, "scores": scores}
    return {"experts": entry | {"numbers": numbers}}


def overshoot(plan: Plan) -> str:
    """Describe the cost that a whole number of experts removes beyond the target; empty if there is none."""
    cost, currency = plan.budget.overshoot, plan.cfg.sparsity.currency
    if not cost:
        return ""
    return f"; a whole number of experts is {format_cost(cost, currency)} more than the target"


def span(numbers: Sequence[int]) -> str:
    """Return the range of numbers in words, such as '4' or '3 to 5'."""
    low, high = min(numbers), max(numbers)
    return str(low) if low == high else f"{low} to {high}"
