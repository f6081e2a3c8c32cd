"""Models, masks, tokens and settings of the benchmark. Speed does not depend on the values of weights."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import gprune
from gprune.discovery import family_of
from gprune.errors import UserError
from gprune.models.embedded import model_label
from gprune.models.loading import load_model
from gprune.models.masks import Masks
from gprune.models.units import units_of
from gprune.sparsity.budget import budget_of
from gprune.sparsity.cut import keep_masks
from gprune.storage.paths import expanded

from .measure import machine

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Settings:
    """Settings of a benchmark."""

    model: str = "smollm2-135m"  # or `tiny`, a random Llama
    run: str | None = None
    device: torch.device = torch.device("cpu")  # noqa: RUF009 - immutable
    dtype: torch.dtype = torch.float32
    repeats: int = 5
    seed: int = 0
    sparsity: float = 0.5
    widths: str = "random"  # or `uniform`
    width_multiple: int = 64
    batch_sizes: tuple[int, ...] = (1, 8)
    seq_len: int = 128  # of prefill, and of the prompt before decoding
    new_tokens: int = 16
    clock: str = "wall"  # or `cpu`: CPU time of all threads

    def shrunk(self) -> Settings:
        """Return the settings with tiny shapes, for a smoke test of a few seconds."""
        return replace(self, model="tiny", run=None, repeats=min(self.repeats, 2), seq_len=16, new_tokens=4)

    def protocol(self, model: PreTrainedModel, name: str) -> str:
        """Return the sentence before a table."""
        dtype = str(model.dtype).removeprefix("torch.")
        clock = ", CPU time" if self.clock == "cpu" else ""
        return f"{name}, {dtype}; {machine(self.device)}; calls in turn, median of {self.repeats} rounds{clock}."


def random_llama(*, neurons: int, blocks: int, groups: int = 4, seed: int = 0) -> LlamaForCausalLM:
    """Make a frozen random Llama in float32: hidden size 32, 4 query heads, a vocabulary of 256."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=256, hidden_size=32, intermediate_size=neurons, num_hidden_layers=blocks, num_attention_heads=4,
        num_key_value_heads=groups, head_dim=8, max_position_embeddings=4096, tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def model_of(settings: Settings) -> PreTrainedModel:
    """Load the dense model to its device."""
    if settings.model == "tiny":
        model = random_llama(neurons=256, blocks=2, groups=2, seed=settings.seed).to(settings.dtype)
    else:
        model, _ = load_model(settings.model, dtype=settings.dtype)
        family_of(model)
    return model.to(settings.device)


def random_masks(model: PreTrainedModel, settings: Settings) -> Masks:
    """Draw random masks that remove `sparsity` of the FFN, with equal (`uniform`) or different widths of blocks."""
    uniform = settings.widths == "uniform"
    budget = budget_of(units_of(model), settings.sparsity, settings.width_multiple, uniform=uniform)
    generator = torch.Generator().manual_seed(settings.seed)
    margins = {
        u.key: torch.randn(u.size, generator=generator) + torch.randn(1, generator=generator) / 2
        for u in budget.of_kind("neurons")
    }
    return keep_masks(budget, margins)


@dataclass(frozen=True)
class Pair:
    """The dense and the pruned model, in this order, and a description."""

    models: dict[str, PreTrainedModel]
    how: str


def pair_of(settings: Settings) -> Pair:
    """Make the pair from a finished run, from a pruned model folder and `model`, or with random masks.

    Raises:
        UserError: if the run has no exported model, or the folder has no model.
    """
    name = settings.model
    if settings.run is None:
        dense = model_of(settings)
        small = gprune.apply_masks(dense, random_masks(dense, settings))
        how = f"{settings.widths} masks at {settings.sparsity:.0%} of the FFN, widths of {settings.width_multiple}"
    else:
        folder = expanded(settings.run)
        if (folder / "manifest.json").is_file():
            result = gprune.load_run(folder)
            if result.model is None:
                raise UserError(f"--run needs an exported model; '{folder}' has none. Repeat the run with --export hf.")
            small, name = result.model, result.config.model.name
        else:
            small, _ = load_model(str(folder))
            family_of(small)
        dense, how = model_of(replace(settings, model=name)), f"pruned as in {folder.name}"
        small = small.to(settings.device, settings.dtype)
    label = "a tiny random Llama" if name == "tiny" else model_label(name)
    return Pair({"dense": dense, "pruned": small}, f"{label}, {how}")


def tokens(model: PreTrainedModel, count: int, length: int, seed: int = 0) -> Tensor:
    """Random token ids (count, length) on the model's device."""
    generator = torch.Generator().manual_seed(seed)
    size = model.get_input_embeddings().num_embeddings
    return torch.randint(3, size, (count, length), generator=generator).to(model.device)
