"""LoRA on what runs left: equal text for all rows, weights that stay, records that resume, on tiny models."""

from __future__ import annotations

import json
import math
import shutil
import sys

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from gprune.corpora.windows import Windows
from gprune.evaluation.perplexity import perplexity
from gprune.models.blocks import blocks_of
from gprune.models.families import FAMILIES
from gprune.models.loading import fingerprint
from gprune.models.surgery import prune
from gprune.pipeline.inputs import prepare_text
from gprune.storage.files import read_json, write_json
from tests import tiny_run
from tests.conftest import make_tiny_llama
from tests.tiny_families import make_tiny, some_masks

pytest.importorskip("peft", reason="LoRA needs peft, which the extra `test` brings")
from experiments import finetune, lora


class Lab:
    """Finished runs, and the command with records of its own."""

    def __init__(self, world, runs, records, patch):
        self.world, self.runs, self.records, self.patch = world, runs, records, patch

    def flags(self, *more, on=("alpha", "beta"), tokens=640):
        corpora = [str(self.world.corpora[c]) for c in on]
        return [f"--tokens={tokens}", "--seq-len=32", "--learning-rate=1e-2", "--corpora", *corpora, *more]

    def main(self, *arguments):
        """Exit code; what is neither a flag nor a path is the name of a run."""
        found = [a if a.startswith("-") or "/" in a else str(self.runs / a) for a in arguments]
        self.patch.setattr(sys, "argv", ["finetune", *found])
        return finetune.main()

    def kept(self):
        """Records by row name."""
        return {r["name"]: r for r in map(read_json, sorted(self.records.glob("*.json")))}


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """`small` lost neurons, `unequal` neurons and KV groups; records of both and of the dense model."""
    world = tiny_run.make_world(tmp_path_factory.mktemp("world"))
    folder = tmp_path_factory.mktemp("finetune")
    with tiny_run.isolated(folder / "cache"), pytest.MonkeyPatch.context() as patch:
        tiny_run.quick(patch)
        patch.setattr(lora, "RECORDS", folder / "records")
        runs = folder / "runs"
        quick = ("--sparsity.allocation=uniform", "--evaluation.curve=[]")
        world.run(runs, *quick, name="small")
        base = (*quick, "--gprune=false", "--recovery=bias")
        world.run(runs, *base, "--sparsity.allocation=global", "--sparsity.scope=attention+ffn", name="unequal")
        world.run(runs, *base, "--export=none", name="unexported")
        world.run(runs, *base, "--evaluation.num_samples=3", name="more-text")
        made = Lab(world, runs, folder / "records", patch)
        made.batches = []
        step = lora.LoraTuning.training_step

        def watched(self, batch, batch_idx):
            made.batches[-1].append(batch["input_ids"])
            return step(self, batch, batch_idx)

        tune = lora.tune

        def counted(*arguments, **options):
            made.batches.append([])
            return tune(*arguments, **options)

        with pytest.MonkeyPatch.context() as watch:
            watch.setattr(lora.LoraTuning, "training_step", watched)
            watch.setattr(lora, "tune", counted)
            assert made.main("small", "unequal", "--dense", *made.flags()) == 0
        yield made


def test_all_rows_read_the_same_batches_in_the_same_order(lab):
    dense, small, unequal = lab.batches
    assert len(dense) == 5
    for batches in (small, unequal):
        assert all(torch.equal(a, b) for a, b in zip(dense, batches, strict=True))
    kept = lab.kept()
    assert {r["tokens"] for r in kept.values()} == {640}
    assert len({r["read"] for r in kept.values()}) == 1
    windows = torch.cat(dense)
    assert len(windows.unique(dim=0)) == len(windows) == 20  # one pass


def test_the_sample_is_train_text_and_not_that_of_calibration(lab):
    (row, *_) = finetune.rows_of(finetune.parser().parse_args([str(lab.runs / "small"), *lab.flags()]))
    _, tokenizer = lora.load(row)
    calibrated = prepare_text(row.config, tokenizer)
    windows = lora.training_text(row.settings, tokenizer)
    assert [(w.split, w.tokens.shape) for w in windows] == [("train", (10, 32))] * 2
    drawn = {tuple(ids) for w in windows for ids in w.tokens.tolist()}
    assert not drawn & {tuple(ids) for w in calibrated.used for ids in w.tokens.tolist()}
    assert drawn == {tuple(ids) for ids in torch.cat(lab.batches[0]).tolist()}


@pytest.mark.parametrize("name", ["dense", "small", "unequal"])
def test_before_is_what_the_run_recorded(lab, name):
    kept = lab.kept()[name]
    metrics = json.loads((lab.runs / ("small" if name == "dense" else name) / "metrics.json").read_text())
    stage = {"dense": ("dense", "none"), "small": ("gprune", "none"), "unequal": ("base", "bias")}[name]
    own = {r["corpus"]: r for r in metrics["records"] if (r["stage"], r["recovery"]) == stage}
    assert len(own) == len(kept["records"]) == 3
    for r in kept["records"]:
        assert r["perplexity_before"] == pytest.approx(own[r["corpus"]]["perplexity"], rel=1e-6)
        assert r["window_nll_before"] == pytest.approx(own[r["corpus"]]["window_nll"], abs=1e-3)
        assert r["content_hash"] == own[r["corpus"]]["content_hash"]
        assert r["perplexity_after"] == pytest.approx(math.exp(sum(r["window_nll_after"]) / r["tokens"]), rel=1e-4)


def test_the_table_is_about_text_that_no_row_has_seen_and_divides_window_by_window(lab, capsys):
    capsys.readouterr()
    assert lab.main("small", "unequal", "--dense", *lab.flags("--reference=small")) == 0
    out = capsys.readouterr().out
    cells = {
        (row := [c.strip() for c in line.strip("|").split("|")])[0]: row
        for line in out.splitlines()
        if line.startswith("| ")
    }
    assert list(cells)[1:] == ["dense", "small", "unequal"]
    kept, unseen = lab.kept(), [str(lab.world.corpora[c]) for c in tiny_run.UNSEEN]

    def mean(name, when):
        logs = [math.log(r[f"perplexity_{when}"]) for r in kept[name]["records"] if r["corpus"] in unseen]
        return math.exp(sum(logs) / 2)

    for column, when in ((1, "before"), (2, "after")):
        assert float(cells["unequal"][column].split()[0]) == pytest.approx(mean("unequal", when), abs=0.02)
        ratio = float(cells["unequal"][column + 3].split()[0])
        assert ratio == pytest.approx(mean("unequal", when) / mean("small", when), abs=1e-3)
        assert cells["small"][column + 3] == ""


def test_finished_rows_are_not_run_again_and_the_table_needs_no_runs(lab, capsys, monkeypatch):
    monkeypatch.setattr(lora, "run", lambda *a, **k: pytest.fail("it ran"))
    monkeypatch.setattr(lora, "load_model", lambda *a, **k: pytest.fail("it loaded a model"))
    capsys.readouterr()
    assert lab.main("small", "unequal", "--dense", *lab.flags()) == 0
    out = capsys.readouterr().out
    assert "rows:" not in out
    monkeypatch.setattr(finetune, "read_runs", lambda *a: pytest.fail("it read runs"))
    assert lab.main("--table") == 0
    assert capsys.readouterr().out.strip() == out.strip()
    assert lab.main("--table", "elsewhere/small", "--dense") == 0
    named = capsys.readouterr().out
    assert "| small" in named
    assert "| unequal" not in named


@pytest.mark.parametrize("flag", ["--rank=2", "--seed=1", "--tokens=704", "--dtype=bfloat16", "--learning-rate=1e-4"])
def test_other_settings_are_other_rows(lab, monkeypatch, flag):
    ran = []
    monkeypatch.setattr(lora, "run", lambda row, **_: ran.append(row) or pytest.skip("far enough"))
    with pytest.raises(pytest.skip.Exception):
        lab.main("small", *lab.flags(flag))
    assert ran[0].path not in set(lab.records.iterdir())


def test_lora_leaves_the_weights_untouched_and_registers_the_adapters_alone(lab):
    (row, *_) = finetune.rows_of(finetune.parser().parse_args([str(lab.runs / "unequal"), *lab.flags()]))
    model, tokenizer = lora.load(row)
    blocks = blocks_of(model)
    assert len({b.neurons for b in blocks}) > 1
    assert len({b.kv_groups for b in blocks}) > 1
    before, names = fingerprint(model), set(model.state_dict())
    windows = lora.training_text(row.settings, tokenizer)
    start = [perplexity(model, w).nll for w in windows]
    stage = lora.tune(model, windows, row.settings, accelerator="cpu")
    after = [perplexity(stage.lm, w).nll for w in windows]
    assert all(b < a for a, b in zip(start, after, strict=True))  # its own text
    assert all(name.startswith("adapters.") for name in stage.state_dict())
    assert {p.dtype for p in stage.adapters} == {torch.float32}
    again = stage.peft[0].unload()
    assert set(again.state_dict()) == names
    assert fingerprint(again) == before


def test_more_steps_on_the_same_text_lower_its_loss():
    tokens = torch.randint(3, 128, (4, 32), generator=torch.Generator().manual_seed(0)).repeat(30, 1)
    windows = [Windows("own", "train", tokens)]
    settings = lora.Settings(["own"], 3840, 32, 4, 4, 8.0, 2e-2, "float32", 0)
    stage = lora.tune(make_tiny_llama(), windows, settings, accelerator="cpu")
    assert len(stage.losses) == 30
    assert sum(stage.losses[-3:]) < 0.8 * sum(stage.losses[:3])


def test_the_same_seed_gives_the_same_bits():
    windows = [Windows("own", "train", torch.randint(3, 128, (8, 16), generator=torch.Generator().manual_seed(0)))]

    def losses(seed):
        settings = lora.Settings(["own"], 128, 16, 4, 4, 8.0, 1e-2, "float32", seed)
        stage = lora.tune(make_tiny_llama(), windows, settings, accelerator="cpu")
        return stage.losses, stage.read

    assert losses(0) == losses(0)
    assert losses(0)[1] != losses(1)[1]  # another order


@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_sit_on_every_linear_layer_of_every_family_and_learn_the_models_own_loss(family):
    model = make_tiny(family)
    model = prune(model, some_masks(model, attention=True))
    names = lora.linear_layers(model)
    layers = model.get_submodule(names[0].rpartition(FAMILIES[family].layers)[0] + FAMILIES[family].layers)
    everything = {m for m in layers.modules() if isinstance(m, nn.Linear | Conv1D)}
    assert {model.get_submodule(name) for name in names} == everything
    ids = torch.randint(3, 128, (3, 24), generator=torch.Generator().manual_seed(2))
    stage = lora.LoraTuning(model, rank=2, alpha=4.0, learning_rate=1e-2, steps=1)
    loss = stage.training_step({"input_ids": ids}, 0)
    loss.backward()
    mine = [p.grad.clone() for p in stage.adapters]
    assert any(float(g.abs().max()) > 0 for g in mine)
    for p in stage.adapters:
        p.grad = None
    own = stage.lm(input_ids=ids, labels=ids).loss
    own.backward()
    torch.testing.assert_close(loss, own, atol=1e-5, rtol=1e-5)
    for a, p in zip(mine, stage.adapters, strict=True):
        torch.testing.assert_close(a, p.grad, atol=1e-5, rtol=1e-3)


def test_the_table_knows_rows_by_the_names_that_tell_runs_apart(lab, tmp_path, capsys, monkeypatch):
    """Two folders of one name are `a-small` and `b-small`, as rows and for --table."""
    monkeypatch.setattr(lora, "RECORDS", tmp_path / "records")
    folders = [shutil.copytree(lab.runs / "small", tmp_path / where / "small") for where in "ab"]
    assert lab.main(*map(str, folders), *lab.flags(tokens=128)) == 0
    assert [r["name"] for r in map(read_json, sorted(lora.RECORDS.iterdir()))] == ["a-small", "b-small"]
    capsys.readouterr()
    assert lab.main("--table", *map(str, folders)) == 0
    out = capsys.readouterr().out
    assert "| a-small " in out
    assert "| b-small " in out


def test_two_records_for_one_row_of_a_table_are_named(lab, tmp_path, capsys, monkeypatch):
    """A model that was pruned again under the same name leaves a second record."""
    monkeypatch.setattr(lora, "RECORDS", tmp_path)
    (path,) = lab.records.glob("small-*.json")
    for name, weights in (("small-1.json", {"model.safetensors": "1"}), ("small-2.json", {"model.safetensors": "2"})):
        kept = read_json(path)
        kept["identity"]["weights"] = weights
        write_json(tmp_path / name, kept)
    assert lab.main("--table") == 2
    err = capsys.readouterr().err
    assert str(tmp_path / "small-1.json") in err
    assert str(tmp_path / "small-2.json") in err
    (tmp_path / "small-1.json").unlink()
    assert lab.main("--table") == 0


def test_tokens_that_went_astray_are_noticed_before_they_are_evaluated(lab, tmp_path, monkeypatch):
    monkeypatch.setattr(lora, "RECORDS", tmp_path)
    monkeypatch.setattr(lora, "tune", lambda *a, **k: None)
    with pytest.raises(AssertionError):
        lab.main("small", *lab.flags())


def test_speeds_are_measured_when_the_device_is_done(lab, monkeypatch):
    (row, *_) = finetune.rows_of(finetune.parser().parse_args([str(lab.runs / "small"), *lab.flags()]))
    waited = []
    monkeypatch.setattr(lora, "wait_for", waited.append)
    assert all(speed > 0 for speed in lora.speeds(row, accelerator="cpu"))
    assert len(waited) == 8  # before and after each of two, and of two that warm up
    monkeypatch.undo()
    monkeypatch.setattr(torch.accelerator, "synchronize", waited.append)
    lora.wait_for(torch.device("cuda"))
    lora.wait_for(torch.device("cpu"))
    assert waited[8:] == [torch.device("cuda")]


def test_text_that_lora_reads_counts_as_seen(lab, capsys):
    name, delta = "small", str(lab.world.corpora["delta"])
    assert lab.main(name, *lab.flags(on=("delta",))) == 0
    out = capsys.readouterr().out
    assert f"means over {lab.world.corpora['epsilon']} (" in out
    (path,) = [p for p in lab.records.glob("*.json") if read_json(p)["identity"]["finetuning"]["corpora"] == [delta]]
    records = {r["corpus"]: r for r in read_json(path)["records"]}
    assert records[delta]["seen"]
    assert not records[delta]["seen_by_run"]
    path.unlink()
    assert lab.main(name, *lab.flags(on=("delta", "epsilon"))) == 2
    assert "seen by one row or another" in capsys.readouterr().err
    for path in lab.records.glob("*.json"):
        if "beta" not in str(read_json(path)["identity"]["finetuning"]["corpora"]):
            path.unlink()


def test_bfloat16_stays_within_rounding_of_the_run(lab, tmp_path, monkeypatch):
    monkeypatch.setattr(lora, "RECORDS", tmp_path)
    assert lab.main("unequal", *lab.flags("--dtype=bfloat16", tokens=256)) == 0
    (kept,) = map(read_json, tmp_path.iterdir())
    assert {r["dtype"] for r in kept["records"]} == {"bfloat16"}
    for r in kept["records"]:
        assert r["perplexity_before"] != r["perplexity_of_run"]
        assert r["perplexity_before"] == pytest.approx(r["perplexity_of_run"], rel=0.02)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere"], "no folder"),
        (["unexported"], "--export hf"),
        (["small", "more-text"], "evaluated on different text"),
        (["small", "--reference=other"], "--reference"),
        (["small", "--tokens=10"], "--tokens"),
        (["small", "--tokens=-5"], "--tokens"),
        (["small", "--seq-len=1"], "--seq-len: expected 2 or more"),
        (["small", "--seed=-1"], "--seed: expected 0 or more"),
        (["small", "--seed=99999999999"], "--seed: expected 0 or more"),
        (["small", "--rank=0"], "--rank"),
        (["small", "--dtype=float16"], "--dtype"),
        (["small", "--corpora=/nothing/there.txt"], "no such file"),
        ([], "run folder"),
        (["small", "--what"], "--help"),
    ],
)
def test_refused_with_one_line(lab, capsys, monkeypatch, arguments, said):
    monkeypatch.setattr(lora, "run", lambda *a, **k: pytest.fail("it ran"))
    capsys.readouterr()
    names = [a for a in arguments if not a.startswith("-")]
    assert lab.main(*names, *lab.flags(), *arguments[len(names) :]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert said in err
    assert err.count("\n") == 1


def test_an_unfinished_run_is_refused(lab, tmp_path, capsys):
    folder = tmp_path / "half"
    shutil.copytree(lab.runs / "small", folder)
    write_json(folder / "metrics.json", {"records": []})
    assert lab.main(str(folder), *lab.flags()) == 2
    assert "not finished" in capsys.readouterr().err


def test_a_model_that_changed_since_its_run_is_refused(lab, tmp_path, capsys):
    folder = tmp_path / "changed"
    shutil.copytree(lab.runs / "small", folder)
    with (folder / "model" / "config.json").open("a") as file:
        file.write("\n")
    assert lab.main(str(folder), *lab.flags()) == 2
    assert "not what the run left" in capsys.readouterr().err


@pytest.mark.parametrize(("entry", "said"), [("content_hash", "other text"), ("nll", "recorded")])
def test_other_text_and_other_numbers_than_the_runs_are_refused(lab, tmp_path, capsys, entry, said):
    """Files may have changed since: the corpora's, or what computes."""
    folder = tmp_path / "other"
    shutil.copytree(lab.runs / "small", folder)
    metrics = json.loads((folder / "metrics.json").read_text())
    for r in metrics["records"]:
        r[entry] = "0" * 16 if entry == "content_hash" else r["nll"] + 0.01
    metrics.pop("checksum")
    write_json(folder / "metrics.json", metrics)
    assert lab.main(str(folder), *lab.flags()) == 2
    assert said in capsys.readouterr().err
    assert "other" not in lab.kept()


def test_rows_that_read_different_text_are_not_compared(lab):
    kept = list(lab.kept().values())
    changed = {**kept[-1], "read": "0" * 16}
    with pytest.raises(finetune.UserError, match="fine-tuned on different text"):
        finetune.table_of([*kept[:-1], changed], None)
