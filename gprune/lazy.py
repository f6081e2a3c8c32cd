"""Names of a package that are imported when they are first used (PEP 562), so that help waits for no PyTorch."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any


def later(package: str, places: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """`__getattr__` and `__dir__` of a package.

    Args:
        package: its `__name__`; its `__all__` is what `dir` lists.
        places: module and name, `module:name`, by the name in the package.
    """

    def load(name: str) -> Any:
        if name not in places:
            raise AttributeError(f"module '{package}' has no attribute '{name}'")
        import_matplotlib()
        module, _, origin = places[name].partition(":")
        found = getattr(importlib.import_module(module), origin)
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
