"""One small registry, used for metrics, corpora, recoveries and stages; and what every entry of one is held to.

IMPORTANCE = Registry("importance metric")

@IMPORTANCE.register("my_metric")
def my_metric(...): ...

IMPORTANCE["my_metric"]     # an unknown name lists what there is
with IMPORTANCE.running("my_metric", weight):
    scores = IMPORTANCE.checked("my_metric", "scores", my_metric(weight), (48,))
"""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from gprune.errors import UnregisteredError, UserError, nearest

if TYPE_CHECKING:  # flags are checked by what is registered, which should not wait for PyTorch
    from torch import Tensor

T = TypeVar("T")
FLOATS, WHOLE = ("float64", "float32", "float16", "bfloat16"), ("int64", "int32", "int16", "int8", "uint8")
DTYPES = {"numbers": FLOATS + WHOLE, "floats": FLOATS, "whole numbers": WHOLE, "bool": ("bool",)}
NAME = re.compile(r"\w[\w.-]{0,99}")


class Registry(Generic[T]):
    """Names to values. `kind` is the word used in messages, such as "corpus"; entries have the method `asked`."""

    def __init__(self, kind: str, asked: str | None = None):
        self.kind, self.asked = kind, asked
        self._entries: dict[str, T | str] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator that files the decorated object under `name`; or its place, "module:name", until it is asked for.

        Raises:
            ValueError: if the name is taken (by another object; re-running a notebook cell is no error).
            UserError: for a name that could lead out of a folder, or that chains and lists would cut in two.
        """
        if not (isinstance(name, str) and NAME.fullmatch(name)):
            raise UserError(f"A name of {self.kind}: expected letters, digits, _, - and dots, got {name!r:.100}.")

        def decorate(entry: T) -> T:
            if self.asked and not isinstance(entry, str) and not callable(getattr(entry, self.asked, None)):
                raise UserError(f"{self.kind} '{name}': expected a class with the method {self.asked}, got {entry!r}.")
            taken = self._entries.setdefault(name, entry)
            if _origin(taken) != _origin(entry):
                raise ValueError(f"{self.kind} '{name}' is registered already, as {taken!r}; choose another name.")
            self._entries[name] = entry
            return entry

        return decorate

    def check(self, name: str) -> None:
        """Raise UserError for a name that is not there, without importing what is."""
        if name not in self._entries:
            hint = f" Did you mean '{near}'?" if (near := nearest(name, self._entries)) else ""
            raise UnregisteredError(f"Unknown {self.kind} '{name}'.{hint} Available: {', '.join(self)}.")

    def __getitem__(self, name: str) -> T:
        self.check(name)
        entry = self._entries[name]
        if isinstance(entry, str):
            module, _, origin = entry.partition(":")
            entry = self._entries[name] = getattr(importlib.import_module(module), origin)
        return entry

    @contextmanager
    def running(self, name: str, *inputs: Tensor) -> Iterator[None]:
        """Around a call of the entry `name`: working folder and default dtype are as before when it returns.

        Raises:
            UserError: if it has changed one of the inputs, which it shares with others, in place.
        """
        import torch

        folder, dtype, versions = os.getcwd(), torch.get_default_dtype(), [t._version for t in inputs]
        try:
            yield
        finally:
            os.chdir(folder)
            torch.set_default_dtype(dtype)
        if versions != [t._version for t in inputs]:
            raise UserError(f"{self.kind.capitalize()} '{name}' changes inputs in place; expected abs() for abs_().")

    def checked(self, name: str, what: str, value: Any, *shapes: tuple[int, ...], of: str = "finite numbers") -> Tensor:
        """What the entry `name` returned, detached, where it is a dense tensor of one of the shapes.

        Args:
            what: the word for it, such as "scores".
            of: what the tensor holds, of `DTYPES`; `finite` before it is looked at, and waits for a device.

        Raises:
            UserError: for anything else; it names the entry, what was expected and what came.
        """
        import torch

        got = type(value).__name__
        if isinstance(value, torch.Tensor):
            dtype, layout = (str(part).removeprefix("torch.") for part in (value.dtype, value.layout))
            got = f"{tuple(value.shape)} of {dtype}, {'without values (meta)' if value.is_meta else layout}"
            known = dtype in DTYPES[of.removeprefix("finite ")]
            if value.shape in shapes and known and layout == "strided" and not value.is_meta:
                bad = int((~value.isfinite()).sum()) if "finite" in of else 0
                if not bad:
                    return value.detach()
                got = f"{bad} of {value.numel()} that are not finite"
        shape = " or ".join(map(str, shapes))
        raise UserError(f"{self.kind.capitalize()} '{name}': expected {what} {shape}, dense, of {of}; got {got}.")

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)


def _origin(entry: object) -> tuple[str, str]:
    return getattr(entry, "__module__", ""), getattr(entry, "__qualname__", repr(entry))


# Stages, and the method of each that the pipeline asks for.
REFINER: Registry[Any] = Registry("refiner", "labels")  # --partition.refiner
LEARNER: Registry[Any] = Registry("learner", "masks")  # --sparsity.learner
CALIBRATOR: Registry[Any] = Registry("calibrator", "test_step")  # --corpora.calibrator


def refiner(name: str) -> Callable[[T], T]:
    """Register a LightningModule that refines modules of neurons, as the value `name` of `--partition.refiner`.

    The run makes `Class(inputs, labels, **options)`, fits it on its own `train_dataloader`, and calls `labels()`.

    - inputs: `partition.objective.RefinementInputs` of B blocks, padded to N neurons: embedding (B, N, E), drift
      (B, N, 1), shifts (B, N, D) and valid (B, N), all float32.
    - labels: of the first partition, (N,) int64 of each block, modules 0 to K - 1.
    - options: keyword-only parameters. One that is named like a flag of `--partition`, such as `learning_rate`, gets
      the value of that flag; `--options.NAME.OPTION` sets the others.
    - labels() -> list of (N,) int64, one per block: modules from 0 to K - 1, each with a neuron at least.

    Example:

        import gprune
        from gprune.stages.refinement import AssignmentRefinement

        @gprune.refiner("merged")
        class Merged(AssignmentRefinement):
            def labels(self):
                return [y // 2 for y in super().labels()]  # modules 0 and 1 become one, then 2 and 3, ...
    """
    return REFINER.register(name)


def learner(name: str) -> Callable[[T], T]:
    """Register a LightningModule that learns what to keep, as the value `name` of `--sparsity.learner`.

    The run makes `Class(model, ranks, start, budget, **options)`, fits it on the text of `--corpora.learn`, and calls
    `masks(budget)`. Its `training_step` gets batches with `input_ids` (B, T) int64 and `weight` (B,) float32, which is
    0 for a window that only fills a batch. A class with a `validation_step`, such as every `FrozenLMStage`, is
    validated on development text, with its masks on the model.

    - model: the frozen language model; a stage must not train it.
    - ranks: `partition.modules.ModuleRanks`: ffn, p (N,) float64 in (0, 1) of each block; labels, (N,) int64;
      attention, p (G,) of KV groups.
    - start: thresholds to begin with, (K,) float64 of each block's modules, and (1,) of its KV groups.
    - budget: `sparsity.budget.Budget`, what has to go.
    - options: keyword-only parameters. One that is named like a flag of `--sparsity`, such as `epochs`, gets the value
      of that flag, and `shard` that of `--model.shard`; `--options.NAME.OPTION` sets the others.
    - masks(budget) -> `models.masks.Masks` that meet this budget; also called for the sparsities of
      `--evaluation.curve`. Optional: the attribute `thresholds`, as `start`.

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
    """Register a LightningModule that collects statistics, as the value `name` of `--corpora.calibrator`.

    The run makes `Class(model, corpora, gram=, saliency=, walk=, store=, shard=, **options)`, tests it
    (`trainer.test`) with a loader for each corpus, and reads `statistics`. Its `test_step(batch, batch_idx,
    dataloader_idx)` gets `input_ids` (B, T) int64, and of each window `half` (0 or 1) and `weight`.

    - model: the frozen language model; corpora: their names, in the order of the loaders.
    - gram: whether Gram matrices are needed; saliency: scopes (`ffn`, `attention`) whose gradients are needed.
    - walk, store: whether Gram matrices are collected block by block, and the function that keeps a block's.
    - shard: whether the model's layers are to be shared by processes.
    - options: keyword-only parameters, which `--options.NAME.OPTION` sets.
    - statistics: dict of `calibration.statistics.CorpusStatistics` by corpus.

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
