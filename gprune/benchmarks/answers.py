"""Model for lm_eval that computes logits of answers only. It is imported when tasks are measured."""

from __future__ import annotations

import copy
import inspect
from collections import defaultdict
from typing import Any

import torch
import torch.nn.functional as F
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import normalize_gen_kwargs
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import LogitsProcessorList, PreTrainedModel, PreTrainedTokenizerBase

from gprune.errors import UserError, require_finite
from gprune.models.offload import device_of

# (texts, tokens of the context, tokens of the continuation); no texts if lm_eval has only tokens
Request = tuple[tuple[str, str] | None, list[int], list[int]]


class AnswerLM(HFLM):
    """lm_eval's `HFLM` for transformers models, without computing logits of contexts.

    Tokens, batches, log-likelihoods and generated texts are the same as with `HFLM`. Logits of contexts are not used,
    and are most of a forward pass for a large vocabulary: on a CPU, tasks on Gemma-3-270M (262,144 words) take between
    0.4 (SciQ, long contexts) and 0.95 (BLiMP, no contexts) of the time.

    Attributes:
        cut_prompts: prompts that were longer than the model's positions, of which the beginning was cut off.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int):
        # Copied, because HFLM sets the tokenizer's padding token.
        super().__init__(model, backend="causal", tokenizer=copy.deepcopy(tokenizer), batch_size=batch_size)
        self._device = device_of(model)  # of an offloaded model, where it computes
        self.cut_prompts: set[str] = set()
        if self.prefix_token_id is None:
            raise UserError("A task needs a tokenizer with BOS or EOS, which replaces an empty prompt.")

    def _loglikelihood_tokens(self, requests: list[Request], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Return (log-likelihood in nats, whether greedy decoding gives the text) for each continuation.

        Continuations with the same input, which differ only in their last token, share a row of the batch.
        """
        requests = [self._checked(request) for request in requests]
        requests_by_input = defaultdict(list)  # input tokens -> indices of requests
        for i, (_, context, continuation) in enumerate(requests):
            requests_by_input[*context, *continuation[:-1]].append(i)
        longest_first = sorted(requests_by_input, key=lambda tokens: (-len(tokens), tokens))
        answers: dict[int, tuple[float, bool]] = {}
        with tqdm(total=len(requests), disable=disable_tqdm, desc="Scoring choices") as bar:
            for start in range(0, len(longest_first), self.batch_size):
                batch = longest_first[start : start + self.batch_size]
                inputs = [torch.tensor(tokens[-self.max_length :]) for tokens in batch]
                row_and_request = [(row, i) for row, tokens in enumerate(batch) for i in requests_by_input[tokens]]
                # The first position whose logits a request of this batch needs
                first_position = min(len(inputs[row]) - len(requests[i][2]) for row, i in row_and_request)
                log_p = self._log_probabilities(pad_sequence(inputs, batch_first=True), first_position)
                for row, i in row_and_request:
                    continuation = torch.tensor(requests[i][2], device=log_p.device)
                    end = len(inputs[row]) - first_position
                    log_p_of_tokens = log_p[row, end - len(continuation) : end]
                    total = log_p_of_tokens.gather(1, continuation[:, None]).sum()
                    is_greedy = bool((log_p_of_tokens.argmax(1) == continuation).all())
                    answers[i] = float(total), is_greedy
                bar.update(len(row_and_request))
        return [answers[i] for i in range(len(requests))]

    def _checked(self, request: Request) -> Request:
        """Return a request with a context, and remember its prompt if it is too long.

        The context is empty if the prompt has only spaces, which lm_eval moves to the answer.
        """
        texts, context, continuation = request
        if not 0 < len(continuation) <= self.max_length:
            answer = f" in {texts[1][:40]!r}" if texts else ""
            limit = f"1 to {self.max_length:,} tokens, the positions of the model"
            raise UserError(f"An answer must have {limit}; got {len(continuation):,}{answer}.")
        context = context or [self.prefix_token_id]
        if texts and len(context) + len(continuation) - 1 > self.max_length:
            self.cut_prompts.add(texts[0])
        return texts, context, continuation

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Generate texts as `HFLM` does."""
        for request in requests:
            generated = normalize_gen_kwargs(request.args[1], self.max_gen_toks)["max_gen_toks"]
            if generated >= self.max_length:
                raise UserError(
                    f"Task '{request.task_name}' needs a model with more than {generated:,} positions, as it generates "
                    f"up to {generated:,} tokens; got a model with {self.max_length:,}."
                )
        return super().generate_until(requests, disable_tqdm=disable_tqdm)

    def tok_batch_encode(self, strings: list[str], *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Encode prompts of texts to generate, as `HFLM` does, and remember prompts that are too long."""
        limit = kwargs.get("left_truncate_len")
        self.cut_prompts |= {text for text in strings if limit and len(self.tok_encode(text)) > limit}
        return super().tok_batch_encode(strings, *args, **kwargs)

    def _log_probabilities(self, tokens: Tensor, first_position: int) -> Tensor:
        """Compute log-probabilities of next tokens at positions from `first_position` on."""
        self._check_tokens(tokens)
        # Indices make a contiguous copy. torch multiplies strided rows 70 times slower on a CPU in bfloat16.
        positions = torch.arange(first_position, tokens.shape[1], device=self.device)
        if "logits_to_keep" in inspect.signature(self.model.forward).parameters:
            logits = self.model(tokens.to(self.device), logits_to_keep=positions).logits
        else:  # a model with custom code
            logits = self.model(tokens.to(self.device)).logits[:, first_position:]
        return F.log_softmax(logits, -1, dtype=torch.float32)

    def _model_generate(self, context: Tensor, **options: Any) -> Tensor:
        """Generate tokens that follow a context."""
        self._check_tokens(context)
        processors = LogitsProcessorList([_require_finite_logits])
        return super()._model_generate(context, logits_processor=processors, **options)

    def _check_tokens(self, tokens: Tensor) -> None:
        """Raise UserError if a token has no embedding."""
        size = self.model.get_input_embeddings().num_embeddings
        largest = int(tokens.max())
        if largest >= size:
            raise UserError(f"Tokens must be less than {size:,}, the number of embeddings; got {largest}.")


def _require_finite_logits(_: Tensor, logits: Tensor) -> Tensor:
    """Return the logits (batch, vocabulary). Raise UserError if the largest one is NaN or infinite."""
    require_finite("logit came up in generation", logits.amax(-1))
    return logits
