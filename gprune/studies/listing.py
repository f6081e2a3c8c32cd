"""Study lists: named rows of settings with a common protocol, which `gprune study` runs.

A list is a YAML file with the keys of `Content`. Files in it are looked up relative to the list's folder, then among
the shipped configurations (`--config`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from gprune.benchmarks.settings import Benchmarks, benchmarks
from gprune.checks import Text, refusal
from gprune.config import CONSENT, RunConfig, configured, read_flags, read_settings
from gprune.config.parse import overlay
from gprune.errors import UserError
from gprune.report.table import TableName
from gprune.storage.yaml_text import read_yaml

EXPERIMENTS = Path(__file__).parents[2] / "experiments"  # exists in a clone of the repository
OTHER_RECORDS = Path("runs/records")
# Defaults of all rows. They do not change results, so they are not part of a row's identity.
OWN = {"export": "none", "run.dir": "runs/experiments"}
LISTED_PRECISION = "32-true"  # default of rows, so that a row means the same on every machine
MADE_ELSEWHERE = "model.made_elsewhere"
TABLES = ("summary", "perplexity", "distance", "evaluation")

# YAML reads some names as numbers.
Name = Annotated[Text, BeforeValidator(lambda name: str(name) if type(name) in (int, float) else name)]
Names = list[Name]
Files = Annotated[Names, BeforeValidator(lambda files: [files] if isinstance(files, str) else files)]
Pair = Annotated[Names, Field(min_length=2, max_length=2)]


class StrictModel(BaseModel):
    """Base class for keys with declared types; other keys are invalid."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class RowContent(BaseModel):
    """A row: settings of `train.py`, nested or dotted. `config`: files to start from. `model`: see below."""

    model_config = ConfigDict(strict=True, extra="allow", frozen=True)
    config: Files = []
    model: Text | dict[str, Any] | None = None
    """Folder or hub id of a causal language model that is measured instead of being pruned by gprune
    (`--model.made_elsewhere`), or settings of the group `model`."""

    @property
    def settings(self) -> dict[str, Any]:
        """Settings given in the row itself."""
        if isinstance(self.model, str) and not self.model.lstrip().startswith("{"):  # settings may be YAML in a string
            return {MADE_ELSEWHERE: self.model, "recovery": "none"} | self.model_extra
        return self.model_extra | ({} if self.model is None else {"model": self.model})


class Content(StrictModel):
    """Keys of a list file."""

    rows: dict[Name, RowContent | None]
    about: str | None = None
    protocol: Files = []
    """Files with settings of all rows."""
    common: dict[str, Any] = {}
    """Settings of all rows, which override `protocol`."""
    reference: Name | None = None
    """Row whose stage `base` is the denominator of ratios, for all rows with as few parameters."""
    compare: list[Pair] = []
    """Pairs of stages to compare, such as ['a: gprune', 'b: base']."""
    controls: Names = []
    """Rows whose result is a control, not a result of gprune."""
    seeds: list[int] = [0]
    tables: list[TableName] = list(TABLES)
    """Tables of the report to print."""
    masks: bool = False
    """Store masks in the records of a list in `experiments/`; other lists always store them."""
    tasks: dict[str, Any] = {}
    """Arguments of `gprune evaluate` for the model of every row: `names` of tasks, and flags such as `limit`."""
    seen: Names | None = None
    """Corpora that count as seen in every row. Default: the corpora that the row has seen."""

    @model_validator(mode="after")
    def check_rows(self) -> Self:
        """Raise UserError if a key names an unknown row, or a task cannot be measured."""
        for key, wanted in (
            ("controls", self.controls),
            ("reference", [] if self.reference is None else [self.reference]),
            ("compare", [stage.rpartition(": ")[0] for pair in self.compare for stage in pair]),
        ):
            if unknown := [name for name in wanted if name not in self.rows]:
                raise UserError(f"The key {key} must name rows ({', '.join(self.rows)}); got '{unknown[0]}'.")
        if self.tasks:
            asked_of(self.tasks)
        return self


@dataclass(frozen=True)
class Row:
    """A configuration with a seed."""

    name: str
    seed: int
    settings: dict[str, Any]  # settings of the list and the command line, by dotted name
    tasks: dict[str, Any] = field(default_factory=dict)  # empty if the list has no tasks
    control: bool = False  # whether the result is a control, not a result of gprune
    masks: bool = True  # whether to store masks; there are none with --model.made_elsewhere
    records: Path = OTHER_RECORDS  # folder of records
    study: str = ""  # name of the list

    @cached_property
    def config(self) -> RunConfig:
        """Configuration of the row. Invalid settings, and the precision `auto`, raise UserError with the row's name."""
        where = f"Row '{self.name}'"
        cfg = configured({"trainer.precision": LISTED_PRECISION} | self.settings, where=where)
        if cfg.trainer.precision == "auto":
            must = "must be 32-true or bf16-mixed in a list, so that records do not depend on the machine"
            raise UserError(f"{where}: --trainer.precision {must}; got auto.")
        return cfg


@dataclass(frozen=True)
class Listing:
    """A parsed list file."""

    path: Path
    content: Content
    rows: list[Row]

    @classmethod
    def read(
        cls, path: Path | str, *, seeds: Sequence[int] | None = None, flags: Sequence[str] = (),
        records: Path | str | None = None,
    ) -> Listing:  # fmt: skip
        """Read a list file.

        Args:
            path: the file.
            seeds: seeds of all rows; by default those of the list.
            flags: flags of train.py, which override the settings of every row.
            records: folder of records. Default: `experiments/records` for lists in `experiments`, otherwise
                `OTHER_RECORDS`.

        Raises:
            UserError: if the file is missing or not YAML, or a key, a row or a setting is invalid.
        """
        path = Path(path)
        content = read_content(path)
        ours = path.resolve().is_relative_to(EXPERIMENTS)
        folder = Path(records) if records is not None else EXPERIMENTS / "records" if ours else OTHER_RECORDS
        masks = content.masks or not ours
        shared = {"tasks": content.tasks, "masks": masks, "records": folder, "study": path.stem}
        return cls(path, content, list(_rows(path, content, seeds or content.seeds, flags, **shared)))


def read_content(path: Path) -> Content:
    """Read and validate the keys of a list file.

    Raises:
        UserError: if the file is not a YAML mapping with rows, a key is unknown, or a value has a wrong type.
    """
    content = read_yaml(path, "The list must be a YAML file; got", pipe=True)
    if isinstance(content, dict):
        content = {key: value for key, value in content.items() if value is not None}
    try:
        return Content.model_validate(content)
    except ValidationError as error:
        raise UserError(f"List '{path}': {refusal(error)}.") from error


def asked_of(tasks: Mapping[str, Any], **others: Any) -> Benchmarks:
    """Convert the tasks of a list to `Benchmarks`; UserError if they are invalid."""
    own = dict(tasks) | others
    own["tasks"] = own.pop("names", ())
    if isinstance(own.get("seq_len"), int):
        own["seq_len"] = [own["seq_len"]]
    return benchmarks(**own)


def _rows(path: Path, content: Content, seeds: Sequence[int], flags: Sequence[str], **shared: Any) -> Iterator[Row]:
    """Yield every row with every seed. `shared` are fields that are equal in all rows."""
    own = read_flags(flags)
    protocol = [_settings_of(name, path.parent) for name in content.protocol]
    for seed in dict.fromkeys(seeds):
        for name, given in content.rows.items():
            where, row, merged = f"List '{path}', row '{name}'", given or RowContent(), {}
            configs = [_settings_of(file, path.parent) for file in row.config]
            for layer in (*protocol, *configs, OWN, content.common, row.settings):
                for item in layer.items():  # one by one, because a YAML merge may give a setting nested and dotted
                    overlay(merged, dict([item]), where)
            _check_settings(where, merged, own)
            overlay(merged, own, where)
            fields = shared | {"masks": shared["masks"] and MADE_ELSEWHERE not in merged}
            yield Row(name, seed, merged | {"run.seed": seed}, control=name in content.controls, **fields)


def _settings_of(file: str, folder: Path) -> dict[str, Any]:
    """Read settings of a file except `run.name`, because every row has its own run folder."""
    return {name: value for name, value in read_settings(file, folder).items() if name != "run.name"}


def _check_settings(where: str, given: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Raise UserError for settings that a study sets itself, and for consent to remote code in a list."""
    for name, remedy in (
        ("run.seed", "Use the key `seeds`, or --seeds"),
        ("run.name", "Every row has its own folder"),
        ("dry_run", "Use train.py, or --table, which runs nothing"),
    ):
        if name in given or name in own:
            raise UserError(f"{where}: --{name} cannot be set in a study. {remedy}.")
    if given.get(CONSENT) and CONSENT not in own:
        raise UserError(f"{where}: --{CONSENT}=true must be given after -- on the command line, not in a list.")


def select_part(rows: Sequence[Row], part: str | None) -> list[Row]:
    """Select every n-th row from the i-th on, for `part` i/n.

    The rows are all rows of a list, so that the parts of several machines do not depend on which rows are finished.
    """
    if part is None:
        return list(rows)
    share = re.fullmatch(r"([0-9]+)/([0-9]+)", part)
    if not share or not 1 <= int(share[1]) <= int(share[2]):
        raise UserError(f"--part must be I/N with 1 <= I <= N, such as 1/4; got '{part}'.")
    return list(rows[int(share[1]) - 1 :: int(share[2])])
