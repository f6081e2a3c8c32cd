"""Parse flags, YAML files and plain data into a RunConfig. They merge left to right; RunConfig's types check them."""

from __future__ import annotations

import argparse
import inspect
import json
import os
import sys
from argparse import SUPPRESS
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml

from gprune.checks import format_value
from gprune.config.groups import Group
from gprune.config.run_config import PRUNING_SETTINGS, RunConfig
from gprune.config.running import RELATIVE_RATE
from gprune.console import Parser, write_stdout
from gprune.errors import UserError
from gprune.imports import import_user_module
from gprune.storage.yaml_text import load_yaml, read_yaml, reason, to_yaml

SHIPPED = Path(__file__).parents[1] / "configs"  # configurations that --config knows by name
CONSENT = "model.trust_remote_code"
GROUPS: dict[str, type[Group]] = {  # groups of flags by name
    name: info.annotation for name, info in RunConfig.model_fields.items() if hasattr(info.annotation, "prefix")
}
FLAG_TYPES = {  # type annotations by dotted name of the setting
    f"{group.prefix}{name}": annotation
    for group in (RunConfig, *GROUPS.values())
    for name, annotation in get_type_hints(group).items()
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
    cfg = config_from_mapping(read_flags([arg for arg in args if arg != "--print_config"]))
    if "--print_config" in args:
        write_stdout(to_yaml(cfg.model_dump()))
        raise SystemExit(0)
    return cfg


def config_from_mapping(settings: Mapping[str, Any], where: str = "") -> RunConfig:
    """Build a RunConfig from settings as plain data. Missing settings have their defaults.

    Args:
        settings: nested mappings (`{"sparsity": {"target": 0.3}}`), dotted names (`{"sparsity.target": 0.3}`), or both.
        where: the beginning of error messages, such as "Row 'base'".

    Raises:
        UserError: if a setting is unknown, has a wrong type or range, or contradicts another one.
    """
    dotted: dict[str, Any] = {}
    overlay(dotted, settings, where or "Settings")
    nested: dict[str, Any] = {}
    for name, value in dotted.items():
        group, _, setting = name.rpartition(".")
        target = nested.setdefault(group, {}) if group else nested
        target[setting] = value
    try:
        return RunConfig(**nested)
    except UserError as error:
        raise type(error)(f"{where}: {error}" if where else str(error)) from error


def overlay(settings: dict[str, Any], update: Mapping[str, Any], where: str) -> None:
    """Update settings in place. A single option is added to the existing options, and a mapping replaces all of them.

    So `sparsity.options.spread` keeps other options of `sparsity.options`.

    Args:
        settings: settings by dotted name.
        update: new settings, nested or by dotted name.
        where: the beginning of error messages.

    Raises:
        UserError: if a setting is unknown or repeated, or a group that needs a mapping has another value.
    """
    dotted = _to_dotted_names(update, where)
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
        settings[key] = _with_option(settings.get(key), option, value) if option else value


def _to_dotted_names(settings: Mapping[str, Any], where: str) -> list[tuple[str, Any]]:
    """Return pairs of dotted name and value. A name occurs twice if the mapping has it both nested and dotted.

    Raises:
        UserError: if a group of settings has a plain value and no setting for it. The message begins with `where`.
    """
    dotted: list[tuple[str, Any]] = []
    for name, value in settings.items():
        if name not in GROUPS:
            dotted.append((str(name), value))
        elif isinstance(value, Mapping | None):
            dotted += [(f"{name}.{setting}", setting_value) for setting, setting_value in (value or {}).items()]
        elif plain_setting := GROUPS[name].plain_setting:
            dotted.append((f"{name}.{plain_setting}", value))
        else:
            raise UserError(f"{where}: {name} must be a mapping of settings; got {format_value(value)}.")
    return dotted


def _with_option(options: Any, name: str, value: Any) -> dict[str, Any]:
    """Return a copy of the options with one added.

    Args:
        options: the existing options; anything but a mapping is replaced.
        name: name of the option, such as `power`, or `mine.power` for the option `power` in the nested options `mine`.
        value: value of the option.
    """
    outer, _, inner = name.rpartition(".")
    options = dict(options) if isinstance(options, Mapping) else {}
    if not outer:
        return options | {inner: value}
    return options | {outer: _with_option(options.get(outer), inner, value)}


def read_flags(args: Sequence[str]) -> dict[str, Any]:
    """Read flags of train.py, and the --config files among them, into settings by dotted name.

    Raises:
        UserError: if a flag has no value, a setting is unknown, or a file sets `model.trust_remote_code`. The person
            who runs a model's code has to consent, not the author of the file.
    """
    settings: dict[str, Any] = {}
    targets: list[str] = []
    remaining = iter(args)
    for arg in remaining:
        flag, equals, text = arg.partition("=")
        name = flag.removeprefix("--")
        if name == flag:
            raise UserError(
                f"Arguments must be flags such as --sparsity.target 0.5; got {format_value(arg)}. See --help."
            )
        if not equals:
            text = next(remaining, "--")
            if text.startswith("--"):
                raise UserError(f"{flag} must be followed by a value. See --help.")
        if name == "import":
            import_user_module(text)
        elif name == "config":
            content = read_settings(text)
            has_consent = content.pop(CONSENT, False) not in (None, False)
            if has_consent and not any(CONSENT in argument for argument in args):
                raise UserError(f"--config {text}: {CONSENT} must be given as a flag, not in a file.")
            overlay(settings, content, f"--config {text}")
        else:
            overlay(settings, {name: _parse_value(flag, text)}, flag)
            if name == "sparsity.target":
                targets.append(text)
    _check_targets(targets)
    return settings


def _check_targets(targets: Sequence[str]) -> None:
    """Raise UserError if `--sparsity.target` is given both as a quality (`+5%`) and as an amount.

    For any other flag that is repeated, the last value counts.
    """
    last_by_kind = {text.startswith("+"): text for text in targets}
    if len(last_by_kind) > 1:
        both = " and ".join(last_by_kind.values())
        raise UserError(f"--sparsity.target must be a quality or an amount; got both {both}.")


def given_flags(args: Sequence[str]) -> set[str]:
    """Return the names of the settings that are given as flags, not in a file."""
    return {arg.partition("=")[0].removeprefix("--") for arg in args if arg.startswith("--")}


def as_flag(name: str, value: Any) -> str:
    """Format a setting as a flag of train.py that `read_flags` reads back, without quotes for a shell."""
    flag = f"--{name}"
    if isinstance(value, str) and _parse_value(flag, value) == value:
        return f"{flag}={value}"
    return f"{flag}={json.dumps(value)}"  # JSON is YAML


def _parse_value(flag: str, text: str) -> Any:
    """Parse the text of a flag as YAML. The value of a text setting is kept as text unless it is null or a list.

    Raises:
        UserError: if the text is not valid YAML, except for a text setting.
    """
    is_text = FLAG_TYPES.get(flag.removeprefix("--")) in (str, str | None)
    try:
        value = load_yaml(text)
    except yaml.YAMLError as error:
        if is_text:
            return text
        raise UserError(f"{flag} must be valid YAML; got {format_value(text)} ({reason(error)}).") from error
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
    has_file = os.path.exists(path) and not os.path.isdir(path)  # a file or a pipe
    if name in shipped and not has_file:
        path = shipped[name]
    message = f"--config must be a YAML file of flags or one of {', '.join(shipped)}; got"
    content = read_yaml(path, message, pipe=True)
    if not isinstance(content, dict | None):
        # The content is not quoted, because a study list from elsewhere may name any file of this machine.
        raise UserError(f"--config {path}: The file must hold settings such as `sparsity: {{target: 0.5}}`.")
    settings: dict[str, Any] = {}
    overlay(settings, content or {}, f"--config {path}")
    return settings


def migrate_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Convert nested settings stored by an earlier version to those of this version.

    A `distill.learning_rate` of earlier versions was in the units of the weights. A setting in `REMOVED` is dropped if
    it has the value in that table.
    """
    current = {group: dict(value) if isinstance(value, dict) else value for group, value in settings.items()}
    for name, value in REMOVED.items():
        group, _, setting = name.partition(".")
        group_settings = current.get(group)
        if isinstance(group_settings, dict) and value in (..., group_settings.get(setting)):
            group_settings.pop(setting, None)
    distill = current.get("distill")
    if isinstance(distill, dict) and "learning_rate" in distill and "absolute_learning_rate" not in distill:
        distill["absolute_learning_rate"] = distill["learning_rate"]
        distill["learning_rate"] = RELATIVE_RATE
    return current


def check_settings(settings: Mapping[str, Any]) -> None:
    """Raise UserError unless the stored settings of a run have the names and types of this version.

    Args:
        settings: as returned by `RunConfig.settings`. Of the entries without a flag, such as `inputs`, only `code` is
            checked.
    """
    code = settings.get("code", {})
    if not isinstance(code, dict) or not all(isinstance(value, str | None) for value in code.values()):
        raise UserError(f"The settings must have code as a mapping of modules to hashes; got {format_value(code)}.")
    cfg = RunConfig()
    optional = {name: {} for name in ("options", "speed") if name in settings}
    for group, expected in (cfg.settings() | optional).items():
        stored = settings.get(group)
        if group not in GROUPS:
            setattr(cfg, group, stored)
            continue
        group_config = getattr(cfg, group)
        names = stored.keys() if isinstance(stored, Mapping) else set()
        missing = expected.keys() - names
        unknown = names - expected.keys() - vars(group_config).keys()
        if different := missing | unknown:
            raise UserError(f"The settings must be those of this version; they differ in {group}.{min(different)}.")
        for name in names & vars(group_config).keys():
            setattr(group_config, name, stored[name])


def flatten(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested settings to dotted names; an empty mapping is kept as a value."""
    dotted: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, dict) and value:
            dotted |= flatten(value, f"{prefix}{name}.")
        else:
            dotted[f"{prefix}{name}"] = value
    return dotted


def effective_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a run by dotted name, without those ignored because of `--model.made_elsewhere`."""
    made_elsewhere = settings.get("model", {}).get("made_elsewhere") is not None
    ignored = ("gprune", *PRUNING_SETTINGS) if made_elsewhere else ()
    return {name: value for name, value in flatten(settings).items() if name.partition(".")[0] not in ignored}


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Help with line breaks kept in descriptions and with the default of each flag."""


def parser(prog: str = "train.py") -> Parser:
    """Return the parser for `--help` alone. Each group of flags is a section.

    Names, types, defaults and docstrings of the settings become the help.
    """
    usage = f"{prog} [--config FILE] [--FLAG VALUE ...]"
    result = Parser(prog, usage=usage, description=inspect.getdoc(RunConfig), formatter_class=_Help)
    names = ", ".join(file.stem for file in sorted(SHIPPED.glob("*.yaml")))
    config_help = f"A YAML file of flags, or the name of one that ships: {names}. Several merge in order."
    result.add_argument("--config", metavar="FILE", default=SUPPRESS, help=config_help)
    # `version` stands for an action without a value, because `parse` handles this flag.
    result.add_argument("--print_config", action="version", help="Print all settings as such a file, and stop.")
    cfg = RunConfig()
    for group in [cfg, *(getattr(cfg, name) for name in GROUPS)]:
        title, _, description = (inspect.getdoc(type(group)) or "").partition(". ")
        section = result if group is cfg else result.add_argument_group(title.rstrip("."), description)
        for name, field in type(group).model_fields.items():
            flag = f"{group.prefix}{name}"
            if flag in GROUPS:
                continue
            default = SUPPRESS if getattr(group, name) is None else getattr(group, name)
            flag_help = " ".join((field.description or "").split()).replace("%", "%%")
            placeholder = _placeholder(name, FLAG_TYPES[flag])
            section.add_argument(f"--{flag}", metavar=placeholder, default=default, help=flag_help)
    return result


def _placeholder(name: str, annotation: Any) -> str:
    """Return the placeholder for the value of a flag in `--help`."""
    if annotation is bool or get_origin(annotation) is Literal:
        return f"{{{','.join(get_args(annotation) or ('true', 'false'))}}}"
    return {list: "[ITEM,...]", dict: "{NAME: VALUE,...}"}.get(get_origin(annotation), name.upper())
