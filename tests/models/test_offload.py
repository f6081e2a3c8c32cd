"""Models with offloaded or sharded weights give the same results as models in memory."""

from __future__ import annotations

import json
import weakref
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from accelerate import dispatch_model
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from experiments import large
from gprune.checks import memory_limits
from gprune.cli import main
from gprune.config.parse import parse
from gprune.discovery import family_of
from gprune.discovery.tiny import shrunk
from gprune.export.hf import save_pruned
from gprune.importance.scores import score_units
from gprune.method.save import masked_logits
from gprune.models.agreement import random_masks
from gprune.models.families import decoder_layers
from gprune.models.loading import fingerprint, load_weights
from gprune.models.offload import (
    device_of,
    is_offloaded,
    offload_folder,
    resident,
)
from gprune.models.surgery import kept_layers, slice_model, slice_to_files
from gprune.models.units import output_weight, set_output
from gprune.storage.files import locked, read_json
from tests import tiny_run
from tests.calibration.test_gram_ranges import assert_same_bits, assert_same_run, batches
from tests.world import TYPES, collect, make_tiny, some_masks, tiny_of, units_of_kind

AUTO = "--model.device_map=auto"
# Gated, tied with norms of heads, fused, with biases, with transposed weights, with experts
FAMILIES = [type for type in TYPES if type in ("llama", "gemma3_text", "phi3", "opt", "gpt2", "qwen3_moe")]


def bytes_in(module: torch.nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters())


def limit_for(model: torch.nn.Module) -> str:
    """Memory for all weights outside of layers, the largest layer (which accelerate reserves) and half a layer."""
    family_of(model)
    layers = [bytes_in(layer) for layer in decoder_layers(model)]
    return f"{bytes_in(model) - sum(layers) + int(1.5 * max(layers))}B"


def load_offloaded(path: Path, model: torch.nn.Module, limit: str = "") -> torch.nn.Module:
    """Load a saved model with most layers on disk, and its structure. `model` is the same model in memory."""
    limit = limit or limit_for(model)
    offloaded = load_weights(path, dtype=torch.float32, device_map="auto", max_memory={"cpu": limit})
    family_of(offloaded)
    assert is_offloaded(offloaded)
    return offloaded


def reload(folder: Path, **options) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, **options).eval()


@pytest.fixture(scope="module")
def placed(tmp_path_factory):
    """A function that returns a family's tiny model in memory, and the same model with most layers on disk."""
    folder = tmp_path_factory.mktemp("offload")

    def load(family: str, **overrides):
        path = folder / "-".join([family, *overrides])
        model = make_tiny(family, **overrides)
        if not path.exists():
            model.save_pretrained(path, max_shard_size="20KB")
        whole = load_weights(path, dtype=torch.float32)
        return whole, load_offloaded(path, whole)

    with tiny_run.isolated(folder / "cache"):
        yield load


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(3, 128, (2, 24), generator=torch.Generator().manual_seed(1))


# --- equality with models in memory


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_an_offloaded_model_is_measured_pruned_and_exported_like_the_model_in_memory(family, placed, ids, tmp_path):
    whole, offloaded = placed(family)
    assert not is_offloaded(whole)
    assert sum(p.is_meta for p in offloaded.parameters()) > sum(not p.is_meta for p in offloaded.parameters())
    assert fingerprint(offloaded) == fingerprint(whole)
    assert device_of(offloaded) == device_of(decoder_layers(offloaded)[2]) == torch.device("cpu")
    # Statistics of plain forward passes, and a metric that reads weights
    expected = collect(whole, batches(), gram=True, routing=True)
    assert_same_bits(collect(offloaded, batches(), gram=True, routing=True), expected)
    scope = "neurons", "kv_groups"
    scores = [score_units("magnitude", m, expected, scope=scope) for m in (offloaded, whole)]
    assert scores[0].keys() == scores[1].keys()
    assert all(torch.equal(of_units, scores[1][key]) for key, of_units in scores[0].items())
    # No weight has been moved, and no hook removed.
    assert sum(p.is_meta for p in offloaded.parameters()) > sum(not p.is_meta for p in offloaded.parameters())
    assert torch.equal(offloaded(ids).logits, whole(ids).logits)

    masks = some_masks(whole, attention=True)
    if family == "qwen3_moe":  # whole experts, with their rows of the router
        for u in units_of_kind(whole, "neurons"):
            masks[u.key].view(u.rows, -1)[1] = False
    assert torch.equal(masked_logits(offloaded, masks, ids), masked_logits(whole, masks, ids))
    in_memory = slice_model(whole, masks)
    in_files = slice_to_files(offloaded, masks, tmp_path / "blocks")
    assert all(p.is_meta for p in in_files.parameters())
    assert in_files.num_parameters() == in_memory.num_parameters()
    pruned = {"in_memory": in_memory, "in_files": in_files}
    folders = [save_pruned(small, None, tmp_path / name) for name, small in pruned.items()]
    assert len(list(folders[1].glob("*.safetensors"))) >= 3
    configs = [json.loads((folder / "config.json").read_text()) for folder in folders]
    assert configs[0] == configs[1]
    names = [{path.name for path in folder.iterdir() if "safetensors" not in path.name} for folder in folders]
    assert names[0] == names[1]
    reloaded = reload(folders[1])
    expected_dtypes = {name: tensor.dtype for name, tensor in in_memory.state_dict().items()}
    assert {name: tensor.dtype for name, tensor in reloaded.state_dict().items()} == expected_dtypes
    assert torch.equal(reloaded(ids).logits, in_memory(ids).logits)
    # The pruned model is offloaded like the dense model, and saved again.
    small = load_offloaded(folders[1], reloaded)
    assert torch.equal(small(ids).logits, in_memory(ids).logits)
    assert torch.equal(reload(save_pruned(small, None, tmp_path / "again"))(ids).logits, in_memory(ids).logits)
    assert torch.equal(offloaded(ids).logits, whole(ids).logits)


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_offloaded_models_can_lose_whole_blocks_and_gain_biases(family, placed, ids, tmp_path):
    whole, offloaded = placed(family)
    masks = some_masks(whole, attention=False)
    masks.ffn[1][:] = False
    masks.attention[1][:] = False

    def revise(dense, layer, units):
        """Change the weight and add a bias, as a recovery does."""
        (neurons,) = (u for u in units if u.kind == "neurons")
        keep, down = masks[neurons.key], output_weight(neurons, dense)
        set_output(neurons, layer, 2 * down[:, keep], down[:, ~keep].sum(1))

    in_memory = slice_model(whole, masks)
    for layers in kept_layers(whole, in_memory, masks):
        revise(*layers)
    path = units_of_kind(whole, "neurons")[0].reads
    dense, down = (decoder_layers(m)[0].get_submodule(path) for m in (whole, in_memory))
    before = 0 if dense.bias is None else dense.bias
    torch.testing.assert_close(down.bias, before + dense.weight[:, ~masks["neurons.0"]].sum(1))
    in_files = slice_to_files(offloaded, masks, tmp_path / "blocks", revise)
    reloaded = reload(save_pruned(in_files, None, tmp_path / "model"))
    family_of(reloaded)
    assert len(decoder_layers(reloaded)) == 2
    assert torch.equal(reloaded(ids).logits, in_memory(ids).logits)


@pytest.mark.parametrize("model_type", ["deepseek_v3", "gemma4_text"])
def test_saved_buffers_of_offloaded_layers_are_exported(model_type, ids, tmp_path):
    """A buffer of the experts' router, and a buffer of a module without parameters of its own."""
    dense = tiny_of(shrunk(CONFIG_MAPPING[model_type]()))
    for layer in decoder_layers(dense):
        saved = layer.state_dict().keys() - dict(layer.named_parameters()).keys()
        for name in saved:
            layer.get_buffer(name).copy_(1 + torch.rand(layer.get_buffer(name).shape))
    assert saved
    dense.save_pretrained(tmp_path / "dense", max_shard_size="20KB")
    offloaded = load_offloaded(tmp_path / "dense", dense)
    masks = random_masks(dense)
    in_files = slice_to_files(offloaded, masks, tmp_path / "blocks")
    folder = save_pruned(in_files, None, tmp_path / "model")
    reloaded = reload(folder, attn_implementation="eager")  # as the tiny model
    assert torch.equal(reloaded(ids).logits, slice_model(dense, masks)(ids).logits)


def test_an_offloaded_head_with_its_own_weights_stays_untied_whatever_the_config_says(ids, tmp_path):
    dense = make_tiny("llama", tie_word_embeddings=False)
    dense.config.tie_word_embeddings = True
    dense.save_pretrained(tmp_path / "dense")
    offloaded = load_offloaded(tmp_path / "dense", dense, limit=f"{bytes_in(decoder_layers(dense)[0])}B")
    assert offloaded.lm_head.weight.is_meta
    masks = some_masks(dense, attention=True)
    in_files = slice_to_files(offloaded, masks, tmp_path / "blocks")
    reloaded = reload(save_pruned(in_files, None, tmp_path / "model"))
    assert torch.equal(reloaded(ids).logits, slice_model(dense, masks)(ids).logits)


def test_resident_loads_offloaded_weights_for_the_duration_of_the_context(placed):
    whole, offloaded = placed("qwen3_moe")
    layer, layer_in_memory = decoder_layers(offloaded)[2], decoder_layers(whole)[2]
    with resident(layer):
        for name, parameter in layer_in_memory.named_parameters():
            assert torch.equal(layer.get_parameter(name), parameter)
    assert all(p.is_meta for p in layer.parameters())
    with pytest.raises(ZeroDivisionError), resident(layer):
        _ = 1 / 0
    assert all(p.is_meta for p in layer.parameters())


def test_a_model_with_device_hooks_is_pruned_and_calibrated_as_without(ids):
    """accelerate's hooks on each module, as with several devices, without offloaded weights."""
    model, with_hooks = make_tiny("llama"), make_tiny("llama")
    dispatch_model(with_hooks, {"": "cpu"}, force_hooks=True)
    masks = some_masks(model, attention=True)
    assert torch.equal(slice_model(with_hooks, masks)(ids).logits, slice_model(model, masks)(ids).logits)
    assert torch.equal(masked_logits(with_hooks, masks, ids), masked_logits(model, masks, ids))
    assert_same_bits(collect(with_hooks, batches()), collect(model, batches()))
    assert torch.equal(with_hooks(ids).logits, model(ids).logits)


# --- folders and flags


def test_offload_folders_are_locked_and_removed_with_their_model_and_after_a_kill(tmp_path):
    with tiny_run.isolated(tmp_path):
        removal = ExitStack()
        folder = removal.enter_context(offload_folder())
        model = torch.nn.Linear(1, 1)
        weakref.finalize(model, removal.close)
        leftover = tmp_path / "offload" / ".weights.left.tmp"  # of a killed process
        leftover.mkdir()
        with offload_folder() as other:
            assert folder.exists()  # it is locked
            assert not leftover.exists()
            with pytest.raises(TimeoutError), locked(other):
                pass
        del model
        assert list((tmp_path / "offload").iterdir()) == []


def test_memory_limits_parse_sizes_with_units():
    sizes = {"cpu": "2GiB", "0": "500MB", "1": "1.5 kib", "2": "10", "3": "3B"}
    assert memory_limits(sizes) == {"cpu": 2**31, 0: 5 * 10**8, 1: 1536, 2: 10, 3: 3}
    flags = ["--model.device_map=auto", "--model.max_memory={cpu: 2GiB, 0: 1GB}"]
    assert memory_limits(parse(flags).model.max_memory) == {"cpu": 2**31, 0: 10**9}
    assert parse(flags).settings() == parse(flags[:1]).settings()  # memory limits do not affect results


# --- whole runs


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    yield from tiny_run.world_with_cache(tmp_path_factory.mktemp("world"))


FLAGS = ["--recovery=least_squares", "--sparsity.scope=attention+ffn", "--sparsity.allocation=uniform"]


def placement(model: torch.nn.Module) -> list[str]:
    return [AUTO, f"--model.max_memory={{cpu: {limit_for(model)}}}"]


@pytest.mark.slow
def test_a_run_with_an_offloaded_model_has_the_same_results(world, tmp_path, monkeypatch):
    """Most layers are on disk, and Gram matrices are beyond the limit, so that each layer has its own pass."""
    whole = world.run(tmp_path, *FLAGS)
    model = AutoModelForCausalLM.from_pretrained(world.model)
    monkeypatch.setenv("GPRUNE_CACHE", str(tmp_path / "cache"))
    offloaded = world.run(tmp_path, *FLAGS, *placement(model), name="away")
    assert_same_run(offloaded, whole)
    for corpus, statistics in whole.statistics.items():
        assert_same_bits(offloaded.statistics[corpus], statistics)
    distances = ([r["kl"] for r in run.records if r["stage"] != "dense"] for run in (offloaded, whole))
    # With an offloaded head, KL is computed from other quantities.
    assert next(distances) == pytest.approx(next(distances), rel=1e-4)
    assert offloaded.summary["parameters_before"] == whole.summary["parameters_before"]
    assert (tmp_path / "away" / "model" / "model.safetensors.index.json").exists()
    checks = read_json(tmp_path / "away" / "manifest.json")["logits"]
    assert checks["masked_minus_sliced"] <= 1e-4
    tokens = [read_json(tmp_path / name / "manifest.json")["steps"]["calibrate"] for name in ("run", "away")]
    assert tokens[1]["forward_tokens"] == 3 * tokens[0]["forward_tokens"]


def test_a_dry_run_prints_the_bytes_that_a_forward_pass_loads_and_the_passes_of_calibration(world, tmp_path, capsys):
    model = AutoModelForCausalLM.from_pretrained(world.model)
    offloaded = load_offloaded(world.model, model)
    loaded = sum(p.nbytes for p in offloaded.parameters() if p.is_meta)
    dry_run = ["--dry_run=true", *FLAGS]
    assert main(world.args(tmp_path, *dry_run, *placement(model))) == 0
    expected = (
        f"loads            {loaded / 1e6:,.1f} MB of weights per batch, so use a large --corpora.batch_size; 3 passes"
    )
    assert expected in capsys.readouterr().out
    assert main(world.args(tmp_path, *dry_run)) == 0
    assert "loads " not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--sparsity.allocation=learned"], "--sparsity.allocation learned needs gradients"),
        (["--importance=taylor", "--gprune=false"], "--importance taylor needs gradients"),
    ],
)
def test_options_that_need_gradients_are_refused_for_offloaded_models(flags, line, world, tmp_path, capsys):
    model = AutoModelForCausalLM.from_pretrained(world.model)
    assert main(world.args(tmp_path, *flags, *placement(model))) == 2
    (error,) = [text for text in capsys.readouterr().err.splitlines() if "--" in text]
    assert line in error
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_the_large_model_experiment_runs_on_a_small_model(monkeypatch, capsys):
    """The script itself asserts that masks and perplexities equal those of a run in memory."""

    def train(flags, cache, limit):
        """Run in this process, to avoid the time of imports."""
        assert limit is None
        monkeypatch.setenv("GPRUNE_CACHE", str(cache))
        assert main(flags) == 0
        return large.Peak(0.0)

    monkeypatch.setattr(large, "train", train)
    large.main(["--small"])
    assert capsys.readouterr().out.count("| the same in memory |") == 1
