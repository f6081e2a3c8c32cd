"""Tables, figures and model cards of finished runs."""

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from gprune.console import lazy_exports
from gprune.user_code import IMPORTED

if TYPE_CHECKING:
    from gprune.report.page import Report, make
    from gprune.report.tables import Estimate, Table

TableName = Literal["corpora", "evaluation", "means", "perplexity", "quality", "summary"]  # that lists can select
CLONE = Path(__file__).parents[2]


def prune_command() -> list[str]:
    """Words of the command that prunes: of `train.py` in a clone, else of the wheel; with the modules of `--import`."""
    program = ["python", "train.py"] if (CLONE / "train.py").is_file() else ["gprune", "prune"]
    return [*program, *(f"--import={module}" for module in IMPORTED)]


__all__ = ["Estimate", "Report", "Table", "make"]
__getattr__, __dir__ = lazy_exports(__name__, {
    "Estimate": "gprune.report.tables", "Report": "gprune.report.page", "Table": "gprune.report.tables",
    "make": "gprune.report.page",
})  # fmt: skip
