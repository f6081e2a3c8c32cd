"""The run folder: settings, manifest, and results of finished steps, from which a run resumes."""

from __future__ import annotations

import re
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from gprune.config import flatten
from gprune.errors import UserError
from gprune.evaluation.perplexity import rank_and_world_size
from gprune.storage.environment import environment, peak_memory, reset_peak_memory
from gprune.storage.files import (
    FORMAT_VERSION,
    inspect_json,
    locked,
    read_json,
    read_tensors,
    write_json,
    write_tensors,
    write_text,
)
from gprune.storage.paths import disk_errors
from gprune.user_code import changed_code

SCRATCH_NAME = re.compile(r"\..+\.[a-z0-9_]{8}\.tmp")  # names of temporary files and scratch folders of `storage.files`


def differing_values(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return the names whose values differ, with both values; "not set" stands for that of a missing name."""
    values = {name: (old.get(name, "not set"), new.get(name, "not set")) for name in sorted({*old, *new})}
    return {name: (there, here) for name, (there, here) in values.items() if there != here}


def changed_settings(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """List the differences of two runs' settings, as 'sparsity.target: 0.5 there, 0.3 here'.

    Changed code of the user comes first. Code that only one of the two uses is left out if settings differ.
    """
    old, new = dict(old), dict(new)
    old_code, new_code = old.pop("code", {}), new.pop("code", {})
    changed = differing_values(flatten(old), flatten(new))
    of_settings = [f"{name}: {there} there, {here} here" for name, (there, here) in changed.items()]
    if of_settings:
        shared = old_code.keys() & new_code.keys()
        old_code, new_code = ({module: code[module] for module in shared} for code in (old_code, new_code))
    return [*changed_code(old_code, new_code), *of_settings]


def broadcast(value: Any) -> Any:
    """Broadcast rank 0's value to all ranks.

    Other ranks may not yet see a file that rank 0 has written, and on GPUs they may round the same computation
    differently.
    """
    values = [value]
    if rank_and_world_size()[1] > 1:
        torch.distributed.broadcast_object_list(values)
    return values[0]


def sum_over_ranks(counts: dict[str, int]) -> dict[str, int]:
    """Return the sums of counts over all ranks. All ranks have to call this function."""
    if rank_and_world_size()[1] == 1:
        return counts
    by_rank: list[Any] = [None] * rank_and_world_size()[1]
    torch.distributed.all_gather_object(by_rank, counts)
    return {kind: sum(of_rank[kind] for of_rank in by_rank) for kind in counts}


@dataclass
class _RunningStep:
    """A step of a run that is not finished."""

    name: str
    started: float  # time of the monotonic clock
    earlier_seconds: float  # of earlier sessions
    inner_seconds: float = 0.0  # of inner steps with other names


class RunFolder:
    """The folder of a run, `runs/<name>/`, with settings, manifest, and the result of every finished step.

    `count_tokens` returns the tokens so far by kind. `key` is the hash of the run's settings, which its files contain.
    """

    def __init__(self, path: Path | str, count_tokens: Callable[[], dict[str, int]] = dict, *, key: str | None = None):
        self.path = Path(path)
        self.count_tokens = count_tokens
        self.key = key
        self.finished = False  # True if the run was complete when it was opened; then it is only read
        self._running: list[_RunningStep] = []  # innermost last
        self._counted: Counter[str] = Counter()  # tokens of finished parts

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    @contextmanager
    def in_use(self, settings: dict[str, Any], config_yaml: str) -> Iterator[None]:
        """Create the folder or resume the run in it, and lock it against other processes."""
        if self.path.exists():
            # Inspected before locking, so that all ranks raise the same error, and a foreign folder gets no lock file.
            self.manifest = self._inspect(settings)
        with ExitStack() as stack:
            if rank_zero_only.rank == 0:
                self._lock(stack)
                self._create_or_resume(settings, config_yaml)
            self.finished = bool(self.metrics.get("summary"))
            yield

    def _lock(self, stack: ExitStack) -> None:
        """Create the folder, and lock it until the stack is closed. Raise UserError if another process uses it."""
        with disk_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            try:
                stack.enter_context(locked(self.path.resolve()))
            except TimeoutError as error:
                reason = "another process uses the folder. Wait, or choose another --run.name"
                raise UserError(f"Cannot run in {self.path}: {reason}.") from error

    def _create_or_resume(self, settings: dict[str, Any], config_yaml: str) -> None:
        """Remove temporary files, and write the manifest of a new run and `config.yaml`."""
        self.manifest = self._inspect(settings)
        for temporary in self.path.rglob(".*.tmp"):  # of killed processes; files with other names are the user's
            if not SCRATCH_NAME.fullmatch(temporary.name):
                continue
            if temporary.is_dir():
                shutil.rmtree(temporary, ignore_errors=True)
            else:
                temporary.unlink(missing_ok=True)
        # The manifest is written first. It marks the folder as a run, which may be killed at any moment.
        if not self.manifest:
            self.manifest = {"format": FORMAT_VERSION, "settings": settings, "environment": environment(), "steps": {}}
            write_json(self / "manifest.json", self.manifest)
        write_text(self / "config.yaml", config_yaml)

    def _inspect(self, settings: dict[str, Any]) -> dict[str, Any]:
        """Return the manifest of the run that is resumed; empty if the folder has no run with these settings.

        A run with other settings may be replaced if it has no results yet.
        """
        prefix = f"Cannot run in {self.path}"
        remedy = "Choose another --run.name, or remove the folder"
        manifest_file = self / "manifest.json"
        is_folder = self.path.is_dir()
        has_files = is_folder and any(path.name[0] != "." for path in self.path.iterdir())
        if not is_folder or (has_files and not manifest_file.exists()):
            raise UserError(f"{prefix}: it exists and is not a gprune run. Choose another --run.name or --run.dir.")
        if not has_files:
            return {}
        manifest, problem = inspect_json(manifest_file)
        changed = changed_settings(manifest["settings"], settings) if manifest else []
        if changed and ((self / "metrics.json").exists() or any(self.path.rglob("*.safetensors"))):
            what = "code" if changed[0].startswith("the code of ") else "settings"
            raise UserError(f"{prefix}: it has a run with other {what}: {'; '.join(changed[:3])}. {remedy}.")
        if manifest and manifest.get("format") != FORMAT_VERSION:
            problem = "it is of another version"
        if problem:
            raise UserError(f"{prefix}: manifest.json cannot be read ({problem}). {remedy}.")
        return {} if changed else manifest

    @cached_property
    def manifest(self) -> dict[str, Any]:
        """Content of `manifest.json`, read once; empty if the file is missing."""
        return read_json(self / "manifest.json") or {}

    @property
    def metrics(self) -> dict[str, Any]:
        """Content of `metrics.json`; empty if the file is missing."""
        return read_json(self / "metrics.json") or {}

    def update_manifest(self, *, replace: bool = False, **entries: Any) -> None:
        """Add entries and the cost of the running step to the manifest, in memory on all ranks and by rank 0 on disk.

        Dictionaries are merged one level deep, or replaced with `replace`.
        """
        for name, value in entries.items():
            merges = isinstance(value, dict) and not replace
            self.manifest[name] = {**self.manifest.get(name, {}), **value} if merges else value
        if self._running:
            step = self._running[-1]
            self.manifest.setdefault("steps", {})[step.name] = self._cost(step)
        if rank_zero_only.rank == 0:
            if not (self / "manifest.json").exists():
                raise UserError(f"Cannot update {self / 'manifest.json'}: the file was removed during the run.")
            write_json(self / "manifest.json", self.manifest)

    def _cost(self, step: _RunningStep) -> dict[str, float]:
        """Seconds, tokens and peak memory of a step so far."""
        parts = [counts for part, counts in self.manifest.get("parts", {}).items() if part.startswith(f"{step.name}: ")]
        tokens = {kind: sum(counts.get(kind, 0) for counts in parts) for kind in self.count_tokens()}
        seconds = step.earlier_seconds + time.monotonic() - step.started - step.inner_seconds
        return {"seconds": round(seconds, 2)} | tokens | peak_memory()

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Context that records a step's wall-clock seconds, tokens and peak memory, even if the step fails.

        They are written with every update of the manifest, in case the process is killed. Seconds are summed over
        sessions, without those of inner steps with other names. Tokens are those of the finished parts of the step,
        see `part`. For a finished run nothing is recorded.
        """
        if self.finished:
            yield
            return
        step = _RunningStep(name, time.monotonic(), self.manifest.get("steps", {}).get(name, {}).get("seconds", 0))
        if not self._running:  # peaks of an outer step include those of its inner steps
            reset_peak_memory()
        self._running.append(step)
        try:
            with self.part("rest"):
                yield
        except BaseException:
            self.update_manifest()
            raise
        finally:
            self._running.pop()
            if self._running and self._running[-1].name != name:
                self._running[-1].inner_seconds += time.monotonic() - step.started

    @contextmanager
    def part(self, *names: str, shared: bool = False) -> Iterator[None]:
        """Context that counts the tokens of a part of the running step, without those of inner parts.

        Several names share the tokens evenly. With `shared` the ranks share the work, so their tokens are added. A part
        that was interrupted and repeated in a later session is counted once, because only finished parts are recorded.
        """
        before = self._uncounted()
        yield
        tokens = {kind: count - before[kind] for kind, count in self._uncounted().items()}
        of_all_ranks = sum_over_ranks(tokens) if shared else tokens
        if self._running:
            self._counted.update(tokens)
            share = {kind: count // len(names) for kind, count in of_all_ranks.items()}
            step = self._running[-1].name
            self.update_manifest(parts={f"{step}: {name}": share for name in names})

    def _uncounted(self) -> dict[str, int]:
        """Tokens so far that are not in a finished part."""
        return {kind: count - self._counted[kind] for kind, count in self.count_tokens().items()}

    def total_tokens(self) -> dict[str, int]:
        """Tokens of all steps so far, including earlier sessions."""
        steps = self.manifest.get("steps", {}).values()
        return {kind: int(sum(step.get(kind, 0) for step in steps)) for kind in self.count_tokens()}

    def tensors(self, name: str, compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """Return the tensors of a finished step, or call `compute()` and save its tensors.

        All ranks get the tensors of rank 0. All ranks have to call this method, and all of them compute, because a step
        may need them together.
        """
        tensors = broadcast(self.read(name))
        if tensors is None:
            with self.step(name):
                tensors = broadcast(compute())
            self.write(name, tensors)
        return tensors

    def read(self, name: str) -> dict[str, Tensor] | None:
        """Read `<name>.safetensors`; None if the file is missing."""
        return read_tensors(self / f"{name}.safetensors")

    @rank_zero_only
    def write(self, name: str, tensors: dict[str, Tensor]) -> None:
        """Save tensors, and remove the checkpoint of the stage that learned them."""
        write_tensors(self / f"{name}.safetensors", tensors)
        self.checkpoint(name).unlink(missing_ok=True)

    def checkpoint(self, name: str) -> Path:
        """Path of the checkpoint of the stage whose tensors will be saved as `name`."""
        return self / f"checkpoints/{name}.ckpt"
