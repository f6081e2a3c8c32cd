"""Model for lm_eval that computes logits of answers only. It is imported when tasks are measured."""

from __future__ import annotations

import copy
import inspect
from collections import defaultdict
from typing import Any

import torch
import torch.nn.functional as F
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import LogitsProcessorList, PreTrainedModel, PreTrainedTokenizerBase

from gprune.errors import UserError, require_finite

Request = tuple[tuple[str, str], list[int], list[int]]  # (texts, tokens of the context, tokens of the continuation)


class AnswerLM(HFLM):
    """lm_eval's `HFLM` for transformers models, without computing logits of contexts.

    Tokens, batches, log-likelihoods and generated texts are the same as with `HFLM`. Logits of contexts are not used,
    and are most of a forward pass for a large vocabulary: tasks on Gemma-3-270M (262,144 words) take 0.6 of the time.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int):
        # Copied, because HFLM sets the tokenizer's padding token.
        super().__init__(model, backend="causal", tokenizer=copy.deepcopy(tokenizer), batch_size=batch_size)

    def _loglikelihood_tokens(self, requests: list[Request], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Return (log-likelihood in nats, whether greedy decoding gives the text) for each continuation."""
        same_input = defaultdict(list)  # continuations that differ only in their last token need one pass
        for i, (_, context, continuation) in enumerate(requests):
            same_input[*context, *continuation[:-1]].append(i)
        longest_first = sorted(same_input, key=lambda tokens: (-len(tokens), tokens))
        answers: dict[int, tuple[float, bool]] = {}
        with tqdm(total=len(requests), disable=disable_tqdm, desc="Scoring choices") as bar:
            for start in range(0, len(longest_first), self.batch_size):
                batch = longest_first[start : start + self.batch_size]
                inputs = [torch.tensor(tokens[-self.max_length :]) for tokens in batch]
                asked = [(row, i) for row, tokens in enumerate(batch) for i in same_input[tokens]]
                first = min(len(inputs[row]) - len(requests[i][2]) for row, i in asked)
                log_p = self._log_probabilities(pad_sequence(inputs, batch_first=True), first)
                for row, i in asked:
                    continuation, end = torch.tensor(requests[i][2], device=log_p.device), len(inputs[row]) - first
                    own = log_p[row, end - len(continuation) : end]
                    total = own.gather(1, continuation[:, None]).sum()
                    answers[i] = float(total), bool((own.argmax(1) == continuation).all())
                bar.update(len(asked))
        return [answers[i] for i in range(len(requests))]

    def _log_probabilities(self, tokens: Tensor, first: int) -> Tensor:
        """Log-probabilities of next tokens at positions from `first` on, (batch, length - first, vocabulary) float32.

        Args:
            tokens: (batch, length) int64, padded on the right, which does not affect earlier positions.
            first: the first position.
        """
        self._check(tokens)
        # Indices make a contiguous copy. torch multiplies strided rows 70 times slower on a CPU in bfloat16.
        positions = torch.arange(first, tokens.shape[1], device=self.model.device)
        if "logits_to_keep" in inspect.signature(self.model.forward).parameters:
            logits = self.model(tokens.to(self.model.device), logits_to_keep=positions).logits
        else:  # a model with custom code
            logits = self.model(tokens.to(self.model.device)).logits[:, first:]
        return F.log_softmax(logits, -1, dtype=torch.float32)

    def _model_generate(self, context: Tensor, **options: Any) -> Tensor:
        """Generate tokens, (batch, length + generated) int64, for a context (batch, length) padded on the left.

        Raises:
            UserError: if a logit is NaN; argmax would choose it.
        """
        self._check(context)
        finite = [lambda _, logits: require_finite("logit came up in generation", logits.amax(-1)) or logits]
        return super()._model_generate(context, logits_processor=LogitsProcessorList(finite), **options)

    def _check(self, tokens: Tensor) -> None:
        if int(tokens.max()) >= self.model.get_input_embeddings().num_embeddings:
            size = self.model.get_input_embeddings().num_embeddings
            raise UserError(f"Tokens must be less than {size:,}, the number of embeddings; got {int(tokens.max())}.")
