"""Settings of the commands in README, docs and notebooks."""

from __future__ import annotations

import contextlib
import importlib
import json
import re
import shlex
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from gprune.__main__ import COMMANDS
from gprune.benchmarks.settings import parse_benchmarks
from gprune.config import flatten
from gprune.config.parse import parse
from tests.snapshots.files import ROOT

PAGES = [
    str(path.relative_to(ROOT))
    for path in (
        ROOT / "README.md",
        *sorted((ROOT / "docs").glob("*.md")),
        *sorted((ROOT / "notebooks").glob("*.ipynb")),
    )
]
COMMAND = re.compile(rf"(?:\btrain\.py|\bgprune (?P<name>{'|'.join(COMMANDS)})\b)(?P<args>.*)")
END = re.compile(r"\s(?:&&|\||;|>|:::)(?=\s|$).*")  # the rest of a line is for the shell
RUN = "prune"  # the command with the flags of `train.py`
Settings = dict[str, Any]


def commands_in(page: str) -> list[str]:
    """Return the commands of a page, such as `prune --config best`, in their order and without repeats.

    Code spans that only name a command, such as `gprune study`, are left out.
    """
    text = (ROOT / page).read_text(encoding="utf-8")
    if page.endswith(".ipynb"):
        text = "\n\n".join(map(_cell_text, json.loads(text)["cells"]))
    text = text.replace("\\\n", " ")
    blocks = re.findall(r"^```bash\n(.*?)^```", text, re.M | re.S)
    without_blocks = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    spans = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", without_blocks)]
    commands = [command for line in "\n".join(blocks).splitlines() for command in _commands_in_line(line)]
    commands += [command for span in spans for command in _commands_in_line(span) if " " in command]
    return list(dict.fromkeys(commands))


def _cell_text(cell: dict[str, Any]) -> str:
    """Return a cell of a notebook as Markdown; lines of code for the shell (`!gprune ...`) become a block."""
    source = "".join(cell["source"])
    if cell["cell_type"] == "markdown":
        return source
    shell_lines = [line.lstrip()[1:] for line in source.splitlines() if line.lstrip().startswith("!")]
    return "\n".join(["```bash", *shell_lines, "```"])


def _commands_in_line(line: str) -> Iterator[str]:
    """Yield the command of a line, if it has one. Placeholders `...` for other flags are dropped."""
    match = COMMAND.search(re.sub(r"(^|\s)#.*", "", line))
    if match is None:
        return
    arguments = END.sub("", match["args"])
    if line[: match.start()].endswith("'"):  # a command inside of quotes
        arguments = arguments.partition("'")[0]
    words = [word for word in shlex.split(arguments, comments=True) if word != "..."]
    opens_value = "..." in arguments and words and words[-1].startswith("--")
    if opens_value or "--help" in words or "--import" in words:  # a value left open, or code of the reader
        return
    yield shlex.join([match["name"] or RUN, *words])


def settings_of(command: str) -> Settings:
    """Parse a command, and return all of its settings by dotted name as plain data."""
    name, *arguments = shlex.split(command)
    with contextlib.chdir(ROOT):
        if name == RUN:
            settings = flatten(parse(arguments).model_dump())
        else:
            module = importlib.import_module(COMMANDS[name][0])
            parse_arguments = getattr(module, "parse_arguments", None) or module.parser().parse_args
            settings = vars(parse_arguments(arguments))
            if name == "evaluate":  # its texts become numbers and lists
                own = {setting: settings.pop(setting) for setting in ("model", "dense", "output")}
                settings = own | asdict(parse_benchmarks(**settings))
    return json.loads(json.dumps(settings, default=str))


def default_settings() -> dict[str, Settings]:
    """Return the settings of each command with no flags, by name of the command."""
    defaults = {name: settings_of(f"{name} NAME") for name in COMMANDS if name != RUN}
    return {RUN: settings_of(RUN)} | defaults


def changed_settings(command: str, defaults: dict[str, Settings]) -> Settings:
    """Return the settings of a command that differ from the defaults."""
    default = defaults[command.partition(" ")[0]]
    return {
        name: value for name, value in settings_of(command).items() if name not in default or value != default[name]
    }


def different_settings(expected: Settings, got: Settings) -> list[str]:
    """Return a line for each setting that differs."""
    names = dict.fromkeys([*expected, *got])
    missing = "not set"
    return [
        f"{name}: it was {expected.get(name, missing)!r}, now {got.get(name, missing)!r}"
        for name in names
        if name not in expected or name not in got or expected[name] != got[name]
    ]
