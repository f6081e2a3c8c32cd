"""Registry of metrics, corpora, recoveries and stages, with the checks of what registered code returns.

IMPORTANCE = Registry("importance metric")

@IMPORTANCE.register("my_metric")
def my_metric(...): ...

IMPORTANCE["my_metric"]     # for an unknown name the error lists all names
with IMPORTANCE.unchanged("my_metric", weight):
    scores = IMPORTANCE.checked("my_metric", "scores", my_metric(weight), (48,))
"""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from gprune.errors import UnregisteredError, UserError, closest_name
from gprune.imports import UNREADABLE
from gprune.user_code import code_of

if TYPE_CHECKING:  # flags are checked by what is registered, which should not wait for PyTorch
    from torch import Tensor

T = TypeVar("T")
FLOATS = ("float64", "float32", "float16", "bfloat16")
INTEGERS = ("int64", "int32", "int16", "int8", "uint8")
# Word for the content of a tensor in messages -> dtypes that are allowed.
DTYPES = {"numbers": FLOATS + INTEGERS, "floats": FLOATS, "whole numbers": INTEGERS, "bool": ("bool",)}
NAME = re.compile(r"\w[\w.-]{0,99}")


class Registry(Generic[T]):
    """Map names to registered functions or classes.

    Args:
        kind: the word for an entry in messages, such as "corpus".
        method: a method that every entry must have.
        stand_in: class of an entry whose module cannot be read.
    """

    def __init__(self, kind: str, method: str | None = None, stand_in: type[StandIn] | None = None):
        self.kind, self.method, self.stand_in = kind, method, stand_in or StandIn
        self._entries: dict[str, T | str] = {}
        self._registered_in: dict[str, str] = {}  # name -> the module that registers it

    def register(self, name: str) -> Callable[[T], T]:
        """Return a decorator that registers an object under `name`.

        The decorator may also be called with the text "module:name", which is imported when the entry is first used.

        Raises:
            ValueError: if another object has the name (running a notebook cell again is allowed).
            UserError: if the name has characters that are special in paths, or separate names in chains and lists.
        """
        if not (isinstance(name, str) and NAME.fullmatch(name)):
            raise UserError(f"The name of a {self.kind} must have letters, digits, _, - and dots; got {name!r:.100}.")
        registered_in = _calling_module()

        def decorate(entry: T) -> T:
            """Register the entry under `name`, and return it unchanged."""
            if self.method and not isinstance(entry, str) and not callable(getattr(entry, self.method, None)):
                subject = f"{self.kind.capitalize()} '{name}'"
                raise UserError(f"{subject} must be a class with the method {self.method}; got {entry!r}.")
            existing = self._entries.setdefault(name, entry)
            if _origin(existing) != _origin(entry):
                raise ValueError(f"{self.kind} '{name}' is already registered as {existing!r}; choose another name.")
            self._entries[name] = entry
            self._registered_in[name] = registered_in
            self.code(name)  # reads the module's file now, because it may be changed later
            return entry

        return decorate

    def code(self, name: str) -> dict[str, str | None]:
        """Return the hashes of the user's code of an entry, by module; empty for an entry of gprune.

        The hash is None if the code cannot be read.
        """
        if name not in self._entries:
            return {f"{self.kind} {name}": None}
        entry = self._entries[name]
        if isinstance(entry, str):
            return code_of(entry, entry.partition(":")[0])
        return code_of(getattr(entry, "registered", entry), self._registered_in.get(name, ""))

    def check(self, name: str) -> None:
        """Raise UserError if the name is not registered and all modules were imported. Nothing is imported here."""
        if name not in self._entries and not UNREADABLE:
            closest = closest_name(name, self._entries)
            hint = f" Did you mean '{closest}'?" if closest else ""
            raise UnregisteredError(f"Unknown {self.kind} '{name}'.{hint} Available: {', '.join(self)}.")

    def __getitem__(self, name: str) -> T:
        """Return the entry. Raise UserError if the name is not registered. An entry given as text is imported.

        For an unknown name, after a module of `--import` could not be read, the result is a stand-in.
        """
        self.check(name)
        entry = self._entries.get(name, self.stand_in)
        if entry is self.stand_in:
            return self.stand_in(name)
        if isinstance(entry, str):
            module, _, attribute = entry.partition(":")
            entry = self._entries[name] = getattr(importlib.import_module(module), attribute)
        return entry

    @contextmanager
    def unchanged(self, name: str, *inputs: Tensor) -> Iterator[None]:
        """Context for a call of the entry `name`. Raise UserError if the entry has changed an input in place."""
        versions = [tensor._version for tensor in inputs]
        yield
        if versions != [tensor._version for tensor in inputs]:
            subject = f"{self.kind.capitalize()} '{name}'"
            raise UserError(f"{subject} must not change its inputs in place. Use abs() instead of abs_(), for example.")

    def checked(self, name: str, what: str, value: Any, *shapes: tuple[int, ...], of: str = "finite numbers") -> Tensor:
        """Check a tensor that the entry `name` returned, and return it detached.

        Args:
            name: name of the entry.
            what: the word for the tensor, such as "scores".
            value: what the entry returned.
            shapes: the shapes that are allowed.
            of: content of the tensor: a key of `DTYPES`, or `finite ` and a key, with which values are checked too.
                That check waits for the device.

        Raises:
            UserError: if the value is not a tensor with one of the shapes and the dtypes, or has values that are not
                finite.
        """
        import torch

        received = type(value).__name__  # description for the error
        if isinstance(value, torch.Tensor):
            dtype = str(value.dtype).removeprefix("torch.")
            received = f"{tuple(value.shape)} of {dtype}"
            if value.shape in shapes and dtype in DTYPES[of.removeprefix("finite ")]:
                not_finite = int((~value.isfinite()).sum()) if "finite" in of else 0
                if not not_finite:
                    return value.detach()
                received = f"{not_finite} of {value.numel()} that are not finite"
        shape = " or ".join(map(str, shapes))
        subject = f"{self.kind.capitalize()} '{name}'"
        raise UserError(f"{subject} must give {what} {shape} as a tensor of {of}; got {received}.")

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)


class StandIn:
    """Stand-in for an entry whose module cannot be read, with which the records of earlier runs can be shown.

    The attributes are those of registered metrics, allocations and recoveries.
    """

    modules = learned = whole_blocks = errors = activation_free = learns = False
    needs: frozenset[str] = frozenset()
    drift = ""

    def __init__(self, name: str):
        self.name = name


def _calling_module() -> str:
    """Return the name of the first module outside gprune that has called a function of gprune."""
    frame = sys._getframe()
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] == "gprune":
        frame = frame.f_back
    return "" if frame is None else frame.f_globals.get("__name__", "")


def _origin(entry: object) -> tuple[str, str]:
    """Return the module and the name of an object, which are the same after a notebook cell has been run again."""
    return getattr(entry, "__module__", ""), getattr(entry, "__qualname__", repr(entry))


# Registries of stages, each with the method that the pipeline calls.
REFINER: Registry[Any] = Registry("refiner", "labels")  # --partition.refiner
LEARNER: Registry[Any] = Registry("learner", "masks")  # --sparsity.learner
CALIBRATOR: Registry[Any] = Registry("calibrator", "test_step")  # --corpora.calibrator


def refiner(name: str) -> Callable[[T], T]:
    """Register a LightningModule that refines modules of neurons, as a value of `--partition.refiner`.

    A run builds `Class(inputs, labels, **options)`, fits it with the class' own `train_dataloader`, and calls
    `labels()`.

    - inputs: `partition.objective.RefinementInputs` of B blocks, padded to N neurons: embedding (B, N, E), drift
      (B, N, 1), shifts (B, N, D) and valid (B, N), all float32.
    - labels: module labels of the initial partition, one (N,) int64 tensor per block with values 0 to K - 1.
    - options: keyword-only parameters. A parameter named like a `--partition` flag, such as `learning_rate`, receives
      that flag's value. Others are set with `--options.NAME.OPTION`.
    - labels() -> list of (N,) int64, one per block, with values 0 to K - 1. Every module has at least one neuron.

    Example:

        import gprune
        from gprune.stages.refinement import AssignmentRefinement

        @gprune.refiner("merged")
        class Merged(AssignmentRefinement):
            def labels(self):
                return [y // 2 for y in super().labels()]  # merges modules 0 and 1, 2 and 3, ...
    """
    return REFINER.register(name)


def learner(name: str) -> Callable[[T], T]:
    """Register a LightningModule that learns masks, as a value of `--sparsity.learner`.

    A run builds `Class(model, ranks, start, budget, **options)`, fits it on the text of `--corpora.learn`, and calls
    `masks(budget)`. Its `training_step` gets batches with `input_ids` (B, T) int64 and `weight` (B,) float32, which is
    0 for windows that pad a batch. A class with a `validation_step`, such as every `FrozenLMStage`, is validated on
    development text with its current masks applied to the model.

    - model: the frozen language model; a stage must not train it.
    - ranks: `partition.modules.ModuleRanks`, lists with one tensor per block. `ffn` (N,) float64: rank of each neuron
      in its module, in (0, 1). `labels` (N,) int64: module of each neuron. `attention` (G,) float64: rank of each KV
      group in its block.
    - start: initial thresholds. (K,) float64 per block for its K modules, and (1,) per block for its KV groups.
    - budget: `sparsity.budget.Budget`, how much has to be removed.
    - options: keyword-only parameters. A parameter named like a `--sparsity` flag, such as `epochs`, receives that
      flag's value. `shard` receives `--model.shard`. Others are set with `--options.NAME.OPTION`.
    - masks(budget) -> `models.masks.Masks` that meet the budget. It is also called for the sparsities of
      `--evaluation.curve`.
    - thresholds (optional): learned thresholds in the form of `start`.

    Example:

        import gprune
        import torch
        from gprune.stages.threshold_learning import ThresholdLearning

        @gprune.learner("plain_sgd")
        class PlainSgd(ThresholdLearning):
            def configure_optimizers(self):
                return torch.optim.SGD(self.parameters(), lr=1.0)
    """
    return LEARNER.register(name)


def calibrator(name: str) -> Callable[[T], T]:
    """Register a LightningModule that collects statistics, as a value of `--corpora.calibrator`.

    A run builds `Class(model, corpora, gram=, saliency=, walk=, store=, shard=, **options)`, calls `trainer.test` with
    one loader per corpus, and reads `statistics`. `test_step(batch, batch_idx, dataloader_idx)` gets `input_ids` (B, T)
    int64, and per window `half` (0 or 1) and `weight`.

    - model: the frozen language model.
    - corpora: names of the corpora, in the order of the loaders.
    - gram: whether Gram matrices are needed.
    - saliency: scopes (`ffn`, `attention`) whose gradients are needed.
    - walk: whether Gram matrices are collected block by block.
    - store: function that stores the Gram matrices of a block.
    - shard: whether the layers of the model are sharded over processes.
    - options: keyword-only parameters, set with `--options.NAME.OPTION`.
    - statistics: corpus -> `calibration.statistics.CorpusStatistics`.

    Example:

        import gprune
        from gprune.stages.calibration import CalibrationStage

        @gprune.calibrator("every_second")
        class EverySecond(CalibrationStage):
            def test_step(self, batch, batch_idx, dataloader_idx=0):
                if batch_idx % 2 == 0:
                    super().test_step(batch, batch_idx, dataloader_idx)
    """
    return CALIBRATOR.register(name)
