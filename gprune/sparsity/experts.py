"""Whole experts as a feature of a run: `--sparsity.scope experts`, alone or with neurons, KV groups and blocks.

An expert is removed with its row of the router, which then chooses among the others. By default every layer keeps the
same number of experts, chosen by their scores, so that the exported folder is a stock model. Experts make up at most
`--sparsity.expert_share` of what whole blocks leave of the target (`expert_budget.ExpertBudget`).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from gprune.errors import UserError
from gprune.features import Feature
from gprune.sparsity.target import HALF_BITS


class WholeExperts(Feature):
    """Whole experts that are removed, chosen by `--sparsity.expert_metric`."""

    needs = frozenset({"routing"})

    def identity(self, cfg: Any) -> dict[str, Any]:
        """Return the settings of whole experts, which identify no run without them."""
        names = ("expert_metric", "expert_share", "uniform_experts")
        return {"sparsity": {name: getattr(cfg.sparsity, name) for name in names}}

    def refuse_settings(self, cfg: Any) -> None:
        """Raise UserError for settings that whole experts cannot be combined with."""
        s, flag = cfg.sparsity, f"--sparsity.scope {cfg.sparsity.scope}"
        if cfg.gprune and "ffn" not in s.scope:
            raise UserError(f"{flag} needs --gprune false, because experts have no modules.")
        if cfg.model.shard:
            raise UserError(f"{flag} cannot be combined with --model.shard true.")
        if s.allocation == "depth":
            raise UserError(f"{flag} cannot be combined with --sparsity.allocation depth.")
        if s.currency in ("seconds", "kv_cache"):
            raise UserError(f"{flag} needs a target in parameters or bytes; got {s.target}, which counts {s.currency}.")

    def budget_of(self, pricing: Any) -> Any:
        """Return the function that makes the budget. UserError if no expert of the model can be removed."""
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
        return partial(ExpertBudget.of_model, rules=rules, share=s.expert_share, equal=s.uniform_experts)

    def lines(self, plan: Any) -> dict[str, str]:
        """Return how many experts remain, how many the router needs, and the overshoot of a whole number."""
        budget = plan.budget
        rules = {b: rule for b, rule in enumerate(budget.rules) if rule.experts and b not in budget.removed}
        kept = [rule.experts - len(budget.removed_experts.get(b, ())) for b, rule in rules.items()]
        needed = [rule.groups * rule.least for rule in rules.values()]
        experts, groups = [rule.experts for rule in rules.values()], max(rule.groups for rule in rules.values())
        text = f"{span(kept)} of {span(experts)} remain in each of {len(kept)} layers; routers need {span(needed)}"
        if groups > 1:
            text += f", the same number in each of {groups} groups"
        if not budget.equal or len(set(kept)) > 1:
            text += "; layers may differ, so the folder needs its modelling file"
        lines = {"experts": f"{text}{overshoot(plan)}"}
        return lines if budget.has_other_units else lines | {"widths": "all neurons of these experts remain"}

    def summary(self, run: Any, masks: Any, pruned: Any) -> dict[str, Any]:
        """Return the scores of experts and the removed ones by layer, and the sentence about them."""
        from gprune.models.experts import kept_experts

        removed, scores, stored = {}, {}, run.folder.read("experts") or {}
        for block in run.blocks:
            if block.has_experts and masks.blocks[block.index]:
                kept, layer = kept_experts(block, masks.ffn[block.index]), str(block.layer_index)
                removed[layer] = (~kept).nonzero()[:, 0].tolist()
                scores[layer] = stored[f"scores.{block.index}"].tolist()
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
    amount = f"{cost // HALF_BITS:,} bytes" if currency == "bytes" else f"{cost:,} {currency}"
    return f"; a whole number of experts is {amount} more than the target"


def span(numbers: Sequence[int]) -> str:
    """Return the range of numbers in words, such as '4' or '3 to 5'."""
    low, high = min(numbers), max(numbers)
    return str(low) if low == high else f"{low} to {high}"
