"""Consumers, each a process: what they compute of a file, beside the model in memory.

Run by path, `python -P readers.py REQUEST.json`, it is the consumer that reads a folder or an ONNX graph.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
VLLM = ROOT / "experiments" / "vllm_check.py"
# Largest |difference| allowed; GGUF files have `gprune.export.gguf_check.LIMITS`, vLLM has that of `vllm_check.py`.
SAME, IN_ONNX = 1e-4, 2e-3
MINUTES = 20  # for one consumer


class FailedError(Exception):
    """A consumer that is there does not read the file."""


def reader(request_file: str) -> None:
    """Run by path, without gprune unless asked: logits of a file, as transformers or onnxruntime computes them."""
    import torch
    from safetensors.torch import load_file, save_file

    request = json.loads(Path(request_file).read_text(encoding="utf-8"))
    torch.set_num_threads(request["threads"])
    ids = load_file(request["reference"])["ids"][None]
    if request["kind"] == "onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(f"{request['file']}/model.onnx", providers=["CPUExecutionProvider"])
        inputs = {"input_ids": ids.numpy(), "attention_mask": torch.ones_like(ids).numpy()}
        logits = torch.from_numpy(session.run(["logits"], inputs)[0])
    else:
        if request["kind"] == "gprune":
            import gprune

            gprune.register()
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(
            request["file"], dtype=torch.float32, trust_remote_code=request["kind"] == "remote code"
        )
        with torch.inference_mode():
            logits = model.eval()(ids, use_cache=False).logits
        assert request["kind"] == "gprune" or "gprune" not in sys.modules
    save_file({"logits": logits[0].contiguous()}, request["answer"])


def with_reader(kind: str) -> Callable[[Path, Path | None], dict]:
    """Figures from `reader`: `kind` is stock, remote code, gprune or onnx."""

    def read(file: Path, overlay: Path | None) -> dict:
        from safetensors.torch import load_file

        with tempfile.TemporaryDirectory(prefix="gprune-formats-") as scratch:
            answer = Path(scratch) / "answer.safetensors"
            content = {"kind": kind, "file": str(file), "reference": str(reference_of(file)), "answer": str(answer)}
            ask(__file__, content, overlay, scratch, own_code=kind == "gprune")
            expected, got = load_file(reference_of(file)), load_file(answer)["logits"]
        difference = float((expected["logits"] - got.float()).abs().max())
        same = difference <= (IN_ONNX if kind == "onnx" else SAME)  # NaN is not
        found = figures(expected, got.double().log_softmax(-1))
        return found | {"difference": difference, "of": "logits", "result": "ok" if same else "OFF"}

    return read


def with_llama_cpp(type: str) -> Callable[[Path, Path | None], dict]:
    """Figures from llama.cpp, computed by the script that also checks exports."""

    def read(file: Path, overlay: Path | None) -> dict:
        import numpy as np
        import torch
        from safetensors.torch import load_file

        from gprune.export.gguf_check import LIMITS

        expected = load_file(reference_of(file))
        with tempfile.TemporaryDirectory(prefix="gprune-formats-") as scratch:
            content = {"work": "score", "model": str(file), "ids": expected["ids"].tolist(), "texts": []}
            content |= {"answer": f"{scratch}/answer.json", "logprobs": f"{scratch}/logprobs.npy"}
            ask(f"{ROOT}/gprune/export/llamacpp.py", content, overlay, scratch)
            found = figures(expected, torch.from_numpy(np.load(content["logprobs"])).double())
        limits = LIMITS[type]
        fine = found["kl"] <= limits.kl and found["top1"] >= limits.top1 and found["difference"] <= limits.logprob
        return found | {"result": "ok" if fine else "OFF"}

    return read


def with_vllm(file: Path, python: Path) -> dict:
    """Figures from `vllm_check.py`, run by the Python of the environment that has vLLM."""
    with tempfile.TemporaryDirectory(prefix="gprune-formats-") as scratch:
        command = [str(python), "-I", str(VLLM), str(file), str(reference_of(file, "json"))]
        out = child(command, None, scratch)
    found = json.loads(out.strip().splitlines()[-1])
    return {
        "difference": found["difference"], "of": "log-probabilities", "top1": found["top1"], "result": "ok",
        "perplexity": found["perplexity"], "expected": found["perplexity_of_reference"],
        "positions": found["tokens"], "consumer": f"vLLM {found['vllm']}, {found['class']}",
    }  # fmt: skip


def reference_of(file: Path, kind: str = "safetensors") -> Path:
    return file.parent / f"reference.{kind}"


def figures(expected: dict, got) -> dict:
    """What `gprune.export.gguf_check.compare` says of (positions, vocabulary) log-probabilities."""
    from gprune.export.gguf_check import compare

    found = compare(expected["logits"].double().log_softmax(-1), got, expected["ids"])
    return {
        "difference": found.logprob, "of": "log-probabilities", "kl": found.kl, "top1": found.top1,
        "perplexity": found.perplexity_of_file, "expected": found.perplexity, "positions": found.positions,
    }  # fmt: skip


def ask(script: str, content: dict, overlay: Path | None, scratch: str, *, own_code: bool = False) -> None:
    """Run a script on a request; it writes its answer where the content says. Other arguments as for `child`."""
    request = Path(scratch) / "request.json"
    threads = int(os.environ.get("OMP_NUM_THREADS", "1"))
    request.write_text(json.dumps(content | {"threads": threads}), encoding="utf-8")
    child([sys.executable, "-P", script, str(request)], overlay, scratch, own_code=own_code)


def child(command: list[str], overlay: Path | None, cwd: str, *, own_code: bool = False) -> str:
    """Run a consumer; returns its stdout.

    Args:
        command: what to run.
        overlay: folder of packages that go before those installed.
        cwd: where.
        own_code: whether it imports gprune.

    Raises:
        FailedError: with what it said last.
    """
    paths = [str(path) for path in (overlay, ROOT if own_code else None, os.environ.get("PYTHONPATH")) if path]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": f"{cwd}/modules", "DO_NOT_TRACK": "1"}
    environment |= {"PYTHONPATH": os.pathsep.join(paths)} if paths else {}
    try:
        done = subprocess.run(
            command, cwd=cwd, env=environment, capture_output=True, text=True, errors="replace", check=False,
            timeout=60 * MINUTES,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise FailedError(f"nothing after {MINUTES} minutes") from error
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or [f"exit code {done.returncode}"]
        raise FailedError(lines[-1].strip())
    return done.stdout


if __name__ == "__main__":
    reader(sys.argv[1])
