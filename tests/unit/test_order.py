"""One order: which windows a step sees depends on its number alone."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt2_lightning.data.order import EvalBatchSampler, StepBatchSampler, dataset_indices, permute, sequences_per_shard


def _step_samples(S: int, steps: range, micro_batch: int, world: int) -> dict[int, list[int]]:
    """Step → all samples of its micro-batches on all ranks, as the ranks' own samplers give them."""
    per_step = S // (micro_batch * world)
    seen: dict[int, list[int]] = {s: [] for s in steps}
    for rank in range(world):
        batches = list(StepBatchSampler(lambda s: s * S, per_step, steps.stop, steps.start, rank, world))
        assert len(batches) == per_step * len(steps)
        for i, batch in enumerate(batches):
            seen[steps.start + i // per_step] += batch
    return seen


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4), st.integers(1, 5), st.integers(0, 5))
def test_samples_of_a_step_do_not_depend_on_ranks_micro_batch_or_cuts(B, W, accumulate, steps, cut):
    S = B * W * accumulate
    cut = min(cut, steps - 1)
    for micro_batch, world in ((B, W), (S, 1), (1, S), (B * W, 1)):
        whole = _step_samples(S, range(steps), micro_batch, world)
        resumed = _step_samples(S, range(cut, steps), micro_batch, world)
        for s in range(steps):
            assert sorted(whole[s]) == list(range(s * S, (s + 1) * S))
            if s >= cut:
                assert whole[s] == resumed[s]


@given(st.integers(1, 4), st.integers(1, 4), st.lists(st.integers(1, 5), min_size=1, max_size=6), st.data())
def test_micro_batch_m_of_rank_r_begins_m_w_plus_r_micro_batches_into_its_step(W, accumulate, sizes, data):
    """Also where the micro-batch, here one of ``sizes`` for each step, grows from step to step."""
    bases = np.cumsum([0, *(B * W * accumulate for B in sizes)]).tolist()
    cut = data.draw(st.integers(0, len(sizes)))
    for r in range(W):
        expected = []
        for s in range(cut, len(sizes)):
            B = sizes[s]
            for m in range(accumulate):
                first = bases[s] + (m * W + r) * B
                expected.append(list(range(first, first + B)))
        assert list(StepBatchSampler(bases.__getitem__, accumulate, len(sizes), cut, r, W)) == expected


def test_micro_batches_are_dealt_out_to_the_ranks_in_turn():
    # build-nanogpt's: rank r of W starts at r·B and jumps by W·B
    assert list(StepBatchSampler(lambda s: 8 * s, 2, 1, rank=0, world_size=2)) == [[0, 1], [4, 5]]
    assert list(StepBatchSampler(lambda s: 8 * s, 2, 1, rank=1, world_size=2)) == [[2, 3], [6, 7]]


def test_length_is_that_of_the_whole_run_wherever_it_starts():
    # Lightning counts a resumed run's batches from step 0 on
    assert len(StepBatchSampler(lambda s: 8 * s, 2, 10, start_step=7, rank=1, world_size=2)) == 20


@given(st.integers(1, 3000), st.integers(0, 2**63))
@settings(max_examples=60)
def test_permute_is_a_permutation(n, key):
    assert np.array_equal(np.sort(permute(np.arange(n), n, np.uint64(key))), np.arange(n))


@given(st.integers(1, 2**60), st.integers(0, 2**64 - 1), st.data())
@settings(max_examples=60)
def test_no_two_places_of_a_permutation_meet_however_many_there_are(n, key, data):
    places = data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=50, unique=True))
    permuted = permute(np.array(places), n, np.uint64(key)).tolist()
    assert len(set(permuted)) == len(places)
    assert all(0 <= place < n for place in permuted)


MASK = 2**64 - 1


def _splitmix64(x: int) -> int:
    """Steele et al. 2014, with Python's own integers."""
    x = (x + 0x9E3779B97F4A7C15) & MASK
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & MASK
    x = (x ^ x >> 27) * 0x94D049BB133111EB & MASK
    return x ^ x >> 31


def _permuted(i: int, n: int, key: int) -> int:
    """Four Feistel rounds on the smallest 4^k ≥ n, at least 4, again and again until the result is below n."""
    bits = 1
    while 4**bits < n:
        bits += 1
    while True:
        left, right = divmod(i, 2**bits)
        for turn in range(4):
            left, right = right, left ^ _splitmix64((right + _splitmix64((key + turn) & MASK)) & MASK) % 2**bits
        i = left * 2**bits + right
        if i < n:
            return i


def _window(sample: int, shard_sequences: list[int], order: str, seed: int) -> int:
    """Sample n is window n mod N of epoch n div N; shuffled, an epoch permutes the shards and each shard's windows."""
    epoch, place = divmod(sample, sum(shard_sequences))
    if order == "sequential":
        return place
    key = _splitmix64((_splitmix64(seed) + epoch) & MASK)
    for turn in range(len(shard_sequences)):
        shard = _permuted(turn, len(shard_sequences), key)
        if place < shard_sequences[shard]:
            inside = _permuted(place, shard_sequences[shard], _splitmix64((key + shard) & MASK))
            return sum(shard_sequences[:shard]) + inside
        place -= shard_sequences[shard]
    raise AssertionError("beyond the epoch")


SHARDS = st.lists(st.integers(0, 40), min_size=1, max_size=5).filter(any)


@given(
    SHARDS,
    st.sampled_from(["sequential", "shuffled"]),
    st.integers(0, 2**63 - 1),
    st.lists(st.integers(0, 500) | st.integers(0, 10**12), min_size=1, max_size=20),
)
def test_sample_n_is_window_n_mod_n_windows_of_its_epoch_in_that_epochs_order(shard_sequences, order, seed, samples):
    expected = [_window(n, shard_sequences, order, seed) for n in samples]
    assert dataset_indices(np.array(samples), shard_sequences, order, seed).tolist() == expected


def test_the_permutation_never_changes():
    # literals: a resumed run must find the order that it began with, under any version of any library
    assert permute(np.arange(10), 10, np.uint64(7)).tolist() == [9, 2, 4, 5, 8, 7, 6, 0, 1, 3]
    assert dataset_indices(np.arange(8), [3, 5], "shuffled", 42).tolist() == [3, 4, 5, 6, 7, 2, 1, 0]


@given(SHARDS, st.integers(0, 9), st.sampled_from(["sequential", "shuffled"]))
def test_each_window_of_an_epoch_comes_exactly_once(shard_sequences, seed, order):
    n = sum(shard_sequences)
    windows = dataset_indices(np.arange(3 * n), shard_sequences, order, seed)
    for epoch in windows.reshape(3, n):
        assert sorted(epoch) == list(range(n))


@given(st.lists(st.integers(1, 30), min_size=1, max_size=6), st.integers(1, 12))
def test_a_window_belongs_to_the_shard_that_it_begins_in(lengths, T):
    shard_of_token = [shard for shard, length in enumerate(lengths) for _ in range(length)]
    # the last token of a window is only a target, which the window after it begins with
    begins = [start for start in range(0, sum(lengths), T) if start + T + 1 <= sum(lengths)]
    expected = [sum(shard_of_token[start] == shard for start in begins) for shard in range(len(lengths))]
    assert sequences_per_shard(lengths, T) == expected


def test_a_window_can_be_asked_for_without_the_others():
    shards = [30, 7, 41]
    together = dataset_indices(np.arange(200), shards, "shuffled", 3)
    for sample in (0, 77, 78, 155, 199):
        assert dataset_indices(np.array([sample]), shards, "shuffled", 3)[0] == together[sample]


def test_epochs_and_seeds_are_shuffled_differently_and_shards_kept_together():
    shards = [50, 50, 50]
    first, second = dataset_indices(np.arange(300), shards, "shuffled", 1).reshape(2, 150)
    assert (first != second).any()
    assert (dataset_indices(np.arange(150), shards, "shuffled", 2) != first).any()
    for part in first.reshape(3, 50):
        assert len(set(part // 50)) == 1  # one shard at a time
        assert (np.diff(part) != 1).any()  # and not front to back


def test_sequential_reads_front_to_back_and_over_again():
    assert dataset_indices(np.arange(8), [2, 1], "sequential", 0).tolist() == [0, 1, 2, 0, 1, 2, 0, 1]


@given(st.integers(1, 60), st.integers(1, 9), st.integers(1, 5))
def test_evaluation_sees_each_window_once_and_pads_none(n_sequences, batch_size, W):
    samplers = [EvalBatchSampler(n_sequences, batch_size, rank, W) for rank in range(W)]
    batches = [list(sampler) for sampler in samplers]
    assert sorted(w for of_rank in batches for batch in of_rank for w in batch) == list(range(n_sequences))
    assert [len(of_rank) for of_rank in batches] == [len(sampler) for sampler in samplers]
    assert all(1 <= len(batch) <= batch_size for of_rank in batches for batch in of_rank)
