"""Runs with whole experts on tiny mixtures: from flags to a folder that stock transformers loads."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoTokenizer

import gprune
from gprune import RunConfig
from gprune.cli import main
from gprune.importance.metrics import EXPERT_IMPORTANCE
from gprune.stages.threshold_learning import ThresholdLearning
from tests.tiny_run import World, draw, tiny_tokenizer, world_with_cache
from tests.wandb_files import find, read
from tests.world import restored

MIXTURES = {
    "mixtral": {"num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 32},
    "qwen2_moe": {
        "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 32,
    },
    "deepseek_v3": {
        "n_routed_experts": 8, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1, "moe_intermediate_size": 16,
        "first_k_dense_replace": 1, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8,
        "v_head_dim": 16, "num_key_value_heads": 4,
    },
}  # fmt: skip
SIZES = {
    "vocab_size": 128, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3,
    "tie_word_embeddings": False,
}  # fmt: skip
ALONE = ("--sparsity.scope=experts", "--gprune=false")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    yield from world_with_cache(tmp_path_factory.mktemp("experts"))


def model_of(world: World, model_type: str) -> str:
    """Return the flag of a tiny random mixture, saved once."""
    folder = world.model.parent / model_type
    if not folder.exists():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[model_type](**SIZES | MIXTURES[model_type]))
            for parameter in model.parameters():
                parameter.data += 0.1 * torch.randn_like(parameter)
        model.save_pretrained(folder)
        tiny_tokenizer().save_pretrained(folder)
    return f"--model.name={folder}"


def test_a_run_removes_experts_of_lowest_reap_exports_a_stock_folder_and_reports_them(world, tmp_path, monkeypatch):
    draw(monkeypatch)
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    corpora = world.names("alpha", "beta")
    flags = [*ALONE, f"--corpora.score={corpora}", "--recovery=[least_squares,distill]", "--distill.tokens=512"]
    result = world.run(tmp_path, model_of(world, "qwen2_moe"), *flags, "--logging.mode=offline")
    assert {(row["stage"], row["recovery"]) for row in result.records} == {
        ("dense", "none"), ("pruned", "none"), ("recovered", "least_squares+distill"),
    }  # fmt: skip
    # The experts with the lowest REAP score, by the pooled statistics of both corpora.
    for layer, mask in enumerate(result.masks.ffn[0::2]):  # experts and shared experts of each layer
        sums = sum(result.statistics[str(path)].channels[f"neurons.{2 * layer}"].routing for path in world_paths(world))
        reap = sums[3] / sums[0].clamp_min(1)
        kept = mask.view(8, -1).any(1)
        assert kept.sum() == 4
        assert reap[~kept].max() < reap[kept].min()
        assert result.summary["experts"]["removed"][str(layer)] == (~kept).nonzero()[:, 0].tolist()
    assert all(mask.all() for mask in result.masks.ffn[1::2])
    assert result.summary["sparsity_of_scope"] == 0.5
    assert json.loads((result.path / "manifest.json").read_text())["logits"]["sliced_minus_reloaded"] == 0.0

    folder = result.path / "model"
    config = json.loads((folder / "config.json").read_text())
    assert (config["model_type"], config["num_experts"]) == ("qwen2_moe", 4)
    # It loads without gprune: the code is that of transformers.
    assert "auto_map" not in config
    assert not list(folder.glob("*.py"))
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert type(model).__module__.startswith("transformers.models.qwen2_moe.")
    ids = AutoTokenizer.from_pretrained(folder)("bar bas", return_tensors="pt").input_ids
    assert model.generate(ids, max_new_tokens=3).shape[1] > ids.shape[1]

    sentence = "4 of 8 experts are removed in each of 3 layers."
    assert sentence in (result.path / "report.html").read_text()
    (file,) = find(tmp_path)
    logged = read(file)
    assert logged.summary["final/parameters"] == result.summary["parameters_after"]
    assert (logged.summary["final/experts/kept"], logged.summary["final/experts/removed"]) == (12, 12)
    assert logged.config["sparsity"]["expert_metric"] == "reap"


def world_paths(world: World) -> list[Path]:
    return [world.corpora["alpha"], world.corpora["beta"]]


def test_experts_and_neurons_share_one_budget_with_modules_and_learning(world, tmp_path):
    flags = ["--sparsity.scope=ffn+experts", "--sparsity.expert_share=0.6", "--sparsity.width_multiple=1"]
    result = world.run(tmp_path, model_of(world, "mixtral"), *flags, "--recovery=least_squares")
    for mask in result.masks.ffn:
        widths = mask.view(8, -1).sum(1)
        assert (widths == 0).sum() == 2  # 0.6 x 0.5 x 8 = 2.4
        assert len(widths[widths > 0].unique()) == 1
    assert any(int(mask.view(8, -1).sum(1).max()) < 32 for mask in result.masks.ffn)
    scope = 3 * 8 * (32 * 3 * 48 + 48)
    units = result.summary["parameters_before"] - result.summary["parameters_after"]
    assert result.summary["sparsity_of_scope"] == pytest.approx(0.5, abs=6 * 3 * 48 / scope)  # a neuron of 6 experts
    assert units == round(result.summary["sparsity_of_scope"] * scope)


def test_learning_removes_the_experts_of_the_final_masks_also_if_corpora_are_routed_differently(
    world, tmp_path, monkeypatch
):
    seen, refresh = [], ThresholdLearning.refresh_gates

    def spy(stage: ThresholdLearning) -> None:
        seen.append(stage.budget.removed_experts)
        refresh(stage)

    monkeypatch.setattr(ThresholdLearning, "refresh_gates", spy)
    with restored(EXPERT_IMPORTANCE):

        @gprune.expert_metric("reversed_on_several_corpora")
        def reversed_on_several(weights, routing, generator):
            of_one_corpus = 2 * 4 * 32  # top-2, windows, tokens
            return torch.arange(8.0) if routing.count.sum() <= of_one_corpus else torch.arange(8.0).flip(0)

        flags = ["--sparsity.scope=ffn+experts", "--sparsity.expert_metric=reversed_on_several_corpora"]
        flags += ["--sparsity.expert_share=0.6", f"--corpora.score={world.names('alpha', 'beta')}"]
        flags += ["--sparsity.width_multiple=1"]
        result = world.run(tmp_path, model_of(world, "mixtral"), *flags)
    assert seen
    assert all(experts == {0: [6, 7], 1: [6, 7], 2: [6, 7]} for experts in seen)
    for mask in result.masks.ffn:
        assert (~mask.view(8, -1).any(1)).nonzero()[:, 0].tolist() == [6, 7]


def test_every_group_of_every_layer_loses_as_many_experts_and_shared_experts_lose_no_neuron(world, tmp_path):
    result = world.run(tmp_path, model_of(world, "deepseek_v3"), *ALONE, "--sparsity.target=0.2")
    assert result.summary["experts"]["removed"].keys() == {"1", "2"}  # layer 0 is dense
    for removed in result.summary["experts"]["removed"].values():
        assert [expert // 4 for expert in removed] == [0, 1]
    assert json.loads((result.path / "model" / "config.json").read_text())["n_routed_experts"] == 6
    neurons_of_routed_experts = 8 * 16
    others = [mask for mask in result.masks.ffn if len(mask) != neurons_of_routed_experts]
    assert len(others) == 3  # the dense FFN of layer 0, and the shared experts of layers 1 and 2
    assert all(mask.all() for mask in others)
    assert "a whole number of experts is" in result.summary["experts"]["said"]


def test_a_global_ranking_may_remove_other_numbers_of_experts_and_exports_with_the_modelling_file(world, tmp_path):
    with restored(EXPERT_IMPORTANCE):

        @gprune.expert_metric("later_experts_of_the_first_layer")
        def later(weights, routing, generator):
            in_layer_0 = generator.initial_seed() == 0  # each block has another seed
            return torch.arange(8, 0, -1.0) if in_layer_0 else torch.ones(8)

        flags = ["--sparsity.expert_metric=later_experts_of_the_first_layer", "--sparsity.uniform_experts=false"]
        result = world.run(tmp_path, model_of(world, "mixtral"), *ALONE, *flags, "--sparsity.target=0.2")
    removed = {int(layer): experts for layer, experts in result.summary["experts"]["removed"].items()}
    assert sum(map(len, removed.values())) == 5  # 0.2 x 24, rounded up
    assert removed[0] == [4, 5, 6, 7]  # scores 4, 3, 2 and 1 of a mean of 4.5
    assert removed.keys() == {0, 1, 2}
    assert (result.path / "model" / "modeling_pruned.py").exists()


def test_whole_blocks_may_take_all_layers_with_experts(world, tmp_path, capsys):
    folder = tmp_path / "one_mixture"
    config = SIZES | MIXTURES["qwen2_moe"] | {"num_hidden_layers": 2, "mlp_only_layers": [1]}
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING["qwen2_moe"](**config))
    for name, parameter in model.named_parameters():
        if "layers.0." in name and ("o_proj" in name or "down_proj" in name):
            parameter.data.zero_()  # the layer with experts changes nothing
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    flags = [f"--model.name={folder}", "--gprune=false", "--sparsity.scope=ffn+experts+blocks"]
    flags += ["--sparsity.target=0.75", "--sparsity.block_share=1", "--sparsity.block_choice=influence"]
    assert main(world.args(tmp_path, *flags, "--dry_run=true")) == 0
    assert "whole blocks take all layers with experts" in capsys.readouterr().out
    result = world.run(tmp_path, *flags)
    assert result.masks.blocks == [False, False, True]  # experts and shared experts of layer 0
    assert "experts" not in result.summary
    assert result.model is not None


def test_a_target_in_quality_removes_as_many_experts_of_every_layer_and_resumes_unchanged(world, tmp_path):
    flags = [*ALONE, model_of(world, "mixtral"), "--sparsity.target=+200%", "--evaluation.development_samples=2"]
    result = world.run(tmp_path, *flags, "--recovery=none")
    counts = {len(experts) for experts in result.summary["experts"]["removed"].values()}
    assert len(counts) == 1
    before = (result.path / "metrics.json").read_text()
    assert main(world.args(tmp_path, *flags, "--recovery=none")) == 0
    assert (result.path / "metrics.json").read_text() == before


def test_a_target_in_bytes_removes_experts_until_the_weights_fit(world, tmp_path):
    small = world.run(tmp_path, model_of(world, "mixtral"), *ALONE, "--sparsity.target=0.3MiB", name="bytes")
    size = sum(path.stat().st_size for path in (small.path / "model").glob("*.safetensors"))
    assert size < 0.32 * 2**20
    assert {len(experts) for experts in small.summary["experts"]["removed"].values()} == {5}


def test_offloaded_models_lose_the_same_experts(world, tmp_path):
    in_memory = world.run(tmp_path, model_of(world, "deepseek_v3"), *ALONE)
    offload = ["--model.device_map=auto", "--model.max_memory={cpu: 300KiB}"]
    offloaded = world.run(tmp_path, model_of(world, "deepseek_v3"), *ALONE, *offload, name="offloaded")
    assert offloaded.masks == in_memory.masks
    config = json.loads((offloaded.path / "model" / "config.json").read_text())
    assert (config["model_type"], config["n_routed_experts"]) == ("deepseek_v3", 4)
    (a, b) = (AutoModelForCausalLM.from_pretrained(r.path / "model").state_dict() for r in (in_memory, offloaded))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_experts_that_no_token_reaches_are_named_in_one_warning(world, tmp_path, capsys):
    """They are removed and have no score. A metric that ignores activations gives no warning."""
    folder = Path(model_of(world, "qwen2_moe").partition("=")[2])
    model = AutoModelForCausalLM.from_pretrained(folder)
    idle = tmp_path / "idle"
    router = model.model.layers[1].mlp.gate.weight.data
    router[3] = 0.0  # never chosen, since one expert of each other pair has a positive logit
    router[[1, 4, 6]] = -router[[0, 2, 5]]
    assert model.config.num_experts_per_tok <= 3
    model.save_pretrained(idle)
    tiny_tokenizer().save_pretrained(idle)
    corpora = world.names("alpha", "beta")
    result = world.run(tmp_path, f"--model.name={idle}", *ALONE, f"--corpora.score={corpora}")
    warnings = [line for line in capsys.readouterr().out.splitlines() if "No calibration token reaches" in line]
    assert len(warnings) == 1
    assert re.search(r"layer 1: [0-9, ]*3", warnings[0])
    assert 3 in result.summary["experts"]["removed"]["1"]
    assert result.summary["experts"]["scores"]["1"][3] is None
    flags = [f"--model.name={idle}", *ALONE, "--sparsity.expert_metric=random"]  # removes any experts first
    assert main(world.args(tmp_path, *flags, name="random")) == 0
    assert "No calibration token reaches" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("model", "flags", "message"),
    [
        ("llama", ALONE, "--sparsity.scope experts needs a mixture of experts; model type 'llama' has none. Use ffn."),
        ("mixtral", ["--sparsity.scope=experts"], "--sparsity.scope experts needs --gprune false, because experts"),
        ("mixtral", [*ALONE, "--sparsity.target=0.9"], "must be at most 0.7500, because each router needs 2 of 8"),
        ("deepseek_v3", [*ALONE, "--sparsity.target=0.9"], "must be at most 0.5000, because each router needs 4 of 8"),
        ("mixtral", [*ALONE, "--sparsity.target=1.2x"], "needs a target in parameters or bytes; got 1.2x, which"),
        ("mixtral", [*ALONE, "--sparsity.expert_metric=reapp"], "Unknown expert metric 'reapp'. Did you mean 'reap'?"),
        ("mixtral", [*ALONE, "--sparsity.expert_share=0"], "--sparsity.expert_share must be more than 0; got 0"),
    ],
)  # fmt: skip
def test_invalid_flags_for_experts_are_refused_in_one_line(world, tmp_path, capsys, model, flags, message):
    name = [] if model == "llama" else [model_of(world, model)]
    assert main(world.args(tmp_path, *name, *flags)) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert message in error
    assert not (tmp_path / "run").exists()


def test_a_router_that_chooses_all_experts_is_refused_with_this_reason(world, tmp_path, capsys):
    folder = tmp_path / "all_experts"
    config = SIZES | MIXTURES["mixtral"] | {"num_local_experts": 2}
    AutoModelForCausalLM.from_config(CONFIG_MAPPING["mixtral"](**config)).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    assert main(world.args(tmp_path, f"--model.name={folder}", *ALONE)) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert "cannot remove experts of model type 'mixtral': its router chooses all 2 experts. Use ffn" in error


def test_dry_run_says_that_least_squares_changes_nothing_if_all_neurons_remain(world, tmp_path, capsys):
    recovery = "--recovery=[least_squares,distill]"
    args = world.args(tmp_path, model_of(world, "mixtral"), *ALONE, recovery, "--dry_run=true")
    assert main(args) == 0
    assert "all neurons of these experts remain, so --recovery least_squares changes nothing" in capsys.readouterr().out


def test_dry_run_says_how_many_experts_remain_and_what_a_whole_number_overshoots(world, tmp_path, capsys):
    args = world.args(tmp_path, model_of(world, "deepseek_v3"), *ALONE, "--sparsity.target=0.2", "--dry_run=true")
    assert main(args) == 0
    out = capsys.readouterr().out
    line = next(line for line in out.splitlines() if line.startswith("experts "))
    assert "6 of 8 remain in each of 2 layers; routers need 4, the same number in each of 2 groups" in line
    assert "a whole number of experts is 1,881 parameters more than the target" in line


def test_flags_of_experts_are_refused_and_not_in_the_settings_without_experts_in_the_scope(world, tmp_path, capsys):
    args = world.args(tmp_path, "--sparsity.expert_metric=frequency", "--dry_run=true", "--allow_unused=false")
    assert main(args) == 2
    assert "--sparsity.expert_metric (--sparsity.scope ffn)" in capsys.readouterr().err
    without, changed = (RunConfig(sparsity={"expert_metric": name}).settings() for name in ("reap", "frequency"))
    assert without == changed
    settings = RunConfig(gprune=False, sparsity={"scope": "experts+blocks", "expert_metric": "random"}).settings()
    assert settings["sparsity"]["expert_metric"] == "random"
    assert settings["sparsity"]["scope"] == "experts+blocks"


def test_the_metric_of_neurons_is_refused_if_only_experts_are_removed(world, tmp_path, capsys):
    unused = ["--importance=wifv", "--dry_run=true", "--allow_unused=false"]
    assert main(world.args(tmp_path, model_of(world, "mixtral"), *ALONE, *unused)) == 2
    assert "--importance (--sparsity.scope experts)" in capsys.readouterr().err
