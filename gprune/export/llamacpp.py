"""GGUF files in llama.cpp, as `pip install llama-cpp-py-sync` has built it: log-probabilities, tokens, seconds.

Run by path, `python -P llamacpp.py REQUEST.json`, never imported by gprune: llama.cpp ends the process where it finds
something wrong, and brings threads of its own. REQUEST.json holds `work`, `threads`, `answer` (the JSON file to write)
and, for each kind of work:

score   `model` (a path), `ids`, `texts`, and `logprobs`, a file to write (.npy, float32, (T, vocabulary)): of the
        token after each of the T ids. The answer is a list of tokens for every text.
measure `model` and `windows` of as many tokens each. The answer is the mean negative log-likelihood of the tokens of
        all windows, each window from its second token on, in nats.
quantise `model`, `output`, and `type`, a name of llama.cpp's such as Q4_K_M. The answer is null.
speed   `models` (path by name), `batch`, `seq_len`, `new_tokens`, `repeats`. The answer is seconds by `prefill` or
        `decode`, model and round; models take turns.
"""

from __future__ import annotations

import json
import sys
import time
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
    """One file in a context for `sequences` of at most `length` tokens; all of a call's tokens are given at once.

    Args:
        path: the GGUF file.
        step: most tokens that one call computes.
        chunk: of these, how many at a time.
        exact: float32 in the cache and plain attention: what is checked are the weights, not the cache.
    """

    def __init__(self, path: str, threads: int, *, sequences: int, length: int, step: int, chunk: int, exact: bool):
        settings = lib.llama_model_default_params()
        settings.n_gpu_layers = 0
        model = need(lib.llama_model_load_from_file(path.encode(), settings), f"loading {path}")
        context = lib.llama_context_default_params()
        context.n_seq_max, context.n_ctx = sequences, sequences * length
        context.n_batch, context.n_ubatch = step, chunk
        context.n_threads = context.n_threads_batch = threads
        if exact:
            context.flash_attn_type = context.type_k = context.type_v = 0
        self.state = need(lib.llama_init_from_model(model, context), "making a context")
        self.vocabulary = lib.llama_model_get_vocab(model)
        self.size = lib.llama_vocab_n_tokens(self.vocabulary)
        self.batch = lib.llama_batch_init(step, 0, 1)

    def feed(self, tokens: Sequence[tuple[int, int, int]]) -> None:
        """Compute the logits of (sequence, position, token)s."""
        batch = self.batch
        batch.n_tokens = len(tokens)
        for i, (sequence, position, token) in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, position, 1, 1
            batch.seq_id[i][0] = sequence
        if status := lib.llama_decode(self.state, batch):
            sys.exit(f"error: llama_decode returned {status}: {' '.join(errors)}")
        lib.llama_synchronize(self.state)

    def logits(self, count: int) -> np.ndarray:
        """(count, vocabulary) float32 of the tokens that were fed last."""
        buffer = ffi.buffer(lib.llama_get_logits(self.state), 4 * count * self.size)
        return np.frombuffer(buffer, dtype=np.float32).reshape(count, self.size)

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
    T = len(ids)
    model = Model(request["model"], request["threads"], sequences=1, length=T, step=T, chunk=T, exact=True)
    made = [model.tokens(text) for text in request["texts"]]
    model.feed([(0, position, token) for position, token in enumerate(ids)])
    np.save(request["logprobs"], log_softmax(model.logits(T).astype(np.float64), axis=1).astype(np.float32))
    return made


def measure(request: dict[str, Any]) -> float:
    """Mean negative log-likelihood over windows, each alone in the context."""
    windows = request["windows"]
    T, total = len(windows[0]), 0.0
    model = Model(request["model"], request["threads"], sequences=1, length=T, step=T, chunk=T, exact=True)
    for ids in windows:
        lib.llama_memory_clear(lib.llama_get_memory(model.state), True)
        model.feed([(0, position, token) for position, token in enumerate(ids)])
        logprobs = log_softmax(model.logits(T)[:-1].astype(np.float64), axis=1)
        total -= logprobs[np.arange(T - 1), ids[1:]].sum()
    return total / (len(windows) * (T - 1))


def quantise(request: dict[str, Any]) -> None:
    """Write another file, its matrices quantised by llama.cpp; rows too short for a type's blocks get a larger type."""
    settings = lib.llama_model_quantize_default_params()
    settings.ftype = getattr(lib, f"LLAMA_FTYPE_MOSTLY_{request['type']}")
    settings.nthread = request["threads"]
    if lib.llama_model_quantize(request["model"].encode(), request["output"].encode(), ffi.addressof(settings)):
        sys.exit(f"error: llama_model_quantize failed: {' '.join(errors)}")


def speed(request: dict[str, Any]) -> dict[str, dict[str, list[float]]]:
    """Seconds of every model and round; tokens are 3, 4, 5, ..., which costs what text costs."""
    B, T, N = request["batch"], request["seq_len"], request["new_tokens"]

    def turn(model: Model) -> tuple[float, float]:
        """Seconds of prefill, and of `new_tokens` steps after it."""

        def feed(start: int, count: int) -> None:
            places = [(sequence, start + at) for sequence in range(B) for at in range(count)]
            model.feed([(s, position, 3 + position % (model.size - 3)) for s, position in places])

        lib.llama_memory_clear(lib.llama_get_memory(model.state), True)
        start = time.perf_counter()
        feed(0, T)
        middle = time.perf_counter()
        for step in range(N):
            feed(T + step, 1)
        return middle - start, time.perf_counter() - middle

    sizes = {"sequences": B, "length": T + N, "step": B * T, "chunk": min(B * T, 512), "exact": False}
    models = {name: Model(path, request["threads"], **sizes) for name, path in request["models"].items()}
    found: dict[str, dict[str, list[float]]] = {"prefill": {}, "decode": {}}
    for number in range(-1, request["repeats"]):  # the first round does not count
        for name in list(models)[:: -1 if number % 2 else 1]:
            for kind, seconds in zip(found, turn(models[name]), strict=True):
                if number >= 0:
                    found[kind].setdefault(name, []).append(seconds)
    return found


def main(request_file: str) -> None:
    """Answer one request, a JSON file, on standard output."""
    request = json.loads(Path(request_file).read_text(encoding="utf-8"))
    lib.llama_log_set(log, ffi.NULL)
    lib.llama_backend_init()
    answer = {"score": score, "speed": speed, "measure": measure, "quantise": quantise}[request["work"]](request)
    Path(request["answer"]).write_text(json.dumps(answer), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
