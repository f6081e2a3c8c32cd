"""Prune a model that is larger than the available memory: recovery and pruning layer by layer.

    python -m experiments.large                    # a random Llama of 1.04B parameters in bfloat16; minutes
    python -m experiments.large --small            # a tiny model, also pruned in memory, with equal masks
    python -m experiments.large --whole 7b         # a random Llama 2 7B in bfloat16, learning included, on a GPU

Writes a random Llama to disk with one shard per block, so that it is never in memory as a whole. Prunes it with flags
of `train.py` in a child process whose private memory is limited (RLIMIT_DATA) to less than the size of the weights.
Prints seconds, the peak of resident memory (VmHWM, which includes mapped files), the peak of private memory (RssAnon,
sampled ten times per second), and the sizes of weights and Gram matrices. Corpora are those of the Python interpreter,
so nothing is downloaded.

transformers maps all shards at once while loading a model. This needs no memory, but counts for the limit. Therefore
the child process reads the shards instead.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig

from gprune.calibration.statistics import gram_bytes
from gprune.checks import memory_limits
from gprune.models.copies import skeleton
from gprune.models.embedded import byte_tokenizer
from gprune.models.units import units_of
from gprune.runs.results import load_run

MB = 1e6
RUNS = {
    "wanda_sp + least_squares": ["--gprune=false", "--recovery=least_squares"],
    "gprune, thresholds not learned": ["--gprune=true", "--partition.steps=40", "--recovery=none"],
}


@dataclass(frozen=True)
class Size:
    """A model, memory limits, and the size of corpora."""

    config: LlamaConfig
    dtype: torch.dtype
    max_memory: str  # --model.max_memory for the CPU
    limit: str | None  # private memory of the child process: RLIMIT_DATA
    windows: int
    length: int


def llama_config(hidden: int, neurons: int, layers: int, heads: int, groups: int, vocabulary: int) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=hidden, intermediate_size=neurons, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=groups, head_dim=hidden // heads, vocab_size=vocabulary, tie_word_embeddings=True,
        max_position_embeddings=2048, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip


LARGE = Size(llama_config(2048, 8192, 16, 32, 8, 32_000), torch.bfloat16, "300MB", "1900MB", 4, 128)
SMALL = Size(llama_config(64, 160, 6, 4, 2, 300), torch.float32, "420kB", None, 4, 32)
# Models for the whole pipeline in memory, including learning: Llama 2 7B with FLAP's amount of text, 1B, tiny.
WHOLE = {
    "7b": Size(llama_config(4096, 11_008, 32, 32, 32, 32_000), torch.bfloat16, "", None, 128, 2048),
    "1b": Size(llama_config(2048, 8192, 16, 32, 8, 32_000), torch.bfloat16, "", None, 16, 512),
    "tiny": SMALL,
}


def write_model(size: Size, folder: Path) -> None:
    """Write config, tokenizer and random weights, with one shard per block."""
    folder.mkdir(parents=True)
    model = skeleton(size.config).to(size.dtype)
    size.config.dtype, size.config.architectures = size.dtype, ["LlamaForCausalLM"]
    size.config.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    names = [name for name, _ in model.named_parameters()]  # tied weights occur once
    shards = [[name for name in names if ".layers." not in name]]  # the embeddings and the last norm
    shards += [[name for name in names if f".layers.{b}." in name] for b in range(size.config.num_hidden_layers)]
    places, total = {}, 0
    for index, shard in enumerate(shards, start=1):
        file = f"model-{index:05}-of-{len(shards):05}.safetensors"
        tensors = {name: _random(name, model.get_parameter(name), index) for name in shard}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(shard, file)
        total += sum(t.numel() * t.element_size() for t in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _random(name: str, like: Tensor, seed: int) -> Tensor:
    """Draw matrices from N(0, 1 / inputs), so that activations keep their scale. Norms are ones."""
    if like.dim() == 1:
        return torch.ones(like.shape, dtype=like.dtype)
    generator = torch.Generator().manual_seed(1000 * seed + sum(name.encode()))
    return (torch.randn(like.shape, generator=generator) * like.shape[1] ** -0.5).to(like.dtype)


@dataclass
class Peak:
    """Time and peak memory of a run."""

    seconds: float
    resident: float = 0.0  # VmHWM, bytes
    private: float = 0.0  # RssAnon, bytes


def flags_of(size: Size, folder: Path) -> list[str]:
    """Flags of all runs: model, corpora and folders."""
    return [
        f"--model.name={folder / 'model'}", f"--model.dtype={str(size.dtype).removeprefix('torch.')}",
        "--corpora.score=python_docs", "--corpora.drift=[python_docs,python_code]", "--corpora.recover=[python_docs]",
        "--corpora.evaluate=[python_docs]", "--logging.mode=disabled", "--allow_unused=true",
        f"--corpora.num_samples={size.windows}", f"--corpora.seq_len={size.length}", "--sparsity.target=0.5",
        "--evaluation.num_samples=2", f"--evaluation.seq_len={size.length}", f"--run.dir={folder / 'runs'}",
    ]  # fmt: skip


def train(flags: list[str], cache: Path, limit: str | None) -> Peak:
    """Run `train.py` in a subprocess, and measure its time and peak memory.

    Raises:
        SystemExit: if the run fails, with its stderr.
    """
    # A single malloc arena, since unused memory of an arena per thread would count for the limit.
    environment = os.environ | {"GPRUNE_CACHE": str(cache), "HF_HUB_OFFLINE": "1", "MALLOC_ARENA_MAX": "1"}
    started, peak = time.monotonic(), Peak(0.0)
    with tempfile.TemporaryFile() as errors:
        child = subprocess.Popen(
            [sys.executable, "-m", "experiments.large", "--child", limit or "none", *flags],
            cwd=Path(__file__).parents[1], env=environment, stdout=subprocess.DEVNULL, stderr=errors,
        )  # fmt: skip
        while child.poll() is None:
            with suppress(OSError, KeyError, ValueError):
                status = _status(child.pid)
                peak.resident = max(peak.resident, status["VmHWM"])
                peak.private = max(peak.private, status["RssAnon"])
            time.sleep(0.1)
        peak.seconds = time.monotonic() - started
        errors.seek(0)
        if child.returncode:
            raise SystemExit(f"The run failed with exit code {child.returncode}:\n{errors.read().decode()[-3000:]}")
    return peak


def child(limit: str, flags: list[str]) -> int:
    """Run `train.py` with limited memory."""
    from transformers import modeling_utils

    from gprune.cli import main as run

    def read(file: str, *args: Any, backend: str = "pread", **more: Any) -> safe_open:
        return safe_open(file, *args, backend="pread", **more)

    if limit != "none":
        modeling_utils.safe_open = read
        resource.setrlimit(resource.RLIMIT_DATA, (memory_limits({"cpu": limit})["cpu"],) * 2)
    return run(flags)


def _status(pid: int) -> dict[str, float]:
    """Memory of a process in bytes by name, from /proc."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    pairs = (line.split(":", 1) for line in lines if line.endswith(" kB"))
    return {name: 1024.0 * int(value.split()[0]) for name, value in pairs}


def main(arguments: list[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["--child"]:
        raise SystemExit(child(arguments[1], arguments[2:]))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a tiny model, compared with a run in memory")
    parser.add_argument("--whole", choices=WHOLE, help="the default pipeline including learning, without memory limits")
    parser.add_argument("--folder", help="folder for model, cache and runs; default: a temporary folder")
    args = parser.parse_args(arguments)
    size = WHOLE[args.whole] if args.whole else SMALL if args.small else LARGE
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(args.folder or temporary)
        if not (folder / "model").exists():
            write_model(size, folder / "model")
        if args.whole:
            run_whole_pipeline(size, folder)
        else:
            measure(size, folder, compare=args.small)


def run_whole_pipeline(size: Size, folder: Path) -> None:
    """Run the default pipeline on the available accelerator, and print seconds and peak memory of each step."""
    own = ["--corpora.learn=[python_docs]", "--corpora.batch_size=1", "--run.name=whole"]
    peak = train([*flags_of(size, folder), *own], folder / "cache", None)
    manifest = json.loads((folder / "runs" / "whole" / "manifest.json").read_text())
    print("| step | seconds | peak resident, MiB | peak on the GPU, MiB |")
    print("|---|---:|---:|---:|")
    for name, step in manifest["steps"].items():
        gpu = step.get("peak_gpu_memory_mib", "")
        print(f"| {name} | {step['seconds']:.1f} | {step['peak_memory_mib']:,} | {gpu} |")
    print(f"\n{peak.seconds:.0f} seconds in all, start and loading included; resident {peak.resident / MB:,.0f} MB")


def measure(size: Size, folder: Path, *, compare: bool) -> None:
    """Run all of `RUNS` and print a table. With `compare`, run the first one also in memory and compare the masks."""
    model = skeleton(size.config).to(size.dtype)
    weights = model.get_memory_footprint(return_buffers=False)
    print(f"weights {weights / MB:,.1f} MB ({model.num_parameters():,} parameters, {size.dtype}), ")
    print(f"Gram matrices {gram_bytes(units_of(model)) / MB:,.1f} MB per corpus; max_memory cpu: {size.max_memory}, ")
    print(f"RLIMIT_DATA {size.limit or 'none'}; {size.windows} windows of {size.length} tokens per corpus\n")
    print("| run | seconds | peak resident (VmHWM), MB | peak private (RssAnon), MB |")
    print("|---|---:|---:|---:|")
    for number, (name, flags) in enumerate(list(RUNS.items())[: 1 if compare else None]):
        flags = [*flags_of(size, folder), "--trainer.accelerator=cpu", "--sparsity.allocation=uniform", *flags]
        offload = ["--model.device_map=auto", f"--model.max_memory={{cpu: {size.max_memory}}}"]
        peak = train([*flags, *offload, f"--run.name={number}"], folder / "cache", size.limit)
        print(f"| {name} | {peak.seconds:.0f} | {peak.resident / MB:,.0f} | {peak.private / MB:,.0f} |", flush=True)
        if compare:
            peak = train([*flags, "--export=none", f"--run.name={number}-in-memory"], folder / "other-cache", None)
            print(f"| the same in memory | {peak.seconds:.0f} | {peak.resident / MB:,.0f} | {peak.private / MB:,.0f} |")
            one, two = (load_run(folder / "runs" / f"{number}{end}") for end in ("", "-in-memory"))
            assert one.masks == two.masks, "masks differ"
            assert [r["nll"] for r in one.records] == [r["nll"] for r in two.records], "perplexities differ"


if __name__ == "__main__":
    main()
