"""Write docs/flags.md, every flag with its default and its help: `python docs/flags.py`."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from gprune.benchmarks import evaluate_command as evaluate
from gprune.config.parse import FlagParser
from gprune.export import convert as export
from gprune.studies import report_command as report
from gprune.studies import study_command as study

HEAD = """# Flags

All flags with their defaults and help texts, generated from `--help_all` by `python docs/flags.py`. In a YAML file of
`--config`, nested flags are nested mappings: `--sparsity.target 0.3` is `sparsity: {target: 0.3}`.
"""


def page() -> str:
    """The whole page."""
    commands = {"python train.py": FlagParser("train.py", ["--help_all"]), "gprune report": report.parser()}
    commands |= {"gprune evaluate": evaluate.parser(), "gprune export": export.parser(), "gprune study": study.parser()}
    return HEAD + "".join(f"\n## `{name}`\n{''.join(tables(made))}" for name, made in commands.items())


def tables(made: argparse.ArgumentParser) -> Iterator[str]:
    """A table for each group of flags of a command."""
    titled: dict[str, list[argparse.Action]] = {"": []}
    about: dict[str, str] = {}
    for group in made._action_groups:
        title = "" if group.title in ("options", "positional arguments") else (group.title or "").partition(". ")[0]
        titled.setdefault(title.rstrip(".:"), []).extend(filter(shown, group._group_actions))
        about[title.rstrip(".:")] = " ".join((group.description or "").split())
    for title, actions in titled.items():
        if actions:
            rows = [f"| `{name(a)}` | {default(a)} | {told(a)} |" for a in actions]
            head = f"\n### {title}\n" if title else ""
            head += f"\n{about[title]}\n" if about[title] else ""
            yield head + "\n" + "\n".join(["| flag | default | what it is |", "|---|---|---|", *rows]) + "\n"


def shown(action: argparse.Action) -> bool:
    """Not those that every command has."""
    common = action.dest in ("help", "help_all", "print_config")
    return bool(action.help) and action.help != argparse.SUPPRESS and not common


def name(action: argparse.Action) -> str:
    """The flag with the values it takes."""
    choices = "{" + ",".join(map(str, action.choices)) + "}" if action.choices else ""
    value = action.metavar or choices or ("" if action.nargs == 0 else action.dest.rpartition(".")[2].upper())
    if action.nargs == "+":
        value = f"{value} [{value} ...]"
    return " ".join(filter(None, (*action.option_strings, value)))


def default(action: argparse.Action) -> str:
    value = action.default
    if value is None or value == argparse.SUPPRESS or value == []:
        return ""
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return f"`{', '.join(map(str, value)) if isinstance(value, list) else value}`"


def told(action: argparse.Action) -> str:
    """The help on one line of a table."""
    return " ".join((action.help or "").split()).replace("%%", "%").replace("|", "\\|")


if __name__ == "__main__":
    Path(__file__).with_suffix(".md").write_text(page(), encoding="utf-8")
