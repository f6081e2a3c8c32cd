"""Perplexity and KL divergence of a model with another head or a padded vocabulary, against float64."""

from __future__ import annotations

import pytest
import torch

from gprune.corpora.windows import Windows
from gprune.errors import UserError
from gprune.evaluation.perplexity import perplexity, perplexity_from_logits
from tests.world import make_tiny_llama


def float64_log_probabilities(model, tokens, vocab_size=None):
    """(B, T - 1, V) log-probabilities over the first `vocab_size` tokens."""
    return model(tokens).logits[:, :-1, :vocab_size].double().log_softmax(-1)


@pytest.fixture
def other():
    """A model whose weights all differ from those of `tiny_model`, including the head."""
    model = make_tiny_llama(tie_word_embeddings=False)
    generator = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.eval().requires_grad_(False)


def test_kl_and_agreement_of_models_with_different_heads_equal_float64(tiny_model, other, token_batch):
    log_dense, log_other = (float64_log_probabilities(model, token_batch) for model in (tiny_model, other))
    kl = (log_dense.exp() * (log_dense - log_other)).sum(-1)
    same = log_dense.argmax(-1) == log_other.argmax(-1)
    result = perplexity_from_logits(other, Windows("demo", "test", token_batch), tiny_model)
    assert result.kl == pytest.approx(float(kl.mean()), rel=1e-4)
    assert result.window_kl == pytest.approx(kl.sum(-1).tolist(), rel=1e-4)
    assert result.window_agreement == same.double().sum(-1).tolist()
    assert 0 < result.agreement < 1
    assert kl.mean() > 0.01


def test_perplexity_from_logits_equals_perplexity(other, token_batch):
    windows, progress_calls = Windows("demo", "test", token_batch), []
    expected = perplexity(other, windows)
    of_logits = perplexity_from_logits(other, windows, progress=progress_calls.append)
    assert of_logits.window_nll == pytest.approx(expected.window_nll, rel=1e-6)
    assert (of_logits.perplexity, of_logits.tokens) == (pytest.approx(expected.perplexity, rel=1e-6), expected.tokens)
    assert of_logits.kl is None
    assert progress_calls == [token_batch.shape[1]] * len(token_batch)


def test_a_padded_vocabulary_is_compared_on_the_tokens_of_both_models(tiny_model, token_batch):
    padded = make_tiny_llama(vocab_size=tiny_model.config.vocab_size + 8, tie_word_embeddings=True)
    common, windows = tiny_model.config.vocab_size, Windows("demo", "test", token_batch)
    log_dense, log_padded = (float64_log_probabilities(model, token_batch, common) for model in (tiny_model, padded))
    result = perplexity_from_logits(padded, windows, tiny_model)
    kl = (log_dense.exp() * (log_dense - log_padded)).sum(-1)
    assert result.kl == pytest.approx(float(kl.mean()), rel=1e-4)
    assert result.nll == pytest.approx(perplexity(padded, windows).nll, rel=1e-6)  # over the whole padded vocabulary


@pytest.mark.parametrize("masked", ["dense", "both"])
def test_tokens_that_the_dense_model_excludes_add_nothing_to_kl(masked, tiny_model, other, token_batch):
    """A model may give logits of -inf, for instance for tokens that pad the vocabulary."""
    excluded = sorted(set(range(tiny_model.config.vocab_size)) - set(token_batch.flatten().tolist()))[:3]

    def exclude(module, args, logits):
        return logits.index_fill(-1, torch.tensor(excluded), -torch.inf)

    for model in [tiny_model, other][: 1 if masked == "dense" else 2]:
        model.lm_head.register_forward_hook(exclude)
    log_dense, log_other = (float64_log_probabilities(model, token_batch) for model in (tiny_model, other))
    kl = (log_dense.exp() * (log_dense - log_other)).nan_to_num(0).sum(-1)
    result = perplexity_from_logits(other, Windows("demo", "test", token_batch), tiny_model)
    assert result.window_kl == pytest.approx(kl.sum(-1).tolist(), rel=1e-4)


def test_a_kl_that_is_not_finite_raises_a_user_error(tiny_model, other, token_batch):
    """The model excludes a token that the dense model does not exclude."""
    excluded = next(iter(set(range(tiny_model.config.vocab_size)) - set(token_batch.flatten().tolist())))
    other.lm_head.register_forward_hook(
        lambda module, args, logits: logits.index_fill(-1, torch.tensor([excluded]), -torch.inf)
    )
    with pytest.raises(UserError, match="non-finite KL divergence"):
        perplexity_from_logits(other, Windows("demo", "test", token_batch), tiny_model)
