"""Checkpoints at step boundaries, each whole or not there at all."""

import os
import shutil
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from gpt2_lightning.callbacks.cadence import EveryNSteps
from gpt2_lightning.data.shards import atomic_file
from gpt2_lightning.hf import torch_load
from gpt2_lightning.module import GPTModule


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the target, syncs, renames: a kill or a full disk leaves the file that was there before."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | os.PathLike, storage_options: Any = None) -> None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(Path(path)) as file:
            torch.save(checkpoint, file)

    def load_checkpoint(self, path: str | os.PathLike, *args: Any, **kwargs: Any) -> dict[str, Any]:
        if not Path(path).is_file():
            raise ValueError(f"{path} does not exist: correct ckpt_path, or leave it out")
        checkpoint = torch_load(Path(path), mmap=False)
        if (
            not isinstance(checkpoint, dict)
            or not {"loops", "optimizer_states", "hyper_parameters"} <= checkpoint.keys()
        ):
            raise ValueError(
                f"{path} is no checkpoint of a gpt2_lightning run: to start from its weights, use init_from"
            )
        return checkpoint


class StepCheckpoint(EveryNSteps, Checkpoint):
    """Saves ``checkpoints/step_<step>.ckpt`` and points ``checkpoints/last.ckpt`` at it.

    Args:
        every_n_steps: optimizer steps between two checkpoints; the last step always has one; 0 = off.
    """

    def __init__(self, every_n_steps: int = 1000) -> None:
        super().__init__(every_n_steps)

    def run(self, trainer: Trainer, module: GPTModule, step: int) -> None:
        if step == 0:
            return
        folder = Path(trainer.default_root_dir) / "checkpoints"
        path = folder / f"step_{step:06d}.ckpt"
        trainer.save_checkpoint(path)
        if trainer.is_global_zero:
            link = folder / "last.ckpt.partial"
            link.unlink(missing_ok=True)
            try:
                os.link(path, link)
            except OSError:  # a file system without hard links
                shutil.copyfile(path, link)
            os.replace(link, folder / "last.ckpt")

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Counts the batches behind us in this run's micro-batches, which need not be those of the run that saved."""
        batches = checkpoint["global_step"] * trainer.accumulate_grad_batches
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        for count in (progress["total"], progress["current"]):
            # as a save inside on_train_batch_end leaves them: the last batch is processed, not yet completed
            count.update(ready=batches, started=batches, processed=batches, completed=batches - 1)
