"""Check a GGUF file by running it in llama.cpp, in a separate process.

Log-probabilities and tokens of `CHECK_TEXT` are compared with those of the model and its tokenizer. The check detects
errors such as a wrong order of rows or a missing key, with which a file loads but generates nonsense.
"""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gprune.errors import UserError

log = logging.getLogger("gprune")

# Text in which tokenizers differ: digits, blanks, other scripts, code, contractions.
CHECK_TEXT = Path(__file__).with_name("check_text.txt").read_text(encoding="utf-8")
CHECK_TOKENS = 512  # largest number of tokens whose log-probabilities are compared

# Largest mean KL(model || file), nats per token. The largest values of SmolLM2-135M, dense and pruned, were 5e-9 (f32),
# 7e-5 (f16) and 1e-2 (q8_0). With the rows of one k_proj of 30 in the wrong order it was 0.2.
LIMITS = {"f32": 1e-6, "f16": 1e-3, "q8_0": 5e-2, "q4_k_m": 0.2}


@torch.no_grad()
def check_gguf(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, path: Path, *, type: str) -> float:
    """Compare tokens and log-probabilities of llama.cpp with those of the model and its tokenizer.

    Return KL(model || file) in nats per token. Raise UserError for other tokens, or a KL above `LIMITS`.
    """
    special_tokens = "".join(token for token in (tokenizer.bos_token, tokenizer.eos_token) if token)
    texts = [CHECK_TEXT, f"{special_tokens}user\n{CHECK_TEXT[:80]}{special_tokens}"]
    ids = tokenizer(CHECK_TEXT).input_ids[: min(CHECK_TOKENS, model.config.max_position_embeddings)]
    log_p_of_file, tokens = score_in_llama_cpp(path, ids, texts)
    if tokens != [tokenizer(text).input_ids for text in texts]:
        raise UserError(
            "Cannot export to GGUF: llama.cpp splits text into other tokens than the tokenizer. Please report this."
        )
    logits = model(torch.tensor([ids], device=model.device), use_cache=False).logits[0]
    log_p = logits.double().log_softmax(-1).cpu()
    kl = float((log_p.exp() * (log_p - log_p_of_file)).sum(-1).mean())
    if not kl <= LIMITS[type]:  # also true for NaN
        lossy = f"If --type f32 passes, {type} loses too much accuracy for this model."
        advice = "Please report this." if type == "f32" else lossy
        raise UserError(
            f"Cannot export to GGUF: llama.cpp's predictions differ from the model's by KL {kl:.1e} nats per token, "
            f"more than {LIMITS[type]}. The file was removed. {advice}"
        )
    log.info("Checked in llama.cpp on %d tokens: KL %.1e nats", len(ids), kl)
    return kl


def score_in_llama_cpp(path: Path, ids: list[int], texts: list[str]) -> tuple[Tensor, list[list[int]]]:
    """Return llama.cpp's log-probabilities after each of T `ids`, (T, vocabulary), and tokens of `texts`."""
    with tempfile.TemporaryDirectory(prefix="gprune-llamacpp-") as scratch:
        file = Path(scratch) / "logprobs.npy"
        tokens = ask_llama_cpp("score", path, ids=ids, texts=texts, logprobs=str(file))
        return torch.from_numpy(np.load(file)).double(), tokens


def ask_llama_cpp(work: str, model: Path, **request: Any) -> Any:
    """Run `llamacpp.py` in a process, and return its answer."""
    request |= {"work": work, "model": str(model.absolute()), "threads": torch.get_num_threads()}
    command = [sys.executable, "-P", str(Path(__file__).with_name("llamacpp.py"))]
    process = subprocess.run(
        command, input=json.dumps(request), capture_output=True, text=True, errors="replace", check=False
    )
    if process.returncode != 0:
        lines = [line for line in process.stderr.splitlines() if line.strip()] or [f"exit code {process.returncode}"]
        cause = next((line for line in lines if "GGML_ASSERT" in line or "error" in line), lines[-1])
        raise UserError(f"Cannot run the file in llama.cpp: {cause.removesuffix('.')}.")
    return json.loads(process.stdout.splitlines()[-1])
