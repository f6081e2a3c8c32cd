"""Flags, and YAML files that merge left to right, to a RunConfig."""

from __future__ import annotations

import functools
import inspect
import sys
from argparse import ArgumentError
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser, set_parsing_settings

from gprune.checks import in_our_words
from gprune.config.run import RunConfig
from gprune.errors import UserError

# Settings that were measured without gain and are gone (experiments/README.md), or have another name: their default.
RETIRED: dict[str, Any] = {
    "sparsity.objective": "mean",
    "sparsity.worst_step": 0.1,
    "sparsity.through": "none",
    "sparsity.owl_multiple": 5.0,
    "sparsity.owl_spread": 0.08,
}


def parse(args: Sequence[str] | None = None) -> RunConfig:
    """The configuration that flags of train.py describe.

    Args:
        args: flags; None for those of this process.

    Raises:
        UserError: naming the flag or the file, what was expected and what came.
    """
    args = sys.argv[1:] if args is None else list(args)
    for flag, value in zip(args, [*args[1:], ""], strict=False):
        if flag == "--config" or flag.startswith("--config="):
            _check_yaml(Path(value if flag == "--config" else flag.removeprefix("--config=")))
    try:
        found = _parser().instantiate(_parser().parse_args(args))
        found.pop("config")
        return RunConfig(**found)
    except ArgumentError as error:
        raise UserError(f"{in_our_words(str(error))}; see --help.") from error
    except TypeError as error:  # jsonargparse does not check that a group, such as sparsity, is a mapping
        if "must be a mapping" not in str(error):
            raise
        raise UserError(
            "A group of settings got a plain value: expected e.g. --sparsity.target 0.5, or in YAML "
            "`sparsity: {target: 0.5}`; see --help."
        ) from error


@functools.cache
def _parser() -> ArgumentParser:
    """The parser of train.py's flags: reading the help in the docstrings takes longer than most tiny runs."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(prog="train.py", exit_on_error=False, description=inspect.getdoc(RunConfig))
    parser.add_argument("--config", action="config", help="A YAML file of flags; several merge left to right.")
    parser.add_class_arguments(RunConfig, as_group=False, as_positional=False, sub_configs=True)
    return parser


def _check_yaml(path: Path) -> None:
    """Refuse what is no mapping here, where the file's name is known; jsonargparse checks the keys.

    Aliases are refused, since a few lines of them stand for gigabytes, and depth, which is a RecursionError elsewhere.
    """
    try:
        text, depth = path.read_text(encoding="utf-8"), 0
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if isinstance(event, yaml.AliasEvent) or depth > 20:
                raise UserError(f"--config: expected settings without aliases (*name), at most 20 deep, in {path}.")
        content = yaml.safe_load(text)
    except UserError:
        raise
    except (OSError, ValueError, yaml.YAMLError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split()).replace(' in "<unicode string>",', "")
        raise UserError(f"--config: expected a YAML file of flags, got {path}: {reason}") from error
    if not isinstance(content, dict | type(None)):
        raise UserError(f"--config: expected settings such as `sparsity: {{target: 0.5}}` in {path}, got {content!r}.")
