"""Two runs of the same settings have the same bits, and any other bit is found, also by the exit code."""

from __future__ import annotations

import shutil
from importlib import import_module

import pytest
from safetensors.torch import load_file, save_file

from experiments.same_bits import layout
from experiments.same_bits.configurations import configurations
from gprune.config.parse import parse
from gprune.sparsity.allocation import ALLOCATION
from gprune.sparsity.target import Target
from tests import tiny_run

# `from experiments.same_bits import __main__` would be the module `__main__` of pytest.
same_bits = import_module("experiments.same_bits.__main__")
ONE, OTHER = "owl_protect", "reconstruction"  # names of two configurations, which other runs replace here


@pytest.fixture(scope="module")
def runs(world, shared_cache, tmp_path_factory):
    """Return a folder with the run folders `first`, `again` and, with another seed, `seed`."""
    folder = tmp_path_factory.mktemp("runs")
    flags = ("--recovery=least_squares", "--evaluation.before_recovery=false")
    for name, seed in (("first", 0), ("again", 0), ("seed", 1)):
        assert tiny_run.main(world.args(folder, *flags, f"--run.seed={seed}", name=name)) == 0
    return folder


@pytest.fixture
def compared(runs, monkeypatch, capsys):
    """Return a function that compares run folders in place of those that a commit and the tree make.

    Its arguments are flags and `one=(BEFORE, AFTER)` or `other=...`, names of run folders. It returns exit code and
    output.
    """

    def compare(*arguments: str, **pairs: tuple[str, str]) -> tuple[int, str]:
        names = {"one": ONE, "other": OTHER}

        def copy_runs(options, selected, work):
            assert list(selected) == [names[name] for name in pairs]
            for name, (before, after) in pairs.items():
                for side, run in (("commit", before), ("tree", after)):
                    shutil.copytree(runs / run, work / side / names[name])

        monkeypatch.setattr(same_bits, "run_both", copy_runs)
        code = same_bits.main(["HEAD", "--only", *(names[name] for name in pairs), *arguments])
        return code, capsys.readouterr().out

    return compare


def test_two_runs_of_the_same_settings_are_equal_in_all_groups(runs):
    first, again, seed = (layout.read_results(runs / name) for name in ("first", "again", "seed"))
    assert all(first[group] for group in layout.GROUPS)
    assert same_bits.differences(first, again) == []
    changed = [text.partition(":")[0] for text in same_bits.differences(first, seed)]
    assert {"labels", "masks", "weights", "records"} <= {*changed}


def test_another_seed_in_one_tree_ends_with_exit_code_1_unless_it_is_expected(compared):
    assert compared(one=("first", "again"))[0] == 0
    code, table = compared(one=("first", "again"), other=("first", "seed"))
    assert code == 1
    one, other = (line for line in table.splitlines() if line.startswith((f"| {ONE}", f"| {OTHER}")))
    assert one.endswith(" equal |")
    assert "masks: " in other
    assert "1 of 2 as they should be" in table
    code, table = compared("--expect", OTHER, one=("first", "again"), other=("first", "seed"))
    assert code == 0
    assert "as expected, labels: " in table


def test_one_bit_of_one_weight_is_a_difference(runs, tmp_path):
    shutil.copytree(runs / "first", tmp_path / "run")
    (file,) = (tmp_path / "run/model").glob("*.safetensors")
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("down_proj.weight"))
    tensors[name].view(-1).view(dtype=layout.torch.int32)[3] ^= 1
    save_file(tensors, file)
    before, after = layout.read_results(runs / "first"), layout.read_results(tmp_path / "run")
    numbers = f"1 of {tensors[name].numel()} entries"
    assert same_bits.differences(before, after) == [
        f"weights: 1 of {len(tensors)}, first 'model: {name}' ({numbers})"
    ]  # fmt: skip


def test_numbers_of_a_commit_with_controls_are_those_of_the_runs_own_model_before_and_after_recovery():
    rows = [("dense", "none"), ("base", "none"), ("gprune", "none"), ("base", "bias"), ("gprune", "bias")]
    former = [{"stage": stage, "recovery": recovery} for stage, recovery in rows]
    own = {("dense", "none"): "dense", ("gprune", "none"): "pruned", ("gprune", "bias"): "recovered"}
    assert layout.stages_of_model(former) == own
    assert layout.stages_of_model(former[:3]) == {rows[0]: "dense", rows[2]: "pruned"}
    today = [{"stage": "dense", "recovery": "none"}, {"stage": "recovered", "recovery": "bias"}]
    assert layout.stages_of_model(today) == {("dense", "none"): "dense", ("recovered", "bias"): "recovered"}


def test_a_run_without_results_is_a_difference_even_if_both_lack_them(compared, runs):
    (runs / "failed").mkdir(exist_ok=True)
    code, table = compared(one=("failed", "failed"))
    assert code == 1
    assert "no masks in commit (without output)" in table
    assert "no records in tree" in table


def test_the_configurations_have_every_allocation_recovery_scope_without_experts_and_kind_of_target():
    known = {name: parse(flags) for name, flags in configurations(real=True).items()}
    tiny = [cfg for cfg in known.values() if cfg.model.name == "tiny-random"]
    used = {cfg.sparsity.allocation for cfg in tiny} | {cfg.base_allocation for cfg in tiny}
    built_in = {name for name in ALLOCATION if ALLOCATION[name].__module__.startswith("gprune.")}
    assert used == built_in
    recoveries = {name for cfg in tiny for name in cfg.recovery.split("+")}
    assert recoveries == {"none", "bias", "least_squares", "distill"}
    assert {cfg.distill.targets for cfg in tiny if "distill" in cfg.recovery} == {"mlp", "all", "lora"}
    assert {cfg.sparsity.scope for cfg in tiny} == {"ffn", "attention+ffn", "ffn+blocks", "attention+ffn+blocks"}
    targets = {str(cfg.sparsity.target).lstrip("+0123456789.") for cfg in tiny}
    assert targets == {"", "%", "M", "KiB", "x"}
    assert any(Target.of(cfg.sparsity.target).is_searched for cfg in tiny)
    assert len(known) > len(tiny)  # the others are real models
