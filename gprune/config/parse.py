"""Parse flags, YAML files and plain data into a RunConfig. They merge left to right; RunConfig's types check them."""

from __future__ import annotations

import argparse
import inspect
import json
import logging
import os
import re
import sys
from argparse import SUPPRESS
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml
from jsonargparse import ActionConfigFile, Namespace

from gprune.checks import format_value
from gprune.config.groups import CorporaConfig, Group, roles_of_text
from gprune.config.run_config import RunConfig
from gprune.console import Parser, write_stdout
from gprune.errors import UserError
from gprune.storage.yaml_text import load_yaml, read_yaml, reason, to_yaml

log = logging.getLogger("gprune")
SHIPPED = {  # configurations that --config knows by name
    file.stem: file for file in sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))
}
RENAMED = {"best": "trained"}  # former names of shipped configurations
CONSENT = "model.trust_remote_code"
TEXT = "corpora.text"
GROUPS: dict[str, type[Group]] = {  # groups of flags by name
    name: info.annotation for name, info in RunConfig.model_fields.items() if hasattr(info.annotation, "prefix")
}
FLAG_TYPES = {  # type annotations by dotted name of the setting
    f"{group.prefix}{name}": annotation
    for group in (RunConfig, *GROUPS.values())
    for name, annotation in get_type_hints(group).items()
}
EXAMPLES = (
    "--config smoke                                 a tiny model, in less than a minute",
    "--model.name FOLDER --sparsity.target 30%      30 % of all parameters of a model",
    "--model.name FOLDER --corpora.text mine.jsonl  for your own text",
    "--model.name FOLDER --dry_run true             widths, tokens and memory; nothing is run",
)
MAIN_FLAGS = (  # the flags that `--help` lists, besides --config
    "model.name", "model.dtype", "corpora.text", "corpora.evaluate", "importance", "sparsity.target", "sparsity.scope",
    "sparsity.allocation", "recovery", "distill.tokens", "export.format", "run.name", "run.seed", "dry_run",
)  # fmt: skip


def parse(args: Sequence[str] | None = None, prog: str = "train.py") -> RunConfig:
    """Parse the flags of train.py into a RunConfig. `--help`, `--help_all` and `--print_config` print and exit.

    Args:
        args: flags; by default those of this process.
        prog: the command that `--help` shows: `train.py`, or `gprune prune`.

    Raises:
        UserError: if a flag or a file is invalid.
    """
    return config_from_mapping(read_flags(sys.argv[1:] if args is None else args, prog))


def config_from_mapping(settings: Mapping[str, Any], where: str = "", *, check: bool = True) -> RunConfig:
    """Build a RunConfig from settings as plain data. Missing settings have their defaults.

    Args:
        settings: nested mappings (`{"sparsity": {"target": 0.3}}`), dotted names (`{"sparsity.target": 0.3}`), or both.
        where: the beginning of error messages, such as "Row 'base'".
        check: whether names must be registered (`RunConfig.check`), as for a run.

    Raises:
        UserError: if a setting is unknown, has a wrong type or range, or contradicts another one.
    """
    dotted: dict[str, Any] = {}
    overlay(dotted, settings, where or "Settings")
    try:
        cfg = RunConfig(**Namespace(dotted).as_dict())
        if check:
            cfg.check()
        return cfg
    except UserError as error:
        raise type(error)(f"{where}: {error}" if where else str(error)) from error


def overlay(settings: dict[str, Any] | Namespace, update: Mapping[str, Any], where: str) -> None:
    """Update settings by dotted name in place with nested or dotted ones. UserError for an unknown or repeated setting.

    A mapping replaces all options, and a single option is added: `sparsity.options.spread` keeps the others.
    """
    # The text comes before the roles that it stands for, so that these override it.
    dotted = sorted(_to_dotted_names(update, where), key=lambda setting: setting[0] != TEXT)
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
        if key == TEXT:
            roles = roles_of_text(value, settings.get("corpora.evaluate", CorporaConfig().evaluate))
            for role, corpora in roles.items():
                settings.pop(f"corpora.{role}", None)  # which an earlier update named, and comes after the text now
                settings[f"corpora.{role}"] = corpora


def _to_dotted_names(settings: Mapping[str, Any], where: str) -> list[tuple[str, Any]]:
    """Return pairs of dotted name and value. A name occurs twice if the mapping has it both nested and dotted."""
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
    """Return a copy of the options with one added, such as `power`, or `mine.power` in the nested options `mine`."""
    outer, _, inner = name.rpartition(".")
    options = dict(options) if isinstance(options, Mapping) else {}
    if not outer:
        return options | {inner: value}
    return options | {outer: _with_option(options.get(outer), inner, value)}


def read_flags(args: Sequence[str], prog: str = "train.py") -> dict[str, Any]:
    """Read flags of train.py, and the --config files among them, into settings by dotted name."""
    return dict(FlagParser(prog, args).parse_args(args, defaults=False).items())


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

    Sweeps of W&B write null as `None`, and may write a whole number as `2.0`.
    """
    kind = FLAG_TYPES.get(flag.removeprefix("--"))
    is_text = kind in (str, str | None)
    if text == "None" and (kind is None or type(None) in get_args(kind)):
        return None
    if kind in (int, int | None) and re.fullmatch(r"\d+\.0", text):
        return int(text[:-2])
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
        name: path of a file, relative to `folder`; or the name of a shipped configuration (`embedded`, `gates`,
            `paper`, `protocol`, `smoke`, `trained`, `untrained`) if there is no such file.
        folder: by default the working folder.

    Raises:
        UserError: if the file is missing or not YAML, a setting is unknown or repeated, or a group has a plain value.
    """
    path = os.path.join(folder, name)
    has_file = os.path.exists(path) and not os.path.isdir(path)  # a file or a pipe
    if name in RENAMED and not has_file:
        former, name = name, RENAMED[str(name)]
        log.warning("--config %s is now --config %s, which also names its text.", former, name)
    if name in SHIPPED and not has_file:
        path = SHIPPED[name]
    message = f"--config must be a YAML file of flags or one of {', '.join(SHIPPED)}; got"
    content = read_yaml(path, message)
    if not isinstance(content, dict | None):
        # The content is not quoted, because a study list from elsewhere may name any file of this machine.
        raise UserError(f"--config {path}: The file must hold settings such as `sparsity: {{target: 0.3}}`.")
    settings: dict[str, Any] = {}
    overlay(settings, content or {}, f"--config {path}")
    return settings


def flatten(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested settings to dotted names; an empty mapping is kept as a value."""
    dotted: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, dict) and value:
            dotted |= flatten(value, f"{prefix}{name}.")
        else:
            dotted[f"{prefix}{name}"] = value
    return dotted


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Help with line breaks kept in descriptions and with the default of each flag."""


class _Setting(argparse.Action):
    """Action of a flag: merge its value into the settings."""

    def __call__(self, parser: Any, namespace: Any, text: Any, flag: str | None = None) -> None:
        overlay(namespace, {flag.removeprefix("--"): _parse_value(flag, text)}, flag)


class _SettingsFile(ActionConfigFile):
    """Action of `--config`: merge a file or a shipped configuration into the settings.

    A file cannot consent to running a model's code. The person who runs the command has to, with the flag.
    """

    def __call__(self, parser: Any, namespace: Any, name: Any, flag: str | None = None) -> None:
        content = read_settings(name)
        has_consent = content.pop(CONSENT, False) not in (None, False)
        if has_consent and not any(CONSENT in argument for argument in parser.args):
            raise UserError(f"--config {name}: {CONSENT} must be given as a flag, not in a file.")
        overlay(namespace, content, f"--config {name}")


class FlagParser(Parser):
    """Parser of the flags of train.py into settings, with a section of help for each group.

    Values are plain data. RunConfig checks them, because jsonargparse would import a class that a value names.
    """

    def __init__(self, prog: str, args: Sequence[str]):
        """Add a flag for each setting, and flags in `args` that are part of one (--options.mine.power) or unknown.

        Unless `--help_all` is in `args`, the help has examples and `MAIN_FLAGS` with their first sentence.
        """
        self.full_help = "--help_all" in args
        description = inspect.getdoc(RunConfig)
        if not self.full_help:
            examples = "\n".join(f"  {prog} {example}" for example in EXAMPLES)
            description = f"{description.partition('.')[0]}.\n\nexamples:\n{examples}"
        usage = f"{prog} [--config FILE] [--FLAG VALUE ...]"
        super().__init__(prog, usage=usage, description=description, formatter_class=_Help)
        self.add_argument("--help_all", action="help", help="show all flags with the complete text about each and exit")
        config_help = (
            f"A YAML file of flags, or the name of one that ships: {', '.join(SHIPPED)}. Several merge in order."
        )
        config = self.add_argument("--config", metavar="FILE", action=_SettingsFile, help=config_help)
        config.default = SUPPRESS  # jsonargparse does not accept it as an argument
        self._add_settings(RunConfig(), self)
        for group in GROUPS.values():
            title, _, about = (inspect.getdoc(group) or "").partition(". ")
            in_full_help = self.add_argument_group(title.rstrip("."), about) if self.full_help else self
            self._add_settings(group(), in_full_help)
        for flag in {f"--{name}" for name in given_flags(args)} - self._option_string_actions.keys():
            self.add_argument(flag, action=_Setting, dest=SUPPRESS, help=SUPPRESS)

    def _add_settings(self, group: Group, section: Any) -> None:
        """Add the flags of a group, with its defaults, to a section of the help."""
        for name, field in type(group).model_fields.items():
            flag, value = f"{group.prefix}{name}", getattr(group, name)
            if flag in GROUPS:
                continue
            text = " ".join((field.description or "").split()).replace("%", "%%")
            if not self.full_help:
                text = f"{text.removesuffix('.').partition('. ')[0]}." if flag in MAIN_FLAGS else SUPPRESS
            section.add_argument(
                f"--{flag}",
                action=_Setting,
                metavar=_placeholder(name, FLAG_TYPES[flag]),
                default=SUPPRESS if value is None else value,
                help=text,
            )

    def _get_values(self, action: Any, arg_strings: list[str]) -> Any:
        """Return the value of a flag; argparse of Python 3.11 would replace the value `--` by an empty list."""
        return "--" if arg_strings == ["--"] else super()._get_values(action, arg_strings)

    def dump(self, namespace: Any, *, skip_default: bool = False, **_: Any) -> str:
        """Print the checked settings for `--print_config`. jsonargparse prints the returned text, and exits."""
        settings = config_from_mapping(dict(namespace.items())).model_dump(exclude_defaults=skip_default)
        if skip_default:
            settings = {name: value for name, value in settings.items() if value != {}}
        write_stdout(to_yaml(settings))  # raises if the disk is full, unlike the exit of a parser
        return ""


def _placeholder(name: str, annotation: Any) -> str:
    """Return the placeholder for the value of a flag in `--help`."""
    if annotation is bool or get_origin(annotation) is Literal:
        return f"{{{','.join(get_args(annotation) or ('true', 'false'))}}}"
    return {list: "[ITEM,...]", dict: "{NAME: VALUE,...}"}.get(get_origin(annotation), name.upper())
