"""What a step trains on and what validation reads: the same sequences on any number of ranks and workers."""

import re
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonargparse.typing import PositiveInt

from gpt2_lightning.data.datamodule import SequenceDataset, TokenDataModule
from gpt2_lightning.data.shards import list_shards
from gpt2_lightning.schedule import BatchSizeSchedule

T, S, STEPS = 8, 12, 5  # tokens per sequence, sequences per step, steps
SHARDS = st.lists(st.integers(1, 40), min_size=1, max_size=6).filter(lambda lengths: sum(lengths) > 12)
ORDERS = st.sampled_from(["sequential", "shuffled"])


def set_up(root, rank=0, world_size=1, stage="fit", global_step=0, block_size=T, max_steps=STEPS, **options):
    """A TokenDataModule as a Trainer sets it up on one of ``world_size`` ranks, and the lines that it printed."""
    options = {"total_batch_tokens": S * T, "validation_tokens": 11 * T, "micro_batch_size": 4} | options
    data = TokenDataModule(root=str(root), source=None, **options)
    config = SimpleNamespace(block_size=block_size, vocab_size=64)
    data.printed = []
    data.trainer = SimpleNamespace(
        lightning_module=SimpleNamespace(model=SimpleNamespace(config=config), print=data.printed.append),
        world_size=world_size,
        global_rank=rank,
        global_step=global_step,
        max_steps=max_steps,
        training=stage == "fit",
        overfit_batches=0.0,
        strategy=SimpleNamespace(root_device=torch.device("cpu")),
    )
    data.setup(stage)
    return data


def write_shards(folder, lengths, split="train"):
    """Writes shards of random tokens; returns their concatenation as a list."""
    tokens = np.random.default_rng(sum(lengths)).integers(0, 64, sum(lengths)).astype(np.uint16)
    for number, part in enumerate(np.split(tokens, np.cumsum(lengths)[:-1]), start=1):
        np.save(folder / f"x_{split}_{number:06d}.npy", part)
    return tokens.tolist()


def sequences_of(tokens, T):
    return [tokens[i * T : i * T + T + 1] for i in range((len(tokens) - 1) // T)]


# -- dataset -----------------------------------------------------------------------------------------------------------


@settings(max_examples=40)
@given(lengths=SHARDS, T=st.integers(1, 12), order=ORDERS, seed=st.integers(0, 9))
def test_sequence_i_is_the_tokens_from_i_T_on_of_all_shards_in_sequence(tmp_path_factory, lengths, T, order, seed):
    folder = tmp_path_factory.mktemp("shards")
    sequences = sequences_of(write_shards(folder, lengths), T)
    data = SequenceDataset(list_shards(folder, "train"), T, 64, order, seed)
    assert len(data) == len(sequences)
    for epoch in range(2):
        read = data.__getitems__(list(range(epoch * len(data), (epoch + 1) * len(data)))).tolist()
        if order == "sequential":
            assert read == sequences
        else:
            assert sorted(read) == sorted(sequences)


@settings(max_examples=30)
@given(lengths=SHARDS, vocab_size=st.integers(1, 64), order=ORDERS)
def test_a_token_id_beyond_the_vocabulary_is_refused_with_its_shard(tmp_path_factory, lengths, vocab_size, order):
    folder = tmp_path_factory.mktemp("shards")
    tokens = write_shards(folder, lengths)
    shards = list_shards(folder, "train")
    highest = [max(part.tolist()) for part in np.split(tokens, np.cumsum(lengths)[:-1])]
    wrong = [(token, shard) for token, shard in zip(highest, shards, strict=True) if token >= vocab_size]
    if not wrong:
        assert len(SequenceDataset(shards, T, vocab_size, order, 0)) == (sum(lengths) - 1) // T
        return
    with pytest.raises(ValueError, match=re.escape(f"token id {wrong[0][0]} in {wrong[0][1]} is not below")):
        SequenceDataset(shards, T, vocab_size, order, 0)


# -- training ----------------------------------------------------------------------------------------------------------


def sequences_by_step(root, world_size, micro_batch_size, **options):
    """Step → all its sequences (as tuples of tokens) on all ranks, sorted."""
    steps = {s: [] for s in range(STEPS)}
    for rank in range(world_size):
        data = set_up(root, rank, world_size, micro_batch_size=micro_batch_size, **options)
        batches = list(data.train_dataloader())
        assert len(batches) == STEPS * data.accumulate_grad_batches
        for i, batch in enumerate(batches):
            assert (batch.dtype, batch.shape) == (torch.uint16, (micro_batch_size, T + 1))
            steps[i // data.accumulate_grad_batches] += map(tuple, batch.tolist())
    return {s: sorted(sequences) for s, sequences in steps.items()}


@pytest.mark.parametrize("order", ["sequential", "shuffled"])
def test_two_ranks_with_two_workers_read_what_one_rank_without_workers_reads(make_shards, order):
    root = make_shards(train=400)  # 49 sequences: the 60 of this run reach into a second epoch
    alone = sequences_by_step(root, 1, 4, order=order)
    assert sequences_by_step(root, 2, 2, num_workers=2, order=order) == alone
    assert sequences_by_step(root, 3, 1, order=order) == alone


def ramp(step, start, total, ramp_tokens):
    """Tokens before a step, and of it, of a batch that doubles when GPT-3's line has reached the next doubling."""
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
def test_a_step_reads_its_sequences_in_order_on_any_ranks_micro_batches_workers_and_resume(tmp_path_factory, data):
    draw = data.draw
    T, W, accumulate, B, doublings, steps = (draw(st.integers(1, most)) for most in (6, 3, 3, 3, 3, 7))
    doublings -= 1
    start = B * accumulate * W * T
    total = start << doublings
    ramp_tokens = draw(st.integers(1, 6 * total)) if doublings else None
    resumed_at, workers = draw(st.integers(0, steps)), draw(st.sampled_from([0, 0, 2]))
    order = draw(ORDERS)
    folder = tmp_path_factory.mktemp("shards")
    sequences = sequences_of(write_shards(folder, draw(SHARDS)), T)
    write_shards(folder, [100], "val")

    stages = [ramp(s, start, total, ramp_tokens) if ramp_tokens else (s * total, total) for s in range(steps)]
    if order == "shuffled":  # the order of one reader, one sequence at a time
        alone = SequenceDataset(list_shards(folder, "train"), T, 64, order, 1337)
        sequences = [alone[n].tolist() for n in range(sum(stages[-1]) // T)]

    schedule = BatchSizeSchedule(start, ramp_tokens) if ramp_tokens else None
    options = {"block_size": T, "max_steps": steps, "total_batch_tokens": total, "validation_tokens": 90}
    options |= {"micro_batch_size": B << doublings, "batch_size_schedule": schedule, "order": order}
    read = []
    for rank in range(W):
        module = set_up(folder, rank, W, global_step=resumed_at, num_workers=workers, **options)
        assert module.accumulate_grad_batches == accumulate
        read.append(list(module.train_dataloader()))
        assert len(read[rank]) == (steps - resumed_at) * accumulate
    for s, (before, size) in list(enumerate(stages))[resumed_at:]:
        micro_batches = range((s - resumed_at) * accumulate, (s - resumed_at + 1) * accumulate)
        in_order = [sequence for m in micro_batches for rank in range(W) for sequence in read[rank][m].tolist()]
        first = before // T
        assert in_order == [sequences[n % len(sequences)] for n in range(first, first + size // T)]
        assert len(in_order) * T == size == module.tokens_before(s + 1) - module.tokens_before(s)


def test_setup_prints_the_size_of_the_data_and_how_often_it_is_read(make_shards):
    data = set_up(make_shards(train=401, val=81))
    assert data.printed == [f"data: {data.root}, 401 tokens to train on (1.20 epochs in 5 steps), 81 to validate on"]


def test_auto_takes_the_largest_micro_batch_that_divides_the_step_up_to_16_on_a_cpu(make_shards):
    data = set_up(make_shards(), micro_batch_size="auto", total_batch_tokens=48 * T)
    assert (data.auto_micro_batch, data.micro_batch_size, data.accumulate_grad_batches) == (True, 16, 3)
    assert data.micro_batch_sizes(at_most=9) == [1, 2, 3, 4, 6, 8]
    data.set_micro_batch_size(6)
    assert data.accumulate_grad_batches == 8


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_split_without_one_whole_sequence_is_refused(make_shards, split):
    root = make_shards(**{split: T})
    with pytest.raises(ValueError, match=f"the {split} split in {root} has 8 tokens, but one sequence needs 9"):
        set_up(root)


# -- resume ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"order": "shuffled"}, "order=sequential, not shuffled"),
        ({"seed": 1}, "seed=1337, not 1"),
        ({"total_batch_tokens": 2 * S * T}, "total_batch_tokens=96, not 192"),
        ({"block_size": T // 2}, "block_size=8, not 4"),
        ({"batch_size_schedule": BatchSizeSchedule(S * T, 500)}, "batch_size_schedule=None, not {'start_tokens': 96"),
        ({"train": 401}, "shards other than those in"),
    ],
)
def test_a_checkpoint_of_other_data_order_or_step_is_refused(make_shards, changes, difference):
    saved = set_up(make_shards(train=400)).state_dict()
    data = set_up(make_shards(train=changes.pop("train", 400), name="now"), **changes)
    with pytest.raises(ValueError, match=f"the checkpoint to resume from was trained with {difference}"):
        data.load_state_dict(saved)


def test_the_same_data_in_another_folder_resumes_and_auto_keeps_its_micro_batch(make_shards, tmp_path):
    from_cli = {"micro_batch_size": PositiveInt(6), "total_batch_tokens": PositiveInt(S * T)}
    torch.save(set_up(make_shards(), **from_cli).state_dict(), tmp_path / "state")
    saved = torch.load(tmp_path / "state", weights_only=True)  # plain types only
    root = make_shards(name="moved")
    for micro_batch_size, expected in (("auto", (6, 2)), (3, (3, 4))):
        data = set_up(root, micro_batch_size=micro_batch_size)
        data.load_state_dict(saved)
        assert (data.micro_batch_size, data.accumulate_grad_batches) == expected


def test_a_checkpoint_can_be_validated_on_other_data(make_shards):
    saved = set_up(make_shards()).state_dict()
    set_up(make_shards(train=401, name="other"), stage="validate").load_state_dict(saved)


# -- validation --------------------------------------------------------------------------------------------------------


@settings(max_examples=30)
@given(n=st.integers(2 * T, 200), asked=st.integers(1, 250), W=st.integers(1, 4), B=st.sampled_from([1, 2, 3, 4, 6]))
def test_validation_reads_each_sequence_once_on_any_number_of_ranks(tmp_path_factory, n, asked, W, B):
    folder = tmp_path_factory.mktemp("shards")
    tokens = write_shards(folder, [n], "val")
    sequences = sequences_of(tokens, T)[: max(1, asked // T)]
    options = {"stage": "validate", "micro_batch_size": B, "validation_tokens": asked}
    loaders = [set_up(folder, rank, W, **options).val_dataloader for rank in range(W)]
    if len(sequences) < W:
        with pytest.raises(ValueError, match=rf"has {len(sequences)} sequence.* for {W} devices: raise .* {W * T}"):
            loaders[0]()
        return
    batches = [list(loader()) for loader in loaders]
    assert all(batches)  # Lightning runs no validation loop on a rank without a batch
    assert sorted(row for of_rank in batches for batch in of_rank for row in batch.tolist()) == sorted(sequences)
