"""Deferred imports: `--import MODULE`, and lazy names of packages (PEP 562), so that `--help` does not load PyTorch."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from gprune.errors import UnregisteredError, UserError, closest_name, first_line

IMPORTED: list[str] = []  # names as given to --import; stored in the manifest of a run
# Name as given to --import -> the error, for modules without which a command shows records of earlier runs.
UNREADABLE: dict[str, UnreadableModuleError] = {}


class UnreadableModuleError(UserError):
    """A module that cannot be imported because its file is missing or unreadable."""


def import_user_module(name: str) -> None:
    """Import a user's module, which may register metrics, recoveries or stages, or define callbacks."""
    file = Path(name).expanduser().absolute() if name.endswith(".py") else None
    can_import = Path(name).name == name if file is None else file.is_file() and "." not in file.stem
    if not can_import:
        problem = UserError if file is None or file.is_file() else UnreadableModuleError
        raise problem(f"--import must be a module or an existing .py file without other dots; got '{name}'.")
    sys.path.insert(0, str(Path.cwd() if file is None else file.parent))
    try:
        module = importlib.import_module(name if file is None else file.stem)
    except (Exception, SystemExit) as error:
        message = f"--import {name}: Cannot import it: {type(error).__name__}: {first_line(error)}."
        if isinstance(error, ModuleNotFoundError) and error.name == name:
            raise UnreadableModuleError(message) from error
        raise UserError(message) from error
    if file is not None and not file.samefile(getattr(module, "__file__", None) or "."):
        raise UserError(f"--import {name}: Cannot import it: {module.__name__} is another module. Rename the file.")
    if name not in IMPORTED:
        IMPORTED.append(name)


def find_loaded(path: str) -> Any:
    """Look up a dotted path, such as `lightning.pytorch.callbacks.Timer`, in a module that is already imported.

    Nothing is imported and no code runs, not even a module's `__getattr__`, because the path may come from an untrusted
    file.
    """
    module, _, name = path.rpartition(".")
    if sys.modules.get(module) is None:
        raise UnregisteredError(
            f"{path}: Cannot find it: module '{module}' is not imported. Add --import {module or name}."
        )
    names = vars(sys.modules[module])
    if name not in names:
        closest = closest_name(name, names)
        hint = f" The closest name is '{closest}'." if closest else ""
        raise UnregisteredError(f"Unknown class '{path}': module '{module}' does not define '{name}'.{hint}")
    return names[name]


def path_of(cls: type) -> str:
    """Return the path by which `find_loaded` finds a class. Raise UserError for a class inside a function or class."""
    if not isinstance(cls, type):
        raise UserError(f"A stage must be a class; got {cls!r:.100}.")
    path = f"{cls.__module__}.{cls.__qualname__}"
    if "." in cls.__qualname__ or find_loaded(path) is not cls:
        raise UserError(f"Class {path} must be defined at the top level of a module or a notebook, to have a path.")
    return path


class Import(argparse.Action):
    """Action of `--import`: import immediately, so that other flags can use registered names."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        try:
            import_user_module(values)
        except UnreadableModuleError as error:
            if not parser.shows_records:
                raise
            UNREADABLE[values] = error


def lazy_exports(package: str, modules: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Return `__getattr__` and `__dir__` for a package whose public names are imported at first use."""

    def lazy_getattr(name: str) -> Any:
        """Import a public name, and store it in the package, so that this function is called once for each name."""
        if name not in modules:
            raise AttributeError(f"module '{package}' has no attribute '{name}'")
        # The modules import Lightning, which imports matplotlib and fails if the user's matplotlibrc is broken.
        import_matplotlib()
        value = getattr(importlib.import_module(modules[name]), name)
        setattr(sys.modules[package], name, value)
        return value

    def list_names() -> list[str]:
        return sorted(sys.modules[package].__all__)

    return lazy_getattr, list_names


def import_matplotlib() -> None:
    """Import matplotlib, without the user's matplotlibrc and backend if they are broken.

    Call it before Lightning imports matplotlib, which would raise their error.
    """
    try:
        import matplotlib
    except Exception:
        partly_imported = [name for name in sys.modules if name.split(".")[0] == "matplotlib"]
        for name in partly_imported:
            del sys.modules[name]
        environment = os.environ.copy()
        os.environ |= {"MPLBACKEND": "", "MATPLOTLIBRC": os.devnull}
        import matplotlib  # noqa: F401

        os.environ.clear()
        os.environ.update(environment)
