"""Hashes of the user's code, so that results of other code are not reused.

code_of(function, "my_metric")     # {"my_metric": "3f0c...", "my_helpers": "81d2..."}

Code is hashed as a syntax tree without docstrings, so comments and formatting do not matter. A module is hashed as a
whole, and so are the user's modules that it imports. A function or class of `__main__` (a notebook or a script) is
hashed together with the functions, classes and plain values to which it refers.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import hashlib
import inspect
import itertools
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import resolve_name
from pathlib import Path, PurePath
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any, Literal

Code = Mapping[str, str | None]  # module -> hash of its code; None if the source cannot be read
MAIN = "__main__"
NOT_OF_USERS = {"gprune", "lightning", "torch", *sys.stdlib_module_names}
PLAIN = (type(None), bool, int, float, complex, str, bytes, PurePath)
DOCUMENTED = (ast.Module, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
METHODS = (FunctionType, staticmethod, classmethod, property)
INSTALLED = {"site-packages", "dist-packages"}
WRAPPERS = {  # class -> attributes with the wrapped functions and values
    functools.partial: ("func", "args", "keywords"), MethodType: ("__func__", "__self__"),
    staticmethod: ("__func__",), classmethod: ("__func__",), property: ("fget", "fset", "fdel"),
}  # fmt: skip
# id of a module's spec -> the spec, the file, and its content at the first look-up. Reloading makes a new spec.
_loaded: dict[int, tuple[ModuleSpec, Path, bytes | None]] = {}


def code_of(entry: Any, registered_in: str = "") -> dict[str, str | None]:
    """Return the hashes of the user's code that a function, a class or another object uses, by module.

    The result is empty for code of gprune. Loaded modules are hashed as they were at the first look-up, since this is
    the code that runs. So look the code up when it is registered.

    Args:
        entry: the object.
        registered_in: the module that registers it.
    """
    definition = entry
    while isinstance(definition, functools.partial):
        definition = definition.func
    if not isinstance(definition, type | FunctionType):
        definition = type(definition)
    module = definition.__module__ or ""
    collector = _Collector()
    if MAIN in (module, registered_in):
        collector.add_value("entry", entry)
    if _is_users(registered_in):
        collector.add_module(registered_in)
    if _is_part(module, of=registered_in):
        collector.add_module(module)
    if registered_in == MAIN and isinstance(entry, FunctionType):  # may be made by a function of another module
        collector.add_captured(entry)
    return collector.code()


def compare_code(recorded: Code, current: Code) -> Literal["same", "other", "unknown"]:
    """Return whether a result was made by the current code; `unknown` if part of the code was or is unreadable."""
    shared = recorded.keys() & current.keys()
    known = [module for module in shared if recorded[module] is not None and current[module] is not None]
    if any(recorded[module] != current[module] for module in known):
        return "other"
    if None in recorded.values() or None in current.values():
        return "unknown"
    if recorded == current:
        return "same"
    return "other" if recorded and current else "unknown"  # earlier versions recorded no code


def files_changed_since_import() -> list[str]:
    """Return the files of loaded modules that were looked up, and that have changed or are unreadable now."""
    specs = (getattr(module, "__spec__", None) for module in list(sys.modules.values()))
    looked_up = [_loaded[id(spec)] for spec in specs if id(spec) in _loaded]
    return [str(path) for _, path, content in looked_up if content is not None and _read(path) != content]


def _is_users(module: str) -> bool:
    """Return whether a module is neither part of gprune, Lightning or PyTorch, nor of Python itself."""
    return bool(module) and module.partition(".")[0] not in NOT_OF_USERS


class _Collector:
    """Collection of the code that an object uses: whole modules, and parts of `__main__`."""

    def __init__(self) -> None:
        self._modules: dict[str, str | None] = {}  # module -> hash
        self._main: list[str | None] = []  # sources and values in `__main__`; None for an unreadable source
        self._seen: dict[int, Any] = {}  # values by id. They are kept, so that no other value gets the same id.

    def code(self) -> dict[str, str | None]:
        """Return the hash of each module."""
        if not self._main:
            return self._modules
        return self._modules | {MAIN: None if None in self._main else _hash("\n".join(self._main).encode())}

    def add_module(self, name: str) -> None:
        """Add a module of the user and, recursively, the modules of the user that it imports."""
        if name in self._modules or name == MAIN:
            return
        path = _file_of(name)
        content = None if path is None else _content(name, path)
        if content is None:
            self._modules[name] = None
            return
        self._modules[name], imports = _parse(content)
        package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        for imported in _absolute_names(imports, package):
            if _is_part(imported, of=name):
                self.add_module(imported)

    def add_value(self, name: str, value: Any) -> None:
        """Add a value of `__main__` with its name and, recursively, the user's code to which it refers."""
        if isinstance(value, PLAIN):
            self._main.append(f"{name} = {value!r}")
            return
        if id(value) in self._seen:
            return
        self._seen[id(value)] = value
        if isinstance(value, ModuleType):
            if _is_part(value.__name__, of=MAIN):
                self.add_module(value.__name__)
        elif isinstance(value, type | FunctionType):
            self._add_definition(value)
        else:
            for part_name, part in _parts(name, value):
                self.add_value(part_name, part)
            if type(value).__module__ == MAIN or _is_part(type(value).__module__, of=MAIN):
                self._add_definition(type(value))
                self.add_value(name, dict(getattr(value, "__dict__", {})))

    def add_captured(self, function: FunctionType) -> None:
        """Add the default values of a function, and the values of outer functions that it uses."""
        self.add_value("defaults", [function.__defaults__, function.__kwdefaults__])
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            with contextlib.suppress(ValueError):  # the variable has no value yet
                self.add_value(name, cell.cell_contents)

    def _add_definition(self, definition: type | FunctionType) -> None:
        """Add a function or class. One of a module counts as the whole module."""
        module = definition.__module__ or ""
        if module != MAIN:
            if _is_part(module, of=MAIN):
                self.add_module(module)
        elif isinstance(definition, type):
            self._main.append(f"class {definition.__qualname__}")
            self.add_value("bases", definition.__bases__)
            for name, value in vars(definition).items():
                is_generated = name.startswith("__") and not isinstance(value, METHODS)  # such as the docstring
                if not is_generated:
                    self.add_value(name, value)
        else:
            self._add_function(definition)

    def _add_function(self, function: FunctionType) -> None:
        """Add the source of a function of `__main__`, and everything to which it refers."""
        if function.__code__.co_filename == "<string>" and function.__name__.startswith("__"):
            return  # generated, for example by `dataclass`
        try:
            source = inspect.getsource(function.__code__)
        except (OSError, TypeError):
            self._main.append(None)
            return
        self._main.append(_parse(textwrap.dedent(source).encode())[0])
        self.add_captured(function)
        for name in _names_in(function.__code__):
            if name in function.__globals__:
                self.add_value(name, function.__globals__[name])


def _parts(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Yield the values, with names, of which a container or a wrapper of functions consists."""
    if isinstance(value, dict):
        yield from ((str(key), item) for key, item in value.items())
    elif isinstance(value, list | tuple):
        yield from ((name, item) for item in value)
    elif isinstance(value, set | frozenset):
        yield from ((name, item) for item in sorted(value, key=repr))
    for wrapper, attributes in WRAPPERS.items():
        if isinstance(value, wrapper):
            yield from ((attribute, getattr(value, attribute)) for attribute in attributes)


def _names_in(code: CodeType) -> list[str]:
    """Return the names of globals and attributes in a code object and in the functions that it defines."""
    inner = [_names_in(constant) for constant in code.co_consts if isinstance(constant, CodeType)]
    return list(dict.fromkeys([*code.co_names, *itertools.chain(*inner)]))


def _is_part(name: str, of: str) -> bool:
    """Return whether a name is a module of the user that is hashed with another module.

    This holds for modules of the same package, and for modules that are not installed with pip.
    """
    path = _file_of(name) if _is_users(name) and name != MAIN else None
    if path is None:
        return False
    return INSTALLED.isdisjoint(path.parts) or name.partition(".")[0] == of.partition(".")[0]


def _file_of(name: str) -> Path | None:
    """Return the file of a module, without importing anything; None if there is no module or no file."""
    if name in sys.modules:
        file = getattr(sys.modules[name], "__file__", None)
        return Path(file) if file else None
    parent = name.rpartition(".")[0]
    folders = None  # sys.path
    if parent:
        parent_file = _file_of(parent)
        if parent_file is None or parent_file.name != "__init__.py":
            return None
        folders = [str(parent_file.parent)]
    spec = PathFinder.find_spec(name, folders)
    return Path(spec.origin) if spec is not None and spec.has_location else None


def _content(name: str, path: Path) -> bytes | None:
    """Return the content of a module's file, or None if it is unreadable. A loaded module is read only once."""
    spec = getattr(sys.modules.get(name), "__spec__", None)
    if spec is None:
        return _read(path)
    if id(spec) not in _loaded:
        _loaded[id(spec)] = spec, path, _read(path)
    return _loaded[id(spec)][2]


def _read(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except OSError:
        return None


@functools.lru_cache(maxsize=256)
def _parse(source: bytes) -> tuple[str, tuple[tuple[int, str], ...]]:
    """Return the hash of source code, and the names that it imports, each with its number of leading dots.

    Source code that is not valid Python, such as the line of a lambda, is hashed as it is.
    """
    try:
        tree = ast.parse(source)
        imports = tuple(_imports(tree))
        for node in ast.walk(tree):
            if isinstance(node, DOCUMENTED) and ast.get_docstring(node, clean=False) is not None:
                node.body = node.body[1:]
        return _hash(ast.unparse(tree).encode()), imports
    except (SyntaxError, ValueError, RecursionError):
        return _hash(source), ()


def _imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield the imported names of a module. The name in `from a import b` may be the module a.b, or a function of a."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((0, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            yield node.level, base
            yield from ((node.level, f"{base}.{alias.name}".lstrip(".")) for alias in node.names)


def _absolute_names(imports: Sequence[tuple[int, str]], package: str) -> Iterator[str]:
    """Yield imported names and the names of their packages, which are imported too."""
    for level, name in imports:
        try:
            absolute = resolve_name("." * level + name, package) if level else name
        except ImportError:  # beyond the top-level package
            continue
        parts = absolute.split(".")
        yield from (".".join(parts[:count]) for count in range(1, len(parts) + 1))


def _hash(content: bytes) -> str:
    """Return the SHA-256 (16 hex digits)."""
    return hashlib.sha256(content).hexdigest()[:16]
