"""Layers with several FFNs, such as experts and a shared expert: each FFN is a block, and a layer goes with all of its
blocks."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from experiments.architectures import example
from gprune.benchmarks.speed import price_by
from gprune.calibration.collector import Collector
from gprune.calibration.layerwise import Walk
from gprune.errors import UserError
from gprune.export.hf import save_pruned
from gprune.importance.scores import score_units
from gprune.models import lookup
from gprune.models.blocks import blocks_of, by_layer, decoder_layers, unpruned
from gprune.models.discovery.agreement import random_masks
from gprune.models.discovery.record import discover_record
from gprune.models.lookup import remember
from gprune.models.masks import Masks
from gprune.models.surgery import prune, prune_to_files
from gprune.models.tiny import tiny_model
from gprune.pipeline.dry_run import what_stays
from gprune.recoveries import RECOVERY
from gprune.recoveries.contract import Material
from gprune.recoveries.prefix import PrunedPrefix
from gprune.sparsity.allocation import allocate
from gprune.sparsity.budget import Budget, choose_blocks, unit_costs
from gprune.sparsity.cut import uniform_masks
from gprune.sparsity.gates import bypassed, masked
from gprune.stages.student import Student
from tests import tiny_run

IDS = torch.randint(3, 100, (4, 24), generator=torch.Generator().manual_seed(1))
HALF = torch.tensor([0, 1, 0, 1])


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A model of 3 layers with 4 experts and a shared expert behind a gate each: Qwen2-MoE."""
    with tiny_run.isolated(tmp_path_factory.mktemp("cache")):
        model = example("qwen2_moe")
        blocks_of(model)  # while the cache is there
    return model


class TwoMLPs(nn.Module):
    """The sum of two FFNs of different width."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        narrow = copy.deepcopy(config)
        narrow.intermediate_size = 28
        self.wide, self.narrow = LlamaMLP(config), LlamaMLP(narrow)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.wide(hidden_states) + self.narrow(hidden_states)


@pytest.fixture
def twice(monkeypatch):
    """A Llama whose layers have two dense FFNs, and the structure that is found of it."""
    monkeypatch.setattr(lookup, "FAMILIES", {})
    config = LlamaConfig(
        vocab_size=128, hidden_size=48, intermediate_size=44, num_hidden_layers=3, num_attention_heads=6,
        num_key_value_heads=3, head_dim=8,
    )  # fmt: skip
    model = tiny_model(config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        for layer in model.model.layers:
            layer.mlp = TwoMLPs(config)
            for parameter in layer.mlp.parameters():
                nn.init.normal_(parameter, std=0.3)
    with torch.enable_grad():
        remember(model, discover_record(model))
    return model.requires_grad_(False)


def logits(model, ids=IDS) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, atol=2e-5 * float(b.abs().max()), rtol=0)


def statistics_of(model, **collects):
    with Collector(model, **collects) as collector:
        collector.observe(IDS, HALF)
    return collector.compute()


def planned(model) -> SimpleNamespace:
    """What `what_stays` reads of a plan with attention in scope."""
    budget = SimpleNamespace(costs=unit_costs(blocks_of(model), scope="attention+ffn"))
    sparsity = SimpleNamespace(scope="attention+ffn")
    return SimpleNamespace(budget=budget, skeleton=model, cfg=SimpleNamespace(sparsity=sparsity))


def without_layers(model, *gone: int) -> Masks:
    """Masks that keep all of the other layers."""
    blocks = blocks_of(model)
    return Masks(
        [torch.full((b.experts * b.neurons,), b.layer_index not in gone) for b in blocks],
        [torch.full((b.kv_groups,), b.layer_index not in gone) for b in blocks],
    )


def test_each_ffn_of_a_layer_is_a_block_and_the_first_has_the_attention(shared):
    blocks, layers = blocks_of(shared), decoder_layers(shared)
    assert [b.index for b in blocks] == list(range(6))
    assert [b.layer_index for b in blocks] == [0, 0, 1, 1, 2, 2]
    assert [b.has_experts for b in blocks] == [True, False] * 3
    assert [b.kv_groups > 0 for b in blocks] == [True, False] * 3
    assert unpruned(shared) == {}
    assert what_stays(planned(shared)) == ""  # a block without attention is no layer without attention
    for own, layer in zip(by_layer(blocks), layers, strict=True):
        assert all(block.layer is layer for block in own)
        assert sum(block.cost for block in own) == sum(p.numel() for p in layer.parameters())
        assert own[1].cost == 32 * 3 * 48  # a neuron of the shared expert has a row of gate, of up, a column of down


def test_two_dense_ffns_of_a_layer_are_found(twice):
    wide, narrow = by_layer(blocks_of(twice))[1]
    assert (wide.family.down, wide.neurons, wide.kv_groups) == ("mlp.wide.down_proj", 44, 3)
    assert (narrow.family.down, narrow.neurons, narrow.kv_groups) == ("mlp.narrow.down_proj", 28, 0)
    masks = random_masks(twice)
    with masked(twice, masks):
        expected = logits(twice)
    close(logits(prune(twice, masks)), expected)


def test_a_network_inside_a_router_stays_and_is_named(tmp_path):
    """Zaya's router is an FFN: it says which expert computes, and adds nothing to the residual."""
    with tiny_run.isolated(tmp_path):
        model = example("zaya")
        found, said = unpruned(model), what_stays(planned(model))
    ((path, staying),) = found.items()
    share = staying.parameters / model.num_parameters()
    assert said.endswith(f"{path} in 3 layers (its output does not join the residual): {share:.1%} of the model")
    assert "router" in path
    assert "does not join the residual" in staying.why
    assert staying.parameters > 0
    assert not any(path == block.family.down for block in blocks_of(model))


def test_statistics_of_a_shared_expert_are_those_of_all_tokens(shared):
    seen = {}
    handles = [
        layer.mlp.shared_expert.down_proj.register_forward_pre_hook(
            lambda _m, x, index=index: seen.__setitem__(index, x[0].double().flatten(0, -2))
        )
        for index, layer in enumerate(decoder_layers(shared))
    ]
    logits(shared)
    for handle in handles:
        handle.remove()
    found = statistics_of(shared, gram=True)
    assert len(found.ffn) == len(found.turned) == 6
    for index, x in seen.items():
        moments = found.ffn[2 * index + 1].total
        torch.testing.assert_close(moments.sum_sq, x.square().sum(0), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(moments.gram.double(), x.T @ x, rtol=1e-4, atol=1e-4)
        assert moments.count == IDS.numel()


def test_layer_by_layer_gives_the_same_bits(shared):
    walk = Walk(shared)
    walk.add(IDS, HALF)
    layerwise = walk.statistics(gram=True).tensors()
    assert all(
        torch.equal(tensor, layerwise[name]) for name, tensor in statistics_of(shared, gram=True).tensors().items()
    )
    walk = Walk(shared)
    walk.add(IDS)
    close(next(walk.logits()), logits(shared))


def test_masks_that_keep_one_block_of_a_layer_alone_are_refused(shared):
    masks = without_layers(shared)
    masks.ffn[3][:] = False
    with pytest.raises(UserError, match=r"Masks of blocks 2 to 3, of layer 1, must keep units of all"):
        prune(shared, masks)


def test_a_layer_goes_with_all_of_its_blocks(shared):
    masks = without_layers(shared, 1)
    with masked(shared, masks):
        expected = logits(shared)
    with bypassed(shared, [2]):
        assert torch.equal(logits(shared), expected)
    small = prune(shared, masks)
    assert small.config.num_hidden_layers == 2
    close(logits(small), expected)
    gone = shared.num_parameters() - small.num_parameters()
    assert gone == unit_costs(blocks_of(shared), scope="ffn+blocks").removed(masks)


def test_the_budget_is_met_to_the_unit_over_all_ffns(shared):
    blocks = blocks_of(shared)
    costs = unit_costs(blocks, scope="attention+ffn")
    budget = Budget.of(costs, 0.4)
    masks = uniform_masks(budget)
    gone = shared.num_parameters() - prune(shared, masks).num_parameters()
    assert budget.target <= gone < budget.target + max(costs.neuron)
    assert all(0 < int(keep.sum()) < len(keep) for keep in masks.ffn)


def test_protected_layers_keep_all_of_their_blocks(shared):
    costs = unit_costs(blocks_of(shared), scope="ffn", protect=[-1])
    assert costs.protected == {4, 5}
    assert all(uniform_masks(Budget.of(costs, 0.3)).ffn[b].all() for b in (4, 5))
    with pytest.raises(UserError, match=r"--sparsity.protect .* from -3 to 2.*; got 3"):
        unit_costs(blocks_of(shared), scope="ffn", protect=[3])


def test_whole_layers_are_chosen_by_the_loss_of_the_model_without_them(shared):
    costs = unit_costs(blocks_of(shared), scope="ffn+blocks")
    layer = sum(costs.block[:2])
    budget = Budget.of(costs, (layer + 1) / costs.total)
    tried = []

    def loss(gone: list[int]) -> float:
        tried.append(tuple(gone))
        return -sum(gone)

    assert choose_blocks(budget, loss) == [4, 5]
    assert tried == [(0, 1), (2, 3), (4, 5)]
    chosen = budget.without([3, 0])  # in an order of blocks; the target has room for one layer
    assert chosen.costs.removed_blocks == (2, 3)
    assert chosen.costs.removed_layers == [1]


@pytest.mark.parametrize("rule", ["uniform", "global", "owl"])
def test_allocations_meet_the_budget_where_blocks_have_no_attention(rule, shared):
    blocks, statistics = blocks_of(shared), statistics_of(shared)
    costs = unit_costs(blocks, scope="attention+ffn")
    scores = score_units("wanda_sp", blocks, statistics, attention=True)
    masks = allocate(rule, scores, statistics, blocks, Budget.of(costs, 0.4))
    gone = shared.num_parameters() - prune(shared, masks).num_parameters()
    assert 0 <= gone - Budget.of(costs, 0.4).target < max(costs.neuron)


@pytest.mark.parametrize("extra", [0, 2000])
def test_depth_removes_layers_and_narrows_the_largest_ffn_of_one(extra, shared):
    statistics, blocks = statistics_of(shared), blocks_of(shared)
    tokens = float(statistics.ffn[1].total.count)
    influence = torch.tensor([0.5, 0.5, 0.1, 0.1, 0.9, 0.9], dtype=torch.float64)
    statistics = replace(statistics, turned=influence * tokens)
    costs = unit_costs(blocks, scope="ffn")
    target = sum(costs.block[2:4]) + extra
    scores = score_units("wanda_sp", blocks, statistics, attention=False)
    masks = allocate("depth", scores, statistics, blocks, Budget(costs, target))
    assert masks.blocks == [True, True, False, False, True, True]
    assert bool(masks.ffn[0].all()) == (extra == 0)
    assert all(masks.ffn[b].all() for b in (1, 4, 5))
    assert target <= costs.removed(masks) < target + costs.neuron[0]


def test_the_seconds_of_a_layer_are_divided_between_its_ffns(shared):
    neurons, groups = [[1, 1.0], [16, 2.0], [32, 3.5]], [[1, 3.0], [6, 3.5]]
    blocks, table = blocks_of(shared), {"neurons": neurons, "groups": groups, "rest": 0.5, "spread": 0.0}
    price = price_by(table, blocks)
    for own in by_layer(blocks):
        assert sum(price.blocks[b.index] for b in own) == pytest.approx(3.5e12)
        saved = [price.neurons[b.index][-1] / b.neurons for b in own]  # of a neuron, experts having most parameters
        assert saved[0] > saved[1] > 0
    assert price.model == pytest.approx(11e12)


def test_stock_class_where_its_configuration_has_a_key_for_each_width(shared, tmp_path):
    keep = [torch.arange(b.neurons).repeat(b.experts) < (16 if b.has_experts else 8) for b in blocks_of(shared)]
    small = prune(shared, Masks(keep, [torch.ones(b.kv_groups, dtype=torch.bool) for b in blocks_of(shared)]))
    save_pruned(small, None, tmp_path / "model")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "model", attn_implementation="eager").eval()
    assert type(again).__name__ == "Qwen2MoeForCausalLM"
    assert (again.config.moe_intermediate_size, again.config.shared_expert_intermediate_size) == (16, 8)
    assert torch.equal(logits(again), logits(small))


def test_layers_are_written_to_files_with_all_of_their_blocks(shared, tmp_path):
    masks, pairs = without_layers(shared, 0), []
    for kind, other in ((masks.ffn, random_masks(shared).ffn), (masks.attention, random_masks(shared).attention)):
        kind[2:] = other[2:]
    small = prune_to_files(shared, masks, tmp_path, lambda dense, block: pairs.append((dense.index, block.index)))
    assert pairs == [(2, 0), (3, 1), (4, 2), (5, 3)]
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["0.safetensors", "1.safetensors"]
    save_pruned(small, None, tmp_path / "model")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "model", attn_implementation="eager").eval()
    close(logits(again), logits(prune(shared, masks)))


def solved(W: torch.Tensor, keep: torch.Tensor, x: torch.Tensor, y: torch.Tensor, ridge: float) -> torch.Tensor:
    """W_K + (y - W_K x) x^T (x x^T + lambda)^-1 in float64, from all tokens: x (n, kept), y (n, H)."""
    W, x, y = W.double()[:, keep], x.double(), y.double()
    gram = x.T @ x
    damped = gram + ridge * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
    return W + torch.linalg.solve(damped, (y - x @ W.T).T.matmul(x).T).T


def entering(model, paths: list[str]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """(input, output) of modules for the text, (tokens, size)."""
    seen, handles = {}, []
    for path in paths:

        def see(_module, inputs, output, path=path) -> None:
            seen[path] = inputs[0].flatten(0, -2), output.flatten(0, -2)

        handles.append(model.get_submodule(path).register_forward_hook(see))
    logits(model)
    for handle in handles:
        handle.remove()
    return seen


def test_least_squares_solves_each_ffn_against_its_own_output(shared):
    masks, path = random_masks(shared), "model.layers.{}.mlp.shared_expert.down_proj"
    small = prune(shared, masks)
    material = Material(shared, masks, ridge=0.05, statistics=statistics_of(shared, gram=True))
    revise = RECOVERY["least_squares"].revise(material)
    for dense, block in zip(blocks_of(shared), blocks_of(small), strict=True):
        revise(dense, block)
    for index in range(3):
        keep, place = masks.ffn[2 * index + 1], path.format(index)
        x, y = entering(shared, [place])[place]
        expected = solved(shared.get_submodule(place).weight, keep, x[:, keep], y, 0.05)
        got = small.get_submodule(place).weight.double()
        torch.testing.assert_close(got, expected, atol=1e-4 * float(expected.abs().max()), rtol=0)


def test_least_squares_along_the_prefix_solves_each_ffn_on_the_pruned_models_activations(twice):
    masks = random_masks(twice)
    masks = Masks(masks.ffn, [torch.ones_like(groups) for groups in masks.attention])
    small = prune(twice, masks)
    prefix = PrunedPrefix(twice, masks, [IDS], ridge=0.05)
    for dense, block in zip(blocks_of(twice), blocks_of(small), strict=True):
        prefix.recover(dense, block)
    paths = [f"model.layers.{i}.mlp.{name}.down_proj" for i in range(3) for name in ("wide", "narrow")]
    of_dense, of_small = entering(twice, paths), entering(small, paths)
    for keep, path in zip(masks.ffn, paths, strict=True):
        expected = solved(twice.get_submodule(path).weight, keep, of_small[path][0], of_dense[path][1], 0.05)
        got = small.get_submodule(path).weight.double()
        torch.testing.assert_close(got, expected, atol=1e-3 * float(expected.abs().max()), rtol=0)


@pytest.mark.parametrize("targets", ["mlp", "all"])
def test_a_student_learns_the_weights_of_every_ffn_once(targets, shared):
    student = Student(copy.deepcopy(shared), targets=targets)
    learned = [name for name in student.learned if "shared_expert_down_proj" in name]
    assert learned == [f"{layer}_mlp_shared_expert_down_proj_weight" for layer in range(3)]
    assert any("experts" in name for name in student.learned)
    student.to_plain_model()
    close(logits(student.model), logits(shared))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model_type", "layers", "flags"),
    [
        (
            "qwen2_moe", 2,
            ["--sparsity.scope=attention+ffn+blocks", "--sparsity.block_share=1", "--sparsity.block_choice=influence",
             "--sparsity.target=0.5", "--recovery=[least_squares,distill]", "--distill.tokens=512"],
        ),
        ("deepseek_v3", 3, ["--sparsity.scope=ffn", "--sparsity.target=0.4", "--recovery=least_squares"]),
    ],
)  # fmt: skip
def test_a_run_from_the_command_line(model_type, layers, flags, tmp_path, monkeypatch):
    tiny_run.quick(monkeypatch)
    example(model_type).save_pretrained(tmp_path / "model")
    tiny_run.tiny_tokenizer().save_pretrained(tmp_path / "model")
    with tiny_run.isolated(tmp_path / "cache"):
        corpora = tiny_run.make_world(tmp_path).corpora
        result = tiny_run.World(Path(tmp_path / "model"), corpora).run(tmp_path, "--evaluation.controls=[]", *flags)
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["logits"]["sliced_minus_reloaded"] == 0.0
    assert manifest["logits"]["masked_minus_sliced"] <= 1e-4
    assert result.model.config.num_hidden_layers == layers
    assert len(manifest["widths"]["neurons"]) == 2 * layers - (model_type == "deepseek_v3")  # its first layer is dense
