"""The run folder and the statistics cache: safetensors and JSON, written whole or not at all, checked when read.

Of several processes only the first writes; all of them read. Nothing is ever unpickled.
Every file is written in a scratch folder beside its place and renamed. It carries the hash of its content, its name
and, where it belongs to one run, that run's key, so that a truncated, altered or foreign file is noticed and computed
again, never silently used. Files without these marks (by hand, or by an earlier version) are taken as they are.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import platform
import resource
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from glob import escape as glob_escape
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import safetensors
import torch
import yaml
from lightning.pytorch.utilities import rank_zero_only
from safetensors.torch import save_file
from torch import Tensor

from gprune.errors import UserError, first_line
from gprune.loading import as_bytes

log = logging.getLogger("gprune")
FORMAT_VERSION = 4  # part of every cache key: raise it when what is stored changes meaning


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a file to write, in a scratch folder beside `path`; on success rename it to `path`, on failure remove it.

    Raises:
        UserError: when the folder cannot be written or the disk is full.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _scratch(path) as folder:
            yield folder / path.name
            os.replace(folder / path.name, path)
    except (OSError, safetensors.SafetensorError) as error:
        raise _cannot_write(path, error) from error


def _cannot_write(path: Path, error: Exception) -> UserError:
    reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
    return UserError(
        f"Cannot write {path}: {reason}. Free space or choose another place (a run's results: --run.dir; caches: "
        f"$GPRUNE_CACHE); what was finished is kept."
    )


@contextmanager
def _scratch(path: Path) -> Iterator[Path]:
    """A folder for what will become `path`; those that killed processes left there are removed.

    A folder, because libraries put temporary files of their own beside the one they write. Its random name cannot be
    guessed by whoever hands us a run folder with links in it. Its lock ends with the process, however that ends, so
    one that can be locked belongs to nobody.
    """
    for left in path.parent.glob(f".{glob_escape(path.name)}.*.tmp"):
        with suppress(OSError), locked(left):
            shutil.rmtree(left, ignore_errors=True)
    mine = False
    with ExitStack() as stack:
        while not mine:
            folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
            stack.callback(shutil.rmtree, folder, ignore_errors=True)
            # Somebody may have taken it for abandoned in the moment before it was locked.
            with suppress(BlockingIOError, FileNotFoundError):
                stack.enter_context(locked(folder))
                mine = folder.exists()
        yield folder


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a lock on a folder, or go without one where the file system has none.

    Raises:
        BlockingIOError: if another process holds it.
        OSError: if there is no such folder.
    """
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise
        except OSError:
            log.debug("%s: the file system has no locks", folder)
        yield
    finally:
        os.close(handle)


@rank_zero_only
def write_json(path: Path, content: Any, *, run: str | None = None) -> None:
    """Write JSON, an object with its checksum as the last entry; `run` is the key of the run it belongs to, if any."""
    text = json.dumps(content, indent=1, allow_nan=False)
    if isinstance(content, dict):
        plain = json.loads(text) | ({"run": run} if run else {})
        text = json.dumps(plain | {"checksum": json_hash(plain, path.name)}, indent=1)
    with replacing(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def read_json(path: Path, *, run: str | None = None) -> Any:
    """The content, or None (with one warning unless it is missing) if it is not whole, altered or foreign."""
    try:
        content, reason = json.loads(path.read_text(encoding="utf-8")), None
        if isinstance(content, dict) and "checksum" in content:
            if content.pop("checksum") != json_hash(content, path.name):
                reason = "its content does not match its checksum"
            elif content.pop("run", run) != run and run is not None:
                reason = "it belongs to another run"
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        reason = str(error).splitlines()[0]
    return content if reason is None else _unusable(path, reason)


def json_hash(content: dict[str, Any], name: str) -> str:
    """SHA-256 (16 hex digits) over a file's name and plain content, however it is laid out."""
    return hashlib.sha256(f"{name} {json.dumps(content, sort_keys=True)}".encode()).hexdigest()[:16]


def _unusable(path: Path, reason: str) -> None:
    log.warning("%s is not usable (%s); going on without it.", path, reason)


def content_hash(tensors: dict[str, Tensor]) -> str:
    """SHA-256 over names, shapes, dtypes and bytes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype};".encode())
        digest.update(as_bytes(tensor))
    return digest.hexdigest()


@rank_zero_only
def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Save tensors with their content hash and the file's name in its metadata."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    marks = {**(metadata or {}), "content_hash": content_hash(tensors), "file": path.name}
    with replacing(path) as temporary:
        # As one entry: safetensors writes several in another order each time, and equal files should be equal bytes.
        save_file(tensors, temporary, metadata={"marks": json.dumps(marks, sort_keys=True)})


def read_tensors(path: Path, *, run: str | None = None) -> dict[str, Tensor] | None:
    """The tensors, or None (with one warning unless it is missing) if the file is truncated, altered or foreign."""
    if not path.is_file():
        return None
    try:
        with safetensors.safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            marks = json.loads(metadata["marks"]) if "marks" in metadata else metadata
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        reason = None
        if marks.get("content_hash") != content_hash(tensors):
            reason = "its content does not match its hash"
        elif marks.get("file", path.name) != path.name:
            reason = f"it was written as {marks['file']}"
        elif run is not None and marks.get("run", run) != run:
            reason = "it belongs to another run"
    except Exception as error:  # safetensors and torch each raise their own, down to KeyError for an unknown dtype
        reason = first_line(error)
    return tensors if reason is None else _unusable(path, reason)


def _holds(path: Path, text: str) -> bool:
    """Whether a text file has exactly this content."""
    with suppress(OSError, UnicodeDecodeError):
        return path.read_text(encoding="utf-8") == text
    return False


def key_of(**what: Any) -> str:
    """A 16-digit key of plain values that determine a result."""
    text = json.dumps({"format": FORMAT_VERSION, **what}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def differences(old: Any, new: Any, prefix: str = "") -> list[str]:
    """'sparsity.target: 0.5 there, 0.3 here' for every leaf in which two nested dictionaries differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        return [
            line
            for name in sorted({*old, *new})
            for line in differences(old.get(name), new.get(name), f"{prefix}.{name}" if prefix else name)
        ]
    return [] if old == new else [f"{prefix}: {old} there, {new} here"]


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

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    @contextmanager
    def opened(self, settings: dict[str, Any], config_yaml: str) -> Iterator[None]:
        """Create the folder or take up the run in it, and keep other processes out of it meanwhile.

        Raises:
            UserError: if the folder holds a run with other settings, something that is no run, or links that lead out
                of it; if another process works in it, or it cannot be written.
        """
        if rank_zero_only.rank != 0:
            yield
            return
        if self.path.exists() and not self.path.is_dir():
            raise self._no_run()
        with ExitStack() as stack:
            try:
                self.path.mkdir(parents=True, exist_ok=True)
                stack.enter_context(locked(self.path.resolve()))
            except BlockingIOError as error:
                raise UserError(
                    f"Another process is working in {self.path}; wait for it, or choose another --run.name."
                ) from error
            except OSError as error:
                raise _cannot_write(self.path, error) from error
            self._take_up(settings, config_yaml)
            yield

    def _no_run(self) -> UserError:
        return UserError(f"{self.path} exists and is no gprune run; choose another --run.name or --run.dir.")

    def _take_up(self, settings: dict[str, Any], config_yaml: str) -> None:
        self._refuse_links()
        for left in [*self.path.rglob(".*.tmp"), *self.path.glob(".model.*")]:  # by killed sittings: the folder is ours
            shutil.rmtree(left, ignore_errors=True)
        manifest = self.manifest
        changed = differences(manifest.get("settings"), settings) if manifest else []
        if changed and self.has_results():
            more = f" (and {len(changed) - 3} more)" if len(changed) > 3 else ""
            raise UserError(
                f"{self.path} holds a run with other settings: {'; '.join(changed[:3])}{more}. "
                f"Choose another --run.name, or remove the folder."
            )
        if not manifest and (self / "manifest.json").exists():
            raise UserError(
                f"{self / 'manifest.json'} is damaged, so nobody knows which run this is; "
                f"choose another --run.name, or remove the folder."
            )
        if not manifest and any(p.name[0] != "." for p in self.path.iterdir()):
            raise self._no_run()
        # The manifest comes first: it makes the folder a run, which may be killed at any moment.
        if changed or not manifest:
            write_json(self / "manifest.json", {"settings": settings, "environment": environment(), "steps": {}})
        if not _holds(self / "config.yaml", config_yaml):
            with replacing(self / "config.yaml") as temporary:
                temporary.write_text(config_yaml, encoding="utf-8")

    def _refuse_links(self) -> None:
        """A folder from elsewhere may hold links through which a run would write outside of it.

        Inside `wandb/` W&B makes such links itself, and writes into folders that are new each time.
        """
        root = os.path.realpath(self.path)
        for folder, names, files in os.walk(root):
            if os.path.dirname(folder) == root and os.path.basename(folder) == "wandb":
                names.clear()
                continue
            for path in (os.path.join(folder, name) for name in (*names, *files)):
                if os.path.islink(path) and not os.path.realpath(path).startswith(root + os.sep):
                    raise UserError(f"{path} is a link out of the run folder; remove it, or choose another --run.name.")

    def has_results(self) -> bool:
        """Whether any step has left something: until then, corrected settings may take the folder over."""
        return (self / "metrics.json").exists() or any(self.path.rglob("*.safetensors"))

    @property
    def manifest(self) -> dict[str, Any]:
        """The manifest, or nothing where there is none that is whole and has the shape of one."""
        found = read_json(self / "manifest.json")
        parts = [found.get("settings"), found.get("steps")] if isinstance(found, dict) else [None]
        steps = parts[-1].values() if all(isinstance(part, dict) for part in parts) else [None]
        numbers = (value for step in steps if isinstance(step, dict) for value in step.values())
        sound = all(isinstance(step, dict) for step in steps) and all(isinstance(n, int | float) for n in numbers)
        return found if sound else {}

    @rank_zero_only
    def update_manifest(self, **entries: Any) -> None:
        """Merge entries into the manifest, dictionaries one level deep.

        Raises:
            UserError: if it has gone, or was damaged, while the run went on.
        """
        manifest = self.manifest
        if not manifest:
            raise UserError(f"{self / 'manifest.json'} vanished or was altered while the run went on.")
        for name, value in entries.items():
            manifest[name] = {**manifest.get(name, {}), **value} if isinstance(value, dict) else value
        write_json(self / "manifest.json", manifest)

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Note a step's wall seconds, tokens and peak memory, also when it fails; a step taken up again adds up."""
        started, before = time.monotonic(), self.count_tokens()
        try:
            yield
        finally:
            earlier = self.manifest.get("steps", {}).get(name, {})
            used = {"seconds": time.monotonic() - started}
            used |= {kind: count - before[kind] for kind, count in self.count_tokens().items()}
            total = {kind: round(value + earlier.get(kind, 0), 2) for kind, value in used.items()}
            self.update_manifest(steps={name: total | peak_memory()})

    def total_tokens(self) -> dict[str, int]:
        """Tokens of all steps so far, also of earlier sittings at this run."""
        steps = self.manifest.get("steps", {}).values()
        return {kind: int(sum(step.get(kind, 0) for step in steps)) for kind in self.count_tokens()}

    def tensors(self, name: str, compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """The tensors of a finished step, or those of `compute()`, saved."""
        found = self.read(name)
        if found is None:
            with self.step(name):
                found = compute()
            self.write(name, found)
        return found

    def read(self, name: str) -> dict[str, Tensor] | None:
        """The tensors of `<name>.safetensors`, or None if it is missing, not whole, or another run's."""
        return read_tensors(self / f"{name}.safetensors", run=self.key)

    def write(self, name: str, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
        """Save tensors as this run's."""
        marks = {"run": self.key} if self.key else {}
        write_tensors(self / f"{name}.safetensors", tensors, {**(metadata or {}), **marks})


def file_hashes(folder: Path, pattern: str = "*") -> dict[str, str]:
    """SHA-256 (16 hex digits) of the files in a folder whose names match, by name; empty where there is none."""
    found = {}
    for path in sorted(folder.glob(pattern)):
        if path.is_file():
            with path.open("rb") as file:
                found[path.name] = hashlib.file_digest(file, "sha256").hexdigest()[:16]
    return found


def exported_model(run: Path) -> Path:
    """The folder of the model that a run exported.

    Raises:
        UserError: where it is not what the run left there.
    """
    left = (read_json(run / "manifest.json") or {}).get("model")
    if left is not None and left != file_hashes(run / "model"):
        raise UserError(f"{run / 'model'} is not what the run left there; run the same command again.")
    return run / "model"


def peak_memory() -> dict[str, int]:
    """Peak memory of this process so far, MiB: resident, and where there are GPUs allocated on the fullest of them."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = {"peak_memory_mib": round(peak / (1024 * 1024 if platform.system() == "Darwin" else 1024))}
    if torch.cuda.is_initialized():
        devices = range(torch.cuda.device_count())
        found["peak_gpu_memory_mib"] = round(max(torch.cuda.max_memory_allocated(d) for d in devices) / 2**20)
    return found


def environment() -> dict[str, Any]:
    """What a reader needs to know to repeat a run: revision, versions, device."""
    packages = {}
    for name in (
        "torch",
        "lightning",
        "transformers",
        "datasets",
        "torchmetrics",
        "wandb",
        "scikit-learn",
        "scipy",
    ):
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            packages[name] = None
    return {
        "git_revision": git_revision(),
        "python": platform.python_version(),
        "packages": packages,
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def git_revision() -> str | None:
    """Revision of the checkout that gprune runs from, with '-dirty' for uncommitted changes; None outside git."""
    root = Path(__file__).resolve().parent.parent
    try:
        found = subprocess.run(
            ["git", "-C", root, "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
            capture_output=True, text=True, timeout=10, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip() or None


def to_yaml(content: dict[str, Any]) -> str:
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
