"""Dense and pruned through llama.cpp: prefill, decoding and file size of GGUF files."""

from __future__ import annotations

import tempfile
from pathlib import Path

from gprune.errors import UserError
from gprune.export.gguf import write_gguf
from gprune.export.gguf_check import ask_llama_cpp
from gprune.export.job import Gguf
from gprune.export.packages import LLAMA_CPP, has_llama_cpp
from gprune.models.loading import load_model

from .inference import calls_of, speeds
from .measure import MIB, Table, Timing
from .models import Settings, pair_of


def check_build(type: str) -> None:
    """Refuse before anything is measured.

    Raises:
        UserError: for a type that GGUF export does not know, or without the build.
    """
    Gguf(type, unchecked=True)  # refuses a type that it does not know
    if not has_llama_cpp():
        raise UserError(f"--gguf: no llama.cpp build is installed; `pip install {LLAMA_CPP}`, or leave --gguf out.")


def gguf_tables(settings: Settings) -> list[Table]:
    """Tokens/s of the models of `inference` as GGUF files in llama.cpp, beside the FLOP bound of the same shapes."""
    check_build(settings.gguf)
    if settings.model == "tiny":
        raise UserError("--gguf: the tiny model has no tokenizer to write; expected --model with one, and not --small.")
    pair = pair_of(settings)
    _, tokenizer = load_model(pair.dense)
    rows, sizes, models = [], {}, pair.models
    with tempfile.TemporaryDirectory(prefix="gprune-bench-") as scratch:
        files = {key: str(Path(scratch) / f"{key}.gguf") for key in models}
        for key, model in models.items():
            write_gguf(model.float(), tokenizer, Path(files[key]), type=settings.gguf)
            sizes[key] = Path(files[key]).stat().st_size
        for batch in settings.batch_sizes:
            request = {name: getattr(settings, name) for name in ("seq_len", "new_tokens", "repeats")}
            found = ask_llama_cpp(request | {"work": "speed", "models": files, "batch": batch}, Path(scratch))
            for kind in ("prefill", "decode"):
                calls = calls_of(kind, models, settings, batch)
                rows.append(speeds(kind, batch, Timing(found[kind]), calls, settings))
    rows.append(["file, MiB", *(size / MIB for size in sizes.values()), sizes["dense"] / sizes["pruned"], *[None] * 3])
    header = ["", "dense, tokens/s", "pruned, tokens/s", "ratio", "rounds", "FLOP bound", "reached"]
    protocol = settings.protocol(models["dense"], f"{pair.how}; llama.cpp ({LLAMA_CPP}), {settings.gguf}")
    # the models' own dtype and torch have no part in it, but for the bound
    protocol = protocol.replace(f"{settings.gguf}, float32", settings.gguf, 1)
    return [Table("Inference through llama.cpp", protocol, header, rows)]
