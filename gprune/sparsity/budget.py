"""The budget: the units of a model with their exact costs, and the cost to be removed."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import cached_property
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from gprune.errors import UserError
from gprune.importance.scores import Scores
from gprune.models.masks import Masks
from gprune.sparsity.experts import rounds_of_experts
from gprune.sparsity.price import Price, cost_beyond, parameters_of
from gprune.sparsity.target import Target, format_cost
from gprune.units.structure import KIND_OF_PART, KINDS, Units, kinds_of_units, unit_key

PROTECTED = "protected"  # why units of `--sparsity.protect` stay
Round = tuple[float, tuple[int, ...]]  # score, and numbers of the units that are removed together
Lost = dict[str, tuple[int, ...]]  # key of units -> numbers of the removed ones, in order of removal


def rounds_of_layers(units: Sequence[Units], layers: Iterable[int]) -> dict[str, list[Round]]:
    """Return the rounds of layers in the order of their removal.

    Layers that are protected or have no units are ignored, and at least one layer with units is kept.
    """
    with_units = {u.layer for u in units if u.kind != "layer" and u.count}
    removable = {u.layer for u in units if u.kind == "layer" and not u.stays} & with_units
    order = [layer for layer in dict.fromkeys(layers) if layer in removable]
    return {unit_key("layer", layer): [(place, (0,))] for place, layer in enumerate(order[: len(with_units) - 1])}


def default_width_multiple(units: Iterable[Units]) -> int:
    """Return the width multiple of `--sparsity.width_multiple default`.

    It is 8 for models with experts, for their grouped kernels, and 32 for others, for the blocks of q8_0. It is 1 if
    that is more than a sixteenth of the narrowest FFN.
    """
    neurons = [u for u in units if u.kind == "neurons" and u.count]
    multiple = 8 if max(u.rows for u in neurons) > 1 else 32
    return multiple if 16 * multiple <= min(u.count for u in neurons) else 1


def with_limits(units: Sequence[Units], *, protect: Sequence[int], width_multiple: int) -> list[Units]:
    """Return units of which those in the layers `protect` stay, and neurons are removed `width_multiple` at a time."""
    layers = 1 + max(u.layer for u in units)
    for index in protect:
        if not -layers <= index < layers:
            raise UserError(
                f"--sparsity.protect must name layers from {-layers} to {layers - 1}, as there are {layers}; got "
                f"{index}."
            )
    protected = {index % layers for index in protect}
    limited = []
    for u in units:
        if u.kind == "neurons":
            u = replace(u, least=width_multiple, step=width_multiple)
        limited.append(replace(u, stays=u.stays or PROTECTED) if u.layer in protected else u)
    return limited


def budget_of(
    units: Sequence[Units], setting: float | str | None = None, width_multiple: int = 1, *, scope: str = "ffn",
    uniform: bool = False, protect: Sequence[int] = (), price: Price | None = None, outside: int = 0,
    block_share: float = 0.25, expert_share: float = 1.0, uniform_experts: bool = True,
) -> Budget:  # fmt: skip
    """Return the budget of a model's units for a `--sparsity.target`, such as a share in (0, 1) of the scope's cost.

    Args:
        units: those of the dense model (`units_of`).
        setting: the target; None: nothing is removed yet.
        width_multiple: widths of FFNs that change become multiples of it.
        scope: a `--sparsity.scope`; kinds of units of users have their own names.
        uniform: whether all blocks must have the same widths and numbers of KV groups.
        protect: numbers of layers that keep everything.
        price: costs of the units; by default in parameters.
        outside: cost of everything outside of layers.
        block_share, expert_share: largest shares of the target for whole layers and for whole experts.
        uniform_experts: whether all layers lose the same number of experts.

    Raises:
        UserError: if the target cannot be met.
    """
    units = with_limits(units, protect=protect, width_multiple=width_multiple)
    parameters = parameters_of(units)
    in_scope = frozenset(KIND_OF_PART.get(part, part) for part in scope.split("+"))
    shares = {"layer": block_share, "experts": expert_share}
    # Until they are chosen, layers and experts are removed in the order of their numbers.
    rounds = {u.key: rounds_of_experts(u) for u in units if u.kind == "experts"}
    rounds |= rounds_of_layers(units, (u.layer for u in units))
    equal = [*(["neurons", "kv_groups"] if uniform else []), *(["experts"] if uniform_experts else [])]
    everything = Budget(
        units, price or parameters, scope=in_scope,
        share={kind: share for kind, share in shares.items() if kind in in_scope}, equal=frozenset(equal),
        rounds=rounds, parameters=parameters, outside=outside,
    )  # fmt: skip
    return everything if setting is None else everything.meeting(setting)


@dataclass(frozen=True)
class Budget:
    """The units of a model, the cost to be removed from them, and how.

    Kinds with a `share` are removed first, coarse ones before fine ones, in the order of their `rounds`. The others
    are removed in a common order (`cut.keep_masks`), and make up the rest.
    """

    units: Sequence[Units]  # of the whole model
    price: Price
    target: int = 0  # cost to be removed
    scope: Collection[str] = ("neurons",)  # kinds of units that may be removed
    share: Mapping[str, float] = field(default_factory=dict)  # kind -> largest share of the target that is left for it
    limited: Collection[str] = ("layer",)  # kinds that keep to their share even if finer ones cannot make up the rest
    equal: Collection[str] = ()  # kinds that all layers lose equally many of, or of the finer ones keep equally many
    rounds: Mapping[str, Sequence[Round]] = field(default_factory=dict)  # of units with a share, lowest scores first
    parameters: Price = field(default_factory=dict)  # number of parameters of the units
    outside: int = 0  # cost of everything outside of layers
    setting: float | str | None = None  # `--sparsity.target`, before it was rounded up to `target`

    # Targets

    def meeting(self, setting: float | str, flag: str = "--sparsity.target") -> Budget:
        """Return the budget of the same units for another target. UserError, which names `flag`, if it cannot be met.

        For a target whose cost is searched for, this is the largest possible budget.
        """
        narrowest = min(u.count for u in self.of_kind("neurons") if u.count)
        if self.width_multiple > narrowest:
            raise UserError(f"--sparsity.width_multiple must be 1 to {narrowest} neurons; got {self.width_multiple}.")
        goal = Target.of(setting)
        if goal.is_searched:
            largest = self.removing(self.total)
            if largest.target:
                return replace(largest, setting=setting)
        target = 0 if goal.is_searched else goal.removes(self.total, self.model)
        if target < 1:
            currency = goal.unit if goal.unit in ("parameters", "bytes") else ""
            scope, model = (format_cost(cost, currency).strip() for cost in (self.total, self.model))
            raise UserError(f"{flag} {setting} cannot remove anything: the scope has {scope}, the model {model}.")
        budget = replace(self, target=target, setting=setting)
        if target > budget.removable:
            raise UserError(
                f"{flag} must be {goal.limit(budget.removable, self.total, self.model)}, because {self.least}, and "
                f"{len(self.protected)} layers keep everything; got {setting}."
            )
        if target < budget.unavoidable:
            raise UserError(
                f"{flag} must be {goal.limit(budget.unavoidable, self.total, self.model, least=True)}, because "
                f"--sparsity.uniform_width cuts every block to the narrowest one; got {setting}."
            )
        return budget.with_chosen_layers()

    def at(self, sparsity: float) -> Budget:
        """Return the budget of the same units and possible widths at a sparsity of `--evaluation.curve`."""
        return self.meeting(sparsity, flag="--evaluation.curve")

    def removing(self, target: int) -> Budget:
        """Return the budget of the same units and possible widths that removes this cost, or the nearest possible cost.

        The removable cost depends on the layers that are removed, and these depend on the target. The target is lowered
        until it is removable. It is raised only if blocks of different widths must have the same widths.
        """
        while True:
            budget = replace(self, target=target, setting=None)
            if target <= budget.removable:
                return replace(budget.with_chosen_layers(), target=max(target, budget.unavoidable))
            target = budget.removable

    @property
    def least(self) -> str:
        """What every block keeps in any case, in words. The most demanding router is described."""
        said = []
        if "experts" in self.scope:
            router = max(self.of_kind("experts"), key=lambda u: u.least)
            said.append(f"each router needs {router.least} of {router.count} experts")
            if router.step > 1:
                said.append(f"{router.least // router.step} in each of {router.step} groups")
        if self.finer:
            said.append(f"each block keeps {self.width_multiple} neurons and a KV group")
        return ", ".join(said)

    def without(self, layers: Iterable[int]) -> Budget:
        """Return this budget, with layers removed: the given ones in order, as many as fit."""
        ordered = self.ordered("layer", rounds_of_layers(self.units, layers))
        return ordered.meeting(self.setting or self.sparsity)

    def ordered(self, kind: str, rounds: Mapping[str, Sequence[Round]]) -> Budget:
        """Return the budget with other rounds of a kind that has a share."""
        others = {u.key for u in self.units if u.kind != kind}
        return replace(self, rounds={key: r for key, r in self.rounds.items() if key in others} | dict(rounds))

    def ranked_by(self, scores: Scores) -> Budget:
        """Return the budget in which the experts with the lowest scores are removed, if experts are in scope."""
        if "experts" not in self.share:
            return self
        routers = self.of_kind("experts")
        return self.ordered("experts", {u.key: rounds_of_experts(u, scores.experts[u.key].tolist()) for u in routers})

    def with_chosen_layers(self) -> Budget:
        """Return the budget that, for other targets too, removes no layers but those that it removes now."""
        open_keys = {u.key for u in self.units if u.kind not in self.limited} | self.lost.keys()
        return replace(self, rounds={key: rounds for key, rounds in self.rounds.items() if key in open_keys})

    # What is removed of the kinds with a share

    @cached_property
    def lost(self) -> Lost:
        """The removed units of the kinds with a share, in order of removal."""
        return self._lose(most=False)

    def _lose(self, *, most: bool) -> Lost:
        """Return the removed units of the kinds with a share or, with `most`, all that may be removed."""
        lost: Lost = {}
        for kind in KINDS:
            if kind not in self.share:
                continue
            steps, remaining = self._steps(kind, lost), self.target - self.cost_of(lost)
            costs = [0, *accumulate(sum(self.price[u.key][len(units)] for u, units in step) for step in steps)]
            limit = Fraction(str(self.share[kind])) * remaining  # of the decimal number, because a float is not exact
            number = sum(cost <= limit for cost in costs[1:])
            if kind not in self.limited:
                if most:
                    number = len(steps)
                while (
                    number < len(steps)
                    and remaining - costs[number] > self._without(_lost_by(steps[:number], lost)).removable
                ):
                    number += 1  # finer units cannot make up the rest
            lost = _lost_by(steps[:number], lost)
        return lost

    def _steps(self, kind: str, lost: Lost) -> list[list[tuple[Units, tuple[int, ...]]]]:
        """Return the steps of a kind in order: units that are removed together, after others are lost."""
        of_units = [
            (u, self.rounds[u.key]) for u in self.units
            if u.kind == kind and not u.stays and u.key in self.rounds and unit_key("layer", u.layer) not in lost
        ]  # fmt: skip
        if kind in self.equal:
            together = zip(*(rounds for _, rounds in of_units), strict=False)
            return [[(u, units) for (u, _), (_, units) in zip(of_units, step, strict=True)] for step in together]
        keys = [
            (score, place, number)
            for place, (_, rounds) in enumerate(of_units) for number, (score, _) in enumerate(rounds)
        ]  # fmt: skip
        return [[(of_units[place][0], of_units[place][1][number][1])] for _, place, number in sorted(keys)]

    def cost_of(self, lost: Lost) -> int:
        """Return the cost of removed units."""
        return sum(self.price[key][len(units)] for key, units in lost.items())

    @property
    def lost_layers(self) -> Lost:
        """The removed layers, in the order of choice."""
        layers = {u.key for u in self.of_kind("layer")}
        return {key: units for key, units in self.lost.items() if key in layers}

    @cached_property
    def rest(self) -> Budget:
        """The remaining budget for the other kinds, in the layers and with the experts that are kept."""
        return self._without(self.lost)

    def _without(self, lost: Lost) -> Budget:
        """Return the budget of the kinds without a share after others are lost. Slots become cheaper."""
        units, price, parameters = [], dict(self.price), dict(self.parameters)
        for u in self.units:
            if u.kind in ("layer", "experts") or unit_key("layer", u.layer) in lost:
                continue
            if removed := len(lost.get(u.inside, ())):
                kept = replace(u, rows=u.rows - removed)
                for table in (price, parameters):
                    table[u.key] = [cost * kept.rows // u.rows for cost in table[u.key]]
                units.append(kept)
            else:
                units.append(u)
        target = max(0, self.target - self.cost_of(lost))
        return Budget(units, price, target, frozenset(self.finer), equal=self.equal, parameters=parameters)

    @property
    def key(self) -> tuple[Any, ...]:
        """What tells budgets of the same units and possible widths apart."""
        return self.target, str(self.lost)

    # Units by kind

    def of_kind(self, kind: str) -> list[Units]:
        """Return the units of a kind. There is one set of neurons and one of KV groups per block."""
        return [u for u in self.units if u.kind == kind]

    def kept(self, kind: str) -> list[Units]:
        """Return the units of a kind in the layers that are kept."""
        return [u for u in self.of_kind(kind) if unit_key("layer", u.layer) not in self.lost]

    @cached_property
    def finer(self) -> tuple[str, ...]:
        """Kinds in scope that have no share and are removed in a common order, from coarse to fine."""
        return tuple(kind for kind in kinds_of_units(self.units) if kind in self.scope and kind not in self.share)

    @property
    def width_multiple(self) -> int:
        """Widths of FFNs that change become multiples of it."""
        return max((u.step for u in self.units if u.kind == "neurons"), default=1)

    @property
    def uniform(self) -> bool:
        """Whether all blocks must have the same widths."""
        return "neurons" in self.equal

    @cached_property
    def protected(self) -> frozenset[int]:
        """Layers that keep everything."""
        return frozenset(u.layer for u in self.of_kind("layer") if u.stays)

    @cached_property
    def removed(self) -> tuple[int, ...]:
        """Layers that are removed as a whole, in the order of choice."""
        layers = {u.key: u.layer for u in self.of_kind("layer")}
        return tuple(layers[key] for key in self.lost_layers)

    @cached_property
    def removed_experts(self) -> dict[int, list[int]]:
        """Experts that are removed, by block, in the order of their numbers."""
        return {u.number: sorted(self.lost[u.key]) for u in self.of_kind("experts") if u.key in self.lost}

    def of_kept_experts(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return values of units by key, (rows x count,), without those of removed experts."""
        kept = dict(values)
        for key, (u, experts) in self._kept_experts.items():
            if key in kept:
                by_expert = kept[key].view(u.rows, -1)
                kept[key] = by_expert[experts.to(by_expert.device)].flatten()
        return kept

    def with_removed_experts(self, masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return keep masks of all neurons from those of kept experts: the inverse of `of_kept_experts`."""
        whole = dict(masks)
        for key, (u, experts) in self._kept_experts.items():
            of_all = masks[key].new_zeros(u.rows, u.count)
            of_all[experts.to(of_all.device)] = masks[key].view(len(experts), -1)
            whole[key] = of_all.flatten()
        return whole

    @cached_property
    def _kept_experts(self) -> dict[str, tuple[Units, Tensor]]:
        """Neurons in layers that lose experts, and the numbers of the kept experts, int64."""
        return {
            u.key: (u, torch.tensor([e for e in range(u.rows) if e not in self.lost[u.inside]]))
            for u in self.units if u.inside in self.lost
        }  # fmt: skip

    # Costs

    @property
    def total(self) -> int:
        """Cost of all units in scope. Biases of down and output projections belong to no unit."""
        return self._in_scope(self.price)

    @property
    def total_parameters(self) -> int:
        """Number of parameters of all units in scope."""
        return self._in_scope(self.parameters)

    def _in_scope(self, price: Price) -> int:
        """Return the cost of all units in scope that are in no coarser ones in scope."""
        outer = [u for u in self.units if u.kind in self.scope]
        if "layer" in self.scope:
            outer = [u for u in outer if u.kind == "layer"]
        keys = {u.key for u in outer}
        return sum(price[u.key][-1] for u in outer if u.inside not in keys)

    @property
    def model(self) -> int:
        """Cost of the whole model."""
        return sum(self.price[u.key][-1] for u in self.of_kind("layer")) + self.outside

    @property
    def sparsity(self) -> float:
        """Fraction of the scope's cost that is to be removed."""
        return self.setting if isinstance(self.setting, float) else (self.target + self.overshoot) / self.total

    @property
    def overshoot(self) -> int:
        """Cost that a whole number of experts removes beyond the target, if nothing finer is in scope."""
        return 0 if self.finer else max(0, self.cost_of(self.lost) - self.target)

    @property
    def removable(self) -> int:
        """The largest removable cost: of limited kinds what is lost, of others all but the `least` units."""
        if self.share:
            most = self._lose(most=True)
            return self.cost_of(most) + self._without(most).removable
        return sum(cost_beyond(self.price[u.key], u.count - self.number_of_removable(u)) for u in self.units)

    def number_of_removable(self, u: Units) -> int:
        """Return how many of these units may be removed."""
        return max(0, u.count - u.least) if u.kind in self.scope and not u.stays else 0

    @property
    def unavoidable(self) -> int:
        """The smallest cost that can be removed if all blocks must have the same widths; 0 if they may differ.

        Blocks of different widths are cut to the narrowest one, rounded down to a multiple, and blocks with different
        numbers of KV groups to the smallest number.
        """
        kinds = [kind for kind in self.finer if kind in self.equal]
        if not kinds:
            return 0
        cost, rest = self.cost_of(self.lost_layers), self._without(self.lost_layers)
        for kind in kinds:
            units = [u for u in rest.of_kind(kind) if u.count]
            if len({u.count for u in units}) > 1:
                common = min(u.count for u in units) // units[0].step * units[0].step
                cost += sum(cost_beyond(self.price[u.key], common) for u in units)
        return cost

    def removed_by(self, masks: Masks) -> int:
        """Return the cost that masks remove. For a layer that keeps nothing this is the whole layer with its norms."""
        return self._removed(self.price, masks)

    def parameters_removed_by(self, masks: Masks) -> int:
        """Return the number of parameters that masks remove."""
        return self._removed(self.parameters, masks)

    def _removed(self, price: Price, masks: Masks) -> int:
        """Return the cost that masks remove, by a price."""
        removed = 0
        for layer in self.of_kind("layer"):
            units = [u for u in self.units if u.layer == layer.layer and u.kind != "layer" and u.count]
            if units and not any(masks.kept(u).any() for u in units):
                removed += price[layer.key][-1]
                continue
            for u in units:
                kept = masks.kept(u)
                if u.rows > 1:  # kept experts keep equally many neurons, and removed ones none
                    by_expert = kept.view(u.rows, u.count)
                    experts = int(by_expert.any(1).sum()) or 1
                    removed += cost_beyond(price[u.key], int(by_expert.sum()) // experts) * experts // u.rows
                elif u.kind == "experts":
                    removed += cost_beyond(price[u.key], int(kept.sum()) or 1)
                else:
                    removed += cost_beyond(price[u.key], int(kept.sum()))
        return removed

    @property
    def step(self) -> int:
        """The smallest difference in cost between masks: one step of the finer kinds, in all blocks if they are equal.

        Without finer kinds it is the largest cost of a step of experts.
        """
        if not self.finer:
            return max(1, self.largest_step)
        costs = []
        for u in self.units:
            first = u.count % u.step or u.step  # units that make the width a multiple
            if u.kind in self.finer and first <= u.count:
                costs.append(cost_beyond(self.price[u.key], u.count - first))
        costs = [cost for cost in costs if cost > 0] or [1]
        return sum(costs) if self.uniform else min(costs)

    @property
    def largest_step(self) -> int:
        """The largest cost of one step of the finer kinds, in all blocks if they are equal.

        Without finer kinds it is that of a step of experts.
        """
        if not self.finer:
            steps = self._steps("experts", self.lost_layers)
            return max((sum(self.price[u.key][len(units)] for u, units in step) for step in steps), default=1)
        steps = []
        for kind in self.finer:
            tables = [(self.price[u.key], u.step) for u in self.rest.of_kind(kind)]
            costs = [
                max((more - less for less, more in zip(table, table[size:], strict=False)), default=0)
                for table, size in tables
            ]
            steps.append(sum(costs) if kind in self.equal else max(costs, default=0))
        return max(steps)


def _lost_by(steps: Iterable[Iterable[tuple[Units, tuple[int, ...]]]], lost: Lost) -> Lost:
    """Return what is lost after further steps."""
    lost = dict(lost)
    for step in steps:
        for u, units in step:
            lost[u.key] = (*lost.get(u.key, ()), *units)
    return lost
