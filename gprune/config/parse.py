"""Flags, and YAML files that merge left to right, to a RunConfig."""

from __future__ import annotations

import functools
import inspect
import json
import sys
from argparse import ArgumentError
from collections.abc import Mapping, Sequence
from dataclasses import fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, get_type_hints

import yaml
from jsonargparse import ArgumentParser, set_loader, set_parsing_settings

from gprune.checks import check, in_our_words, shown
from gprune.config.groups import Group
from gprune.config.run import RunConfig
from gprune.errors import UserError
from gprune.storage.yaml_text import load_yaml, read_yaml, reason

CONSENT = "model.trust_remote_code"
HINTS = get_type_hints(RunConfig)
GROUPS = frozenset(name for name, kind in HINTS.items() if isinstance(kind, type) and issubclass(kind, Group))


def parse(args: Sequence[str] | None = None) -> RunConfig:
    """The configuration that flags of train.py describe.

    Args:
        args: flags; None for those of this process.

    Raises:
        UserError: naming the flag or the file, what was expected and what came.
    """
    return _parsed(_without_files(sys.argv[1:] if args is None else list(args)))


def of_settings(content: Mapping[str, Any], where: str) -> RunConfig:
    """The configuration of settings that a file holds; a UserError, which begins with `where`, for other things."""
    return _parsed([f"--config={json.dumps(_settings(content, where))}"])


def _parsed(args: Sequence[str]) -> RunConfig:
    try:
        found = parser().instantiate(parser().parse_args(args))
        found.pop("config")
        return RunConfig(**found)
    except ArgumentError as error:
        raise UserError(f"{in_our_words(str(error), _hint_of)}; see --help.") from error


@functools.cache
def parser() -> ArgumentParser:
    """The parser of train.py's flags: reading the help in the docstrings takes longer than most tiny runs."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    set_loader("gprune", load_yaml, (yaml.YAMLError,))
    parser = ArgumentParser(
        prog="train.py",
        exit_on_error=False,
        allow_abbrev=False,
        parser_mode="gprune",
        description=inspect.getdoc(RunConfig),
    )
    parser.add_argument("--config", action="config", help="A YAML file of flags; several merge left to right.")
    parser.add_class_arguments(RunConfig, as_group=False, as_positional=False)
    return parser


def _without_files(args: Sequence[str]) -> list[str]:
    """The flags with what --config files hold in the place of their names, so that jsonargparse opens none.

    It would look for a file behind the value of a group as well.
    """
    left, found = list(args), []
    while left:
        flag, given, value = left.pop(0).partition("=")
        if flag != "--config" and not (flag.startswith("--") and flag[2:] in GROUPS):
            found.append(f"{flag}{given}{value}")
            continue
        if not given:
            if not left:
                raise UserError(f"{flag}: expected a value behind it; see --help.")
            value = left.pop(0)
        if flag == "--config":
            settings = read_settings(value)
            # Whoever hands over a file does not consent for whoever runs it.
            if settings.pop(CONSENT, False) not in (None, False) and not any(CONSENT in one for one in args):
                raise UserError(
                    f"--config {value}: expected --{CONSENT} true as a flag of the command, got it in a file."
                )
            found.append(f"--config={json.dumps(settings)}")
        else:
            found.append(f"--config={json.dumps(_settings({flag.removeprefix('--'): _loaded(flag, value)}, flag))}")
    return found


def _loaded(flag: str, value: str) -> Any:
    try:
        return load_yaml(value)
    except yaml.YAMLError as error:
        raise UserError(
            f"{flag}: expected settings such as {{target: 0.5}}, got {shown(value)}: {reason(error)}"
        ) from error


def read_settings(path: Path | str) -> dict[str, Any]:
    """Settings of `train.py`, nested, as a YAML file holds them.

    Raises:
        UserError: for a file that is none, an unknown setting, one that is there twice, or a group with a plain value.
    """
    content = read_yaml(path, "--config: expected a YAML file of flags, got", pipe=True)
    if not isinstance(content, dict | None):
        # Without what is there: a list from elsewhere may name any file of this machine.
        raise UserError(f"--config: expected settings such as `sparsity: {{target: 0.5}}` in {path}, got none.")
    return _settings(content or {}, f"--config {path}")


def _settings(content: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Settings by dotted name from nested ones, dotted ones, or both."""
    found: dict[str, Any] = {}
    for given, value in content.items():
        group, _, rest = str(given).partition(".")
        _check_name(group, RunConfig, where)
        if group not in GROUPS:
            inside = {rest: value} if rest else value
        elif rest:
            inside = {rest: value}
        elif isinstance(value, dict | None):
            inside = value or {}
        else:
            raise UserError(f"{where}: expected settings by name for the group {group}, got {shown(value)}.")
        for name, leaf in inside.items() if group in GROUPS else [("", inside)]:
            setting, _, option = str(name).partition(".")
            if group in GROUPS:
                _check_name(setting, HINTS[group], where)
            key, leaf = f"{group}.{setting}".rstrip("."), {option: leaf} if option else leaf
            both = option and isinstance(found.get(key), dict) and option not in found[key]
            if key in found and not both:
                raise UserError(f"{where}: expected each setting once, got '{key}' twice.")
            found[key] = found[key] | leaf if both else leaf
    return found


def flat(settings: dict[str, Any], prefix: str = "", *, whole: Sequence[str] = ()) -> dict[str, Any]:
    """Nested settings by dotted name; an empty mapping is a value, and so are those that are to stay `whole`."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        inner = isinstance(value, dict) and value and f"{prefix}{name}" not in whole
        found |= flat(value, f"{prefix}{name}.", whole=whole) if inner else {f"{prefix}{name}": value}
    return found


def check_settings(settings: Mapping[str, Any]) -> None:
    """Raise UserError for settings of a run that are not those of this version, or not of their types.

    Args:
        settings: as `RunConfig.settings` gives them; what no flag says, such as `inputs`, is left alone.
    """
    for group, expected in RunConfig().settings().items():
        hint, others = HINTS[group], [] if group in settings else [group]
        if group not in GROUPS and not others:
            check(group, hint, settings[group])
        elif not isinstance(value := settings.get(group, {}), dict):
            raise UserError(f"--{group}: expected settings by name, got {shown(value)}.")
        elif not others:
            hints = get_type_hints(hint)
            for name in hints.keys() & value.keys():
                check(f"{group}.{name}", hints[name], value[name])
            lacking, unknown = expected.keys() - value.keys(), value.keys() - expected.keys() - hints.keys()
            others = sorted(f"{group}.{name}" for name in lacking | unknown)
        if others:
            raise UserError(f"expected the settings of this version, which differ in {others[0]}.")


def _check_name(name: str, group: type, where: str) -> None:
    """Raise UserError for what is no setting of a group."""
    known = [one.name for one in fields(group)]
    if name not in known:
        near = get_close_matches(name, known, n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"expected one of {', '.join(known)}."
        raise UserError(f"{where}: there is no setting '{getattr(group, 'prefix', '')}{name}'; {hint}")


def _hint_of(flag: str) -> Any:
    """The annotation of a setting by its dotted name; None for what is none."""
    group, _, rest = flag.partition(".")
    return get_type_hints(HINTS[group]).get(rest) if group in GROUPS else HINTS.get(group)
