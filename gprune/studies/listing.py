"""List files: rows of settings by name, with the protocol they share. `gprune study` runs them.

A list is a YAML file with the keys of `Content`. Files that it names are looked for from its own folder, then by
name among the configurations that ship (`--config`).
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

EXPERIMENTS = Path(__file__).parents[2] / "experiments"  # of a clone
OTHER_RECORDS = Path("runs/records")
# Numbers do not depend on these: a row is the same row with and without them.
OWN = {"export": "none", "run.dir": "runs/experiments"}
LISTED_PRECISION = "32-true"  # of rows that name none: a row means the same on every machine
MADE_ELSEWHERE = "model.made_elsewhere"
TABLES = ("summary", "perplexity", "distance", "evaluation")

# YAML reads some names as numbers.
Name = Annotated[Text, BeforeValidator(lambda name: str(name) if type(name) in (int, float) else name)]
Names = list[Name]
Files = Annotated[Names, BeforeValidator(lambda files: [files] if isinstance(files, str) else files)]
Pair = Annotated[Names, Field(min_length=2, max_length=2)]


class Shape(BaseModel):
    """Keys of the types that are declared, and no others."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class RowContent(BaseModel):
    """Settings of `train.py`, nested or dotted; `config`: files to start from; `model`: a model made elsewhere."""

    model_config = ConfigDict(strict=True, extra="allow", frozen=True)
    config: Files = []
    model: Text | dict[str, Any] | None = None
    """A folder or hub id: any causal language model, which is measured in place of one that gprune prunes. Or settings
    of the group `model`."""

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that the row itself gives."""
        if isinstance(self.model, str) and not self.model.lstrip().startswith("{"):  # settings may be YAML in a string
            return {MADE_ELSEWHERE: self.model, "recovery": "none"} | self.model_extra
        return self.model_extra | ({} if self.model is None else {"model": self.model})


class Content(Shape):
    """What a list file holds."""

    rows: dict[Name, RowContent | None]
    about: str | None = None
    protocol: Files = []
    """Files of settings, under all rows."""
    common: dict[str, Any] = {}
    """Settings of all rows."""
    reference: Name | None = None
    """The row whose stage `base` all others are divided by that have as few parameters."""
    compare: list[Pair] = []
    """Pairs of stages, such as ['a: gprune', 'b: base']."""
    controls: Names = []
    """Rows whose result is not gprune's."""
    seeds: list[int] = [0]
    tables: list[TableName] = list(TABLES)
    """Of the report's, those to print."""
    masks: bool = False
    """Keep masks with the records of a list in `experiments/`, as others do: `python -m experiments.stability`."""
    tasks: dict[str, Any] = {}
    """What `gprune evaluate` measures on the model of every row: `names`, and flags of it such as `limit`."""
    seen: Names | None = None
    """Corpora that count as seen in every row; by default each row's own."""

    @model_validator(mode="after")
    def check_rows(self) -> Self:
        """Raise UserError for a key that names a row that there is not, and for tasks that cannot be measured."""
        for key, wanted in (
            ("controls", self.controls),
            ("reference", [] if self.reference is None else [self.reference]),
            ("compare", [stage.rpartition(": ")[0] for pair in self.compare for stage in pair]),
        ):
            if unknown := [name for name in wanted if name not in self.rows]:
                raise UserError(f"{key}: expected rows ({', '.join(self.rows)}), got '{unknown[0]}'")
        if self.tasks:
            asked_of(self.tasks)
        return self


@dataclass(frozen=True)
class Row:
    """One configuration with one seed."""

    name: str
    seed: int
    settings: dict[str, Any]  # by dotted name, those that the list and the command line give
    tasks: dict[str, Any] = field(default_factory=dict)  # empty if the list asks for none
    control: bool = False  # gprune's machinery with nothing learned: no result of the method's
    masks: bool = True  # keep masks, which a model made elsewhere does not have
    records: Path = OTHER_RECORDS  # the folder of what came out
    study: str = ""  # name of the list

    @cached_property
    def config(self) -> RunConfig:
        """Raises UserError, with the row's name, for what train.py would refuse, and for a precision of `auto`."""
        where = f"Row '{self.name}'"
        cfg = configured({"trainer.precision": LISTED_PRECISION} | self.settings, where=where)
        if cfg.trainer.precision == "auto":
            raise UserError(
                f"{where}: --trainer.precision: expected 32-true or bf16-mixed in a list, whose records serve every "
                "machine, got auto."
            )
        return cfg


@dataclass(frozen=True)
class Listing:
    """A list file that has been read."""

    path: Path
    content: Content
    rows: list[Row]

    @classmethod
    def read(
        cls, path: Path | str, *, seeds: Sequence[int] | None = None, flags: Sequence[str] = (),
        records: Path | str | None = None,
    ) -> Listing:  # fmt: skip
        """Parse a list; `flags` come last in every row.

        Args:
            records: folder of what came out. None: `experiments/records` for the lists in there, else `OTHER_RECORDS`.

        Raises:
            UserError: for a file that is none, an unknown key, a row that is no mapping or that there is not.
        """
        path = Path(path)
        content = read_content(path)
        ours = path.resolve().is_relative_to(EXPERIMENTS)
        folder = Path(records) if records is not None else EXPERIMENTS / "records" if ours else OTHER_RECORDS
        masks = content.masks or not ours
        shared = {"tasks": content.tasks, "masks": masks, "records": folder, "study": path.stem}
        return cls(path, content, list(_rows(path, content, seeds or content.seeds, flags, **shared)))


def read_content(path: Path) -> Content:
    """The keys of a list file, each of its type.

    Raises:
        UserError: for a file that is no YAML mapping with rows, an unknown key, or a value of another type.
    """
    content = read_yaml(path, "List: expected a YAML file, got", pipe=True)
    if isinstance(content, dict):
        content = {key: value for key, value in content.items() if value is not None}
    try:
        return Content.model_validate(content)
    except ValidationError as error:
        raise UserError(f"List '{path}', {refusal(error).removesuffix('.')}.") from error


def asked_of(tasks: Mapping[str, Any], **others: Any) -> Benchmarks:
    """The tasks of a list as `gprune evaluate` takes them; raises UserError for what cannot be measured."""
    own = dict(tasks) | others
    own["tasks"] = own.pop("names", ())
    if isinstance(own.get("seq_len"), int):
        own["seq_len"] = [own["seq_len"]]
    return benchmarks(**own)


def _rows(path: Path, content: Content, seeds: Sequence[int], flags: Sequence[str], **shared: Any) -> Iterator[Row]:
    """Every row with every seed; `shared` are fields that are the same in all."""
    own = read_flags(flags)
    protocol = [_shared(name, path.parent) for name in content.protocol]
    for seed in dict.fromkeys(seeds):
        for name, given in content.rows.items():
            where, row, merged = f"List '{path}', row '{name}'", given or RowContent(), {}
            configs = [_shared(file, path.parent) for file in row.config]
            for layer in (*protocol, *configs, OWN, content.common, row.settings):
                for one in layer.items():  # a YAML merge may give a setting by two names: the later one counts
                    overlay(merged, dict([one]), where)
            _check_settings(where, merged, own)
            overlay(merged, own, where)
            fields = shared | {"masks": shared["masks"] and MADE_ELSEWHERE not in merged}
            yield Row(name, seed, merged | {"run.seed": seed}, control=name in content.controls, **fields)


def _shared(file: str, folder: Path) -> dict[str, Any]:
    """Settings of a file without the name of its run: the runs of rows have names of their own."""
    return {name: value for name, value in read_settings(file, folder).items() if name != "run.name"}


def _check_settings(where: str, given: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Raise UserError for what neither a list nor a flag behind -- may set, and for consent that no such flag gives."""
    for name, instead in (
        ("run.seed", "seeds as `seeds` or --seeds"),
        ("run.name", "no --run.name, as rows have folders of their own"),
        ("dry_run", "no --dry_run, which is train.py's (--table runs nothing)"),
    ):
        if name in given or name in own:
            raise UserError(f"{where}: expected {instead}, got --{name}.")
    if given.get(CONSENT) and CONSENT not in own:
        raise UserError(f"{where}: expected --{CONSENT}=true behind --, got it in a list.")


def parts_of(rows: Sequence[Row], part: str | None) -> list[Row]:
    """Every n-th row from the i-th on, for `part` i/n; of all rows, so that shares do not depend on what is done."""
    if part is None:
        return list(rows)
    share = re.fullmatch(r"([0-9]+)/([0-9]+)", part)
    if not share or not 1 <= int(share[1]) <= int(share[2]):
        raise UserError(f"--part: expected I/N with 1 <= I <= N, such as 1/4, got '{part}'.")
    return list(rows[int(share[1]) - 1 :: int(share[2])])
