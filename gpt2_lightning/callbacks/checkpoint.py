"""Checkpoints at step boundaries, each written whole or not at all."""

import os
import shutil
from pathlib import Path
from typing import Any

import torch
from jsonargparse.typing import NonNegativeInt
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from gpt2_lightning.callbacks.steps import StepCallback
from gpt2_lightning.callbacks.validation import ValidationLoss
from gpt2_lightning.checkpoints.ours import saved_steps, torch_load
from gpt2_lightning.errors import UserError
from gpt2_lightning.files import atomic_file
from gpt2_lightning.module import GPTModule


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the target, syncs and renames: a kill or a full disk leaves the previous file as it was."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | os.PathLike, storage_options: Any = None) -> None:
        try:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            with atomic_file(Path(path)) as file:
                torch.save(checkpoint, file)
        except (OSError, RuntimeError) as error:
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, OSError):  # torch's RuntimeError comes after it
                cause = cause.__context__
            reason = cause.strerror if isinstance(cause, OSError) else error
            raise UserError(
                f"{path} cannot be written ({reason}): free some space or correct the permissions, then run the same "
                "command again; earlier checkpoints are whole"
            ) from None

    def load_checkpoint(self, path: str | os.PathLike, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return torch_load(Path(path), mmap=False)


class StepCheckpoint(StepCallback, Checkpoint):
    """Saves ``checkpoints/step_<step>.ckpt``; ``last.ckpt`` and ``best.ckpt`` are links to (or copies of) two of them.

    ``best`` has the lowest ``val/loss`` of those that were saved at a step with a validation.

    Args:
        every_n_steps: optimizer steps between two checkpoints; the last step always has one; 0 = off.
        keep: how many ``step_*.ckpt`` to keep, the newest; 0 = all. With AdamW each takes 12 bytes per parameter.
    """

    evaluates = False
    label = "checkpoints"

    def __init__(self, every_n_steps: NonNegativeInt = 1000, keep: NonNegativeInt = 0) -> None:
        super().__init__(every_n_steps)
        if keep == 1:
            raise UserError("checkpoint.keep is 1: keep at least 2 (or 0 for all), in case the newest is damaged")
        self.keep: int = keep
        self.ckpt_path: str | None = None  # the command's --ckpt_path, which the next start compares with its own
        self.best_val_loss = float("inf")
        self.metrics: dict[str, float] = {}
        self.resumed: dict[str, Any] | None = None

    def run(self, trainer: Trainer, module: GPTModule, step: int) -> None:
        for logger in trainer.loggers:
            logger.save()  # the metrics up to this step must be on disk before its checkpoint is
        val_loss = self._val_loss(trainer, step)
        best = val_loss < self.best_val_loss  # False for nan
        if best:
            self.best_val_loss = val_loss
        folder = Path(trainer.default_root_dir) / "checkpoints"
        path = folder / f"step_{step:06d}.ckpt"
        trainer.save_checkpoint(path)
        if trainer.is_global_zero:
            if best:
                _link(folder / "best.ckpt", path)
            _link(folder / "last.ckpt", path)
            saved = saved_steps(folder)
            # later ones are of a run that went back to an earlier checkpoint: they are not older than this one
            for old in saved[: saved.index(path) + 1][: -self.keep] if self.keep else ():
                old.unlink()
        trainer.strategy.barrier("checkpoint")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        # a validation that a stopped run left to this one may make the checkpoint we resume from the best
        folder = Path(trainer.default_root_dir) / "checkpoints"
        path = folder / f"step_{trainer.global_step:06d}.ckpt"
        val_loss = self._val_loss(trainer, trainer.global_step)
        if val_loss < self.best_val_loss and path.exists():
            self.best_val_loss = val_loss
            if trainer.is_global_zero:
                _link(folder / "best.ckpt", path)

    @staticmethod
    def _val_loss(trainer: Trainer, step: int) -> float:
        """The validation loss after ``step`` steps, or infinity if there was no validation then."""
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        measured = any(isinstance(c, ValidationLoss) and c.last_step == step for c in callbacks)
        return float(trainer.callback_metrics.get("val/loss", "inf")) if measured else float("inf")

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self.resumed = checkpoint
        self.metrics = checkpoint.get("metrics", {})
        # trainer.max_time limits each start; restored, it would stop a resumed run at once
        checkpoint["callbacks"].pop("Timer", None)
        self._rewrite_progress(trainer)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._rewrite_progress(trainer)  # AutoMicroBatch may have changed the accumulation since
        # checked before the first step, where ranks at different steps would wait for each other forever
        step = torch.tensor(self.resumed["global_step"] if self.resumed else 0, device=pl_module.device)
        latest, earliest = (int(trainer.strategy.reduce(s, reduce_op="max")) for s in (step, -step))
        if latest != -earliest:
            raise UserError(
                f"some processes resume from step {latest} and others from {-earliest}: run_dir has to be a folder "
                "that all nodes share"
            )
        self.resumed = None

    def _rewrite_progress(self, trainer: Trainer) -> None:
        """Set Lightning's counters to the middle of its one epoch, after the step that was saved.

        They count micro-batches, whose number per step may have changed; and a run that was stopped, or had a smaller
        ``max_steps``, has saved its epoch as complete.
        """
        if self.resumed is None:
            return
        batches = self.resumed["global_step"] * trainer.accumulate_grad_batches
        loop = self.resumed["loops"]["fit_loop"]
        for count in (loop["epoch_progress"]["total"], loop["epoch_progress"]["current"]):
            count.update(ready=1, started=1, processed=0, completed=0)
        progress = loop["epoch_loop.batch_progress"]
        progress["is_last_batch"] = False
        for count in (progress["total"], progress["current"]):
            # as Lightning saves them in on_train_batch_end: the last batch is processed but not completed
            count.update(ready=batches, started=batches, processed=batches, completed=batches - 1)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        seed = os.environ.get("PL_GLOBAL_SEED")  # set by seed_everything, which the initial weights depend on
        self.metrics = self.metrics | {name: float(value) for name, value in trainer.callback_metrics.items()}
        checkpoint["metrics"] = self.metrics
        checkpoint["optimizer"] = type(trainer.optimizers[0]).__name__
        checkpoint["seed_everything"] = None if seed is None else int(seed)
        checkpoint["ckpt_path"] = self.ckpt_path

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"best_val_loss": self.best_val_loss}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.best_val_loss = state_dict["best_val_loss"]


def _link(name: Path, path: Path) -> None:
    """Make ``name`` a hard link to ``path``, or a copy where the file system has none; atomically."""
    partial = name.with_name(f".{name.name}.tmp")  # as atomic_file names it; a resumed run deletes it
    partial.unlink(missing_ok=True)
    try:
        os.link(path, partial)
    except OSError:
        shutil.copyfile(path, partial)
    os.replace(partial, name)
