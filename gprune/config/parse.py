"""Parse flags, YAML files and plain data into a RunConfig. They merge left to right; RunConfig's types check them."""

from __future__ import annotations

import argparse
import inspect
import os
import sys
from argparse import SUPPRESS
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml

from gprune.checks import shown
from gprune.config.groups import Group
from gprune.config.run_config import NOT_OF_OTHERS, RunConfig
from gprune.config.running import RELATIVE_RATE
from gprune.console import Parser, write_stdout
from gprune.errors import UserError
from gprune.imports import use
from gprune.storage.yaml_text import load_yaml, read_yaml, reason, to_yaml

SHIPPED = Path(__file__).parents[1] / "configs"  # configurations that --config knows by name
CONSENT = "model.trust_remote_code"
GROUPS: dict[str, type[Group]] = {  # groups of flags by name
    name: info.annotation for name, info in RunConfig.model_fields.items() if hasattr(info.annotation, "prefix")
}
HINTS = {
    f"{kind.prefix}{n}": hint for kind in (RunConfig, *GROUPS.values()) for n, hint in get_type_hints(kind).items()
}
# Settings removed since earlier versions, with the value that matches today's behaviour (`...`: any value does).
REMOVED = {
    "corpora.separator": "blank", "distill.hidden": 0.0, "distill.points": 4,
    "partition.subtract_noise": False, "sparsity.schedule": [],
    "evaluation.samples": ..., "logging.tracker": ...,
}  # fmt: skip


def parse(args: Sequence[str] | None = None, prog: str = "train.py") -> RunConfig:
    """Parse the flags of train.py into a RunConfig. `--help` and `--print_config` print and exit.

    Args:
        args: flags; by default those of this process.
        prog: the command that `--help` shows: `train.py`, or `gprune prune`.

    Raises:
        UserError: if a flag or a file is invalid.
    """
    args = list(sys.argv[1:] if args is None else args)
    if not {"-h", "--help"}.isdisjoint(args):
        parser(prog).parse_args(["--help"])
    cfg = configured(read_flags([arg for arg in args if arg != "--print_config"]))
    if "--print_config" in args:
        write_stdout(to_yaml(cfg.model_dump()))
        raise SystemExit(0)
    return cfg


def configured(layer: Mapping[str, Any], where: str = "") -> RunConfig:
    """Build a RunConfig from plain data: nested, by dotted name, or both. Other settings have their defaults.

    Args:
        layer: the settings.
        where: put before errors, such as "Row 'base'".

    Raises:
        UserError: if a setting is unknown, has a wrong type or range, or contradicts another one.
    """
    settings: dict[str, Any] = {}
    overlay(settings, layer, where or "Settings")
    nested: dict[str, Any] = {}
    for name, value in settings.items():
        group, _, setting = name.rpartition(".")
        (nested.setdefault(group, {}) if group else nested)[setting] = value
    try:
        return RunConfig(**nested)
    except UserError as error:
        raise type(error)(f"{where}: {error}" if where else str(error)) from error


def overlay(settings: dict[str, Any], layer: Mapping[str, Any], where: str) -> None:
    """Update `settings`, which has dotted names, by a layer of settings, nested or with dotted names.

    A single option such as `sparsity.options.spread` is added to the others; a mapping `sparsity.options` replaces
    them all. Errors begin with `where`.
    """
    dotted: list[tuple[str, Any]] = []
    for name, value in layer.items():
        if name not in GROUPS:
            dotted.append((str(name), value))
        elif isinstance(value, Mapping | None):
            dotted += [(f"{name}.{inner}", leaf) for inner, leaf in (value or {}).items()]
        elif setting := GROUPS[name].plain_setting:
            dotted.append((f"{name}.{setting}", value))
        else:
            raise UserError(f"{where}: {name} must be a mapping of settings; got {shown(value)}.")
    names = [name for name, _ in dotted]
    for name, value in dotted:
        if names.count(name) > 1:
            raise UserError(f"{where}: Each setting must be given once; got '{name}' twice.")
        key, _, option = name.partition(".")
        RunConfig.check_name(key, where)
        if key in GROUPS:
            setting, _, option = option.partition(".")
            GROUPS[key].check_name(setting, where)
            key = f"{key}.{setting}"
        settings[key] = _put(settings.get(key), option, value) if option else value


def _put(others: Any, option: str, value: Any) -> dict[str, Any]:
    """Return the options with one added: `power`, or `mine.power` in the nested options `mine`."""
    outer, _, inner = option.rpartition(".")
    others = dict(others) if isinstance(others, Mapping) else {}
    return others | ({outer: _put(others.get(outer), inner, value)} if outer else {inner: value})


def read_flags(args: Sequence[str]) -> dict[str, Any]:
    """Read flags of train.py, and the --config files among them, into settings by dotted name.

    Raises:
        UserError: if a flag has no value, a setting is unknown, or a file sets `model.trust_remote_code`. The person
            who runs a model's code has to consent, not the author of the file.
    """
    settings: dict[str, Any] = {}
    targets: list[str] = []
    left = iter(args)
    for arg in left:
        flag, given, text = arg.partition("=")
        name = flag.removeprefix("--")
        if name == flag:
            raise UserError(f"Arguments must be flags such as --sparsity.target 0.5; got {shown(arg)}. See --help.")
        text = text if given else next(left, "--")
        if not given and text.startswith("--"):
            raise UserError(f"{flag} must be followed by a value. See --help.")
        if name == "import":
            use(text)
        elif name == "config":
            content = read_settings(text)
            if content.pop(CONSENT, False) not in (None, False) and not any(CONSENT in one for one in args):
                raise UserError(f"--config {text}: {CONSENT} must be given as a flag, not in a file.")
            overlay(settings, content, f"--config {text}")
        else:
            overlay(settings, {name: _value(flag, text)}, flag)
            targets += [text] * (name == "sparsity.target")
    if len(kinds := {text[:1] == "+": text for text in targets}) > 1:  # of other flags that are repeated the last wins
        raise UserError(f"--sparsity.target must be a quality or an amount; got both {' and '.join(kinds.values())}.")
    return settings


def flags_of(args: Sequence[str]) -> set[str]:
    """Names of the settings that are given as flags, not in a file."""
    return {arg.partition("=")[0].removeprefix("--") for arg in args if arg.startswith("--")}


def _value(flag: str, text: str) -> Any:
    """Parse the text of a flag as YAML. The value of a text setting is kept as text unless it is null or a list."""
    is_text = HINTS.get(flag.removeprefix("--")) in (str, str | None)
    try:
        value = load_yaml(text)
    except yaml.YAMLError as error:
        if is_text:
            return text
        raise UserError(f"{flag} must be valid YAML; got {shown(text)} ({reason(error)}).") from error
    return text if is_text and not isinstance(value, list | None) else value


def read_settings(name: Path | str, folder: Path | str = "") -> dict[str, Any]:
    """Read settings from a YAML file or a shipped configuration, by dotted name.

    Args:
        name: path of a file, relative to `folder`; or the name of a shipped configuration (`best`, `gates`, `paper`,
            `protocol`, `smoke`, `untrained`) if there is no such file.
        folder: by default the working folder.

    Raises:
        UserError: if the file is missing or not YAML, a setting is unknown or repeated, or a group has a plain value.
    """
    shipped = {file.stem: file for file in sorted(SHIPPED.glob("*.yaml"))}
    path = os.path.join(folder, name)
    if name in shipped and not (os.path.exists(path) and not os.path.isdir(path)):
        path = shipped[name]
    what = f"--config must be a YAML file of flags or one of {', '.join(shipped)}; got"
    content = read_yaml(path, what, pipe=True)
    if not isinstance(content, dict | None):
        # The content is not quoted, because a study list from elsewhere may name any file of this machine.
        raise UserError(f"--config {path}: The file must hold settings such as `sparsity: {{target: 0.5}}`.")
    settings: dict[str, Any] = {}
    overlay(settings, content or {}, f"--config {path}")
    return settings


def migrated(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Convert nested settings stored by an earlier version to those of this version.

    A `distill.learning_rate` of earlier versions was in the units of the weights. A setting in `REMOVED` is dropped if
    it has the value in that table.
    """
    current = {group: dict(value) if isinstance(value, dict) else value for group, value in settings.items()}
    for name, value in REMOVED.items():
        group, _, setting = name.partition(".")
        if isinstance(own := current.get(group), dict) and value in (..., own.get(setting)):
            own.pop(setting, None)
    distill = current.get("distill")
    if isinstance(distill, dict) and "learning_rate" in distill and "absolute_learning_rate" not in distill:
        distill["absolute_learning_rate"], distill["learning_rate"] = distill["learning_rate"], RELATIVE_RATE
    return current


def check_settings(settings: Mapping[str, Any]) -> None:
    """Raise UserError unless the stored settings of a run have the names and types of this version.

    Args:
        settings: as returned by `RunConfig.settings`. Entries without a flag, such as `inputs`, are not checked.
    """
    cfg = RunConfig()
    for group, expected in (cfg.settings() | {name: {} for name in ("options", "speed") if name in settings}).items():
        value, part = settings.get(group), getattr(cfg, group)
        if group not in GROUPS:
            setattr(cfg, group, value)
            continue
        names = value.keys() if isinstance(value, Mapping) else set()
        if others := (expected.keys() - names) | (names - expected.keys() - vars(part).keys()):
            raise UserError(f"The settings must be those of this version; they differ in {group}.{min(others)}.")
        for name in names & vars(part).keys():
            setattr(part, name, value[name])


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested settings to dotted names; an empty mapping is kept as a value."""
    leaves: dict[str, Any] = {}
    for name, value in settings.items():
        inner = isinstance(value, dict) and value
        leaves |= flat(value, f"{prefix}{name}.") if inner else {f"{prefix}{name}": value}
    return leaves


def applied(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a run by dotted name, without those ignored because of `--model.made_elsewhere`."""
    other = settings.get("model", {}).get("made_elsewhere") is not None
    off = ("gprune", *NOT_OF_OTHERS) if other else ()
    return {name: value for name, value in flat(settings).items() if name.partition(".")[0] not in off}


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Help with line breaks kept in descriptions and with the default of each flag."""


def parser(prog: str = "train.py") -> Parser:
    """Parser for `--help` alone: one section per group of flags, from names, types, defaults and docstrings."""
    usage = f"{prog} [--config FILE] [--FLAG VALUE ...]"
    result = Parser(prog, usage=usage, description=inspect.getdoc(RunConfig), formatter_class=_Help)
    names = ", ".join(file.stem for file in sorted(SHIPPED.glob("*.yaml")))
    files = f"A YAML file of flags, or the name of one that ships: {names}. Several merge in order."
    result.add_argument("--config", metavar="FILE", default=SUPPRESS, help=files)
    result.add_argument("--print_config", action="version", help="Print all settings as such a file, and stop.")
    cfg = RunConfig()
    for part in [cfg, *(getattr(cfg, name) for name in GROUPS)]:
        title, _, about = (inspect.getdoc(type(part)) or "").partition(". ")
        section = result if part is cfg else result.add_argument_group(title.rstrip("."), about)
        for name, info in type(part).model_fields.items():
            if (flag := f"{part.prefix}{name}") not in GROUPS:
                usual = SUPPRESS if getattr(part, name) is None else getattr(part, name)
                about = " ".join((info.description or "").split()).replace("%", "%%")
                section.add_argument(f"--{flag}", metavar=_placeholder(name, HINTS[flag]), default=usual, help=about)
    return result


def _placeholder(name: str, hint: Any) -> str:
    """Placeholder for the value of a flag in `--help`."""
    if hint is bool or get_origin(hint) is Literal:
        return f"{{{','.join(get_args(hint) or ('true', 'false'))}}}"
    return {list: "[ITEM,...]", dict: "{NAME: VALUE,...}"}.get(get_origin(hint), name.upper())
