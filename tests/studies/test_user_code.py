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


def study(bench, capsys, path, *options: str, kinds=KINDS) -> str:
    """Run `gprune study` with the modules as in a new process, and return its output."""
    forget()
    flags = [f"--import=./mine_{kind}.py" for kind in kinds]
    with restored(*REGISTRIES):
        return bench(capsys, path, *options, *flags)


def test_rows_are_run_again_after_their_code_has_changed(bench, modules, capsys):
    rows = {kind: {"gprune": False} | settings for kind, (settings, *_) in KINDS.items()}
    path = bench.write("coded", rows | {"without code": {"gprune": False}}, common={"sparsity.target": 0.3})
    records = bench.folder / "coded records"
    options = ("--records", str(records))
    study(bench, capsys, path, *options)
    folder = records / "coded"
    first = {file.name: file.read_text() for file in folder.iterdir()}
    assert len(first) == 6
    assert "configurations" not in study(bench, capsys, path, *options)
    for kind in KINDS:
        edit(kind)
    for arguments in (["--table"], []):  # the records are named, and nothing runs
        out = study(bench, capsys, path, *options, *arguments)
        for kind in KINDS:
            why = f"was made by other code (the code of mine_{kind} has changed). It is not used; --again runs"
            assert f"Row '{kind}', seed 0: The record {folder}/{kind}-seed0.json {why}" in out
        assert "configurations" not in out
    assert {file.name: file.read_text() for file in folder.iterdir()} == first
    assert "5 configurations: " in study(bench, capsys, path, *options, "--again")
    changed = {file.name for file in folder.iterdir() if file.read_text() != first[file.name]}
    assert changed == {f"{kind}-seed0.json" for kind in KINDS}
    assert "other code" not in study(bench, capsys, path, *options, "--table")


def test_records_are_shown_and_marked_without_the_modules_that_made_them(bench, modules, capsys):
    rows = {kind: {"gprune": False} | settings for kind, (settings, *_) in KINDS.items()}
    path = bench.write("gone", rows, common={"sparsity.target": 0.3})
    records = bench.folder / "gone records"
    options = ("--records", str(records))
    shown = study(bench, capsys, path, *options)
    assert "Not checked" not in shown
    marked = study(bench, capsys, path, *options, "--table", kinds=[])
    unchecked = ", ".join(f"{kind} (seed 0)" for kind in KINDS)
    assert f"Not checked, because the code of the row or of its record is not known: {unchecked}." in marked
    for kind in KINDS:
        row_of_table = next(line for line in shown.splitlines() if line.startswith(f"| {kind}"))
        assert row_of_table in marked
    assert "Not checked" in study(bench, capsys, path, *options, kinds=[])  # nothing has to be run
    forget()
    with restored(*REGISTRIES):
        assert list(gprune.load_study(path, records=records).to_frame()["row"].unique()) == [*KINDS]
    forget()
    message = bench.refused(capsys, path, *options, "--", "--sparsity.target=0.4")
    assert message.startswith("gprune study: Row 'metric': Unknown importance metric 'my_metric'. Available: ")


def test_code_that_cannot_be_read_is_reported_in_one_line(bench, modules, monkeypatch, capsys):
    text = (modules / "mine_metric.py").read_text()
    monkeypatch.setitem(sys.modules, "mine_metric", module := type(sys)("mine_metric"))
    with restored(*REGISTRIES):
        exec(text, vars(module))  # there is no file
        flags = ("--importance=my_metric", "--gprune=false", "--export=none")
        assert tiny_run.main(bench.world.args(modules / "runs", *flags)) == 0
    line = "Cannot read the code of mine_metric, so changes of it are not noticed."
    assert capsys.readouterr().out.count(line) == 1
