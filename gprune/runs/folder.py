"""The run folder: settings, manifest, and the result of every finished step, so that a run resumes."""

from __future__ import annotations

import re
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from gprune.config import flat
from gprune.errors import UserError
from gprune.evaluation.perplexity import processes
from gprune.runs import schema
from gprune.storage.cache import disk_errors
from gprune.storage.environment import environment, peak_memory
from gprune.storage.files import inspected_json, locked, read_json, read_tensors, replacing, write_json, write_tensors
from gprune.storage.reading import unsafe_entries

SCRATCH = re.compile(r"\..+\.[a-z0-9_]{8}\.tmp")  # as `storage.files` names a folder for what is not whole yet


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """'sparsity.target: 0.5 there, 0.3 here' for every leaf in which two nested dictionaries differ."""
    there, here = flat(old), flat(new)
    names = sorted(name for name in {*there, *here} if there.get(name) != here.get(name))
    return [f"{name}: {there.get(name)} there, {here.get(name)} here" for name in names]


def of_first(seen: Any) -> Any:
    """Broadcast rank 0's value to all processes that compute together.

    Others may not see yet a file that rank 0 has written, and on GPUs the same computation may round differently.
    """
    held = [seen]
    if processes()[1] > 1:
        torch.distributed.broadcast_object_list(held)
    return held[0]


class RunFolder:
    """`runs/<name>/`: settings, manifest, and the result of every finished step.

    Args:
        path: the folder.
        count_tokens: tokens so far, by kind.
        key: of everything that determines the run's results: its files bear it, and others are not taken for its own.
    """

    def __init__(self, path: Path | str, count_tokens: Callable[[], dict[str, int]] = dict, *, key: str | None = None):
        self.path = Path(path)
        self.count_tokens = count_tokens
        self.key = key
        self.finished = False  # True if the run was complete when it was opened; then it is only read
        self._running: list[tuple[str, Callable[[], None]]] = []  # steps, and what notes their cost; the inner one last
        self._counted: Counter[str] = Counter()  # tokens of parts that have ended

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    @contextmanager
    def opened(self, settings: dict[str, Any], config_yaml: str) -> Iterator[None]:
        """Create the folder or take up the run in it, and keep other processes out of it meanwhile.

        Raises:
            UserError: if the folder holds a run with other settings, something that is no run, or links that lead out
                of it; if another process works in it, or it cannot be written.
        """
        if self.path.exists():  # all processes refuse the same, and no lock is left in somebody's folder
            self._inspect(settings)
        with ExitStack() as stack:
            if rank_zero_only.rank == 0:
                self._lock(stack)
                self._take_up(settings, config_yaml)
            self.finished = bool(self.metrics.get("summary"))
            yield

    def _lock(self, stack: ExitStack) -> None:
        with disk_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            try:
                stack.enter_context(locked(self.path.resolve()))
            except TimeoutError as error:
                raise UserError(f"Another process works in {self.path}; wait, or choose another --run.name.") from error

    def _take_up(self, settings: dict[str, Any], config_yaml: str) -> None:
        new = self._inspect(settings)
        for left in self.path.rglob(".*.tmp"):  # by killed sittings; what is named otherwise is somebody's
            if SCRATCH.fullmatch(left.name):
                shutil.rmtree(left, ignore_errors=True)
        # The manifest comes first: it makes the folder a run, which may be killed at any moment.
        if new:
            write_json(self / "manifest.json", {"settings": settings, "environment": environment(), "steps": {}})
        with replacing(self / "config.yaml") as temporary:
            temporary.write_text(config_yaml, encoding="utf-8")

    def _inspect(self, settings: dict[str, Any]) -> bool:
        """Whether no run with these settings has begun here; raises UserError for what may not be written into."""
        is_folder, file = self.path.is_dir(), self / "manifest.json"
        used = is_folder and any(path.name[0] != "." for path in self.path.iterdir())  # looked at before the manifest
        if not is_folder or (used and not file.exists()):
            raise UserError(f"{self.path} exists and is no gprune run; choose another --run.name or --run.dir.")
        for what, path in unsafe_entries(self.path):  # through which a run would write elsewhere
            if path.parent.relative_to(self.path.resolve()).parts[:1] != ("wandb",):  # W&B makes such links itself
                raise UserError(f"{path} is {what}; remove it, or choose another --run.name.")
        manifest, why = inspected_json(file, check=schema.Manifest.problem) if used else (None, None)
        changed = differences(manifest["settings"], settings) if manifest else []
        other = "choose another --run.name, or remove the folder."
        if changed and ((self / "metrics.json").exists() or any(self.path.rglob("*.safetensors"))):
            raise UserError(f"{self.path} holds a run with other settings: {'; '.join(changed[:3])}; {other}")
        if why:
            raise UserError(f"{file} is damaged, or of an older version ({why}); {other}")
        return bool(changed) or not manifest

    @property
    def manifest(self) -> dict[str, Any]:
        """The manifest, or nothing where there is none that is whole and has the shape of one."""
        return read_json(self / "manifest.json", check=schema.Manifest.problem) or {}

    @property
    def metrics(self) -> dict[str, Any]:
        """`metrics.json`, or nothing where there is none that is whole, this run's, and has the shape of one."""
        return read_json(self / "metrics.json", run=self.key, check=schema.Metrics.problem) or {}

    @rank_zero_only
    def update_manifest(self, *, replace: bool = False, **entries: Any) -> None:
        """Merge entries into the manifest, dictionaries one level deep unless they `replace` what is there.

        Raises:
            UserError: if it has gone, or was damaged, while the run went on.
        """
        manifest = self.manifest
        if not manifest:
            raise UserError(f"{self / 'manifest.json'} vanished or was altered while the run went on.")
        for name, value in entries.items():
            merged = isinstance(value, dict) and not replace
            manifest[name] = {**manifest.get(name, {}), **value} if merged else value
        write_json(self / "manifest.json", manifest)

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Note a step's wall seconds, tokens and peak memory, also when it fails.

        Seconds of all sittings add up; tokens are those of the parts of the step that have ended, see `part`. What a
        finished run computes again, to give it back, is no cost of the run's.
        """
        if self.finished:
            yield
            return
        started = time.monotonic()
        earlier = self.manifest.get("steps", {}).get(name, {}).get("seconds", 0)

        def note() -> None:
            parts = [used for part, used in self.manifest.get("parts", {}).items() if part.startswith(f"{name}: ")]
            tokens = {kind: sum(used.get(kind, 0) for used in parts) for kind in self.count_tokens()}
            seconds = {"seconds": round(earlier + time.monotonic() - started, 2)}
            self.update_manifest(steps={name: seconds | tokens | peak_memory()})

        self._running.append((name, note))
        try:
            with self.part("rest"):
                yield
        finally:
            note()
            self._running.pop()

    @contextmanager
    def part(self, *names: str) -> Iterator[None]:
        """Count the tokens of a part of the running step, less those of parts inside it; shared out if it has names.

        A part that was begun by several sittings counts as the one that ended: as often as it would undisturbed, if
        what comes of it is written behind it.
        """
        before = self._loose()
        yield
        if self._running and not self.finished:
            used = {kind: count - before[kind] for kind, count in self._loose().items()}
            self._counted.update(used)
            share = {kind: count // len(names) for kind, count in used.items()}
            step = self._running[-1][0]
            self.update_manifest(parts={f"{step}: {name}": share for name in names})

    def _loose(self) -> dict[str, int]:
        """Tokens so far that are in no part that has ended."""
        return {kind: count - self._counted[kind] for kind, count in self.count_tokens().items()}

    def note(self) -> None:
        """Write into the manifest what the running step has cost so far, for the case that the process is killed."""
        if self._running:
            self._running[-1][1]()

    def total_tokens(self) -> dict[str, int]:
        """Tokens of all steps so far, also of earlier sittings at this run."""
        steps = self.manifest.get("steps", {}).values()
        return {kind: int(sum(step.get(kind, 0) for step in steps)) for kind in self.count_tokens()}

    def tensors(self, name: str, compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """The tensors of a finished step, or those of `compute()`, saved; on all processes those of rank 0.

        All processes have to call it, and all of them compute, since a step may need them together.
        """
        tensors = of_first(self.read(name))
        if tensors is None:
            with self.step(name):
                tensors = of_first(compute())
            self.write(name, tensors)
        return tensors

    def read(self, name: str) -> dict[str, Tensor] | None:
        """The tensors of `<name>.safetensors`, or None if it is missing, not whole, or another run's."""
        return read_tensors(self / f"{name}.safetensors", run=self.key)

    @rank_zero_only
    def write(self, name: str, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
        """Save tensors as this run's; the checkpoint of the stage that learned them, if there is one, goes."""
        marks = {"run": self.key} if self.key else {}
        write_tensors(self / f"{name}.safetensors", tensors, {**(metadata or {}), **marks})
        self.checkpoint(name).unlink(missing_ok=True)

    def checkpoint(self, name: str) -> Path:
        """Where a stage whose tensors will be written under `name` keeps its checkpoint."""
        return self / f"checkpoints/{name}.ckpt"
