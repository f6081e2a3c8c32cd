"""A model for lm_eval that computes logits where answers are scored; imported when tasks are measured."""

from __future__ import annotations

import inspect
from collections import defaultdict
from typing import Any

import torch
import torch.nn.functional as F
from lm_eval.api.model import TemplateLM
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gprune.errors import UserError

Request = tuple[tuple[str, str], list[int], list[int]]  # the texts; tokens of the context; tokens of the continuation


class AnswerLM(TemplateLM):
    """A causal language model in memory, as lm_eval asks it: log-likelihoods of continuations alone.

    Tokens, batches and log-likelihoods are those of lm_eval's own `HFLM`, without the logits of contexts, which nobody
    reads. Where a vocabulary is large, they are most of a forward pass: of Gemma-3-270M, whose vocabulary has 262,144
    words, tasks take 0.6 of the time.
    """

    eot_token_id = loglikelihood_rolling = generate_until = None  # lm_eval asks for them in tasks of other types alone
    prefix_token_id = None

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int):
        super().__init__()
        self.model, self.tokenizer, self.batch_size = model, tokenizer, batch_size
        self.positions = getattr(model.config, "max_position_embeddings", None) or 2048
        bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        self.prefix_token_id = eos if bos is None else bos  # stands before a continuation without a context

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids; by default with the special tokens that the tokenizer adds, unless the text begins with BOS."""
        if add_special_tokens is None:
            add_special_tokens = not string.startswith(self.tokenizer.decode(self.prefix_token_id))
        return self.tokenizer.encode(string, add_special_tokens=add_special_tokens)

    def _loglikelihood_tokens(self, requests: list[Request], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log-likelihood in nats, whether greedy decoding gives it) of each continuation."""
        same_input = defaultdict(list)  # one pass serves all continuations that differ in their last token
        for i, (_, context, continuation) in enumerate(requests):
            same_input[*context, *continuation[:-1]].append(i)
        longest_first = sorted(same_input, key=lambda tokens: (-len(tokens), tokens))
        answers: dict[int, tuple[float, bool]] = {}
        with tqdm(total=len(requests), disable=disable_tqdm, desc="Scoring choices") as bar:
            for start in range(0, len(longest_first), self.batch_size):
                batch = longest_first[start : start + self.batch_size]
                inputs = [torch.tensor(tokens[-self.positions :]) for tokens in batch]
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
        """(batch, length - first, vocabulary) float32 of what follows each position from `first` on; `tokens`
        (batch, length) int64 are padded on the right, which is not seen from the left."""
        if int(tokens.max()) >= self.model.get_input_embeddings().num_embeddings:
            raise UserError(f"The tokenizer makes tokens that the model has no embeddings for ({int(tokens.max())}).")
        # By their indices, which makes a copy: torch multiplies rows that are apart in memory 70 times as slowly on a
        # CPU in bfloat16.
        positions = torch.arange(first, tokens.shape[1], device=self.model.device)
        if "logits_to_keep" in inspect.signature(self.model.forward).parameters:
            logits = self.model(tokens.to(self.model.device), logits_to_keep=positions).logits
        else:  # a model with code of its own
            logits = self.model(tokens.to(self.model.device)).logits[:, first:]
        return F.log_softmax(logits, -1, dtype=torch.float32)
