"""Settings that are refused, with the beginning of the message. Those that need a model: `method/test_bad_input.py`."""

from __future__ import annotations

import re

import pytest

from gprune.config import config_from_mapping
from gprune.errors import UserError

CHAIN = "--recovery must be a chain such as [least_squares,distill]; got "
REFUSED = [
    ({"recovery": "leastsquares"}, "Unknown recovery 'leastsquares'. Did you mean 'least_squares'?"),
    ({"corpora.drift": ["wiki"], "reliability.everywhere": True},
     "--reliability.everywhere true needs two or more --corpora.drift; got ['wiki']"),
    ({"corpora.drift": ["wiki"], "partition.method": "drift_only"}, "--partition.method drift_only needs two"),
    ({"sparsity.allocation": "bas"}, "Unknown allocation 'bas'. Available: learned, equal, uniform, global"),
    ({"sparsity.start": "equal"}, "--sparsity.start must be an allocation by blocks such as uniform; got 'equa"),
    ({"sparsity": {"allocation": "owl", "options": {"spread": -0.1}}},
     "--sparsity.options.spread must be 0 or more; got -0.1"),
    ({"sparsity.start": "owl", "sparsity.options.multiple": 0.5},
     "--sparsity.options.multiple must be 1 or more; got 0.5"),
    ({"sparsity": {"allocation": "owl", "options": {"multiples": 5}}},
     "--sparsity.options must name options of 'owl' (multiple, spread); got 'multiples'"),
    ({"sparsity.options.spread": 0.1}, "--sparsity.options must name options of 'uniform' (none); got 'spread'"),
    ({"sparsity": {"uniform_width": True, "allocation": "reconstruction"}},
     "--sparsity.uniform_width true needs --sparsity.allocation uniform, because all blocks lose equally much; got "
     "reconstruction."),
    ({"sparsity": {"uniform_width": True, "start": "owl"}}, "--sparsity.uniform_width true needs --sparsity.start"),
    ({"sparsity.cost": "parametres"},
     "Unknown cost 'parametres'. Did you mean 'parameters'? Available: parameters, kv_cache"),
    ({"corpora.drift": []}, "--corpora.drift must name at least one corpus"),
    ({"corpora.evaluate": ["wiki", "wiki"]}, "--corpora.evaluate must name each corpus once; got ['wiki', 'wiki']"),
    ({"reliability.metric": "wifv"}, "--reliability.metric must be an activation-free metric (magnitude,"),
    ({"model.dtype": "float16"}, "--model.dtype must be bfloat16 or float32 for --sparsity.allocation learned"),
    ({"run.name": "../x"}, "--run.name must be a folder name of at most 200 bytes; got '../x'"),
    ({"evaluation.split": "development", "sparsity.target": "+5%"},
     "--sparsity.target +5% cannot be combined with --evaluation.split development"),
    ({"stages": "not_there"}, "--stages must be a module of --import; got 'not_there'. Add --import not_there."),
    ({"stages": "json"}, "--stages must be a module that sets calibrator, refiner, learner, or some of them; got"),
    ({"sparsity.learner": "x"}, "Unknown setting 'sparsity.learner'. Use --stages MODULE"),
    ({"partition.refiner": "x"}, "Unknown setting 'partition.refiner'. Use --stages MODULE"),
    ({"corpora.calibrator": "x"}, "Unknown setting 'corpora.calibrator'. Use --stages MODULE"),
    ({"options.soft_assignment.tau": 1}, "--options must name recoveries that the run uses"),
    ({"options": {"x": 1}}, "--options.x must be a mapping of names to values; got 1."),
    ({"sparsity": {"target": "9KiB", "cost": "kv_cache"}},
     "--sparsity.target 9KiB cannot be combined with --sparsity.cost kv_cache"),
    ({"distill.kl": 0}, "--distill.kl or --distill.cross_entropy must be more than 0"),
    ({"distill": {"learning_rate": 0.01, "absolute_learning_rate": 5e-4}},
     "--distill.absolute_learning_rate cannot be combined with --distill.learning_rate"),
    ({"recovery": ["least_squares", "distill"], "distill.tokens": 100}, "--distill.tokens must be 768 or more"),
    ({"recovery": ["distill", "least_squares"]}, f"{CHAIN}distill+least_squares ('least_squares' goes block"),
    ({"recovery": ["bias", "least_squares"]}, f"{CHAIN}bias+least_squares ('least_squares' goes block"),
    ({"recovery": ["distill", "distill"]}, f"{CHAIN}distill+distill (each once"),
    ({"recovery": ["none", "distill"]}, f"{CHAIN}none+distill (each once, and no 'none'"),
    ({"recovery": ["least_squares", "heal"]}, "Unknown recovery 'heal'"),
]  # fmt: skip


@pytest.mark.parametrize(("settings", "message"), REFUSED)
def test_invalid_or_incompatible_settings_are_refused_with_the_reason(settings, message):
    with pytest.raises(UserError, match="^" + re.escape(f"Row 'x': {message}")) as error:
        config_from_mapping(settings, where="Row 'x'")
    assert "\n" not in str(error.value)
