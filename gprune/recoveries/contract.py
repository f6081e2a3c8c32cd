"""The contract of recoveries, which change the weights of a pruned model to make up for what pruning removed.

A recovery says what it needs, what it costs and what it refuses; the pipeline asks, and knows no recovery by its name.
Most are a function of one output projection:

    @recovery("rescale")
    def rescale(weight, keep, moments, ridge):
        energy = moments.mean_sq.to(weight)
        return weight[:, keep] * (energy.sum() / energy[keep].sum()).sqrt(), None

Others are a class: `revise` goes block by block, `tune` takes the whole pruned model, for instance through a
LightningModule:

    @recovery("heal")
    class Heal(Recovery):
        learns = True

        def __init__(self, *, rate: float = 1e-4):  # --options.heal.rate 1e-3
            self.rate = rate

        def tune(self, material, pruned):
            material.fit("Healing", MyStage(material.dense, pruned, self.rate))
            return pruned

Several make a chain: `--recovery [least_squares,distill]` is the recovery `least_squares+distill`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from gprune.calibration.projections import OUTPUT_PROJECTIONS
from gprune.checks import shown
from gprune.errors import UserError
from gprune.registry import Registry

if TYPE_CHECKING:  # flags are checked by what is registered here, which should not wait for PyTorch
    from torch import Tensor
    from transformers import PreTrainedModel

    from gprune.calibration.statistics import CorpusStatistics, Moments
    from gprune.corpora.windows import Windows
    from gprune.models.blocks import Block
    from gprune.models.masks import Masks

NOTHING: Mapping[str, Any] = MappingProxyType({})
NEEDS = ("moments", "gram", "text")
Revise = Callable[["Block", "Block"], None]  # (dense block, sliced block): changes the sliced one in place
Solver = Callable[["Tensor", "Tensor", "Moments", float], tuple["Tensor", "Tensor | None"]]


@dataclass(frozen=True)
class Material:
    """The inputs of a recovery, beside the pruned model."""

    dense: PreTrainedModel  # frozen; read only, as statistics and text are
    masks: Masks
    ridge: float = 0.01
    statistics: CorpusStatistics | None = None  # of the dense model, `corpora.recover` pooled; if needed
    text: Sequence[Windows] = ()  # of `corpora.recover`; if needed
    batch_size: int = 4
    # Gets the numbers of tokens that went through layers one by one: forward, and forward and backward.
    count: Callable[..., None] = lambda forward, forward_backward=0: None
    fresh: Sequence[Windows] = ()  # text of `corpora.recover` to learn from: `--distill.tokens` of it
    settings: Mapping[str, Any] = field(default_factory=dict)  # groups of flags and options, by names of recoveries
    # Trains a stage on `fresh`, else on `text`. Its state_dict is what it learns: a run taken up gives it back.
    fit: Callable[..., None] | None = None
    shard: bool = False  # whether layers are sharded over processes while something learns
    # What the dense model's final hidden states are, by batch of tokens, for all rows of a run; None: not kept.
    taught: dict[bytes, Tensor] | None = None
    paid: bool = False  # whether another row has counted the tokens of `taught`, perhaps in an earlier sitting

    @property
    def batches(self) -> list[Tensor]:
        """The text as (B, T) int64 token ids, corpus by corpus."""
        return [ids for windows in self.text for ids in windows.tokens.split(self.batch_size)]


class Recovery:
    """A recovery that does nothing: `none`, the paper's method. Others inherit it and override what they change."""

    name = ""  # set when it is registered
    needs: frozenset[str] = frozenset()  # of `NEEDS`: statistics of the dense model, or the text they are taken from
    learns = False  # whether it trains on text of its own
    taught = False  # whether the dense model's pass over that text is kept in `Material.taught` for other rows
    experts = True  # whether it can recover experts
    sharded = True  # whether it works while the dense model is sharded over processes: False if it goes layer by layer
    origin: Any = None  # the class or function that was registered; its keyword-only parameters are options
    made: Callable[..., Recovery]  # makes the same recovery with options

    def revise(self, material: Material) -> Revise | None:
        """A function that is called for each sliced block, first block first, and changes it; None: nothing changes."""
        return None

    def tune(self, material: Material, pruned: PreTrainedModel) -> PreTrainedModel:
        """The pruned model, recovered as a whole, in place or not."""
        return pruned

    def tokens(self, text: int, fresh: int, *, attention: bool) -> tuple[int, int]:
        """At most (forward, forward and backward) tokens for one pruned model, from those of its texts."""
        return 0, 0

    def refuse(self, blocks: Sequence[Block], *, shard: bool = False) -> None:
        """Raise a UserError, before anything is loaded, if this recovery cannot work.

        Args:
            blocks: of the dense model, without weights.
            shard: whether the dense model is sharded over processes.
        """
        others = [n for n in RECOVERY if RECOVERY[n].experts and RECOVERY[n].sharded]
        if shard and not self.sharded:
            raise UserError(
                f"--recovery {self.name} cannot be combined with --model.shard true, because every process would "
                f"compute all layers. Use one of {', '.join(others)}."
            )
        if not self.experts and any(block.has_experts for block in blocks):
            kind = f"experts (model type '{blocks[0].family.model_type}')"
            raise UserError(f"--recovery {self.name} cannot recover {kind}. Use one of {', '.join(others)}.")


RECOVERY: Registry[Recovery] = Registry("recovery")


class Chain(Recovery):
    """Several recoveries, one after the other, with the contract of one."""

    def __init__(self, name: str, settings: Mapping[str, Any] = NOTHING):
        self.name, names = name, name.split("+")
        self.recoveries = [recovery_of(name, settings) for name in names]
        self.needs = frozenset().union(*(one.needs for one in self.recoveries))
        self.learns, self.taught = (any(getattr(one, name) for one in self.recoveries) for name in ("learns", "taught"))
        self.sharded = all(one.sharded for one in self.recoveries)
        late = [one.name for one in self.recoveries[1:] if type(one).revise is not Recovery.revise]
        if len(set(names)) < len(names) or "none" in names or late:
            why = f"'{late[0]}' goes block by block, so it must come first" if late else "each once, and no 'none'"
            raise UserError(f"--recovery must be a chain such as [least_squares,distill]; got {name} ({why}).")

    def revise(self, material: Material) -> Revise | None:
        return self.recoveries[0].revise(material)

    def tune(self, material: Material, pruned: PreTrainedModel) -> PreTrainedModel:
        for one in self.recoveries:
            pruned = one.tune(material, pruned)
        return pruned

    def tokens(self, text: int, fresh: int, *, attention: bool) -> tuple[int, int]:
        costs = [one.tokens(text, fresh, attention=attention) for one in self.recoveries]
        return sum(forward for forward, _ in costs), sum(backward for _, backward in costs)

    def refuse(self, blocks: Sequence[Block], *, shard: bool = False) -> None:
        for one in self.recoveries:
            one.refuse(blocks, shard=shard)


def recovery_of(name: str, settings: Mapping[str, Any] = NOTHING) -> Recovery:
    """The recovery by a name of `RECOVERY`, or the chain of several that are joined by `+`, with these settings."""
    if "+" in name:
        return Chain(name, settings)
    one, own = RECOVERY[name], settings.get(name)
    return one if own is None else one.made(**(own if isinstance(own, dict) else {"settings": own}))


def tuned(name: str, material: Material, pruned: PreTrainedModel) -> PreTrainedModel:
    """The pruned model as a recovery, or a chain, gives it back.

    Raises:
        UserError: for something else than a model, and for weights that are not dense, real and finite.
    """
    from transformers import PreTrainedModel

    with RECOVERY.running(name):
        model = recovery_of(name, material.settings).tune(material, pruned)
    if not isinstance(model, PreTrainedModel):
        raise UserError(f"Recovery '{name}' must return the pruned model from tune; got {type(model).__name__}.")
    for place, weight in model.named_parameters():
        if not weight.is_meta:  # offloaded
            RECOVERY.checked(name, place, weight, tuple(weight.shape), of="finite floats")
    return model


class Projection(Recovery):
    """A recovery that solves each output projection that lost channels by itself, from the dense model's statistics."""

    def __init__(self, solver: Solver, *, needs: Collection[str], experts: bool):
        self.solver, self.needs, self.experts = solver, frozenset(needs), experts

    def revise(self, material: Material) -> Revise:
        """What is done to each block as it is sliced: the correction of its two output projections."""
        from gprune.models.offload import device_of

        def revise(dense: Block, block: Block) -> None:
            """Correct a sliced block's output projections that lost channels, by the dense block's statistics."""
            keeps = material.masks.channels(dense)
            for kind, part in OUTPUT_PROJECTIONS.items():
                if not bool(keeps[kind].all()):
                    moments = getattr(material.statistics, kind)[dense.index].total
                    weight = dense.parts[part].weight.to(device_of(dense.layer))
                    experts = dense.experts if kind == "ffn" else 1
                    solved = self.solve(weight, keeps[kind], moments, experts=experts, ridge=material.ridge)
                    block.parts[part].set(*solved)

        return revise

    def solve(
        self, weight: Tensor, keep: Tensor, moments: Moments, *, experts: int = 1, ridge: float = 0.01
    ) -> tuple[Tensor, Tensor | None]:
        """New weight and added bias of an output projection whose channels are cut down to `keep`.

        Args:
            weight: (H, C) dense projection, any float dtype; solvers get a copy in float32.
            keep: (C,) bool, True = keep; solvers get a copy.
            moments: of the dense input channels over `corpora.recover`; solvers get a copy, save for the Gram matrix.
            experts: number of experts whose columns lie side by side; each is recovered by itself.
            ridge: lambda over the mean diagonal of the Gram matrix.

        Returns:
            (H, kept) weight and (H,) bias to add, or None, in the dtype of `weight`.

        Raises:
            UserError: if the solver returns other shapes, or what is not dense and real; for a bias of experts.
        """
        import torch

        with torch.no_grad():
            if not moments.count.dim():
                return self._solved(weight, keep, moments, ridge)
            # Experts have a count each.
            parts = zip(weight.chunk(experts, 1), keep.chunk(experts), range(experts), strict=True)
            solved = [self._solved(w, k, moments.of_expert(e, experts), ridge) for w, k, e in parts]
        if any(bias is not None for _, bias in solved):
            raise UserError(f"Recovery '{self.name}' must return None as the bias of experts, which have no biases.")
        return torch.cat([new for new, _ in solved], 1), None

    def _solved(self, weight: Tensor, keep: Tensor, moments: Moments, ridge: float) -> tuple[Tensor, Tensor | None]:
        with RECOVERY.running(self.name):
            solution = self.solver(weight.float().clone(), keep.clone(), moments.copied(), ridge)
        if not (isinstance(solution, tuple) and len(solution) == 2):
            got = type(solution).__name__
            raise UserError(f"Recovery '{self.name}' must return a weight and a bias, which may be None; got {got}.")
        shape = len(weight), int(keep.sum())
        new = RECOVERY.checked(self.name, "a weight", solution[0], shape, of="floats").to(weight)
        if solution[1] is None:
            return new, None
        return new, RECOVERY.checked(self.name, "a bias", solution[1], shape[:1], of="floats").to(weight)


def recovery(name: str, *, needs: Collection[str] = ("moments",), experts: bool = True) -> Callable[[Any], Any]:
    """Register a recovery, a function of one projection or a class of `Recovery`, as a value `name` of `--recovery`.

    A function is called as `function(weight, keep, moments, ridge, **options)` for each output projection that lost
    channels, and returns `(new weight, bias)`; the bias may be None.

    - weight: (H, C) float32, of the dense model; keep: (C,) bool, True = keep.
    - moments: `calibration.statistics.Moments` of the C channels over `--corpora.recover`, float64: mean, mean_sq and
      variance (C,), and gram (C, C) float32 if needed.
    - ridge: `--ridge`.
    - new weight: (H, kept); bias: (H,), added to the projection's output.

    A class overrides `revise` (a block at a time) or `tune` (the whole model, for instance by `material.fit` of a
    LightningModule); `Recovery` describes them. Its `learns` says that it trains on `--distill.tokens` of text, and
    `tokens` how many pass through the model.

    Example:

        from gprune import recovery

        @recovery("rescaled")
        def rescaled(weight, keep, moments, ridge):
            energy = moments.mean_sq.to(weight)
            return weight[:, keep] * (energy.sum() / energy[keep].sum()).sqrt(), None

    Args:
        name: the value of `--recovery`.
        needs: which of `NEEDS` a function's `moments` have to hold. A class says so itself.
        experts: whether a function can recover experts, which have no biases.
    """
    if unknown := set(needs) - set(NEEDS):
        raise ValueError(f"The needs of recovery '{name}' must be among {', '.join(NEEDS)}; got {sorted(unknown)}.")

    def decorate(entry: Any) -> Any:
        """Put the class or function into `RECOVERY` under its name, and give it back."""
        if not (issubclass(entry, Recovery) if isinstance(entry, type) else callable(entry)):
            raise UserError(f"Recovery '{name}' must be a function or a subclass of Recovery; got {shown(entry)}.")

        def made(**options: Any) -> Recovery:
            solver = functools.partial(entry, **options)
            instance = solver() if isinstance(entry, type) else Projection(solver, needs=needs, experts=experts)
            instance.name, instance.origin, instance.made = name, entry, made
            instance.__module__, instance.__qualname__ = entry.__module__, entry.__qualname__
            return instance

        RECOVERY.register(name)(made())
        return entry

    return decorate


recovery("none")(Recovery)
