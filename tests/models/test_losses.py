"""The chunked loss and its gradient against autograd through all logits."""

from __future__ import annotations

import pytest
import torch

from experiments.architectures import default_config
from gprune.discovery.tiny import shrunk
from gprune.models.families import decoder_layers
from gprune.models.losses import (
    CHUNK,
    LogitTransform,
    final_hidden,
    frozen_head_losses,
    next_token_losses,
    require_activation_gradients,
    rows_at_once,
    same_head,
)
from gprune.models.masks import gated
from gprune.models.products import CastWeights
from tests.world import by_key, make_tiny, make_tiny_llama, tiny_of, units_of_kind


def random_gates(dtype=torch.float32, seed: int = 3) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(48, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for _ in range(3)]


@pytest.fixture(params=[6, 20], ids=["one_chunk", "several_chunks"])
def tokens(request) -> torch.Tensor:
    batch = torch.randint(3, 128, (request.param, 32), generator=torch.Generator().manual_seed(1))
    assert (request.param * 31 > CHUNK) == (request.param == 20)
    return batch


def test_loss_and_gradient_of_a_head_with_bias_equal_cross_entropy():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(400, 16, generator=generator).requires_grad_()
    head, bias = torch.randn(50, 16, generator=generator), torch.randn(50, generator=generator)
    targets, weights = torch.randint(50, (400,), generator=generator), torch.rand(400, generator=generator)
    loss = (frozen_head_losses(hidden, head, bias, targets, LogitTransform()) * weights).sum()
    loss.backward()
    gradient, hidden.grad = hidden.grad, None
    nll = torch.nn.functional.cross_entropy(hidden @ head.T + bias, targets, reduction="none")
    (nll * weights).sum().backward()
    assert loss.item() == pytest.approx((nll * weights).sum().item(), rel=1e-5)
    torch.testing.assert_close(gradient, hidden.grad, atol=1e-5, rtol=1e-5)


def test_two_heads_are_the_same_if_weight_bias_and_scale_are_equal():
    def llama(*, weight=0.0, bias=None):
        model = make_tiny_llama(tie_word_embeddings=False)
        model.lm_head.weight.data += weight
        if bias is not None:
            model.lm_head.bias = torch.nn.Parameter(torch.full((128,), bias))
        return model

    plain, biased = llama(), llama(bias=0.5)
    assert same_head(plain, llama())
    assert same_head(biased, llama(bias=0.5))
    for model, other in ((plain, llama(weight=0.01)), (plain, biased), (biased, plain), (biased, llama(bias=0.6))):
        assert not same_head(model, other)
    granite = make_tiny("granite", logits_scaling=3.0)
    assert same_head(granite, make_tiny("granite", logits_scaling=3.0))
    assert not same_head(granite, make_tiny("granite", logits_scaling=5.0))


def test_loss_and_gradient_of_extreme_logits_are_finite():
    hidden = torch.tensor([[1.0]]).requires_grad_()
    head = torch.tensor([[1000.0], [-1000.0]])
    loss = frozen_head_losses(hidden, head, None, torch.tensor([1]), LogitTransform()).sum()
    loss.backward()
    # The logits are 1000 and -1000, so the probability of the target underflows.
    assert loss.item() == 2000.0
    assert float(hidden.grad) == 2000.0


def test_losses_of_bfloat16_models_are_float32(token_batch):
    losses = []
    for dtype in (torch.bfloat16, torch.float32):
        model, gates = make_tiny_llama().to(dtype), random_gates()
        with gated(model, by_key(gates)):
            losses.append(next_token_losses(model, token_batch).mean())
            losses[-1].backward()
        assert all(g.grad.dtype == torch.float32 and bool(torch.isfinite(g.grad).all()) for g in gates)
    assert losses[0].dtype == torch.float32
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=0.2)


@pytest.mark.parametrize("divergence", [False, True], ids=["cross_entropy", "kl"])
@pytest.mark.parametrize(("dtype", "tied"), [(torch.float32, True), (torch.float32, False), (torch.float64, True)])
def test_losses_and_gradients_equal_autograd_through_all_logits(dtype, tied, divergence, tokens):
    """Losses per window, and the gradient of their weighted sum with weights of both signs, against float64."""
    model, double = (make_tiny_llama(tie_word_embeddings=tied).to(t) for t in (dtype, torch.float64))
    weight = torch.linspace(-0.5, 1, len(tokens), dtype=torch.float64)
    with torch.no_grad():
        teacher = final_hidden(model, tokens) if divergence else None
        log_q = double(tokens).logits[:, :-1].log_softmax(-1)

    def reference() -> torch.Tensor:
        log_p = double(tokens).logits[:, :-1].log_softmax(-1)
        if divergence:
            return (log_q.exp() * (log_q - log_p)).sum(-1).mean(1)
        return -log_p.gather(-1, tokens[:, 1:, None])[..., 0].mean(1)

    def loss_and_gradient(lm, losses_of) -> tuple[torch.Tensor, torch.Tensor]:
        gates = random_gates(next(lm.parameters()).dtype)
        with gated(lm, by_key(gates)):
            losses = losses_of()
            (losses * weight.to(losses)).sum().backward()
        return losses.detach().double(), torch.cat([g.grad for g in gates]).double()

    losses, gradient = loss_and_gradient(model, lambda: next_token_losses(model, tokens, teacher=teacher))
    expected_losses, expected_gradient = loss_and_gradient(double, reference)
    assert expected_losses.abs().max() > 1e-3
    torch.testing.assert_close(losses, expected_losses, rtol=2e-5, atol=1e-6)
    assert expected_gradient.abs().max() > 1e-3
    assert (gradient - expected_gradient).abs().max() <= 1e-4 * expected_gradient.abs().max()


@pytest.mark.parametrize(("family", "overrides"), [("gemma2", {"final_logit_softcapping": 3.0}), ("granite", {})])
def test_gradients_include_the_softcap_and_the_scaling_of_logits(family, overrides):
    model = make_tiny(family, **overrides)
    ids = torch.randint(3, 128, (4, 24), generator=torch.Generator().manual_seed(1))

    def gradient(loss_of) -> torch.Tensor:
        """The gradient of a loss with respect to gates of neurons."""
        gates = [torch.linspace(0.2, 1, 48, requires_grad=True) for _ in range(3)]
        with gated(model, by_key(gates)):
            loss_of().backward()
        return torch.stack([gate.grad for gate in gates])

    log_q, teacher = model(ids).logits[:, :-1].log_softmax(-1), final_hidden(model, ids)  # of the dense model

    def divergence() -> torch.Tensor:
        return (log_q.exp() * (log_q - model(ids).logits[:, :-1].log_softmax(-1))).sum(-1).mean()

    # Cross-entropy without a teacher, and KL divergence with the dense model as the teacher.
    for reference, hidden in ((lambda: model(input_ids=ids, labels=ids).loss, None), (divergence, teacher)):
        expected = gradient(reference)
        assert float(expected.abs().max()) > 1e-4
        chunked = gradient(lambda hidden=hidden: next_token_losses(model, ids, teacher=hidden).mean())
        torch.testing.assert_close(chunked, expected, atol=1e-6, rtol=1e-3)


@pytest.mark.parametrize("divergence", [False, True], ids=["cross_entropy", "kl"])
def test_a_large_vocabulary_is_computed_in_fewer_rows_with_the_same_bits(divergence, monkeypatch):
    """262,147 words do not fit the cache in 32 rows, and are no multiple of a vector register."""
    generator = torch.Generator().manual_seed(2)
    vocabulary, tokens = 262_147, 37
    head, hidden, teacher = (torch.randn(n, 8, generator=generator) for n in (vocabulary, tokens, tokens))
    targets = teacher if divergence else torch.randint(vocabulary, (tokens,), generator=generator)

    def loss_and_gradient() -> torch.Tensor:
        states = hidden.clone().requires_grad_()
        losses = frozen_head_losses(states, head, None, targets, LogitTransform())
        losses.sum().backward()
        return torch.cat([losses.detach()[:, None], states.grad], 1)

    few_rows = loss_and_gradient()
    assert rows_at_once(head.device, vocabulary) == 5
    monkeypatch.setattr("gprune.models.losses.CACHED_LOGITS", 32 * vocabulary)
    assert rows_at_once(head.device, vocabulary) == 32
    torch.testing.assert_close(loss_and_gradient(), few_rows, rtol=0, atol=0)


@pytest.mark.parametrize("model_type", ["ctrl", "git"])
def test_gradients_of_activations_are_correct_if_the_model_changes_the_embeddings_in_place(model_type, token_batch):
    """CTRL scales the output of the embedding in place, and GIT adds positions. Weights stay frozen."""
    model = tiny_of(shrunk(default_config(model_type)))
    down = decoder_layers(model)[1].get_submodule(units_of_kind(model, "neurons")[1].reads)

    def gradient_at_output() -> torch.Tensor:
        gradients = []
        handle = down.register_forward_hook(lambda _m, _x, y: y.register_hook(gradients.append) and None)
        next_token_losses(model, token_batch).sum().backward()
        handle.remove()
        (gradient,) = gradients
        return gradient

    expected = gradient_at_output()  # with weights that require gradients, the embeddings are not a leaf
    model.requires_grad_(False).zero_grad()
    handle = require_activation_gradients(model)
    assert torch.equal(gradient_at_output(), expected)
    handle.remove()
    assert expected.abs().max() > 0
    assert all(parameter.grad is None for parameter in model.parameters())


# --- bfloat16 copies of frozen weights give the same bits as autocast


def step(model, ids, copies=None):
    """Losses of a pass under autocast, with bfloat16 copies if given, and the gradient of the last block's gates."""
    gate = torch.ones(model.config.intermediate_size, requires_grad=True)
    gates = [torch.ones_like(gate)] * (model.config.num_hidden_layers - 1) + [gate]
    with torch.autocast("cpu", torch.bfloat16), gated(model, by_key(gates)):
        if copies is None:
            losses = next_token_losses(model, ids)
        else:
            with copies.applied():
                losses = next_token_losses(model, ids)
    losses.mean().backward()  # outside of the context, with the tensors saved by the forward pass
    return losses.detach(), gate.grad


def test_bfloat16_copies_give_the_bits_of_autocast_and_are_made_once_unless_a_weight_changes(tiny_model):
    ids = torch.arange(24).view(2, 12)
    copies = CastWeights(tiny_model)
    by_autocast, first = step(tiny_model, ids), step(tiny_model, ids, copies)
    first_copies = {key: copy for key, (_, _, copy) in copies._copies.items()}
    second = step(tiny_model, ids, copies)
    for result in (first, second):
        assert all(torch.equal(a, b) for a, b in zip(by_autocast, result, strict=True))
    assert all(copies._copies[key][2] is copy for key, copy in first_copies.items())
    assert first_copies
    assert {p.dtype for p in tiny_model.parameters()} == {torch.float32}
    tiny_model.get_output_embeddings().weight.mul_(2)
    after, _ = step(tiny_model, ids, copies)
    assert torch.equal(after, step(tiny_model, ids)[0])
    assert not torch.equal(after, second[0])


def test_trainable_weights_and_float32_passes_use_no_copies(tiny_model):
    copies = CastWeights(tiny_model)
    weight = tiny_model.get_output_embeddings().weight
    with copies.applied():
        assert tiny_model.get_output_embeddings().weight is weight
    weight.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16), copies.applied():
        assert tiny_model.get_output_embeddings().weight is weight
        assert tiny_model.get_decoder().layers[0].mlp.down_proj.weight.dtype == torch.bfloat16


def test_an_exception_restores_the_float32_weights(tiny_model):
    with pytest.raises(KeyError), torch.autocast("cpu", torch.bfloat16), CastWeights(tiny_model).applied():
        raise KeyError
    assert tiny_model.get_decoder().layers[0].mlp.down_proj.weight.dtype == torch.float32
