"""Log-likelihoods of completions, many in one forward pass: token ids and tensors in, numbers out.

A question is one sequence: its context once, then each completion, which sees the context and itself and takes up the
positions where the context ended. Several questions share a sequence of fixed length, several sequences a batch, and
the head runs only where a completion is scored.
"""

import math
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

_HEAD_ROWS = 512  # logits at a time: 512 × 50,304 in fp32 are 103 MB, and enough rows for a GPU's matmul
_ROUNDING = 1e-5  # relative; log-likelihoods in fp32 differ by 5e-7 between batches and between packages


@dataclass(frozen=True)
class Question:
    """A context of at least one token, and completions of at least one token each, all of which are scored whole."""

    context: tuple[int, ...]
    completions: tuple[tuple[int, ...], ...]

    @property
    def packed_length(self) -> int:
        """Tokens that it takes in a sequence: a completion's last token predicts nothing, so that stays out."""
        return len(self.context) + sum(len(completion) - 1 for completion in self.completions)


@dataclass(frozen=True)
class Batch:
    """Packed questions: B sequences of T tokens, and N scored tokens, completion after completion."""

    questions: tuple[int, ...]
    """Index of each question in here, in the order of their completions below."""
    idx: Tensor
    """Token ids (B, T)."""
    positions: Tensor
    """Position of each token in its own context and completion (B, T)."""
    segment: Tensor
    """Number of the context or completion that a token belongs to, its own in the sequence; -1 is padding (B, T)."""
    parent: Tensor
    """Segment of the context that a token sees besides its own segment (B, T)."""
    source: Tensor
    """Where each scored token is predicted from, in the flattened (B·T) batch (N,)."""
    target: Tensor
    """Scored token ids (N,)."""

    def to(self, device: torch.device) -> "Batch":
        tensors = {k: v.to(device, non_blocking=True) for k, v in vars(self).items() if isinstance(v, Tensor)}
        return Batch(questions=self.questions, **tensors)

    def mask(self) -> Tensor:
        """What each token may see, boolean (B, 1, T, T): its own segment and its context, up to itself."""
        key = self.segment[:, None, :]
        sees = (key == self.segment[:, :, None]) | (key == self.parent[:, :, None])
        return sees.tril()[:, None]  # (B, 1, T, T)


def pack(questions: Sequence[Question], sequence_length: int, batch_tokens: int) -> Iterator[Batch]:
    """All questions once, in batches of at most ``batch_tokens`` tokens (or one sequence, where that is longer).

    A sequence is ``sequence_length`` tokens, or the next power of two where a single question needs more, so that a
    whole evaluation knows only a few shapes. The longest questions come first: what fits at all fits the first batch.
    """
    order = sorted(range(len(questions)), key=lambda i: questions[i].packed_length)
    lengths = [questions[i].packed_length for i in order]
    sequences: list[tuple[int, list[int]]] = []  # (T, questions)
    while order:
        T = sequence_length if lengths[-1] <= sequence_length else 1 << (lengths[-1] - 1).bit_length()
        members: list[int] = []
        room = T
        while fits := bisect_right(lengths, room):  # best fit: the longest one that still goes in
            room -= lengths.pop(fits - 1)
            members.append(order.pop(fits - 1))
        sequences.append((T, members))
    for T, group in groupby(sequences, key=lambda sequence: sequence[0]):
        rows = [members for _, members in group]
        B = max(1, batch_tokens // T)
        for start in range(0, len(rows), B):
            yield _collate(questions, rows[start : start + B], T)


def _collate(questions: Sequence[Question], rows: list[list[int]], T: int) -> Batch:
    idx, positions, segment, parent = [], [], [], []
    source: list[int] = []
    target: list[int] = []
    for b, members in enumerate(rows):
        ids: list[int] = []
        place: list[int] = []
        own: list[int] = []
        context: list[int] = []
        n_segments = 0
        for i in members:
            question = questions[i]
            n, seen = len(question.context), n_segments
            last = b * T + len(ids) + n - 1  # the context's last token predicts every completion's first
            ids += question.context
            place += range(n)
            own += [seen] * n
            context += [seen] * n
            n_segments += 1
            for completion in question.completions:
                m = len(completion) - 1
                source += [last, *range(b * T + len(ids), b * T + len(ids) + m)]
                target += completion
                ids += completion[:-1]
                place += range(n, n + m)
                own += [n_segments] * m
                context += [seen] * m
                n_segments += 1
        padding = T - len(ids)
        idx.append(ids + [0] * padding)
        positions.append(place + [0] * padding)
        segment.append(own + [-1] * padding)
        parent.append(context + [-1] * padding)
    return Batch(
        questions=tuple(i for members in rows for i in members),
        idx=torch.tensor(idx),
        positions=torch.tensor(positions),
        segment=torch.tensor(segment),
        parent=torch.tensor(parent),
        source=torch.tensor(source),
        target=torch.tensor(target),
    )


def token_losses(hidden: Tensor, head: Callable[[Tensor], Tensor], batch: Batch, vocab_size: int) -> Tensor:
    """Negative log-likelihood of each scored token (N,), in fp32 and nats.

    Args:
        hidden: final hidden states (B, T, n_embd) of ``batch.idx``.
        head: hidden states (n, n_embd) → logits (n, at least vocab_size).
        batch: what was scored.
        vocab_size: the softmax is over the first so many columns; what lies beyond is padding of the embedding.
    """
    rows = hidden.flatten(0, 1)  # (B·T, n_embd)
    losses = []
    for source, target in zip(batch.source.split(_HEAD_ROWS), batch.target.split(_HEAD_ROWS), strict=True):
        logits = head(rows[source])[:, :vocab_size].float()  # (n, vocab_size)
        losses.append(logits.logsumexp(dim=1) - logits.gather(1, target[:, None]).squeeze(1))
    return torch.cat(losses)  # (N,)


def completion_losses(losses: Tensor, lengths: Sequence[int]) -> list[float]:
    """Token losses (N,), completion after completion → the summed loss of each, in nats; over its length: the mean."""
    return [part.sum().item() for part in losses.cpu().double().split(list(lengths))]


@dataclass(frozen=True)
class RowScore:
    """What a model makes of one multiple-choice question."""

    index: int
    """Which row of the set."""
    label: int
    """Index of the right answer."""
    log_likelihoods: tuple[float, ...]
    """Of each answer, summed over its tokens, in nats."""
    lengths: tuple[int, ...]
    """What acc_norm divides them by: tokens, or characters."""

    @property
    def per_length(self) -> tuple[float, ...]:
        """Log-likelihood over length; an answer without length never wins, as in numpy."""
        return tuple(ll / n if n else -math.inf for ll, n in zip(self.log_likelihoods, self.lengths, strict=True))

    @property
    def prediction(self) -> int:
        """Answer of the highest log-likelihood; the first of equals, as torch and numpy have it."""
        return self.log_likelihoods.index(max(self.log_likelihoods))

    @property
    def prediction_norm(self) -> int:
        """Answer of the highest log-likelihood per length; the first of equals."""
        return self.per_length.index(max(self.per_length))

    @property
    def close(self) -> bool:
        """Whether rounding alone may have picked one of the two winners."""
        ranked = (sorted(scores) for scores in (self.log_likelihoods, self.per_length))
        return any(math.isclose(scores[-1], scores[-2], rel_tol=_ROUNDING) for scores in ranked)


@dataclass(frozen=True)
class Score:
    """Counts of right answers, so that the scores of ranks add up exactly."""

    n: int = 0
    """Rows."""
    correct: int = 0
    """Rows that the summed log-likelihood gets right."""
    correct_norm: int = 0
    """Rows that the normalised log-likelihood gets right."""

    @staticmethod
    def of(rows: Sequence[RowScore]) -> "Score":
        return Score(
            n=len(rows),
            correct=sum(row.prediction == row.label for row in rows),
            correct_norm=sum(row.prediction_norm == row.label for row in rows),
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
        """Standard error of acc_norm, from the sample's variance (lm-evaluation-harness's)."""
        return math.sqrt(self.acc_norm * (1 - self.acc_norm) / max(self.n - 1, 1))

    def __str__(self) -> str:
        return f"acc_norm {self.acc_norm:.4f} ± {self.stderr:.4f}, acc {self.acc:.4f} ({self.n} rows)"
