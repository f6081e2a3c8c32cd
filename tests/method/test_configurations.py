"""What holds for every run: the tiny configurations of `experiments.same_bits`, each of which is run once."""

from __future__ import annotations

import functools
import hashlib
import json
import os
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, PreTrainedModel

import gprune
from experiments.same_bits.configurations import configurations
from gprune.method.plan import make_plan
from gprune.method.run import open_run
from gprune.models.masks import masked
from gprune.runs.numbers import keyed
from gprune.studies.archive import fold_records, unfold_records
from gprune.units.structure import of_kind
from tests import tiny_run

CONFIGURATIONS = configurations(real=False)
CONFIGURATIONS |= {  # what the compared configurations do not reach
    "layers": [*CONFIGURATIONS["default"], "--sparsity.scope=ffn+blocks", "--sparsity.block_share=0.8"],
    "reconstruction_of_modules": [*CONFIGURATIONS["default"], "--sparsity.allocation=reconstruction"],
}
FIELDS = {
    "stage", "importance", "allocation", "recovery", "sparsity", "scope", "corpus", "split", "seen", "perplexity",
    "nll", "tokens", "seq_len", "stride", "bos", "join", "seed", "dtype", "precision", "float32_matmul_precision",
    "content_hash", "corpora",
}  # fmt: skip

pytestmark = pytest.mark.parametrize("name", CONFIGURATIONS)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Return the folder of the runs, each of which begins when a test asks for its result.

    Generating takes a nanosecond per parameter, so that targets in speed do not depend on the machine.
    """
    folder = tmp_path_factory.mktemp("configurations")
    with tiny_run.isolated(folder / "cache"), pytest.MonkeyPatch.context() as patch:
        seconds = lambda models: [1e-9 * model.num_parameters() for model in models]  # noqa: E731
        patch.setattr("gprune.evaluation.speed.time_generation", seconds)
        yield folder


@functools.cache
def result_of(folder: Path, name: str) -> gprune.PruningResult:
    assert tiny_run.main(flags_of(folder, name)) == 0
    return gprune.load_run(folder / name)


def flags_of(folder: Path, name: str) -> list[str]:
    return [*CONFIGURATIONS[name], "--evaluation.prompts=[]", f"--run.dir={folder}", f"--run.name={name}"]


@pytest.fixture
def result(finished, name):
    return result_of(finished, name)


@functools.cache
def dense_of(dtype: str) -> PreTrainedModel:
    model, _ = gprune.models.loading.load_model("tiny-random", dtype=dtype)
    return model


@contextmanager
def counted_forwards():
    """Yield a list that receives the number of tokens of each forward pass of any language model."""
    tokens = []

    def hook(module, args, kwargs, output):
        if isinstance(module, PreTrainedModel) and "input_ids" in kwargs:
            tokens.append(kwargs["input_ids"].numel())

    handle = torch.nn.modules.module.register_module_forward_hook(hook, with_kwargs=True)
    try:
        yield tokens
    finally:
        handle.remove()


def digests(folder: Path) -> dict[str, str]:
    """Return {relative path: SHA-256} of the files of a run."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def step_of(result) -> int:
    """Return the cost of the most expensive units that are removed together."""
    layers = len(result.masks.ffn) if result.config.sparsity.uniform_width else 1
    return layers * make_plan(result.config).budget.largest_step


def manifest_of(result) -> dict:
    return json.loads((result.path / "manifest.json").read_text())


def test_the_target_is_reached_and_exceeded_by_less_than_a_step(result):
    budget = make_plan(result.config).budget
    removed = budget.removed_by(result.masks)
    assert removed > 0
    share_of_parameters = budget.parameters_removed_by(result.masks) / budget.total_parameters
    assert result.summary["sparsity_of_scope"] == pytest.approx(share_of_parameters)
    if result.config.searches_quality:
        numbers = result.summary["quality"]["numbers"]
        assert numbers["development"][0] <= numbers["asked"]
        return
    assert 0 <= removed - budget.target < step_of(result)


def test_the_model_has_lost_the_parameters_that_the_masks_remove(result):
    """The recovery `bias` adds biases to projections that have lost inputs, and to no others."""
    budget, dense = make_plan(result.config).budget, dense_of(result.config.model.dtype)
    before, after = (sum(p.numel() for p in model.parameters()) for model in (dense, result.model))
    added, kept = 0, [b for b, is_kept in enumerate(result.masks.blocks) if is_kept]
    for layer, b in zip(result.model.model.layers, kept, strict=True):
        for projection, mask in (
            (layer.mlp.down_proj, result.masks.ffn[b]), (layer.self_attn.o_proj, result.masks.attention[b]),
        ):  # fmt: skip
            assert (projection.bias is None) == (mask.all() or "bias" not in result.config.recovery)
            added += 0 if projection.bias is None else projection.bias.numel()
    assert before - after + added == budget.parameters_removed_by(result.masks)
    assert (result.summary["parameters_before"], result.summary["parameters_after"]) == (before, after)
    assert (added > 0) == ("bias" in result.config.recovery)


def test_only_units_in_scope_are_removed_in_whole_steps(result):
    cfg, masks = result.config, result.masks
    multiple = make_plan(cfg).budget.width_multiple
    for b, (neurons, groups, is_kept) in enumerate(zip(masks.ffn, masks.attention, masks.blocks, strict=True)):
        assert is_kept or "blocks" in cfg.sparsity.scope
        if is_kept:
            assert neurons.all() or (neurons.any() and int(neurons.sum()) % multiple == 0)
            assert groups.all() if not cfg.attention else groups.any()
        if b in {layer % len(masks.ffn) for layer in cfg.sparsity.protect}:
            assert torch.cat([neurons, groups]).all()
    if cfg.sparsity.uniform_width:
        assert len({int(mask.sum()) for mask in masks.ffn}) == 1


def test_modules_partition_the_neurons_and_thresholds_are_finite(result):
    """Thresholds are not those of modules that lose everything, because a point of a curve may keep their layer."""
    if not result.config.gprune:
        assert result.modules is None is result.thresholds
        return
    for labels, mask in zip(result.modules.labels, result.masks.ffn, strict=True):
        sizes = labels.bincount()
        assert len(labels) == len(mask) == int(sizes.sum())
        assert sizes.min() > 0
    if result.config.learns:
        smallest = min(int(labels.bincount().min()) for labels in result.modules.labels)
        largest = torch.logit(torch.tensor(1 - 0.25 / smallest))
        assert all(thresholds.abs().max() <= largest for thresholds in of_kind(result.thresholds, "neurons"))


def test_the_numbers_are_those_of_the_dense_and_of_the_exported_model(result):
    """Recomputed from logits, so the dense model was the published one whenever it was measured or compared with."""
    dense, dtype = dense_of(result.config.model.dtype), result.config.model.dtype
    with open_run(result.config) as run:
        text = {windows.corpus: windows.tokens for windows in run.text.test}
    final = result.records[-1]["stage"]
    for record in result.records:
        if record["stage"] not in ("dense", final):
            continue
        ids = text[record["corpus"]]
        with torch.no_grad():
            logs = [m(input_ids=ids).logits[:, :-1].double().log_softmax(-1) for m in (dense, result.model)]
        own = logs[record["stage"] == final]
        tolerance = 1e-4 if dtype == "float32" else 0.02
        nll = -own.gather(-1, ids[:, 1:, None])[..., 0].sum(1)
        assert record["window_nll"] == pytest.approx(nll.tolist(), rel=tolerance)
        assert ("kl" in record) == (record["stage"] != "dense")
        if "kl" in record:
            kl = (logs[0].exp() * (logs[0] - own)).sum((1, 2))
            assert record["window_kl"] == pytest.approx(kl.tolist(), rel=10 * tolerance, abs=1e-4)


def test_there_is_a_record_for_each_stage_and_corpus_with_all_fields(result):
    cfg, records, budget = result.config, result.records, make_plan(result.config).budget
    removed = budget.removed_by(result.masks)
    stages = [("dense", "none")]
    stages += [("pruned", "none")] if cfg.measures_pruned or cfg.recovery == "none" else []
    stages += [("recovered", cfg.recovery)] if cfg.recovery != "none" else []
    corpora = cfg.corpora.evaluate
    assert [(r["stage"], r["recovery"], r["corpus"]) for r in records] == [(*s, c) for s in stages for c in corpora]
    for r in records:
        assert set(r) >= FIELDS
        assert r["tokens"] == sum(63 for _ in r["window_nll"])  # of windows of 64 tokens
        assert r["nll"] == pytest.approx(sum(r["window_nll"]) / r["tokens"])
        assert r["perplexity"] == pytest.approx(torch.tensor(r["nll"]).double().exp().item(), rel=1e-6)
        assert (
            r["sparsity"] == 0
            if r["stage"] == "dense"
            else 0 <= removed - r["sparsity"] * budget.total < step_of(result)
        )
        assert r["seen"] == (r["corpus"] != "python_help")
        assert (r["split"], r["dtype"], r["precision"]) == ("test", cfg.model.dtype, "32-true")


def test_a_dry_run_bounds_the_tokens_of_the_run(result):
    plan, used = make_plan(result.config), result.summary
    assert 0 < used["forward_tokens"] <= plan.forward_tokens
    if result.config.searches_quality:
        assert used["forward_backward_tokens"] <= plan.forward_backward_tokens
        return
    calibration = plan.calibration_tokens if "saliency" in result.config.needs else 0  # may be in the cache
    assert plan.forward_backward_tokens - calibration <= used["forward_backward_tokens"] <= plan.forward_backward_tokens
    steps = manifest_of(result)["steps"].values()
    for kind in ("forward_tokens", "forward_backward_tokens"):
        assert used[kind] == sum(step[kind] for step in steps)


def test_the_folder_loads_in_transformers_with_the_logits_of_the_run(result, token_batch):
    """Without code of its own exactly if all blocks have the same shapes; the model card tells how to load it."""
    folder = result.path / "model"
    config = json.loads((folder / "config.json").read_text())
    has_code = "auto_map" in config
    assert (folder / "README.md").read_text().count("trust_remote_code=True") == 2 * has_code
    assert bool(list(folder.glob("*.py"))) == has_code
    shapes = {tuple(p.shape for p in layer.parameters()) for layer in result.model.model.layers}
    assert has_code == (len(shapes) > 1 or config["model_type"] != "llama")
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", trust_remote_code=has_code)
    with torch.inference_mode():
        assert torch.equal(loaded(token_batch).logits, result.model(token_batch).logits)
    logits = manifest_of(result)["logits"]
    assert logits["sliced_minus_reloaded"] == 0.0
    assert logits["masked_minus_sliced"] <= (1e-4 if result.config.model.dtype == "float32" else 0.1)
    if result.config.recovery == "none":
        dense = dense_of("float32")
        with masked(dense, result.masks), torch.inference_mode():
            assert torch.allclose(dense(token_batch).logits, result.model(token_batch).logits, atol=1e-4)


def test_the_run_folder_is_complete_and_readable_by_others(result, finished):
    tensors = ["masks", *(["assignment", "thresholds", "modules"] if result.config.gprune else [])]
    for file in ("config.yaml", "manifest.json", "metrics.json", *(f"{name}.safetensors" for name in tensors)):
        assert (result.path / file).is_file(), file
    assert len(list((result.path / "statistics").glob("*.safetensors"))) == len(result.config.calibration_corpora)
    names = [file.name for file in result.path.rglob("*")]
    assert not [name for name in names if name.endswith(".tmp") or (name.startswith(".") and name != ".lock")]
    umask = os.umask(0o022)  # reads the umask by setting another one
    os.umask(umask)
    files = [file for folder in (result.path, finished / "cache") for file in folder.rglob("*") if file.is_file()]
    assert {file.stat().st_mode & 0o777 for file in files} == {0o666 & ~umask}
    manifest = manifest_of(result)
    assert manifest["environment"]["packages"]["torch"]
    assert {"save_and_check", "evaluate"} <= manifest["steps"].keys()
    assert all(step["peak_memory_mib"] > 0 and step["seconds"] >= 0 for step in manifest["steps"].values())


def test_config_yaml_has_all_defaults_and_parses_to_the_same_configuration(result):
    content = yaml.safe_load((result.path / "config.yaml").read_text())
    assert content["sparsity"]["learning_rate"] == 0.1  # a default, written out
    assert gprune.config.parse(["--config", str(result.path / "config.yaml")]) == result.config


def test_records_and_frame_have_the_same_numbers_after_a_round_trip(result):
    folded = json.loads(json.dumps(fold_records(result.records)))
    assert unfold_records({"records": folded}, None)["records"] == result.records
    numbers = keyed(result.to_frame())
    for r in result.records:
        for name in ("perplexity", "kl", "agreement"):
            assert numbers.get(f"{r['stage']}/{name}/{r['corpus']}") == r.get(name)
    for name in ("parameters", "forward_tokens"):
        assert numbers[f"final/{name}"] == result.summary[name.replace("parameters", "parameters_after")]


def test_started_again_the_run_computes_nothing_and_returns_and_prints_the_same(result, finished, name, capsys):
    before = digests(result.path)
    capsys.readouterr()
    with counted_forwards() as forwards:
        assert tiny_run.main(flags_of(finished, name)) == 0
    assert not forwards
    assert digests(result.path) == before
    out, err = capsys.readouterr()
    assert err == ""
    shares = (result.summary["sparsity_of_scope"], result.summary["sparsity_of_model"])
    assert f"Removed {shares[0]:.2%} of {result.config.sparsity.scope}, {shares[1]:.2%} of the model" in out
    assert str(result.path / "model") in out
    returned = gprune.prune(result.config)
    assert (returned.masks, returned.records, returned.summary) == (result.masks, result.records, result.summary)
    assert returned.statistics.keys() == result.statistics.keys()
    for one, other in zip(returned.model.parameters(), result.model.parameters(), strict=True):
        assert torch.equal(one, other)
