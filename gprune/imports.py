"""What is imported later than usual: `--import MODULE`, names of packages (PEP 562: help waits for no PyTorch)."""

from __future__ import annotations

import argparse
import importlib
import os
import stat
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from gprune.errors import UserError, first_line, nearest

IMPORTED: list[str] = []  # as they were named; a run notes them


def use(name: str) -> None:
    """Import the caller's module, by its name, seen from the working folder, or by the path of its .py file.

    It registers metrics, recoveries, stages or callbacks.

    Raises:
        UserError: for whatever is raised meanwhile.
    """
    file = Path(name).expanduser().absolute() if name.endswith(".py") else None
    if file is None and Path(name).name != name:
        raise UserError(f"--import {name}: expected the name of a module, or the path of a .py file.")
    if file is not None:
        _check_file(name, file)
    sys.path.insert(0, str(Path.cwd() if file is None else file.parent))
    try:
        module = importlib.import_module(name if file is None else file.stem)
    except (Exception, SystemExit) as error:
        raise UserError(f"--import {name}: {type(error).__name__}: {first_line(error)}") from error
    if file is not None and not file.samefile(getattr(module, "__file__", None) or "."):
        raise UserError(f"--import {name}: expected a name of its own; {module.__name__} is another module already.")
    if name not in IMPORTED:
        IMPORTED.append(name)


def _check_file(name: str, file: Path) -> None:
    """Raise UserError for what is not a file, or has a name that Python cannot import."""
    try:
        regular = stat.S_ISREG(file.stat().st_mode)
    except (OSError, ValueError) as error:
        raise UserError(f"--import {name}: {getattr(error, 'strerror', None) or error}.") from error
    if not regular:
        raise UserError(f"--import {name}: expected a .py file, got something else of that name.")
    if "." in file.stem:
        raise UserError(
            f"--import {name}: expected a file name without dots before .py, as '{file.stem}' is no module."
        )


def loaded(path: str) -> Any:
    """Return what a dotted path, such as `lightning.pytorch.callbacks.Timer`, names in a loaded module.

    Nothing is imported and no code runs, not even a module's `__getattr__`: the path may come from a file that somebody
    else has written.

    Raises:
        UserError: if the module is not loaded, or has no such name.
    """
    module, _, name = path.rpartition(".")
    if sys.modules.get(module) is None:
        raise UserError(f"{path}: module '{module}' is not loaded; add --import {module or name}.")
    names = vars(sys.modules[module])
    if name not in names:
        hint = f"; did you mean '{near}'?" if (near := nearest(name, names)) else "."
        raise UserError(f"{path}: module '{module}' defines no '{name}'{hint}")
    return names[name]


class Import(argparse.Action):
    """Imports at once, before other flags are looked up."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        use(values)


def later(package: str, places: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Return `__getattr__` and `__dir__` of a package: names that are imported when they are first used.

    Args:
        package: its `__name__`.
        places: name -> the module that defines it.
    """

    def load(name: str) -> Any:
        if name not in places:
            raise AttributeError(f"module '{package}' has no attribute '{name}'")
        import_matplotlib()
        found = getattr(importlib.import_module(places[name]), name)
        setattr(sys.modules[package], name, found)  # the next time it is there
        return found

    return load, lambda: sorted(sys.modules[package].__all__)


def import_matplotlib() -> None:
    """Import matplotlib, which Lightning does too; without the user's matplotlibrc and backend if it stops at them."""
    try:
        import matplotlib
    except Exception:
        for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
            del sys.modules[name]  # it has been imported by half
        before = os.environ.copy()
        os.environ |= {"MPLBACKEND": "", "MATPLOTLIBRC": os.devnull}
        import matplotlib  # noqa: F401

        os.environ.clear()
        os.environ.update(before)
