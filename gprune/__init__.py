"""gprune: generalization-aware structured pruning of large language models.

import gprune

result = gprune.prune(gprune.RunConfig())      # SmolLM2-135M, half of its FFN neurons
result = gprune.load_run("runs/<name>")        # brings it back
small = gprune.apply_masks(model, result.masks)  # the same masks on another copy of the model
"""

from gprune.config import RunConfig
from gprune.corpora.load import CORPORA
from gprune.errors import UserError
from gprune.importance.metrics import IMPORTANCE, metric
from gprune.models.families import FAMILIES, Family
from gprune.models.loading import register as _register
from gprune.models.masks import Masks
from gprune.models.surgery import prune as apply_masks
from gprune.pipeline.prune import prune
from gprune.recovery import RECOVERY, recovery
from gprune.runs.results import PruningResult, load_run
from gprune.sparsity.allocation import ALLOCATION, allocation
from gprune.sparsity.gates import masked

_register()  # AutoModelForCausalLM then loads what we export without trust_remote_code

__version__ = "0.1.0"
__all__ = [
    "ALLOCATION", "CORPORA", "FAMILIES", "IMPORTANCE", "RECOVERY", "Family", "Masks", "PruningResult", "RunConfig",
    "UserError", "allocation", "apply_masks", "load_run", "masked", "metric", "prune", "recovery",
]  # fmt: skip
