"""What a step trains on and what a validation reads: the same samples on any number of ranks and workers."""

import re
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gpt2_lightning.data.datamodule import SequenceDataset, TokenDataModule
from gpt2_lightning.data.order import accumulation
from gpt2_lightning.data.shards import list_shards

T, S, STEPS = 8, 12, 5  # tokens a window, samples and steps


def _data(root, rank=0, world_size=1, stage="fit", global_step=0, block_size=T, max_steps=STEPS, **options):
    """A TokenDataModule as a Trainer would have set it up on one of ``world_size`` ranks."""
    options = {"total_batch_tokens": S * T, "validation_tokens": 11 * T} | options
    data = TokenDataModule(root=str(root), source=None, **options)
    config = SimpleNamespace(block_size=block_size, vocab_size=64)
    module = SimpleNamespace(model=SimpleNamespace(config=config), print=lambda *_: None)
    data.trainer = SimpleNamespace(
        lightning_module=module,
        world_size=world_size,
        global_rank=rank,
        global_step=global_step,
        max_steps=max_steps,
        overfit_batches=0.0,
        limit_train_batches=1.0,
        accumulate_grad_batches=1,
        strategy=SimpleNamespace(root_device=torch.device("cpu")),
    )
    data.setup(stage)
    return data


def _steps(root, world_size, **options):
    """Step → the set of its windows (as tuples of tokens), over all ranks."""
    steps: dict[int, list[tuple[int, ...]]] = {s: [] for s in range(STEPS)}
    for rank in range(world_size):
        data = _data(root, rank, world_size, **options)
        batches = list(data.train_dataloader())
        per_step = data.trainer.accumulate_grad_batches
        assert len(batches) == STEPS * per_step
        for i, batch in enumerate(batches):
            assert batch.dtype == torch.uint16
            assert batch.shape == (options["micro_batch_size"], T + 1)
            steps[i // per_step] += map(tuple, batch.tolist())
    return {s: sorted(rows) for s, rows in steps.items()}


@pytest.mark.parametrize("order", ["sequential", "shuffled"])
def test_two_ranks_with_two_workers_see_what_one_without_sees(make_shards, order):
    root = make_shards(train=400)  # 49 windows: the 60 samples run into a second epoch
    alone = _steps(root, 1, micro_batch_size=4, num_workers=0, order=order)
    assert _steps(root, 2, micro_batch_size=2, num_workers=2, order=order) == alone
    assert _steps(root, 3, micro_batch_size=1, num_workers=0, order=order) == alone
    if order == "sequential":
        tokens = np.load(list_shards(root, "train")[0])
        assert alone[0] == sorted(tuple(tokens[i * T : i * T + T + 1].tolist()) for i in range(S))


def _write_shards(folder, lengths, split="train"):
    """Shards of random tokens; their concatenation."""
    tokens = np.random.default_rng(sum(lengths)).integers(0, 64, sum(lengths)).astype(np.uint16)
    for number, part in enumerate(np.split(tokens, np.cumsum(lengths)[:-1]), start=1):
        np.save(folder / f"x_{split}_{number:06d}.npy", part)
    return tokens


SHARDS = st.lists(st.integers(1, 40), min_size=1, max_size=6).filter(lambda lengths: sum(lengths) > 12)


@settings(max_examples=40)
@given(lengths=SHARDS, T=st.integers(1, 12), order=st.sampled_from(["sequential", "shuffled"]), seed=st.integers(0, 9))
def test_sample_i_is_tokens_from_i_t_on_of_the_concatenated_shards_or_of_a_permutation_of_them(
    tmp_path_factory, lengths, T, order, seed
):
    folder = tmp_path_factory.mktemp("shards")
    tokens = _write_shards(folder, lengths).tolist()
    windows = [tokens[i * T : i * T + T + 1] for i in range((len(tokens) - 1) // T)]
    data = SequenceDataset(list_shards(folder, "train"), T, 64, order, seed)
    assert len(data) == len(windows)
    for epoch in range(2):
        seen = data.__getitems__(list(range(epoch * len(windows), (epoch + 1) * len(windows)))).tolist()
        assert (seen if order == "sequential" else sorted(seen)) == (
            windows if order == "sequential" else sorted(windows)
        )


@settings(max_examples=30)
@given(lengths=SHARDS, vocab_size=st.integers(1, 64), order=st.sampled_from(["sequential", "shuffled"]))
def test_one_id_beyond_the_vocabulary_anywhere_is_named_with_its_shard(tmp_path_factory, lengths, vocab_size, order):
    folder = tmp_path_factory.mktemp("shards")
    tokens = _write_shards(folder, lengths)
    shards = list_shards(folder, "train")
    beyond = [max(part.tolist()) for part in np.split(tokens, np.cumsum(lengths)[:-1])]
    wrong = [(highest, shard) for highest, shard in zip(beyond, shards, strict=True) if highest >= vocab_size]
    if not wrong:
        assert len(SequenceDataset(shards, T, vocab_size, order, 0)) == (sum(lengths) - 1) // T
        return
    with pytest.raises(ValueError, match=re.escape(f"token id {wrong[0][0]} in {wrong[0][1]} is not below")):
        SequenceDataset(shards, T, vocab_size, order, 0)


def _ramp(step, start, total, ramp_tokens):
    """Tokens before and of a step of a batch that doubles whenever GPT-3's line has reached the next doubling."""
    before = 0
    for _ in range(step + 1):
        line = start + Fraction((total - start) * before, ramp_tokens)
        size = start
        while size < total and 2 * size <= line:
            size *= 2
        before += size
    return before - size, size


@settings(max_examples=15)
@given(data=st.data())
def test_a_step_takes_its_tokens_in_their_order_on_any_ranks_micro_batch_workers_and_cut(tmp_path_factory, data):
    draw = data.draw
    T, W, accumulate, B, doublings, steps = (draw(st.integers(1, most)) for most in (6, 3, 3, 3, 3, 7))
    doublings -= 1
    start = B * accumulate * W * T
    total = start << doublings
    schedule = {"start_tokens": start, "ramp_tokens": draw(st.integers(1, 6 * total))} if doublings else None
    cut, workers = draw(st.integers(0, steps)), draw(st.sampled_from([0, 0, 2]))
    order = draw(st.sampled_from(["sequential", "shuffled"]))
    folder = tmp_path_factory.mktemp("shards")
    tokens = _write_shards(folder, draw(SHARDS)).tolist()
    _write_shards(folder, [100], "val")

    stages = [_ramp(s, start, total, schedule["ramp_tokens"]) if schedule else (s * total, total) for s in range(steps)]
    windows = [tokens[i * T : i * T + T + 1] for i in range((len(tokens) - 1) // T)]
    if order == "shuffled":  # one reader's order, one window at a time: that of any number of readers
        alone = SequenceDataset(list_shards(folder, "train"), T, 64, order, 1337)
        windows = [alone[n].tolist() for n in range((stages[-1][0] + stages[-1][1]) // T)]

    options = {"block_size": T, "max_steps": steps, "total_batch_tokens": total, "validation_tokens": 90}
    options |= {"micro_batch_size": B << doublings, "batch_size_schedule": schedule, "order": order}
    read = []
    for rank in range(W):
        module = _data(folder, rank, W, global_step=cut, num_workers=workers, **options)
        assert module.trainer.accumulate_grad_batches == accumulate
        read.append(list(module.train_dataloader()))
        assert len(read[rank]) == (steps - cut) * accumulate
    for s, (before, size) in list(enumerate(stages))[cut:]:
        in_order = [
            row
            for m in range(accumulate)
            for rank in range(W)
            for row in read[rank][(s - cut) * accumulate + m].tolist()
        ]
        first = before // T
        assert in_order == [windows[n % len(windows)] for n in range(first, first + size // T)]
        assert len(in_order) * T == size == module.tokens_before(s + 1) - module.tokens_before(s)


def test_windows_run_across_the_borders_of_shards_and_nothing_is_dropped(tmp_path):
    tokens = np.arange(60, dtype=np.uint16)
    for number, part in enumerate(np.split(tokens, [13, 20]), start=1):
        np.save(tmp_path / f"x_train_{number:06d}.npy", part)
    data = SequenceDataset(list_shards(tmp_path, "train"), T, 64, "sequential", 0)
    assert len(data) == 7
    assert data.shard_sequences == [2, 1, 4]
    for sample in range(7):
        assert data[sample].tolist() == list(range(sample * T, sample * T + T + 1))


def test_each_rank_has_a_validation_batch_or_the_run_is_refused(make_shards):
    root = make_shards(val=2 * T + 1)  # two windows, which would be one batch
    for rank in range(2):
        assert len(_data(root, rank, 2, stage="validate", micro_batch_size=4).val_dataloader()) == 1
    with pytest.raises(ValueError, match=r"2 windows of 8 tokens on 3 devices: raise validation\.tokens to 24 or more"):
        _data(root, 0, 3, stage="validate", micro_batch_size=4).val_dataloader()


@settings(max_examples=30)
@given(n=st.integers(2 * T, 200), asked=st.integers(0, 250), W=st.integers(1, 4), B=st.integers(1, 9))
def test_validation_reads_each_of_its_windows_once_on_any_number_of_ranks(tmp_path_factory, n, asked, W, B):
    folder = tmp_path_factory.mktemp("shards")
    tokens = _write_shards(folder, [n], "val").tolist()
    windows = [tokens[i * T : i * T + T + 1] for i in range(min((n - 1) // T, max(1, asked // T)))]
    options = {"stage": "validate", "micro_batch_size": B, "validation_tokens": asked}
    if len(windows) < W:
        with pytest.raises(ValueError, match=f"validation would see {len(windows)} windows of 8 tokens on {W} devices"):
            _data(folder, 0, W, **options).val_dataloader()
        return
    batches = [list(_data(folder, rank, W, **options).val_dataloader()) for rank in range(W)]
    assert all(batches)
    assert sorted(row for of_rank in batches for batch in of_rank for row in batch.tolist()) == sorted(windows)


@pytest.mark.parametrize(
    ("micro_batch_size", "world_size", "expected"), [(64, 1, 8), (64, 8, 1), (32, 8, 2), (16, 2, 16), (512, 1, 1)]
)
def test_the_published_step_on_several_machines(micro_batch_size, world_size, expected):
    assert accumulation(524288, micro_batch_size, 1024, world_size) == expected


@given(
    T=st.integers(1, 8),
    W=st.integers(1, 4),
    B=st.integers(1, 12),
    micro_batch_sizes=st.integers(1, 12),
    rest=st.sampled_from([0, 0, 1, 3]),
    doublings=st.integers(0, 2),
)
@example(T=16, W=1, B=3, micro_batch_sizes=8, rest=0, doublings=0)
def test_accumulation_is_the_quotient_or_the_micro_batches_that_would_do_are_told(
    T, W, B, micro_batch_sizes, rest, doublings
):
    """The first step of a ramp is of ``start`` tokens, and its micro-batches are whole as well."""
    start = micro_batch_sizes * W * T + rest
    total = start << doublings
    would_do = [b for b in range(1, total + 1) if total % (b * T * W) == 0 and start * b % total == 0]
    if B in would_do:
        found = accumulation(total, B, T, W, start_tokens=start)
        assert found * B * T * W == total
        assert accumulation(total, B, T, W, found, start) == found
        with pytest.raises(ValueError, match=f"takes {found} micro-batches on {W} device"):
            accumulation(total, B, T, W, found + 1, start)
    else:
        told = f"set data.micro_batch_size to one of {would_do}, or" if would_do else f"to a multiple of {T * W}"
        with pytest.raises(ValueError, match=re.escape(told)):
            accumulation(total, B, T, W, start_tokens=start)


def test_a_step_of_more_tokens_than_anybody_has_is_refused_at_once():
    assert accumulation(2**39, 64, 16, 1) == 2**29
    with pytest.raises(ValueError, match="more than any step can take: lower it"):
        accumulation(10**21, 4, 16, 1)
