"""Functions that users register: invalid return values are refused, and harmless side effects do not matter."""

from __future__ import annotations

import pytest
import torch

from gprune.errors import UserError
from gprune.importance import IMPORTANCE, metric
from gprune.importance.scores import score_units
from gprune.method.recover import tune
from gprune.method.run import TokenMeter
from gprune.models.families import decoder_layers
from gprune.models.masks import Masks
from gprune.models.surgery import slice_model
from gprune.models.units import units_of
from gprune.partition.modules import ranks_in_modules
from gprune.recoveries import RECOVERY, Material, Recovery, recoveries_of, recovery
from gprune.sparsity.allocation import ALLOCATION, allocate, allocation, checked_masks, module_thresholds
from gprune.sparsity.budget import budget_of
from gprune.units.structure import of_kind
from tests.calibration.test_collector import batches
from tests.world import by_key, collect, make_tiny_llama, restored, some_masks


@pytest.fixture(scope="module")
def tiny():
    """Return a model, its statistics, the scores of units, and a budget of half of the FFN."""
    model = make_tiny_llama()
    tokens = torch.randint(3, 128, (4, 16), generator=torch.Generator().manual_seed(1))
    statistics = collect(model, batches(tokens, 2))
    budget = budget_of(units_of(model), 0.5, scope="ffn")
    return model, statistics, score_units("act_norm", model, statistics), budget


@pytest.fixture(autouse=True)
def _restore_registries():
    with restored(IMPORTANCE, ALLOCATION, RECOVERY):
        yield


# --- kinds of functions ---------------------------------------------------------------------------------------------
# Each function registers a function of one kind, which returns `spoil(valid tensor, an input)`, and returns the tensor
# that gprune makes with it.


def by_metric(tiny, spoil):
    model, statistics, *_ = tiny
    metric("mine")(lambda w, m, g: spoil(m.mean_sq.sqrt(), m.sum_sq))
    return torch.cat(of_kind(score_units("mine", model, statistics), "neurons"))


def by_margins(tiny, spoil):
    model, statistics, scores, budget = tiny
    allocation("mine")(lambda s, st, b, budget: {key: spoil(f.clone(), f) for key, f in s.items()})
    return torch.cat(allocate("mine", scores, statistics, decoder_layers(model), budget).ffn)


def by_thresholds(tiny, spoil):
    labels = [torch.arange(8) % 2] * 2
    p = by_key([torch.linspace(0.1, 0.9, 8).double()] * 2, [torch.tensor([0.25, 0.75]).double()] * 2)
    ranks = ranks_in_modules(p, labels)

    @allocation("mine", modules=True)
    def mine(masks, ranks):
        return by_key([spoil(torch.arange(2.0), ranks.p["neurons.0"])] * 2, [torch.zeros(1)] * 2)

    masks = Masks.of_blocks([torch.ones(8, dtype=torch.bool)] * 2, [torch.ones(2, dtype=torch.bool)] * 2)
    return torch.cat(of_kind(module_thresholds("mine", masks, ranks), "neurons"))


def by_projection(tiny, spoil):
    model, statistics, *_ = tiny
    recovery("mine")(lambda w, k, m, r: (spoil(w[:, k], w), None))
    down, keep = model.model.layers[0].mlp.down_proj.weight, torch.arange(48) % 2 == 0
    return RECOVERY["mine"].solve(down, keep, statistics.channels["neurons.0"].total)[0]


def by_model(tiny, spoil):
    model = tiny[0]

    class Mine(Recovery):
        def tune(self, material, pruned):
            weight = pruned.model.layers[0].mlp.down_proj
            weight.weight = torch.nn.Parameter(spoil(weight.weight.detach()), requires_grad=False)
            return pruned

    recovery("mine")(Mine)
    masks, recoveries = some_masks(model, attention=False), recoveries_of("mine", {})
    small = tune(recoveries, Material(model, masks), slice_model(model, masks), meter=TokenMeter(), seed=0)
    return small.model.layers[0].mlp.down_proj.weight


KINDS = {  # beginning of the message about an invalid value
    "Importance metric 'mine' must give scores": by_metric,
    "Allocation 'mine' must give Masks, or margins": by_margins,
    "Allocation 'mine' must give thresholds": by_thresholds,
    "Recovery 'mine' must give a weight": by_projection,
    "Recovery 'mine' must give model.layers.0.mlp.down_proj.weight": by_model,
}
INVALID = {  # what makes a value invalid, and words of the message
    "complex": (lambda t: t.to(torch.complex64), "complex64"),
    "quantised": (lambda t: t.to(torch.float8_e4m3fn), "float8_e4m3fn"),
    "bool": (lambda t: t > 0, "bool"),
    "nan": (lambda t: t * float("nan"), "that are not finite"),
    "inf": (lambda t: t.index_fill(0, torch.tensor([1]), float("inf")), "that are not finite"),
    "one dimension too many": (lambda t: t[None], r"got \(1, "),
    "one element too few": (lambda t: t[:-1], r"got \("),
    "an ndarray": (lambda t: t.numpy(), "got ndarray"),
    "None": (lambda t: None, "got NoneType"),
}
INVALID_IN_A_MODEL = {"nan", "inf", "complex"}  # parameters of a model may have any shape


def applies(kind: str, invalid: str) -> bool:
    """Return whether a kind of function is refused for this value.

    A weight of a projection that is not finite is detected later, in the model.
    """
    if KINDS[kind] is by_model:
        return invalid in INVALID_IN_A_MODEL
    return KINDS[kind] is not by_projection or invalid not in ("nan", "inf")


@pytest.mark.parametrize(
    ("kind", "invalid"), [(kind, invalid) for kind in KINDS for invalid in INVALID if applies(kind, invalid)]
)
def test_an_invalid_return_value_is_refused_with_the_name_of_its_function(kind, invalid, tiny):
    spoil, message = INVALID[invalid]
    with pytest.raises(UserError, match=rf"^{kind}.*{message}[^\n]*\.$"):
        KINDS[kind](tiny, lambda t, *_: spoil(t))


def zero_input(t, input_tensor):
    input_tensor.mul_(0)
    return t


HARMLESS = {
    "with a graph": lambda t, *_: t.clone().requires_grad_() * 1,
    "in another dtype": lambda t, *_: t.double(),
    "writes into its input": zero_input,
}


@pytest.mark.parametrize(
    ("kind", "harmless"),
    [
        (kind, harmless)
        for kind in KINDS
        for harmless in HARMLESS
        if KINDS[kind] is not by_model or harmless != "writes into its input"  # the inputs of `tune` are models
    ],
)
def test_harmless_side_effects_do_not_change_results(kind, harmless, tiny):
    result_of = KINDS[kind]
    expected = result_of(tiny, lambda t, *_: t)
    with torch.enable_grad():
        result = result_of(tiny, HARMLESS[harmless])
    assert torch.equal(result, expected.to(result.dtype))
    assert not result.requires_grad
    assert torch.equal(result_of(tiny, lambda t, *_: t), expected)  # the inputs of the next call are unchanged


def test_a_metric_can_return_integers():
    @metric("integers")
    def integers(weights, moments, generator):
        return torch.arange(weights.output.shape[1])

    model = make_tiny_llama()
    statistics = collect(model, batches(torch.randint(3, 128, (2, 8)), 2))
    assert score_units("integers", model, statistics)["neurons.0"].tolist() == list(range(48))


@pytest.mark.parametrize(
    "change",
    [lambda valid: None, lambda valid: [*valid.values()], lambda valid: {"neurons.0": valid["neurons.0"]}],
)
def test_margins_with_the_wrong_structure_are_refused(change, tiny):
    model, statistics, scores, budget = tiny
    allocation("mine")(lambda s, *_: change(s))
    with pytest.raises(UserError, match=r"^Allocation 'mine'.* Masks, or margins .* of 3 keys .* got "):
        allocate("mine", scores, statistics, decoder_layers(model), budget)


MASKS = {  # a change of valid masks, and words of the message
    "one neuron more": (lambda m: Masks(m | {"neurons.0": with_one_more(m["neurons.0"])}), "on budget"),
    "nothing removed": (lambda m: Masks({key: torch.ones_like(keep) for key, keep in m.items()}), "on budget.*; got 0"),
    "numbers": (lambda m: Masks({key: keep.float() for key, keep in m.items()}), "of bool; got .2,. of float32"),
    "too few": (lambda m: Masks.of_blocks([f[1:] for f in m.ffn], m.attention), "got .47,. of bool"),
    "one block fewer": (
        lambda m: Masks.of_blocks(m.ffn[1:], m.attention[1:]),
        "6 keys of units, .*; got none for 'kv_groups.2'",
    ),
}


def with_one_more(keep):
    """Return the mask with the first removed neuron kept."""
    return keep | (torch.arange(len(keep)) == int((~keep).nonzero()[0]))


@pytest.mark.parametrize("row", MASKS)
def test_masks_of_a_registered_allocation_must_be_valid_and_on_budget(row, tiny):
    model, statistics, scores, budget = tiny
    valid = allocate("uniform", scores, statistics, decoder_layers(model), budget)
    change, message = MASKS[row]
    result = valid
    allocation("mine")(lambda *_: result)
    assert allocate("mine", scores, statistics, decoder_layers(model), budget) == valid
    result = change(valid)
    with pytest.raises(UserError, match=f"^Allocation 'mine'.* {message}"):
        allocate("mine", scores, statistics, decoder_layers(model), budget)


def test_a_list_instead_of_masks_is_refused(tiny):
    """As the result of a registered learner. An allocation that returns lists returns margins."""
    with pytest.raises(UserError, match=r"^Allocation 'mine' must return Masks; got list\.$"):
        checked_masks(ALLOCATION, "mine", [], tiny[3])
