"""Models, masks, tokens and settings of the benchmarks. Speed does not depend on what the weights are."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import gprune
from gprune.errors import UserError
from gprune.models.blocks import blocks_of
from gprune.models.embedded import model_label
from gprune.models.loading import load_model
from gprune.models.masks import Masks
from gprune.sparsity.budget import Budget, unit_costs
from gprune.sparsity.cut import keep_masks
from gprune.storage.reading import expanded

from .measure import Clock, machine

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Settings:
    """What is measured, and how often. `small` shapes take seconds and mean nothing."""

    model: str = "smollm2-135m"  # or `tiny`: random, from a config
    run: str | None = None
    device: torch.device = torch.device("cpu")  # noqa: RUF009 - immutable
    clock: str = "wall"  # or `process`
    dtype: torch.dtype = torch.float32
    repeats: int = 5
    seed: int = 0
    sparsity: float = 0.5
    widths: str = "random"  # or `uniform`
    width_multiple: int = 64
    batch_sizes: tuple[int, ...] = (1, 8)
    seq_len: int = 128  # of prefill, and of the prompt before decoding
    new_tokens: int = 16
    windows: int = 8  # calibration: how many,
    window: int = 256  # and of how many tokens; learning takes the first batch of them
    batch_size: int = 4
    corpus: str = "wiki"  # of the comparison of masks
    neurons: int = 11008  # partition: Llama-2-7B's block
    hidden: int = 4096
    refinement_steps: int = gprune.RunConfig().partition.steps
    gguf: str | None = None  # a type: through llama.cpp too
    small: bool = False

    def shrunk(self) -> Settings:
        """Everything as it is, on shapes that take seconds."""
        return replace(
            self, model="tiny", run=None, small=True, repeats=min(self.repeats, 2), seq_len=16, new_tokens=4,
            windows=4, window=16, batch_size=2, corpus="random", neurons=512, hidden=64, refinement_steps=5,
        )  # fmt: skip

    @property
    def watch(self) -> Clock:
        return Clock(self.device, self.clock)

    def protocol(self, model: PreTrainedModel | None = None, name: str | None = None) -> str:
        """The sentence before a table; `model` for its own dtype, `name` in place of the model's own."""
        dtype = str(self.dtype if model is None else model.dtype).removeprefix("torch.")
        what = label(self.model) if name is None else name
        seconds = "" if self.clock == "wall" else ", processor seconds"
        return f"{what}, {dtype}; {machine(self.device)}; calls in turn, median of {self.repeats} rounds{seconds}."


def label(name: str) -> str:
    return "a tiny random Llama" if name == "tiny" else model_label(name)


def random_llama(
    *, hidden: int, neurons: int, blocks: int, vocabulary: int = 256, heads: int = 4, groups: int | None = None,
    seed: int = 0,
) -> LlamaForCausalLM:  # fmt: skip
    """A random Llama in float32, frozen, whose outputs are of the size of a trained one's."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=neurons, num_hidden_layers=blocks,
        num_attention_heads=heads, num_key_value_heads=groups or heads, head_dim=max(hidden // heads, 8),
        max_position_embeddings=4096, tie_word_embeddings=True, initializer_range=hidden**-0.5,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def model_of(settings: Settings) -> PreTrainedModel:
    """The dense model on its device."""
    if settings.model == "tiny":
        model = random_llama(hidden=32, neurons=256, blocks=2, groups=2, seed=settings.seed).to(settings.dtype)
    else:
        model, _ = load_model(settings.model, dtype=settings.dtype)
    return model.to(settings.device)


def random_masks(model: PreTrainedModel, settings: Settings) -> Masks:
    """Masks that remove `sparsity` of the FFN, drawn at random: `uniform` widths, or widths that differ by block."""
    blocks = blocks_of(model)
    costs = unit_costs(blocks, scope="ffn", uniform=settings.widths == "uniform")
    budget = Budget.of(costs, settings.sparsity, settings.width_multiple)
    generator = torch.Generator().manual_seed(settings.seed)
    margins = [torch.randn(b.neurons, generator=generator) + torch.randn(1, generator=generator) / 2 for b in blocks]
    return keep_masks(budget, margins)


@dataclass(frozen=True)
class Pair:
    """The dense and the pruned model, in that order, and how the pruned one came about."""

    models: dict[str, PreTrainedModel]
    how: str
    dense: str  # what `--model` would call it


def pair_of(settings: Settings) -> Pair:
    """From a finished run, from a pruned model folder beside `model`, or by masks drawn at random.

    Raises:
        UserError: for a run that kept no model, or a folder that holds none.
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
                raise UserError(f"--run: the run '{folder}' kept no model; repeat it with --export hf.")
            small, name = result.model, result.config.model.name
        else:
            small, _ = load_model(str(folder))
        dense, how = model_of(replace(settings, model=name)), f"pruned as in {folder.name}"
        small = small.to(settings.device, settings.dtype)
    return Pair({"dense": dense, "pruned": small}, f"{label(name)}, {how}", name)


def tokens(model: PreTrainedModel, count: int, length: int, seed: int = 0) -> Tensor:
    """(count, length) random token ids on the model's device."""
    generator = torch.Generator().manual_seed(seed)
    size = model.get_input_embeddings().num_embeddings
    return torch.randint(3, size, (count, length), generator=generator).to(model.device)


def batches(ids: Tensor, size: int) -> list[dict[str, Tensor]]:
    """Batches as calibration and learning take them."""
    index = torch.arange(len(ids), device=ids.device)
    ones = torch.ones(len(ids), device=ids.device)
    parts = zip(ids.split(size), index.split(size), ones.split(size), strict=True)
    return [{"input_ids": i, "index": n, "weight": w} for i, n, w in parts]
