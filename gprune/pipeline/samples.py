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

    Of the model's own generation config, which may ask for beams or penalties, special tokens alone are used.
    """
    own, ids = model.generation_config, ids.to(device_of(model))
    settings = {"max_new_tokens": tokens, "do_sample": False, "use_cache": True}
    model.generation_config = GenerationConfig(**settings, **special_tokens(model))  # `generate` fills up from it
    try:
        return model.generate(ids, attention_mask=torch.ones_like(ids))[:, ids.shape[1] :].cpu()
    finally:
        model.generation_config = own


def special_tokens(model: PreTrainedModel) -> dict[str, int | list[int]]:
    """Ids at which the model begins and ends text, and of its padding: those that are in its vocabulary."""
    vocabulary, known = range(model.get_input_embeddings().num_embeddings), {"pad_token_id": 0}
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = getattr(model.generation_config, name)
        if ids := [i for i in (value if isinstance(value, list) else [value]) if type(i) is int and i in vocabulary]:
            known[name] = ids if name == "eos_token_id" else ids[0]
    return known
