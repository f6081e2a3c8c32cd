"""Flags that are given and not read: named in one line, with the reason, and without any effect."""

from __future__ import annotations

import sys
from typing import Any

import pytest

import gprune
from gprune.config import RunConfig, parse
from gprune.config.groups import Group
from gprune.config.unread import unread
from tests import tiny_run

EVERY = [f"{part.prefix}{n}" for _, part in RunConfig() if isinstance(part, Group) for n in type(part).model_fields]
# What settings that are neither numbers nor any text may be instead.
OTHERS = {
    "corpora.drift": "[stories]", "corpora.learn": "[stories]", "corpora.recover": "[web]",
    "corpora.learn_samples": 2, "partition.method": "initial",
    "reliability.everywhere": "false", "reliability.metric": "consensus", "sparsity.start": "global",
    "sparsity.learn": "both", "sparsity.loss": "kl", "distill.targets": "mlp", "distill.keep": "best",
    "distill.absolute_learning_rate": "null",  # there is one of the two
    "evaluation.curve": "[0.1]", "evaluation.controls": "[]", "trainer.precision": "bf16-mixed",
    "trainer.limit_train_batches": 1, "trainer.max_steps": 1, "trainer.gradient_clip_val": 0.001,
    "partition.refiner": "soft_assignment", "sparsity.learner": "straight_through",  # there is no other
    "plan.memory": "1GiB", "plan.tflops": 1, "logging.mode": "online", "logging.tags": "[other]",
}  # fmt: skip
MODES = (
    ["--gprune=false"],
    ["--sparsity.allocation=global", "--reliability.everywhere=true", "--recovery=least_squares"],
    ["--partition.method=initial", "--reliability.switch=false", "--sparsity.learn=offsets", "--recovery=distill",
     "--distill.tokens=300"],
)  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unread")
    with tiny_run.isolated(folder / "cache"):
        yield tiny_run.make_world(folder)


def changed(name: str, value: Any) -> str:
    """A flag with another value than this one."""
    others = {bool: lambda: not value, int: lambda: value + 1, float: lambda: value / 2, list: lambda: "[]"}
    return f"--{name}={OTHERS[name] if name in OTHERS else others.get(type(value), lambda: 'other')()}"


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES, ids=" ".join)
def test_what_is_named_changes_nothing_and_all_else_is_read(mode, world, tmp_path, monkeypatch):
    tiny_run.quick(monkeypatch)
    flags = [*world.args(tmp_path, "--logging.tracker=csv"), *mode]
    cfg, reads, plain = parse(flags), set(), object.__getattribute__
    idle = [name for name in EVERY if unread(cfg, [name])]

    def reading(group: Group, name: str) -> Any:
        code = sys._getframe(1).f_code
        if code.co_name != "model_post_init" and not code.co_filename.endswith("unread.py"):
            reads.add(f"{type(group).prefix}{name}")
        return plain(group, name)

    with monkeypatch.context() as patch:
        patch.setattr(Group, "__getattribute__", reading)
        one = gprune.prune(cfg)
    assert set(EVERY) <= reads.union(idle)
    values = {f"{part.prefix}{n}": getattr(part, n) for _, part in cfg if isinstance(part, Group) for n, _ in part}
    other = gprune.prune(parse([*flags, "--run.name=other", *(changed(name, values[name]) for name in idle)]))
    assert one.masks == other.masks
    assert [r["window_nll"] for r in one.records] == [r["window_nll"] for r in other.records]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--distill.rank=8", "--distill.rank (--distill.targets all)"),
        ("--gprune=false --sparsity.epochs=1 --partition.steps=3 --recovery=none --distill.kl=1 --ridge=1",
         "--partition.steps, --sparsity.epochs (--gprune false); --ridge, --distill.kl (--recovery none)"),
        ("--reliability.switch=false --reliability.metric=random --sparsity.offset_limit=1",
         "--sparsity.offset_limit (--sparsity.learn thresholds); --reliability.metric (--reliability.switch false)"),
        ("--recovery=[bias,distill] --ridge=1 --distill.tokens=8000", "--ridge (--recovery bias+distill)"),
        ("--sparsity.start=owl --sparsity.options.spread=0.1 --distill.targets=lora --distill.rank=8", ""),
        ("--logging.mode=disabled --logging.tags=[x]", "--logging.tags (--logging.mode disabled)"),
    ],
)  # fmt: skip
def test_the_log_says_which_flags_are_given_and_not_read(flags, said, tmp_path, monkeypatch, capsys):
    (tmp_path / "a.yaml").write_text("distill: {rank: 4}\nsparsity.epochs: 3\n")  # a protocol serves many runs
    monkeypatch.setattr("gprune.pipeline.dry_run.speed", lambda *_: 1e9)
    args = [f"--config={tmp_path / 'a.yaml'}", *flags.split(), "--model.name=tiny-random", "--dry_run=true"]
    assert tiny_run.main(args) == 0
    given = [line.partition("not read by this run: ")[2] for line in capsys.readouterr().out.splitlines()]
    assert [line for line in given if line] == ([said] if said else [])
