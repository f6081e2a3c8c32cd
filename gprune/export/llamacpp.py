"""Run GGUF files in llama.cpp (package llama-cpp-py-sync): log-probabilities, losses, tokens, quantisation.

This file is run as a script, `python -P llamacpp.py`, and never imported by gprune, because llama.cpp aborts the
process on errors and starts threads. It imports neither gprune nor PyTorch, which would take seconds. It reads a JSON
request from stdin and writes the answer as the last line of stdout. The request has `work`, `model` (a path),
`threads`, and more keys for each kind of work:

score    `ids`, `texts`, and `logprobs`, a file to write (.npy, float32, (T, vocabulary)) with log-probabilities after
         each of the T ids. The answer is a list of tokens for every text.
nll      `windows`, lists of T ids. The answer is the negative log-likelihood of tokens 2 to T of each window, in nats.
quantise `output`, and `type`, a type of llama.cpp such as Q4_K_M. The answer is null.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from llama_cpp_py_sync import Llama
from llama_cpp_py_sync._cffi_bindings import get_ffi, get_lib
from scipy.special import log_softmax

ffi, lib = get_ffi(), get_lib()


def load_llama(request: dict[str, Any], length: int) -> Llama:
    """Open the model with a context of `length` tokens.

    Attention is exact and its cache is float32, so that only the weights differ from those of the model.
    """
    exact_attention = {"flash_attn_type": 0, "type_k": "f32", "type_v": "f32"}
    return Llama(request["model"], n_ctx=length, n_batch=length, n_threads=request["threads"], **exact_attention)


def logprobs_of(model: Llama, ids: Sequence[int]) -> np.ndarray:
    """Return log-probabilities of the token after each of T tokens, (T, vocabulary) float64.

    The context of the model is cleared first.
    """
    lib.llama_memory_clear(lib.llama_get_memory(model._ctx), True)
    batch = lib.llama_batch_init(len(ids), 0, 1)
    batch.n_tokens = len(ids)
    for i, token in enumerate(ids):
        batch.token[i] = token
        batch.pos[i] = i
        batch.n_seq_id[i] = 1  # the token belongs to one sequence, number 0
        batch.seq_id[i][0] = 0
        batch.logits[i] = 1  # logits are computed for every token
    if status := lib.llama_decode(model._ctx, batch):
        sys.exit(f"error: llama_decode returned {status}")
    lib.llama_batch_free(batch)
    bytes_per_logit = 4  # float32
    buffer = ffi.buffer(lib.llama_get_logits(model._ctx), bytes_per_logit * len(ids) * model.n_vocab)
    logits = np.frombuffer(buffer, dtype=np.float32).reshape(len(ids), model.n_vocab)
    return log_softmax(logits.astype(np.float64), axis=1)


def score(request: dict[str, Any]) -> list[list[int]]:
    """Write log-probabilities to a file, and return the tokens of every text."""
    model = load_llama(request, len(request["ids"]))
    np.save(request["logprobs"], logprobs_of(model, request["ids"]).astype(np.float32))
    return [model.tokenize(text, parse_special=True) for text in request["texts"]]


def nll(request: dict[str, Any]) -> list[float]:
    """Return the negative log-likelihood of each window without its first token, in nats."""
    windows = request["windows"]
    model = load_llama(request, len(windows[0]))
    steps = range(len(windows[0]) - 1)
    return [-float(logprobs_of(model, window)[steps, window[1:]].sum()) for window in windows]


def quantise(request: dict[str, Any]) -> None:
    """Write a file with matrices quantised by llama.cpp. Rows that do not fit blocks get a larger type."""
    lib.llama_backend_init()
    settings = lib.llama_model_quantize_default_params()
    settings.ftype = getattr(lib, f"LLAMA_FTYPE_MOSTLY_{request['type']}")
    settings.nthread = request["threads"]
    if lib.llama_model_quantize(request["model"].encode(), request["output"].encode(), ffi.addressof(settings)):
        sys.exit("error: llama_model_quantize failed")


if __name__ == "__main__":
    request = json.load(sys.stdin)
    work = {"score": score, "nll": nll, "quantise": quantise}[request["work"]]
    sys.stdout.write("\n" + json.dumps(work(request)))
