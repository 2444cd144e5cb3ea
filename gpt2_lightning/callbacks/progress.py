"""The progress bar: optimizer steps, not micro-batches."""

import sys
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from tqdm import tqdm


class StepProgressBar(ProgressBar):
    """Shows the step, and loss and tokens/s of the last logged step."""

    def __init__(self) -> None:
        super().__init__()
        self.bar: tqdm | None = None
        self.is_enabled = True

    def disable(self) -> None:  # called by Lightning on all ranks but the first
        self.is_enabled = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.bar = tqdm(
            total=trainer.max_steps,
            initial=trainer.global_step,
            unit="step",
            desc="training",
            dynamic_ncols=True,
            disable=not self.is_enabled,
        )

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert self.bar is not None
        new_steps = trainer.global_step - self.bar.n
        if new_steps and "train/tokens_per_sec" in trainer.callback_metrics:
            loss, rate = (float(trainer.callback_metrics[f"train/{name}"]) for name in ("loss", "tokens_per_sec"))
            self.bar.set_postfix_str(f"loss {loss:.4f}, {rate:,.0f} tokens/s", refresh=False)
        self.bar.update(new_steps)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._close()

    def _close(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def print(self, *args: Any, sep: str = " ", **kwargs: Any) -> None:
        if self.bar is None:
            print(*args, sep=sep, flush=True)
        else:
            self.bar.write(sep.join(map(str, args)), file=sys.stdout)
