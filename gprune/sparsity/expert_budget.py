"""The budget with whole experts: which experts are removed for a target, and what that leaves for other units."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from gprune.errors import UserError
from gprune.importance.scores import Scores
from gprune.models.blocks import Block
from gprune.models.experts import experts_per_token, least_experts, why_experts_stay, without_experts
from gprune.sparsity.budget import Budget
from gprune.sparsity.cost import BlockCosts

Step = list[tuple[int, int]]  # (block, expert): experts that are removed together


@dataclass(frozen=True)
class RouterRule:
    """What the router of a block needs: consecutive groups of experts of the same size, each with at least `least`."""

    experts: int = 0  # 0: the block has none
    groups: int = 1
    least: int = 0
    why_not: str = ""  # the reason if whole experts cannot be removed

    @classmethod
    def of(cls, block: Block, config: Any) -> RouterRule:
        """Return the rule of a block of a model with this configuration."""
        if not block.has_experts:
            return cls()
        groups, least = least_experts(config, block.experts)
        needed, why_not = experts_per_token(config.get_text_config(decoder=True)), why_experts_stay(block)
        if not why_not and needed is None:
            why_not = "its configuration does not tell how many experts a token needs"
        if not why_not and needed >= block.experts:
            why_not = f"its router chooses all {block.experts} experts"
        return cls(block.experts, groups, least, why_not)

    def rounds(self, scores: Sequence[float]) -> list[list[int]]:
        """Return the removable experts by round, lowest scores first: one of each group. Ties are broken by number."""
        size = self.experts // self.groups if self.experts else 0
        by_group = []
        for group in range(self.groups):
            numbers = range(group * size, (group + 1) * size)
            by_group.append(sorted(numbers, key=lambda expert: (scores[expert], expert))[: max(0, size - self.least)])
        return [list(experts) for experts in zip(*by_group, strict=True)]


def router_rules(blocks: Sequence[Block], config: Any, scope: str) -> list[RouterRule]:
    """Return the rules of the blocks of a model with this configuration.

    UserError, which names the `--sparsity.scope`, if no expert can be removed.
    """
    rules = [RouterRule.of(block, config) for block in blocks]
    if not any(rule.experts for rule in rules):
        raise UserError(
            f"--sparsity.scope {scope} needs a mixture of experts; model type '{config.model_type}' has none. Use ffn."
        )
    if why_not := next((rule.why_not for rule in rules if rule.why_not), ""):
        raise UserError(
            f"--sparsity.scope {scope} cannot remove experts of model type '{config.model_type}': {why_not}. Use ffn, "
            "which narrows every expert."
        )
    return rules


@dataclass(frozen=True)
class ExpertBudget(Budget):
    """A budget with whole experts in scope. They are removed in steps of one or more experts.

    If all layers keep the same number, a step has one expert of each group of each layer's router. Otherwise it has
    those of one layer, and layers compete by the scores of their experts relative to the mean absolute score of their
    layer. Experts with the score -inf, which no token reaches, come first and are not averaged.

    Steps are taken as long as they fit into `share` of the target; neurons and KV groups in scope make up the rest. If
    these cannot, more steps are taken. Without such units the smallest number of steps is taken that reaches the
    target, and the target becomes what they remove.
    """

    rules: Sequence[RouterRule] = ()  # one per block
    share: float = 1.0  # largest share of the target, after whole blocks, that is removed as whole experts
    equal: bool = True  # whether all layers lose the same number of experts
    scores: tuple[tuple[float, ...], ...] = ()  # of experts, by block; empty: by their numbers
    goal: int = 0  # the target before it became a whole number of experts

    def meeting(self, *args: Any, **kwargs: Any) -> ExpertBudget:
        """Return the budget for another target; see `Budget.meeting`."""
        return super().meeting(*args, **kwargs)._with_whole_number()

    def removing(self, target: int) -> ExpertBudget:
        """Return the budget for another cost; see `Budget.removing`."""
        return super().removing(target)._with_whole_number()

    def ranked_by(self, scores: Scores) -> ExpertBudget:
        """Return the budget in which the experts with the lowest scores are removed."""
        of_experts = tuple(tuple(of_block.tolist()) for of_block in scores.experts)
        if of_experts == self.scores:
            return self
        return replace(self, scores=of_experts, target=self.goal)._with_whole_number()

    def _with_whole_number(self) -> ExpertBudget:
        """Return the budget with the target that a whole number of experts reaches, if nothing else is in scope."""
        budget = replace(self, goal=self.target)
        if self.has_other_units:
            return budget
        return replace(budget, target=max(self.target, budget.cost_of_blocks + budget.cost_of_experts))

    @property
    def overshoot(self) -> int:
        """Cost that a whole number of experts removes beyond the target."""
        return self.target - self.goal

    @property
    def least(self) -> str:
        """What every block keeps in any case, in words; see `Budget.least`. The most demanding router is described."""
        rule = max(self.rules, key=lambda rule: rule.groups * rule.least)
        of_experts = f"each router needs {rule.groups * rule.least} of {rule.experts} experts"
        if rule.groups > 1:
            of_experts += f", {rule.least} in each of {rule.groups} groups"
        return f"{of_experts}, {super().least}" if self.has_other_units else of_experts

    @property
    def has_other_units(self) -> bool:
        """Whether neurons or KV groups are in scope."""
        return any(block.ffn for block in self.units) or self.attention

    # Which experts are removed

    @cached_property
    def steps(self) -> list[Step]:
        """All steps that are possible, in order."""
        open_blocks = [b for b in self.kept if self.rules[b].experts and not self.units[b].protected]
        rounds: dict[int, list[Step]] = {}
        keys: list[tuple[float, int, int]] = []  # (mean score relative to the layer, block, round)
        for b in open_blocks:
            scores = self.scores[b] if self.scores else tuple(map(float, range(self.rules[b].experts)))
            rounds[b] = [[(b, expert) for expert in experts] for experts in self.rules[b].rounds(scores)]
            sizes = [abs(score) for score in scores if math.isfinite(score)]
            scale = sum(sizes) / max(1, len(sizes)) or 1.0
            keys += [
                (sum(scores[expert] for _, expert in step) / len(step) / scale, b, round_number)
                for round_number, step in enumerate(rounds[b])
            ]
        if self.equal:
            return [[pair for step in steps for pair in step] for steps in zip(*rounds.values(), strict=False)]
        return [rounds[b][round_number] for _, b, round_number in sorted(keys)]

    @cached_property
    def _costs_of_steps(self) -> list[int]:
        """Cost of the first 0, 1, ..., all steps."""
        return [0, *accumulate(sum(self.units[b].costs.expert for b, _ in step) for step in self.steps)]

    @cached_property
    def number_of_steps(self) -> int:
        """Number of steps that are taken."""
        remaining, costs = self.target - self.cost_of_blocks, self._costs_of_steps
        if not self.has_other_units:
            return next((number for number, cost in enumerate(costs) if cost >= remaining), len(costs) - 1)
        limit = Fraction(str(self.share)) * remaining
        number = sum(cost <= limit for cost in costs[1:])
        while number < len(costs) - 1 and remaining - costs[number] > self._without(number).removable:
            number += 1  # other units cannot make up the rest
        return number

    @property
    def cost_of_experts(self) -> int:
        """Cost of the experts that are removed."""
        return self._costs_of_steps[self.number_of_steps]

    @cached_property
    def removed_experts(self) -> dict[int, list[int]]:
        """Experts that are removed as a whole, by block, in the order of their numbers."""
        return self._experts_of(self.number_of_steps)

    @property
    def kept_experts(self) -> list[int]:
        return [block.experts - len(self.removed_experts.get(b, ())) for b, block in enumerate(self.units)]

    @property
    def key(self) -> tuple[Any, ...]:
        """The target and the removed experts, which scores may choose differently for the same target."""
        return *super().key, str(self.removed_experts)

    @contextmanager
    def bypassing(self, model: PreTrainedModel) -> Iterator[None]:
        with super().bypassing(model), without_experts(model, self.removed_experts):
            yield

    def _experts_of(self, number: int) -> dict[int, list[int]]:
        """Return the experts of the first steps, by block."""
        by_block: dict[int, list[int]] = {}
        for step in self.steps[:number]:
            for b, expert in step:
                by_block.setdefault(b, []).append(expert)
        return {b: sorted(experts) for b, experts in by_block.items()}

    # What remains for other units

    def _without(self, number: int) -> Budget:
        """Return the budget of neurons and KV groups after a number of steps, with smaller slots."""
        removed, units = self._experts_of(number), []
        for b in self.kept:
            block, kept = self.units[b], self.units[b].experts - len(removed.get(b, ()))
            costs, parameters = (
                _of_some_experts(table, kept, block.experts) for table in (block.costs, block.parameters)
            )
            units.append(replace(block, costs=costs, parameters=parameters, experts=kept))
        target = self.target - self.cost_of_blocks - self._costs_of_steps[number]
        return Budget(units, max(0, target), self.width_multiple, self.uniform)

    @cached_property
    def rest(self) -> Budget:
        """The remaining budget for neurons and KV groups of the kept blocks and experts."""
        return self._without(self.number_of_steps)

    @property
    def removable(self) -> int:
        """The largest removable cost: all steps, and then other units."""
        steps = len(self.steps)
        return self.cost_of_blocks + self._costs_of_steps[steps] + self._without(steps).removable

    @property
    def unavoidable(self) -> int:
        """The smallest cost that can be removed; see `Budget.unavoidable`."""
        return super().unavoidable if self.has_other_units else 0

    @property
    def largest_step(self) -> int:
        """The largest cost of a step of experts if there are no other units, otherwise that of `Budget`."""
        if self.has_other_units:
            return super().largest_step
        return max((after - before for before, after in pairwise(self._costs_of_steps)), default=1)

    @property
    def step(self) -> int:
        """The smallest difference in cost between masks; without other units, the largest cost of a step of experts."""
        return super().step if self.has_other_units else max(1, self.largest_step)

    def _of_units(self, costs: Sequence[BlockCosts]) -> int:
        """Return the cost of all experts, and of neurons and KV groups in scope, from the costs of all blocks."""
        total = super()._of_units(costs) if self.has_other_units else 0
        for of_block, rule, block in zip(costs, self.rules, self.units, strict=True):
            if rule.experts:
                neurons = of_block.neurons[-1] if block.ffn else 0  # counted by `super`
                total += rule.experts * of_block.expert - neurons
        return total

    # Values of neurons

    def of_kept_neurons(self, values: Sequence[Tensor]) -> list[Tensor]:
        values = list(values)
        for b, experts in self._kept_by_block.items():
            by_expert = values[b].view(self.units[b].experts, -1)
            values[b] = by_expert[experts.to(by_expert.device)].flatten()
        return values

    def with_removed_neurons(self, masks: Sequence[Tensor]) -> list[Tensor]:
        masks = list(masks)
        for b, experts in self._kept_by_block.items():
            whole = masks[b].new_zeros(self.units[b].experts, self.units[b].neurons)
            whole[experts.to(whole.device)] = masks[b].view(len(experts), -1)
            masks[b] = whole.flatten()
        return masks

    @cached_property
    def _kept_by_block(self) -> dict[int, Tensor]:
        """Numbers of the kept experts, int64, of blocks that lose experts."""
        return {
            b: torch.tensor([e for e in range(self.units[b].experts) if e not in removed])
            for b, removed in self.removed_experts.items()
        }


def _of_some_experts(costs: BlockCosts, kept: int, experts: int) -> BlockCosts:
    """Return the costs of a block that keeps some of its experts. Slots and the block become cheaper."""
    if kept == experts:
        return costs
    neurons = [cost * kept // experts for cost in costs.neurons]
    return replace(costs, neurons=neurons, whole=costs.whole - (experts - kept) * costs.expert)
