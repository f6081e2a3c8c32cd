"""`--import MODULE`, of every command: code of the caller's that registers metrics, recoveries, stages or callbacks."""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path
from typing import Any

from gprune.errors import UserError, first_line

IMPORTED: list[str] = []  # as they were named; a run notes them


def use(name: str) -> None:
    """Import a module by its name, seen from the working folder, or by the path of its .py file.

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
