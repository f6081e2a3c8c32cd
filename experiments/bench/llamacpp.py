"""Seconds that llama.cpp takes for prefill and decoding of several GGUF files, in turn.

Run by path, `python -P llamacpp.py REQUEST.json`, never imported: llama.cpp ends the process where it finds something
wrong, and brings threads of its own. REQUEST.json holds `models` (path by name), `batch`, `seq_len`, `new_tokens`,
`repeats`, `threads`, and `answer`, the JSON file to write: seconds by `prefill` or `decode`, model and round.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any


class Model:
    """One file in a context for `batch` sequences; tokens are 3, 4, 5, ..., which costs what text costs."""

    def __init__(self, path: str, request: dict[str, Any]):
        from llama_cpp_py_sync._cffi_bindings import get_ffi, get_lib

        self.ffi, self.lib = get_ffi(), get_lib()
        self.B, self.T, self.N = request["batch"], request["seq_len"], request["new_tokens"]
        settings = self.lib.llama_model_default_params()
        settings.n_gpu_layers = 0
        model = self.lib.llama_model_load_from_file(path.encode(), settings)
        context = self.lib.llama_context_default_params()
        context.n_seq_max = self.B
        context.n_ctx = self.B * (self.T + self.N)
        context.n_batch, context.n_ubatch = self.B * self.T, min(self.B * self.T, 512)
        context.n_threads = context.n_threads_batch = request["threads"]
        if model == self.ffi.NULL:
            sys.exit(f"error: {path} does not load")
        self.state = self.lib.llama_init_from_model(model, context)
        if self.state == self.ffi.NULL:
            sys.exit(f"error: no context for {path}")
        self.memory = self.lib.llama_get_memory(self.state)
        self.size = self.lib.llama_vocab_n_tokens(self.lib.llama_model_get_vocab(model))
        self.batch = self.lib.llama_batch_init(self.B * self.T, 0, 1)

    def feed(self, start: int, count: int) -> None:
        """Positions start .. start + count of every sequence, with their logits."""
        places = [(sequence, start + at) for sequence in range(self.B) for at in range(count)]
        self.batch.n_tokens = len(places)
        for i, (sequence, position) in enumerate(places):
            self.batch.token[i], self.batch.pos[i] = 3 + position % (self.size - 3), position
            self.batch.n_seq_id[i], self.batch.logits[i] = 1, 1
            self.batch.seq_id[i][0] = sequence
        if status := self.lib.llama_decode(self.state, self.batch):
            sys.exit(f"error: llama_decode returned {status}")
        self.lib.llama_synchronize(self.state)

    def seconds(self) -> tuple[float, float]:
        """Of prefill, and of `new_tokens` steps after it."""
        self.lib.llama_memory_clear(self.memory, True)
        start = time.perf_counter()
        self.feed(0, self.T)
        middle = time.perf_counter()
        for step in range(self.N):
            self.feed(self.T + step, 1)
        return middle - start, time.perf_counter() - middle


def main(request_file: str) -> None:
    request = json.loads(Path(request_file).read_text(encoding="utf-8"))
    models = {name: Model(path, request) for name, path in request["models"].items()}
    found: dict[str, dict[str, list[float]]] = {"prefill": {}, "decode": {}}
    for turn in range(-1, request["repeats"]):  # the first round does not count
        for name in list(models)[:: -1 if turn % 2 else 1]:
            for kind, value in zip(found, models[name].seconds(), strict=True):
                if turn >= 0:
                    found[kind].setdefault(name, []).append(value)
    Path(request["answer"]).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
