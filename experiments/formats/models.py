"""Folders of the models that consumers load, with reference logits of the models in memory."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import gprune
from gprune.calibration.collector import Collector
from gprune.export import hf
from gprune.importance.scores import score_units
from gprune.models.agreement import CHECK_TEXT
from gprune.models.loading import load_model
from gprune.models.units import units_of
from gprune.sparsity.budget import budget_of
from gprune.sparsity.cut import keep_masks

MODELS = {
    "ffn": (False, False),
    "ffn+kv": (False, True),
    "uniform": (True, False),
}  # equal widths; without some KV groups
SPARSITY, WIDTH_MULTIPLE = 0.3, 32
Dense = tuple[PreTrainedModel, PreTrainedTokenizerBase, Tensor]


def embedded() -> Dense:
    """SmolLM2-135M, its tokenizer, and tokens (1, T) of the text for checking GGUF files."""
    model, tokenizer = load_model("smollm2-135m")
    return model, tokenizer, tokenizer(CHECK_TEXT, return_tensors="pt").input_ids


def make(work: Path, load: Callable[[], Dense]) -> None:
    """Write the folders of all models with their references. Complete folders are kept."""
    missing = [name for name in MODELS if not (work / name / "reference.json").exists()]
    dense, tokenizer, ids = load() if missing else (None, None, None)
    for name in missing:
        folder = work / name
        shutil.rmtree(folder, ignore_errors=True)
        model = pruned(dense, ids, *MODELS[name])
        hf.save_pruned(model, tokenizer, folder / "hf")
        with torch.inference_mode():
            logits = model(ids, use_cache=False).logits[0]
        save_file({"ids": ids[0], "logits": logits.contiguous()}, folder / "reference.safetensors")
        logprobs, tokens = logits[:-1].double().log_softmax(-1), ids[0].tolist()
        own = logprobs[range(len(tokens) - 1), tokens[1:]].tolist()
        content = {"ids": tokens, "logprobs": own, "top1": logprobs.argmax(-1).tolist()}  # the input of `vllm_check`
        (folder / "reference.json").write_text(json.dumps(content), encoding="utf-8")


def pruned(dense: PreTrainedModel, ids: Tensor, uniform: bool, groups: bool) -> PreTrainedModel:
    """Remove `SPARSITY` of the FFN. Random offsets (seed 0) make widths differ between blocks, unless `uniform`.

    Neurons with the lowest `wanda_sp` scores on the text of the check are removed. With random masks, all tokens would
    be equally likely, which would hide errors. With `groups`, every third block also loses the KV group with the lowest
    score.
    """
    halves = ids[:, : ids.shape[1] // 2 * 2].view(2, -1)
    generator = torch.Generator().manual_seed(0)
    with Collector(dense) as collector:
        collector.observe(halves, torch.arange(2))
    scores = score_units("wanda_sp", dense, collector.compute(), scope=("neurons", "kv_groups"))
    budget = budget_of(units_of(dense), SPARSITY, WIDTH_MULTIPLE, uniform=uniform, scope="ffn")
    margins = {}
    for u in budget.of_kind("neurons"):
        s = scores[u.key]
        margins[u.key] = (s / s.mean()).log() + torch.randn(1, generator=generator) / 4
    masks = keep_masks(budget, margins)
    for u in budget.of_kind("kv_groups"):
        if groups and u.number % 3 == 1:
            masks[u.key] = torch.arange(u.count) != scores[u.key].argmin()
    return gprune.apply_masks(dense, masks)
