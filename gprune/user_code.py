"""Code of the user: imported by `--import`, found by the path of a class, and identified by the bytes of its files.

Results of other code are not reused:

code_of(function, "my_metric")     # {"my_metric": SHA-256 of my_metric.py, "my_helpers": SHA-256 of my_helpers.py}
code_of(function_of_a_notebook)    # {"__main__.score": SHA-256 of its source, "__main__.POWER": SHA-256 of its value}

A file counts as a whole, including its comments, and so do the files of the modules that it imports in statements of
its own, except packages that are installed with pip. A notebook has no file. There, the source of the functions and
classes that a run uses counts, and the plain constants that they read.
"""

from __future__ import annotations

import ast
import contextlib
import dis
import functools
import hashlib
import importlib
import sys
from collections.abc import Iterator, Mapping
from importlib.util import resolve_name
from itertools import chain
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any, Literal

from gprune.errors import UnregisteredError, UserError, closest_name, first_line

VERSION = "0.1.0"  # of gprune, which identifies a run together with the code of the user
IMPORTED: list[str] = []  # names as given to --import; stored in the manifest of a run
Code = Mapping[str, str | None]  # module, or definition of a notebook -> hash; None if the code cannot be read
HASH_DIGITS = 64  # of SHA-256; earlier versions stored 16 digits of the hash of a syntax tree
MAIN = "__main__"
NOT_OF_USERS = {"gprune", *sys.stdlib_module_names}
INSTALLED = {"site-packages", "dist-packages"}  # names of folders
SCOPES = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


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
    """Return the hashes of the user's code of a function, a class or another object.

    The modules are the one that defines the object, the one that registers it, and those that they import. The result
    is empty for code of gprune and of installed packages. A file is read once after it was loaded, since the loaded
    code is what runs. So look the code up when it is registered.
    """
    definition = entry.func if isinstance(entry, functools.partial) else entry
    code: dict[str, str | None] = {}
    for module in dict.fromkeys([registered_in, definition.__module__]):
        if module != MAIN:
            _add_module(module, code)
    if definition.__module__ == MAIN:
        _add_name(getattr(definition, "__qualname__", type(definition).__name__).partition(".")[0], code)
    return code


def code_of_module(name: str) -> dict[str, str | None]:
    """Return the hashes of a loaded module of the user and of the modules that it imports; {name: None} if missing."""
    code: dict[str, str | None] = {}
    _add_module(name, code)
    return code or {name: None}


def code_at(path: str) -> dict[str, str | None]:
    """Return the hashes of the user's code of the class at a path; {path: None} if it is not loaded."""
    try:
        return code_of(find_loaded(path), path.rpartition(".")[0])
    except UnregisteredError:
        return {path: None}


def compare_code(recorded: Code, current: Code) -> Literal["same", "other", "unknown"]:
    """Return whether a result was made by the current code.

    `unknown` if part of the code was or is unreadable, was hashed by an earlier version, or only one of the two has
    code.
    """
    known = [name for name in recorded.keys() & current.keys() if _comparable(recorded[name], current[name])]
    if any(recorded[name] != current[name] for name in known):
        return "other"
    if not all(_comparable(value) for value in [*recorded.values(), *current.values()]):
        return "unknown"
    if recorded == current:
        return "same"
    return "other" if recorded and current else "unknown"  # earlier versions recorded no code


def _comparable(*hashes: str | None) -> bool:
    """Return whether all hashes are known, and hashes of this version."""
    return all(value is not None and len(value) == HASH_DIGITS for value in hashes)


def changed_code(old: Code, new: Code) -> list[str]:
    """List the user's modules and definitions in which two runs differ, as 'the code of my_metric has changed'."""
    differences = []
    for name in sorted({*old, *new}):
        before, after = old.get(name), new.get(name)
        if before == after:
            continue
        reason = "has changed"
        if name not in new:
            reason = "is not used"
        elif before is None:
            reason = "was not recorded"
        elif after is None:
            reason = "cannot be read"
        elif not _comparable(before):
            reason = "was recorded in another form by an earlier version"
        differences.append(f"the code of {name} {reason}")
    return differences


# --- files


def _add_module(name: str, code: dict[str, str | None]) -> None:
    """Add the hash of a loaded module of the user and, recursively, of those that it imports."""
    module = sys.modules.get(name)
    if module is None or name in code or not _belongs_to_user(module):
        return
    content = _content_of(module)
    code[name] = _hash(content)
    if content is not None and module.__file__.endswith(".py"):
        for imported in _imported(module, content):
            _add_module(imported, code)


def _belongs_to_user(module: ModuleType) -> bool:
    """Return whether a module belongs neither to gprune, nor to Python, nor to an installed package."""
    file = getattr(module, "__file__", None)
    if file is None and hasattr(module, "__path__"):  # a folder without code
        return False
    may_be_users = module.__name__.partition(".")[0] not in NOT_OF_USERS
    return may_be_users and INSTALLED.isdisjoint(Path(file or "").parts)


def _content_of(module: ModuleType) -> bytes | None:
    """Return the bytes of a module's file as they were at the first look-up; None if it cannot be read."""
    stored = vars(module.__spec__ or module)  # reloading a module makes a new spec
    if "content_for_gprune" not in stored:
        try:
            stored["content_for_gprune"] = Path(module.__file__).read_bytes()
        except (AttributeError, OSError, TypeError):
            stored["content_for_gprune"] = None
    return stored["content_for_gprune"]


def _imported(module: ModuleType, content: bytes) -> Iterator[str]:
    """Yield the absolute names in a module's import statements. `a.b` of `from a import b` may be a function of a.

    Imports inside functions and classes are left out, because those of functions may run after the look-up. Those in
    `try` and `if` are included.
    """
    top_level = [statement for statement in ast.parse(content).body if not isinstance(statement, SCOPES)]
    for statement in chain.from_iterable(map(ast.walk, top_level)):
        if isinstance(statement, ast.Import):
            yield from (alias.name for alias in statement.names)
        elif isinstance(statement, ast.ImportFrom):
            # The modules with which transformers loads others lazily have no __package__, and a script has no __spec__.
            package = module.__spec__.parent if module.__package__ is None else module.__package__
            base = resolve_name("." * statement.level + (statement.module or ""), package)
            yield base
            yield from (f"{base}.{alias.name}" for alias in statement.names)


# --- notebooks


def _add_name(name: str, code: dict[str, str | None]) -> None:
    """Add what a name of `__main__` stands for and, recursively, the names that its source reads.

    A plain constant is hashed by its value, and other objects by the statement of a cell that defines them. Those of a
    script or of a module count by their file.
    """
    main = sys.modules[MAIN]
    key, value = f"{MAIN}.{name}", vars(main).get(name)
    if key in code:
        return
    source = _source_in_cells(name)
    module = value.__name__ if isinstance(value, ModuleType) else getattr(value, "__module__", MAIN)
    if name in vars(main) and _is_plain(value):
        code[key] = _hash(repr(value).encode())
    elif source is not None:
        code[key] = _hash(source.encode())
        for read in _names_read(source) & vars(main).keys():
            _add_name(read, code)
    elif module != MAIN or hasattr(main, "__file__"):
        _add_module(module, code)
    else:
        code[key] = None


def _source_in_cells(name: str) -> str | None:
    """Return the last statement that defines a name in the cells of a notebook, without comments; None without one."""
    for cell in reversed(vars(sys.modules[MAIN]).get("In", ())):  # of IPython
        with contextlib.suppress(SyntaxError):
            for statement in reversed(ast.parse(cell).body):
                nodes = [statement] if isinstance(statement, SCOPES) else ast.walk(statement)
                assigned = (node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store))
                if name == getattr(statement, "name", None) or name in assigned:
                    return ast.unparse(statement)
    return None


def _names_read(source: str) -> set[str]:
    """Return the global names that a statement, and the functions inside it, read."""
    names, codes = set(), [compile(source, "", "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)]
    for code in codes:  # which grows by the code of inner functions
        codes += [constant for constant in code.co_consts if isinstance(constant, CodeType)]
        names |= {step.argval for step in dis.get_instructions(code) if step.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    return {name for name in names if not name.startswith("__")}


def _is_plain(value: Any) -> bool:
    """Return whether a value is a number, a text, or a tuple, list or mapping of such values."""
    if isinstance(value, dict):
        return all(map(_is_plain, chain.from_iterable(value.items())))
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | complex | str | bytes)


def _hash(content: bytes | None) -> str | None:
    """Return the SHA-256 of bytes; None for None."""
    return None if content is None else hashlib.sha256(content).hexdigest()
