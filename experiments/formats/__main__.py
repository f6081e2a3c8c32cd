"""Check which programs load exported models. Prints a Markdown table of formats and consumers.

    OMP_NUM_THREADS=1 python -m experiments.formats --work runs/formats --fetch   # minutes on one core, 8 GB

Three pruned models are made from the embedded SmolLM2-135M, without 30 % of the FFN, with widths in multiples of 32:
`ffn` has unequal widths, `ffn+kv` also lacks KV groups, and `uniform` has equal widths. Each consumer loads them in a
separate process and computes the same few hundred tokens in float32. The results are compared with the pruned model in
memory. Perplexities are no results about pruning, because the text is the calibration text of the masks.

`--fetch` installs consumers from the package index to the work folder: older versions of transformers, as overlays of
this environment, and vLLM in a separate environment. llama.cpp is used if it is installed (`pip install
llama-cpp-py-sync`). Models are also stored in the work folder.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from safetensors.torch import load_file
from torch import Tensor

from gprune.errors import UserError
from gprune.export import hf
from gprune.export.convert import load_folder
from gprune.models import agreement, gguf

from .models import MODELS, SPARSITY, WIDTH_MULTIPLE, embedded, make
from .packages import OLDER, fetch

CONVERTED = ("ffn+kv", "uniform")  # models converted to GGUF; `ffn+kv` covers all features of `ffn`
LIMIT = 1e-4  # largest |difference of logits| in transformers; the checks of GGUF and vLLM have limits of their own
VLLM = Path(__file__).resolve().parents[1] / "vllm_check.py"
COLUMNS = ("format", "model", "consumer", "max diff.", "KL, nats", "top-1", "perplexity", "expected", "tokens", "load")
Figures = dict[str, Any]  # cells of the table by column


def rows(work: Path, vllm: Path) -> Iterator[tuple[str, str, str, str, Callable[[], Figures] | None]]:
    """Format, model, consumer, the call that loads it, and a function for the figures; None if not installed."""
    version_here = importlib.metadata.version("transformers")
    for name in MODELS:
        folder = work / name / "hf"
        code = ", trust_remote_code=True" if any(folder.glob("*.py")) else ""
        load = f"AutoModelForCausalLM.from_pretrained(FOLDER{code})"
        for version in (*OLDER, version_here):
            overlay = None if version == version_here else work / "packages" / f"transformers-{version}"
            available = overlay is None or overlay.exists()
            read = (lambda folder=folder, overlay=overlay: in_transformers(folder, overlay)) if available else None
            yield "hf", name, f"transformers {version}", load, read
        read = (lambda folder=folder: in_vllm(folder, vllm)) if vllm.exists() else None
        yield "hf", name, "vLLM", f"LLM(FOLDER{code})", read
    installed = gguf.has_llama_cpp()
    for name in CONVERTED:
        for type in gguf.FILE_TYPES:
            read = (lambda name=name, type=type: in_llama_cpp(work / name / "hf", type)) if installed else None
            yield f"gguf {type}", name, gguf.LLAMA_CPP, "llama_model_load_from_file(FILE)", read


def in_transformers(folder: Path, overlay: Path | None) -> Figures:
    """Compare logits of a new process without gprune. Packages in `overlay` take precedence."""
    expected = load_file(folder.with_name("reference.safetensors"))
    with patch.dict(os.environ, {} if overlay is None else {"PYTHONPATH": str(overlay)}):
        got = hf.reloaded_logits(folder, expected["ids"][None])[0]
    difference = agreement.compare(expected["logits"], got).largest
    if not difference <= LIMIT:  # also true of NaN
        raise UserError(f"Logits must be within {LIMIT:.0e}; got a difference of {difference:.1e}.")
    return compare(expected, got.double().log_softmax(-1)) | {"max diff.": f"{difference:.1e} logit"}


def in_llama_cpp(folder: Path, type: str) -> Figures:
    """Export a GGUF file of this type, check it like any export, and compare its log-probabilities."""
    model, tokenizer = load_folder(folder)
    file, expected = folder.with_name(f"{type}.gguf"), load_file(folder.with_name("reference.safetensors"))
    gguf.write_gguf(model, tokenizer, file, type=type)
    gguf.check_gguf(model, tokenizer, file, type=type)
    got, _ = gguf.score_in_llama_cpp(file, expected["ids"].tolist(), [])
    return compare(expected, got)


def in_vllm(folder: Path, python: Path) -> Figures:
    """Run `vllm_check.py` with the Python of vLLM's environment. Returns the figures that it prints."""
    command = [str(python), "-I", str(VLLM), str(folder), str(folder.with_name("reference.json"))]
    done = subprocess.run(
        command, env=os.environ | {"HF_HUB_OFFLINE": "1"}, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise UserError(done.stderr.strip().rpartition("\n")[2] or f"exit code {done.returncode}")
    got = json.loads(done.stdout.strip().splitlines()[-1])
    return {
        "consumer": f"vLLM {got['vllm']}, {got['class']}", "max diff.": f"{got['difference']:.1e} log-prob.",
        "top-1": f"{got['top1']:.4f}", "perplexity": f"{got['perplexity']:.4f}",
        "expected": f"{got['perplexity_of_reference']:.4f}", "tokens": got["tokens"],
    }  # fmt: skip


def compare(expected: dict[str, Tensor], got: Tensor) -> Figures:
    """Compare the reference, ids (T,) and logits (T, V), with a consumer's log-probabilities (T, V), in float64."""
    own, ids = expected["logits"].double().log_softmax(-1), expected["ids"]

    def perplexity(logprobs: Tensor) -> float:
        return float(logprobs[torch.arange(len(ids) - 1), ids[1:]].mean().neg().exp())

    return {
        "max diff.": f"{float((own - got).abs().max()):.1e} log-prob.",
        "KL, nats": f"{float((own.exp() * (own - got)).sum(-1).mean()):.1e}",
        "top-1": f"{float((own.argmax(-1) == got.argmax(-1)).double().mean()):.4f}",
        "perplexity": f"{perplexity(got):.4f}", "expected": f"{perplexity(own):.4f}", "tokens": len(ids),
    }  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table. Returns exit code 1 if an installed consumer fails or differs from the reference, else 0."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.formats", description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--work", type=Path, default=Path("runs/formats"), help="folder of models and packages")
    parser.add_argument("--only", default="", help="only rows whose name (format, model, consumer) contains this")
    parser.add_argument("--fetch", action="store_true", help="install consumers from the package index")
    parser.add_argument("--vllm", type=Path, metavar="PYTHON", help="Python of an environment with vLLM")
    args = parser.parse_args(arguments)
    work = args.work.absolute()
    if args.fetch:
        fetch(work / "packages")
    make(work, embedded)
    print(
        f"SmolLM2-135M, {SPARSITY:.0%} of the FFN gone, widths of {WIDTH_MULTIPLE}; float32, the text that the masks "
        f"were made from; `expected` is the perplexity of the pruned model in memory.\n\n"
        f"| {' | '.join(COLUMNS)} | result |\n|{'---|' * (len(COLUMNS) + 1)}"
    )
    failed = False
    for format, model, consumer, load, read in rows(work, args.vllm or work / "packages/vllm/bin/python"):
        if args.only not in f"{format} {model} {consumer}":
            continue
        figures, result = {"format": format, "model": model, "consumer": consumer, "load": f"`{load}`"}, "not installed"
        if read is not None:
            try:
                figures, result = figures | read(), "ok"
            except UserError as error:
                failed, result = True, f"FAILS: {error}".replace("|", "\\|")
        print("|", *(f"{figures.get(column, '')} |" for column in COLUMNS), f"{result} |", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
