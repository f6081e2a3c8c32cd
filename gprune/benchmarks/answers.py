"""lm_eval's model, made to compute logits where it reads them; imported when zero-shot tasks are measured."""

from __future__ import annotations

import inspect
from collections import defaultdict
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from tqdm import tqdm

Request = tuple[tuple[str, str], list[int], list[int]]  # the texts; tokens of the context; tokens of the continuation


class AnswerLM(HFLM):
    """HFLM without the logits of contexts, which nobody reads.

    A context is most of a question, and where a vocabulary is large, most of a forward pass is its logits: of
    Gemma-3-270M, whose vocabulary has 262,144 words, tasks take 0.6 of the time. All else is HFLM's.
    """

    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """(log-likelihood, whether greedy decoding gives it) of each continuation, in HFLM's batches, one at a time."""
        same_input = defaultdict(list)  # one pass serves all of them: HFLM's `logits_cache`
        for i, (_, context, continuation) in enumerate(requests):
            same_input[*context, *continuation[:-1]].append(i)
        longest_first = sorted(same_input, key=lambda tokens: (-len(tokens), tokens))
        size = override_bs or int(self.batch_size)
        answers: dict[int, tuple[float, bool]] = {}
        self.keeps = "logits_to_keep" in inspect.signature(self.model.forward).parameters
        head = self.model.get_output_embeddings()
        # torch multiplies a part of each row, which is not contiguous, 70 times as slowly on a CPU in bfloat16.
        whole = head.register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(), *inputs[1:]))
        with whole, tqdm(total=len(requests), disable=disable_tqdm, desc="Running loglikelihood requests") as bar:
            for start in range(0, len(longest_first), size):
                inputs = longest_first[start : start + size]
                batch = [i for tokens in inputs for i in same_input[tokens]]
                lengths = [min(len(tokens), self.max_length) for tokens in inputs for _ in same_input[tokens]]
                first = min(n - len(requests[i][2]) for i, n in zip(batch, lengths, strict=True))
                self.kept = max(lengths) - first
                found = super()._loglikelihood_tokens([requests[i] for i in batch], disable_tqdm=True)
                answers |= zip(batch, found, strict=True)
                bar.update(len(batch))
        return [answers[i] for i in range(len(requests))]

    def _model_call(self, inps: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """(batch, kept, vocabulary) logits of the last positions; HFLM counts them from the end."""
        if not self.keeps:  # a model with code of its own
            return super()._model_call(inps, *args, **kwargs)
        return self.model(inps, logits_to_keep=self.kept).logits
