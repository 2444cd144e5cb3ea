"""One order: which windows a step sees depends on its number alone."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt2_lightning.data.order import EvalBatchSampler, StepBatchSampler, permute, windows_of


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


def test_the_permutation_never_changes():
    # literals: a resumed run must find the order that it began with, under any version of any library
    assert permute(np.arange(10), 10, np.uint64(7)).tolist() == [9, 2, 4, 5, 8, 7, 6, 0, 1, 3]
    assert windows_of(np.arange(8), [3, 5], "shuffled", 42).tolist() == [3, 4, 5, 6, 7, 2, 1, 0]


@given(
    st.lists(st.integers(0, 40), min_size=1, max_size=5), st.integers(0, 9), st.sampled_from(["sequential", "shuffled"])
)
def test_each_window_of_an_epoch_comes_exactly_once(shard_windows, seed, order):
    n = sum(shard_windows)
    if n == 0:
        return
    windows = windows_of(np.arange(3 * n), shard_windows, order, seed)
    for epoch in windows.reshape(3, n):
        assert sorted(epoch) == list(range(n))


def test_a_window_can_be_asked_for_without_the_others():
    shards = [30, 7, 41]
    together = windows_of(np.arange(200), shards, "shuffled", 3)
    for sample in (0, 77, 78, 155, 199):
        assert windows_of(np.array([sample]), shards, "shuffled", 3)[0] == together[sample]


def test_epochs_and_seeds_are_shuffled_differently_and_shards_kept_together():
    shards = [50, 50, 50]
    first, second = windows_of(np.arange(300), shards, "shuffled", 1).reshape(2, 150)
    assert (first != second).any()
    assert (windows_of(np.arange(150), shards, "shuffled", 2) != first).any()
    for part in first.reshape(3, 50):
        assert len(set(part // 50)) == 1  # one shard at a time
        assert (np.diff(part) != 1).any()  # and not front to back


def test_sequential_reads_front_to_back_and_over_again():
    assert windows_of(np.arange(8), [2, 1], "sequential", 0).tolist() == [0, 1, 2, 0, 1, 2, 0, 1]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_evaluation_sees_each_window_once_and_pads_none(world_size):
    seen = [w for rank in range(world_size) for batch in EvalBatchSampler(11, 4, rank, world_size) for w in batch]
    assert sorted(seen) == list(range(11))
