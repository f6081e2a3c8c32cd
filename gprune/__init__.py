"""gprune: generalization-aware structured pruning of large language models.

import gprune

result = gprune.prune(gprune.RunConfig())      # SmolLM2-135M without 30 % of its FFN
result = gprune.load_run("runs/<name>")        # loads a finished run
small = gprune.apply_masks(model, result.masks)  # the same masks on another copy of the model
gprune.measure("path/to/model", "smollm2-135m")  # a model of another tool

Names that need PyTorch or transformers are imported at first use, so that `gprune --help` is fast.
"""

import warnings
from typing import TYPE_CHECKING

from gprune import corpora, stages  # noqa: F401 - they register themselves
from gprune.config import RunConfig
from gprune.console import lazy_exports
from gprune.corpora.documents import CORPORA
from gprune.errors import UserError
from gprune.importance.metrics import EXPERT_IMPORTANCE, IMPORTANCE, expert_metric, metric
from gprune.recoveries import RECOVERY, Recovery, recovery
from gprune.sparsity.allocation import ALLOCATION, allocation
from gprune.sparsity.price import COST
from gprune.user_code import VERSION

if TYPE_CHECKING:
    from gprune.discovery import masked
    from gprune.export.hf import apply_masks
    from gprune.method.measure import measure
    from gprune.method.prune import prune
    from gprune.models.loading import register
    from gprune.models.masks import Masks
    from gprune.runs.results import PruningResult, load_run
    from gprune.studies.study import StudyResult, load_study

__version__ = VERSION
__all__ = [
    "ALLOCATION", "CORPORA", "COST", "EXPERT_IMPORTANCE", "IMPORTANCE", "RECOVERY", "Masks",
    "PruningResult", "Recovery", "RunConfig", "StudyResult", "UserError", "allocation", "apply_masks",
    "expert_metric", "load_run", "load_study", "masked", "measure", "metric", "prune", "recovery", "register",
]  # fmt: skip
__getattr__, __dir__ = lazy_exports(__name__, {
    "Masks": "gprune.models.masks", "PruningResult": "gprune.runs.results", "StudyResult": "gprune.studies.study",
    "apply_masks": "gprune.export.hf", "load_run": "gprune.runs.results",
    "load_study": "gprune.studies.study", "masked": "gprune.discovery", "prune": "gprune.method.prune",
    "measure": "gprune.method.measure", "register": "gprune.models.loading",
})  # fmt: skip
# In a notebook without ipywidgets, tqdm would warn when transformers is imported. gprune draws no bars with tqdm there.
warnings.filterwarnings("ignore", message="IProgress not found")
