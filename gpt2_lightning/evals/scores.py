"""Scores of multiple-choice evaluations. Does not import torch, so that ``gpt2 report`` starts quickly."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

_ROUNDING = 1e-5  # relative; fp32 log-likelihoods differ by 5e-7 between batch shapes and between libraries


def standard_error(accuracy: Any, n: Any) -> Any:
    """Standard error of an accuracy over ``n`` examples, from the sample variance as in lm-evaluation-harness.

    Works on numbers and on arrays.
    """
    return np.sqrt(accuracy * (1 - accuracy) / np.maximum(n - 1, 1))


@dataclass(frozen=True)
class ExampleScore:
    """A model's log-likelihoods of the endings of one example."""

    index: int
    """Index of the example in its set."""
    label: int
    """Index of the right ending."""
    log_likelihoods: tuple[float, ...]
    """Log-likelihood of each ending, summed over its tokens, in nats."""
    lengths: tuple[int, ...]
    """What acc_norm divides them by: tokens (nanogpt style) or characters (harness style)."""

    @property
    def per_length(self) -> tuple[float, ...]:
        """Log-likelihood divided by length; -inf for an empty ending, as numpy's division gives it."""
        return tuple(ll / n if n else -math.inf for ll, n in zip(self.log_likelihoods, self.lengths, strict=True))

    @property
    def prediction(self) -> int:
        """Ending with the highest log-likelihood; the first one if several are equal, like ``argmax``."""
        return self.log_likelihoods.index(max(self.log_likelihoods))

    @property
    def prediction_norm(self) -> int:
        """Ending with the highest log-likelihood per length; the first one if several are equal."""
        return self.per_length.index(max(self.per_length))

    @property
    def is_near_tie(self) -> bool:
        """Whether rounding could change one of the two predictions."""
        ranked = (sorted(values) for values in (self.log_likelihoods, self.per_length))
        return any(math.isclose(values[-1], values[-2], rel_tol=_ROUNDING) for values in ranked)


@dataclass(frozen=True)
class Score:
    """Numbers of right predictions. Integers, so that adding up the scores of all ranks is exact."""

    n: int = 0
    """Examples scored."""
    correct: int = 0
    """Examples whose right ending has the highest log-likelihood."""
    correct_norm: int = 0
    """Examples whose right ending has the highest log-likelihood per length."""

    @staticmethod
    def of(examples: Sequence[ExampleScore]) -> "Score":
        return Score(
            n=len(examples),
            correct=sum(example.prediction == example.label for example in examples),
            correct_norm=sum(example.prediction_norm == example.label for example in examples),
        )

    def __add__(self, other: "Score") -> "Score":
        return Score(self.n + other.n, self.correct + other.correct, self.correct_norm + other.correct_norm)

    @property
    def acc(self) -> float:
        return self.correct / self.n

    @property
    def acc_norm(self) -> float:
        return self.correct_norm / self.n

    @property
    def stderr(self) -> float:
        """Standard error of ``acc_norm``."""
        return float(standard_error(self.acc_norm, self.n))

    def __str__(self) -> str:
        return f"acc_norm {self.acc_norm:.4f} ± {self.stderr:.4f}, acc {self.acc:.4f} ({self.n} examples)"
