"""Schemas of the JSON files of runs: types, finite numbers, and consistent records.

A run folder may come from anywhere. Readers get plain data that is valid by these schemas, or one line with the reason.
"""

from __future__ import annotations

import base64
import math
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from gprune.checks import Positive, validation_message
from gprune.config import check_settings, migrate_settings
from gprune.config.parse import GROUPS
from gprune.errors import UserError

Text = Annotated[str, Field(max_length=4096)]
Number = Annotated[float, Field(ge=-1e300, le=1e300)]
Count = Annotated[int, Field(ge=0, le=10**18)]
Length = Annotated[int, Field(ge=2, le=10**9)]  # tokens per window
Digits = Annotated[str, Field(pattern="^[01]*$")]  # a digit per question: 1 for a correct answer
Points = Annotated[list[Annotated[tuple[Number, Number], Field(strict=False)]], Field(min_length=1)]
Share = Annotated[float, Field(ge=0, le=1)]


class Schema(BaseModel):
    """Required keys of a JSON object. Other keys are ignored, for later versions and other programs."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)

    @classmethod
    def problem(cls, content: Any) -> str | None:
        """Return the first reason why the content is invalid, or None if it is valid."""
        try:
            cls.model_validate(content)
        except ValidationError as error:
            return validation_message(error)
        return None


class Measured(Schema):
    """A perplexity with the sums over windows."""

    perplexity: Annotated[float, Field(ge=1, le=1e300)]
    nll: Annotated[float, Field(ge=0, le=690)]  # nats per token; exp(690) is about the largest perplexity
    tokens: Annotated[int, Field(ge=1, le=10**15)]
    window_nll: Annotated[list[Annotated[float, Field(ge=0, le=1e12)]], Field(min_length=1)]

    kl: Annotated[float, Field(ge=0, le=1e300)] | None = None  # KL and agreement are with the dense model
    window_kl: list[Annotated[float, Field(ge=0, le=1e300)]] | None = None
    agreement: Share | None = None
    window_agreement: list[Annotated[float, Field(ge=0, le=1e12)]] | None = None

    @model_validator(mode="after")
    def check_windows(self) -> Self:
        """Raise UserError unless each list has one sum per window, and its sums add up to mean x tokens.

        Sums may be rounded to four digits after the point. A list has to be left out if its mean is.
        """
        windows = len(self.window_nll)
        for name in ("nll", "kl", "agreement"):
            mean, sums = getattr(self, name), getattr(self, f"window_{name}") or ()
            total, expected_total = math.fsum(sums), (mean or 0) * self.tokens
            tolerance = 1e-4 * (1 + total + windows)  # one unit of the last digit per window, and a relative error
            if abs(total - expected_total) > tolerance:
                raise UserError(f"The sum of window_{name} must be {name} x tokens = {expected_total}; got {total}.")
            expected_length = 0 if mean is None else windows
            if len(sums) != expected_length:
                raise UserError(f"The length of window_{name} must be {expected_length}; got {len(sums)}.")
        return self


class Record(Measured):
    """A perplexity in `metrics.json` with its evaluation protocol."""

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


def _check_windows(records: list[Record]) -> list[Record]:
    """Raise UserError if a row has a corpus twice, or was not measured on the dense model's windows.

    A model that gprune did not prune may have another tokenizer, and so other windows of the same text.
    """
    rows: dict[tuple[str, str], dict[str, tuple[Any, ...]]] = {}
    for r in records:
        row = rows.setdefault((r.stage, r.recovery), {})
        if r.corpus in row:
            raise UserError(f"The records of a row must have each corpus once; got '{r.corpus}' twice.")
        row[r.corpus] = r.content_hash, r.seen, r.seq_len, len(r.window_nll)
    dense = rows.get(("dense", "none"), {})
    for (stage, _), row in rows.items():
        if stage == "model":  # the corpora and their `seen` have to be the same, but not the windows
            same_text = {c: seen for c, (_, seen, *_) in row.items()} == {c: seen for c, (_, seen, *_) in dense.items()}
        else:
            same_text = row == dense
        if not same_text:
            raise UserError("The records of every row must be on the windows of the dense model.")
    return records


Records = Annotated[list[Record], Field(min_length=1), AfterValidator(_check_windows)]


class Ratio(Schema):
    """Ratio of two perplexities with its confidence interval."""

    ratio: Number
    low: Number | None  # None without an interval, because a corpus has a single window
    high: Number | None


class SpeedTable(Schema):
    """Latency table: seconds of a layer by its width, and seconds of the rest of the model."""

    neurons: Points
    groups: Points
    rest: Number
    layers: Count | None = None  # number of layers of the dense model, in summaries


class MeasuredSpeed(SpeedTable):
    """A latency table in the cache, which is interpolated."""

    multiples: Points
    spread: Annotated[float, Field(ge=0, le=1e300)]

    @model_validator(mode="after")
    def check_widths(self) -> Self:
        """Raise UserError unless widths increase, as interpolation requires, and times are positive."""
        for name in ("neurons", "groups"):
            widths = [width for width, _ in getattr(self, name)]
            if widths != sorted(set(widths)):
                raise UserError(f"The widths of {name} must increase; got {widths}.")
        if any(seconds <= 0 or width < 1 for width, seconds in [*self.neurons, *self.groups, *self.multiples]):
            raise UserError("Widths in neurons, groups and multiples must be 1 or more, and seconds more than 0.")
        return self


class SameQuality(Schema):
    """Size of a row at the requested quality. There are no numbers if the quality cannot be reached."""

    row: Text
    models: Count  # number of measured models
    share: Share | None = None
    parameters: Count | None = None
    predicted: Number | None = None  # ratio to the dense perplexity on development text, like the following
    got: Number | None = None
    low: Number | None = None
    high: Number | None = None

    @model_validator(mode="after")
    def check_numbers(self) -> Self:
        """Raise UserError unless share, parameters and got are given together, and so low and high, which need them."""
        numbers, ends = [self.share, self.parameters, self.got], [self.low, self.high]
        if None in numbers and numbers + ends != [None] * 5:
            raise UserError("The keys share, parameters, got, low and high must be given together.")
        if None in ends and ends != [None] * 2:
            raise UserError("The keys low and high must be given together.")
        return self


class Reached(Schema):
    """Result of the search for a quality target; the run's main row is the last one."""

    asked: Annotated[float, Field(gt=0, le=10)]
    largest: bool  # whether it is the largest cut that the units allow
    trial: Count | None = None  # number, from 1, of the trained trial that is the main row; None without training
    rows: Annotated[list[SameQuality], Field(min_length=1)]


class QualityTrials(Schema):
    """`quality.json`: perplexity of tried models on development text, by recovery and hash of the masks."""

    measured: dict[Text, Annotated[list[Measured], Field(min_length=1)]] = {}
    reached: Reached | None = None


class Quality(Reached):
    """Quality target in the summary of a run."""

    predicted: Number | None
    got: Number
    low: Number | None  # None without an interval, because a corpus has a single window
    high: Number | None
    share: Share
    unseen: Number | None = None
    unseen_low: Number | None = None
    unseen_high: Number | None = None
    said: Text
    warnings: list[Text] = []


class ToleratedShares(Schema):
    """Sparsities at which masks alone cost little: a line of text, and the numbers in it by percent."""

    said: Text
    shares: dict[Text, Share]


class Summary(Schema):
    """Summary in `metrics.json`."""

    # Above 1 is possible, as whole blocks contain parameters outside the scope. None for stage `model`.
    sparsity_of_scope: Annotated[float, Field(ge=0)] | None = None
    sparsity_of_model: Annotated[float, Field(ge=-1e300, le=1)]  # below 0 for a larger model made elsewhere
    parameters_before: Count
    parameters_after: Count
    forward_tokens: Count
    forward_backward_tokens: Count
    unseen_over_base_same_recovery: dict[Text, Ratio] | None = None
    speed_table: SpeedTable | None = None
    quality: Quality | None = None
    tolerated: ToleratedShares | None = None


class Metrics(Schema):
    """`metrics.json`; without a summary while the run is not finished."""

    records: Records
    summary: Summary | None = None


class Inputs(Schema):
    """Inputs of a run: fingerprint of the dense model, and hashes of text by role."""

    model: Text
    text: dict[Text, Text]


class Settings(Schema):
    """Entries of a run's settings without a flag; `config.check_settings` checks the others."""

    inputs: Inputs | None = None  # None before the first step


def _check_flags(settings: Any) -> Any:
    """Raise UserError if settings with a flag are invalid, after migration from an older version."""
    check_settings(migrate_settings(settings if isinstance(settings, dict) else {}))
    return settings


class Manifest(Schema):
    """`manifest.json`."""

    settings: Annotated[Settings, BeforeValidator(_check_flags)]
    steps: dict[Text, dict[Text, Number]]
    environment: dict[Text, Any] | None = None
    model: dict[Text, Text] | None = None
    learning: dict[Text, Any] | None = None
    precision: dict[Text, Text] | None = None  # how `auto` was resolved, and the reason
    fallbacks: dict[Text, Text] | None = None  # stages with another precision, and the reason
    wandb: dict[Text, Text | None] | None = None  # identity of the W&B run
    parts: dict[Text, dict[Text, Count]] | None = None  # tokens of parts of steps
    checkpoints: dict[Text, list[Text]] | None = None  # hashes by stage
    learned_tokens: dict[Text, Count] | None = None  # training tokens of the main row's model, by stage


class Benchmark(Schema):
    """Common keys of all records in `evaluation.json`."""

    task: Text
    stage: Text
    recovery: Text | None = None
    run: Text | None = None
    origin: Text | None = None  # hash of the run's key or of the model's path, because folders may share a name
    model: Text | None = None
    split: Text
    dtype: Text
    note: Text
    standard_protocol: bool
    content_hash: Text


class ZeroShot(Benchmark):
    """Accuracy or exact match on a task."""

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
    perplexity: Number | None = None  # perplexity of the correct continuations
    answers: list[Count] | list[str] | None = None  # most likely choice, or generated text, of each question

    @model_validator(mode="after")
    def check_answers(self) -> Self:
        """Raise UserError unless a text of digits is given, and each given one has a digit per question."""
        if {len(digits) for digits in (self.correct, self.correct_norm) if digits} != {self.questions}:
            raise UserError(f"The key correct must have a digit for each of {self.questions} questions.")
        return self


class Wikitext(Benchmark, Measured):
    """Perplexity on WikiText-2 or C4."""

    kind: Literal["perplexity"]
    low: Number | None  # None without an interval, because there is a single window
    high: Number | None
    seq_len: Length


class Speed(Benchmark):
    """Tokens per second of a whole batch, and seconds to the first token or per step."""

    kind: Literal["speed"]
    batch: Count
    tokens_per_second: Positive
    seconds: Positive
    rounds: Text  # equal for models that were measured in alternation


Evaluated = list[Annotated[ZeroShot | Wikitext | Speed, Field(discriminator="kind")]]


class Evaluation(Schema):
    """`evaluation.json`."""

    records: Evaluated


class Packed(Schema):
    """Masks in a record of a study."""

    sizes: list[Annotated[int, Field(ge=0, le=10**9)]]
    bits: str

    @model_validator(mode="after")
    def check_bits(self) -> Self:
        """Raise UserError unless `bits` is base64 of one bit per unit, in whole bytes."""
        expected = math.ceil(sum(self.sizes) / 8)
        try:
            length = len(base64.b64decode(self.bits, validate=True))
        except ValueError as error:
            raise UserError(f"The bits of masks must be base64; got {self.bits!r:.40} ({error}).") from error
        if length != expected:
            raise UserError(f"The bits of masks must be {expected} bytes, for {sum(self.sizes)} units; got {length}.")
        return self


class PackedMasks(Schema):
    """Masks of both kinds of units in a record of a study."""

    ffn: Packed
    attention: Packed


def _check_groups(settings: dict[str, Any]) -> dict[str, Any]:
    """Raise UserError if a group of settings is not a dictionary."""
    for group in GROUPS:
        if not isinstance(value := settings.get(group, {}), dict):
            raise UserError(f"The settings of the group {group} must be a dictionary; got {value!r:.40}.")
    return settings


class Study(Schema):
    """Record of a row of a study list."""

    name: Text
    settings: Annotated[dict[Text, Any], AfterValidator(_check_groups)]
    inputs: Inputs
    steps: dict[Text, dict[Text, Number]]
    summary: Summary
    records: Records
    masks: PackedMasks | None
    evaluation: Evaluated = []
    learning: dict[Text, Any] | None = None
