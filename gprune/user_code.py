"""Code of the user: imported by `--import`, found by the path of a class, and hashed.

Results of other code are not reused:

code_of(function, "my_metric")     # {"my_metric": "3f0c...", "my_helpers": "81d2..."}

Code is hashed as a syntax tree without docstrings, so comments and formatting do not matter. A module is hashed as a
whole, and so are the modules that it imports in statements of its own, except packages that are installed with pip. A
function of `__main__` (a notebook or a script), or the functions of a class, are hashed alone.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib
import inspect
import sys
import textwrap
from collections.abc import Iterator, Mapping
from importlib.util import resolve_name
from itertools import chain
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any, Literal

from gprune.errors import UnregisteredError, UserError, closest_name, first_line

IMPORTED: list[str] = []  # names as given to --import; stored in the manifest of a run
Code = Mapping[str, str | None]  # module -> hash of its code; None if the source cannot be read
MAIN = "__main__"
NOT_OF_USERS = {"gprune", *sys.stdlib_module_names}
INSTALLED = {"site-packages", "dist-packages"}  # names of folders
DOCUMENTED = (ast.Module, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)  # nodes that may have a docstring


def import_user_module(name: str) -> None:
    """Import a user's module, which may register metrics, recoveries or stages, or define callbacks."""
    file = Path(name).expanduser().absolute() if name.endswith(".py") else None
    can_import = Path(name).name == name if file is None else file.is_file() and "." not in file.stem
    if not can_import:
        raise UserError(f"--import must be a module or an existing .py file without other dots; got '{name}'.")
    sys.path.insert(0, str(Path.cwd() if file is None else file.parent))
    try:
        module = importlib.import_module(name if file is None else file.stem)
    except (Exception, SystemExit) as error:
        raise UserError(f"--import {name}: Cannot import it: {type(error).__name__}: {first_line(error)}.") from error
    if file is not None and not file.samefile(getattr(module, "__file__", None) or "."):
        raise UserError(f"--import {name}: Cannot import it: {module.__name__} is another module. Rename the file.")
    _add_module(module.__name__, {})  # reads the file now, because it may be changed later
    if name not in IMPORTED:
        IMPORTED.append(name)


def find_loaded(path: str, flag: str = "") -> Any:
    """Look up a dotted path, such as `lightning.pytorch.callbacks.Timer`, in a module that is already imported.

    Nothing is imported and no code runs, not even a module's `__getattr__`, because the path may come from an untrusted
    file. Errors begin with the flag that has the path.
    """
    where = f"{flag}: " if flag else ""
    module, _, name = path.rpartition(".")
    if sys.modules.get(module) is None:
        raise UnregisteredError(
            f"{where}{path}: Cannot find it: module '{module}' is not imported. Add --import {module or name}."
        )
    names = vars(sys.modules[module])
    if name not in names:
        closest = closest_name(name, names)
        hint = f" The closest name is '{closest}'." if closest else ""
        raise UnregisteredError(f"{where}Unknown class '{path}': module '{module}' does not define '{name}'.{hint}")
    return names[name]


def code_of(entry: Any, registered_in: str = "") -> dict[str, str | None]:
    """Return the hashes of the user's code of a function, a class or another object, by module.

    The modules are the one that defines the object, the one that registers it, and those that they import. The result
    is empty for code of gprune and of installed packages. A file is read once after it was loaded, since the loaded
    code is what runs. So look the code up when it is registered.
    """
    definition = entry
    while isinstance(definition, functools.partial):
        definition = definition.func
    if not isinstance(definition, type | FunctionType):
        definition = type(definition)
    code: dict[str, str | None] = {}
    for module in dict.fromkeys([registered_in, definition.__module__ or ""]):
        if module != MAIN:
            _add_module(module, code)
    if MAIN in (registered_in, definition.__module__):
        code[MAIN] = _hash(_source(definition))
    return code


def code_of_module(name: str) -> dict[str, str | None]:
    """Return the hashes of a loaded module of the user and of the modules that it imports; {name: None} if missing."""
    code: dict[str, str | None] = {}
    _add_module(name, code)
    return code or {name: None}


def code_at(path: str) -> dict[str, str | None]:
    """Return the hashes of the user's code of the class at a path, by module; {path: None} if it is not loaded."""
    try:
        return code_of(find_loaded(path), path.rpartition(".")[0])
    except UnregisteredError:
        return {path: None}


def compare_code(recorded: Code, current: Code) -> Literal["same", "other", "unknown"]:
    """Return whether a result was made by the current code.

    `unknown` if part of the code was or is unreadable, or only one of the two has code.
    """
    shared = recorded.keys() & current.keys()
    known = [module for module in shared if recorded[module] is not None and current[module] is not None]
    if any(recorded[module] != current[module] for module in known):
        return "other"
    if None in recorded.values() or None in current.values():
        return "unknown"
    if recorded == current:
        return "same"
    return "other" if recorded and current else "unknown"  # earlier versions recorded no code


def _add_module(name: str, code: dict[str, str | None]) -> None:
    """Add the hash of a loaded module of the user and, recursively, of those that it imports."""
    module = sys.modules.get(name)
    if module is None or name in code or not _belongs_to_user(module):
        return
    source = _source_of_module(module)
    code[name] = _hash(source)
    for imported in _imported(module, source or ""):
        _add_module(imported, code)


def _belongs_to_user(module: ModuleType) -> bool:
    """Return whether a module belongs neither to gprune, nor to Python, nor to an installed package."""
    file = getattr(module, "__file__", None)
    if file is None and hasattr(module, "__path__"):  # a folder without code
        return False
    may_be_users = module.__name__.partition(".")[0] not in NOT_OF_USERS
    return may_be_users and INSTALLED.isdisjoint(Path(file or "").parts)


def _source_of_module(module: ModuleType) -> str | None:
    """Return the source of a module as it was at the first look-up; None if it cannot be read."""
    stored = vars(module.__spec__ or module)  # reloading a module makes a new spec
    if "source_for_gprune" not in stored:
        try:
            stored["source_for_gprune"] = Path(module.__file__).read_text(encoding="utf-8")
        except (AttributeError, OSError, ValueError):
            stored["source_for_gprune"] = None
    return stored["source_for_gprune"]


def _imported(module: ModuleType, source: str) -> Iterator[str]:
    """Yield the absolute names in a module's import statements. `a.b` of `from a import b` may be a function of a.

    Imports inside functions and classes are left out, because those of functions may run after the look-up. Those in
    `try` and `if` are included.
    """
    top_level = [statement for statement in ast.parse(source).body if not isinstance(statement, DOCUMENTED)]
    for statement in chain.from_iterable(map(ast.walk, top_level)):
        if isinstance(statement, ast.Import):
            yield from (alias.name for alias in statement.names)
        elif isinstance(statement, ast.ImportFrom):
            base = resolve_name("." * statement.level + (statement.module or ""), module.__package__)
            yield base
            yield from (f"{base}.{alias.name}" for alias in statement.names)


def _source(definition: type | FunctionType) -> str | None:
    """Return the source of a function, or of all functions of a class, in a script or a notebook; None if unknown.

    For a class in a notebook, Python does not know the source, but it does for its functions.
    """
    functions = [definition] if isinstance(definition, FunctionType) else vars(definition).values()
    try:
        sources = [inspect.getsource(each) for each in functions if isinstance(each, FunctionType)]
    except (OSError, TypeError):
        return None
    return "".join(map(textwrap.dedent, sources))


def _hash(source: str | None) -> str | None:
    """Return the SHA-256 (16 hex digits) of source code without docstrings and comments; None for None."""
    if source is None:
        return None
    try:
        tree = ast.parse(source)
        for node in ast.walk(tree):
            if isinstance(node, DOCUMENTED) and ast.get_docstring(node, clean=False) is not None:
                node.body = node.body[1:]
        source = ast.unparse(tree)
    except SyntaxError:  # the line of a lambda is no statement
        pass
    return hashlib.sha256(source.encode()).hexdigest()[:16]
