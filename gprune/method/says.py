"""What the model says: how the dense, the pruned and the recovered model continue the prompts of a run."""

from __future__ import annotations

import logging
import textwrap
from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gprune.corpora.windows import Windows, check_tokens
from gprune.errors import optional_output
from gprune.method.run import Run
from gprune.models.offload import device_of, is_offloaded

log = logging.getLogger("gprune")
NEW_TOKENS = 30
WIDTH = 100  # of lines, in characters


def continue_prompts(run: Run, stage: str, model: PreTrainedModel) -> None:
    """Store how the model of a stage continues `--evaluation.prompts`, on rank 0. These tokens are not counted."""
    if rank_zero_only.rank != 0 or not run.cfg.evaluation.prompts:
        return
    if is_offloaded(model):
        log.info("The %s model continues no prompts, because each token would load its offloaded weights", stage)
        return
    counted, texts = run.meter.forward, {}
    with optional_output("what the model says", "--evaluation.prompts '[]' leaves it out"):
        eos = run.model.generation_config.eos_token_id or run.tokenizer.eos_token_id
        for prompt in run.cfg.evaluation.prompts:
            tokens = prompt_tokens(prompt, run.tokenizer)
            embeddings = model.get_input_embeddings().num_embeddings
            check_tokens(Windows("--evaluation.prompts", "", tokens), run.tokenizer, embeddings)
            new = continuation(model, tokens, eos)
            texts[one_line(prompt)] = one_line(run.tokenizer.decode(new, skip_special_tokens=True)) or "(nothing)"
    run.meter.forward = counted
    run.folder.update_manifest(says={stage: texts})


def prompt_tokens(prompt: str, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """Return the tokens (1, T) int64 of a prompt. A question goes through the chat template, if there is one."""
    is_chat = bool(tokenizer.chat_template) and prompt.rstrip().endswith("?")
    if is_chat:
        message = {"role": "user", "content": prompt}
        prompt = tokenizer.apply_chat_template(
            [message], add_generation_prompt=True, tokenize=False, enable_thinking=False
        )
    return torch.tensor([tokenizer(prompt, add_special_tokens=not is_chat)["input_ids"]])


@torch.no_grad()
def continuation(model: PreTrainedModel, prompt: Tensor, eos: int | list[int] | None) -> Tensor:
    """Return the most likely next tokens of a prompt (1, T), one after the other: `NEW_TOKENS`, or up to one of `eos`.

    A prompt that is too long for the model loses its start.
    """
    positions = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    longest = max(1, positions - NEW_TOKENS) if positions else 0  # 0: any length
    ids = prompt[:, -longest:].to(device_of(model))
    settings = {"do_sample": False, "num_beams": 1, "repetition_penalty": 1.0, "eos_token_id": eos, "pad_token_id": 0}
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, **settings)
    return out[0, ids.shape[1] :]


def one_line(text: str) -> str:
    """Return a text on one line: ⏎ for line ends, and spaces for other characters that cannot be printed."""
    marked = "".join(c if c.isprintable() else " " for c in text.strip().replace("\n", " ⏎ "))
    return " ".join(marked.split())


def says_entry(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entry `says` of the summary (see `numbers.entries`), with `texts`: prompt -> stage -> continuation.

    Its lines are indented, so they are a block of code in Markdown. Without continuations there is no entry.
    """
    by_stage = manifest.get("says", {})
    prompts = dict.fromkeys(prompt for of_stage in by_stage.values() for prompt in of_stage)
    texts = {p: {stage: said[p] for stage, said in by_stage.items() if p in said} for p in prompts}
    lines = [f"What the model says (always the most likely next token, at most {NEW_TOKENS}):"]
    for prompt, of_prompt in texts.items():
        lines += ["", textwrap.fill(prompt, WIDTH, initial_indent=" " * 4, subsequent_indent=" " * 4)]
        for stage, text in of_prompt.items():
            lines.append(textwrap.fill(text, WIDTH, initial_indent=f"      {stage:9}  ", subsequent_indent=" " * 17))
    return {"says": {"said": "\n".join([*lines, ""]), "texts": texts}} if texts else {}
