"""A hook that Lightning does not have: once after each optimizer step, however many micro-batches it took."""

from abc import ABC, abstractmethod
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from gpt2_lightning.module import GPTModule


class EachStep(Callback, ABC):
    """Calls ``after_step`` when an optimizer step is made, and not inside an accumulation."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.seen_step = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step > self.seen_step:
            self.seen_step = trainer.global_step
            assert isinstance(pl_module, GPTModule)
            self.after_step(trainer, pl_module, trainer.global_step)

    @abstractmethod
    def after_step(self, trainer: Trainer, module: GPTModule, steps: int) -> None:
        """What there is to do when ``steps`` optimizer steps are made."""
