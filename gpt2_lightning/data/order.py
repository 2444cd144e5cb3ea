"""Which windows a step trains on, and how many at a time: pure arithmetic, and the batch samplers that follow it.

The data is N windows of ``block_size`` tokens (and the one token after them). Sample n of a run is window n mod N of
epoch n div N, so nothing is dropped between epochs and a step may straddle two. Step s takes samples [S(s), S(s+1)),
where S(s) counts those before it: s · total_batch_tokens / block_size, or less after a batch-size schedule.
Micro-batch m of rank r takes B of them from S(s) + (m·W + r)·B on. That is a matter of s alone, neither of the ranks W
nor of the micro-batch B, the workers, or where a run was cut.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import numpy as np
from torch.utils.data import Sampler

from gpt2_lightning.errors import UserError

Order = Literal["sequential", "shuffled"]

AUTO_ON_CPU = 16
"""The largest micro-batch that ``auto`` takes on a CPU, where a larger one is no faster; ``gpt2 validate``'s, too."""


def dataset_indices(samples: np.ndarray, shard_sequences: list[int], order: Order, seed: int) -> np.ndarray:
    """Window numbers (n,) int64 of the sample numbers (n,) int64.

    ``sequential`` reads the data front to back. ``shuffled`` permutes, anew in each epoch, the shards and the windows
    inside each shard: neighbours in training stay neighbours on disk to within a shard.

    Args:
        shard_sequences: how many windows begin in each shard; N is their sum.
        seed: of the permutations; what it gives never changes with a library's version.
    """
    n_sequences = sum(shard_sequences)
    epochs, places = np.divmod(samples, n_sequences)
    if order == "sequential":
        return places
    counts = np.asarray(shard_sequences)
    first_sequence = np.cumsum(counts) - counts  # of each shard
    windows = np.empty_like(places)
    for epoch in np.unique(epochs):
        in_epoch = epochs == epoch
        key = hash64(hash64(np.uint64(seed)) + np.uint64(epoch))
        shards = permute(np.arange(len(counts)), len(counts), key)  # the order in which this epoch reads them
        ends = np.cumsum(counts[shards])
        turn = np.searchsorted(ends, places[in_epoch], side="right")  # which of them each sample is in
        shard = shards[turn]
        inside = places[in_epoch] - (ends[turn] - counts[shard])
        for k in np.unique(shard):
            here = shard == k
            inside[here] = permute(inside[here], int(counts[k]), hash64(key + np.uint64(k)))
        windows[in_epoch] = first_sequence[shard] + inside
    return windows


def sequences_per_shard(lengths: Sequence[int], block_size: int) -> list[int]:
    """How many windows begin in each shard of ``lengths`` tokens; the last token of all is only ever a target."""
    n_sequences = max(0, (sum(lengths) - 1) // block_size)
    ends = np.minimum(-(-np.cumsum(lengths) // block_size), n_sequences)
    return np.diff(ends, prepend=0).tolist()


def permute(i: np.ndarray, n: int, key: np.uint64) -> np.ndarray:
    """Where a pseudo-random permutation of 0 … n-1 puts each of ``i``: any place can be asked for without the others.

    A Feistel network of four rounds on the next power of four, walked until the result falls below n (Black & Rogaway
    2002, "Ciphers with arbitrary finite domains").
    """
    half = np.uint64(max(1, (int(n - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)
    x = i.astype(np.uint64)
    todo = np.ones(len(x), dtype=bool)
    while todo.any():
        left, right = x[todo] >> half, x[todo] & mask
        for turn in range(4):
            left, right = right, left ^ (hash64(right + hash64(key + np.uint64(turn))) & mask)
        x[todo] = left << half | right
        todo &= x >= n
    return x.astype(np.int64)


def hash64(x: Any) -> Any:
    """splitmix64's finaliser (Steele et al. 2014) of one or many uint64: a bijection that scatters neighbours."""
    with np.errstate(over="ignore"):
        x = x + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


class StepBatchSampler(Sampler[list[int]]):
    """Sample numbers of one rank's micro-batches, from ``start_step`` to ``max_steps``.

    Its length is that of the whole run, wherever it starts: Lightning counts batches from step 0 on.

    Args:
        sequences_before: step → sequences before it; what a step takes is a multiple of accumulate · world_size.
        accumulate: micro-batches of each rank in a step. Where steps grow, the micro-batches grow, not their number.
        max_steps: optimizer steps of the whole run.
        start_step: optimizer steps that a resumed run has behind it.
    """

    def __init__(
        self,
        sequences_before: Callable[[int], int],
        accumulate: int,
        max_steps: int,
        start_step: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.sequences_before = sequences_before
        self.accumulate = accumulate
        self.max_steps = max_steps
        self.start_step = start_step
        self.rank = rank
        self.world_size = world_size

    def __len__(self) -> int:
        return self.max_steps * self.accumulate

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self.start_step, self.max_steps):
            first = self.sequences_before(step)
            B, rest = divmod(self.sequences_before(step + 1) - first, self.accumulate * self.world_size)
            assert rest == 0
            for m in range(self.accumulate):
                start = first + (m * self.world_size + self.rank) * B
                yield list(range(start, start + B))


class EvalBatchSampler(Sampler[list[int]]):
    """Windows 0 … n_sequences - 1 in batches, dealt out to the ranks in turn: none is padded, none is seen twice."""

    def __init__(self, n_sequences: int, batch_size: int, rank: int = 0, world_size: int = 1) -> None:
        self.batches = [range(i, min(i + batch_size, n_sequences)) for i in range(0, n_sequences, batch_size)]
        self.batches = self.batches[rank::world_size]

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        return map(list, self.batches)


def micro_batch_sizes(total_batch_tokens: int, block_size: int, world_size: int, start_tokens: int) -> list[int]:
    """All micro-batch sizes that divide a step into whole micro-batches per device, in rising order.

    In the steps of ``start_tokens`` that a batch-size schedule begins with, the micro-batch is smaller in proportion,
    and a whole number as well.

    Raises:
        ValueError: no micro-batch does.
    """
    per_rank, rest = divmod(start_tokens, block_size * world_size)
    if rest or per_rank == 0:
        name = "total_batch_tokens" if start_tokens == total_batch_tokens else "batch_size_schedule.start_tokens"
        raise UserError(
            f"data.{name}={start_tokens} is not a multiple of block_size {block_size} on "
            f"{devices(world_size)}: set it to a multiple of {block_size * world_size}"
        )
    if total_batch_tokens >= 2**40:
        raise UserError(f"data.total_batch_tokens={total_batch_tokens} is more than any step can take: lower it")
    growth = total_batch_tokens // start_tokens
    divisors = [b for b in range(1, math.isqrt(per_rank) + 1) if per_rank % b == 0]
    return sorted({b * growth for divisor in divisors for b in (divisor, per_rank // divisor)})


def accumulation(
    total_batch_tokens: int,
    micro_batch_size: int,
    block_size: int,
    world_size: int,
    typed: int = 1,
    start_tokens: int | None = None,
) -> int:
    """Micro-batches per rank that make up one optimizer step of exactly ``total_batch_tokens``.

    ``typed`` is the user's own ``trainer.accumulate_grad_batches``; 1 stands for not given. ``start_tokens`` are those
    of a batch-size schedule's first step.

    Raises:
        ValueError: the step does not divide, with the micro-batches that would do; or ``typed`` disagrees.
    """
    would_do = micro_batch_sizes(total_batch_tokens, block_size, world_size, start_tokens or total_batch_tokens)
    if micro_batch_size not in would_do:
        raise UserError(
            f"data.total_batch_tokens={total_batch_tokens} "
            f"{f'from {start_tokens} on ' if start_tokens not in (None, total_batch_tokens) else ''}"
            f"is not a whole number of micro-batches of {micro_batch_size} sequences of {block_size} on "
            f"{devices(world_size)}: set data.micro_batch_size to one of {would_do}, or to auto"
        )
    derived = total_batch_tokens // (micro_batch_size * block_size * world_size)
    if typed not in (1, derived):
        raise UserError(
            f"trainer.accumulate_grad_batches={typed} disagrees with data.total_batch_tokens={total_batch_tokens}, "
            f"which takes {derived} micro-batches on {devices(world_size)}: leave it out, it is derived"
        )
    return derived


def devices(world_size: int) -> str:
    """``1 device``, ``2 devices``: in sentences."""
    return f"{world_size} device{'s' if world_size > 1 else ''}"
