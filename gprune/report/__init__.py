"""Tables, figures and model cards of finished runs."""

from typing import TYPE_CHECKING

from gprune.imports import lazy_exports

if TYPE_CHECKING:
    from gprune.report.page import Report, make, of_runs
    from gprune.report.table import Estimate, Table

__all__ = ["Estimate", "Report", "Table", "make", "of_runs"]
__getattr__, __dir__ = lazy_exports(__name__, {
    "Estimate": "gprune.report.table", "Report": "gprune.report.page", "Table": "gprune.report.table",
    "make": "gprune.report.page", "of_runs": "gprune.report.page",
})  # fmt: skip
