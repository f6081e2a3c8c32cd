"""Every flag of train.py, with its help; start with `run.py`."""

from gprune.config.parse import RETIRED, parse
from gprune.config.run import RunConfig

__all__ = ["RETIRED", "RunConfig", "parse"]
