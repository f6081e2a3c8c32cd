"""Reader and writer of YAML for flags, --config files, study lists and the config.yaml of a run."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, ClassVar

import yaml

from gprune.errors import UserError
from gprune.storage.reading import read_text

MAX_CHARACTERS = 2**18  # limit of a document; the longest list in experiments/ has 6,000 characters
MAX_NODES = 20_000  # limit of keys and values of a document
TAG = "tag:yaml.org,2002:"
TIME = re.compile(r"[-+]?\d[\d_]*(:[0-5]?\d)+(\.[\d_]*)?$")  # YAML 1.1 reads 200:00 as 200 x 60, a number
INTEGER = re.compile(r"[-+]?\d[\d_]*$")  # YAML 1.1 reads 010 as octal, so `--run.seed 010` would be 8


class _Loader(yaml.SafeLoader):
    """SafeLoader that rejects repeated keys, keeps dates and times as text, and reads 1e-3 and 010 as decimal numbers.

    The number of nodes is limited. Nested aliases can expand to gigabytes, so an alias counts as its expansion.
    """

    # First character of a value -> pairs (tag, pattern): ours before the others, and no pattern of dates.
    yaml_implicit_resolvers: ClassVar = {
        first: [
            (f"{TAG}str", TIME), (f"{TAG}int", INTEGER),
            *((tag, pattern) for tag, pattern in resolvers if tag not in (f"{TAG}timestamp", f"{TAG}int")),
        ]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }  # fmt: skip

    def __init__(self, text: str):
        super().__init__(text)
        self.count = 0
        self.sizes: dict[yaml.Node, int] = {}  # number of nodes in each complete node

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node:
        """Compose a node and everything in it, and count the nodes.

        Raises:
            yaml.YAMLError: if the document has more than `MAX_NODES` nodes.
        """
        count_before = self.count
        is_alias = self.check_event(yaml.AliasEvent)
        node = super().compose_node(parent, index)
        if is_alias:
            self.count += self.sizes.get(node, MAX_NODES)  # the node of a recursive alias is not complete yet
        else:
            self.count += 1
        self.sizes.setdefault(node, self.count - count_before)
        if self.count > MAX_NODES:
            raise yaml.YAMLError(f"more than {MAX_NODES:,} keys and values (aliases are counted expanded)")
        return node

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        """Compose a mapping.

        Raises:
            yaml.YAMLError: if a key is repeated.
        """
        node = super().compose_mapping_node(anchor)
        seen = set()  # (tag, text) of earlier keys
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == f"{TAG}merge":
                continue
            if (key.tag, key.value) in seen:  # PyYAML would silently use the second value
                line = key.start_mark.line + 1
                raise yaml.YAMLError(f"the key '{key.value}' is repeated on line {line}")
            seen.add((key.tag, key.value))
        return node


class _Dumper(yaml.SafeDumper):
    """SafeDumper that quotes text which the loader would read as a number."""


# In YAML 1.1 a float needs a point, a digit before the point, and a sign in the exponent, so 1e-3 would be text.
FLOAT = re.compile(r"[-+]?(\.\d+|\d[\d_]*\.?\d*)([eE][-+]?\d+)?$")
yaml.add_implicit_resolver(f"{TAG}float", FLOAT, list("-+.0123456789"), _Loader, _Dumper)
_Loader.add_constructor(f"{TAG}int", lambda loader, node: int(loader.construct_scalar(node).replace("_", "")))


def read_yaml(path: Path | str, what: str, *, pipe: bool = False) -> Any:
    """Read a YAML file.

    Args:
        path: path of the file.
        what: begins the UserError, such as "--config must be a YAML file; got".
        pipe: whether the file may be a pipe.

    Raises:
        UserError: if the file cannot be read or is not YAML.
    """
    try:
        return load_yaml(read_text(path, pipe=pipe))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{what} '{path}' ({reason(error)}).") from error


def reason(error: Exception) -> str:
    """Return the reason of an error on one line, without the placeholder that PyYAML uses for a file name."""
    message = getattr(error, "strerror", None) or " ".join(str(error).split())
    return re.sub(r' in "<[\w ]+>",', "", message)


def load_yaml(text: str) -> Any:
    """Parse YAML to plain data.

    Raises:
        yaml.YAMLError: if the text is not YAML or is too large.
    """
    if len(text) > MAX_CHARACTERS:
        raise yaml.YAMLError(f"more than {MAX_CHARACTERS:,} characters")
    try:
        return yaml.load(text, _Loader)
    except (ValueError, RecursionError) as error:  # a number of 5,000 digits; deeply nested brackets
        raise yaml.YAMLError(str(error)) from error


def to_yaml(content: dict[str, Any]) -> str:
    """Format YAML in the order of the keys, without escaping non-ASCII letters."""
    return yaml.dump(content, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
