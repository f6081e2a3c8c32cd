"""The help of the registration decorators, such as `help(gprune.metric)`: contents and examples."""

from __future__ import annotations

import inspect
import textwrap

import pytest

import gprune
from gprune.recoveries import RECOVERY
from gprune.sparsity.allocation import ALLOCATION
from tests.world import restored

EXAMPLES = {  # decorator -> flags that select its example
    "metric": ["--importance=energy", "--gprune=false"],
    "allocation": ["--sparsity.start=powers", "--sparsity.allocation=equal", "--sparsity.options.power=3"],
    "recovery": ["--recovery=rescaled", "--gprune=false"],
}


def help_of(name: str) -> str:
    return inspect.getdoc(getattr(gprune, name))


@pytest.fixture
def _restore_registries(shared_cache):
    with restored(gprune.IMPORTANCE, ALLOCATION, RECOVERY):
        yield


@pytest.mark.parametrize("name", EXAMPLES)
@pytest.mark.usefixtures("_restore_registries")
def test_the_example_in_the_help_runs_with_the_flag_that_the_help_names(name, world, tmp_path):
    description, _, example = help_of(name).partition("Example:")
    exec(textwrap.dedent(example.partition("\nArgs:")[0]), {"__name__": "example"})
    run = world.run(tmp_path, "--export=none", "--evaluation.before_recovery=false", *EXAMPLES[name])
    # The help of `allocation` names --sparsity.allocation, and its example is run as --sparsity.start.
    flag = EXAMPLES[name][0].partition("=")[0].replace(".start", ".allocation")
    assert f"`{flag}`" in description
    assert run.masks
