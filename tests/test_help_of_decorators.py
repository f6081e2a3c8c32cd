"""The help of the registration decorators, such as `help(gprune.metric)`: contents and examples."""

from __future__ import annotations

import inspect
import textwrap

import pytest

import gprune
from gprune.recoveries import RECOVERY
from gprune.sparsity.allocation import ALLOCATION
from tests import registries

EXAMPLES = {  # decorator -> flags that select its example
    "metric": ["--importance=energy", "--gprune=false"],
    "allocation": ["--sparsity.start=powers", "--sparsity.allocation=equal", "--sparsity.options.power=3"],
    "recovery": ["--recovery=rescaled", "--gprune=false"],
    "calibrator": ["--corpora.calibrator=every_second", "--corpora.batch_size=2", "--gprune=false"],
    "refiner": ["--partition.refiner=merged", "--sparsity.allocation=equal"],
    "learner": ["--sparsity.learner=plain_sgd"],
}


def help_of(name: str) -> str:
    return inspect.getdoc(getattr(gprune, name))


@pytest.fixture
def _restore_registries(shared_cache):
    names = gprune.IMPORTANCE, ALLOCATION, RECOVERY, gprune.CALIBRATOR, gprune.REFINER, gprune.LEARNER
    with registries.restored(*names):
        yield


@pytest.mark.parametrize("name", EXAMPLES)
@pytest.mark.usefixtures("_restore_registries")
def test_the_example_in_the_help_runs_with_the_flag_that_the_help_names(name, world, tmp_path):
    about, example = help_of(name).partition("Example:")[::2]
    exec(textwrap.dedent(example.partition("\nArgs:")[0]), {"__name__": "example"})
    run = world.run(tmp_path, "--export=none", "--evaluation.controls=[]", *EXAMPLES[name])
    flag = EXAMPLES[name][0].partition("=")[0].replace(".start", ".allocation")
    assert f"`{flag}`" in about
    assert run.masks


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_help_has_a_first_line_shapes_and_an_example(name):
    text = help_of(name)
    first = text.splitlines()[0]
    assert first.startswith("Register ")
    assert first.endswith(".")
    assert "(N,)" in text or "(C,)" in text or "(B, T)" in text
    assert f"@{name}(" in text or f"@gprune.{name}(" in text
