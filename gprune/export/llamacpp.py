"""Log-probabilities of a GGUF file, computed by a llama.cpp build from the package index.

Run by path, `python -P llamacpp.py REQUEST.json`, never imported by gprune: llama.cpp ends the process where it finds
something wrong, and brings threads of its own. REQUEST.json holds `build` (the module to use), `model`, `ids`,
`texts`, `threads`, and two files to write: `logprobs` (.npy, float32, (positions, vocabulary)) and `answer` (JSON),
which says for every text which tokens llama.cpp makes of it, or how many where the build tells no more, or nothing
where the text is longer than the build takes.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

POSITIONS = 64  # of a build that gives one position per call


def llama_cpp_py_sync(request: dict) -> tuple[np.ndarray, list]:
    """The C interface: the whole sequence in one batch."""
    from llama_cpp_py_sync._cffi_bindings import get_ffi, get_lib

    ffi, lib = get_ffi(), get_lib()
    errors = []

    @ffi.callback("void(enum ggml_log_level, const char *, void *)")
    def log(level, text, _):
        if level == 4:  # GGML_LOG_LEVEL_ERROR
            errors.append(ffi.string(text).decode(errors="replace").strip())

    def need(what, name: str):
        if what == ffi.NULL:
            sys.exit(f"{name} failed: {' '.join(errors)}")
        return what

    lib.llama_log_set(log, ffi.NULL)
    lib.llama_backend_init()
    settings = lib.llama_model_default_params()
    settings.n_gpu_layers = 0
    model = need(lib.llama_model_load_from_file(request["model"].encode(), settings), "loading")
    vocabulary = lib.llama_model_get_vocab(model)
    made = []
    for text in request["texts"]:
        data = text.encode()
        room = ffi.new("llama_token[]", len(data) + 16)
        count = lib.llama_tokenize(vocabulary, data, len(data), room, len(data) + 16, True, True)
        made.append([room[i] for i in range(max(count, 0))])
    ids = request["ids"]
    context = lib.llama_context_default_params()
    context.n_ctx = context.n_batch = context.n_ubatch = len(ids)
    context.n_threads = context.n_threads_batch = request["threads"]
    context.flash_attn_type = 0
    context.type_k = context.type_v = 0  # float32: what is checked are the weights, not the cache
    state = need(lib.llama_init_from_model(model, context), "making a context")
    batch = lib.llama_batch_init(len(ids), 0, 1)
    batch.n_tokens = len(ids)
    for i, token in enumerate(ids):
        batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, i, 1, 1
        batch.seq_id[i][0] = 0
    if status := lib.llama_decode(state, batch):
        sys.exit(f"llama_decode returned {status}: {' '.join(errors)}")
    size = lib.llama_vocab_n_tokens(vocabulary)
    logits = np.frombuffer(ffi.buffer(lib.llama_get_logits(state), 4 * len(ids) * size), dtype=np.float32)
    return normalised(logits.reshape(len(ids), size)), made


def xllamacpp(request: dict) -> tuple[np.ndarray, list]:
    """A server in the process, asked for one more token at a time; slow, so only `POSITIONS` of them."""
    import xllamacpp as build

    settings = build.CommonParams()
    settings.model.path = request["model"]
    settings.n_ctx, settings.n_parallel, settings.n_gpu_layers = len(request["ids"]) + 64, 1, 0
    settings.warmup, settings.verbosity = False, -1
    settings.cache_type_k = settings.cache_type_v = build.ggml_type.GGML_TYPE_F32
    settings.flash_attn_type = build.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = request["threads"]
    server = build.Server(settings)

    def ask(prompt, probabilities: int) -> dict:
        question = {"prompt": prompt, "n_predict": 1, "n_probs": probabilities, "cache_prompt": True}
        # What comes next must be a character, or the answer has no probabilities; they are those before the bias.
        question |= {"logit_bias": [[request["ids"][1], 1e4]], "temperature": 0, "post_sampling_probs": False}
        answer = server.handle_completions(question)
        return answer if isinstance(answer, dict) else json.loads(answer)

    rows = []
    for end in range(1, min(len(request["ids"]), POSITIONS) + 1):
        answer = ask(request["ids"][:end], request["vocabulary"])
        row = np.full(request["vocabulary"], -np.inf)
        for entry in answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]:
            row[entry["id"]] = entry["logprob"]
        rows.append(row)
    counts = [ask(text, 0).get("usage", {}).get("prompt_tokens") for text in request["texts"]]
    return normalised(np.stack(rows)), counts


def normalised(logits: np.ndarray) -> np.ndarray:
    """Log-probabilities, (T, vocabulary) float64."""
    logits = logits.astype(np.float64)
    logits -= logits.max(axis=1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


def main(request_file: str) -> None:
    request = json.loads(Path(request_file).read_text(encoding="utf-8"))
    logprobs, tokens = {"llama_cpp_py_sync": llama_cpp_py_sync, "xllamacpp": xllamacpp}[request["build"]](request)
    np.save(request["logprobs"], logprobs.astype(np.float32))
    Path(request["answer"]).write_text(json.dumps(tokens), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
