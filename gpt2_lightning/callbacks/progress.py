"""The progress bar: optimizer steps, not micro-batches."""

import sys
import time
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from tqdm import tqdm


class StepProgressBar(ProgressBar):
    """Step, loss and tokens/s of the last logged step; redrawn twice a second, every 10 s where nobody watches."""

    def __init__(self) -> None:
        super().__init__()
        self.bar: tqdm | None = None
        self.is_enabled = True

    def disable(self) -> None:  # Lightning does so on all ranks but the first
        self.is_enabled = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.bar = tqdm(
            total=trainer.max_steps,
            initial=trainer.global_step,
            unit="step",
            desc="training",
            mininterval=0.5 if sys.stderr.isatty() else 10.0,
            dynamic_ncols=True,
            disable=not self.is_enabled,
        )
        self.bar._time = time.monotonic  # its own, the wall clock, may jump
        self.bar.start_t = self.bar.last_print_t = time.monotonic()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert self.bar is not None
        done = trainer.global_step - self.bar.n
        if done and "train/loss" in trainer.callback_metrics:
            loss, rate = (float(trainer.callback_metrics[f"train/{name}"]) for name in ("loss", "tokens_per_sec"))
            self.bar.set_postfix_str(f"loss {loss:.4f}, {rate:,.0f} tokens/s", refresh=False)
        self.bar.update(done)

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
