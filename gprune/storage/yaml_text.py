"""The one loader of YAML: of flags, of --config files, of lists, of a run's config.yaml.

What it takes is plain data of bounded size: no tags, no key twice, no date, no `1:30` that means 90. A few aliases of
aliases stand for gigabytes, so they are counted as what they stand for, and refused where there is no use for them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from gprune.errors import UserError
from gprune.storage.reading import read_text

BYTES, NODES, DEPTH = 2**20, 20_000, 20  # of one document; the longest list that ships has 6,000 bytes
Base: type = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
MERGE = "tag:yaml.org,2002:merge"


class _Loader(Base):
    """Safe, and with numbers as people write them: 1e-3 is one, and 1:30, 0o7 and 2020-01-01 are text."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        found = super().construct_mapping(node, deep=True)
        for key in found:
            if isinstance(key, bool) or not isinstance(key, str | int | float):
                raise yaml.YAMLError(f"expected names as keys, got {key}; put it in quotes, if it is one")
        return found


REPLACED = ("timestamp", "value", "int", "float")
NUMBERS = {
    "int": r"[-+]?[0-9][0-9_]*",
    "float": r"[-+]?(?:(?:[0-9][0-9_]*)?\.[0-9]+(?:[eE][-+]?[0-9]+)?|[0-9][0-9_]*\.|[0-9][0-9_]*\.?[eE][-+]?[0-9]+)"
    r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
}
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in found if tag.rpartition(":")[2] not in REPLACED]
    for first, found in Base.yaml_implicit_resolvers.items()
}
for _kind, _pattern in NUMBERS.items():
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", re.compile(f"(?:{_pattern})$"), list("-+.0123456789"))
_Loader.add_constructor("tag:yaml.org,2002:int", lambda _, node: int(node.value.replace("_", "")))  # 010 is 10


def read_yaml(path: Path | str, what: str, *, aliases: bool = False, pipe: bool = False) -> Any:
    """What a YAML file holds.

    Args:
        what: begins the error: "--config: expected a YAML file of flags, got".
        aliases: whether it may have them, as lists do.
        pipe: whether it may be a pipe.

    Raises:
        UserError: for a file that cannot be read, is no YAML, or is more than a file of settings can be.
    """
    try:
        return load_yaml(read_text(path, most=BYTES, pipe=pipe), aliases=aliases)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{what} '{path}': {reason(error)}.") from error


def reason(error: Exception) -> str:
    """What is wrong, on one line and without the loader's name for a text."""
    said = getattr(error, "strerror", None) or " ".join(str(error).split())
    return re.sub(r' in "<[\w ]+>",', "", said)


def load_yaml(text: str, *, aliases: bool = False) -> Any:
    """The plain data that a text stands for.

    Raises:
        yaml.YAMLError: for what is no YAML, or more than settings can be.
    """
    if len(text) > BYTES:
        raise yaml.YAMLError(f"expected at most {BYTES:,} characters")
    _check_size(text, aliases=aliases)
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        for mapping in _mappings(node):
            _check_keys(loader, mapping)
        return loader.construct_document(node)
    except (ValueError, OverflowError) as error:  # a number of 5,000 digits
        raise yaml.YAMLError(" ".join(str(error).split())) from error
    finally:
        loader.dispose()


def _check_size(text: str, *, aliases: bool) -> None:
    """Raise YAMLError for more nodes, or deeper ones, than settings can be; aliases count as what they stand for."""
    sizes: dict[str, int] = {}  # of anchored nodes that are complete
    open_: list[tuple[str | None, int]] = []  # anchor, and the count before it
    count = 0
    for event in yaml.parse(text, Loader=Base):
        if getattr(event, "tag", None) not in (None, "!"):
            raise yaml.YAMLError(f"expected plain settings, got the tag {event.tag}")
        if isinstance(event, yaml.AliasEvent):
            if not aliases:
                raise yaml.YAMLError("expected settings without aliases (*name)")
            if event.anchor not in sizes:
                raise yaml.YAMLError(f"expected an alias of something that is complete, got *{event.anchor}")
            count += sizes[event.anchor]
        elif isinstance(event, yaml.ScalarEvent):
            count += 1
            if event.anchor:
                sizes[event.anchor] = 1
        elif isinstance(event, yaml.CollectionStartEvent):
            open_.append((event.anchor, count))
            count += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = open_.pop()
            if anchor:
                sizes[anchor] = count - before
        if count > NODES or len(open_) > DEPTH:
            raise yaml.YAMLError(f"expected at most {NODES:,} keys and values, at most {DEPTH} deep")


def _mappings(node: yaml.Node) -> Iterator[yaml.MappingNode]:
    """All mappings of a document, each once."""
    seen, left = set(), [node]
    while left:
        node = left.pop()
        if id(node) in seen or isinstance(node, yaml.ScalarNode):
            continue
        seen.add(id(node))
        if isinstance(node, yaml.MappingNode):
            yield node
            left += [part for pair in node.value for part in pair]
        else:
            left += node.value


def _check_keys(loader: Any, mapping: yaml.MappingNode) -> None:
    """Raise YAMLError for a key that is there twice: the second would win, and nobody would know."""
    seen = set()
    for key, _ in mapping.value:
        if not isinstance(key, yaml.ScalarNode) or key.tag == MERGE:
            continue
        if (name := (key.tag, key.value)) in seen:
            raise yaml.YAMLError(f"expected each key once, got '{key.value}' twice on line {key.start_mark.line + 1}")
        seen.add(name)
