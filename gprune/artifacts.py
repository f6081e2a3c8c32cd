"""The run folder and the statistics cache: safetensors and JSON, written whole or not at all, checked when read.

Of several processes only the first writes; all of them read.
Nothing is ever unpickled. Every file is written under a temporary name and renamed; each safetensors file carries the
hash of its content, so that a truncated or altered file is noticed and computed again, never silently used.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import resource
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import safetensors
import torch
import yaml
from lightning.pytorch.utilities import rank_zero_only
from safetensors.torch import load_file, save_file
from torch import Tensor

from gprune.errors import UserError
from gprune.loading import as_bytes

log = logging.getLogger("gprune")
FORMAT_VERSION = 3  # part of every cache key: raise it when what is stored changes meaning


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary sibling to write; on success rename it to `path`, on failure remove it.

    Raises:
        UserError: when the folder cannot be written or the disk is full.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        os.replace(temporary, path)
    except (OSError, safetensors.SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise UserError(
            f"Cannot write {path}: {reason}. Free space or choose another place with --run.dir (results) "
            f"or $GPRUNE_CACHE (caches); what was finished is kept."
        ) from error
    finally:
        with suppress(OSError):  # where nothing could be written there is nothing to remove
            temporary.unlink(missing_ok=True)


@rank_zero_only
def write_json(path: Path, content: Any) -> None:
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1, sort_keys=False, allow_nan=False) + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    """The content, or None if the file is missing or not whole."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def content_hash(tensors: dict[str, Tensor]) -> str:
    """SHA-256 over names, shapes, dtypes and bytes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype};".encode())
        digest.update(as_bytes(tensor))
    return digest.hexdigest()


@rank_zero_only
def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Save tensors with their content hash in the file's metadata."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata={**(metadata or {}), "content_hash": content_hash(tensors)})


def read_tensors(path: Path) -> dict[str, Tensor] | None:
    """The tensors, or None (with one warning) if the file is missing, truncated, altered or foreign."""
    if not path.is_file():
        return None
    try:
        with safetensors.safe_open(path, "pt") as file:
            expected = (file.metadata() or {}).get("content_hash")
        tensors = load_file(path)
        if expected == content_hash(tensors):
            return tensors
        reason = "its content does not match its hash"
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        reason = str(error).splitlines()[0]
    log.warning("%s is not usable (%s); computing it again.", path, reason)
    return None


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
    """`runs/<name>/`: settings, manifest, and the result of every finished step."""

    def __init__(self, path: Path | str, count_tokens: Callable[[], dict[str, int]] = dict):
        self.path = Path(path)
        self.count_tokens = count_tokens

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def open(self, settings: dict[str, Any], config_yaml: str) -> None:
        """Create the folder or take up the run in it.

        Raises:
            UserError: if the folder holds a run with other settings, something that is no run, or cannot be written.
        """
        manifest = read_json(self / "manifest.json")
        if manifest is not None:
            changed = differences(manifest.get("settings"), settings)
            if not changed:
                return
            if self.has_results():
                more = f" (and {len(changed) - 3} more)" if len(changed) > 3 else ""
                raise UserError(
                    f"{self.path} holds a run with other settings: {'; '.join(changed[:3])}{more}. "
                    f"Choose another --run.name, or remove the folder."
                )
        elif self.path.exists() and (not self.path.is_dir() or any(p.name[0] != "." for p in self.path.iterdir())):
            raise UserError(f"{self.path} exists and is no gprune run; choose another --run.name or --run.dir.")
        with replacing(self / "config.yaml") as temporary:
            temporary.write_text(config_yaml, encoding="utf-8")
        write_json(self / "manifest.json", {"settings": settings, "environment": environment(), "steps": {}})

    def has_results(self) -> bool:
        """Whether any step has left something: until then, corrected settings may take the folder over."""
        return (self / "metrics.json").exists() or any(self.path.rglob("*.safetensors"))

    @property
    def manifest(self) -> dict[str, Any]:
        return read_json(self / "manifest.json") or {}

    def update_manifest(self, **entries: Any) -> None:
        """Merge entries into the manifest, dictionaries one level deep."""
        manifest = self.manifest
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
            self.update_manifest(steps={name: total | {"peak_memory_mib": peak_memory_mib()}})

    def total_tokens(self) -> dict[str, int]:
        """Tokens of all steps so far, also of earlier sittings at this run."""
        steps = self.manifest.get("steps", {}).values()
        return {kind: int(sum(step.get(kind, 0) for step in steps)) for kind in self.count_tokens()}

    def tensors(self, name: str, compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """The tensors of a finished step, or those of `compute()`, saved."""
        path = self / f"{name}.safetensors"
        found = read_tensors(path)
        if found is None:
            with self.step(name):
                found = compute()
            write_tensors(path, found)
        return found


def peak_memory_mib() -> int:
    """Peak resident memory of this process so far, MiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (1024 * 1024 if platform.system() == "Darwin" else 1024))


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
