"""Which sequences a step trains on depends on its number alone; how a step divides into micro-batches."""

import re

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gpt2_lightning.data.order import (
    EvalBatchSampler,
    StepBatchSampler,
    accumulation,
    dataset_indices,
    micro_batch_sizes,
    permute,
    sequences_per_shard,
)

SHARDS = st.lists(st.integers(0, 40), min_size=1, max_size=5).filter(any)
ORDERS = st.sampled_from(["sequential", "shuffled"])


# -- run index to sequence ---------------------------------------------------------------------------------------------

MASK = 2**64 - 1


def reference_hash(x: int) -> int:
    """splitmix64 (Steele et al. 2014) in Python's own integers."""
    x = (x + 0x9E3779B97F4A7C15) & MASK
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & MASK
    x = (x ^ x >> 27) * 0x94D049BB133111EB & MASK
    return x ^ x >> 31


def reference_permutation(i: int, n: int, key: int) -> int:
    """Four Feistel rounds on the smallest 4^k >= n, at least 4, repeated until the result is below n."""
    bits = 1
    while 4**bits < n:
        bits += 1
    while True:
        left, right = divmod(i, 2**bits)
        for turn in range(4):
            left, right = right, left ^ reference_hash((right + reference_hash((key + turn) & MASK)) & MASK) % 2**bits
        i = left * 2**bits + right
        if i < n:
            return i


def reference_index(run_index: int, shard_sequences: list[int], order: str, seed: int) -> int:
    """Run index n is sequence n mod N of epoch n div N; shuffled: of that epoch's permuted shards, each permuted."""
    epoch, position = divmod(run_index, sum(shard_sequences))
    if order == "sequential":
        return position
    key = reference_hash((reference_hash(seed) + epoch) & MASK)
    for turn in range(len(shard_sequences)):
        shard = reference_permutation(turn, len(shard_sequences), key)
        if position < shard_sequences[shard]:
            shard_key = reference_hash((key + shard) & MASK)
            return sum(shard_sequences[:shard]) + reference_permutation(position, shard_sequences[shard], shard_key)
        position -= shard_sequences[shard]
    raise AssertionError("beyond the epoch")


RUN_INDICES = st.lists(st.integers(0, 500) | st.integers(0, 10**12), min_size=1, max_size=20)


@given(SHARDS, ORDERS, st.integers(0, 2**63 - 1), RUN_INDICES)
def test_run_index_n_is_sequence_n_mod_N_of_its_epochs_order(shard_sequences, order, seed, run_indices):
    expected = [reference_index(n, shard_sequences, order, seed) for n in run_indices]
    assert dataset_indices(np.array(run_indices), shard_sequences, order, seed).tolist() == expected


@given(st.integers(1, 2**60), st.integers(0, MASK), st.data())
def test_permute_equals_its_reference_for_any_n(n, key, data):
    places = data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=20))
    assert permute(np.array(places), n, np.uint64(key)).tolist() == [reference_permutation(i, n, key) for i in places]


@given(st.integers(1, 3000), st.integers(0, MASK))
@settings(max_examples=60)
def test_permute_is_a_permutation(n, key):
    assert np.array_equal(np.sort(permute(np.arange(n), n, np.uint64(key))), np.arange(n))


def test_the_permutation_never_changes():
    # a resumed run must find the order that it began with, under any version of any library
    assert permute(np.arange(10), 10, np.uint64(7)).tolist() == [9, 2, 4, 5, 8, 7, 6, 0, 1, 3]
    assert dataset_indices(np.arange(8), [3, 5], "shuffled", 42).tolist() == [3, 4, 5, 6, 7, 2, 1, 0]


@given(SHARDS, st.integers(0, 9), ORDERS)
def test_each_epoch_has_each_sequence_exactly_once(shard_sequences, seed, order):
    N = sum(shard_sequences)
    indices = dataset_indices(np.arange(3 * N), shard_sequences, order, seed)
    for epoch in indices.reshape(3, N):
        assert sorted(epoch) == list(range(N))


def test_sequential_reads_front_to_back_and_over_again():
    assert dataset_indices(np.arange(8), [2, 1], "sequential", 0).tolist() == [0, 1, 2, 0, 1, 2, 0, 1]


def test_shuffled_differs_by_epoch_and_seed_and_reads_one_shard_at_a_time():
    shards = [50, 50, 50]
    first, second = dataset_indices(np.arange(300), shards, "shuffled", 1).reshape(2, 150)
    assert (first != second).any()
    assert (dataset_indices(np.arange(150), shards, "shuffled", 2) != first).any()
    for part in first.reshape(3, 50):
        assert len(set(part // 50)) == 1
        assert (np.diff(part) != 1).any()


@given(st.lists(st.integers(1, 30), min_size=1, max_size=6), st.integers(1, 12))
def test_a_sequence_belongs_to_the_shard_it_starts_in(lengths, T):
    shard_of_token = [shard for shard, length in enumerate(lengths) for _ in range(length)]
    starts = [start for start in range(0, sum(lengths), T) if start + T + 1 <= sum(lengths)]
    expected = [sum(shard_of_token[start] == shard for start in starts) for shard in range(len(lengths))]
    assert sequences_per_shard(lengths, T) == expected


# -- step to run indices -----------------------------------------------------------------------------------------------


def indices_by_step(S: int, steps: range, micro_batch: int, world: int) -> dict[int, list[int]]:
    """Step → all run indices of its micro-batches on all ranks."""
    per_step = S // (micro_batch * world)
    seen: dict[int, list[int]] = {s: [] for s in steps}
    for rank in range(world):
        batches = list(StepBatchSampler(lambda s: s * S, per_step, steps.stop, steps.start, rank, world))
        assert len(batches) == per_step * len(steps)
        for i, batch in enumerate(batches):
            seen[steps.start + i // per_step] += batch
    return seen


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4), st.integers(1, 5), st.integers(0, 5))
def test_what_a_step_trains_on_does_not_depend_on_ranks_micro_batch_or_resume(B, W, accumulate, steps, resumed_at):
    S = B * W * accumulate
    resumed_at = min(resumed_at, steps - 1)
    for micro_batch, world in ((B, W), (S, 1), (1, S), (B * W, 1)):
        whole = indices_by_step(S, range(steps), micro_batch, world)
        resumed = indices_by_step(S, range(resumed_at, steps), micro_batch, world)
        for s in range(steps):
            assert sorted(whole[s]) == list(range(s * S, (s + 1) * S))
            if s >= resumed_at:
                assert whole[s] == resumed[s]


def test_micro_batches_go_to_the_ranks_in_turn():
    # as in build-nanogpt: rank r of W starts at r·B and advances by W·B
    assert list(StepBatchSampler(lambda s: 8 * s, 2, 1, rank=0, world_size=2)) == [[0, 1], [4, 5]]
    assert list(StepBatchSampler(lambda s: 8 * s, 2, 1, rank=1, world_size=2)) == [[2, 3], [6, 7]]


def test_micro_batches_grow_with_the_step_and_keep_their_number():
    # steps of 2 and 4 sequences
    assert list(StepBatchSampler([0, 2, 6].__getitem__, 2, 2)) == [[0], [1], [2, 3], [4, 5]]


def test_the_sampler_has_the_length_of_the_whole_run_wherever_it_starts():
    # Lightning counts the batches of a resumed run from step 0
    assert len(StepBatchSampler(lambda s: 8 * s, 2, 10, start_step=7, rank=1, world_size=2)) == 20


@given(st.integers(0, 60), st.integers(1, 9), st.integers(1, 5))
def test_evaluation_has_each_sequence_once_and_no_padding(n_sequences, batch_size, W):
    samplers = [EvalBatchSampler(n_sequences, batch_size, rank, W) for rank in range(W)]
    batches = [list(sampler) for sampler in samplers]
    in_turn = [batches[i % W][i // W] for i in range(sum(map(len, batches)))]
    assert [index for batch in in_turn for index in batch] == list(range(n_sequences))
    assert all(len(batch) == batch_size for batch in in_turn[:-1])
    assert list(map(len, samplers)) == list(map(len, batches))


# -- micro-batches of a step -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("micro_batch_size", "world_size", "expected"), [(64, 1, 8), (64, 8, 1), (32, 8, 2), (16, 2, 16), (512, 1, 1)]
)
def test_accumulation_of_the_published_step(micro_batch_size, world_size, expected):
    assert accumulation(524288, micro_batch_size, 1024, world_size) == expected


def test_micro_batch_sizes_divide_the_first_step_as_well():
    assert micro_batch_sizes(128, 16, 1, 128) == [1, 2, 4, 8]
    assert micro_batch_sizes(128, 16, 1, 32) == [4, 8]  # 1 or 2 sequences in the first steps
    assert micro_batch_sizes(128, 16, 2, 32) == [4]


@given(
    T=st.integers(1, 8),
    W=st.integers(1, 4),
    B=st.integers(1, 12),
    n=st.integers(1, 12),
    rest=st.sampled_from([0, 0, 1, 3]),
    doublings=st.integers(0, 2),
)
@example(T=16, W=1, B=3, n=8, rest=0, doublings=0)
def test_accumulation_divides_the_step_or_the_error_lists_the_sizes_that_do(T, W, B, n, rest, doublings):
    start = n * W * T + rest
    total = start << doublings
    sizes = [b for b in range(1, total + 1) if total % (b * T * W) == 0 and start * b % total == 0]
    if B in sizes:
        assert accumulation(total, B, T, W, start) * B * T * W == total
        return
    fix = f"set data.micro_batch_size to one of {sizes}, or" if sizes else f"to a multiple of {T * W}"
    with pytest.raises(ValueError, match=re.escape(fix)):
        accumulation(total, B, T, W, start)
