"""The interface of recoveries, which change weights of a pruned model to compensate for the removed units.

A recovery declares the statistics it needs, its cost in tokens, and the models it does not support. `method` has no
code for particular recoveries. Most are a function of one output projection, such as `least_squares`. Others are a
class. `revise` changes one block at a time; `tune` changes the whole pruned model, for example by training a
LightningModule:

    @recovery("heal")
    class Heal(Recovery):
        learns = True

        def __init__(self, *, rate: float = 1e-4):  # --options.heal.rate 1e-3
            self.rate = rate

        def tune(self, material, pruned):
            material.fit("Healing", MyStage(material.dense, pruned, self.rate))
            return pruned

A list is a chain of recoveries: `--recovery [least_squares,distill]` is the recovery `least_squares+distill`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gprune.checks import format_value
from gprune.errors import UserError
from gprune.registry import Registry

if TYPE_CHECKING:  # this registry is imported to check flags, which should not wait for PyTorch
    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from gprune.calibration.statistics import CorpusStatistics, Moments
    from gprune.models.masks import Masks
    from gprune.units.structure import Units

NEEDS = ("moments", "gram", "text")
# (dense layer, sliced layer, units of the dense layer): changes the sliced layer in place
Revise = Callable[["nn.Module", "nn.Module", "Sequence[Units]"], None]
Solver = Callable[["Tensor", "Tensor", "Moments", float], tuple["Tensor", "Tensor | None"]]


@dataclass(frozen=True)
class Material:
    """Inputs of a recovery, in addition to the pruned model."""

    dense: PreTrainedModel  # the frozen dense model; a recovery must not change it
    masks: Masks  # the masks of the pruned model
    ridge: float = 0.01  # `--ridge`
    # Statistics of the dense model, pooled over `corpora.recover`; None unless the recovery needs them.
    statistics: CorpusStatistics | None = None
    # Calibration text of `corpora.recover`, corpus by corpus: (B, T) int64 token ids; empty unless it is needed.
    batches: Sequence[Tensor] = ()
    # Called with a title and a stage. Trains the stage on `--distill.tokens` of text from `corpora.recover` if the
    # recovery learns, otherwise on calibration text. A resumed run restores the state_dict of a finished stage.
    fit: Callable[..., None] | None = None


class Recovery:
    """Base class of recoveries. It changes nothing, and is itself the recovery `none`, as in the paper.

    For each pruned model, a run constructs one instance with the options.
    """

    name = ""  # set when it is registered
    needs: frozenset[str] = frozenset()  # which of `NEEDS` (statistics of the dense model, or text) it reads
    learns = False  # whether it trains on `--distill.tokens` of text
    experts = True  # whether it can recover experts
    group = ""  # the group of flags that a run assigns to `settings`
    settings: Any = None
    registered: Any = None  # the registered class or function, whose keyword-only parameters are options
    factory: Callable[..., Recovery]  # constructs the recovery with options

    def revise(self, material: Material) -> Revise | None:
        """Return a function that changes each sliced block, called in the order of blocks, or None."""
        return None

    def tune(self, material: Material, pruned: PreTrainedModel) -> PreTrainedModel:
        """Return the recovered model; `pruned` may be changed in place."""
        return pruned

    def tokens(self, text: int, fresh: int, *, attention: bool) -> tuple[int, int]:
        """Return the largest numbers of tokens (forward, forward and backward) for one pruned model.

        Args:
            text: tokens of `Material.batches`.
            fresh: `--distill.tokens`, the training text of a recovery that learns.
            attention: whether attention is in scope.
        """
        return 0, 0

    def refuse(self, plan: Any) -> None:
        """Raise UserError if this recovery does not support a model; called before weights are loaded.

        Args:
            plan: has `skeleton`, the dense model without weights, and `cfg`, the settings.
        """
        from gprune.models.experts import is_of_experts
        from gprune.models.families import decoder_layers, record_of

        layers = decoder_layers(plan.skeleton)
        alternatives = ", ".join(name for name in RECOVERY if RECOVERY[name].experts)
        if not self.experts and any(is_of_experts(layers[u.layer], u) for u in plan.budget.units):
            raise UserError(
                f"--recovery {self.name} cannot recover experts (model type '{record_of(plan.skeleton).model_type}'). "
                f"Use one of {alternatives}."
            )


RECOVERY: Registry[Recovery] = Registry("recovery")


def recoveries_of(chain: str, settings: Mapping[str, Any]) -> list[Recovery]:
    """Construct the recoveries of a chain such as `least_squares+distill`, one instance each, for one pruned model.

    `settings` maps names to options, and groups of flags to their values.
    """
    recoveries = []
    for name in chain.split("+"):
        group = RECOVERY[name].group
        options = {} if name == group else settings.get(name, {})  # `settings[group]` are no options
        instance = RECOVERY[name].factory(**options)
        if group in settings:
            instance.settings = settings[group]
        recoveries.append(instance)
    return recoveries


def recovery_needs(chain: str) -> frozenset[str]:
    """Return which of `NEEDS` the recoveries of a chain read."""
    return frozenset().union(*(RECOVERY[name].needs for name in chain.split("+")))


def recovery_learns(chain: str) -> bool:
    """Return whether a recovery of a chain trains on text."""
    return any(RECOVERY[name].learns for name in chain.split("+"))


def check_chain(chain: str) -> None:
    """Raise UserError unless the recoveries of a chain exist and may follow each other."""
    names = chain.split("+")
    misplaced = [other for other in names[1:] if type(RECOVERY[other]).revise is not Recovery.revise]
    if len(names) > 1 and (len(set(names)) < len(names) or "none" in names or misplaced):
        why = "each once, and no 'none'"
        if misplaced:
            why = f"'{misplaced[0]}' goes block by block, so it must come first"
        raise UserError(f"--recovery must be a chain such as [least_squares,distill]; got {chain} ({why}).")


class Projection(Recovery):
    """A recovery that solves each output projection separately, from statistics of the dense model."""

    def __init__(self, solver: Solver, *, needs: Collection[str], experts: bool):
        self.solver = solver
        self.needs = frozenset(needs)
        self.experts = experts

    def revise(self, material: Material) -> Revise:
        """Return a function that corrects the output projections of a sliced block by `solve`."""
        from gprune.models.offload import device_of
        from gprune.models.units import output_weight, set_output

        def revise(dense: nn.Module, layer: nn.Module, units: Sequence[Units]) -> None:
            """Correct those output projections of a sliced layer that lost channels."""
            for u in units:
                if u.kind not in ("kv_groups", "neurons") or (keep := material.masks[u.key]).all():
                    continue
                moments = material.statistics.channels[u.key].total
                weight = output_weight(u, dense, device_of(dense))
                keep = u.of_channels(keep) if u.rows == 1 else keep
                set_output(u, layer, *self.solve(weight, keep, moments, experts=u.rows, ridge=material.ridge))

        return revise

    def solve(
        self, weight: Tensor, keep: Tensor, moments: Moments, *, experts: int = 1, ridge: float = 0.01
    ) -> tuple[Tensor, Tensor | None]:
        """Return the new weight and the added bias of an output projection that keeps the channels `keep`."""
        import torch

        with torch.no_grad():
            has_experts = moments.count.dim() > 0  # each expert has its own token count
            if not has_experts:
                return self._solve_one(weight, keep, moments, ridge)
            solved: list[tuple[Tensor, Tensor | None]] = []
            by_expert = zip(weight.chunk(experts, 1), keep.chunk(experts), strict=True)
            for index, (expert_weight, expert_keep) in enumerate(by_expert):
                if expert_keep.all():  # only other experts are removed
                    solved.append((expert_weight, None))
                elif expert_keep.any():  # otherwise it is removed with its row of the router
                    solved.append(self._solve_one(expert_weight, expert_keep, moments.of_expert(index, experts), ridge))
        if any(bias is not None for _, bias in solved):
            raise UserError(f"Recovery '{self.name}' must return None as the bias of experts, which have no biases.")
        return torch.cat([new_weight for new_weight, _ in solved], 1), None

    def _solve_one(self, weight: Tensor, keep: Tensor, moments: Moments, ridge: float) -> tuple[Tensor, Tensor | None]:
        """Call the solver for one projection or one expert, and check its result; see `solve`."""
        solution = self.solver(weight.float().clone(), keep.clone(), moments.copy(), ridge)
        if not (isinstance(solution, tuple) and len(solution) == 2):
            type_name = type(solution).__name__
            raise UserError(
                f"Recovery '{self.name}' must return a weight and a bias, which may be None; got {type_name}."
            )
        new_weight, bias = solution
        shape = len(weight), int(keep.sum())
        new_weight = RECOVERY.checked(self.name, "a weight", new_weight, shape, of="floats").to(weight)
        if bias is not None:
            bias = RECOVERY.checked(self.name, "a bias", bias, shape[:1], of="floats").to(weight)
        return new_weight, bias


def recovery(name: str, *, needs: Collection[str] = ("moments",), experts: bool = True) -> Callable[[Any], Any]:
    """Register a recovery as the value `name` of `--recovery`: a function, or a subclass of `Recovery`.

    A function is called as `function(weight, keep, moments, ridge, **options)` for each output projection that lost
    channels, and returns `(new weight, bias)`; the bias may be None.

    - weight: (H, C) float32, of the dense model; keep: (C,) bool, True = keep.
    - moments: `calibration.statistics.Moments` of the C channels over `--corpora.recover`, float64: mean, mean_sq and
      variance (C,), and gram (C, C) float32 if needed.
    - ridge: `--ridge`.
    - new weight: (H, kept); bias: (H,), added to the projection's output.

    A class overrides `revise` (one block at a time) or `tune` (the whole model, for example with `material.fit` and a
    LightningModule). It sets `learns` if it trains on the `--distill.tokens` of text, and overrides `tokens` to return
    the number of tokens that pass through the model.

    Example:

        from gprune import recovery

        @recovery("rescaled")
        def rescaled(weight, keep, moments, ridge):
            energy = moments.mean_sq.to(weight)
            return weight[:, keep] * (energy.sum() / energy[keep].sum()).sqrt(), None

    Args:
        name: the value of `--recovery`.
        needs: which of `NEEDS` a function reads from `moments`. A class has its own attribute.
        experts: whether a function supports experts, which have no biases. A class has its own attribute.

    Raises:
        ValueError: if `needs` has another name, or another recovery has this name.
        UserError: if the name has characters that are not allowed, or the decorated object is neither a function nor a
            subclass of `Recovery`.
    """
    if unknown := set(needs) - set(NEEDS):
        raise ValueError(f"The needs of recovery '{name}' must be among {', '.join(NEEDS)}; got {sorted(unknown)}.")

    def decorate(entry: Any) -> Any:
        """Register the class or function in `RECOVERY`, and return it."""
        if not (issubclass(entry, Recovery) if isinstance(entry, type) else callable(entry)):
            raise UserError(
                f"Recovery '{name}' must be a function or a subclass of Recovery; got {format_value(entry)}."
            )

        def create(**options: Any) -> Recovery:
            """Construct the recovery with options.

            Attributes are set on the instance, because a class may be registered under several names, and functions
            have no class of their own. `Registry` reads `__module__` and `__qualname__` to detect that other code has
            the same name; all functions would otherwise look like `Projection`.
            """
            if isinstance(entry, type):
                instance = entry(**options)
            else:
                solver = functools.partial(entry, **options)
                instance = Projection(solver, needs=needs, experts=experts)
            instance.name = name
            instance.registered = entry
            instance.factory = create
            instance.__module__ = entry.__module__
            instance.__qualname__ = entry.__qualname__
            return instance

        RECOVERY.register(name)(create())
        return entry

    return decorate


recovery("none")(Recovery)
