"""Rows that use code of the user: results of other code are named and not used."""

from __future__ import annotations

import sys

import pytest

import gprune
from gprune import user_code
from gprune.corpora import CORPORA
from gprune.importance import IMPORTANCE
from gprune.recoveries import RECOVERY
from gprune.sparsity.allocation import ALLOCATION
from tests import tiny_run
from tests.world import restored

# Kind -> the settings of its row, the source of its module, and an edit of the source.
KINDS = {
    "metric": (
        {"importance": "my_metric"},
        """
        import gprune

        @gprune.metric("my_metric", activation_free=True)
        def my_metric(weights, moments, generator):
            return weights.output.norm(dim=0)
        """,
        (".norm(dim=0)", ".norm(dim=0).neg()"),
    ),
    "corpus": (
        {"corpora.evaluate": ["my_corpus"]},
        """
        import gprune

        @gprune.CORPORA.register("my_corpus")
        def my_corpus(split):
            return open("FILE").read().split("\\n\\n")[0 if split == "train" else 1 :: 3]
        """,
        ("else 1", "else 2"),
    ),
    "allocation": (
        {"sparsity.allocation": "my_allocation"},
        """
        from gprune.sparsity.allocation import allocation

        @allocation("my_allocation")
        def my_allocation(scores, statistics, blocks, budget):
            return dict(scores)
        """,
        ("return dict(scores)", "return {key: -s for key, s in scores.items()}"),
    ),
    "recovery": (
        {"recovery": "my_recovery"},
        """
        from gprune.recoveries import recovery

        @recovery("my_recovery")
        def my_recovery(weight, keep, moments, ridge):
            return weight[:, keep], None
        """,
        ("[:, keep],", "[:, keep] * 0.5,"),
    ),
    "stage": (
        {"gprune": True, "stages": "mine_stage"},
        """
        from gprune.stages.threshold_learning import ThresholdLearning

        class MyStage(ThresholdLearning):
            RATE = 1

            def on_fit_start(self):
                self.learning_rate = self.learning_rate * self.RATE

        learner = MyStage
        """,
        ("RATE = 1", "RATE = 500"),
    ),
}
REGISTRIES = (IMPORTANCE, CORPORA, ALLOCATION, RECOVERY)


@pytest.fixture
def modules(tmp_path, monkeypatch, bench):
    """Write the modules `mine_<kind>.py` into the working folder, and return the folder."""
    for kind, (_, source, _) in KINDS.items():
        text = "\n".join(line[8:] for line in source.splitlines())
        (tmp_path / f"mine_{kind}.py").write_text(text.replace("FILE", str(bench.world.corpora["delta"])))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path[:])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.setattr(user_code, "IMPORTED", [])
    yield tmp_path
    forget()


def forget() -> None:
    """Remove the imported modules of the user, as in a new process."""
    for name in [name for name in sys.modules if name.startswith("mine_")]:
        del sys.modules[name]


def edit(kind: str) -> None:
    file = f"mine_{kind}.py"
    old, new = KINDS[kind][2]
    with open(file) as opened:
        text = opened.read()
    assert old in text
    with open(file, "w") as opened:
        opened.write(text.replace(old, new))


def study(bench, path, *options: str, kinds=KINDS) -> str:
    """Run `gprune study` with the modules as in a new process, and return its output."""
    forget()
    with restored(*REGISTRIES):
        return bench(path, *options, *(f"--import=./mine_{kind}.py" for kind in kinds))


def test_records_of_changed_or_unknown_code_are_named_and_rows_run_again_only_on_request(bench, modules):
    rows = {kind: {"gprune": False} | settings for kind, (settings, *_) in KINDS.items()}
    path = bench.write("coded", rows | {"without code": {"gprune": False}}, common={"sparsity.target": 0.3})
    folder = bench.records / "coded"
    shown = study(bench, path)
    first = {file.name: file.read_text() for file in folder.iterdir()}
    assert len(first) == 6
    # Without the modules, records are printed and marked.
    unchecked = ", ".join(f"{kind} (seed 0)" for kind in KINDS)
    marked = study(bench, path, kinds=[])
    assert f"Not checked, because the code of the row or of its record is not known: {unchecked}." in marked
    assert {line for line in shown.splitlines() if line.startswith("| ")} <= {*marked.splitlines()}
    forget()
    with restored(*REGISTRIES):
        assert set(gprune.load_study(path, records=bench.records).to_frame()["row"]) == {*rows, "without code"}
        message = bench.refused(path, "--", "--sparsity.target=0.4")
    assert message.startswith("gprune study: Row 'metric': Unknown importance metric 'my_metric'. Available: ")
    # After the code has changed, records are named, and nothing runs.
    for kind in KINDS:
        edit(kind)
    out = study(bench, path)
    for kind in KINDS:
        why = f"was made by other code (the code of mine_{kind} has changed). It is not used; --again runs"
        assert f"Row '{kind}', seed 0: The record {folder}/{kind}-seed0.json {why}" in out
    assert not any(text in out for text in ("configurations", "Not checked"))
    assert {file.name: file.read_text() for file in folder.iterdir()} == first
    assert "5 configurations: " in study(bench, path, "--again")
    changed = {file.name for file in folder.iterdir() if file.read_text() != first[file.name]}
    assert changed == {f"{kind}-seed0.json" for kind in KINDS}
    assert not any(text in study(bench, path, "--table") for text in ("other code", "Not checked"))


def test_code_that_cannot_be_read_is_reported_in_one_line(bench, modules, monkeypatch, capsys):
    text = (modules / "mine_metric.py").read_text()
    monkeypatch.setitem(sys.modules, "mine_metric", module := type(sys)("mine_metric"))
    with restored(*REGISTRIES):
        exec(text, vars(module))  # there is no file
        flags = ("--importance=my_metric", "--gprune=false", "--export=none")
        assert tiny_run.main(bench.world.args(modules / "runs", *flags)) == 0
    line = "Cannot read the code of mine_metric, so changes of it are not noticed."
    assert capsys.readouterr().out.count(line) == 1
