"""What the plan says a step holds, against what tensors without values hold: three shapes, from 135M to 7B parameters.

Blocks are few, since all are alike; their sizes are real. `python -m tests.pipeline.test_memory` prints the table.
"""

from __future__ import annotations

import functools
import gc
import re
import tempfile
import warnings
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from gprune.config.parse import parse
from gprune.models.blocks import blocks_of
from gprune.models.masks import Masks
from gprune.models.surgery import prune
from gprune.pipeline.plan import Plan, check
from tests import tiny_run
from tests.pipeline import devices as parts
from tests.pipeline.devices import PARTS, Place
from tests.pretend import TYPE, pretend


@dataclass(frozen=True)
class Shape:
    """A model and its batches."""

    sizes: dict[str, int]
    dtype: str
    batch: tuple[int, int]
    flags: list[str] = field(default_factory=list)

    @property
    def config(self) -> LlamaConfig:
        names = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "vocab_size")
        tied = self.sizes["vocab_size"] > 40_000
        return LlamaConfig(**{n: self.sizes[n] for n in names}, num_hidden_layers=3, tie_word_embeddings=tied)

    def plan(self, *flags: str) -> Plan:
        """What `--dry_run` says."""
        with tempfile.TemporaryDirectory() as folder:
            self.config.save_pretrained(folder)
            windows, length = self.batch
            given = [
                f"--model.name={folder}", f"--model.dtype={self.dtype}", f"--corpora.batch_size={windows}",
                f"--corpora.seq_len={length}", f"--evaluation.seq_len={length}", "--recovery=none",
                f"--corpora.num_samples={2 * windows}", "--trainer.accelerator=cpu", "--corpora.drift=[wiki]",
            ]  # fmt: skip
            return check(parse([*given, *flags]))

    def peak(self, part: parts.Part) -> int:
        """Bytes on the device at its peak, weights included."""
        with pretend(values=False) as counted, warnings.catch_warnings(action="ignore"):
            with torch.device(f"{TYPE}:0"):
                model = AutoModelForCausalLM.from_config(self.config, dtype=getattr(torch, self.dtype))
            place = Place(model.eval().requires_grad_(False), 1, self.batch)
            gc.collect()
            counted.peak.clear()
            part(place)
            return counted.peak["device"]


def shape(hidden: int, neurons: int, heads: int, groups: int, words: int) -> dict[str, int]:
    return {
        "hidden_size": hidden, "intermediate_size": neurons, "num_attention_heads": heads,
        "num_key_value_heads": groups, "vocab_size": words,
    }  # fmt: skip


SHAPES = {
    "135M": Shape(shape(576, 1536, 9, 3, 49_152), "float32", (4, 256)),
    "1B": Shape(shape(2048, 8192, 32, 8, 32_000), "bfloat16", (2, 512)),
    "7B": Shape(shape(4096, 11_008, 32, 32, 32_000), "bfloat16", (1, 2048)),
}


def every_other(place: Place) -> Masks:
    """Of the neurons, half."""
    blocks = blocks_of(place.model)
    return Masks([torch.arange(b.neurons) % 2 == 0 for b in blocks], [torch.ones(b.kv_groups).bool() for b in blocks])


def half(place: Place, name: str, **settings: Any) -> None:
    """A recovery where every other neuron goes."""
    masks = every_other(place)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Place, "masks", lambda self, **_: masks)
        patch.setattr(parts, "logits", lambda *_: None)  # of all positions at once, which no step of a run asks for
        parts.recover(place, name, attention=False, **settings)


def evaluated(place: Place) -> None:
    """The pruned model beside the dense one."""
    small = prune(place.model, every_other(place))
    parts.evaluated(Place(small, 1, place.shape))


CHECKPOINTS = ("--distill.targets=all", "--distill.checkpointing=true")
LEARN = ["--evaluation.controls=[]"]
BASE = ["--gprune=false"]


def distilled(place: Place, **settings: Any) -> None:
    half(place, "distill", distill=parts.DistillConfig(**settings))


def recovered(name: str) -> tuple[str, list[str], parts.Part]:
    return "recovery", [*LEARN, f"--recovery={name}"], functools.partial(half, name=name)


def taught(targets: str) -> tuple[str, list[str], parts.Part]:
    flags = [*LEARN, "--recovery=distill", f"--distill.targets={targets}"]
    return "recovery", flags, functools.partial(distilled, targets=targets)


# The step of the plan, its flags, and what is run for it.
STEPS: dict[str, tuple[str, list[str], parts.Part]] = {
    "moments": ("calibration", BASE, PARTS["calibration"]),
    "Gram matrices": (
        "calibration", [*BASE, "--corpora.collect=[gram]"], PARTS["calibration with Gram matrices"]
    ),
    "Taylor": (
        "calibration", [*BASE, "--importance=taylor"], functools.partial(parts.calibrate, saliency=("ffn",))
    ),
    "thresholds": ("learning", LEARN, functools.partial(parts.learn, attention=False)),
    "offsets, kl, attention": (
        "learning", [*LEARN, "--sparsity.learn=both", "--sparsity.loss=kl", "--sparsity.scope=attention+ffn"],
        functools.partial(parts.learn, attention=True, learn="both", loss="kl"),
    ),
    "least_squares": recovered("least_squares"),
    "least_squares_sequential": recovered("least_squares_sequential"),
    "distill mlp": taught("mlp"),
    "distill all": taught("all"),
    "evaluation": ("evaluation", LEARN, evaluated),
}  # fmt: skip


def compared(name: str, step: str) -> tuple[int, int]:
    """What the plan says, and what is held."""
    kind, flags, part = STEPS[step]
    which = SHAPES[name]
    flags = [*flags, f"--distill.batch_size={which.batch[0]}"]
    return which.plan(*flags).memory[kind].device, which.peak(part)


SLOW = [("1B", step) for step in STEPS] + [("135M", step) for step in STEPS if step != "thresholds"]
SLOW += [("7B", step) for step in STEPS if step not in ("Gram matrices", "thresholds", "distill all", "evaluation")]


@pytest.mark.parametrize(
    ("name", "step"),
    [pytest.param(n, s, marks=[pytest.mark.slow] * ((n, s) in SLOW)) for n in SHAPES for s in STEPS],
)
def test_the_plan_is_within_15_percent_of_what_is_held(name, step):
    said, held = compared(name, step)
    assert said == pytest.approx(held, rel=0.15)


@pytest.mark.slow
def test_checkpointing_holds_one_block():
    whole, few = (
        SHAPES["7B"].plan(*LEARN, "--recovery=distill", *more).memory["recovery"].device for more in ((), CHECKPOINTS)
    )
    part = functools.partial(half, name="distill", distill=parts.DistillConfig(targets="all", checkpointing=True))
    assert few == pytest.approx(SHAPES["7B"].peak(part), rel=0.15)
    assert few < whole


def test_the_dry_run_says_which_step_takes_most():
    lines = SHAPES["1B"].plan("--recovery=distill").describe().splitlines()
    (line,) = [line for line in lines if line.startswith("memory")]
    assert re.fullmatch(
        r"memory +about [\d.]+ GiB in recovery(, [\d.]+ GiB in (calibration|learning|evaluation)){3}", line
    )


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as cache, tiny_run.isolated(cache):
        print(
            "| step | " + " | ".join(f"{n}: formula, held, ratio" for n in SHAPES) + " |\n|---|" + "---|" * len(SHAPES)
        )
        for step in STEPS:
            cells = []
            for name in SHAPES:
                said, held = compared(name, step)
                cells.append(f"{said / 1e9:.2f} GB, {held / 1e9:.2f} GB, {said / held:.2f}")
            print(f"| {step} | {' | '.join(cells)} |", flush=True)
