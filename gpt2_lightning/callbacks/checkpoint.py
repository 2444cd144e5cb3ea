"""Checkpoints at step boundaries, each whole or not there at all."""

import os
import shutil
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from gpt2_lightning.callbacks.steps import EveryNSteps
from gpt2_lightning.callbacks.validation import ValidationLoss
from gpt2_lightning.checkpoints.ours import saved_steps, torch_load
from gpt2_lightning.errors import UserError
from gpt2_lightning.files import atomic_file
from gpt2_lightning.module import GPTModule


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the target, syncs, renames: a kill or a full disk leaves the file that was there before."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | os.PathLike, storage_options: Any = None) -> None:
        try:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            with atomic_file(Path(path)) as file:
                torch.save(checkpoint, file)
        except (OSError, RuntimeError) as error:
            raise UserError(
                f"{path} cannot be written ({_reason(error)}): make room, or give this user the right to write there, "
                "and run the same command again: what was saved before is whole"
            ) from None

    def load_checkpoint(self, path: str | os.PathLike, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return torch_load(Path(path), mmap=False)  # the one that the command has looked at byte by byte


def _reason(error: BaseException | None) -> str:
    """The system's own words; torch's writer hides them behind an error of its own."""
    said = str(error)
    while error is not None:
        if isinstance(error, OSError):
            return error.strerror or said
        error = error.__context__
    return said


class StepCheckpoint(EveryNSteps, Checkpoint):
    """Saves ``checkpoints/step_<step>.ckpt``, and points ``last.ckpt`` and ``best.ckpt`` beside it at the right ones.

    ``best`` is the one with the lowest ``val/loss`` of those that were saved at a step with a validation.

    Args:
        every_n_steps: optimizer steps between two checkpoints; the last step always has one; 0 = off.
        keep: how many ``step_*.ckpt`` stay, the newest; 0 = all. Each takes 12 bytes a parameter, with AdamW.
    """

    evaluates = False
    section = "checkpoint"
    label = "checkpoints"

    def __init__(self, every_n_steps: int = 1000, keep: int = 0) -> None:
        super().__init__(every_n_steps)
        if keep < 0 or keep == 1:
            raise UserError(
                f"checkpoint.keep is {keep}: give 0 for all, or at least 2, so that there is one to go on from if the "
                "newest is damaged"
            )
        self.keep = keep
        self.ckpt_path: str | None = None  # what the user typed, for the next start to know
        self.best_val_loss = float("inf")
        self.resumed: dict[str, Any] | None = None

    def run(self, trainer: Trainer, module: GPTModule, step: int) -> None:
        if step == 0:
            return
        for logger in trainer.loggers:
            logger.save()  # what was logged up to here is on disk before a checkpoint says that it is done
        val_loss = self._val_loss(trainer, step)
        best = val_loss < self.best_val_loss
        if best:  # not where it is nan
            self.best_val_loss = val_loss
        folder = Path(trainer.default_root_dir) / "checkpoints"
        path = folder / f"step_{step:06d}.ckpt"
        trainer.save_checkpoint(path)
        if trainer.is_global_zero:
            if best:
                _point(folder / "best.ckpt", path)
            _point(folder / "last.ckpt", path)
            # last and best are names, or copies, of their own
            for old in self._up_to(path)[: -self.keep] if self.keep else ():
                old.unlink()
        trainer.strategy.barrier("checkpoint")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Looks at a validation that a signal had put off until now, of the checkpoint that we go on from."""
        super().on_train_start(trainer, pl_module)
        folder = Path(trainer.default_root_dir) / "checkpoints"
        path = folder / f"step_{trainer.global_step:06d}.ckpt"
        val_loss = self._val_loss(trainer, trainer.global_step)
        if val_loss < self.best_val_loss and path.exists():
            self.best_val_loss = val_loss
            if trainer.is_global_zero:
                _point(folder / "best.ckpt", path)

    @staticmethod
    def _up_to(path: Path) -> list[Path]:
        """A run that went back to an earlier checkpoint has later ones beside it, which are not this one's past."""
        saved = saved_steps(path.parent)
        return saved[: saved.index(path) + 1]

    @staticmethod
    def _val_loss(trainer: Trainer, step: int) -> float:
        """The validation loss after ``step`` steps, or infinity if there was no validation then."""
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        measured = any(isinstance(c, ValidationLoss) and c.last_step == step for c in callbacks)
        return float(trainer.callback_metrics.get("val/loss", "inf")) if measured else float("inf")

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self.resumed = checkpoint
        checkpoint["callbacks"].pop("Timer", None)  # trainer.max_time is of each start, or none would get on after it
        self._rewrite_progress(trainer)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._rewrite_progress(trainer)  # AutoMicroBatch may have changed the accumulation
        # now, not at the first step: until then the processes would wait for each other in different places
        step = torch.tensor(self.resumed["global_step"] if self.resumed else 0, device=pl_module.device)
        latest, earliest = (int(trainer.strategy.reduce(s, reduce_op="max")) for s in (step, -step))
        if latest != -earliest:
            raise UserError(
                f"some processes go on from step {latest} and others from {-earliest}: run_dir has to be a folder that "
                "all nodes share"
            )
        self.resumed = None

    def _rewrite_progress(self, trainer: Trainer) -> None:
        """Lightning's counters as they stand in the middle of its one epoch, after the step that was saved.

        They count micro-batches, which need not be those of the run that saved, and a run that was stopped, or had
        fewer ``max_steps``, saved them as those of an epoch that is over.
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
            # as a save inside on_train_batch_end leaves them: the last batch is processed, not yet completed
            count.update(ready=batches, started=batches, processed=batches, completed=batches - 1)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        seed = os.environ.get("PL_GLOBAL_SEED")  # of seed_everything, which the weights were drawn with
        checkpoint["optimizer"] = type(trainer.optimizers[0]).__name__
        checkpoint["seed_everything"] = None if seed is None else int(seed)
        checkpoint["ckpt_path"] = self.ckpt_path

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"best_val_loss": self.best_val_loss}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.best_val_loss = state_dict.get("best_val_loss", float("inf"))


def _point(name: Path, path: Path) -> None:
    """Makes ``name`` another name of ``path``, or a copy where the file system has no hard links."""
    link = name.with_name(name.name + ".partial")
    link.unlink(missing_ok=True)
    try:
        os.link(path, link)
    except OSError:
        shutil.copyfile(path, link)
    os.replace(link, name)
