"""The arithmetic of zero-shot tasks: from log-likelihoods of choices to accuracies with standard errors."""

from __future__ import annotations

import math
from collections.abc import Sequence


def is_correct(
    loglikelihoods: Sequence[Sequence[float]], labels: Sequence[int], lengths: Sequence[Sequence[int]] | None = None
) -> list[bool]:
    """Whether the most likely choice of each question is the right one; among equal choices the first counts.

    acc_norm divides each log-likelihood by the length of its choice, in characters without the space before it, as
    EleutherAI's lm_eval does (only its `acc_bytes` counts bytes).

    Args:
        loglikelihoods: per question and choice, nats.
        labels: index of the right choice, per question.
        lengths: per question and choice, positive, for acc_norm; None for acc.
    """
    sizes = [[1] * len(row) for row in loglikelihoods] if lengths is None else lengths
    found = []
    for row, size, label in zip(loglikelihoods, sizes, labels, strict=True):
        scores = [value / length for value, length in zip(row, size, strict=True)]
        found.append(scores.index(max(scores)) == label)
    return found


def accuracy(correct: Sequence[bool]) -> tuple[float, float | None]:
    """Share of right answers in [0, 1], and its standard error: sample standard deviation / sqrt(n), None for n < 2."""
    n, mean = len(correct), sum(correct) / len(correct)
    # The squared deviations of zeros and ones add up to n * mean * (1 - mean).
    return mean, math.sqrt(mean * (1 - mean) / (n - 1)) if n > 1 else None


def chance(choices: Sequence[int]) -> float:
    """Expected accuracy of guessing, given the number of choices of each question."""
    return sum(1 / n for n in choices) / len(choices)


def paired_difference(a: Sequence[bool], b: Sequence[bool]) -> tuple[float, float | None]:
    """Accuracy of model a minus accuracy of model b on the same questions, and its standard error (None for n < 2).

    Paired: the many questions that both models get right, or both get wrong, add nothing to the difference.
    """
    difference = [int(x) - int(y) for x, y in zip(a, b, strict=True)]
    n, mean = len(difference), sum(difference) / len(difference)
    return mean, math.sqrt(sum((d - mean) ** 2 for d in difference) / (n - 1) / n) if n > 1 else None
