"""Compute logits of an exported folder without gprune.

This file is run as a script, `python -P reload.py`, in a process that never imports gprune. It shows that the folder
and its modelling file need only transformers. It reads a JSON request from stdin: `folder`, `tokens` and `logits`
(safetensors files to read and to write), `device`, `load` (arguments of `from_pretrained`; `max_memory` as pairs), and
`threads`, the caller's number of threads, because it can change the last bits of sums.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

ALIGNMENT = 64  # bytes, as PyTorch allocates memory on a CPU


def align_weights(model: torch.nn.Module) -> None:
    """Copy CPU weights that are not aligned in memory, such as those of a mapped file.

    The last bits of a matrix product with a single row, such as an expert with one token, depend on alignment.
    """
    for parameter in model.parameters():
        if parameter.device.type == "cpu" and parameter.data_ptr() % ALIGNMENT:
            parameter.data = parameter.data.clone()


def main(request: dict[str, Any]) -> None:
    """Load an exported folder, compute logits of the tokens, and write them to a file."""
    torch.set_num_threads(request["threads"])
    settings = request["load"]
    if settings["max_memory"] is not None:
        settings["max_memory"] = dict(settings["max_memory"])
    config = AutoConfig.from_pretrained(request["folder"], trust_remote_code=True)
    auto_map = getattr(config, "auto_map", {})
    is_causal_lm = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING or "AutoModelForCausalLM" in auto_map
    auto_class = AutoModelForCausalLM if is_causal_lm else AutoModelForImageTextToText
    options = {"dtype": "auto", "trust_remote_code": True, "use_kernels": False}  # the same operations as in the run
    model = auto_class.from_pretrained(request["folder"], **options, **settings)
    model.eval()
    if settings.get("device_map") is None:
        model = model.to(request["device"])
    align_weights(model)
    tokens = load_file(request["tokens"])["input_ids"].to(request["device"])
    with torch.inference_mode():
        logits = model(tokens, use_cache=False).logits
    save_file({"logits": logits.cpu().contiguous()}, request["logits"])


if __name__ == "__main__":
    main(json.load(sys.stdin))
    assert "gprune" not in sys.modules, "the folder needs gprune to load"
