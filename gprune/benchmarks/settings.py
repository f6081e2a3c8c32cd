"""What is measured, and how; light, so that a wrong flag need not wait for PyTorch."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, ValidationError
from pydantic.dataclasses import dataclass

from gprune.checks import AtLeast1, AtLeast2, Few, refusal
from gprune.errors import UserError

WIKITEXT = "wikitext2"
TEXTS = {WIKITEXT: "WikiText-2", "c4": "C4"}  # whose perplexity the literature reports
SPEED = "speed"


@dataclass(frozen=True, config=ConfigDict(use_attribute_docstrings=True, extra="forbid"))
class Benchmarks:
    """What is measured, and how: the flags of `gprune evaluate`, with their help."""

    tasks: Annotated[tuple[str, ...], Field(min_length=1)] = ("piqa", "arc_easy")
    """tasks by name, wikitext2, c4, and speed"""
    limit: AtLeast1 | None = None
    """first questions or windows of each task (default: all)"""
    seq_len: Annotated[tuple[AtLeast2, ...], Field(min_length=1)] = (2048,)
    """tokens per window of wikitext2 and c4, a number for each"""
    bos: Literal["auto", "always", "never"] = "auto"
    """opens each window of wikitext2 and c4: auto (as the tokenizer does before a text), always or never"""
    batch_size: AtLeast1 = 4
    """choices per forward pass; more than a few do not pay on a CPU"""
    speed_batch: Annotated[tuple[Few, ...], Field(min_length=1)] = (1, 8)
    """prompts at once of speed, a number for each"""
    speed_prompt: AtLeast1 = 128
    """tokens of each prompt of speed"""
    source: Literal["auto", "hub", "local"] = "auto"
    """of tasks: hub, local, or auto: the hub if it answers"""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """float32, bfloat16 or float16 (default: the run's own; float32 for other models)"""
    trust_remote_code: bool = False
    """run Python code that comes with the model, which you have read"""


def benchmarks(**settings: Any) -> Benchmarks:
    """`Benchmarks` of these settings, numbers as text too; raises UserError for what cannot be measured."""
    try:
        return Benchmarks(**settings)
    except ValidationError as error:
        raise UserError(f"{refusal(error, '--').removesuffix('.')}.") from error
