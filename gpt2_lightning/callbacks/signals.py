"""SIGTERM, SIGUSR1 and SIGINT end a run after the current step, with a checkpoint."""

import os
import signal
import threading
import time
from types import FrameType
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGUSR1", "SIGINT") if hasattr(signal, name)]


class StopOnSignal(Callback):
    """Notes a signal in its handler, and after each step stops the run on all ranks if one of them has noted any.

    A second SIGINT ends the process at once.
    """

    def __init__(self) -> None:
        self.received = 0  # the last signal that this process received
        self.received_at = 0.0
        self.signal = 0
        """The signal that the ranks agreed to stop for; 0 while the run continues."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.step = trainer.global_step
        self.is_rank0 = trainer.is_global_zero
        if threading.current_thread() is not threading.main_thread():
            return  # Python handles signals in the main thread only
        for number in SIGNALS:  # in place of Lightning's own; its Trainer restores the previous handlers after the run
            signal.signal(number, self._handle)
        # Before each micro-batch Lightning broadcasts whether rank 0 received a SIGTERM, and reads the answer from the
        # device. We agree once per step instead, and Lightning's handler is not installed. No public switch exists.
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]

    def _handle(self, number: int, frame: FrameType | None) -> None:
        second_interrupt = number == self.received == signal.SIGINT
        # Ctrl-C reaches torchrun's workers twice: from the terminal and, within a second, from torchrun
        if second_interrupt and (time.monotonic() - self.received_at > 1 or "TORCHELASTIC_RUN_ID" not in os.environ):
            os._exit(128 + number)
        self.received, self.received_at = number, time.monotonic()
        if self.is_rank0:
            again = "; once more ends it at once" if number == signal.SIGINT else ""
            text = f"\n{signal.Signals(number).name}: the run saves and ends after this step{again}\n"
            os.write(2, text.encode())  # print is not safe in a signal handler

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self.step:  # inside an accumulation
            return
        self.step = trainer.global_step
        received = torch.tensor(self.received, device=pl_module.device)
        self.signal = int(trainer.strategy.reduce(received, reduce_op="max"))
        if self.signal:
            trainer.should_stop = True


def stop_signal(trainer: Trainer) -> int:
    """The number of the signal that the run is stopping for, or 0."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return max((callback.signal for callback in callbacks if isinstance(callback, StopOnSignal)), default=0)
