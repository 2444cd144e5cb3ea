"""Which windows a step trains on: pure arithmetic on the step number, and the batch sampler that follows it.

The data is N windows of ``block_size`` tokens (and the one token after them). Sample n of a run is window n mod N of
epoch n div N, so nothing is dropped between epochs and a step may straddle two. Step s takes samples [s·S, (s+1)·S)
with S = total_batch_tokens / block_size: micro-batch m of rank r takes B of them from s·S + (m·W + r)·B on. That is a
matter of s alone, neither of the ranks W nor of the micro-batch B, the workers, or where a run was cut.
"""

from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
from torch.utils.data import Sampler

Order = Literal["sequential", "shuffled"]


def windows_of(samples: np.ndarray, shard_windows: list[int], order: Order, seed: int) -> np.ndarray:
    """Window numbers (n,) int64 of the sample numbers (n,) int64.

    ``sequential`` reads the data front to back. ``shuffled`` permutes, anew in each epoch, the shards and the windows
    inside each shard: neighbours in training stay neighbours on disk to within a shard.

    Args:
        shard_windows: how many windows begin in each shard; N is their sum.
        seed: of the permutations; what it gives never changes with a library's version.
    """
    n_windows = sum(shard_windows)
    epochs, places = np.divmod(samples, n_windows)
    if order == "sequential":
        return places
    counts = np.asarray(shard_windows)
    first_window = np.cumsum(counts) - counts  # of each shard
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
        windows[in_epoch] = first_window[shard] + inside
    return windows


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
        samples_per_step: S, over all ranks and micro-batches; a multiple of micro_batch_size · world_size.
        micro_batch_size: B, samples per micro-batch and rank.
        start_step: optimizer steps that a resumed run has behind it.
        max_steps: optimizer steps of the whole run.
    """

    def __init__(
        self,
        samples_per_step: int,
        micro_batch_size: int,
        max_steps: int,
        start_step: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        assert samples_per_step % (micro_batch_size * world_size) == 0
        self.samples_per_step = samples_per_step
        self.micro_batch_size = micro_batch_size
        self.max_steps = max_steps
        self.start_step = start_step
        self.rank = rank
        self.world_size = world_size

    def __len__(self) -> int:
        return self.max_steps * (self.samples_per_step // (self.micro_batch_size * self.world_size))

    def __iter__(self) -> Iterator[list[int]]:
        B = self.micro_batch_size
        first = self.start_step * self.samples_per_step + self.rank * B
        for start in range(first, self.max_steps * self.samples_per_step, B * self.world_size):
            yield list(range(start, start + B))


class EvalBatchSampler(Sampler[list[int]]):
    """Windows 0 … n_windows - 1 in batches, dealt out to the ranks in turn: none is padded, none is seen twice."""

    def __init__(self, n_windows: int, batch_size: int, rank: int = 0, world_size: int = 1) -> None:
        self.batches = [range(i, min(i + batch_size, n_windows)) for i in range(0, n_windows, batch_size)]
        self.batches = self.batches[rank::world_size]

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        return map(list, self.batches)
