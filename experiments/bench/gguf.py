"""Dense and pruned through llama.cpp: prefill, decoding and file size of GGUF files."""

from __future__ import annotations

import tempfile
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from gprune.errors import UserError
from gprune.export.gguf import write_gguf
from gprune.export.gguf_check import ask_llama_cpp
from gprune.export.job import TYPES
from gprune.export.packages import LLAMA_CPP, has_llama_cpp

from .inference import decode, prefill
from .measure import MIB, Table, Timing, flops
from .models import Pair, Settings


def check_build(type: str) -> None:
    """Refuse before anything is measured.

    Raises:
        UserError: for a type that GGUF export does not know, or without the build.
    """
    if type not in TYPES:
        raise UserError(f"Unknown GGUF type '{type}'. Available: {', '.join(TYPES)}.")
    if not has_llama_cpp():
        raise UserError(f"--gguf: no llama.cpp build is installed; `pip install {LLAMA_CPP}`, or leave --gguf out.")


def gguf_tables(pair: Pair, tokenizer: PreTrainedTokenizerBase, settings: Settings) -> list[Table]:
    """Tokens/s of `dense` and `pruned` in llama.cpp, beside the FLOP bound of the same shapes."""
    rows, sizes, models = [], {}, pair.models
    with tempfile.TemporaryDirectory(prefix="gprune-bench-") as scratch:
        files = {key: str(Path(scratch) / f"{key}.gguf") for key in models}
        for key, model in models.items():
            write_gguf(model.float(), tokenizer, Path(files[key]), type=settings.gguf)
            sizes[key] = Path(files[key]).stat().st_size
        for batch in settings.batch_sizes:
            request = {name: getattr(settings, name) for name in ("seq_len", "new_tokens", "repeats")}
            found = ask_llama_cpp(request | {"work": "speed", "models": files, "batch": batch}, Path(scratch))
            for kind, make in (("prefill", prefill), ("decode", decode)):
                timing, up = Timing(found[kind]), Timing(found[kind]).ratio("dense", "pruned")
                count = batch * (settings.seq_len if kind == "prefill" else settings.new_tokens)
                bound = flops(make(models["dense"], settings, batch)) / flops(make(models["pruned"], settings, batch))
                rates = [count / timing.median(key) for key in models]
                rows.append([f"{kind}, batch {batch}", *rates, up, timing.spread("dense", "pruned"), bound, up / bound])
    rows.append(["file, MiB", *(size / MIB for size in sizes.values()), sizes["dense"] / sizes["pruned"], *[None] * 3])
    header = ["", "dense, tokens/s", "pruned, tokens/s", "ratio", "rounds", "FLOP bound", "reached"]
    protocol = settings.protocol(models["dense"], f"{pair.how}; llama.cpp ({LLAMA_CPP}), {settings.gguf}")
    # the models' own dtype and torch have no part in it, but for the bound
    return [
        Table(
            "Inference through llama.cpp", protocol.replace(f"{settings.gguf}, float32", settings.gguf, 1), header, rows
        )
    ]
