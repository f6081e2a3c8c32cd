"""Dense and pruned through llama.cpp: prefill, decoding and file size of GGUF files."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from gprune.errors import UserError
from gprune.export.gguf import write_gguf
from gprune.export.job import LLAMA_CPP, TYPES

from .inference import decode, prefill
from .measure import MIB, Table, Timing, flops
from .models import Pair, Settings

BUILD = "llama_cpp_py_sync"  # the one of `LLAMA_CPP` that takes several sequences in one call


def check_build(type: str) -> None:
    """Refuse before anything is measured.

    Raises:
        UserError: for a type that GGUF export does not know, or without the build.
    """
    if type not in TYPES:
        raise UserError(f"Unknown GGUF type '{type}'. Available: {', '.join(TYPES)}.")
    if importlib.util.find_spec(BUILD) is None:
        raise UserError(
            f"--gguf: no llama.cpp build is installed; `pip install {LLAMA_CPP[BUILD]}`, or leave --gguf out."
        )


def gguf_tables(pair: Pair, tokenizer: PreTrainedTokenizerBase, settings: Settings) -> list[Table]:
    """Tokens/s of `dense` and `pruned` in llama.cpp, beside the FLOP bound of the same shapes."""
    rows, sizes, models = [], {}, pair.models
    with tempfile.TemporaryDirectory(prefix="gprune-bench-") as scratch:
        files = {key: str(Path(scratch) / f"{key}.gguf") for key in models}
        for key, model in models.items():
            write_gguf(model.float(), tokenizer, Path(files[key]), type=settings.gguf)
            sizes[key] = Path(files[key]).stat().st_size
        for batch in settings.batch_sizes:
            found = _in_llama_cpp(files, batch, settings, Path(scratch))
            for kind, make in (("prefill", prefill), ("decode", decode)):
                timing, up = Timing(found[kind]), Timing(found[kind]).ratio("dense", "pruned")
                count = batch * (settings.seq_len if kind == "prefill" else settings.new_tokens)
                bound = flops(make(models["dense"], settings, batch)) / flops(make(models["pruned"], settings, batch))
                rates = [count / timing.median(key) for key in models]
                rows.append([f"{kind}, batch {batch}", *rates, up, timing.spread("dense", "pruned"), bound, up / bound])
    rows.append(["file, MiB", *(size / MIB for size in sizes.values()), sizes["dense"] / sizes["pruned"], *[None] * 3])
    header = ["", "dense, tokens/s", "pruned, tokens/s", "ratio", "rounds", "FLOP bound", "reached"]
    protocol = settings.protocol(models["dense"], f"{pair.how}; llama.cpp ({LLAMA_CPP[BUILD]}), {settings.gguf}")
    # the models' own dtype and torch have no part in it, but for the bound
    return [
        Table(
            "Inference through llama.cpp", protocol.replace(f"{settings.gguf}, float32", settings.gguf, 1), header, rows
        )
    ]


def _in_llama_cpp(
    files: dict[str, str], batch: int, settings: Settings, scratch: Path
) -> dict[str, dict[str, list[float]]]:
    """Seconds by kind, model and round, of a process of its own."""
    request, answer = scratch / "request.json", scratch / "answer.json"
    content = {name: getattr(settings, name) for name in ("seq_len", "new_tokens", "repeats")}
    content |= {"models": files, "batch": batch, "threads": torch.get_num_threads(), "answer": str(answer)}
    request.write_text(json.dumps(content), encoding="utf-8")
    command = [sys.executable, "-P", str(Path(__file__).with_name("llamacpp.py")), str(request)]
    done = subprocess.run(command, cwd=scratch, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode != 0 or not answer.exists():
        lines = [line for line in done.stderr.splitlines() if line.strip()] or [f"exit code {done.returncode}"]
        said = next((line for line in lines if "GGML_ASSERT" in line or "error" in line), lines[-1])
        raise UserError(f"--gguf: llama.cpp does not run the files: {said}")
    return json.loads(answer.read_text(encoding="utf-8"))
