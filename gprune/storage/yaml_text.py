"""The one loader of YAML, for flags, --config files, lists and a run's config.yaml; and its writer."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, ClassVar

import yaml

from gprune.errors import UserError
from gprune.storage.reading import read_text

BYTES, NODES = 2**18, 20_000  # of one document; the longest list that ships has 6,000 bytes
TAG = "tag:yaml.org,2002:"
TIME = re.compile(r"[-+]?\d[\d_]*(:[0-5]?\d)+(\.[\d_]*)?$")  # YAML 1.1 reads 200:00 as 200 x 60, a number


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses repeated keys, leaves dates and times as text, and reads 1e-3 as a number.

    A few aliases of aliases can stand for gigabytes, so each alias counts as the nodes that it stands for.
    """

    yaml_implicit_resolvers: ClassVar = {
        first: [(f"{TAG}str", TIME), *((tag, pattern) for tag, pattern in resolvers if tag != f"{TAG}timestamp")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def __init__(self, text: str):
        super().__init__(text)
        self.count = 0
        self.sizes: dict[yaml.Node, int] = {}  # of nodes that are complete

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node:
        before, alias = self.count, self.check_event(yaml.AliasEvent)
        node = super().compose_node(parent, index)
        self.count += self.sizes.get(node, NODES) if alias else 1  # an alias inside of what it stands for has no end
        self.sizes.setdefault(node, self.count - before)
        if self.count > NODES:
            raise yaml.YAMLError(f"expected at most {NODES:,} keys and values, aliases counted as what they stand for")
        return node

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        node, seen = super().compose_mapping_node(anchor), set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.tag != f"{TAG}merge"):
            if (key.tag, key.value) in seen:  # the second would win, and nobody would know
                line = key.start_mark.line + 1
                raise yaml.YAMLError(f"expected each key once, got '{key.value}' twice on line {line}")
            seen.add((key.tag, key.value))
        return node


class _Dumper(yaml.SafeDumper):
    """SafeDumper that puts text which the loader would take for a number into quotes."""


# YAML 1.1 has no number without a point, a digit before it, and a sign in the exponent: 1e-3 would be text.
FLOAT = re.compile(r"[-+]?(\.\d+|\d[\d_]*\.?\d*)([eE][-+]?\d+)?$")
yaml.add_implicit_resolver(f"{TAG}float", FLOAT, list("-+.0123456789"), _Loader, _Dumper)


def read_yaml(path: Path | str, what: str, *, pipe: bool = False) -> Any:
    """Read a YAML file, or a pipe; `what` begins the UserError for what is no file of settings: "--config: expected a
    YAML file of flags, got"."""
    try:
        return load_yaml(read_text(path, pipe=pipe))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{what} '{path}': {reason(error)}.") from error


def reason(error: Exception) -> str:
    """What is wrong, on one line and without the loader's name for a text."""
    message = getattr(error, "strerror", None) or " ".join(str(error).split())
    return re.sub(r' in "<[\w ]+>",', "", message)


def load_yaml(text: str) -> Any:
    """Read YAML as plain data; a yaml.YAMLError for what is no YAML, or more than settings can be."""
    if len(text) > BYTES:
        raise yaml.YAMLError(f"expected at most {BYTES:,} characters")
    try:
        return yaml.load(text, _Loader)
    except (ValueError, RecursionError) as error:  # a number of 5,000 digits; brackets in brackets
        raise yaml.YAMLError(str(error)) from error


def to_yaml(content: dict[str, Any]) -> str:
    """YAML in the order of the keys, with letters of all languages as they are."""
    return yaml.dump(content, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
