"""Flags on the command line that have no effect are listed in one line of the log."""

from __future__ import annotations

import pytest

from tests import tiny_run


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("--distill.rank=8", "--distill.rank (--distill.targets all)"),
        ("--export=none --export.dtype=float16", "--export.dtype (--export none)"),
        ("--export=none --export.dtype=float16 --sparsity.target=400KiB", ""),
        ("--gprune=false --sparsity.epochs=1 --partition.steps=3 --recovery=none --distill.kl=1 --ridge=1",
         "--distill.kl, --ridge (--recovery none); --partition.steps, --sparsity.epochs (--gprune false)"),
        ("--reliability.switch=false --reliability.metric=random --sparsity.allocation=owl --sparsity.loss=kl",
         "--reliability.metric (--reliability.switch false); --sparsity.loss (--sparsity.allocation owl)"),
        ("--recovery=[bias,distill] --ridge=1 --distill.tokens=8000", "--ridge (--recovery bias+distill)"),
        ("--sparsity.allocation=global --sparsity.start=owl", "--sparsity.start (--sparsity.allocation global)"),
        ("--sparsity.learn=offsets --sparsity.learning_rate=5 --sparsity.offset_limit=2",
         "--sparsity.learning_rate (--sparsity.learn offsets)"),
        ("--sparsity.offset_limit=9 --partition.method=initial --partition.steps=9 --partition.drift_weight=2",
         "--partition.steps (--partition.method initial); --sparsity.offset_limit (--sparsity.learn thresholds)"),
        ("--sparsity.allocation=reconstruction --recovery=none --ridge=1", ""),
        ("--sparsity.start=owl --sparsity.options.spread=0.1 --distill.targets=lora --distill.rank=8", ""),
    ],
)  # fmt: skip
def test_the_log_lists_given_flags_that_have_no_effect_with_the_reason(flags, expected, tmp_path, capsys):
    (tmp_path / "a.yaml").write_text("distill: {rank: 4}\nsparsity.epochs: 3\n")  # flags from a file are not listed
    args = [f"--config={tmp_path / 'a.yaml'}", *flags.split(), "--model.name=tiny-random", "--dry_run=true"]
    assert tiny_run.main(args) == 0
    ignored = [line.partition("Ignored flags: ")[2] for line in capsys.readouterr().out.splitlines()]
    assert [flags for flags in ignored if flags] == ([expected] if expected else [])
