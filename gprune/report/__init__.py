"""Tables, figures and model cards of finished runs."""

from gprune.report.page import Report, make, of_runs
from gprune.report.table import Estimate, Table

__all__ = ["Estimate", "Report", "Table", "make", "of_runs"]
