"""Study lists: named rows of settings with a common protocol, which `gprune study` runs.

A list is a YAML file with the keys of `Content`. Files in it are looked up relative to the list's folder, then among
the shipped configurations (`--config`).
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from gprune.benchmarks.settings import Benchmarks, parse_benchmarks
from gprune.checks import Text, validation_message
from gprune.config import CONSENT, RunConfig, config_from_mapping, flatten, read_flags, read_settings
from gprune.config.elsewhere import PRUNING_SETTINGS, made_elsewhere, with_made_elsewhere, without_pruning
from gprune.config.parse import GROUPS, as_flag, overlay
from gprune.errors import UserError
from gprune.report import TableName, prune_command
from gprune.storage.files import read_json
from gprune.storage.yaml_text import read_yaml

EXPERIMENTS = Path(__file__).parents[2] / "experiments"  # exists in a clone of the repository
LISTS = EXPERIMENTS / "lists"  # with their records in `records`
OTHER_RECORDS = Path("runs/records")
# Defaults of all rows. They do not change results, so they are not part of a row's identity.
ROW_DEFAULTS = {"evaluation.prompts": [], "export": "none", "run.dir": "runs/experiments"}
LISTED_PRECISION = "32-true"  # default of rows, so that a row means the same on every machine
TABLES = ("summary", "perplexity", "evaluation", "means")

# YAML reads some names as numbers.
Name = Annotated[Text, BeforeValidator(lambda name: str(name) if type(name) in (int, float) else name)]
Names = list[Name]
Files = Annotated[Names, BeforeValidator(lambda files: [files] if isinstance(files, str) else files)]
Pair = Annotated[Names, Field(min_length=2, max_length=2)]


class RowContent(BaseModel):
    """A row: settings of `train.py`, nested or by dotted name, and the keys below."""

    model_config = ConfigDict(strict=True, extra="allow", frozen=True)
    config: Files = []
    """Files with settings from which the row starts."""
    model: Text | dict[str, Any] | None = None
    """Folder or hub id of a causal language model that is measured instead of being pruned by gprune
    (`gprune.measure`), or settings of the group `model`."""
    row: Text | None = None
    """Another list's row, as LIST.yaml:ROW, whose settings and record this row has. It has no other key."""
    commit: Name | None = None
    """The commit that made the row's record, for a row that cannot be run any more because one of its settings was
    removed. It has no other key: its settings are those of the record."""

    @model_validator(mode="after")
    def check_keys(self) -> Self:
        """Raise UserError for a row with settings beside the key `row` or `commit`."""
        for key in ("row", "commit"):
            others = [*self.model_extra, *(self.model_fields_set - {key})]
            if getattr(self, key) is not None and others:
                raise UserError(f"The key {key} must be the only key of a row; got '{others[0]}' too.")
        return self

    @property
    def made_elsewhere(self) -> str | None:
        """Folder or hub id of the measured model; None for a row that prunes."""
        is_yaml_mapping = isinstance(self.model, str) and self.model.lstrip().startswith("{")  # in quotes by mistake
        return self.model if isinstance(self.model, str) and not is_yaml_mapping else None

    @property
    def settings(self) -> dict[str, Any]:
        """Settings given in the row itself, without those of its files."""
        if self.made_elsewhere is not None:
            return {"recovery": "none"} | self.model_extra
        return self.model_extra | ({} if self.model is None else {"model": self.model})


class Content(BaseModel):
    """Keys of a list file."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)
    rows: dict[Name, RowContent | None]
    about: str | None = None
    protocol: Files = []
    """Files with settings of all rows."""
    common: dict[str, Any] = {}
    """Settings of all rows, which override `protocol`."""
    compare: list[Pair] = []
    """Pairs of rows to compare: the unseen perplexity of the first one's final model divided by the second one's."""
    seeds: list[int] = [0]
    tables: list[TableName] = list(TABLES)
    """Tables to print; `corpora` is the summary for many corpora."""
    masks: bool = False
    """Store masks in the records of a list in `experiments/`; other lists always store them."""
    tasks: dict[str, Any] = {}
    """Arguments of `gprune evaluate` for the model of every row: `names` of tasks, and flags such as `limit`."""
    seen: Names | None = None
    """Corpora that count as seen in every row. Default: the corpora that the row has seen."""

    @model_validator(mode="after")
    def check_rows(self) -> Self:
        """Raise UserError if a pair names an unknown row, or a task cannot be measured."""
        if unknown := [name for pair in self.compare for name in pair if name not in self.rows]:
            raise UserError(f"The key compare must name rows ({', '.join(self.rows)}); got '{unknown[0]}'.")
        if self.tasks:
            benchmarks_of(self.tasks)
        return self


@dataclass(frozen=True)
class Row:
    """A configuration with a seed."""

    name: str
    seed: int
    settings: dict[str, Any]  # settings of the list, by dotted name
    study: str = ""  # name of the list
    records: Path = OTHER_RECORDS  # folder of records of all lists
    owner: tuple[str, str] = ("", "")  # names of the list and the row to which the record belongs
    flags: dict[str, Any] = field(default_factory=dict)  # settings of the command line, by dotted name
    tasks: dict[str, Any] = field(default_factory=dict)  # empty if the list has no tasks
    masks: bool = True  # whether to store masks; a model made elsewhere has none
    made_elsewhere: str | None = None  # the model that is measured instead of being pruned by gprune
    commit: str | None = None  # that made the record of a row that cannot be run any more
    given: tuple[str, ...] = ()  # dotted names of the settings of the row itself, without those of files and the list

    @cached_property
    def config(self) -> RunConfig:
        """Configuration of the row. Its metrics and so on need not be registered, as records are read without them."""
        where = f"Row '{self.name}'"
        cfg = config_from_mapping(self._applied_settings, where=where, check=False)
        if cfg.trainer.precision == "auto":
            must = "must be 32-true or bf16-mixed in a list, so that records do not depend on the machine"
            raise UserError(f"{where}: --trainer.precision {must}; got auto.")
        if self.made_elsewhere is not None and self.commit is None:
            subject = f"{where}: A model made elsewhere"
            if cfg.recovery != "none":
                remedy = "Distil it with `python -m experiments.distil`, and measure the folder"
                raise UserError(f"{subject} needs --recovery none; got {cfg.recovery}. {remedy}.")
            cfg = without_pruning(cfg, subject)
        return cfg

    @cached_property
    def file(self) -> Path:
        """The file of the record."""
        study, name = self.owner
        return self._folder(study) / f"{file_name(name)}-seed{self.seed}.json"

    @cached_property
    def tasks_file(self) -> Path:
        """The file with the results of the list's tasks on the row's model."""
        return self._folder(self.study) / "tasks" / f"{file_name(self.name)}-seed{self.seed}.json"

    def _folder(self, study: str) -> Path:
        """Return the folder of a list's records, with the flags in its name if they change the settings of the row."""
        if self.flags and self.identity != replace(self, flags={}).identity:
            study = "--".join([study, *(f"{name}={value}" for name, value in self.flags.items())])
        return self.records / file_name(study)

    @property
    def benchmarks(self) -> Benchmarks:
        """What `gprune evaluate` measures for the row's tasks."""
        return benchmarks_of(self.tasks, trust_remote_code=self.config.model.trust_remote_code)

    def check(self) -> None:
        """Raise UserError for an unknown name, and for settings that contradict each other or are not used."""
        where = f"Row '{self.name}'"
        cfg = config_from_mapping(self._applied_settings, where=where)
        if self.made_elsewhere is None:
            cfg.check_used(self.given, where)

    @property
    def identity(self) -> dict[str, Any]:
        """The settings that identify the row in records, with the model made elsewhere, if there is one."""
        settings = self.config.settings()
        return settings if self.made_elsewhere is None else with_made_elsewhere(settings, self.made_elsewhere)

    @property
    def command(self) -> str:
        """The shell command that runs this row alone, without its tasks and without a record."""
        settings = self._applied_settings
        if self.config.unused(settings):  # a setting of all rows need not be used by each of them
            settings = settings | {"allow_unused": True}
        flags = [as_flag(*setting) for setting in settings.items()]
        if self.made_elsewhere is None:
            return shlex.join([*prune_command(), *flags])
        models = f"{self.made_elsewhere!r}, {self.config.model.name!r}"
        code = f"import gprune, sys; print(gprune.measure({models}, gprune.config.parse(sys.argv[1:])).to_string())"
        return shlex.join(["python", "-c", code, *flags])

    @property
    def _applied_settings(self) -> dict[str, Any]:
        """Settings of the row, with the precision of lists, without those of pruning for a model made elsewhere."""
        given = self.settings | {"run.seed": self.seed} | self.flags
        settings = {"trainer.precision": LISTED_PRECISION, "evaluation.before_recovery": False} | given
        if self.commit is not None:
            return _settings_of_record(replace(self, flags={}, commit=None).file) | given
        if self.made_elsewhere is None:
            return settings
        # Settings of pruning, such as those that all rows share, do not apply.
        others = {name: value for name, value in settings.items() if name.partition(".")[0] not in PRUNING_SETTINGS}
        return others | {"gprune": False}


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

        `seeds` replace those of the list, `flags` are set in every row, and `records` is the folder of the records
        (`experiments/lists/records` for lists in `experiments/lists/`).
        """
        path = Path(path)
        content = read_content(path)
        protocol, flag_settings = _read_protocol(path, content), read_flags(flags)
        rows = []
        for seed in dict.fromkeys(seeds or content.seeds):
            rows += [_read_row(path, content, protocol, name, seed, flag_settings, records) for name in content.rows]
        return cls(path, content, rows)


def read_content(path: Path) -> Content:
    """Read and validate the keys of a list file. Keys whose value is null count as absent."""
    if (place := place_in_project(path)) and not path.exists():
        raise UserError(f"The list must be a YAML file; got '{path}' (No such file or directory). {place}.")
    content = read_yaml(path, "The list must be a YAML file; got")
    if isinstance(content, dict):
        content = {key: value for key, value in content.items() if value is not None}
        rows = content.get("rows")
        names = [str(name) for name in rows] if isinstance(rows, dict) else []
        files = [file_name(name).casefold() for name in names]
        if shared := [name for name, file in zip(names, files, strict=True) if files.count(file) > 1]:
            raise UserError(
                f"The rows of list '{path}' must have names with different letters or digits, because files of records "
                f"are named after them; got '{shared[0]}'."
            )
    try:
        return Content.model_validate(content)
    except ValidationError as error:
        raise UserError(f"List '{path}': {validation_message(error)}.") from error


def place_in_project(path: Path) -> str:
    """Return where the list or record of the project is that a path in `experiments/` names; empty for other paths."""
    if "experiments" not in path.parts:
        return ""
    of_project = EXPERIMENTS.joinpath(*path.parts[path.parts.index("experiments") + 1 :])
    for file in (of_project, LISTS / path.name):
        if file.is_file():
            return f"The file of the project is {file}"
    if EXPERIMENTS.is_dir():
        return f"Lists and records of the project are in {LISTS}"
    return "Lists and records of the project are in experiments/ of its repository, and not in the installed package"


def benchmarks_of(tasks: Mapping[str, Any], **others: Any) -> Benchmarks:
    """Convert the tasks of a list to `Benchmarks`."""
    settings = dict(tasks) | others
    settings["tasks"] = settings.pop("names", ())
    if isinstance(settings.get("seq_len"), int):
        settings["seq_len"] = [settings["seq_len"]]
    return parse_benchmarks(**settings)


def _read_protocol(path: Path, content: Content) -> list[dict[str, Any]]:
    """Read the settings of the protocol's files, which all rows of a list share."""
    return [_read_row_settings(file, path.parent) for file in content.protocol]


def _read_row(
    path: Path, content: Content, protocol: Sequence[dict[str, Any]], name: str, seed: int, flags: Mapping[str, Any],
    records: Path | str | None,
) -> Row:  # fmt: skip
    """Return a row of a list with a seed."""
    where = f"List '{path}', row '{name}'"
    row = content.rows[name] or RowContent()
    if row.row is not None:
        of_owner = _read_owner(where, path, row.row, seed, flags, records)
        # Records of our own lists would become too large with masks.
        return replace(of_owner, name=name, study=path.stem, tasks=content.tasks, masks=of_owner.masks or content.masks)
    settings: dict[str, Any] = {}
    configs = [_read_row_settings(file, path.parent) for file in row.config]
    for layer in (*protocol, *configs, ROW_DEFAULTS, content.common, row.settings):
        # One by one, because a YAML merge may give a setting both nested and dotted, and the later one counts.
        for key, value in layer.items():
            overlay(settings, {key: value}, where)
    _check_settings(where, settings, flags)
    is_experiment = path.resolve().is_relative_to(LISTS)
    default_folder = LISTS / "records" if is_experiment else OTHER_RECORDS
    result = Row(
        name, seed, settings, study=path.stem, records=Path(records or default_folder),
        owner=(path.stem, name), flags=dict(flags), tasks=content.tasks,
        masks=(content.masks or not is_experiment) and row.made_elsewhere is None,
        made_elsewhere=row.made_elsewhere, given=tuple(flatten(row.settings)),
    )  # fmt: skip
    if row.commit is None:
        return result
    settings = {name: value for name, value in settings.items() if name.startswith("logging.")}
    of_record = (read_json(replace(result, flags={}).file) or {"settings": {}})["settings"]
    return replace(result, settings=settings, masks=False, made_elsewhere=made_elsewhere(of_record), commit=row.commit)


def _read_owner(
    where: str, path: Path, name: str, seed: int, flags: Mapping[str, Any], records: Path | str | None
) -> Row:
    """Return the row of another list that the key `row` names."""
    list_name, _, row_name = name.partition(":")
    owner = path.parent / list_name
    content = read_content(owner) if owner.suffix in (".yaml", ".yml") else None
    if content is None or row_name not in content.rows:
        raise UserError(f"{where}: The key row must name a row as LIST.yaml:ROW; got '{name}'.")
    if content.rows[row_name] is not None and content.rows[row_name].row is not None:
        raise UserError(f"{where}: The key row must name a row with its own record; '{name}' has that of another row.")
    return _read_row(owner, content, _read_protocol(owner, content), row_name, seed, flags, records)


def file_name(name: str) -> str:
    """Convert the name of a list or a row to the name of its folder or file: words of letters and digits."""
    words = "".join(letter if letter.isalnum() or letter in "=._-" else " " for letter in name).split()
    return "-".join(words).encode()[:150].decode(errors="ignore")  # a file name has at most 255 bytes


def _settings_of_record(path: Path) -> dict[str, Any]:
    """Return the settings of a record that this version has, by dotted name; none if there is no such record."""
    settings: dict[str, Any] = {}
    for name, value in (read_json(path) or {}).get("settings", {}).items():
        if name in GROUPS:
            known = GROUPS[name].model_fields
            settings |= {f"{name}.{setting}": of_group for setting, of_group in value.items() if setting in known}
        elif name in RunConfig.model_fields:
            settings[name] = value
    return settings


def _read_row_settings(file: str, folder: Path) -> dict[str, Any]:
    """Read the settings of a file except `run.name`, because every row has its own run folder."""
    return {name: value for name, value in read_settings(file, folder).items() if name != "run.name"}


def _check_settings(where: str, settings: Mapping[str, Any], flag_settings: Mapping[str, Any]) -> None:
    """Raise UserError for settings that a study sets itself, and for consent to remote code in a list."""
    for name, remedy in (
        ("run.seed", "Use the key `seeds`, or --seeds"),
        ("run.name", "Every row has its own folder"),
        ("dry_run", "Use train.py, or --table, which runs nothing"),
    ):
        if name in settings or name in flag_settings:
            raise UserError(f"{where}: --{name} cannot be set in a study. {remedy}.")
    if settings.get(CONSENT) and CONSENT not in flag_settings:
        raise UserError(f"{where}: --{CONSENT}=true must be given after -- on the command line, not in a list.")


def select_part(rows: Sequence[Row], part: str | None) -> list[Row]:
    """Select every N-th row from the I-th on, for a `part` I/N. None selects all rows."""
    if part is None:
        return list(rows)
    match = re.fullmatch(r"([0-9]+)/([0-9]+)", part)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise UserError(f"--part must be I/N with 1 <= I <= N, such as 1/4; got '{part}'.")
    start, step = int(match[1]) - 1, int(match[2])
    return list(rows[start::step])
