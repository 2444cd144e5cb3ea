"""Which sequences a step trains on: pure arithmetic, and two batch samplers on top of it.

A dataset holds N sequences of ``block_size`` tokens; each is read with the one token after it, its last target. A run
numbers the sequences that it trains on 0, 1, 2, … without end: run index n is sequence n mod N of epoch n div N, so a
step may straddle two epochs and nothing is dropped between them.

Step s trains on the run indices [S(s), S(s + 1)), where S(s) = s · total_batch_tokens / block_size, or less after a
batch-size schedule. Micro-batch m of rank r takes the B run indices from S(s) + (m · W + r) · B on. So what a step
trains on depends on s alone, not on the number of ranks W, the micro-batch size B, or where the run was interrupted.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import numpy as np
from torch.utils.data import Sampler

from gpt2_lightning.errors import UserError

Order = Literal["sequential", "shuffled"]

AUTO_ON_CPU = 16
"""Largest micro-batch that ``micro_batch_size: auto`` chooses on a CPU, where larger ones are no faster."""


def dataset_indices(run_indices: np.ndarray, shard_sequences: list[int], order: Order, seed: int) -> np.ndarray:
    """Maps run indices (n,) int64 to the numbers of sequences in the dataset (n,) int64.

    ``sequential`` reads the dataset front to back in each epoch. ``shuffled`` permutes, differently in each epoch, the
    shards and the sequences within each shard, so that training still reads one shard at a time.

    Args:
        shard_sequences: number of sequences that start in each shard; their sum is N.
        seed: of the permutations. They use no library's random generator, so they never change with a version.
    """
    counts = np.asarray(shard_sequences)
    epochs, positions = np.divmod(run_indices, counts.sum())
    if order == "sequential":
        return positions
    first_sequence = np.cumsum(counts) - counts  # of each shard
    indices = np.empty_like(positions)
    for epoch in np.unique(epochs):
        in_epoch = epochs == epoch
        key = hash64(hash64(np.uint64(seed)) + np.uint64(epoch))
        shard_order = permute(np.arange(len(counts)), len(counts), key)
        ends = np.cumsum(counts[shard_order])  # position at which each shard of this epoch ends
        turn = np.searchsorted(ends, positions[in_epoch], side="right")
        shard = shard_order[turn]
        offset = positions[in_epoch] - (ends[turn] - counts[shard])  # within the shard
        for k in np.unique(shard):
            in_shard = shard == k
            offset[in_shard] = permute(offset[in_shard], int(counts[k]), hash64(key + np.uint64(k)))
        indices[in_epoch] = first_sequence[shard] + offset
    return indices


def sequences_per_shard(lengths: Sequence[int], block_size: int) -> list[int]:
    """Number of sequences that start in each shard, for shards of ``lengths`` tokens that are read as one stream.

    A sequence may continue in the next shard. It needs ``block_size + 1`` tokens, the last of which the next one starts
    with, so the last token of the stream is only ever a target.
    """
    n_sequences = max(0, (sum(lengths) - 1) // block_size)
    ends = np.minimum(-(-np.cumsum(lengths) // block_size), n_sequences)  # sequences that start before a shard's end
    return np.diff(ends, prepend=0).tolist()


def permute(i: np.ndarray, n: int, key: np.uint64) -> np.ndarray:
    """Images of ``i``, int64, under a pseudo-random permutation of 0 … n - 1 that ``key`` chooses.

    Each image is computed on its own, in O(1) memory: a Feistel network of four rounds permutes 0 … 4^k - 1 for the
    smallest 4^k >= n, and is applied again until the result is below n (cycle walking: Black & Rogaway 2002, "Ciphers
    with Arbitrary Finite Domains").
    """
    half = np.uint64(max(1, (int(n - 1).bit_length() + 1) // 2))  # bits of each half of the block
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
    """splitmix64's finalizer (Steele et al. 2014), elementwise on uint64: a bijection that scatters neighbours."""
    with np.errstate(over="ignore"):  # arithmetic modulo 2^64
        x = x + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


class StepBatchSampler(Sampler[list[int]]):
    """Run indices of one rank's micro-batches, from step ``start_step`` to ``max_steps``.

    Args:
        sequences_before: S(s), the number of sequences before step s. S(s + 1) - S(s) is a multiple of
            accumulate · world_size.
        accumulate: micro-batches per rank and step. Where a batch-size schedule makes steps larger, the micro-batches
            grow, not their number.
        max_steps: optimizer steps of the whole run.
        start_step: optimizer steps done before a resume.
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
        # of the whole run: Lightning counts batches from step 0, also on resume
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
    """One rank's batches of the sequences 0 … n_sequences - 1. Each sequence is in exactly one batch; no padding."""

    def __init__(self, n_sequences: int, batch_size: int, rank: int = 0, world_size: int = 1) -> None:
        batches = [range(i, min(i + batch_size, n_sequences)) for i in range(0, n_sequences, batch_size)]
        self.batches = batches[rank::world_size]

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        return map(list, self.batches)


def micro_batch_sizes(total_batch_tokens: int, block_size: int, world_size: int, start_tokens: int) -> list[int]:
    """All micro-batch sizes, in sequences and rising, that divide a step into whole micro-batches on each device.

    ``start_tokens`` is the size of the first step, smaller than ``total_batch_tokens`` under a batch-size schedule.
    Micro-batches are smaller there by the same factor, and have to be whole there as well.

    Raises:
        UserError: no size divides the step.
    """
    per_rank, rest = divmod(start_tokens, block_size * world_size)  # sequences of the first step on each device
    if rest or per_rank == 0:
        name = "total_batch_tokens" if start_tokens == total_batch_tokens else "batch_size_schedule.start_tokens"
        raise UserError(
            f"data.{name}={start_tokens} is not a multiple of block_size {block_size} on {devices(world_size)}: "
            f"set it to a multiple of {block_size * world_size}"
        )
    growth = total_batch_tokens // start_tokens
    divisors = [b for b in range(1, math.isqrt(per_rank) + 1) if per_rank % b == 0]
    return sorted({b * growth for divisor in divisors for b in (divisor, per_rank // divisor)})


def accumulation(
    total_batch_tokens: int, micro_batch_size: int, block_size: int, world_size: int, start_tokens: int | None = None
) -> int:
    """Micro-batches per rank in one optimizer step of exactly ``total_batch_tokens``.

    ``start_tokens`` is the size of the first step under a batch-size schedule.

    Raises:
        UserError: the step does not divide; the message lists the micro-batch sizes that do.
    """
    start_tokens = start_tokens or total_batch_tokens
    sizes = micro_batch_sizes(total_batch_tokens, block_size, world_size, start_tokens)
    if micro_batch_size not in sizes:
        step = f"data.total_batch_tokens={total_batch_tokens}"
        if start_tokens != total_batch_tokens:
            step += f" (first steps: {start_tokens})"
        raise UserError(
            f"{step} is not a whole number of micro-batches of {micro_batch_size} sequences of {block_size} tokens on "
            f"{devices(world_size)}: set data.micro_batch_size to one of {sizes}, or to auto"
        )
    return total_batch_tokens // (micro_batch_size * block_size * world_size)


def devices(world_size: int) -> str:
    """``1 device`` or ``2 devices``, for messages."""
    return f"{world_size} device{'s' if world_size > 1 else ''}"
