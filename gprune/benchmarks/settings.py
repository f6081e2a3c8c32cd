"""What is measured, and how; light, so that a wrong flag need not wait for PyTorch."""

from __future__ import annotations

from dataclasses import dataclass

from gprune.errors import UserError

WIKITEXT = "wikitext2"
DTYPES = ("float32", "bfloat16", "float16")
BOS = ("auto", "always", "never")
SOURCES = ("auto", "hub", "local")


@dataclass(frozen=True)
class Benchmarks:
    """What is measured, and how. Refuses values that cannot be.

    Attributes:
        tasks: multiple-choice tasks by name, and `wikitext2`.
        limit: the first so many questions or windows of each task; None for all.
        seq_len: tokens per window of `wikitext2`; a number for each length given.
        bos: whether BOS opens each of them: auto (as the tokenizer does before a text), always or never.
        batch_size: choices per forward pass. More than a few do not pay on a CPU.
        source: of tasks: hub, local, or auto: the hub if it answers.
        dtype: of the weights; None for the run's own, float32 for other models.
        trust_remote_code: run code that comes with a model.
    """

    tasks: tuple[str, ...] = ("piqa", "arc_easy")
    limit: int | None = None
    seq_len: tuple[int, ...] = (2048,)
    bos: str = "auto"
    batch_size: int = 4
    source: str = "auto"
    dtype: str | None = None
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise UserError(f"--limit: expected 1 or more, got {self.limit}.")
        if self.batch_size < 1:
            raise UserError(f"--batch_size: expected 1 or more, got {self.batch_size}.")
        if self.dtype not in (None, *DTYPES):
            raise UserError(f"--dtype: expected float32, bfloat16 or float16, got '{self.dtype}'.")
        if min(self.seq_len, default=0) < 2:
            raise UserError(f"--seq_len: expected 2 or more tokens, got {', '.join(map(str, self.seq_len)) or 'none'}.")
        if self.source not in SOURCES:
            raise UserError(f"--source: expected one of {', '.join(SOURCES)}, got '{self.source}'.")
        if self.bos not in BOS:
            raise UserError(f"--bos: expected auto, always or never, got '{self.bos}'.")
        if not self.tasks:
            raise UserError("--tasks: expected at least one task, such as piqa,arc_easy.")
