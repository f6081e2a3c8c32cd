"""GGUF files in llama.cpp, as `pip install llama-cpp-py-sync` has built it: log-probabilities, tokens, quantising.

Run by path, `python -P llamacpp.py REQUEST.json`, never imported by gprune: llama.cpp ends the process where it finds
something wrong, and brings threads of its own. REQUEST.json holds `work`, `threads`, `answer` (the JSON file to write)
and, for each kind of work:

score   `model` (a path), `ids`, `texts`, and `logprobs`, a file to write (.npy, float32, (T, vocabulary)): of the
        token after each of the T ids. The answer is a list of tokens for every text.
measure `model` and `windows` of as many tokens each. The answer is the mean negative log-likelihood of the tokens of
        all windows, each window from its second token on, in nats.
quantise `model`, `output`, and `type`, a name of llama.cpp's such as Q4_K_M. The answer is null.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from llama_cpp_py_sync._cffi_bindings import get_ffi, get_lib
from scipy.special import log_softmax

ffi, lib = get_ffi(), get_lib()
errors = []


@ffi.callback("void(enum ggml_log_level, const char *, void *)")
def log(level, text, _):
    """Keep what llama.cpp says of errors, and nothing else."""
    if level == 4:  # GGML_LOG_LEVEL_ERROR
        errors.append(ffi.string(text).decode(errors="replace").strip())


def need(what, name: str):
    """What llama.cpp gave, unless it is NULL."""
    if what == ffi.NULL:
        sys.exit(f"error: {name} failed: {' '.join(errors)}")
    return what


class Model:
    """One file in a context of `length` tokens, all of which may be given at once.

    The cache is in float32 and attention is plain: what is checked are the weights, not the cache.
    """

    def __init__(self, path: str, threads: int, length: int):
        settings = lib.llama_model_default_params()
        settings.n_gpu_layers = 0
        model = need(lib.llama_model_load_from_file(path.encode(), settings), f"loading {path}")
        context = lib.llama_context_default_params()
        context.n_seq_max = 1
        context.n_ctx = context.n_batch = context.n_ubatch = length
        context.n_threads = context.n_threads_batch = threads
        context.flash_attn_type = context.type_k = context.type_v = 0
        self.state = need(lib.llama_init_from_model(model, context), "making a context")
        self.vocabulary = lib.llama_model_get_vocab(model)
        self.size = lib.llama_vocab_n_tokens(self.vocabulary)
        self.batch = lib.llama_batch_init(length, 0, 1)

    def logprobs(self, ids: Sequence[int]) -> np.ndarray:
        """(T, vocabulary) float64 log-probabilities after each of the T tokens, which are alone in the context."""
        lib.llama_memory_clear(lib.llama_get_memory(self.state), True)
        batch = self.batch
        batch.n_tokens = len(ids)
        for i, token in enumerate(ids):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, i, 1, 1
            batch.seq_id[i][0] = 0
        if status := lib.llama_decode(self.state, batch):
            sys.exit(f"error: llama_decode returned {status}: {' '.join(errors)}")
        lib.llama_synchronize(self.state)
        buffer = ffi.buffer(lib.llama_get_logits(self.state), 4 * len(ids) * self.size)
        logits = np.frombuffer(buffer, dtype=np.float32).reshape(len(ids), self.size)
        return log_softmax(logits.astype(np.float64), axis=1)

    def tokens(self, text: str) -> list[int]:
        """Token ids of a text, with the file's own special tokens."""
        data = text.encode()
        most = len(data) + 16
        room = ffi.new("llama_token[]", most)
        count = lib.llama_tokenize(self.vocabulary, data, len(data), room, most, True, True)
        return [room[i] for i in range(max(count, 0))]


def score(request: dict[str, Any]) -> list[list[int]]:
    """Write log-probabilities; return the tokens of every text."""
    ids = request["ids"]
    model = Model(request["model"], request["threads"], len(ids))
    tokens = [model.tokens(text) for text in request["texts"]]
    np.save(request["logprobs"], model.logprobs(ids).astype(np.float32))
    return tokens


def measure(request: dict[str, Any]) -> float:
    """Mean negative log-likelihood over windows, each alone in the context."""
    windows = request["windows"]
    T, total = len(windows[0]), 0.0
    model = Model(request["model"], request["threads"], T)
    for ids in windows:
        total -= model.logprobs(ids)[np.arange(T - 1), ids[1:]].sum()
    return total / (len(windows) * (T - 1))


def quantise(request: dict[str, Any]) -> None:
    """Write another file, its matrices quantised by llama.cpp; rows too short for a type's blocks get a larger type."""
    settings = lib.llama_model_quantize_default_params()
    settings.ftype = getattr(lib, f"LLAMA_FTYPE_MOSTLY_{request['type']}")
    settings.nthread = request["threads"]
    if lib.llama_model_quantize(request["model"].encode(), request["output"].encode(), ffi.addressof(settings)):
        sys.exit(f"error: llama_model_quantize failed: {' '.join(errors)}")


def main(request_file: str) -> None:
    """Answer one request, a JSON file, on standard output."""
    request = json.loads(Path(request_file).read_text(encoding="utf-8"))
    lib.llama_log_set(log, ffi.NULL)
    lib.llama_backend_init()
    answer = {"score": score, "measure": measure, "quantise": quantise}[request["work"]](request)
    Path(request["answer"]).write_text(json.dumps(answer), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
