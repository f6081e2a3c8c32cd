"""The run folder: settings, manifest, and results of finished steps, from which a run resumes.

The JSON files of runs and studies have required names (`check_manifest` and so on). A checksum detects a file that was
damaged or edited. The names detect a file of an older version or of another program, before a reader misses one of
them.
"""

from __future__ import annotations

import re
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from gprune.config import check_settings, flatten
from gprune.errors import UserError
from gprune.evaluation.perplexity import rank_and_world_size
from gprune.storage.environment import environment, peak_memory, reset_peak_memory
from gprune.storage.files import inspect_json, locked, read_json, read_tensors, replacing, write_json, write_tensors
from gprune.storage.paths import disk_errors
from gprune.user_code import Code

SCRATCH_NAME = re.compile(r"\..+\.[a-z0-9_]{8}\.tmp")  # names of scratch folders of `storage.files`
MEASURED = ("perplexity", "nll", "tokens", "window_nll")
RECORD = (
    *MEASURED, "stage", "recovery", "corpus", "seen", "seq_len", "stride", "bos", "model", "scope", "sparsity",
    "importance", "split", "dtype", "seed", "content_hash",
)  # fmt: skip
SUMMARY = ("sparsity_of_model", "parameters_before", "parameters_after", "forward_tokens", "forward_backward_tokens")
STUDY = ("name", "settings", "inputs", "steps", "summary", "records", "masks")
BENCHMARK = ("task", "stage", "split", "dtype", "note", "standard_protocol", "content_hash")
BENCHMARKS = {  # kind of a record of `gprune evaluate` -> its names besides `BENCHMARK`
    "zero_shot": ("questions", "acc", "acc_stderr", "acc_norm", "acc_norm_stderr"),
    "perplexity": (*MEASURED, "low", "high", "seq_len"),
    "speed": ("batch", "tokens_per_second", "seconds", "rounds"),
}


def require_names(what: str, content: dict[str, Any], names: Iterable[str]) -> None:
    """Raise ValueError unless `content`, a JSON object called `what`, has all names."""
    if missing := [name for name in names if name not in content]:
        raise ValueError(f"{what} without {missing[0]}")


def check_manifest(content: dict[str, Any]) -> None:
    """Raise ValueError unless the content of `manifest.json` has its names, and settings of this version."""
    require_names("a manifest", content, ("settings", "steps"))
    check_settings(content["settings"])


def check_metrics(content: dict[str, Any]) -> None:
    """Raise ValueError unless the content of `metrics.json` has its names; the summary is written last."""
    require_names("metrics", content, ("records",))
    for record in content["records"]:
        require_names("a record", record, RECORD)
    if content.get("summary") is not None:
        require_names("a summary", content["summary"], SUMMARY)


def check_evaluation(content: dict[str, Any]) -> None:
    """Raise ValueError unless the content of `evaluation.json` has its names."""
    require_names("an evaluation", content, ("records",))
    for record in content["records"]:
        require_names("a record", record, ("kind",))
        require_names(f"a record of kind {record['kind']}", record, (*BENCHMARK, *BENCHMARKS.get(record["kind"], ())))


def check_study(content: dict[str, Any]) -> None:
    """Raise ValueError unless the record of a row of a study has its names."""
    require_names("a study record", content, STUDY)
    check_metrics(content)
    check_evaluation({"records": content.get("evaluation", [])})


def changed_settings(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """List the differences of two runs' settings, as 'sparsity.target: 0.5 there, 0.3 here'.

    Changed code of the user comes first. Code that only one of the two uses is left out if settings differ.
    """
    old, new = dict(old), dict(new)
    old_code, new_code = old.pop("code", {}), new.pop("code", {})
    old_leaves, new_leaves = flatten(old), flatten(new)
    changed = sorted(name for name in {*old_leaves, *new_leaves} if old_leaves.get(name) != new_leaves.get(name))
    of_settings = [f"{name}: {old_leaves.get(name)} there, {new_leaves.get(name)} here" for name in changed]
    if of_settings:
        shared = old_code.keys() & new_code.keys()
        old_code, new_code = ({module: code[module] for module in shared} for code in (old_code, new_code))
    return [*changed_code(old_code, new_code), *of_settings]


def changed_code(old: Code, new: Code) -> list[str]:
    """List the modules of the user in which two runs differ, as 'the code of my_metric has changed'."""
    differences = []
    for module in sorted({*old, *new}):
        if old.get(module) == new.get(module):
            continue
        reason = "has changed"
        if old.get(module) is None:
            reason = "was not recorded"
        elif new.get(module) is None:
            reason = "cannot be read" if module in new else "is not used"
        differences.append(f"the code of {module} {reason}")
    return differences


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
    record: Callable[[], None]  # writes the cost of the step so far to the manifest
    inner_seconds: float = 0.0  # of inner steps with other names


class RunFolder:
    """The folder of a run, `runs/<name>/`, with settings, manifest, and the result of every finished step."""

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
            self._inspect(settings)
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
        """Remove scratch files, and write the manifest of a new run and `config.yaml`."""
        is_new = self._inspect(settings)
        for scratch in self.path.rglob(".*.tmp"):  # of killed processes; files with other names are the user's
            if SCRATCH_NAME.fullmatch(scratch.name):
                shutil.rmtree(scratch, ignore_errors=True)
        # The manifest is written first. It marks the folder as a run, which may be killed at any moment.
        if is_new:
            write_json(self / "manifest.json", {"settings": settings, "environment": environment(), "steps": {}})
        with replacing(self / "config.yaml") as temporary:
            temporary.write_text(config_yaml, encoding="utf-8")

    def _inspect(self, settings: dict[str, Any]) -> bool:
        """Return whether a new run begins, because the folder has no run with these settings.

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
            return True
        manifest, problem = inspect_json(manifest_file, check=check_manifest)
        changed = changed_settings(manifest["settings"], settings) if manifest else []
        if changed and ((self / "metrics.json").exists() or any(self.path.rglob("*.safetensors"))):
            what = "code" if changed[0].startswith("the code of ") else "settings"
            raise UserError(f"{prefix}: it has a run with other {what}: {'; '.join(changed[:3])}. {remedy}.")
        if problem:
            raise UserError(f"{prefix}: manifest.json is damaged, or of an older version ({problem}). {remedy}.")
        return bool(changed) or not manifest

    @property
    def manifest(self) -> dict[str, Any]:
        """Content of `manifest.json`; empty if the file is missing or invalid."""
        return read_json(self / "manifest.json", check=check_manifest) or {}

    @property
    def metrics(self) -> dict[str, Any]:
        """Content of `metrics.json`; empty if the file is missing, invalid, or of another run."""
        return read_json(self / "metrics.json", run=self.key, check=check_metrics) or {}

    @rank_zero_only
    def update_manifest(self, *, replace: bool = False, **entries: Any) -> None:
        """Merge entries into the manifest. Dictionaries are merged one level deep, or replaced with `replace`."""
        manifest = self.manifest
        if not manifest:
            reason = "the file was removed or altered during the run"
            raise UserError(f"Cannot update {self / 'manifest.json'}: {reason}.")
        for name, value in entries.items():
            merges = isinstance(value, dict) and not replace
            manifest[name] = {**manifest.get(name, {}), **value} if merges else value
        write_json(self / "manifest.json", manifest)

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Context that records a step's wall-clock seconds, tokens and peak memory, even if the step fails.

        Seconds are summed over sessions, without those of inner steps with other names. Tokens are those of the
        finished parts of the step, see `part`. For a finished run nothing is recorded.
        """
        if self.finished:
            yield
            return
        started = time.monotonic()
        earlier_seconds = self.manifest.get("steps", {}).get(name, {}).get("seconds", 0)

        def record() -> None:
            """Write the cost of the step so far to the manifest."""
            parts = [counts for part, counts in self.manifest.get("parts", {}).items() if part.startswith(f"{name}: ")]
            tokens = {kind: sum(counts.get(kind, 0) for counts in parts) for kind in self.count_tokens()}
            seconds = round(earlier_seconds + time.monotonic() - started - step.inner_seconds, 2)
            self.update_manifest(steps={name: {"seconds": seconds} | tokens | peak_memory()})

        step = _RunningStep(name, record)
        if not self._running:  # peaks of an outer step include those of its inner steps
            reset_peak_memory()
        self._running.append(step)
        try:
            with self.part("rest"):
                yield
        finally:
            record()
            self._running.pop()
            if self._running and self._running[-1].name != name:
                self._running[-1].inner_seconds += time.monotonic() - started

    @contextmanager
    def part(self, *names: str, shared: bool = False) -> Iterator[None]:
        """Context that counts the tokens of a part of the running step, without those of inner parts.

        A part that was interrupted and repeated in a later session is counted once, because only finished parts are
        recorded.
        """
        before = self._uncounted()
        yield
        tokens = {kind: count - before[kind] for kind, count in self._uncounted().items()}
        of_all_ranks = sum_over_ranks(tokens) if shared else tokens
        if self._running and not self.finished:
            self._counted.update(tokens)
            share = {kind: count // len(names) for kind, count in of_all_ranks.items()}
            step = self._running[-1].name
            self.update_manifest(parts={f"{step}: {name}": share for name in names})

    def _uncounted(self) -> dict[str, int]:
        """Tokens so far that are not in a finished part."""
        return {kind: count - self._counted[kind] for kind, count in self.count_tokens().items()}

    def record_cost(self) -> None:
        """Record the cost of the running step so far in the manifest, in case the process is killed."""
        if self._running:
            self._running[-1].record()

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
        """Read `<name>.safetensors`; None if the file is missing, damaged, or of another run."""
        return read_tensors(self / f"{name}.safetensors", run=self.key)

    @rank_zero_only
    def write(self, name: str, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
        """Save tensors with the run's key, and remove the checkpoint of the stage that learned them."""
        key = {"run": self.key} if self.key else {}
        write_tensors(self / f"{name}.safetensors", tensors, {**(metadata or {}), **key})
        self.checkpoint(name).unlink(missing_ok=True)

    def checkpoint(self, name: str) -> Path:
        """Path of the checkpoint of the stage whose tensors will be saved as `name`."""
        return self / f"checkpoints/{name}.ckpt"
