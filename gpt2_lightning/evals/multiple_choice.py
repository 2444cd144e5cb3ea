"""Log-likelihoods of completions, many in one forward pass.

A request is one stretch of tokens: the context once, then each completion. A completion attends to the context and to
itself, and its positions continue where the context ended. Several requests are packed into a sequence of fixed length,
several sequences into a batch, and the head computes logits only where a completion is scored.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from gpt2_lightning.model import GPT

_SEQUENCE_LENGTH = 512  # fits one long HellaSwag example or six short ones: 98% full, and attention stays cheap
_HEAD_ROWS = 512  # positions per head matmul: 512 × 50,304 fp32 logits are 103 MB, and enough to keep a GPU busy


@dataclass(frozen=True)
class Request:
    """A context of at least one token, and completions of at least one token each."""

    context: tuple[int, ...]
    completions: tuple[tuple[int, ...], ...]

    @property
    def packed_length(self) -> int:
        """Tokens it takes in a sequence. A completion's last token predicts nothing, so it is left out."""
        return len(self.context) + sum(len(completion) - 1 for completion in self.completions)


@dataclass(frozen=True)
class PackedBatch:
    """Packed requests: B sequences of T tokens, and N scored tokens in the order of the completions."""

    requests: tuple[int, ...]
    """Index of each request in this batch."""
    idx: Tensor
    """Token ids (B, T)."""
    positions: Tensor
    """Position of each token in its own context and completion (B, T)."""
    segment: Tensor
    """Number of the context or completion a token belongs to, within its sequence; -1 is padding (B, T)."""
    parent: Tensor
    """Segment of the context that a token may attend to besides its own segment (B, T)."""
    source: Tensor
    """Index into the flattened (B·T) batch of the position that predicts each scored token (N,)."""
    target: Tensor
    """Scored token ids (N,)."""

    def to(self, device: torch.device) -> "PackedBatch":
        tensors = {k: v.to(device, non_blocking=True) for k, v in vars(self).items() if isinstance(v, Tensor)}
        return PackedBatch(requests=self.requests, **tensors)

    def mask(self) -> Tensor:
        """Boolean attention mask (B, 1, T, T): a token sees its own segment and its context, up to itself."""
        key = self.segment[:, None, :]
        sees = (key == self.segment[:, :, None]) | (key == self.parent[:, :, None])
        return sees.tril()[:, None]  # (B, 1, T, T)


@torch.no_grad()
def completion_losses(
    model: GPT, requests: Sequence[Request], vocab_size: int, batch_tokens: int, progress: str | None = None
) -> list[list[float]]:
    """Negative log-likelihood of each completion of each request, summed over its tokens, in nats.

    Args:
        model: scores on its own device, in its current mode, under the caller's autocast.
        requests: none longer than the model's ``block_size`` from its context to the end of any completion.
        vocab_size: the softmax runs over the first ``vocab_size`` columns of the logits; the rest is padding.
        batch_tokens: tokens in one forward pass.
        progress: label of a progress bar on stderr; None shows no bar.
    """
    device = model.lm_head.weight.device
    order: list[int] = []
    losses: list[Tensor] = []  # stay on the device, so that the CPU packs the next batch while this one runs
    with tqdm(total=len(requests), desc=progress, unit="example", leave=False, disable=progress is None) as bar:
        for packed in pack(requests, min(_SEQUENCE_LENGTH, batch_tokens), batch_tokens):
            batch = packed.to(device)
            hidden = model.hidden(batch.idx, batch.positions, batch.mask())
            losses.append(token_losses(hidden, model.lm_head, batch, vocab_size))
            order += batch.requests
            bar.update(len(batch.requests))
    if not losses:
        return []
    # float64 on the CPU: the sum of a completion does not depend on the others in its batch
    lengths = [len(completion) for i in order for completion in requests[i].completions]
    sums = iter([part.sum().item() for part in torch.cat(losses).cpu().double().split(lengths)])
    by_request = {i: [next(sums) for _ in requests[i].completions] for i in order}
    return [by_request[i] for i in range(len(requests))]


def token_losses(hidden: Tensor, head: Callable[[Tensor], Tensor], batch: PackedBatch, vocab_size: int) -> Tensor:
    """Negative log-likelihood of each scored token (N,), in fp32 and nats.

    Args:
        hidden: final hidden states (B, T, n_embd) of ``batch.idx``.
        head: hidden states (n, n_embd) → logits (n, at least vocab_size).
        batch: what to score.
        vocab_size: number of columns in the softmax.
    """
    flat = hidden.flatten(0, 1)  # (B·T, n_embd)
    losses = []
    for source, target in zip(batch.source.split(_HEAD_ROWS), batch.target.split(_HEAD_ROWS), strict=True):
        logits = head(flat[source])[:, :vocab_size].float()  # (n, vocab_size)
        losses.append(logits.logsumexp(dim=1) - logits.gather(1, target[:, None]).squeeze(1))
    return torch.cat(losses)  # (N,)


def pack(requests: Sequence[Request], sequence_length: int, batch_tokens: int) -> Iterator[PackedBatch]:
    """Packs each request once, into batches of at most ``batch_tokens`` tokens (but at least one sequence).

    A sequence has ``sequence_length`` tokens, or the next power of two if a single request needs more, so that a whole
    evaluation has only a few shapes. The longest come first: if the first batch fits in memory, all do.
    """
    order = sorted(range(len(requests)), key=lambda i: requests[i].packed_length)
    lengths = [requests[i].packed_length for i in order]
    sequences: list[tuple[int, list[int]]] = []  # (T, requests)
    while order:
        T = sequence_length if lengths[-1] <= sequence_length else 1 << (lengths[-1] - 1).bit_length()
        members: list[int] = []
        room = T
        while fits := bisect_right(lengths, room):  # best fit: the longest request that still fits
            room -= lengths.pop(fits - 1)
            members.append(order.pop(fits - 1))
        sequences.append((T, members))
    for T, group in groupby(sequences, key=lambda sequence: sequence[0]):
        same_length = [members for _, members in group]
        B = max(1, batch_tokens // T)
        for start in range(0, len(same_length), B):
            yield _collate(requests, same_length[start : start + B], T)


def _collate(requests: Sequence[Request], sequences: list[list[int]], T: int) -> PackedBatch:
    B = len(sequences)
    idx, positions = np.zeros((B, T), dtype=np.int64), np.zeros((B, T), dtype=np.int64)
    segment, parent = np.full((B, T), -1), np.full((B, T), -1)
    source: list[int] = []
    target: list[int] = []
    for b, members in enumerate(sequences):
        start = n_segments = 0
        for i in members:
            n = len(requests[i].context)
            last = b * T + start + n - 1  # the context's last token predicts the first token of every completion
            context_segment = n_segments
            pieces = [(requests[i].context, 0), *((completion[:-1], n) for completion in requests[i].completions)]
            for tokens, position in pieces:
                end = start + len(tokens)
                idx[b, start:end] = tokens
                positions[b, start:end] = range(position, position + len(tokens))
                segment[b, start:end] = n_segments
                parent[b, start:end] = context_segment
                if position > 0:
                    source += [last, *range(b * T + start, b * T + end)]
                start, n_segments = end, n_segments + 1
            for completion in requests[i].completions:
                target += completion
    return PackedBatch(
        requests=tuple(i for members in sequences for i in members),
        idx=torch.from_numpy(idx),
        positions=torch.from_numpy(positions),
        segment=torch.from_numpy(segment),
        parent=torch.from_numpy(parent),
        source=torch.tensor(source),
        target=torch.tensor(target),
    )
