"""Reader and writer of YAML for flags, --config files, study lists and the config.yaml of a run."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, ClassVar

import yaml

from gprune.errors import UserError

TAG = "tag:yaml.org,2002:"
INTEGER = re.compile(r"[-+]?\d[\d_]*$")  # YAML 1.1 reads 010 as octal, and 200:00 as 200 x 60
FLOAT = re.compile(  # YAML 1.1 reads 1e-3 as text
    r"([-+]?(\.\d+|\d[\d_]*\.?\d*)([eE][-+]?\d+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))$"
)


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses repeated keys, reads 1e-3 and 010 as decimal numbers, and dates and times as text."""

    yaml_implicit_resolvers: ClassVar = {  # first character of a value -> pairs (tag, pattern)
        first: [pair for pair in pairs if pair[0].removeprefix(TAG) not in ("int", "float", "timestamp")]
        for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        """Compose a mapping; YAMLError if a key is repeated, because PyYAML would silently use the second value."""
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if (name := (key.tag, str(key.value))) in seen:
                raise yaml.YAMLError(f"the key '{key.value}' is repeated on line {key.start_mark.line + 1}")
            seen.add(name)
        return node

    def construct_document(self, node: yaml.Node) -> Any:
        """Construct collections at once, so that PyYAML refuses a list that contains itself."""
        self.deep_construct = True
        return super().construct_document(node)


class _Dumper(yaml.SafeDumper):
    """SafeDumper that quotes text which the loader would read as a number."""


yaml.add_implicit_resolver(f"{TAG}int", INTEGER, list("-+0123456789"), _Loader)
yaml.add_implicit_resolver(f"{TAG}float", FLOAT, list("-+.0123456789"), _Loader, _Dumper)
_Loader.add_constructor(f"{TAG}int", lambda loader, node: int(loader.construct_scalar(node)))


def read_yaml(path: Path | str, what: str) -> Any:
    """Read a YAML file. UserError, which begins with `what`, if the file cannot be read or is not YAML."""
    try:
        return load_yaml(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{what} '{path}' ({reason(error)}).") from error


def reason(error: Exception) -> str:
    """Return the reason of an error on one line, without the placeholder that PyYAML uses for a file name."""
    message = getattr(error, "strerror", None) or " ".join(str(error).split())
    return re.sub(r' in "<[\w ]+>",', "", message)


def load_yaml(text: str) -> Any:
    """Parse YAML to plain data; YAMLError if the text is not YAML."""
    try:
        return yaml.load(text, _Loader)
    except (ValueError, RecursionError) as error:  # a number of 5,000 digits; deeply nested brackets
        raise yaml.YAMLError(str(error)) from error


def to_yaml(content: dict[str, Any]) -> str:
    """Format YAML in the order of the keys, without escaping non-ASCII letters."""
    return yaml.dump(content, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
