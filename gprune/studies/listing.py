"""List files: rows of settings by name, with the protocol they share. `gprune study` runs them.

A list is a YAML file with the keys of `Content`. Files that it names are looked for from its own folder.
"""

from __future__ import annotations

import json
import shlex
from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, dataclass, field, fields, is_dataclass, replace
from functools import cached_property
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from gprune.config import CONSENT, RunConfig, flat, parse
from gprune.config.parse import GROUPS
from gprune.errors import UserError
from gprune.report.table import TableName
from gprune.storage.yaml_text import read_yaml
from gprune.studies.grid import Point, named, points

EXPERIMENTS = Path(__file__).parents[2] / "experiments"  # of a clone
OTHER_RECORDS = Path("runs/records")
# Numbers do not depend on these: a row is the same row with and without them.
OWN = {"export": "none", "logging.mode": "disabled", "run.dir": "runs/experiments"}
Name = str | int | float  # YAML reads some names as numbers
TABLES = ("summary", "perplexity", "evaluation")
OF_MASKS = frozenset({"repeatability", "sparsity", "stability"})  # tables


@dataclass(frozen=True)
class Tasks:
    """What `gprune evaluate` measures on the model of every row."""

    names: list[Name]
    limit: int | None = None
    seq_len: int | list[int] | None = None
    dtype: str | None = None
    seeds: list[int] | None = None  # the rows of these seeds alone


@dataclass(frozen=True)
class Curve:
    """A figure of each row's stages over its own base: dotted names of two settings."""

    over: str  # the horizontal axis
    of: str  # a line for each of its values


@dataclass(frozen=True)
class Content:
    """What a list file holds, as YAML gives it: each key's type, and what it holds in words."""

    rows: Annotated[dict[Name, Any], "settings by name for each row"]
    """Settings of `train.py`, nested or dotted, by name of the row, and `config`: files to start from."""
    about: Annotated[str | None, "text"] = None
    protocol: Annotated[str | list[Name] | None, "a file or files"] = None
    """Under all rows."""
    common: Annotated[dict[str, Any] | None, "settings by name"] = None
    """Of all rows."""
    grid: Annotated[dict[Name, list[Any]] | None, "lists of values by setting"] = None
    """Every row once for each combination of these, such as sparsity.target: [0.2, 0.5]. Other keys of the list
    may name a row as `rows` does, and mean all of them."""
    reference: Annotated[Name | None, "a row"] = None
    """The row whose stage `base` all others are divided by that have as few parameters; in a grid, several."""
    compare: Annotated[list[tuple[Name, Name]] | None, "pairs of stages, such as ['a: gprune', 'b: base']"] = None
    spread: Annotated[dict[Name, list[Name]] | None, "lists of rows by name"] = None
    """Groups of rows that are to lie close together."""
    curve: Annotated[Curve | None, "settings as `over` and `of`, such as importance"] = None
    lines: Annotated[dict[Name, list[Name]] | None, "lists of rows by name"] = None
    """Lines of a figure over the tokens that its rows learned from, forward and backward."""
    controls: Annotated[list[Name] | None, "rows"] = None
    """Rows whose result is not gprune's."""
    seeds: Annotated[list[int] | None, "whole numbers"] = None
    tables: Annotated[list[TableName] | None, f"of {', '.join(get_args(TableName))}"] = None
    """Of the report's, those to print."""
    tasks: Annotated[Tasks | None, "names, such as names: [piqa, arc_easy], and of limit, seq_len, dtype and seeds"] = (
        None
    )
    seen: Annotated[list[Name] | None, "corpora"] = None
    """That count as seen in every row."""


@dataclass(frozen=True)
class Row:
    """One configuration with one seed."""

    name: str
    seed: int
    flags: tuple[str, ...]
    tasks: dict[str, Any]
    control: bool = False  # gprune's machinery with nothing learned: no result of the method's
    masks: bool = True  # whether records keep them; among those of the repository, where a table is about masks alone
    records: Path = OTHER_RECORDS  # where what came out is kept
    point: Point = field(default_factory=dict)  # of the grid

    @cached_property
    def config(self) -> RunConfig:
        """Raises UserError, with the row's name, for what train.py would refuse, and for a seed by another way."""
        try:
            found = parse(list(self.flags))
        except UserError as error:
            raise UserError(f"Row '{self.name}': {error}") from error
        if found.run.seed != self.seed:
            raise UserError(
                f"Row '{self.name}': expected seeds as `seeds` or --seeds, got {found.run.seed} from a file or a flag."
            )
        return found

    @property
    def wanted_tasks(self) -> dict[str, Any]:
        """The tasks of the list, unless it asks for them with other seeds only."""
        seeds = self.tasks.get("seeds")
        wanted = seeds is None or self.seed in seeds
        return {name: value for name, value in self.tasks.items() if name != "seeds"} if wanted else {}


@dataclass(frozen=True)
class Listing:
    """A list file that has been read."""

    path: Path
    about: str
    rows: list[Row]
    reference: tuple[str, ...]  # names of rows
    compare: list[tuple[str, str]]
    spread: dict[str, list[str]]
    curve: Curve | None
    lines: dict[str, list[str]]
    tables: tuple[str, ...]
    seen: list[str] | None  # None: each row's own

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
        grid = points(content.grid)

        def names(rows: Any) -> list[str]:
            return [named(name, point) for name in _names(rows) for point in grid]

        def paired(stage: Name, point: Point) -> str:
            row, colon, kind = str(stage).partition(": ")
            return f"{named(row, point)}{colon}{kind}"

        folder = Path(records) if records is not None else EXPERIMENTS / "records" if inside(path) else OTHER_RECORDS
        listing = cls(
            path=path,
            about=content.about or path.stem,
            rows=[replace(row, records=folder) for row in _rows(path, content, seeds, flags)],
            reference=() if content.reference is None else tuple(names([content.reference])),
            compare=[(paired(a, at), paired(b, at)) for a, b in content.compare or [] for at in grid],
            spread={str(group): names(rows) for group, rows in (content.spread or {}).items()},
            curve=Curve(**content.curve) if content.curve else None,
            lines={str(line): names(rows) for line, rows in (content.lines or {}).items()},
            tables=tuple(content.tables or TABLES),
            seen=None if content.seen is None else _names(content.seen),
        )
        _check_rows(listing, content)
        return listing


def inside(path: Path) -> bool:
    """Whether a list is one of ours."""
    return path.resolve().is_relative_to(EXPERIMENTS)


def read_content(path: Path) -> Content:
    """The keys of a list file, each of its type.

    Raises:
        UserError: for a file that is no YAML mapping with rows, an unknown key, or a value of another shape.
    """
    content = read_yaml(path, "List: expected a YAML file, got", pipe=True)
    content = content if isinstance(content, dict) else {}
    known = get_type_hints(Content, include_extras=True)
    if content.get("rows") is None or content.keys() - known.keys():
        unknown = ", ".join(sorted(map(str, content.keys() - known.keys())))
        raise UserError(
            f"List '{path}': expected a mapping with 'rows' and of {', '.join(sorted(known))}"
            + (f"; got {unknown}." if unknown else ".")
        )
    content = {key: value for key, value in content.items() if value is not None}
    settings = flat(RunConfig().settings())
    for key, value in content.items():
        kind, words = get_args(known[key])
        sound = fits(value, kind) and (key != "tasks" or value["names"])
        if not sound or (key == "curve" and not set(value.values()) <= settings.keys()):
            raise UserError(f"List '{path}', {key}: expected {words}; got {json.dumps(value, default=str)}.")
    return Content(**content)


def fits(value: Any, kind: Any) -> bool:
    """Whether what YAML gives has a type: a union, Literal, list, tuple (a list so long), dict, dataclass or class."""
    origin, parts = get_origin(kind), get_args(kind)
    if origin is UnionType:
        return any(fits(value, part) for part in parts)
    if origin is Literal:
        return isinstance(value, str) and value in parts
    if origin is list:
        return isinstance(value, list) and all(fits(v, parts[0]) for v in value)
    if origin is tuple:
        return isinstance(value, list) and len(value) == len(parts) and all(map(fits, value, parts))
    if origin is dict:
        return isinstance(value, dict) and all(fits(v, parts[1]) for v in value.values())
    if is_dataclass(kind):
        types, required = get_type_hints(kind), {f.name for f in fields(kind) if f.default is MISSING}
        return (
            isinstance(value, dict)
            and required <= value.keys() <= types.keys()
            and all(fits(v, types[name]) for name, v in value.items())
        )
    return kind is Any or type(value) is kind


def _rows(path: Path, content: Content, seeds: Sequence[int] | None, flags: Sequence[str]) -> Iterator[Row]:
    protocol, common = _configs(path, content.protocol), [*flags_of(OWN), *flags_of(content.common or {})]
    files = get_type_hints(Content)["protocol"]
    for seed in dict.fromkeys((content.seeds or [0]) if seeds is None else seeds):
        for name, settings in content.rows.items():
            if not isinstance(settings, dict | None):
                raise UserError(f"List '{path}', row '{name}': expected settings by name, got {settings!r}.")
            own = dict(settings or {})
            if not fits(config := own.pop("config", None), files):
                raise UserError(f"List '{path}', row '{name}', config: expected a file or files, got {config!r}.")
            for point in points(content.grid):
                given = (*common, *flags_of(own), *flags_of(point))
                _check_flags(f"List '{path}', row '{name}'", given, flags)
                here = (*protocol, *_configs(path, config), f"--run.seed={seed}", *given, *flags)
                control = str(name) in _names(content.controls)
                masks = not inside(path) or not OF_MASKS.isdisjoint(content.tables or ())
                yield Row(named(str(name), point), seed, here, content.tasks or {}, control, masks, point=point)


def _check_flags(where: str, given: Sequence[str], own: Sequence[str]) -> None:
    """Raise UserError for what a list may not set: seeds, a group as one text, consent that no `own` flag gives."""
    names = {flag.partition("=")[0].removeprefix("--") for flag in given}
    if groups := sorted(names & GROUPS.keys()):
        raise UserError(f"{where}: expected settings by name for the group {groups[0]}, got one text.")
    if "run.seed" in names or any(flag.partition("=")[0] == "--run.seed" for flag in own):
        raise UserError(f"{where}: expected seeds as `seeds` or --seeds, got --run.seed.")
    if any(flag.partition("=")[0] == "--dry_run" for flag in (*given, *own)):
        raise UserError(f"{where}: a list is run; expected no --dry_run, which is train.py's. --commands runs nothing.")
    if CONSENT in names and not any(CONSENT in one for one in own):
        raise UserError(f"{where}: expected --{CONSENT}=true behind --, got it in a list.")


def _check_rows(listing: Listing, content: Content) -> None:
    """Raise UserError for a key that names a row that there is not."""
    rows = list(dict.fromkeys(row.name for row in listing.rows))
    known, controls = _names(content.rows), [row.name for row in listing.rows if row.control]
    if unknown := [name for name in _names(content.controls) if name not in known]:
        raise UserError(f"List '{listing.path}', controls: expected rows ({', '.join(known)}), got '{unknown[0]}'.")
    for key, known, wanted in (
        ("reference", rows, listing.reference),
        ("compare", rows, [stage.partition(": ")[0] for pair in listing.compare for stage in pair]),
        ("lines", rows, [row for line in listing.lines.values() for row in line]),
        # gprune's results are what a spread is about
        (
            "spread",
            [row for row in rows if row not in controls],
            [r for group in listing.spread.values() for r in group],
        ),
    ):
        if unknown := [name for name in wanted if name not in known]:
            raise UserError(f"List '{listing.path}', {key}: expected rows ({', '.join(known)}), got '{unknown[0]}'.")


def _names(value: Any) -> list[str]:
    return [str(name) for name in value or ()]


def _configs(path: Path, names: Any) -> list[str]:
    names = [names] if isinstance(names, str) else names or []
    return [flag for name in names for flag in ("--config", str(path.parent / str(name)))]


def flags_of(settings: dict[str, Any]) -> list[str]:
    """Nested or dotted settings as flags of train.py; a mapping that is a setting takes the place of what was there."""
    return [
        f"--{name}={value if isinstance(value, str) else json.dumps(value, default=str)}"
        for name, value in flat(settings, whole=("sparsity.options",)).items()
        if name not in GROUPS or value != {}
    ]


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


def commands(path: str, rows: Sequence[Row], options: Namespace) -> Iterator[str]:
    """One command line per row, with the flags and the folder of records that `gprune study` was given."""
    flags = options.flags
    kept = [] if options.records is None else ["--records", str(options.records)]
    for row in rows:
        more = ["--", *flags] if flags else []
        command = ["python", "-m", "gprune", "study", path, "--only", row.name, "--seeds", str(row.seed), *kept, *more]
        yield shlex.join(command)
