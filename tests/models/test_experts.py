"""Whole experts: statistics against a loop in float64, masks, slicing and folders, on tiny mixtures of many types."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import gprune
from experiments.architectures import example
from gprune.calibration.statistics import CorpusStatistics, pool_statistics
from gprune.errors import UserError
from gprune.importance.metrics import EXPERT_IMPORTANCE
from gprune.importance.scores import Scores, idle_experts, score_experts, score_units
from gprune.models.agreement import random_masks
from gprune.models.experts import router_needs
from gprune.models.families import decoder_layers
from gprune.models.masks import Masks, masked
from gprune.models.surgery import slice_model
from gprune.models.units import units_of
from gprune.sparsity.budget import budget_of
from gprune.units.structure import Units, of_kind
from tests.world import MIXTURES, collect, hooks_of, masks_without, mixture, restored, units_of_kind

# Types whose routers divide weights by their sum only with a setting.
RENORMALISING = {"qwen3_moe": {"norm_topk_prob": True}, "olmoe": {"norm_topk_prob": True}}


def tokens(seed: int = 1) -> Tensor:
    return torch.randint(3, 90, (4, 24), generator=torch.Generator().manual_seed(seed))


def half_of_the_experts(model: PreTrainedModel) -> Masks:
    """Return masks that remove half of the experts of each layer, and nothing else."""
    some, masks = random_masks(model, scope="experts"), masks_without(model)
    for u in neurons_of_experts(model):
        masks[u.key] = some[u.key].view(u.rows, -1).any(1).repeat_interleave(u.count)
    return masks


def neurons_of_experts(model: PreTrainedModel) -> list[Units]:
    """Return the neurons of experts, one set per layer with experts."""
    return [u for u in units_of_kind(model, "neurons") if u.inside]


def stack_of(model: PreTrainedModel, u: Units) -> nn.Module:
    """Return the module of experts that reads these neurons."""
    return decoder_layers(model)[u.layer].get_submodule(u.reads)


# --- statistics and scores


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_statistics_of_experts_equal_those_of_activations_computed_expert_by_expert(name):
    """Experts of gpt_oss have biases, and interleave gate and up."""
    model, ids, calls = mixture(name), tokens(), []
    for u in neurons_of_experts(model):
        stack_of(model, u).register_forward_pre_hook(lambda m, x: calls.append((m, x[0].flatten(0, -2), x[1])))
    statistics = collect(model, [{"input_ids": ids, "index": torch.arange(4)}], gram=True)
    for (module, hidden, routed), channel in zip(calls, of_kind(statistics.channels, "neurons"), strict=True):
        for expert in range(8):
            chosen = (routed == expert).any(-1).flatten().nonzero()[:, 0]
            if name == "gpt_oss":
                gate_up = hidden[chosen] @ module.gate_up_proj[expert] + module.gate_up_proj_bias[expert]
                x = module._apply_gate(gate_up).double()
            else:
                gate, up = (hidden[chosen] @ module.gate_up_proj[expert].T).double().chunk(2, -1)
                x = module.act_fn(gate) * up
            for half in (0, 1):  # windows alternate between halves
                of_half, moments = x[chosen // 24 % 2 == half], channel.halves[half].of_expert(expert, 8)
                assert (moments.count == len(of_half)).all()
                torch.testing.assert_close(moments.sum, of_half.sum(0), rtol=1e-4, atol=1e-4)
                torch.testing.assert_close(moments.sum_sq, of_half.square().sum(0), rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(channel.gram[expert].double(), x.T @ x, rtol=1e-3, atol=1e-3)


def test_an_expert_without_tokens_is_ranked_by_an_activation_free_metric():
    model, ids = mixture("mixtral"), tokens()
    gate = decoder_layers(model)[0].mlp.gate

    def constant_routing(_module, _inputs, output):
        return output[0], output[1], torch.tensor([0, 1]).expand_as(output[2])

    with gate.register_forward_hook(constant_routing):
        statistics = collect(model, [{"input_ids": ids, "index": torch.arange(4)}])
    assert statistics.channels["neurons.0"].total.count.view(8, -1)[:, 0].tolist() == [ids.numel()] * 2 + [0] * 6
    scores, activation_free = (
        score_units(metric, model, statistics)["neurons.0"].view(8, -1) for metric in ("wanda_sp", "magnitude")
    )
    # Idle experts have the order of the other metric, and the mean distribution of the experts with tokens.
    mean_of_busy_experts = scores[:2].sort(1).values.mean(0)
    for expert in range(2, 8):
        assert torch.equal(scores[expert].argsort(), activation_free[expert].argsort())
        torch.testing.assert_close(scores[expert].sort().values, mean_of_busy_experts)
    assert not torch.equal(scores[0].argsort(), activation_free[0].argsort())


def reference_routing(model: PreTrainedModel, ids: Tensor) -> list[Tensor]:
    """Return the sums of `Routing`, (4, E), of each mixture by a loop over tokens and chosen experts, in float64.

    The inputs of experts come from forward hooks. The output of an expert is that of the stack for one token that is
    sent to this expert alone, with weight 1.
    """
    found = []
    for u in neurons_of_experts(model):
        stack = stack_of(model, u)
        calls: list[tuple] = []
        handle = stack.register_forward_pre_hook(lambda _m, args, calls=calls: calls.append(args))
        model(ids, use_cache=False)
        handle.remove()
        ((hidden, chosen, weights),) = calls
        sums = torch.zeros(4, u.rows, dtype=torch.float64)
        for x, experts, of_experts in zip(hidden.flatten(0, -2), chosen, weights, strict=True):
            for expert, weight in zip(experts, of_experts, strict=True):
                y = stack(x[None], expert.view(1, 1), torch.ones_like(weight).view(1, 1))
                norm = y.double().square().sum().sqrt()
                sums[:, expert] += torch.stack([torch.ones_like(norm), weight.double(), norm, weight.double() * norm])
        found.append(sums)
    return found


@pytest.mark.parametrize("name", MIXTURES)
def test_routing_and_reap_equal_a_loop_over_tokens_and_experts_in_float64(name):
    model, ids = mixture(name, **RENORMALISING.get(name, {})).double(), tokens()
    statistics = collect_routing(model, ids)
    scores = score_experts("reap", model, statistics)
    assert hooks_of(model) == 0
    for u, expected in zip(neurons_of_experts(model), reference_routing(model, ids), strict=True):
        routing = statistics.channels[u.key].routing
        torch.testing.assert_close(routing, expected, rtol=1e-6, atol=1e-9)
        reap = expected[3] / expected[0].clamp_min(1)
        torch.testing.assert_close(scores[u.inside], reap.where(expected[0] > 0, -torch.inf))


def collect_routing(model: PreTrainedModel, ids: Tensor, weight: Tensor | None = None) -> CorpusStatistics:
    batch = {"input_ids": ids, "index": torch.arange(len(ids))} | ({} if weight is None else {"weight": weight})
    return collect(model, [batch], routing=True)


def test_routing_ignores_padded_windows_is_pooled_and_does_not_change_other_statistics():
    model, ids = mixture("mixtral"), tokens()
    counted = collect_routing(model, ids, torch.tensor([1, 0, 1, 0]))
    alone = collect_routing(model, ids[[0, 2]])
    both = pool_statistics([alone, collect_routing(model, ids[[1, 3]])])
    together = collect_routing(model, ids)
    for key in (f"neurons.{index}" for index in range(3)):
        texts = counted, alone, both, together
        of_counted, of_alone, of_both, of_together = (text.channels[key].routing for text in texts)
        torch.testing.assert_close(of_counted, of_alone, rtol=1e-6, atol=0)
        torch.testing.assert_close(of_both, of_together, rtol=1e-6, atol=0)
        assert float(of_together[0].sum()) == 2 * ids.numel()  # top-2
    flat, plain = together.tensors(), collect(model, [{"input_ids": ids, "index": torch.arange(4)}]).tensors()
    assert all(torch.equal(flat[name], plain[name]) for name in plain)
    assert flat.keys() - plain.keys() == {f"neurons.{index}.routing" for index in range(3)}
    read = CorpusStatistics.from_tensors(flat)
    assert torch.equal(read.channels["neurons.2"].routing, together.channels["neurons.2"].routing)


def test_expert_metrics_equal_their_formulas_and_scores_of_a_registered_one_are_checked():
    model, ids = mixture("mixtral"), tokens()
    statistics = collect_routing(model, ids)
    sums = statistics.channels["neurons.1"].routing
    with restored(EXPERT_IMPORTANCE):

        @gprune.expert_metric("energy")
        def energy(weights, routing, generator):
            assert weights.output.shape == (48, 8 * 64)
            assert weights.of_expert(3, 8).output.shape == (48, 64)
            return routing.weight * weights.output.unflatten(1, (8, 64)).square().sum((0, 2))

        def scores(name: str, seed: int = 0) -> Tensor:
            return score_experts(name, model, statistics, seed=seed)["experts.1"]

        assert torch.equal(scores("frequency"), sums[0])
        torch.testing.assert_close(scores("output_norm"), sums[2] / sums[0])
        down = model.model.layers[1].mlp.experts.down_proj
        torch.testing.assert_close(scores("energy"), sums[1] * down.double().square().sum((1, 2)), rtol=1e-5, atol=0)
        assert torch.equal(scores("random"), scores("random"))
        assert not torch.equal(scores("random"), scores("random", seed=1))

        @gprune.expert_metric("wrong")
        def wrong(weights, routing, generator):
            return routing.count[:3]

        with pytest.raises(UserError, match=r"Expert metric 'wrong' must give scores \(8,\) .* got \(3,\)"):
            scores("wrong")


@pytest.mark.parametrize("metric", ["reap", "negative"])
def test_a_ranking_of_all_layers_removes_experts_without_tokens_first(metric):
    model, ids = mixture("gpt_oss"), tokens()
    model.model.layers[1].mlp.router.bias[[2, 5]] = -1e4
    for layer in model.model.layers:  # scores far below 1
        layer.mlp.experts.down_proj *= 1e-3
        layer.mlp.experts.down_proj_bias *= 1e-3
    units, statistics = units_of(model), collect_routing(model, ids)
    routed = of_kind(statistics.channels, "neurons")
    idle = {index: (of_block.routing[0] == 0).nonzero()[:, 0].tolist() for index, of_block in enumerate(routed)}
    idle = {index: experts for index, experts in idle.items() if experts}
    number = sum(map(len, idle.values()))
    budget = budget_of(units, (number - 0.5) / 24, scope="experts", uniform_experts=False)
    with restored(EXPERT_IMPORTANCE):
        gprune.expert_metric("negative")(lambda weights, routing, generator: -routing.count)
        scores = score_units("magnitude", model, statistics)
        budget = budget.ranked_by(Scores(scores, experts=score_experts(metric, model, statistics)))
    assert idle[1] == [2, 5]
    assert "layer 1: 2, 5" in idle_experts(units, [statistics])
    assert budget.removed_experts == idle


# --- masks and slicing


def choice_without(router: nn.Module, name: str, logits: Tensor, removed: list[int]) -> tuple[Tensor, Tensor]:
    """Return weights and numbers of the experts that a router of E = 8 experts chooses without some, each (n, 2).

    Logits (n, E) of removed experts, or their scores behind the sigmoid and the correction bias, are -inf.
    """
    if name == "deepseek_v3":
        scores = logits.sigmoid()
        of_choice = scores + router.e_score_correction_bias
        of_choice[:, removed] = -torch.inf
        best_group = of_choice.view(-1, 2, 4).topk(2).values.sum(2).argmax(1)
        of_choice[(torch.arange(8) // 4)[None] != best_group[:, None]] = -torch.inf
        numbers = of_choice.topk(2).indices
        weights = scores.gather(1, numbers)
        return weights / weights.sum(1, keepdim=True) * router.routed_scaling_factor, numbers
    logits = logits.clone()
    logits[:, removed] = -torch.inf
    if name == "gpt_oss":
        best = logits.topk(2)
        return best.values.softmax(1), best.indices
    weights, numbers = logits.softmax(1).topk(2)
    return weights / weights.sum(1, keepdim=True) if router.norm_topk_prob else weights, numbers


@pytest.mark.parametrize(
    ("name", "settings", "removed"),
    [
        ("qwen3_moe", {"norm_topk_prob": False}, [0, 3, 4]),
        ("qwen3_moe", {"norm_topk_prob": True}, [0, 3, 4]),
        ("gpt_oss", {}, [0, 3, 4]),
        ("deepseek_v3", {"norm_topk_prob": True}, [1, 6]),  # one of each group
    ],
)
def test_masked_and_sliced_models_equal_one_whose_router_logits_of_removed_experts_are_minus_infinity(
    name, settings, removed
):
    model, ids = mixture(name, **settings), tokens()
    masks, handles = half_of_the_experts(model), []
    for u in neurons_of_experts(model):
        kept = ~torch.isin(torch.arange(8), torch.tensor(removed))
        masks[u.key] = kept.repeat_interleave(u.count)
        mlp = decoder_layers(model)[u.layer].mlp
        router = mlp.router if name == "gpt_oss" else mlp.gate

        def without(router: nn.Module, _inputs: tuple, output: tuple) -> tuple:
            return output[0], *choice_without(router, name, output[0], removed)

        handles.append(router.register_forward_hook(without))
    expected = model(ids, use_cache=False).logits
    for handle in handles:
        handle.remove()
    assert (expected - model(ids, use_cache=False).logits).abs().max() > 1e-2 * expected.abs().max()
    with masked(model, masks):
        torch.testing.assert_close(model(ids, use_cache=False).logits, expected, rtol=1e-5, atol=1e-5)
    sliced = slice_model(model, masks)
    torch.testing.assert_close(sliced(ids, use_cache=False).logits, expected, rtol=1e-5, atol=1e-5)


EQUAL_IN_GROUPS = r"must be at least 2 in each of 2 groups, the same number; got "


@pytest.mark.parametrize(
    ("name", "kept", "message"),
    [
        ("mixtral", [0], r"Experts of block 0 \(model type 'mixtral'\) must be at least 2; got 1"),
        ("deepseek_v3", [0, 1, 2, 3], EQUAL_IN_GROUPS + "4, 0"),
        ("deepseek_v3", [0, 1, 2, 4, 5], EQUAL_IN_GROUPS + "3, 2"),
        ("deepseek_v3", [0, 4], EQUAL_IN_GROUPS + "1, 1"),
        ("llama4_text", [0, 1], r"'llama4_text'\) cannot be removed as a whole: .*not called with numbers"),
    ],
)
def test_too_few_experts_unequal_groups_and_types_with_another_router_are_refused(name, kept, message):
    model = mixture(name) if name in MIXTURES else example(name)
    u = neurons_of_experts(model)[0]
    masks = masks_without(model)
    masks[u.key] = torch.isin(torch.arange(u.rows), torch.tensor(kept)).repeat_interleave(u.count)
    with pytest.raises(UserError, match=message):
        slice_model(model, masks)
    masks[u.key] = torch.arange(u.size) > 0  # another width of the first expert
    with pytest.raises(UserError, match=rf"Masks\['{u.key}'\] must keep equally many neurons of every expert"):
        slice_model(model, masks)


def test_routers_that_choose_all_experts_or_an_unknown_number_are_refused_with_the_reason():
    model = mixture("mixtral", num_experts_per_tok=8)
    assert router_needs(8, model.config, "")[2] == "its router chooses all 8 experts"
    vars(model.config)["num_experts_per_tok"] = None  # the class would refuse it
    reason = "its configuration does not tell how many experts a token needs"
    assert router_needs(8, model.config, "")[2] == reason


def test_gradients_pass_routers_without_the_removed_experts():
    model, ids = mixture("mixtral"), tokens()
    pruned, gradients = slice_model(model, half_of_the_experts(model)), []
    for computing in (model, pruned):
        x = computing.get_input_embeddings()(ids).detach().requires_grad_()
        with masked(model, half_of_the_experts(model)) if computing is model else torch.enable_grad():
            computing(inputs_embeds=x, use_cache=False).logits.square().mean().backward()
        gradients.append(x.grad)
    torch.testing.assert_close(*gradients)


def test_an_exception_in_a_masked_forward_pass_restores_the_router():
    model, ids = mixture("deepseek_v3"), tokens()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with masked(model, half_of_the_experts(model)), pytest.raises(IndexError):
        model(torch.full((1, 4), 999))
    handle = model.model.layers[2].mlp.experts.register_forward_pre_hook(lambda *_: 1 / 0)
    with masked(model, half_of_the_experts(model)), pytest.raises(ZeroDivisionError):
        model(ids)
    handle.remove()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.model.layers[2].mlp.gate.num_experts == 8
