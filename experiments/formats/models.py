"""The models that every consumer reads, as folders, and what the models in memory compute."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import gprune
from gprune.calibration.collector import collect
from gprune.export import hf
from gprune.export.gguf_check import CHECK_TEXT
from gprune.importance.scores import score_units
from gprune.models.blocks import blocks_of
from gprune.models.loading import load_model
from gprune.models.masks import Masks
from gprune.sparsity.budget import Budget, unit_costs
from gprune.sparsity.cut import keep_masks

from ..vllm_check import content_of

MODELS = {"ffn": (False, False), "ffn+kv": (False, True), "uniform": (True, False)}  # one width; KV groups gone
SPARSITY, WIDTH_MULTIPLE, TOKENS = 0.3, 32, 433


def make(work: Path, *, small: bool) -> None:
    """Every model as a folder, with what it computes; those that are complete stay."""
    wanted = [name for name in MODELS if not (work / name / "reference.json").exists()]
    if not wanted:
        return
    dense, tokenizer, ids = tiny() if small else embedded()
    for name in wanted:
        shutil.rmtree(work / name, ignore_errors=True)
        model = pruned(dense, ids, *MODELS[name])
        hf.save_pruned(model, tokenizer, work / name / "hf")
        hf.check_reload(model, work / name / "hf", ids)
        write_reference(model, ids, work / name)


def embedded():
    """SmolLM2-135M, its tokenizer, and (1, T) tokens of the text that GGUF files are checked with."""
    model, tokenizer = load_model("smollm2-135m")
    return model, tokenizer, tokenizer(CHECK_TEXT, return_tensors="pt").input_ids[:, :TOKENS]


def tiny():
    """The same of a random model over bytes."""
    alphabet = {character: i for i, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(BPE(vocab=alphabet | {"<end>": 256}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=264, hidden_size=64, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=128, initializer_range=0.2,
        tie_word_embeddings=True, bos_token_id=256, eos_token_id=256,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<end>", eos_token="<end>")
    return model, tokenizer, torch.randint(256, (1, 48))


def pruned(dense, ids, uniform: bool, groups: bool):
    """`SPARSITY` of the FFN gone, in widths that random offsets (seed 0) make differ by block unless `uniform`.

    What goes is what `wanda_sp` ranks lowest on the very text of the check: entirely random masks leave a model that
    finds all tokens equally likely, and such a model hides errors. With `groups`, every third block loses the lowest
    of its KV groups too.
    """
    half = ids[:, : ids.shape[1] // 2 * 2].view(2, -1)
    blocks, generator = blocks_of(dense), torch.Generator().manual_seed(0)
    scores = score_units("wanda_sp", blocks, collect(dense, [{"input_ids": half, "index": torch.arange(2)}]))
    budget = Budget.of(unit_costs(blocks, scope="ffn", uniform=uniform), SPARSITY, WIDTH_MULTIPLE)
    margins = [(s / s.mean()).log() + torch.randn(1, generator=generator) / 4 for s in scores.ffn]
    masks = keep_masks(budget, margins)
    if groups:
        lost = [int(s.argmin()) if b.index % 3 == 1 else -1 for b, s in zip(blocks, scores.attention, strict=True)]
        masks = Masks(masks.ffn, [torch.arange(b.kv_groups) != gone for b, gone in zip(blocks, lost, strict=True)])
    return gprune.apply_masks(dense, masks)


def write_reference(model, ids, folder: Path) -> None:
    """What the model in memory computes: logits for those who give logits, and JSON for `vllm_check.py`."""
    with torch.inference_mode():
        logits = model(ids, use_cache=False).logits[0]
    save_file({"ids": ids[0], "logits": logits.contiguous()}, folder / "reference.safetensors")
    (folder / "reference.json").write_text(json.dumps(content_of(ids[0].tolist(), logits)), encoding="utf-8")
