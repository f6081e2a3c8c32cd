"""Tables, figures and model cards of finished runs."""

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from gprune.console import lazy_exports
from gprune.user_code import IMPORTED

if TYPE_CHECKING:
    from gprune.report.page import Report, make, of_runs
    from gprune.report.tables import Estimate, Table

# Names of the tables of a report; `corpora` and `final` are tables of lists.
TableName = Literal[
    "comparison", "corpora", "distance", "evaluation", "final", "means", "perplexity", "quality", "settings", "summary"
]
CLONE = Path(__file__).parents[2]


def prune_command() -> list[str]:
    """Words of the command that prunes: of `train.py` in a clone, else of the wheel; with the modules of `--import`."""
    program = ["python", "train.py"] if (CLONE / "train.py").is_file() else ["gprune", "prune"]
    return [*program, *(f"--import={module}" for module in IMPORTED)]


__all__ = ["Estimate", "Report", "Table", "make", "of_runs"]
__getattr__, __dir__ = lazy_exports(__name__, {
    "Estimate": "gprune.report.tables", "Report": "gprune.report.page", "Table": "gprune.report.tables",
    "make": "gprune.report.page", "of_runs": "gprune.report.page",
})  # fmt: skip
