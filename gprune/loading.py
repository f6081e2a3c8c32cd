"""Models by name: found, refused before anything is loaded, loaded frozen, and told apart by content."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
from torch import Tensor
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_MAPPING_NAMES

from gprune import assets, modeling_pruned
from gprune.errors import UserError
from gprune.families import FAMILIES, Family, family_of


def register() -> None:
    """Let the Auto classes load what we export without remote code. Calling it again changes nothing."""
    for family in FAMILIES:
        config, base, causal = pruned_classes(family)
        AutoConfig.register(config.model_type, config, exist_ok=True)
        AutoModel.register(config, base, exist_ok=True)
        AutoModelForCausalLM.register(config, causal, exist_ok=True)


def pruned_classes(family: str) -> tuple[type[PreTrainedConfig], type[PreTrainedModel], type[PreTrainedModel]]:
    """The pruned config, base model and causal language model of a family."""
    stock = CONFIG_MAPPING[family].__name__, MODEL_MAPPING_NAMES[family], MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family]
    return tuple(getattr(modeling_pruned, f"Pruned{name}") for name in stock)


@torch.no_grad()
def fingerprint(model: PreTrainedModel) -> str:
    """SHA-256 (16 hex digits) over names, shapes, dtypes and bytes of all parameters, and the configuration.

    Two models with the same fingerprint give the same statistics; caches are keyed by it.
    """
    settings = model.config.to_diff_dict()
    for place in ("_name_or_path", "transformers_version"):  # where a model lies does not change what it computes
        settings.pop(place, None)
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    for name, parameter in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        digest.update(as_bytes(parameter))
    return digest.hexdigest()[:16]


def as_bytes(tensor: Tensor) -> memoryview:
    """The raw bytes of a tensor, of any dtype, without a copy where it is contiguous on the CPU."""
    return memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())


def locate_model(name: str) -> str:
    """An embedded name becomes the folder it is cached in; a folder or a hub id stays what it is.

    Raises:
        UserError: for a folder without `config.json`, or a name that is neither embedded, a folder nor `owner/name`.
    """
    if name in assets.EMBEDDED_MODELS:
        return str(assets.embedded_model_dir(name))
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UserError(
                f"--model.name: folder '{name}' holds no config.json; expected a Hugging Face model folder."
            )
        return str(path)
    if path.exists() or name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise UserError(
            f"--model.name: '{name}' is neither an embedded model ({', '.join(assets.EMBEDDED_MODELS)}), "
            f"nor a model folder, nor a hub id 'owner/name'."
        )
    return name


def check_family(name: str, *, trust_remote_code: bool = False) -> Family:
    """Read the configuration alone, refuse what is not supported, and return the family's record.

    Raises:
        UserError: for an unsupported family, or a configuration that cannot be had.
    """
    location = locate_model(name)
    register()  # for a family whose record came after the import
    try:
        config = AutoConfig.from_pretrained(location, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"--model.name: no usable configuration for '{name}': {str(error).splitlines()[0]} "
            f"Expected a Hugging Face causal language model; without network use an embedded model or a local folder."
        ) from error
    return family_of(config.model_type)


def load_model(
    name: str,
    *,
    dtype: torch.dtype = torch.float32,
    device_map: str | None = None,
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a frozen causal language model and its tokenizer.

    Args:
        name: embedded name, local folder or hub id.
        dtype: dtype of the weights.
        device_map: handed to transformers as it is.
        trust_remote_code: run code that comes with the model; off unless asked for.

    Returns:
        The model in eval mode without gradients, and the tokenizer.

    Raises:
        UserError: before any weight is read, for an unsupported family; later, for weights that cannot be read.
    """
    check_family(name, trust_remote_code=trust_remote_code)
    location = locate_model(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(location, trust_remote_code=trust_remote_code)
        model = AutoModelForCausalLM.from_pretrained(
            location, dtype=dtype, device_map=device_map, trust_remote_code=trust_remote_code
        )
    except Exception as error:  # safetensors, tokenizers and the hub each raise their own
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"--model.name: '{name}' cannot be loaded: {first}") from error
    return model.eval().requires_grad_(False), tokenizer
