"""From shards to micro-batches: the dataset in training order, and the LightningDataModule around it."""

import hashlib
import signal
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jsonargparse.typing import NonNegativeInt, PositiveInt
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_convert

from gpt2_lightning.data.order import (
    AUTO_ON_CPU,
    EvalBatchSampler,
    Order,
    StepBatchSampler,
    accumulation,
    dataset_indices,
    devices,
    micro_batch_sizes,
    sequences_per_shard,
)
from gpt2_lightning.data.prepare.write import ensure_prepared
from gpt2_lightning.data.shards import Split, TokenStream, check_sizes, list_shards, open_shard
from gpt2_lightning.errors import UserError
from gpt2_lightning.schedule import BatchSizeSchedule, batch_size_stages, tokens_before


class SequenceDataset(Dataset[Tensor]):
    """Run index → the tokens of a sequence and the one after it, (block_size + 1,) uint16.

    ``len`` is N, the number of sequences in the shards; run indices go beyond it, into later epochs (see ``order.py``).
    The DataLoader reads a micro-batch (B, block_size + 1) in one call of ``__getitems__``.

    Raises:
        UserError: a token id is not below ``vocab_size``.
    """

    def __init__(self, shards: list[Path], block_size: int, vocab_size: int, order: Order, seed: int) -> None:
        self.stream = TokenStream(shards)
        self.block_size = block_size
        self.vocab_size = vocab_size
        self.order: Order = order
        self.seed = seed
        self.shard_sequences = sequences_per_shard(self.stream.lengths, block_size)
        # at start, all of a small dataset and the first million tokens of each shard of a large one: a second of work
        checked = None if len(self.stream) <= 100_000_000 else 1_000_000
        for path in self.stream.paths:
            self._check_ids(open_shard(path)[:checked], path)

    def _check_ids(self, tokens: np.ndarray, where: Path) -> None:
        highest = int(tokens.max())
        if highest >= self.vocab_size:
            raise UserError(
                f"token id {highest} in {where} is not below model.config.vocab_size={self.vocab_size}: "
                f"set vocab_size to at least {highest + 1}, or choose data that fits"
            )

    def __len__(self) -> int:
        return sum(self.shard_sequences)

    def __getitem__(self, run_index: int) -> Tensor:
        return self.__getitems__([run_index])[0]

    def __getitems__(self, run_indices: list[int]) -> Tensor:
        indices = dataset_indices(np.asarray(run_indices), self.shard_sequences, self.order, self.seed)
        tokens = self.stream.read(indices * self.block_size, self.block_size + 1)
        self._check_ids(tokens, self.stream.paths[0].parent)
        return torch.from_numpy(tokens)

    def fingerprint(self) -> str:
        """sha256 of the shards' names, lengths and first 2,048 tokens: it identifies the data, wherever it lies."""
        sha = hashlib.sha256()
        for path, length in zip(self.stream.paths, self.stream.lengths, strict=True):
            sha.update(f"{path.name} {length}\n".encode() + open_shard(path)[:2048].tobytes())
        return sha.hexdigest()


class TokenDataModule(LightningDataModule):
    """GPT-2 tokens from a folder of shards, ``total_batch_tokens`` per optimizer step on any number of devices.

    It computes ``accumulate_grad_batches`` in ``setup``; ``GPTModule`` gives it to the Trainer.

    Args:
        root: folder of the shards; if it has none, they are prepared from ``source`` first.
        source: fineweb-edu, stdlib (the standard library of the running Python), ORG/NAME[@REVISION] on the hub, or
            local .txt, .jsonl and .parquet files; null takes the shards in ``root`` as they are.
        order: sequential reads the shards front to back; shuffled permutes their sequences, differently in each epoch.
        seed: of that order.
        total_batch_tokens: tokens per optimizer step, over all devices and micro-batches.
        micro_batch_size: sequences per device and forward pass; gradients are accumulated over as many as the step
            needs. auto takes the largest that divides the step and fits the device's memory, on a CPU at most 16.
        batch_size_schedule: starts with steps of ``start_tokens`` that double until they have ``total_batch_tokens``
            after ``ramp_tokens`` tokens; micro-batches grow with them, their number stays.
        num_workers: processes that read ahead; the order does not depend on them.
        validation_tokens: tokens of the validation shards that the validation loss is measured on.
    """

    train: SequenceDataset
    val: SequenceDataset
    accumulate_grad_batches: int
    """Micro-batches per device and step; set by ``setup("fit")`` and ``set_micro_batch_size``."""

    def __init__(
        self,
        root: str = "data/fineweb-edu-10B",
        source: str | list[str] | None = "fineweb-edu",
        order: Order = "sequential",
        seed: NonNegativeInt = 1337,
        total_batch_tokens: PositiveInt = 524288,
        micro_batch_size: PositiveInt | Literal["auto"] = 64,
        batch_size_schedule: BatchSizeSchedule | None = None,
        num_workers: NonNegativeInt = 0,
        validation_tokens: PositiveInt = 10485760,
    ) -> None:
        super().__init__()
        self.root = Path(root)
        self.source = source
        self.order: Order = order
        self.seed = int(seed)  # int: jsonargparse's PositiveInt is a class of its own, which no checkpoint may hold
        self.total_batch_tokens = int(total_batch_tokens)
        self.auto_micro_batch = micro_batch_size == "auto"
        self.micro_batch_size = AUTO_ON_CPU if micro_batch_size == "auto" else int(micro_batch_size)
        self.batch_size_schedule = batch_size_schedule
        self.stages = batch_size_stages(self.total_batch_tokens, batch_size_schedule)
        self.num_workers = num_workers
        self.validation_tokens = validation_tokens

    def prepare_data(self) -> None:
        if self.source is not None:
            ensure_prepared(self.source, self.root)

    def setup(self, stage: str) -> None:
        assert self.trainer is not None
        check_sizes(self.root)
        self.val = self._dataset("val", "sequential")
        if stage != "fit":
            return
        self.train = self._dataset("train", self.order)
        if self.auto_micro_batch:
            on_cpu = self.trainer.strategy.root_device.type == "cpu"
            self.micro_batch_size = self.micro_batch_sizes(AUTO_ON_CPU if on_cpu else self.total_batch_tokens)[-1]
        self.set_micro_batch_size(self.micro_batch_size)
        max_steps = self.trainer.max_steps
        epochs = self.tokens_before(max_steps) / (len(self.train) * self.train.block_size)
        self.trainer.lightning_module.print(
            f"data: {self.root}, {len(self.train.stream):,} tokens to train on ({epochs:.2f} epochs in "
            f"{max_steps:,} steps), {len(self.val.stream):,} to validate on"
        )

    def _dataset(self, split: Split, order: Order) -> SequenceDataset:
        config: Any = self.trainer.lightning_module.model.config  # type: ignore[union-attr]
        dataset = SequenceDataset(list_shards(self.root, split), config.block_size, config.vocab_size, order, self.seed)
        if len(dataset) == 0:
            raise UserError(
                f"the {split} split in {self.root} has {len(dataset.stream)} tokens, but one sequence needs "
                f"{config.block_size + 1}: give more text, or lower model.config.block_size"
            )
        return dataset

    def tokens_before(self, step: int) -> int:
        """Tokens that the run trains on before ``step``, over all devices."""
        return tokens_before(step, self.stages)

    def micro_batch_sizes(self, at_most: int) -> list[int]:
        """The micro-batch sizes up to ``at_most`` that divide a step, rising; if none is that small, the smallest.

        Raises:
            UserError: no size divides the step on this number of devices.
        """
        assert self.trainer is not None
        start_tokens = self.stages[0].step_tokens
        sizes = micro_batch_sizes(self.total_batch_tokens, self.train.block_size, self.trainer.world_size, start_tokens)
        return [size for size in sizes if size <= at_most] or sizes[:1]

    def set_micro_batch_size(self, micro_batch_size: int) -> None:
        """Sets the micro-batch size, and ``accumulate_grad_batches`` with it; before the first batch only."""
        assert self.trainer is not None
        self.micro_batch_size = micro_batch_size
        self.accumulate_grad_batches = accumulation(
            self.total_batch_tokens,
            micro_batch_size,
            self.train.block_size,
            self.trainer.world_size,
            self.stages[0].step_tokens,
        )

    def train_dataloader(self) -> DataLoader[Tensor]:
        assert self.trainer is not None
        sampler = StepBatchSampler(
            lambda step: self.tokens_before(step) // self.train.block_size,
            self.accumulate_grad_batches,
            max_steps=self.trainer.max_steps,
            # a checkpoint is already restored, so global_step is where to resume; overfitting repeats the first batches
            start_step=0 if self.trainer.overfit_batches else self.trainer.global_step,  # type: ignore[attr-defined]
            rank=self.trainer.global_rank,
            world_size=self.trainer.world_size,
        )
        return self._loader(self.train, sampler)

    def val_dataloader(self) -> DataLoader[Tensor]:
        assert self.trainer is not None
        rank, world_size = self.trainer.global_rank, self.trainer.world_size
        n_sequences = min(max(1, self.validation_tokens // self.val.block_size), len(self.val))
        if n_sequences < world_size:
            raise UserError(
                f"validation has {n_sequences} sequence(s) of {self.val.block_size} tokens for {devices(world_size)}: "
                f"raise validation.tokens to at least {world_size * self.val.block_size}, give more text, or use fewer "
                "devices"
            )
        # at least one batch for each rank: Lightning skips the loop of a rank that has none, and the others wait for it
        batch_size = min(self.micro_batch_size, n_sequences // world_size)
        return self._loader(self.val, EvalBatchSampler(n_sequences, batch_size, rank, world_size))

    def _loader(self, dataset: SequenceDataset, sampler: StepBatchSampler | EvalBatchSampler) -> DataLoader[Tensor]:
        assert self.trainer is not None
        return DataLoader(
            dataset,
            batch_sampler=sampler,
            collate_fn=default_convert,  # the dataset returns whole micro-batches
            num_workers=self.num_workers,
            # a forked worker starts at once; under Python 3.14's default each would import torch first
            multiprocessing_context="fork" if self.num_workers and sys.platform == "linux" else None,
            worker_init_fn=_ignore_signals,
            pin_memory=self.trainer.strategy.root_device.type == "cuda",
        )

    def state_dict(self) -> dict[str, Any]:
        """What decides which tokens a step sees, and the micro-batch size."""
        return {
            "block_size": self.train.block_size,
            "total_batch_tokens": self.total_batch_tokens,
            "batch_size_schedule": self.batch_size_schedule and asdict(self.batch_size_schedule),
            "order": self.order,
            "seed": self.seed,
            "shards": self.train.fingerprint(),
            "micro_batch_size": self.micro_batch_size,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        assert self.trainer is not None
        if not self.trainer.training:  # Trainer.validate(ckpt_path=…) may read other data
            return
        for name, now in self.state_dict().items():
            before = state_dict.get(name)
            if before == now or name == "micro_batch_size":
                continue
            what = f"shards other than those in {self.root}" if name == "shards" else f"{name}={before}, not {now}"
            raise UserError(
                f"the checkpoint to resume from was trained with {what}: use the data it was trained with, or another "
                "run_dir"
            )
        if self.auto_micro_batch:  # the same tokens in other micro-batches give sums that are rounded differently
            self.set_micro_batch_size(self.micro_batch_sizes(state_dict["micro_batch_size"])[-1])


def _ignore_signals(worker_id: int) -> None:
    """Workers outlive a signal to the whole process group, because the run finishes its step first."""
    for name in ("SIGINT", "SIGTERM", "SIGUSR1"):
        if hasattr(signal, name):  # Windows has no SIGUSR1
            signal.signal(getattr(signal, name), signal.SIG_IGN)
