"""Shards on disk to micro-batches on the device, in the order that ``order.py`` fixes."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from gpt2_lightning.data.order import EvalBatchSampler, Order, StepBatchSampler, windows_of
from gpt2_lightning.data.prepare import ensure_prepared
from gpt2_lightning.data.shards import TokenStream, check_sizes, list_shards, open_shard


class WindowDataset(Dataset[Tensor]):
    """Sample number → ``block_size + 1`` tokens, uint16; a micro-batch (B, block_size + 1) is fetched in one call."""

    def __init__(self, shards: list[Path], block_size: int, vocab_size: int, order: Order, seed: int) -> None:
        self.stream = TokenStream(shards)
        self.block_size = block_size
        self.vocab_size = vocab_size
        self.order: Order = order
        self.seed = seed
        self.n_windows = max(0, (len(self.stream) - 1) // block_size)  # the last token is only ever a target
        ends = np.minimum(-(-np.cumsum(self.stream.lengths) // block_size), self.n_windows)
        self.shard_windows: list[int] = np.diff(ends, prepend=0).tolist()  # windows that begin in each shard

        self._check_ids()

    def __len__(self) -> int:
        return self.n_windows

    def _check_ids(self) -> None:
        """Every id of small data, the first million of each shard of large data: a look, not a minute, at start."""
        every = len(self.stream) <= 100_000_000
        for path, length in zip(self.stream.paths, self.stream.lengths, strict=True):
            self._require_ids(open_shard(path)[: length if every else 1_000_000], path)

    def _require_ids(self, tokens: np.ndarray, where: Path) -> None:
        highest = int(tokens.max(initial=0))
        if highest >= self.vocab_size:
            raise ValueError(
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
        windows = windows_of(np.asarray(samples), self.shard_windows, self.order, self.seed)
        tokens = self.stream.windows(windows * self.block_size, self.block_size + 1)
        self._require_ids(tokens, self.stream.paths[0].parent)
        return torch.from_numpy(tokens)


def _as_is(batch: Any) -> Any:
    return batch


class TokenDataModule(LightningDataModule):
    """GPT-2 tokens from a folder of shards, ``total_batch_tokens`` to an optimizer step on however many devices.

    Args:
        root: folder of the shards; those that are missing are prepared from ``source`` first.
        source: fineweb-edu, stdlib (the running Python's standard library), ORG/NAME on the Hugging Face hub, or local
            .txt, .jsonl and .parquet files; null takes the shards in ``root`` as they are.
        order: sequential reads the shards front to back; shuffled permutes their windows, each epoch anew.
        seed: of that order.
        total_batch_tokens: tokens per optimizer step, over all devices and micro-batches.
        micro_batch_size: sequences per device and forward pass; what is accumulated follows from it.
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
        micro_batch_size: int = 64,
        num_workers: int = 0,
        validation_tokens: int = 10485760,
    ) -> None:
        super().__init__()
        for name, value in (("total_batch_tokens", total_batch_tokens), ("micro_batch_size", micro_batch_size)):
            if value < 1:
                raise ValueError(f"data.{name} is {value}: give a whole number of at least 1")
        for name, value in (("seed", seed), ("num_workers", num_workers)):
            if value < 0:
                raise ValueError(f"data.{name} is {value}: give a whole number of at least 0")
        self.root = Path(root)
        self.source = source
        self.order: Order = order
        self.seed = seed
        self.total_batch_tokens = total_batch_tokens
        self.micro_batch_size = micro_batch_size
        self.num_workers = num_workers
        self.validation_tokens = validation_tokens

    def prepare_data(self) -> None:
        if self.source is not None:
            ensure_prepared(self.source, self.root)

    def setup(self, stage: str) -> None:
        assert self.trainer is not None
        check_sizes(self.root)
        config: Any = self.trainer.lightning_module.model.config  # type: ignore[union-attr]
        self.val = WindowDataset(list_shards(self.root, "val"), config.block_size, config.vocab_size, "sequential", 0)
        if len(self.val) == 0:
            raise ValueError(
                f"the validation split in {self.root} has {len(self.val.stream)} tokens, fewer than one window of "
                f"{config.block_size + 1}: give more text, or lower model.config.block_size"
            )
        if stage != "fit":
            return
        self.train = WindowDataset(
            list_shards(self.root, "train"), config.block_size, config.vocab_size, self.order, self.seed
        )
        if len(self.train) == 0:
            raise ValueError(
                f"the training split in {self.root} has {len(self.train.stream)} tokens, fewer than one window of "
                f"{config.block_size + 1}: give more text, or lower model.config.block_size"
            )
        self.trainer.accumulate_grad_batches = accumulation(
            self.total_batch_tokens,
            self.micro_batch_size,
            config.block_size,
            self.trainer.world_size,
            self.trainer.accumulate_grad_batches,
        )
        self._refuse_part_of_a_step()
        steps_per_epoch = len(self.train) * config.block_size / self.total_batch_tokens
        self.trainer.lightning_module.print(
            f"data: {self.root}, {len(self.train.stream):,} tokens to train on ({steps_per_epoch:,.1f} steps an epoch, "
            f"{self.trainer.max_steps / steps_per_epoch:.2f} epochs in {self.trainer.max_steps:,} steps), "
            f"{len(self.val.stream):,} to validate on"
        )

    def _refuse_part_of_a_step(self) -> None:
        """Lightning would end a shortened epoch inside an accumulation and step on what there is."""
        trainer: Any = self.trainer
        if trainer.limit_train_batches != 1.0:
            raise ValueError(
                "trainer.limit_train_batches and fast_dev_run count micro-batches and could cut a step: "
                "set trainer.max_steps instead"
            )
        if trainer.overfit_batches % trainer.accumulate_grad_batches != 0:
            raise ValueError(
                f"trainer.overfit_batches={trainer.overfit_batches} is no whole step of "
                f"{trainer.accumulate_grad_batches} micro-batches: set data.total_batch_tokens to one micro-batch, "
                f"{self.micro_batch_size * self.train.block_size * trainer.world_size}"
            )

    def state_dict(self) -> dict[str, Any]:
        """What decides which tokens a step sees: a run that goes on has to find it as it was."""
        return {
            "block_size": self.train.block_size,
            "total_batch_tokens": self.total_batch_tokens,
            "order": self.order,
            "seed": self.seed,
            "shards": self.train.fingerprint(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for name, now in self.state_dict().items():
            if state_dict[name] != now:
                what = f"other shards than those in {self.root}" if name == "shards" else f"{name}={state_dict[name]}"
                raise ValueError(
                    f"the checkpoint to resume from was trained with {what}"
                    f"{'' if name == 'shards' else f', not {now}'}: give what it was trained with, or another run_dir"
                )

    def train_dataloader(self) -> DataLoader[Tensor]:
        assert self.trainer is not None
        sampler = StepBatchSampler(
            samples_per_step=self.total_batch_tokens // self.train.block_size,
            micro_batch_size=self.micro_batch_size,
            max_steps=self.trainer.max_steps,
            # a checkpoint is restored before this hook, so the step is the resumed one; overfitting repeats its batches
            start_step=0 if self.trainer.overfit_batches else self.trainer.global_step,  # type: ignore[attr-defined]
            rank=self.trainer.global_rank,
            world_size=self.trainer.world_size,
        )
        return self._loader(self.train, sampler)

    def val_dataloader(self) -> DataLoader[Tensor]:
        assert self.trainer is not None
        n_windows = min(max(1, self.validation_tokens // self.val.block_size), len(self.val))
        sampler = EvalBatchSampler(n_windows, self.micro_batch_size, self.trainer.global_rank, self.trainer.world_size)
        return self._loader(self.val, sampler)

    def _loader(self, dataset: WindowDataset, sampler: StepBatchSampler | EvalBatchSampler) -> DataLoader[Tensor]:
        assert self.trainer is not None
        return DataLoader(
            dataset,
            batch_sampler=sampler,
            collate_fn=_as_is,
            num_workers=self.num_workers,
            pin_memory=self.trainer.strategy.root_device.type == "cuda",
        )


def accumulation(
    total_batch_tokens: int, micro_batch_size: int, block_size: int, world_size: int, typed: int = 1
) -> int:
    """Micro-batches per rank that make up one optimizer step of exactly ``total_batch_tokens``.

    ``typed`` is the user's own ``trainer.accumulate_grad_batches``; 1 stands for not given.

    Raises:
        ValueError: the step does not divide, with the micro-batches that would do; or ``typed`` disagrees.
    """
    micro_tokens = micro_batch_size * block_size * world_size
    devices = f"{world_size} device{'s' if world_size > 1 else ''}"
    if total_batch_tokens % micro_tokens != 0:
        per_rank, rest = divmod(total_batch_tokens, block_size * world_size)
        if rest or per_rank == 0:
            raise ValueError(
                f"data.total_batch_tokens={total_batch_tokens} is not a multiple of block_size {block_size} on "
                f"{devices}: set it to a multiple of {block_size * world_size}"
            )
        would_do = [b for b in range(1, per_rank + 1) if per_rank % b == 0]
        raise ValueError(
            f"data.total_batch_tokens={total_batch_tokens} is not a whole number of micro-batches of "
            f"{micro_batch_size} sequences of {block_size} on {devices}: set data.micro_batch_size to one of {would_do}"
        )
    derived = total_batch_tokens // micro_tokens
    if typed not in (1, derived):
        raise ValueError(
            f"trainer.accumulate_grad_batches={typed} disagrees with data.total_batch_tokens={total_batch_tokens}, "
            f"which takes {derived} micro-batches on {devices}: leave it out, it is derived"
        )
    return derived
