"""What is imported later than usual: `--import MODULE`, names of packages (PEP 562: help waits for no PyTorch)."""

from __future__ import annotations

import argparse
import ast
import importlib
import inspect
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gprune.errors import UserError, first_line

IMPORTED: list[str] = []  # as they were named; a run notes them


def use(name: str) -> None:
    """Import the caller's module, by its name, seen from the working folder, or by the path of its .py file.

    It registers metrics, recoveries, stages or callbacks.

    Raises:
        UserError: for whatever is raised meanwhile.
    """
    file = Path(name).expanduser().absolute() if name.endswith(".py") else None
    sys.path.insert(0, str(Path.cwd() if file is None else file.parent))
    try:
        module = importlib.import_module(name if file is None else file.stem)
    except (Exception, SystemExit) as error:
        raise UserError(f"--import {name}: {type(error).__name__}: {first_line(error)}") from error
    if file is not None and not file.samefile(getattr(module, "__file__", None) or "."):
        raise UserError(f"--import {name}: expected a name of its own; {module.__name__} is another module already.")
    if name not in IMPORTED:
        IMPORTED.append(name)


class Import(argparse.Action):
    """Imports at once, before other flags are looked up."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        use(values)


def later(package: str) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """`__getattr__` and `__dir__` of a package, by its `__name__`.

    What it imports `if TYPE_CHECKING:` is imported when it is used; its `__all__` is what `dir` lists.
    """
    (typed,) = (part for part in ast.parse(inspect.getsource(sys.modules[package])).body if isinstance(part, ast.If))
    places = {name.name: line.module for line in typed.body for name in line.names}

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
