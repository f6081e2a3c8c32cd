"""Logits of an exported folder, computed by a process that knows nothing of gprune.

Run by path, `python -P reload.py`, in a process that never imports gprune: what it proves is that the folder stands on
its own, with its modelling file, on transformers alone. The request, JSON on stdin, holds `folder`, `tokens` and
`logits` (safetensors files to read and to write), `device`, `load` (arguments of `from_pretrained`; `max_memory` as
pairs), and `threads`: as many as the caller has, since the order of a sum decides its last bits.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText


def aligned(model: torch.nn.Module) -> None:
    """Move weights on the CPU to where memory is aligned, as a mapped file's are not.

    The last bits of a product of one row, which an expert with one token is, depend on where the matrix begins.
    """
    for p in model.parameters():
        if p.device.type == "cpu" and p.data_ptr() % 64:
            p.data = p.data.clone()


def main(request: dict[str, Any]) -> None:
    """Load an exported folder and write the logits that the request asks for."""
    torch.set_num_threads(request["threads"])
    settings = request["load"]
    if settings["max_memory"] is not None:
        settings["max_memory"] = dict(settings["max_memory"])
    config = AutoConfig.from_pretrained(request["folder"], trust_remote_code=True)
    known = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING or "AutoModelForCausalLM" in getattr(config, "auto_map", {})
    auto = AutoModelForCausalLM if known else AutoModelForImageTextToText
    model = auto.from_pretrained(request["folder"], dtype="auto", trust_remote_code=True, **settings)
    model.eval()
    if settings.get("device_map") is None:
        model = model.to(request["device"])
    aligned(model)
    tokens = load_file(request["tokens"])["input_ids"].to(request["device"])
    with torch.inference_mode():
        logits = model(tokens, use_cache=False).logits
    save_file({"logits": logits.cpu().contiguous()}, request["logits"])


if __name__ == "__main__":
    main(json.load(sys.stdin))
    assert "gprune" not in sys.modules, "the folder needs gprune to load"
