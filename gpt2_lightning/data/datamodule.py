"""Shards on disk to micro-batches on the device, in the order that ``order.py`` fixes."""

import hashlib
import signal
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

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
from gpt2_lightning.data.shards import TokenStream, check_sizes, list_shards, open_shard
from gpt2_lightning.errors import UserError
from gpt2_lightning.schedule import BatchSizeSchedule, batch_size_stages, tokens_before


class SequenceDataset(Dataset[Tensor]):
    """Sample number → ``block_size + 1`` tokens, uint16; a micro-batch (B, block_size + 1) is fetched in one call."""

    def __init__(self, shards: list[Path], block_size: int, vocab_size: int, order: Order, seed: int) -> None:
        self.stream = TokenStream(shards)
        self.block_size = block_size
        self.vocab_size = vocab_size
        self.order: Order = order
        self.seed = seed
        self.shard_sequences = sequences_per_shard(self.stream.lengths, block_size)
        self._check_ids()

    def __len__(self) -> int:
        return sum(self.shard_sequences)

    def _check_ids(self) -> None:
        """Every id of small data, the first million of each shard of large data: a look, not a minute, at start."""
        every = len(self.stream) <= 100_000_000
        for path, length in zip(self.stream.paths, self.stream.lengths, strict=True):
            self._require_ids(open_shard(path)[: length if every else 1_000_000], path)

    def _require_ids(self, tokens: np.ndarray, where: Path) -> None:
        highest = int(tokens.max(initial=0))
        if highest >= self.vocab_size:
            raise UserError(
                f"token id {highest} in {where} is not below model.config.vocab_size={self.vocab_size}: "
                f"set vocab_size to at least {highest + 1}, or choose data that fits"
            )

    def fingerprint(self) -> str:
        """A hash of the shards' names, lengths and first pages: the same data, wherever the folder lies."""
        sha = hashlib.sha256()
        for path, length in zip(self.stream.paths, self.stream.lengths, strict=True):
            sha.update(f"{path.name} {length}\n".encode() + open_shard(path)[:2048].tobytes())
        return sha.hexdigest()

    def __getitem__(self, sample: int) -> Tensor:
        return self.__getitems__([sample])[0]

    def __getitems__(self, samples: list[int]) -> Tensor:
        windows = dataset_indices(np.asarray(samples), self.shard_sequences, self.order, self.seed)
        tokens = self.stream.read(windows * self.block_size, self.block_size + 1)
        self._require_ids(tokens, self.stream.paths[0].parent)
        return torch.from_numpy(tokens)


def _as_is(batch: Any) -> Any:
    return batch


def _leave_signals_to_the_run(_worker: int) -> None:
    """A signal to the whole process group must not end the workers: the run finishes its step first."""
    for name in ("SIGINT", "SIGTERM", "SIGUSR1"):
        if hasattr(signal, name):  # Windows has no SIGUSR1
            signal.signal(getattr(signal, name), signal.SIG_IGN)


class TokenDataModule(LightningDataModule):
    """GPT-2 tokens from a folder of shards, ``total_batch_tokens`` to an optimizer step on however many devices.

    Args:
        root: folder of the shards; those that are missing are prepared from ``source`` first.
        source: fineweb-edu, stdlib (the running Python's standard library), ORG/NAME[@REVISION] on the hub, or
            local .txt, .jsonl and .parquet files; null takes the shards in ``root`` as they are.
        order: sequential reads the shards front to back; shuffled permutes their windows, each epoch anew.
        seed: of that order.
        total_batch_tokens: tokens per optimizer step, over all devices and micro-batches.
        micro_batch_size: sequences per device and forward pass; what is accumulated follows from it. auto takes the
            largest that divides the step and fits the device's memory, on a CPU at most 16.
        batch_size_schedule: begins with steps of ``start_tokens`` that double until they are of ``total_batch_tokens``
            after ``ramp_tokens`` tokens; the micro-batches shrink with them, their number stays.
        num_workers: processes that read ahead; the order does not depend on them.
        validation_tokens: how many tokens of the validation shards a validation loss is measured on.
    """

    def __init__(
        self,
        root: str = "data/fineweb-edu-10B",
        source: str | list[str] | None = "fineweb-edu",
        order: Order = "sequential",
        seed: int = 1337,
        total_batch_tokens: int = 524288,
        micro_batch_size: int | Literal["auto"] = 64,
        batch_size_schedule: BatchSizeSchedule | None = None,
        num_workers: int = 0,
        validation_tokens: int = 10485760,
    ) -> None:
        super().__init__()
        for name, size in (("total_batch_tokens", total_batch_tokens), ("micro_batch_size", micro_batch_size)):
            if size != "auto" and size < 1:
                raise UserError(f"data.{name} is {size}: give a whole number of at least 1")
        for name, value in (("seed", seed), ("num_workers", num_workers)):
            if not 0 <= value < 2**62:
                raise UserError(f"data.{name} is {value}: give a whole number from 0 to 2**62")
        self.root = Path(root)
        self.source = source
        self.order: Order = order
        self.seed = seed
        self.total_batch_tokens = total_batch_tokens
        self.auto_micro_batch = micro_batch_size == "auto"
        self.micro_batch_size = AUTO_ON_CPU if micro_batch_size == "auto" else micro_batch_size
        if isinstance(batch_size_schedule, dict):  # from Python, as a recipe writes it
            batch_size_schedule = BatchSizeSchedule(**batch_size_schedule)
        self.batch_size_schedule = batch_size_schedule
        self.stages = batch_size_stages(total_batch_tokens, batch_size_schedule)
        self.num_workers = num_workers
        self.validation_tokens = validation_tokens

    def prepare_data(self) -> None:
        if self.source is not None:
            ensure_prepared(self.source, self.root)

    def setup(self, stage: str) -> None:
        assert self.trainer is not None
        check_sizes(self.root)
        config: Any = self.trainer.lightning_module.model.config  # type: ignore[union-attr]
        self.val = SequenceDataset(list_shards(self.root, "val"), config.block_size, config.vocab_size, "sequential", 0)
        if len(self.val) == 0:
            raise UserError(
                f"the validation split in {self.root} has {len(self.val.stream)} tokens, fewer than one window of "
                f"{config.block_size + 1}: give more text, or lower model.config.block_size"
            )
        if stage != "fit":
            return
        self.train = SequenceDataset(
            list_shards(self.root, "train"), config.block_size, config.vocab_size, self.order, self.seed
        )
        if len(self.train) == 0:
            raise UserError(
                f"the training split in {self.root} has {len(self.train.stream)} tokens, fewer than one window of "
                f"{config.block_size + 1}: give more text, or lower model.config.block_size"
            )
        self.typed_accumulation = self.trainer.accumulate_grad_batches
        if self.auto_micro_batch:
            on_cpu = self.trainer.strategy.root_device.type == "cpu"
            self.micro_batch_size = self.micro_batch_sizes(AUTO_ON_CPU if on_cpu else self.total_batch_tokens)[-1]
        self.set_micro_batch_size(self.micro_batch_size)
        self._refuse_part_of_a_step()
        tokens = self.tokens_before(self.trainer.max_steps)
        epoch = len(self.train) * config.block_size
        self.trainer.lightning_module.print(
            f"data: {self.root}, {len(self.train.stream):,} tokens to train on ({tokens / epoch:.2f} epochs in "
            f"{self.trainer.max_steps:,} steps), {len(self.val.stream):,} to validate on"
        )

    def tokens_before(self, step: int) -> int:
        """Tokens that the run has trained on before ``step``, over all devices."""
        return tokens_before(step, self.stages)

    def micro_batch_sizes(self, at_most: int) -> list[int]:
        """The micro-batch sizes up to ``at_most`` that divide a step on this run's devices, the smallest at least.

        Raises:
            ValueError: there is none.
        """
        assert self.trainer is not None
        found = micro_batch_sizes(
            self.total_batch_tokens, self.train.block_size, self.trainer.world_size, self.stages[0].step_tokens
        )
        return [b for b in found if b <= at_most] or found[:1]

    def set_micro_batch_size(self, micro_batch_size: int) -> None:
        """Fixes the micro-batch, and with it the accumulation, before the first batch is asked for."""
        assert self.trainer is not None
        self.micro_batch_size = micro_batch_size
        self.trainer.accumulate_grad_batches = accumulation(
            self.total_batch_tokens,
            micro_batch_size,
            self.train.block_size,
            self.trainer.world_size,
            self.typed_accumulation,
            self.stages[0].step_tokens,
        )

    def _refuse_part_of_a_step(self) -> None:
        """Lightning would end a shortened epoch inside an accumulation and step on what there is."""
        trainer: Any = self.trainer
        limit = trainer.limit_train_batches  # 1.0 is all of them, 1 a single one
        if not trainer.overfit_batches and (
            limit != 1.0 or isinstance(limit, int)
        ):  # Lightning copies one to the other
            raise UserError(
                "trainer.limit_train_batches and fast_dev_run count micro-batches and could cut a step: "
                "set trainer.max_steps instead"
            )
        if trainer.overfit_batches % trainer.accumulate_grad_batches != 0:
            raise UserError(
                f"trainer.overfit_batches={trainer.overfit_batches} is no whole step of "
                f"{trainer.accumulate_grad_batches} micro-batches: set data.total_batch_tokens to one micro-batch, "
                f"{self.micro_batch_size * self.train.block_size * trainer.world_size}"
            )

    def state_dict(self) -> dict[str, Any]:
        """What decides which tokens a step sees: a run that goes on has to find it as it was."""
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
        for name, now in self.state_dict().items():
            if name == "micro_batch_size":  # no matter of the tokens, but of rounding: auto stays with what it took
                if self.auto_micro_batch:
                    self.set_micro_batch_size(self.micro_batch_sizes(state_dict[name])[-1])
            elif state_dict.get(name) != now:
                what = (
                    f"other shards than those in {self.root}" if name == "shards" else f"{name}={state_dict.get(name)}"
                )
                raise UserError(
                    f"the checkpoint to resume from was trained with {what}"
                    f"{'' if name == 'shards' else f', not {now}'}: give what it was trained with, or another run_dir"
                )

    def train_dataloader(self) -> DataLoader[Tensor]:
        assert self.trainer is not None
        sampler = StepBatchSampler(
            lambda step: self.tokens_before(step) // self.train.block_size,
            self.trainer.accumulate_grad_batches,
            max_steps=self.trainer.max_steps,
            # a checkpoint is restored before this hook, so the step is the resumed one; overfitting repeats its batches
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
                f"validation would see {n_sequences} windows of {self.val.block_size} tokens on {devices(world_size)}: "
                f"raise validation.tokens to {world_size * self.val.block_size} or more, give more text, or take fewer "
                "devices"
            )
        # smaller where there would not be a batch for each rank, without which Lightning's loop would not run there
        sampler = EvalBatchSampler(n_sequences, min(self.micro_batch_size, n_sequences // world_size), rank, world_size)
        return self._loader(self.val, sampler)

    def _loader(self, dataset: SequenceDataset, sampler: StepBatchSampler | EvalBatchSampler) -> DataLoader[Tensor]:
        assert self.trainer is not None
        return DataLoader(
            dataset,
            batch_sampler=sampler,
            collate_fn=_as_is,
            num_workers=self.num_workers,
            # forked, also where Python's default has changed: a worker is there at once, and imports nothing anew
            multiprocessing_context="fork" if self.num_workers and sys.platform == "linux" else None,
            worker_init_fn=_leave_signals_to_the_run,
            pin_memory=self.trainer.strategy.root_device.type == "cuda",
        )
