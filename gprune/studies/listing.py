"""List files: rows of settings by name, with the protocol they share. `gprune study` runs them.

A list is YAML: `protocol` (files under all rows), `common` settings, `rows` by name (settings of `train.py`, nested or
dotted, and `config`, files to start from), `reference` (the row whose stage `base` all others are divided by),
`compare` (pairs of stages), `spread` (groups of rows that are to lie close together), `curve` (`over` which setting, a
line for each value `of` another: each row's stages over its own base), `controls` (rows whose result is not gprune's),
`seen` (corpora that count as seen in every row), `seeds`, `tables` (of `gprune report`, those to print), and `tasks`
for `gprune evaluate`. Files are named from the list's own folder.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

import gprune
from gprune import cli
from gprune.errors import UserError
from gprune.storage.files import key_of, read_json

RECORDS = Path(__file__).parent / "records" / "runs"
# Numbers do not depend on these: a row is the same row with and without them.
OWN = {"export": "none", "logging.mode": "disabled", "run.dir": "runs/experiments"}
TABLES = ("summary", "perplexity", "evaluation")
Name = str | int | float
ALL_TABLES = {*TABLES, "records", "comparison", "sparsity", "stability", "repeatability"}


@dataclass(frozen=True)
class Row:
    """One configuration with one seed."""

    name: str
    seed: int
    flags: tuple[str, ...]
    tasks: dict[str, Any]
    control: bool = False  # gprune's machinery with nothing learned: no result of the method's

    @cached_property
    def config(self) -> gprune.RunConfig:
        """Raises UserError, with the row's name, for what train.py would refuse."""
        try:
            return cli.parse(list(self.flags))
        except (UserError, argparse.ArgumentError) as error:
            raise UserError(f"Row '{self.name}': {error}") from error

    @property
    def wanted_tasks(self) -> dict[str, Any]:
        """The tasks of the list, unless it asks for them with other seeds only."""
        wanted = self.seed in self.tasks.get("seeds", [self.seed])
        return {name: value for name, value in self.tasks.items() if name != "seeds"} if wanted else {}

    @cached_property
    def path(self) -> Path:
        """Where its record is, under whatever name another list gave the row; or where it will be.

        Told apart by the settings that are not the defaults, so that a setting that is new today, at its default,
        leaves yesterday's records what they were.
        """
        default, settings = (flat(plain(cfg.settings())) for cfg in (gprune.RunConfig(), self.config))
        key = key_of(settings={name: value for name, value in settings.items() if value != default.get(name)})[:10]
        slug = "-".join("".join(c if c.isalnum() else " " for c in self.name.lower()).split())
        there = sorted(RECORDS.glob(f"*-{key}*.json"))
        # A record under this key may be of other settings, those of a default that has changed since: it stays.
        numbers = itertools.chain([""], (f"-{n}" for n in itertools.count(1)))
        names = (RECORDS / f"{slug}-seed{self.seed}-{key}{number}.json" for number in numbers)
        fresh = (path for path in names if not path.exists())
        return next((path for path in there if self.may_use(read_json(path))), None) or next(fresh)

    def may_use(self, kept: dict[str, Any] | None) -> bool:
        """Whether a record is this row's, and has its tasks or none: those of other lists are not written over."""
        return self.is_of(kept) and (self.wanted_tasks in ({}, kept.get("tasks", self.wanted_tasks)))

    def is_of(self, kept: dict[str, Any] | None) -> bool:
        """Whether a record is this row's.

        A setting that did not exist then had its default's effect; one whose default has changed since had the old
        one's.
        """
        if kept is None:
            return False
        default = gprune.RunConfig().settings()
        then, now = (flat(plain(s)) for s in (kept["settings"], self.config.settings()))
        return flat(plain(default)) | then == now


@dataclass(frozen=True)
class Listing:
    """A list file."""

    path: Path
    about: str
    rows: list[Row]
    reference: str | None
    compare: list[tuple[str, str]]
    spread: dict[str, list[str]]
    curve: dict[str, str] | None  # dotted names of settings: `over` one, a line for each value `of` the other
    tables: tuple[str, ...]  # of the report's, those that are printed
    seen: list[str] | None  # corpora that count as seen in every row; None: each row's own

    @classmethod
    def read(cls, path: Path | str, *, seeds: Sequence[int] | None = None, flags: Sequence[str] = ()) -> Listing:
        """Parse a list; `flags` come last in every row.

        Raises:
            UserError: for a file that is none, an unknown key, a row that is no mapping or that there is not.
        """
        path = Path(path)
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
            raise UserError(f"List '{path}': expected a YAML file, but {type(error).__name__} came up.") from error
        content = content if isinstance(content, dict) else {}
        if content.get("rows") is None or set(content) - set(SHAPES):
            unknown = sorted(set(content) - set(SHAPES), key=str)
            raise UserError(
                f"List '{path}': expected a mapping with 'rows' and of {', '.join(sorted(SHAPES))}"
                + (f"; got {', '.join(map(str, unknown))}." if unknown else ".")
            )
        content = _checked(path, {key: value for key, value in content.items() if value is not None})
        protocol = _configs(path, content.get("protocol"))
        common = [*flags_of(OWN), *flags_of(content.get("common", {}))]
        rows = []
        for seed in dict.fromkeys(content.get("seeds", [0]) if seeds is None else seeds):
            for name, settings in content["rows"].items():
                settings = dict(settings)
                files = [*protocol, *_configs(path, settings.pop("config", None))]
                own = (*common, *flags_of(settings), *flags)
                if any(flag.partition("=")[0] == "--run.seed" for flag in own):
                    raise UserError(
                        f"List '{path}', row '{name}': expected seeds as `seeds` or --seeds, got --run.seed."
                    )
                given = (*files, f"--run.seed={seed}", *own)
                rows.append(Row(name, seed, given, content.get("tasks", {}), name in content.get("controls", [])))
        return cls(
            path, content.get("about", path.stem), rows, content.get("reference"),
            [(a, b) for a, b in content.get("compare", [])], content.get("spread", {}), content.get("curve"),
            tuple(content.get("tables", TABLES)), content.get("seen"),
        )  # fmt: skip


def _names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, Name) for name in value)


def _curve(value: Any) -> bool:
    known = flat(gprune.RunConfig().settings())
    return isinstance(value, dict) and set(value) == {"over", "of"} and all(str(v) in known for v in value.values())


def _whole_numbers(value: Any) -> bool:
    return isinstance(value, list) and all(type(number) is int for number in value)


TASKS: dict[str, Callable[[Any], bool]] = {
    "names": _names,
    "limit": lambda v: type(v) is int,
    "seq_len": lambda v: type(v) is int,
    "dtype": lambda v: isinstance(v, str),
    "seeds": _whole_numbers,
}
# What each key holds, for people, and whether a value does.
SHAPES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "about": ("text", lambda v: isinstance(v, str)),
    "protocol": ("a file or files", lambda v: isinstance(v, str) or _names(v)),
    "common": ("settings by name", lambda v: isinstance(v, dict)),
    "rows": ("settings by name for each row", lambda v: isinstance(v, dict)),
    "reference": ("a row", lambda v: isinstance(v, Name)),
    "compare": (
        "pairs of stages, such as ['a: gprune', 'b: base']",
        lambda v: isinstance(v, list) and all(_names(pair) and len(pair) == 2 for pair in v),
    ),
    "spread": ("lists of rows by name", lambda v: isinstance(v, dict) and all(map(_names, v.values()))),
    "curve": ("settings as `over` and `of`, such as importance", _curve),
    "controls": ("rows", _names),
    "seeds": ("whole numbers", _whole_numbers),
    "tables": (f"of {', '.join(sorted(ALL_TABLES))}", lambda v: _names(v) and set(v) <= ALL_TABLES),
    "tasks": (
        "names, such as names: [piqa, arc_easy], and of limit, seq_len, dtype and seeds",
        lambda v: (
            isinstance(v, dict)
            and all(name in TASKS and TASKS[name](value) for name, value in v.items())
            and bool(v.get("names"))
        ),
    ),
    "seen": ("corpora", _names),
}


def _checked(path: Path, content: dict[str, Any]) -> dict[str, Any]:
    """The content with all names as text, which YAML may have read as numbers.

    Raises:
        UserError: for a value of another shape, and for a row that there is not.
    """
    for key, value in content.items():
        expected, fits = SHAPES[key]
        if not fits(value):
            raise UserError(f"List '{path}', {key}: expected {expected}; got {json.dumps(value, default=str)}.")
    rows = {str(name): {} if settings is None else settings for name, settings in content["rows"].items()}
    for name, settings in rows.items():
        if not isinstance(settings, dict):
            raise UserError(f"List '{path}', row '{name}': expected settings by name, got {settings!r}.")
        if not SHAPES["protocol"][1](settings.get("config") or []):
            raise UserError(
                f"List '{path}', row '{name}', config: expected a file or files, got {settings['config']!r}."
            )
    content = content | {"rows": rows}
    for key in {"controls", "seen"} & content.keys():
        content[key] = [str(name) for name in content[key]]
    if "reference" in content:
        content["reference"] = str(content["reference"])
    content["compare"] = [[str(stage) for stage in pair] for pair in content.get("compare", [])]
    content["spread"] = {str(k): [str(name) for name in group] for k, group in content.get("spread", {}).items()}
    controls = content.get("controls", [])
    for key, known, wanted in (
        ("reference", rows, [content["reference"]] if "reference" in content else []),
        ("compare", rows, [stage.partition(": ")[0] for pair in content["compare"] for stage in pair]),
        ("controls", rows, controls),
        (
            "spread", [name for name in rows if name not in controls],  # gprune's results are what it is about
            [name for group in content["spread"].values() for name in group],
        ),
    ):  # fmt: skip
        if unknown := [name for name in wanted if name not in known]:
            raise UserError(f"List '{path}', {key}: expected rows ({', '.join(known)}), got '{unknown[0]}'.")
    return content


def _configs(path: Path, names: str | list[str] | None) -> list[str]:
    names = [names] if isinstance(names, str) else names or []
    return [flag for name in names for flag in ("--config", str(path.parent / name))]


def flags_of(settings: dict[str, Any], prefix: str = "") -> list[str]:
    """Nested or dotted settings as flags of train.py."""
    flags = []
    for name, value in settings.items():
        if isinstance(value, dict):
            flags += flags_of(value, f"{prefix}{name}.")
        else:
            flags.append(f"--{prefix}{name}={value if isinstance(value, str) else json.dumps(value, default=str)}")
    return flags


def plain(value: Any) -> Any:
    """As JSON gives it back."""
    return json.loads(json.dumps(value))


def flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted name."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return found


def parts_of(rows: Sequence[Row], part: str | None) -> list[Row]:
    """Every n-th row from the i-th on, for `part` i/n; of all rows, so that shares do not depend on what is done."""
    if part is None:
        return list(rows)
    try:
        index, count = map(int, part.split("/"))
        if not 1 <= index <= count:
            raise ValueError
    except ValueError as error:
        raise UserError(f"--part: expected I/N with 1 <= I <= N, such as 1/4, got '{part}'.") from error
    return list(rows[index - 1 :: count])


def commands(path: str, rows: Sequence[Row], flags: Sequence[str]) -> Iterator[str]:
    """One command line per row."""
    for row in rows:
        more = ["--", *flags] if flags else []
        command = ["python", "-m", "gprune", "study", path, "--only", row.name, "--seeds", str(row.seed), *more]
        yield shlex.join(command)
