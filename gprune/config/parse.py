"""Flags, YAML files and plain data to a RunConfig: they merge left to right, and are checked by its types alone."""

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
from gprune.console import Parser, say
from gprune.errors import UserError
from gprune.imports import use
from gprune.storage.yaml_text import load_yaml, read_yaml, reason, to_yaml

SHIPPED = Path(__file__).parents[1] / "configs"  # configurations that --config knows by name
CONSENT = "model.trust_remote_code"
GROUPS: dict[str, type[Group]] = {
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
    """The configuration that flags of train.py describe; `--help` and `--print_config` print, and exit.

    Args:
        args: flags; None for those of this process.
        prog: the command that `--help` shows: `train.py`, or `gprune prune`.

    Raises:
        UserError: naming the flag or the file, what was expected and what came.
    """
    args = list(sys.argv[1:] if args is None else args)
    if not {"-h", "--help"}.isdisjoint(args):
        parser(prog).parse_args(["--help"])
    cfg = configured(read_flags([arg for arg in args if arg != "--print_config"]))
    if "--print_config" in args:
        say(to_yaml(cfg.model_dump()))
        raise SystemExit(0)
    return cfg


def configured(layer: Mapping[str, Any], where: str = "") -> RunConfig:
    """The configuration of settings that are plain data: nested, by dotted name, or both; others have their defaults.

    Args:
        where: what errors begin with, such as "Row 'base'".

    Raises:
        UserError: for an unknown setting, a value of another type or out of range, and what cannot go together.
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
    """Put a layer of settings, nested or by dotted name, into `settings` by dotted name.

    An option by its own name, such as `sparsity.options.spread`, joins the others; a mapping `sparsity.options` takes
    the place of all. Errors begin with `where`.
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
            raise UserError(f"{where}: expected settings by name for the group {name}, got {shown(value)}.")
    names = [name for name, _ in dotted]
    for name, value in dotted:
        if names.count(name) > 1:
            raise UserError(f"{where}: expected each setting once, got '{name}' twice.")
        key, _, option = name.partition(".")
        RunConfig.check_name(key, where)
        if key in GROUPS:
            setting, _, option = option.partition(".")
            GROUPS[key].check_name(setting, where)
            key = f"{key}.{setting}"
        settings[key] = _put(settings.get(key), option, value) if option else value


def _put(others: Any, option: str, value: Any) -> dict[str, Any]:
    """Options with one more, `power`, or `mine.power` among those of `mine`."""
    outer, _, inner = option.rpartition(".")
    others = dict(others) if isinstance(others, Mapping) else {}
    return others | ({outer: _put(others.get(outer), inner, value)} if outer else {inner: value})


def read_flags(args: Sequence[str]) -> dict[str, Any]:
    """Settings by dotted name that flags of train.py give, with what --config files hold in their places.

    Raises:
        UserError: for a flag without a value, an unknown setting, and a file that consents to run a model's code:
            whoever hands over a file does not consent for whoever runs it.
    """
    settings: dict[str, Any] = {}
    targets: list[str] = []
    left = iter(args)
    for arg in left:
        flag, given, text = arg.partition("=")
        name = flag.removeprefix("--")
        if name == flag:
            raise UserError(f"Expected flags such as --sparsity.target 0.5, got {shown(arg)}; see --help.")
        text = text if given else next(left, "--")
        if not given and text.startswith("--"):
            raise UserError(f"{flag}: expected a value behind it; see --help.")
        if name == "import":
            use(text)
        elif name == "config":
            content = read_settings(text)
            if content.pop(CONSENT, False) not in (None, False) and not any(CONSENT in one for one in args):
                raise UserError(f"--config {text}: expected --{CONSENT} true as a flag, got it in a file.")
            overlay(settings, content, f"--config {text}")
        else:
            overlay(settings, {name: _value(flag, text)}, flag)
            targets += [text] * (name == "sparsity.target")
    if len(kinds := {text[:1] == "+": text for text in targets}) > 1:  # of other flags that are repeated the last wins
        raise UserError(
            f"--sparsity.target: expected a quality or an amount, got both, {' and '.join(kinds.values())}."
        )
    return settings


def flags_of(args: Sequence[str]) -> set[str]:
    """The settings by dotted name that are flags themselves, and not in a file."""
    return {arg.partition("=")[0].removeprefix("--") for arg in args if arg.startswith("--")}


def _value(flag: str, text: str) -> Any:
    """What the text of a flag stands for: itself, but for null and lists, where the flag takes text; else YAML."""
    is_text = HINTS.get(flag.removeprefix("--")) in (str, str | None)
    try:
        value = load_yaml(text)
    except yaml.YAMLError as error:
        if is_text:
            return text
        raise UserError(f"{flag}: expected a value as in YAML, got {shown(text)}: {reason(error)}.") from error
    return text if is_text and not isinstance(value, list | None) else value


def read_settings(name: Path | str, folder: Path | str = "") -> dict[str, Any]:
    """Settings of train.py by dotted name, from a YAML file or a shipped configuration.

    Args:
        name: path of a file, seen from `folder`; or `best`, `gates`, `paper`, `protocol` or `smoke`, if there is no
            such file.

    Raises:
        UserError: if the file is missing or not YAML, a setting is unknown or repeated, or a group has a plain value.
    """
    shipped = {file.stem: file for file in sorted(SHIPPED.glob("*.yaml"))}
    path = os.path.join(folder, name)
    if name in shipped and not (os.path.exists(path) and not os.path.isdir(path)):
        path = shipped[name]
    what = f"--config: expected a YAML file of flags, or one of {', '.join(shipped)}; got"
    content = read_yaml(path, what, pipe=True)
    if not isinstance(content, dict | None):
        # Without what is there: a list from elsewhere may name any file of this machine.
        raise UserError(f"--config: expected settings such as `sparsity: {{target: 0.5}}` in {path}, got none.")
    settings: dict[str, Any] = {}
    overlay(settings, content or {}, f"--config {path}")
    return settings


def migrated(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return nested settings that an earlier version stored, as this version has them.

    A `distill.learning_rate` of earlier versions was in the units of the weights. Settings in `REMOVED` are left out if
    they have the value there.
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
    """Raise UserError for settings of a run that are not those of this version, or not of their types.

    Args:
        settings: as `RunConfig.settings` gives them; what no flag says, such as `inputs`, is left alone.
    """
    cfg = RunConfig()
    for group, expected in (cfg.settings() | {name: {} for name in ("options", "speed") if name in settings}).items():
        value, part = settings.get(group), getattr(cfg, group)
        if group not in GROUPS:
            setattr(cfg, group, value)
            continue
        names = value.keys() if isinstance(value, Mapping) else set()
        if others := (expected.keys() - names) | (names - expected.keys() - vars(part).keys()):
            raise UserError(f"expected the settings of this version, which differ in {group}.{min(others)}.")
        for name in names & vars(part).keys():
            setattr(part, name, value[name])


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted name; an empty mapping is a value."""
    leaves: dict[str, Any] = {}
    for name, value in settings.items():
        inner = isinstance(value, dict) and value
        leaves |= flat(value, f"{prefix}{name}.") if inner else {f"{prefix}{name}": value}
    return leaves


def applied(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a run by dotted name, without those that a model made elsewhere ignores."""
    other = settings.get("model", {}).get("made_elsewhere") is not None
    off = ("gprune", *NOT_OF_OTHERS) if other else ()
    return {name: value for name, value in flat(settings).items() if name.partition(".")[0] not in off}


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Descriptions as they were written, and the default of each flag."""


def parser(prog: str = "train.py") -> Parser:
    """The help of train.py: a section for each group of flags, from names, types, defaults and docstrings."""
    usage = f"{prog} [--config FILE] [--FLAG VALUE ...]"
    made = Parser(prog, usage=usage, description=inspect.getdoc(RunConfig), formatter_class=_Help)
    names = ", ".join(file.stem for file in sorted(SHIPPED.glob("*.yaml")))
    files = f"A YAML file of flags, or the name of one that ships: {names}. Several merge in order."
    made.add_argument("--config", metavar="FILE", default=SUPPRESS, help=files)
    made.add_argument("--print_config", action="version", help="Print all settings as such a file, and stop.")
    cfg = RunConfig()
    for part in [cfg, *(getattr(cfg, name) for name in GROUPS)]:
        title, _, about = (inspect.getdoc(type(part)) or "").partition(". ")
        section = made if part is cfg else made.add_argument_group(title.rstrip("."), about)
        for name, info in type(part).model_fields.items():
            if (flag := f"{part.prefix}{name}") not in GROUPS:
                usual = SUPPRESS if getattr(part, name) is None else getattr(part, name)
                about = " ".join((info.description or "").split()).replace("%", "%%")
                section.add_argument(f"--{flag}", metavar=_placeholder(name, HINTS[flag]), default=usual, help=about)
    return made


def _placeholder(name: str, hint: Any) -> str:
    """What stands for the value of a flag in its help."""
    if hint is bool or get_origin(hint) is Literal:
        return f"{{{','.join(get_args(hint) or ('true', 'false'))}}}"
    return {list: "[ITEM,...]", dict: "{NAME: VALUE,...}"}.get(get_origin(hint), name.upper())
