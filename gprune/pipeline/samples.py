"""What the dense and the pruned model write after the same prompts."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from gprune.models.offload import device_of, is_offloaded
from gprune.pipeline.cost import sample_lengths
from gprune.pipeline.run import Run
from gprune.runs import schema
from gprune.storage.files import read_json, write_json


def write_samples(run: Run, pruned: PreTrainedModel, seen: dict[str, bool]) -> None:
    """Write `samples.json`, unless it is there with as many rows; not for offloaded models, which are too slow.

    A prompt is the beginning of an evaluated corpus's first window; the last corpora by default are unseen ones.

    Args:
        seen: by corpus.
    """
    prompts, prompt, more = sample_lengths(run.cfg)
    path = run.folder / "samples.json"
    if not prompts or is_offloaded(run.model) or is_offloaded(pruned):
        return
    there = read_json(path, run=run.folder.key, check=schema.Samples.problem)
    if there is not None and len(there["rows"]) == prompts:
        return
    run.step(10, "Writing samples")
    windows = run.text.test[-prompts:]
    ids = torch.stack([w.tokens[0, :prompt] for w in windows])
    with run.folder.step("samples"):
        written = [continued(model, ids, more) for model in (run.model, pruned)]
    real = torch.stack([w.tokens[0, prompt : prompt + more] for w in windows])
    columns = [run.tokenizer.batch_decode(part, skip_special_tokens=True) for part in (ids, *written, real)]
    rows = [
        {"corpus": w.corpus, "seen": seen[w.corpus], "prompt": begun, "dense": dense, "pruned": small, "text": text}
        for w, begun, dense, small, text in zip(windows, *columns, strict=True)
    ]
    write_json(path, {"split": windows[0].split, "rows": rows}, run=run.folder.key)


@torch.no_grad()
def continued(model: PreTrainedModel, ids: Tensor, tokens: int) -> Tensor:
    """(B, at most `tokens`) token ids that the model generates greedily after (B, T) ids.

    Of the model's own generation config, which may ask for beams or penalties, ends of text alone are used.
    """
    own, ids, words = model.generation_config, ids.to(device_of(model)), model.get_input_embeddings().num_embeddings
    ends = own.eos_token_id if isinstance(own.eos_token_id, list) else [own.eos_token_id]
    ends = [token for token in ends if type(token) is int and 0 <= token < words]
    settings = {"max_new_tokens": tokens, "do_sample": False, "eos_token_id": ends or None}
    model.generation_config = GenerationConfig(**settings, pad_token_id=(ends or [0])[0])  # `generate` fills up from it
    try:
        return model.generate(ids, attention_mask=torch.ones_like(ids))[:, ids.shape[1] :].cpu()
    finally:
        model.generation_config = own
