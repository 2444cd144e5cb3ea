"""What a step trains on and what a validation reads: the same samples on any number of ranks and workers."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from gpt2_lightning.data.datamodule import TokenDataModule, WindowDataset, accumulation
from gpt2_lightning.data.shards import list_shards

T, S, STEPS = 8, 12, 5  # tokens a window, samples and steps


def _data(root, rank=0, world_size=1, stage="fit", global_step=0, **options):
    """A TokenDataModule as a Trainer would have set it up on one of ``world_size`` ranks."""
    data = TokenDataModule(root=str(root), source=None, total_batch_tokens=S * T, validation_tokens=11 * T, **options)
    config = SimpleNamespace(block_size=T, vocab_size=64)
    module = SimpleNamespace(model=SimpleNamespace(config=config), print=lambda *_: None)
    data.trainer = SimpleNamespace(
        lightning_module=module,
        world_size=world_size,
        global_rank=rank,
        global_step=global_step,
        max_steps=STEPS,
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


def test_windows_run_across_the_borders_of_shards_and_nothing_is_dropped(tmp_path):
    tokens = np.arange(60, dtype=np.uint16)
    for number, part in enumerate(np.split(tokens, [13, 20]), start=1):
        np.save(tmp_path / f"x_train_{number:06d}.npy", part)
    data = WindowDataset(list_shards(tmp_path, "train"), T, 64, "sequential", 0)
    assert len(data) == 7
    assert data.shard_windows == [2, 1, 4]
    for sample in range(7):
        assert data[sample].tolist() == list(range(sample * T, sample * T + T + 1))


def test_each_rank_has_a_validation_batch_or_the_run_is_refused(make_shards):
    root = make_shards(val=2 * T + 1)  # two windows, which would be one batch
    for rank in range(2):
        assert len(_data(root, rank, 2, stage="validate", micro_batch_size=4).val_dataloader()) == 1
    with pytest.raises(ValueError, match=r"2 windows of 8 tokens on 3 devices: raise validation\.tokens to 24 or more"):
        _data(root, 0, 3, stage="validate", micro_batch_size=4)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_validation_reads_the_same_windows_on_any_number_of_ranks(make_shards, world_size):
    root = make_shards(val=200)
    rows = [
        tuple(row.tolist())
        for rank in range(world_size)
        for batch in _data(root, rank, world_size, stage="validate", micro_batch_size=4).val_dataloader()
        for row in batch
    ]
    tokens = np.load(list_shards(root, "val")[0])
    assert sorted(rows) == sorted(tuple(tokens[i * T : i * T + T + 1].tolist()) for i in range(11))


@pytest.mark.parametrize(
    ("micro_batch_size", "world_size", "expected"), [(64, 1, 8), (64, 8, 1), (32, 8, 2), (16, 2, 16), (512, 1, 1)]
)
def test_the_published_step_on_several_machines(micro_batch_size, world_size, expected):
    assert accumulation(524288, micro_batch_size, 1024, world_size) == expected
