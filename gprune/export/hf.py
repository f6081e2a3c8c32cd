"""A pruned Llama as a Hugging Face folder that loads in one line, with or without gprune.

Where all blocks have the same shape the folder is a stock Llama and needs nobody's code. Else it holds safetensors, a
config.json with the table `per_layer_config`, and the modelling file `modeling_pruned_llama.py`, so
`AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)` works wherever transformers does; after
`register()`, which `import gprune` calls, it works without remote code. An export counts only after `check_reload`: a
fresh process must get the logits of the model in memory out of it.
"""

from __future__ import annotations

import copy
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import uuid
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from gprune.architectures import blocks_of
from gprune.errors import UserError
from gprune.export import EXPORTABLE, swapping
from gprune.export.modeling_pruned_llama import PrunedLlamaConfig, PrunedLlamaForCausalLM, PrunedLlamaModel

log = logging.getLogger("gprune")

# Set anew by the exported class, or of no meaning for it (a de-quantised GGUF still names its quantiser).
NOT_CARRIED = {
    *("model_type", "architectures", "auto_map", "per_layer_config", "quantization_config"),
    *("rope_theta", "rope_scaling", "transformers_version", "_name_or_path"),
}
DEFAULT_CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags: [pruned, gprune]
---
A structurally pruned language model. Where its layers differ in width, config.json has a table `per_layer_config`.

```python
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("path/to/this/folder", trust_remote_code=True)
```
"""


def register() -> None:
    """Let the Auto classes load `pruned_llama` without remote code. Calling it again changes nothing."""
    AutoConfig.register("pruned_llama", PrunedLlamaConfig, exist_ok=True)
    AutoModel.register(PrunedLlamaConfig, PrunedLlamaModel, exist_ok=True)
    AutoModelForCausalLM.register(PrunedLlamaConfig, PrunedLlamaForCausalLM, exist_ok=True)


def pruned_config(model: PreTrainedModel) -> PrunedLlamaConfig:
    """The model's config with the true widths of its weights, as `per_layer_config` where they differ.

    Raises:
        UserError: for a model that is no Llama.
    """
    if model.config.model_type not in EXPORTABLE:
        raise UserError(
            f"Export: expected model_type {' or '.join(EXPORTABLE)} for a Hugging Face folder, "
            f"got '{model.config.model_type}'."
        )
    blocks = blocks_of(model)
    table = {
        str(block.index): {
            "intermediate_size": block.neurons,
            "num_attention_heads": block.output.in_features // block.head_dim,
            "num_key_value_heads": block.kv_groups,
            "o_proj_bias": block.output.bias is not None,
            "down_proj_bias": block.down.bias is not None,
        }
        for block in blocks
    }
    shared = {key: value for key, value in model.config.to_dict().items() if key not in NOT_CARRIED}
    shared |= {name: table["0"][name] for name in ("o_proj_bias", "down_proj_bias")}
    shared |= {"head_dim": blocks[0].head_dim, "dtype": model.dtype}
    for values in table.values():  # only what differs
        for name in [name for name, value in values.items() if value == shared[name]]:
            del values[name]
    return PrunedLlamaConfig(
        **shared,
        per_layer_config={index: values for index, values in table.items() if values},
        architectures=["PrunedLlamaForCausalLM"],
        attn_implementation=model.config._attn_implementation,
    )


def stock_config(model: PreTrainedModel) -> LlamaConfig | None:
    """The config of a stock Llama in the shapes of the model; None where blocks differ or Llama cannot say how."""
    blocks = blocks_of(model)
    shapes = {(b.neurons, b.output.in_features // b.head_dim, b.kv_groups) for b in blocks}
    attention = {part.bias is not None for b in blocks for part in (b.query, b.key, b.value, b.output)}
    ffn = {part.bias is not None for b in blocks for part in (b.gate, b.up, b.down)}
    neurons, heads, groups = next(iter(shapes))
    if len(shapes) > 1 or len(attention) > 1 or len(ffn) > 1 or model.config.hidden_size % heads:
        return None
    own = {"o_proj_bias", "down_proj_bias"}
    shared = {key: value for key, value in model.config.to_dict().items() if key not in NOT_CARRIED | own}
    shared |= {"intermediate_size": neurons, "num_attention_heads": heads, "num_key_value_heads": groups}
    shared |= {"attention_bias": attention.pop(), "mlp_bias": ffn.pop()}
    shared |= {"head_dim": blocks[0].head_dim, "dtype": model.dtype, "architectures": ["LlamaForCausalLM"]}
    return LlamaConfig(**shared, attn_implementation=model.config._attn_implementation)


def to_exportable(model: PreTrainedModel) -> LlamaForCausalLM:
    """The same network as the class that is saved. Weights are shared with `model`, not copied.

    Args:
        model: LlamaForCausalLM with sliced blocks, or a PrunedLlamaForCausalLM, pruned again or not.

    Raises:
        UserError: for another family.
    """
    pruned = pruned_config(model)  # also refuses other families
    stock = stock_config(model)
    with torch.device("meta"):
        exportable = PrunedLlamaForCausalLM(pruned) if stock is None else LlamaForCausalLM(stock)
    exportable.load_state_dict(model.state_dict(), strict=True, assign=True)
    exportable.tie_weights()
    # Rotary frequencies are not in the state dict; theirs is the config without per-layer values.
    rotary, source = exportable.get_decoder().rotary_emb, model.get_decoder().rotary_emb
    exportable.get_decoder().rotary_emb = copy.deepcopy(source)
    exportable.get_decoder().rotary_emb.config = rotary.config
    needs_gradient = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    for name, parameter in exportable.named_parameters():
        parameter.requires_grad_(needs_gradient[name])
    exportable.generation_config = copy.deepcopy(model.generation_config)
    return exportable.train(model.training)


def save_pruned(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    folder: str | Path,
    *,
    model_card: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Write config, modelling file, weights, generation config, tokenizer and README.md, all or nothing.

    Args:
        model: as for `to_exportable`.
        tokenizer: saved along; None leaves it out.
        folder: must not exist, unless `overwrite` and it is a model folder.
        model_card: text of README.md; a short default otherwise.
        overwrite: replace a model folder; the old one stays until the new one is complete.

    Returns:
        The absolute path of the folder.

    Raises:
        UserError: folder taken, not writable or full; family that has no such export.
    """
    folder = Path(folder).expanduser().resolve()
    if folder.exists() and not overwrite:
        raise UserError(f"Export: '{folder}' exists already. Choose another folder, or ask for overwriting.")
    if folder.exists() and not (folder / "config.json").is_file():
        raise UserError(f"Export: '{folder}' is no model folder (no config.json), so it is not overwritten.")
    exportable = to_exportable(model)
    try:
        with swapping(folder, mark=f"{uuid.uuid4().hex[:8]}.new") as new:
            new.mkdir(parents=True)
            exportable.save_pretrained(new)
            if tokenizer is not None:
                tokenizer.save_pretrained(new)
            (new / "README.md").write_text(DEFAULT_CARD if model_card is None else model_card, encoding="utf-8")
    except (OSError, SafetensorError) as error:
        raise UserError(f"Export: cannot write '{folder}': {error}") from error
    log.info("wrote %s", folder)
    return folder


def reloaded_logits(
    folder: str | Path, input_ids: Tensor, *, device: str = "cpu", attention: str | None = None
) -> Tensor:
    """Logits of the folder's model, computed in a fresh process without gprune and without network.

    Args:
        folder: exported model.
        input_ids: (B, T) int64.
        device: where the fresh process computes.
        attention: attention implementation of transformers; None for its default.

    Returns:
        (B, T, vocabulary) logits on the CPU, in the dtype of the weights.

    Raises:
        UserError: with the last line of what the process wrote to stderr.
    """
    script = Path(__file__).with_name("reload.py")
    with tempfile.TemporaryDirectory(prefix="gprune-reload-") as scratch:
        request, tokens, logits = (Path(scratch) / name for name in ("request.json", "tokens", "logits"))
        save_file({"input_ids": input_ids.detach().cpu().contiguous()}, tokens)
        settings = {"folder": str(Path(folder).absolute()), "tokens": str(tokens), "logits": str(logits)}
        settings |= {"device": device, "attention": attention, "threads": torch.get_num_threads()}
        request.write_text(json.dumps(settings), encoding="utf-8")
        # A cache of its own for the copied modelling file: two checks at once must not share one.
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": f"{scratch}/modules"}
        command = [sys.executable, "-P", str(script), str(request)]  # -P: none of our folders on its path
        done = subprocess.run(command, cwd=scratch, env=environment, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
            raise UserError(f"Export: '{folder}' does not load in a fresh process: {last}")
        return load_file(logits)["logits"]


def max_logit_difference(a: Tensor, b: Tensor) -> float:
    """max |a - b| in float32; NaN if either holds one. Shapes must agree."""
    assert a.shape == b.shape, f"{tuple(a.shape)} against {tuple(b.shape)}"
    return (a.detach().float().cpu() - b.detach().float().cpu()).abs().max().item()


@torch.no_grad()
def check_reload(model: PreTrainedModel, folder: str | Path, input_ids: Tensor, atol: float = 0.0) -> float:
    """Compare the model in memory with what a fresh process reads from the folder.

    An export that fails, or that was interrupted before it was compared, is removed: no folder is left that
    nobody has checked.

    Args:
        model: the pruned model that was saved.
        folder: where it was saved.
        input_ids: (B, T) int64.
        atol: largest |difference of logits| allowed; 0.0 asks for the same bits.

    Returns:
        max |difference of logits|.

    Raises:
        UserError: when it exceeds `atol` or is not finite, or when the folder does not load.
    """
    training = model.training
    try:
        expected = model.eval()(input_ids.to(model.device), use_cache=False).logits
        got = reloaded_logits(folder, input_ids, device=str(model.device), attention=model.config._attn_implementation)
        difference = max_logit_difference(expected, got)
        if not difference <= atol:  # also true of NaN
            raise UserError(
                f"Export: expected reloaded logits within {atol} of the pruned model's, got {difference}; "
                f"'{folder}' was removed. Check the disk and export again."
            )
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    finally:
        model.train(training)
    return difference
