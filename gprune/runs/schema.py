"""What the JSON files of runs hold, checked when they are read: types, finite numbers, and records that fit together.

A run folder comes from anywhere. What reads one gets plain data of these shapes, or one line that says what is wrong.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from gprune.checks import Positive, refusal
from gprune.config import check_settings, migrated
from gprune.errors import UserError

Text = Annotated[str, Field(max_length=4096)]
Number = Annotated[float, Field(ge=-1e300, le=1e300)]
Count = Annotated[int, Field(ge=0, le=10**18)]
Length = Annotated[int, Field(ge=2, le=10**9)]  # tokens of a window
Digits = Annotated[str, Field(pattern="^[01]*$")]  # of questions, whether the answer is right
Points = Annotated[list[Annotated[tuple[Number, Number], Field(strict=False)]], Field(min_length=1)]
Share = Annotated[float, Field(ge=0, le=1)]


class Shape(BaseModel):
    """Keys that have to be there; others may be, for later versions and other readers."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)

    @classmethod
    def problem(cls, content: Any) -> str | None:
        """What keeps content from having this shape: the place, what was expected, what came; None if it has it."""
        try:
            cls.model_validate(content)
        except ValidationError as error:
            return refusal(error)
        return None


class Measured(Shape):
    """A perplexity with what it is made of."""

    perplexity: Annotated[float, Field(ge=1, le=1e300)]
    nll: Annotated[float, Field(ge=0, le=690)]  # nats per token: exp of it is the largest perplexity
    tokens: Annotated[int, Field(ge=1, le=10**15)]
    window_nll: Annotated[list[Annotated[float, Field(ge=0, le=1e12)]], Field(min_length=1)]

    kl: Annotated[float, Field(ge=0, le=1e300)] | None = None  # to the dense model, and agreement with it, if measured
    window_kl: list[Annotated[float, Field(ge=0, le=1e300)]] | None = None
    agreement: Share | None = None
    window_agreement: list[Annotated[float, Field(ge=0, le=1e12)]] | None = None

    @model_validator(mode="after")
    def check_windows(self) -> Self:
        """Windows, which may be rounded to four digits, add up to the mean of all tokens, and are as many as of nll."""
        for name in ("nll", "kl", "agreement"):
            mean, sums = getattr(self, name), getattr(self, f"window_{name}")
            total, expected = math.fsum(sums or ()), (mean or 0) * self.tokens
            limit, some = 1e-4 * (1 + total + len(self.window_nll)), mean is not None
            if abs(total - expected) > limit or len(sums or ()) != some * len(self.window_nll):
                raise UserError(f"window_{name}: expected a sum of {name} x tokens = {expected}, got {total}")
        return self


class Record(Measured):
    """A number of `metrics.json` with its protocol."""

    stage: Literal["dense", "base", "averaged", "gprune", "model"]
    recovery: Text
    corpus: Text
    seen: bool
    seq_len: Length
    stride: Count
    bos: bool
    model: Text
    scope: Text
    sparsity: Share
    importance: Text | None
    split: Text
    dtype: Text
    seed: Count
    content_hash: Text


def _of_one_run(records: list[Record]) -> list[Record]:
    """Raise UserError unless each number is there once, and every row is on the dense model's windows.

    A model made elsewhere may have another tokenizer, and so other windows of the same text.
    """
    rows: dict[tuple[str, str], dict[str, tuple[Any, ...]]] = {}
    for r in records:
        row = rows.setdefault((r.stage, r.recovery), {})
        if r.corpus in row:
            raise UserError(f"records: expected each corpus once in a row, got '{r.corpus}' twice")
        row[r.corpus] = r.content_hash, r.seen, r.seq_len, len(r.window_nll)
    dense = rows.get(("dense", "none"), {})
    text = {corpus: seen for corpus, (_, seen, *_) in dense.items()}
    others = [{c: seen for c, (_, seen, *_) in row.items()} for key, row in rows.items() if key[0] == "model"]
    ours = [row for key, row in rows.items() if key[0] != "model"]
    if not dense or any(row != dense for row in ours) or any(row != text for row in others):
        raise UserError("records: expected every row on the windows of the dense model")
    return records


Records = Annotated[list[Record], Field(min_length=1), AfterValidator(_of_one_run)]


class Ratio(Shape):
    """Of two perplexities, with its interval."""

    ratio: Number
    low: Number
    high: Number


class SpeedTable(Shape):
    """Seconds of a block by what it keeps, and of what is never pruned."""

    neurons: Points
    groups: Points
    rest: Number


class MeasuredSpeed(SpeedTable):
    """A table as the cache has it, which prices are interpolated from."""

    multiples: Points
    spread: Annotated[float, Field(ge=0, le=1e300)]

    @model_validator(mode="after")
    def check_widths(self) -> Self:
        """Widths rise, as interpolation expects, and take time."""
        for name in ("neurons", "groups"):
            kept = [width for width, _ in getattr(self, name)]
            if kept != sorted(set(kept)):
                raise UserError(f"{name}: expected rising widths, got {kept}")
        if any(taken <= 0 or width < 1 for width, taken in [*self.neurons, *self.groups, *self.multiples]):
            raise UserError("neurons, groups, multiples: expected widths of 1 or more, and seconds above 0")
        return self


class SameQuality(Shape):
    """What a row keeps at the quality that was asked for; without numbers where no cut keeps it."""

    row: Text
    models: Count  # that were measured
    share: Share | None = None
    parameters: Count | None = None
    predicted: Number | None = None  # perplexity over dense on development text, as are the following
    got: Number | None = None
    low: Number | None = None
    high: Number | None = None

    @model_validator(mode="after")
    def check_numbers(self) -> Self:
        """All numbers are there, except `predicted`, or none."""
        numbers = [self.share, self.parameters, self.got, self.low, self.high]
        if None in numbers and numbers != [None] * len(numbers):
            raise UserError("expected share, parameters, got, low and high together")
        return self


class Reached(Shape):
    """What a search for a quality has found; the run's own row is the last one."""

    asked: Annotated[float, Field(gt=0, le=10)]
    largest: bool  # whether it is the largest cut that the units allow
    rows: Annotated[list[SameQuality], Field(min_length=1)]


class Trials(Shape):
    """`quality.json`: what models that were tried make of each development text, by recovery and hash of masks."""

    measured: dict[Text, Annotated[list[Measured], Field(min_length=1)]] = {}
    reached: Reached | None = None


class Quality(Reached):
    """What a summary says of a target in quality."""

    predicted: Number | None
    got: Number
    low: Number
    high: Number
    share: Share
    unseen: Number | None = None
    unseen_low: Number | None = None
    unseen_high: Number | None = None
    said: Text


class Said(Shape):
    """A line for people, and the numbers in it."""

    said: Text
    shares: dict[Text, Share]


class Summary(Shape):
    """The headline of `metrics.json`."""

    # Whole blocks may take more along than the scope has. None for a model made elsewhere.
    sparsity_of_scope: Annotated[float, Field(ge=0)] | None = None
    sparsity_of_model: Annotated[float, Field(ge=-1e300, le=1)]  # below 0 for a larger model made elsewhere
    parameters_before: Count
    parameters_after: Count
    forward_tokens: Count
    forward_backward_tokens: Count
    unseen_over_base_same_recovery: dict[Text, Ratio] | None = None
    speed_table: SpeedTable | None = None
    quality: Quality | None = None
    tolerated: Said | None = None


class Metrics(Shape):
    """`metrics.json`; without a summary while the run goes on."""

    records: Records
    summary: Summary | None = None


class Inputs(Shape):
    """What a run has read: the dense model's fingerprint, and text by role."""

    model: Text
    text: dict[Text, Text]


class Settings(Shape):
    """What of a run's settings no flag describes; `config.check_settings` knows the others."""

    inputs: Inputs | None = None  # nothing before the first step


def _of_this_version(settings: Any) -> Any:
    try:
        check_settings(migrated(settings if isinstance(settings, dict) else {}))
    except UserError as error:
        raise UserError(f"settings: {str(error).rstrip('.')}") from error
    return settings


class Manifest(Shape):
    """`manifest.json`."""

    settings: Annotated[Settings, BeforeValidator(_of_this_version)]
    steps: dict[Text, dict[Text, Number]]
    environment: dict[Text, Any] | None = None
    model: dict[Text, Text] | None = None
    learning: dict[Text, Any] | None = None
    precision: dict[Text, Text] | None = None  # what was asked for, if that was `auto`, and why it became what it is
    wandb: dict[Text, Text | None] | None = None  # the run there, if it is logged there
    parts: dict[Text, dict[Text, Count]] | None = None  # tokens of parts of steps
    checkpoints: dict[Text, list[Text]] | None = None  # hashes, by what learns
    learned_tokens: dict[Text, Count] | None = None  # that the run's own model has learned from, by stage


class Benchmark(Shape):
    """What all records of `evaluation.json` say."""

    task: Text
    stage: Text
    recovery: Text | None = None
    run: Text | None = None
    origin: Text | None = None  # a hash of the run's key, or of where a model lies: folders may share a name
    model: Text | None = None
    split: Text
    dtype: Text
    note: Text
    standard_protocol: bool
    content_hash: Text


class ZeroShot(Benchmark):
    """Accuracy on a task, or exact match."""

    kind: Literal["zero_shot"]
    questions: Count
    acc: Share | None
    acc_stderr: Number | None
    acc_norm: Share | None
    acc_norm_stderr: Number | None
    correct: Digits = ""
    correct_norm: Digits = ""
    exact_match: Share | None = None
    exact_match_stderr: Number | None = None
    perplexity: Number | None = None  # of what a context is to be continued with
    answers: list[Count] | list[str] | None = None  # the most likely choice of each question, or what was generated

    @model_validator(mode="after")
    def check_answers(self) -> Self:
        """By one of the two scores at least, and a digit for each question."""
        if {len(digits) for digits in (self.correct, self.correct_norm) if digits} != {self.questions}:
            raise UserError(f"correct: expected a digit for each of {self.questions} questions")
        return self


class Wikitext(Benchmark, Measured):
    """Perplexity on WikiText-2 or C4."""

    kind: Literal["perplexity"]
    low: Number
    high: Number
    seq_len: Length


class Speed(Benchmark):
    """Tokens per second of a batch together, and seconds to the first token or of a step."""

    kind: Literal["speed"]
    batch: Count
    tokens_per_second: Positive
    seconds: Positive
    rounds: Text  # the same of all that were measured in turns


Evaluated = list[Annotated[ZeroShot | Wikitext | Speed, Field(discriminator="kind")]]


class Evaluation(Shape):
    """`evaluation.json`."""

    records: Evaluated


class Packed(Shape):
    """Masks in a record of a study."""

    sizes: list[Annotated[int, Field(ge=0, le=10**9)]]
    bits: str


class Study(Shape):
    """The record of a row of a list."""

    name: Text
    settings: dict[Text, Any]
    inputs: Inputs
    steps: dict[Text, dict[Text, Number]]
    summary: Summary
    records: Records
    masks: dict[Literal["ffn", "attention"], Packed] | None
    evaluation: Evaluated = []
    learning: dict[Text, Any] | None = None
