"""Layers with several FFNs, such as experts and a shared expert. Each FFN is a block, and a removed layer loses all."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from experiments.architectures import example
from gprune import discovery
from gprune.calibration.collector import Collector
from gprune.discovery.search import discover_record
from gprune.discovery.tiny import tiny_model
from gprune.errors import UserError
from gprune.evaluation.speed import costs_from_table
from gprune.export.hf import save_pruned
from gprune.importance.scores import score_units
from gprune.method.dry_run import describe_unpruned
from gprune.models.agreement import random_masks
from gprune.models.blocks import blocks_of, by_layer, decoder_layers, find_unpruned
from gprune.models.families import attach_record
from gprune.models.masks import Masks, masked
from gprune.models.surgery import slice_model, slice_to_files
from gprune.recoveries import RECOVERY
from gprune.recoveries.contract import Material
from gprune.sparsity.allocation import allocate
from gprune.sparsity.budget import Budget, block_units
from gprune.sparsity.cut import uniform_masks
from gprune.sparsity.whole_blocks import choose_blocks, removed_layers
from gprune.stages.student import Student
from tests import tiny_run

IDS = torch.randint(3, 100, (4, 24), generator=torch.Generator().manual_seed(1))
HALF = torch.tensor([0, 1, 0, 1])


@pytest.fixture(scope="module")
def shared_expert_model(tmp_path_factory):
    """A tiny Qwen2-MoE: three layers, each with four experts and a gated shared expert."""
    with tiny_run.isolated(tmp_path_factory.mktemp("cache")):
        return example("qwen2_moe")


class TwoMLPs(nn.Module):
    """The sum of two FFNs with different widths."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        narrow = copy.deepcopy(config)
        narrow.intermediate_size = 28
        self.wide, self.narrow = LlamaMLP(config), LlamaMLP(narrow)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.wide(hidden_states) + self.narrow(hidden_states)


@pytest.fixture
def two_ffn_model(monkeypatch):
    """A Llama whose layers have two dense FFNs, with its discovered structure."""
    monkeypatch.setattr(discovery, "FAMILIES", {})
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
        attach_record(model, discover_record(model))
    return model.requires_grad_(False)


def logits(model, ids=IDS) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def assert_close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, atol=2e-5 * float(b.abs().max()), rtol=0)


def statistics_of(model, **collects):
    with Collector(model, **collects) as collector:
        collector.observe(IDS, HALF)
    return collector.compute()


def plan_of(model) -> SimpleNamespace:
    """The part of a plan that `describe_unpruned` reads, with attention in scope."""
    budget = Budget(block_units(blocks_of(model), scope="attention+ffn"), 0)
    sparsity = SimpleNamespace(scope="attention+ffn")
    return SimpleNamespace(budget=budget, skeleton=model, cfg=SimpleNamespace(sparsity=sparsity))


def masks_without_layers(model, *removed: int) -> Masks:
    """Masks that remove these layers and keep all units of the others."""
    blocks = blocks_of(model)
    return Masks(
        [torch.full((b.experts * b.neurons,), b.layer_index not in removed) for b in blocks],
        [torch.full((b.kv_groups,), b.layer_index not in removed) for b in blocks],
    )


def test_each_ffn_of_a_layer_is_a_block_and_the_first_block_has_the_attention(shared_expert_model):
    blocks, layers = blocks_of(shared_expert_model), decoder_layers(shared_expert_model)
    assert [b.index for b in blocks] == list(range(6))
    assert [b.layer_index for b in blocks] == [0, 0, 1, 1, 2, 2]
    assert [b.has_experts for b in blocks] == [True, False] * 3
    assert [b.kv_groups > 0 for b in blocks] == [True, False] * 3
    assert find_unpruned(shared_expert_model) == {}
    # Blocks without attention are not reported, since their layers have attention.
    assert describe_unpruned(plan_of(shared_expert_model)) == ""
    for of_layer, layer in zip(by_layer(blocks), layers, strict=True):
        assert all(block.layer is layer for block in of_layer)
        assert sum(block.cost for block in of_layer) == sum(p.numel() for p in layer.parameters())
        assert of_layer[1].cost == 32 * 3 * 48  # per neuron: a row of gate, a row of up, a column of down


def test_two_dense_ffns_of_a_layer_are_discovered_as_two_blocks(two_ffn_model):
    wide, narrow = by_layer(blocks_of(two_ffn_model))[1]
    assert (wide.family.down, wide.neurons, wide.kv_groups) == ("mlp.wide.down_proj", 44, 3)
    assert (narrow.family.down, narrow.neurons, narrow.kv_groups) == ("mlp.narrow.down_proj", 28, 0)
    masks = random_masks(two_ffn_model)
    with masked(two_ffn_model, masks):
        expected = logits(two_ffn_model)
    assert_close(logits(slice_model(two_ffn_model, masks)), expected)


def test_an_ffn_inside_a_router_is_not_pruned_and_is_reported(tmp_path):
    """The router of Zaya is an FFN whose output selects experts and is not added to the residual stream."""
    with tiny_run.isolated(tmp_path):
        model = example("zaya")
        unpruned, description = find_unpruned(model), describe_unpruned(plan_of(model))
    ((path, unpruned_module),) = unpruned.items()
    share = unpruned_module.parameters / model.num_parameters()
    assert description.endswith(f"{path} in 3 layers (its output does not join the residual): {share:.1%} of the model")
    assert "router" in path
    assert "does not join the residual" in unpruned_module.why
    assert unpruned_module.parameters > 0
    assert not any(path == block.family.down for block in blocks_of(model))


def test_statistics_of_a_shared_expert_count_all_tokens(shared_expert_model):
    inputs = {}
    handles = [
        layer.mlp.shared_expert.down_proj.register_forward_pre_hook(
            lambda _m, x, index=index: inputs.__setitem__(index, x[0].double().flatten(0, -2))
        )
        for index, layer in enumerate(decoder_layers(shared_expert_model))
    ]
    logits(shared_expert_model)
    for handle in handles:
        handle.remove()
    statistics = statistics_of(shared_expert_model, gram=True)
    assert len(statistics.ffn) == len(statistics.turned) == 6
    for index, x in inputs.items():
        moments = statistics.ffn[2 * index + 1].total  # the second block of the layer
        torch.testing.assert_close(moments.sum_sq, x.square().sum(0), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(moments.gram.double(), x.T @ x, rtol=1e-4, atol=1e-4)
        assert moments.count == IDS.numel()


def test_masks_that_remove_one_of_several_blocks_of_a_layer_are_refused(shared_expert_model):
    masks = masks_without_layers(shared_expert_model)
    masks.ffn[3][:] = False
    with pytest.raises(UserError, match=r"Masks of blocks 2 to 3, of layer 1, must keep units of all"):
        slice_model(shared_expert_model, masks)


def test_protected_layers_keep_all_of_their_blocks(shared_expert_model):
    budget = Budget.of(block_units(blocks_of(shared_expert_model), scope="ffn", protect=[-1]), 0.3)
    assert budget.protected == {4, 5}
    assert all(uniform_masks(budget).ffn[b].all() for b in (4, 5))
    with pytest.raises(UserError, match=r"--sparsity.protect .* from -3 to 2.*; got 3"):
        block_units(blocks_of(shared_expert_model), scope="ffn", protect=[3])


def test_whole_layers_are_chosen_by_the_loss_without_them(shared_expert_model):
    blocks = blocks_of(shared_expert_model)
    layer = blocks[0].cost + blocks[1].cost
    share = (layer + 1) / sum(block.cost for block in blocks)
    budget = Budget.of(block_units(blocks, scope="ffn"), share, block_share=1.0)
    candidates = []

    def loss(removed: list[int]) -> float:
        candidates.append(tuple(removed))
        return -sum(removed)

    assert choose_blocks(budget, loss) == [4, 5]
    assert candidates == [(0, 1), (2, 3), (4, 5)]
    # Block 3 stands for its layer 1. The target allows to remove only one layer, so that of block 0 remains.
    chosen = budget.without([3, 0])
    assert chosen.removed == (2, 3)
    assert removed_layers(chosen) == [1]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("rule", ["uniform", "global", "owl"])
def test_allocations_meet_the_budget_with_layers_without_an_ffn(rule):
    model = example("nemotron_h")  # Mamba, attention or FFN
    blocks, statistics = blocks_of(model), statistics_of(model)
    assert {(block.neurons > 0, block.kv_groups > 0) for block in blocks} == {
        (True, False),
        (False, True),
        (False, False),
    }
    budget = Budget.of(block_units(blocks, scope="attention+ffn"), 0.3)
    scores = score_units("wanda_sp", blocks, statistics, attention=True)
    masks = allocate(rule, scores, statistics, blocks, budget)
    removed = model.num_parameters() - slice_model(model, masks).num_parameters()
    assert 0 <= removed - budget.target < budget.largest_step


def test_the_measured_time_of_a_layer_is_divided_among_its_ffns(shared_expert_model):
    neurons, groups = [[1, 1.0], [16, 2.0], [32, 3.5]], [[1, 3.0], [6, 3.5]]
    blocks, table = blocks_of(shared_expert_model), {"neurons": neurons, "groups": groups, "rest": 0.5, "spread": 0.0}
    costs, outside = costs_from_table(table, blocks)
    for experts, shared_expert in by_layer(blocks):
        # 3.5 s per layer, in picoseconds.
        assert costs[experts.index].whole + costs[shared_expert.index].whole == pytest.approx(3.5e12)
        per_neuron = [costs[b.index].neurons[-1] / b.neurons for b in (experts, shared_expert)]
        assert per_neuron[0] > per_neuron[1] > 0  # a neuron of the experts has more parameters
    assert sum(of_block.whole for of_block in costs) + outside == pytest.approx(11e12)  # three layers and the rest


def test_slice_to_files_writes_one_file_per_layer_with_all_of_its_blocks(shared_expert_model, tmp_path):
    # Layer 0 is removed, and the blocks of the other layers become narrower.
    masks, pairs = masks_without_layers(shared_expert_model, 0), []
    narrow = random_masks(shared_expert_model)
    masks.ffn[2:], masks.attention[2:] = narrow.ffn[2:], narrow.attention[2:]
    small = slice_to_files(
        shared_expert_model, masks, tmp_path, lambda dense, block: pairs.append((dense.index, block.index))
    )
    assert pairs == [(2, 0), (3, 1), (4, 2), (5, 3)]
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["0.safetensors", "1.safetensors"]
    save_pruned(small, None, tmp_path / "model")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model", attn_implementation="eager").eval()
    assert_close(logits(reloaded), logits(slice_model(shared_expert_model, masks)))


def least_squares_reference(
    W: torch.Tensor, keep: torch.Tensor, x: torch.Tensor, y: torch.Tensor, ridge: float
) -> torch.Tensor:
    """W_K + (y - W_K x) x^T (x x^T + lambda)^-1 in float64, with all tokens x (n, kept) and y (n, H)."""
    W, x, y = W.double()[:, keep], x.double(), y.double()
    gram = x.T @ x
    damped = gram + ridge * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
    return W + torch.linalg.solve(damped, (y - x @ W.T).T.matmul(x).T).T


def inputs_and_outputs(model, paths: list[str]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Inputs and outputs of modules for `IDS`, (tokens, size) each."""
    recorded, handles = {}, []
    for path in paths:

        def record(_module, inputs, output, path=path) -> None:
            recorded[path] = inputs[0].flatten(0, -2), output.flatten(0, -2)

        handles.append(model.get_submodule(path).register_forward_hook(record))
    logits(model)
    for handle in handles:
        handle.remove()
    return recorded


def test_least_squares_fits_each_ffn_to_its_dense_output(shared_expert_model):
    masks = random_masks(shared_expert_model)
    small = slice_model(shared_expert_model, masks)
    material = Material(
        shared_expert_model, masks, ridge=0.05, statistics=statistics_of(shared_expert_model, gram=True)
    )
    revise = RECOVERY["least_squares"].revise(material)
    for dense, block in zip(blocks_of(shared_expert_model), blocks_of(small), strict=True):
        revise(dense, block)
    for index in range(3):
        keep, path = masks.ffn[2 * index + 1], f"model.layers.{index}.mlp.shared_expert.down_proj"
        x, y = inputs_and_outputs(shared_expert_model, [path])[path]
        expected = least_squares_reference(shared_expert_model.get_submodule(path).weight, keep, x[:, keep], y, 0.05)
        recovered = small.get_submodule(path).weight.double()
        torch.testing.assert_close(recovered, expected, atol=1e-4 * float(expected.abs().max()), rtol=0)


@pytest.mark.parametrize("targets", ["mlp", "all"])
def test_a_student_trains_the_weights_of_each_ffn_once(targets, shared_expert_model):
    student = Student(copy.deepcopy(shared_expert_model), targets=targets)
    learned = [name for name in student.learned if "shared_expert_down_proj" in name]
    assert learned == [f"{layer}_mlp_shared_expert_down_proj_weight" for layer in range(3)]
    assert any("experts" in name for name in student.learned)
    student.to_plain_model()
    assert_close(logits(student.model), logits(shared_expert_model))
