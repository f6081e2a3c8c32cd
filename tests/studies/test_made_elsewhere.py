"""Model rows, `model: FOLDER`: a model that another tool has made is evaluated like gprune's own rows."""

from __future__ import annotations

import json
import re
import shutil
import sys

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedTokenizerFast,
)

import gprune
from gprune.__main__ import run as command
from gprune.benchmarks import measurement
from gprune.config import parse
from gprune.errors import UserError
from gprune.export.hf import save_pruned
from gprune.models.embedded import model_label
from gprune.models.loading import check_elsewhere, load_elsewhere
from gprune.models.surgery import slice_model
from gprune.studies import runner
from gprune.studies.archive import finished_record, record_to_run, row_to_run
from tests import tiny_run, wandb_files
from tests.studies.workbench import cells
from tests.world import make_tiny, some_masks

PLAIN = {"plain": {"gprune": False, "importance": "magnitude"}}


@pytest.fixture(scope="module")
def folders(bench, tmp_path_factory):
    """Return the folder for models made elsewhere."""
    return tmp_path_factory.mktemp("elsewhere")


@pytest.fixture(scope="module")
def exported(bench, folders):
    """Return the folder of the exported model of the row `plain`, and the run that made it."""
    flags = ("--gprune=false", "--importance=magnitude", "--export=hf", "--export.dtype=float32")
    result = bench.world.run(folders / "runs", *flags, name="plain")
    return result.path / "model", result


def copy_model(bench, folders, name, change=None, **config):
    """Copy the folder of the dense model.

    Args:
        change: function that changes the dictionary of weights in place.
        config: entries of config.json to replace.
    """
    folder = folders / name
    shutil.copytree(bench.world.model, folder, dirs_exist_ok=True)
    weights = load_file(folder / "model.safetensors")
    if change is not None:
        change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return folder


@pytest.fixture(scope="module")
def list_with_export(bench, exported):
    """Return a list with the row `plain` and its exported model as another row, and the output of its run."""
    rows = PLAIN | {"theirs": {"model": str(exported[0])}}
    path = bench.write("export as row", rows, compare=[["theirs", "plain"]])
    with pytest.MonkeyPatch.context() as patch:
        written = []
        patch.setattr(sys.stdout, "write", written.append)
        assert command("study", [str(path), "--records", str(bench.records)]) == 0
    return path, "".join(written)


def test_an_exported_model_as_a_row_has_the_numbers_of_the_row_that_made_it(bench, exported, list_with_export):
    _, run = exported
    path, out = list_with_export
    _, ((_, plain), (row, theirs)) = bench.done(path)
    of_plain = [r for r in plain["records"] if r["stage"] == "pruned"]
    of_export = [r for r in theirs["records"] if r["stage"] == "measured"]
    assert [r["corpus"] for r in of_export] == [r["corpus"] for r in of_plain]
    for expected, r in zip(of_plain, of_export, strict=True):
        for number in ("nll", "kl", "agreement"):
            assert r[number] == pytest.approx(expected[number], rel=1e-4, abs=1e-6)
        assert (r["seen"], r["content_hash"]) == (expected["seen"], expected["content_hash"])
    assert max(r["kl"] for r in of_export) > 0
    for number in ("parameters_before", "parameters_after", "sparsity_of_model"):
        assert theirs["summary"][number] == plain["summary"][number] == run.summary[number]
    assert "sparsity_of_scope" not in theirs["summary"]
    assert theirs["masks"] is None
    assert row.config.sparsity == type(row.config.sparsity)()  # settings of pruning have their defaults
    lines = [cells(line) for line in out.splitlines() if line.startswith("| ")]
    (ratio,) = [line for line in lines if line[0] == "theirs / plain"]
    assert ratio[2].startswith("1.000")
    (summary,) = [line for line in lines if line[0] == "theirs" and len(line) == 8]
    assert "" not in summary  # such as the gap
    assert "Another tokenizer" not in out


def test_frames_files_and_reports_accept_a_model_row(bench, list_with_export, nothing_runs, capsys, tmp_path):
    """Each reads the record of the model row `theirs`, whose model is that of the row `plain`."""
    path, _ = list_with_export
    study = gprune.load_study(path, records=bench.records)
    frame = study.to_frame()
    lines = frame[frame["stage"] != "dense"].set_index(["row", "number"])
    assert set(lines.loc["theirs", "stage"]) == {"measured"}
    assert set(lines.loc["theirs", "model.made_elsewhere"]) == {"model"}
    for number in ("unseen_kl", "gap", "unseen_over_dense"):
        ours, theirs = (lines.loc[(row, number), "value"].item() for row in ("plain", "theirs"))
        assert theirs == pytest.approx(ours, rel=1e-4)
    for suffix in (".csv", ".json", ".md", ".tex", ".html"):
        bench(capsys, path, "--table", "--output", tmp_path / f"t{suffix}")
        assert "theirs" in (tmp_path / f"t{suffix}").read_text()
    page = tmp_path / "r.html"
    assert command("report", [f"{path}:theirs", "--records", str(bench.records), "--html", str(page)]) == 0
    assert "model beside" in page.read_text()
    (row,) = [row for row in study.rows if row.name == "theirs"]
    assert record_to_run(finished_record(row)).final == "measured"


def save_gpt2(folder):
    """Save a tiny GPT-2 with another vocabulary than the dense model, and return the folder."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=90, n_positions=64, n_embd=16, n_layer=1, n_head=2, bos_token_id=1, eos_token_id=2)
    GPT2LMHeadModel(config).save_pretrained(folder)
    vocabulary = {word: i for i, word in enumerate(["<unk>", "<s>", "</s>", *tiny_run.WORDS[:80]])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)
    return folder


def test_a_model_with_another_tokenizer_has_perplexity_but_no_kl_gap_or_ratio(bench, folders, capsys):
    folder = save_gpt2(folders / "other")
    path = bench.write("tokens", PLAIN | {"gpt": {"model": str(folder)}})
    out = bench(capsys, path)
    _, (_, (_, record)) = bench.done(path)
    of_model = [r for r in record["records"] if r["stage"] == "measured"]
    assert [r["corpus"] for r in of_model] == [r["corpus"] for r in record["records"] if r["stage"] == "dense"]
    assert all(r["perplexity"] > 1 and r.get("kl") is None for r in of_model)
    assert "Another tokenizer, so no KL, agreement, gap or ratio, and a perplexity of other tokens: gpt." in out
    study = gprune.load_study(path, records=bench.records)
    assert "perplexity of other tokens: gpt." in study.report.to_html()
    frame = study.to_frame().query("stage != 'dense' and corpus == ''")
    of_row = frame.groupby("row")["number"].agg(set)
    assert of_row["plain"] >= {"unseen_kl", "unseen_agreement", "gap", "unseen_over_dense", "seen_over_dense", "seen"}
    assert {"seen", "unseen"} < of_row["gpt"]
    assert not [name for name in of_row["gpt"] if name == "gap" or "_over_dense" in name or name.startswith("unseen_")]


def test_a_model_type_that_gprune_cannot_prune_is_evaluated(bench, folders, capsys):
    """Mamba has neither attention nor an FFN."""
    torch.manual_seed(0)
    config = MambaConfig(vocab_size=128, hidden_size=16, state_size=4, num_hidden_layers=1)
    MambaForCausalLM(config).save_pretrained(folders / "mamba")
    tiny_run.tiny_tokenizer().save_pretrained(folders / "mamba")
    path = bench.write("unknown", {"mamba": {"model": str(folders / "mamba")}})
    bench(capsys, path)
    _, ((_, record),) = bench.done(path)
    assert all(r["kl"] > 0 for r in record["records"] if r["stage"] == "measured")


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
    theirs = str(save_gpt2(folders / "for tasks"))
    (row,) = bench.rows(bench.write("tasked", {"gpt": {"model": theirs}}, tasks={"names": ["piqa"]}))
    folder, record = runner.run_row(row, {})
    runner.measure_tasks(row, folder, record)
    assert evaluated == [(str(bench.world.model), "float32"), (theirs, "float32")]
    results = row_to_run(row, record, None).evaluation
    assert [(r["stage"], r["model"], r["run"]) for r in results] == [
        (stage, model_label(str(bench.world.model)), "gpt") for stage in ("dense", "measured")
    ]


@pytest.mark.slow
def test_a_model_row_is_logged_as_a_wandb_run(bench, exported):
    path = bench.write("logged", {"theirs": {"model": str(exported[0])}}, common={"corpora.batch_size": 2})
    arguments = [str(path), "--records", str(bench.records), "--", "--logging.mode=offline"]
    assert command("study", arguments) == 0
    wandb_runs = {}  # by the first word of the run id, which is part of the name of the folder
    for file in wandb_files.find(bench.records / "logged"):
        wandb_runs[file.parent.name.split("-")[3].partition("_")[0]] = wandb_files.read(file)
    assert wandb_runs.keys() == {"theirs"}
    theirs = wandb_runs["theirs"]
    assert theirs.about["job_type"] == "model"
    assert {"logged", "theirs", "made elsewhere"} <= set(theirs.about["tags"])
    assert theirs.summary["final/unseen_kl"] > 0
    assert theirs.config["model"]["made_elsewhere"] == str(exported[0])


# --- models and settings that are refused before any row runs ------------------------------------------------------


LAYER = "model.layers.1."


def remove_weights(*names):
    """Return a function that removes weights of a layer."""

    def change(weights):
        for name in names:
            del weights[LAYER + name]

    return change


def remove_one_input(weights):
    weights[LAYER + "mlp.down_proj.weight"] = weights[LAYER + "mlp.down_proj.weight"][:, 1:].contiguous()


def add_bias(weights):
    weights[LAYER + "mlp.down_proj.bias"] = torch.ones(32)


@pytest.mark.parametrize(
    ("change", "config", "message"),
    [
        (remove_weights("mlp.up_proj.weight", "mlp.down_proj.weight"), {},
         f"has no weights for 2 parameters, such as {LAYER}mlp.down_proj.weight"),
        (remove_one_input, {}, f"weights have other shapes than in config.json, such as {LAYER}mlp.down_proj.weight: "
         "(32, 159) instead of (32, 160)"),
        (add_bias, {}, f"have no place in the model of config.json, such as {LAYER}mlp.down_proj.bias"),
        (None, {"num_hidden_layers": 9}, "has no weights for"),
        (None, {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}}, "is quantised"),
        (None, {"model_type": "unheard_of"}, "unheard_of"),
    ],
)  # fmt: skip
def test_a_folder_with_an_unsupported_config_or_other_weights_than_in_its_config_is_refused(
    bench, folders, request, change, config, message, nothing_runs, capsys
):
    folder = copy_model(bench, folders, request.node.callspec.id, change, **config)
    path = bench.write("broken", {"first": {"gprune": False, "ridge": 0.9}, "broken": {"model": str(folder)}})
    line = bench.refused(capsys, path)
    assert "made elsewhere" in line
    assert message in line


CODE = """from transformers import LlamaConfig, LlamaForCausalLM

class Config(LlamaConfig):
    model_type = "own_code"

class Model(LlamaForCausalLM):
    config_class = Config
"""
AUTO = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}


def test_custom_code_of_a_model_needs_trust_remote_code_on_the_command_line(bench, folders, capsys):
    folder = copy_model(bench, folders, "code", model_type="own_code", auto_map=AUTO)
    (folder / "code.py").write_text(CODE)
    settings = {"model": str(folder)}
    path = bench.write("coded", {"coded": settings})
    message = bench.refused(capsys, path)
    assert "it has Python code of its own" in message
    assert "--model.trust_remote_code=true" in message
    in_list = bench.write("consent", {"coded": settings | {"model.trust_remote_code": True}})
    assert "--model.trust_remote_code=true must be given after --" in bench.refused(capsys, in_list)
    bench(capsys, path, "--", "--model.trust_remote_code=true")
    (row,) = bench.rows(path, flags=["--model.trust_remote_code=true"])
    assert max(r["kl"] for r in finished_record(row)["records"] if r["stage"] == "measured") < 1e-9


@pytest.mark.parametrize("weight_format", ["several files", "pickled"])
def test_sharded_and_pickled_weights_are_loaded(bench, folders, weight_format, capsys):
    folder = copy_model(bench, folders, weight_format)
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    if weight_format == "pickled":
        torch.save(weights, folder / "pytorch_model.bin")
    else:
        files = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
        file_of = {name: files[i % 2] for i, name in enumerate(sorted(weights))}
        for file in files:
            shard = {name: weight for name, weight in weights.items() if file_of[name] == file}
            save_file(shard, folder / file, metadata={"format": "pt"})
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": file_of}))
    path = bench.write(weight_format, {weight_format: {"model": str(folder)}})
    bench(capsys, path)
    _, ((_, record),) = bench.done(path)
    assert max(r["kl"] for r in record["records"] if r["stage"] == "measured") < 1e-9


def test_an_export_of_a_type_without_record_is_no_foreign_code(tmp_path, monkeypatch):
    dense = make_tiny("gemma3_text")
    pruned = slice_model(dense, some_masks(dense, attention=False))
    folder = str(save_pruned(pruned, tiny_run.tiny_tokenizer(), tmp_path / "model"))
    monkeypatch.delitem(CONFIG_MAPPING._extra_content, "pruned_gemma3_text")  # as in a process that did not export
    check_elsewhere(folder, trust_remote_code=False)
    loaded, _ = load_elsewhere(folder, trust_remote_code=False)
    ids = torch.arange(3, 20)[None]
    assert torch.equal(loaded(ids).logits, pruned(ids).logits)


def test_calibration_text_of_the_settings_counts_as_seen_for_a_model_made_elsewhere(bench, tmp_path):
    """The folder does not tell which text the other tool has used."""
    world, evaluate = bench.world, f"--corpora.evaluate={bench.world.names('alpha', 'beta', tiny_run.UNSEEN[0])}"
    theirs = gprune.measure(world.model, world.model, parse(world.args(tmp_path, evaluate)))
    ours = world.run(tmp_path, evaluate, "--sparsity.allocation=uniform", "--export=none", name="ours")
    seen = theirs[(theirs["stage"] == "measured") & (theirs["number"] == "perplexity")]["seen"].tolist()
    assert seen == [r["seen"] for r in ours.records if r["stage"] == "dense"] == [True, True, False]


# --- the function -------------------------------------------------------------------------------------------------


def test_measure_returns_the_numbers_of_a_list_row_and_ignores_settings_of_pruning(
    bench, exported, list_with_export, tmp_path
):
    cfg = parse(bench.world.args(tmp_path, "--ridge=0.5", "--sparsity.target=30%", "--recovery=distill"))
    frame = gprune.measure(exported[0], bench.world.model, cfg)
    assert cfg.settings()["sparsity"]["target"] == "30%"  # the caller's configuration is not changed
    assert not any(tmp_path.iterdir())
    of_list = gprune.load_study(list_with_export[0], records=bench.records).to_frame().query("row == 'theirs'")
    names = ["stage", "corpus", "seen", "number", "value", "low", "high", "windows"]
    of_text = [lines[lines["windows"].notna()][names].reset_index(drop=True) for lines in (frame, of_list)]
    pd.testing.assert_frame_equal(*of_text, rtol=1e-4)
    assert set(frame["stage"]) == {"dense", "measured"}
    assert set(frame["row"]) == {"model"}


def test_a_loaded_model_is_measured_as_it_is_and_not_changed(bench, exported, tmp_path):
    cfg = parse(bench.world.args(tmp_path))
    model = AutoModelForCausalLM.from_pretrained(exported[0], dtype=torch.float32).train()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    frames = (gprune.measure(model, bench.world.model, cfg), gprune.measure(exported[0], bench.world.model, cfg))
    pd.testing.assert_frame_equal(*(frame[frame["windows"].notna()].drop(columns="row") for frame in frames))
    assert model.training
    assert all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


@pytest.mark.parametrize(
    ("model", "flags", "message"),
    [
        (3, (), "A model must be a folder, a hub id or a loaded PreTrainedModel; got 3"),
        ("nowhere", (), "nowhere"),
        (None, ("--trainer.devices=2",), "needs one process"),
    ],
)
def test_measure_refuses_bad_arguments_in_one_line(bench, tmp_path, model, flags, message):
    with pytest.raises(UserError, match=re.escape(message)) as raised:
        gprune.measure(model or bench.world.model, bench.world.model, parse(bench.world.args(tmp_path, *flags)))
    assert "\n" not in str(raised.value)


def test_models_without_tokenizer_and_too_large_models_are_refused(bench, folders, nothing_runs, capsys, monkeypatch):
    no_tokenizer = copy_model(bench, folders, "incomplete")
    for file in no_tokenizer.glob("tokenizer*"):
        file.unlink()
    path = bench.write("incomplete", {"incomplete": {"model": str(no_tokenizer)}})
    assert "tokenizer" in bench.refused(capsys, path)
    monkeypatch.setattr("gprune.method.measure.device_memory", lambda device: 100_000)
    large = bench.write("large", {"large": {"model": str(bench.world.model)}}, common={"corpora.bos": "never"})
    assert "into memory" in bench.refused(capsys, large)


def test_the_key_model_can_be_a_path_or_a_group_of_settings(bench):
    """`model:` with settings is not a model made elsewhere.

    Settings of pruning, such as the metric, do not count for a model made elsewhere, even if they are invalid for it.
    """
    (with_settings,) = bench.rows(bench.write("group", {"x": {"model": {"dtype": "bfloat16"}}}))
    assert with_settings.config.model.dtype == "bfloat16"
    assert with_settings.made_elsewhere is None
    assert "made_elsewhere" not in with_settings.identity["model"]
    pruning = {"importance": "taylor", "gprune": True, "sparsity.allocation": "global"}
    rows = {"a": {"model": "there"}, "b": {"model": "there", "recovery": "none", **pruning}}
    with_path, with_pruning = bench.rows(bench.write("two ways", rows))
    assert with_path.identity == with_pruning.identity
    assert with_path.identity["model"]["made_elsewhere"] == "there"
    assert [with_path.masks, with_pruning.masks] == [False, False]
