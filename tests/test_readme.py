"""README, --help and the tree tell the same story."""

from __future__ import annotations

import re
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest
import torch
from gprune.recovery.projection import RECOVERY, recover_projection
from transformers import AutoModelForCausalLM

import gprune
from gprune.benchmarks.command import parser as evaluation_parser
from gprune.calibration.statistics import Moments
from gprune.export.command import parser as export_parser
from gprune.export.hf import save_pruned
from gprune.importance.weights import UnitWeights
from gprune.models.families import FAMILIES
from gprune.models.loading import load_model
from gprune.models.surgery import prune
from gprune.report.command import parser as report_parser
from gprune.sparsity.gates import masked
from gprune.studies.command import parser as lists_parser
from tests import tiny_run
from tests.tiny_families import make_tiny, some_masks

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.fixture
def world(tmp_path, monkeypatch):
    """A tiny model and tiny corpora, and a run whose export is checked in this process."""
    tiny_run.quick(monkeypatch)
    (tmp_path / "world").mkdir()
    with tiny_run.isolated(tmp_path / "cache"):
        yield tiny_run.make_world(tmp_path / "world")


def python_block(word: str) -> str:
    """The Python block of the README that contains `word`."""
    (block,) = [b for b in re.findall(r"^```python\n(.*?)^```", README, re.M | re.S) if word in b]
    return block


def all_flags(config: object, prefix: str = "--") -> set[str]:
    names = set()
    for field in fields(config):
        value = getattr(config, field.name)
        if is_dataclass(value):
            names |= all_flags(value, f"{prefix}{field.name}.")
        else:
            names.add(prefix + field.name)
    return names


def test_flags_named_in_the_readme_exist():
    known = all_flags(gprune.RunConfig()) | {"--config", "--print_config", "--help"}
    named = {f.rstrip(".") for f in re.findall(r"--[a-z_]+(?:\.[a-z_]+)?", README)}
    assert len(named) > 15
    parsers = (export_parser(), evaluation_parser(), report_parser(), lists_parser())
    verbs = {flag for made in parsers for action in made._actions for flag in action.option_strings}
    assert named <= known | verbs, named - known - verbs


def test_the_tree_in_the_readme_is_the_tree():
    (tree,) = re.findall(r"^train\.py  .*?(?=^```)", README, re.M | re.S)
    named = set(re.findall(r"\b[a-z_]+\.py\b", tree))
    there = {p.name for p in (ROOT / "gprune").glob("*.py")} - {"__init__.py", "errors.py", "registry.py"}
    assert there <= named, there - named
    missing = [n for n in named - {"train.py", "evidence.py"} if not list((ROOT / "gprune").rglob(n))]
    assert not missing


def test_the_recipe_for_a_metric_registers_and_scores(monkeypatch):
    monkeypatch.setattr(gprune.IMPORTANCE, "_entries", dict(gprune.IMPORTANCE._entries))
    exec(python_block("@gprune.metric"), {"__name__": "readme"})
    ones = torch.ones(3, dtype=torch.float64)
    scores = gprune.IMPORTANCE["down_norm"](
        UnitWeights((), torch.tensor([[3.0, 0, 1], [4.0, 0, 0]])), Moments(ones[0], ones, ones, ones), torch.Generator()
    )
    assert scores.tolist() == [5.0, 0.0, 1.0]
    assert gprune.IMPORTANCE["down_norm"].activation_free
    assert gprune.RunConfig(importance="down_norm").importance == "down_norm"


def test_the_recipe_for_a_metric_runs_through_the_command_line(world, tmp_path, monkeypatch):
    monkeypatch.setattr(gprune.IMPORTANCE, "_entries", dict(gprune.IMPORTANCE._entries))
    exec(python_block("@gprune.metric"), {"__name__": "readme"})
    run = world.run(tmp_path, "--importance=down_norm", "--gprune=false")
    assert run.config.importance == "down_norm"
    for layer, mask in zip(load_model(str(world.model))[0].model.layers, run.masks.ffn, strict=True):
        norms = layer.mlp.down_proj.weight.double().square().sum(0).sqrt()  # one per neuron
        kept = torch.zeros(tiny_run.NEURONS, dtype=torch.bool)
        kept[norms.argsort(descending=True)[: tiny_run.NEURONS // 2]] = True
        assert torch.equal(mask, kept)


def test_the_recipe_for_a_corpus_registers_and_reads(tmp_path, monkeypatch):
    monkeypatch.setattr(gprune.CORPORA, "_entries", dict(gprune.CORPORA._entries))
    monkeypatch.chdir(tmp_path)
    for split in ("train", "test"):
        (tmp_path / f"poems.{split}.txt").write_text("\n\n".join(f"{split} poem {i}" for i in range(20)))
    exec(python_block("@gprune.CORPORA"), {"__name__": "readme"})
    train, development = (gprune.corpora.load.load_corpus("poems", split) for split in ("train", "development"))
    assert len(train) == 18
    assert len(development) == 2
    assert not set(train) & set(development)


def test_the_recipe_for_a_recovery_registers_and_recovers(monkeypatch):
    monkeypatch.setattr(RECOVERY, "_entries", dict(RECOVERY._entries))
    exec(python_block("RECOVERY.register"), {"__name__": "readme"})
    assert gprune.RunConfig(recovery="rescale").recovery == "rescale"
    four = torch.full((4,), 4.0, dtype=torch.float64)
    moments = Moments(four[0], four, four, four)
    weight, bias = recover_projection(
        torch.ones(2, 4), torch.tensor([True, False, False, False]), moments, method="rescale"
    )
    assert weight.tolist() == [[2.0], [2.0]]  # a quarter of the energy is kept
    assert bias is None


def test_the_recipe_for_a_family_prunes_and_reloads(tmp_path, monkeypatch):
    for family in ("smollm3", "starcoder2"):
        monkeypatch.setitem(FAMILIES, family, None)  # taken out again afterwards
    exec(python_block("FAMILIES[record.model_type]"), {"__name__": "readme"})
    ids = torch.arange(3, 35).view(2, 16)
    for family in ("smollm3", "starcoder2"):
        model = make_tiny(family)
        masks = some_masks(model, attention=True)
        pruned = prune(model, masks)
        with masked(model, masks):
            torch.testing.assert_close(pruned(ids).logits, model(ids).logits, atol=1e-4, rtol=0)
        again = AutoModelForCausalLM.from_pretrained(save_pruned(pruned, None, tmp_path / family))
        assert torch.equal(again(ids).logits, pruned(ids).logits)


@pytest.mark.parametrize("number", [1, 2])
def test_quick_start_commands_are_one_line_each(number):
    (quick,) = [part for part in re.split(r"^## ", README, flags=re.M) if part.startswith("Quick start")]
    blocks = re.findall(r"^```bash\n(.*?)^```", quick, re.M | re.S)
    assert len(blocks) == 2
    assert len(blocks[number - 1].strip().splitlines()) == 1
