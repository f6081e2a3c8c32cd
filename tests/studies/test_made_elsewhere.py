"""Model rows, `model: FOLDER`: a model that another tool has made is evaluated like gprune's own rows."""

from __future__ import annotations

import json
import re
import shutil

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, MambaConfig, MambaForCausalLM

import gprune
from gprune.__main__ import run as command
from gprune.benchmarks import measurement
from gprune.config import parse
from gprune.errors import UserError
from gprune.export.hf import save_pruned
from gprune.models.embedded import model_label
from gprune.models.loading import check_elsewhere, load_elsewhere
from gprune.models.surgery import slice_model
from gprune.studies import archive, runner
from tests import tiny_run, wandb_files
from tests.world import make_tiny, some_masks

NUMBERS = ["stage", "corpus", "seen", "number", "value", "low", "high", "windows"]


@pytest.fixture(scope="module")
def folders(bench, tmp_path_factory):
    """Return the folder for models made elsewhere."""
    return tmp_path_factory.mktemp("elsewhere")


@pytest.fixture(scope="module")
def exported(bench, folders):
    """Return the folder of the exported model of a run of the base metric."""
    flags = ("--gprune=false", "--importance=magnitude", "--export=hf", "--export.dtype=float32")
    return bench.world.run(folders / "runs", *flags, name="plain").path / "model"


def copy_model(bench, folder, change=None, **config):
    """Copy the folder of the dense model.

    Args:
        change: function that changes the dictionary of weights in place.
        config: entries of config.json to replace.
    """
    shutil.copytree(bench.world.model, folder, dirs_exist_ok=True)
    weights = load_file(folder / "model.safetensors")
    if change is not None:
        change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return folder


def save_with_other_tokenizer(bench, folder):
    """Save the dense model with a tokenizer that has other ids of words, and return the folder."""
    path = copy_model(bench, folder) / "tokenizer.json"
    content = json.loads(path.read_text())
    words = [*content["model"]["vocab"]]
    content["model"]["vocab"] = {word: i for i, word in enumerate([*words[:4], *reversed(words[4:])])}
    path.write_text(json.dumps(content))
    return folder


def save_mamba(folder):
    """Save a tiny Mamba, which has neither attention nor an FFN, and return the folder."""
    torch.manual_seed(0)
    MambaForCausalLM(MambaConfig(vocab_size=128, hidden_size=16, state_size=4, num_hidden_layers=1)).save_pretrained(
        folder
    )
    tiny_run.tiny_tokenizer().save_pretrained(folder)
    return folder


def save_dense(bench, folder, *, pickled):
    """Save the dense model with its weights in a pickled file or in several safetensors files."""
    copy_model(bench, folder)
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    if pickled:
        torch.save(weights, folder / "pytorch_model.bin")
    else:
        AutoModelForCausalLM.from_pretrained(bench.world.model).save_pretrained(folder, max_shard_size="100KB")
        assert len([*folder.glob("*.safetensors")]) > 1
    return folder


@pytest.fixture(scope="module")
def finished(bench, folders, exported):
    """Return a list of gprune's row `plain` and of models made elsewhere, and the output of its run."""
    rows = {
        "theirs": exported,
        "other": save_with_other_tokenizer(bench, folders / "other"),
        "mamba": save_mamba(folders / "mamba"),
        "several files": save_dense(bench, folders / "several files", pickled=False),
        "pickled": save_dense(bench, folders / "pickled", pickled=True),
    }
    rows = {name: {"model": str(folder)} for name, folder in rows.items()}
    plain = {"plain": {"gprune": False, "importance": "magnitude"}}
    path = bench.write("elsewhere", plain | rows, compare=[["theirs", "plain"]])
    return path, bench(path)


@pytest.fixture(scope="module")
def frame(bench, finished):
    """Return the frame of the finished list, without the dense model."""
    frame = gprune.load_study(finished[0], records=bench.records).to_frame()
    return frame[frame["stage"] != "dense"]


def test_an_exported_model_as_a_row_has_the_numbers_of_the_row_that_made_it(bench, finished, frame, nothing_runs):
    path, out = finished
    lines = frame[frame["windows"].notna() | (frame["number"] == "parameters")].sort_values(["corpus", "number"])
    theirs, plain = (lines[lines["row"] == row] for row in ("theirs", "plain"))
    pd.testing.assert_frame_equal(*(of[NUMBERS[1:]].reset_index(drop=True) for of in (theirs, plain)), rtol=1e-4)
    assert theirs.query("number == 'unseen_kl'")["value"].item() > 0
    assert set(theirs["stage"]) == {"measured"}
    assert set(theirs["model.made_elsewhere"]) == {"model"}
    assert "sparsity_of_scope" not in set(frame[frame["row"] == "theirs"]["number"])
    assert re.search(r"\| theirs / plain +\| +1 +\| 1\.000 ", out)
    page = bench.folder / "r.html"
    assert command("report", [f"{path}:theirs", "--records", str(bench.records), "--html", str(page)]) == 0
    assert "model beside" in page.read_text()


def test_a_model_with_another_tokenizer_has_perplexity_but_no_kl_gap_or_ratio(finished, frame):
    assert (
        "Another tokenizer, so no KL, agreement, gap or ratio, and a perplexity of other tokens: other." in finished[1]
    )
    numbers = frame[frame["windows"].notna()].groupby("row")["number"].agg(set)
    assert numbers["other"] == {"perplexity", "seen", "unseen"}
    assert numbers["plain"] == numbers["mamba"] > {"unseen_kl", "unseen_agreement", "gap", "unseen_over_dense"}


def test_types_that_cannot_be_pruned_and_sharded_or_pickled_weights_are_measured(frame):
    kl = frame[frame["number"] == "unseen_kl"].set_index("row")["value"]
    assert kl["mamba"] > 1e-3
    assert kl["several files"] < 1e-9
    assert kl["pickled"] < 1e-9


def test_tasks_evaluate_the_dense_model_and_the_given_model(bench, folders, monkeypatch):
    evaluated = []

    def evaluate(model, benchmarks, **_):
        evaluated.append((model, benchmarks.dtype))
        record = {
            "kind": "zero_shot", "task": "piqa", "split": "test", "dtype": "float32", "note": "", "questions": 4,
            "standard_protocol": False, "content_hash": "c", "model": model, "stage": "measured",
            **dict.fromkeys(("acc", "acc_stderr", "acc_norm", "acc_norm_stderr"), 0.5),
        }  # fmt: skip
        return [record], None

    monkeypatch.setattr(measurement, "evaluate", evaluate)
    theirs = str(copy_model(bench, folders / "for tasks"))
    (row,) = bench.rows(bench.write("tasked", {"x": {"model": theirs}}, tasks={"names": ["piqa"]}))
    folder, record = runner.run_row(row, {})
    runner.measure_tasks(row, folder, record)
    assert evaluated == [(str(bench.world.model), "float32"), (theirs, "float32")]
    results = archive.row_to_run(row, record, None).evaluation
    assert [(r["stage"], r["model"], r["run"]) for r in results] == [
        (stage, model_label(str(bench.world.model)), "x") for stage in ("dense", "measured")
    ]


@pytest.mark.slow
def test_a_model_row_is_logged_as_a_wandb_run(bench, exported):
    path = bench.write("logged", {"theirs": {"model": str(exported)}}, common={"corpora.batch_size": 2})
    bench(path, "--", "--logging.mode=offline")
    (theirs,) = map(wandb_files.read, wandb_files.find(bench.records / "logged/"))
    assert theirs.about["job_type"] == "model"
    assert {"logged", "theirs", "made elsewhere"} <= set(theirs.about["tags"])
    assert theirs.summary["final/unseen_kl"] > 0
    assert theirs.config["model"]["made_elsewhere"] == str(exported)


# --- refusals before any row runs

LAYER = "model.layers.1."


def remove_weights(weights):
    for name in ("up_proj", "down_proj"):
        del weights[f"{LAYER}mlp.{name}.weight"]


def remove_one_input(weights):
    weights[f"{LAYER}mlp.down_proj.weight"] = weights[f"{LAYER}mlp.down_proj.weight"][:, 1:].contiguous()


def add_bias(weights):
    weights[f"{LAYER}mlp.down_proj.bias"] = torch.ones(32)


REFUSED = [  # change of the weights, entries of the config, a part of the message
    (remove_weights, {}, f"has no weights for 2 parameters, such as {LAYER}mlp.down_proj.weight"),
    (remove_one_input, {}, f"weights have other shapes than in config.json, such as {LAYER}mlp.down_proj.weight: "
     "(32, 159) instead of (32, 160)"),
    (add_bias, {}, f"have no place in the model of config.json, such as {LAYER}mlp.down_proj.bias"),
    (None, {"num_hidden_layers": 9}, "has no weights for"),
    (None, {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}}, "is quantised"),
    (None, {"model_type": "unheard_of"}, "unheard_of"),
]  # fmt: skip


def test_folders_that_cannot_be_measured_are_refused(bench, folders, nothing_runs, monkeypatch):
    def refused(folder, **common):
        rows = {"first": {"gprune": False, "ridge": 0.9}, "broken": {"model": str(folder)}}
        return bench.refused(bench.write("broken", rows, common=common))

    for number, (change, config, message) in enumerate(REFUSED):
        line = refused(copy_model(bench, folders / f"broken {number}", change, **config))
        assert "made elsewhere" in line
        assert message in line
    no_tokenizer = copy_model(bench, folders / "incomplete")
    for file in no_tokenizer.glob("tokenizer*"):
        file.unlink()
    assert "tokenizer" in refused(no_tokenizer)
    monkeypatch.setattr("gprune.method.measure.device_memory", lambda device: 100_000)
    assert "into memory" in refused(bench.world.model, **{"corpora.bos": "never"})


CODE = """from transformers import LlamaConfig, LlamaForCausalLM

class Config(LlamaConfig):
    model_type = "own_code"

class Model(LlamaForCausalLM):
    config_class = Config
"""
AUTO = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}


def test_custom_code_of_a_model_needs_trust_remote_code_on_the_command_line(bench, folders):
    folder = copy_model(bench, folders / "code", model_type="own_code", auto_map=AUTO)
    (folder / "code.py").write_text(CODE)
    path = bench.write("coded", {"coded": {"model": str(folder)}})
    message = bench.refused(path)
    assert "it has Python code of its own" in message
    assert "--model.trust_remote_code=true" in message
    bench(path, "--", "--model.trust_remote_code=true")
    (row,) = bench.rows(path, flags=["--model.trust_remote_code=true"])
    assert max(r["kl"] for r in archive.finished_record(row)["records"] if r["stage"] == "measured") < 1e-9


def test_an_export_of_a_type_without_record_is_no_foreign_code(tmp_path, monkeypatch):
    dense = make_tiny("gemma3_text")
    pruned = slice_model(dense, some_masks(dense, attention=False))
    folder = str(save_pruned(pruned, tiny_run.tiny_tokenizer(), tmp_path / "model"))
    monkeypatch.delitem(CONFIG_MAPPING._extra_content, "pruned_gemma3_text")  # as in a process that did not export
    check_elsewhere(folder, trust_remote_code=False)
    loaded, _ = load_elsewhere(folder, trust_remote_code=False)
    ids = torch.arange(3, 20)[None]
    assert torch.equal(loaded(ids).logits, pruned(ids).logits)


def test_the_key_model_can_be_a_path_or_a_group_of_settings(bench):
    """`model:` with settings is not a model made elsewhere.

    Settings of pruning, such as the metric, do not count for a model made elsewhere, even if they are invalid for it.
    """
    (with_settings,) = bench.rows(bench.write("group", {"x": {"model": {"dtype": "bfloat16"}}}))
    assert with_settings.config.model.dtype == "bfloat16"
    assert with_settings.made_elsewhere is None
    pruning = {"importance": "taylor", "gprune": True, "sparsity.allocation": "global", "recovery": "none"}
    rows = {"a": {}, "b": pruning, "c": {"corpora.seq_len": 17}}
    with_path, with_pruning, other_text = bench.rows(
        bench.write("two ways", {name: {"model": "there", **row} for name, row in rows.items()})
    )
    assert with_path.identity == with_pruning.identity
    assert with_path.identity["model"]["made_elsewhere"] == "there"
    assert archive.changed_flags(other_text.identity, with_path.identity) == {"corpora.seq_len": (17, 32)}
    assert [with_path.masks, with_pruning.masks] == [False, False]


# --- the function


def test_measure_returns_the_numbers_of_a_list_row_and_ignores_settings_of_pruning(bench, exported, frame, tmp_path):
    cfg = parse(bench.world.args(tmp_path, "--ridge=0.5", "--sparsity.target=30%", "--recovery=distill"))
    measured = gprune.measure(exported, bench.world.model, cfg)
    assert cfg.settings()["sparsity"]["target"] == "30%"  # the caller's configuration is not changed
    assert not any(tmp_path.iterdir())
    assert set(measured["row"]) == {"model"}
    of_model, of_list = measured.query("stage == 'measured'"), frame.query("row == 'theirs'")
    of_text = [lines[lines["windows"].notna()][NUMBERS].reset_index(drop=True) for lines in (of_model, of_list)]
    pd.testing.assert_frame_equal(*of_text, rtol=1e-4)
    # A loaded model has the same numbers, and is not changed.
    model = AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32).train()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    loaded = gprune.measure(model, bench.world.model, cfg)
    pd.testing.assert_frame_equal(*(lines[lines["windows"].notna()][NUMBERS] for lines in (measured, loaded)))
    assert model.training
    assert all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


def test_calibration_text_of_the_settings_counts_as_seen_for_a_model_made_elsewhere(bench, tmp_path):
    """The folder does not tell which text the other tool has used."""
    world, evaluate = bench.world, f"--corpora.evaluate={bench.world.names('alpha', 'beta', tiny_run.UNSEEN[0])}"
    theirs = gprune.measure(world.model, world.model, parse(world.args(tmp_path, evaluate)))
    seen = theirs[(theirs["stage"] == "measured") & (theirs["number"] == "perplexity")].set_index("corpus")["seen"]
    assert seen.to_dict() == {"alpha.txt": True, "beta.txt": True, "delta.txt": False}


def test_measure_refuses_bad_arguments_in_one_line(bench, tmp_path):
    dense = bench.world.model
    for model, flags, message in (
        (3, (), "A model must be a folder, a hub id or a loaded PreTrainedModel; got 3"),
        ("nowhere", (), "nowhere"),
        (dense, ("--trainer.devices=2",), "needs one process"),
    ):
        with pytest.raises(UserError, match=re.escape(message)) as raised:
            gprune.measure(model, dense, parse(bench.world.args(tmp_path, *flags)))
        assert "\n" not in str(raised.value)
