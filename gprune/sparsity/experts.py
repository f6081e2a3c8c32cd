"""Whole experts as a feature of a run: `--sparsity.scope experts`, alone or with neurons, KV groups and blocks.

An expert is removed with its row of the router, which then chooses among the others. By default every layer keeps the
same number of experts, chosen by their scores, so that the exported folder is a stock model. Experts make up at most
`--sparsity.expert_share` of what whole blocks leave of the target (`expert_budget.ExpertBudget`).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from gprune.errors import UserError
from gprune.features import Feature, attribute
from gprune.importance.metrics import EXPERT_IMPORTANCE
from gprune.sparsity.target import format_cost

log = logging.getLogger("gprune")


class WholeExperts(Feature):
    """Whole experts that are removed, chosen by `--sparsity.expert_metric`."""

    needs = frozenset({"routing"})

    def identity(self, cfg: Any) -> dict[str, Any]:
        """Return the settings that identify a run only if whole experts are in scope."""
        names = ("expert_metric", "expert_share", "uniform_experts")
        return {"sparsity": {name: getattr(cfg.sparsity, name) for name in names}}

    def refuse_settings(self, cfg: Any) -> None:
        """Raise UserError for settings that whole experts cannot be combined with."""
        s, flag = cfg.sparsity, f"--sparsity.scope {cfg.sparsity.scope}"
        if cfg.gprune and "ffn" not in s.scope:
            raise UserError(f"{flag} needs --gprune false, because experts have no modules.")
        if s.currency in ("seconds", "kv_cache"):
            raise UserError(f"{flag} needs a target in parameters or bytes; got {s.target}, which counts {s.currency}.")

    def budget_of(self, pricing: Any, make: Any) -> Any:
        """Return the function that makes an `ExpertBudget`. UserError if no expert of the model can be removed."""
        from gprune.models.blocks import blocks_of
        from gprune.sparsity.expert_budget import ExpertBudget, RouterRule

        s, config = pricing.cfg.sparsity, pricing.skeleton.config
        rules = [RouterRule.of(block, config) for block in blocks_of(pricing.skeleton)]
        if not any(rule.experts for rule in rules):
            raise UserError(
                f"--sparsity.scope {s.scope} needs a mixture of experts; model type '{config.model_type}' has none. "
                "Use ffn."
            )
        if why_not := next((rule.why_not for rule in rules if rule.why_not), ""):
            raise UserError(
                f"--sparsity.scope {s.scope} cannot remove experts of model type '{config.model_type}': {why_not}. "
                "Use ffn, which narrows every expert."
            )
        of_experts = {"rules": tuple(rules), "share": s.expert_share, "equal": s.uniform_experts}
        return partial(ExpertBudget.of, **make.keywords, **of_experts)

    def lines(self, plan: Any) -> dict[str, str]:
        """Return how many experts remain, how many the router needs, and the overshoot of a whole number."""
        budget = plan.budget
        rules = {b: rule for b, rule in enumerate(budget.rules) if rule.experts and b not in budget.removed}
        if not rules:
            return {"experts": "whole blocks take all layers with experts"}
        kept = [rule.experts - len(budget.removed_experts.get(b, ())) for b, rule in rules.items()]
        needed = [rule.groups * rule.least for rule in rules.values()]
        experts, groups = [rule.experts for rule in rules.values()], max(rule.groups for rule in rules.values())
        text = f"{span(kept)} of {span(experts)} remain in each of {len(kept)} layers; routers need {span(needed)}"
        if groups > 1:
            text += f", the same number in each of {groups} groups"
        if not budget.equal or len(set(kept)) > 1:
            text += "; layers may differ, so the folder needs its modelling file"
        lines = {"experts": f"{text}{overshoot(plan)}"}
        if budget.has_other_units:
            return lines
        widths = "all neurons of these experts remain"
        if without_effect := [feature.name for feature in plan.cfg.features if attribute(feature, "needs_narrower")]:
            widths += f", so --recovery {'+'.join(without_effect)} changes nothing"
        return lines | {"widths": widths}

    def add_scores(self, run: Any, scores: Any, statistics: Any) -> Any:
        """Return the scores with those of experts, from the `CorpusStatistics` of the same corpora."""
        from gprune.importance.scores import score_experts

        of_experts = score_experts(run.cfg.sparsity.expert_metric, run.blocks, statistics, seed=run.cfg.run.seed)
        return replace(scores, experts=of_experts)

    def after_scoring(self, run: Any, scores: Any, statistics: Sequence[Any]) -> None:
        """Write the scores of experts, and warn of experts that no token reaches.

        These are removed first, unless the metric ignores activations; then there is no warning.
        """
        from gprune.importance.scores import idle_experts

        run.folder.write("experts", {f"scores.{b}": of_block for b, of_block in enumerate(scores.experts)})
        is_blind = EXPERT_IMPORTANCE[run.cfg.sparsity.expert_metric].activation_free
        if not is_blind and (idle := idle_experts(run.blocks, statistics)):
            log.warning("No calibration token reaches these experts, which are removed first: %s", idle)

    def summary(self, run: Any, masks: Any, pruned: Any) -> dict[str, Any]:
        """Return the scores of experts and the removed ones by layer, and the sentence about them."""
        from gprune.models.experts import kept_experts

        removed, scores, stored = {}, {}, run.folder.read("experts") or {}
        for block in run.blocks:
            if block.has_experts and masks.blocks[block.index]:
                kept, layer = kept_experts(block, masks.ffn[block.index]), str(block.layer_index)
                removed[layer] = (~kept).nonzero()[:, 0].tolist()
                of_layer = stored[f"scores.{block.index}"].tolist()
                scores[layer] = [score if math.isfinite(score) else None for score in of_layer]  # JSON has no -inf
        if not removed:  # whole blocks have taken all layers with experts
            return {}
        counts = [len(experts) for experts in removed.values()]
        total = max(block.experts for block in run.blocks)
        said = f"{span(counts)} of {total} experts are removed in each of {len(counts)} layers{overshoot(run.plan)}."
        numbers = {"removed": sum(counts), "kept": sum(map(len, scores.values())) - sum(counts)}
        entry = {"said": said, "metric": run.cfg.sparsity.expert_metric, "removed": removed, "scores": scores}
        return {"experts": entry | {"numbers": numbers}}


def overshoot(plan: Any) -> str:
    """Describe the cost that a whole number of experts removes beyond the target; empty if there is none."""
    cost, currency = plan.budget.overshoot, plan.cfg.sparsity.currency
    if not cost:
        return ""
    return f"; a whole number of experts is {format_cost(cost, currency)} more than the target"


def span(numbers: Sequence[int]) -> str:
    """Return the range of numbers in words, such as '4' or '3 to 5'."""
    low, high = min(numbers), max(numbers)
    return str(low) if low == high else f"{low} to {high}"
