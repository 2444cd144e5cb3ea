"""SIGTERM, SIGUSR1 and SIGINT end a run at the next step boundary, where its state is saved."""

import os
import signal
import threading
import time
from types import FrameType

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from gpt2_lightning.callbacks.each_step import EachStep
from gpt2_lightning.module import GPTModule

SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGUSR1", "SIGINT") if hasattr(signal, name)]


class StopOnSignal(EachStep):
    """Notes a signal, agrees on it with the other ranks once a step, and stops the run there.

    It stands before the callbacks that evaluate: what is due at that step is left to the run that goes on. A second
    SIGINT ends the process at once.
    """

    def __init__(self) -> None:
        self.noted = 0  # the signal that this process got
        self.noted_at = 0.0
        self.signal = 0
        """The signal that the ranks agreed to stop for; 0 while the run goes on."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.speaks = trainer.is_global_zero
        super().on_train_start(trainer, pl_module)
        if threading.current_thread() is not threading.main_thread():
            return  # Python takes signals on the main thread only
        for number in SIGNALS:  # over Lightning's own; its Trainer puts back what was there before the run
            signal.signal(number, self._note)
        # Lightning asks rank 0 for a SIGTERM before each micro-batch, and so waits for the device there. `after_step`
        # asks all ranks once a step, and Lightning's own handler, which it would hear of, is no longer in place.
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]

    def _note(self, number: int, frame: FrameType | None) -> None:
        # torchrun sends its workers the Ctrl-C that the terminal has sent them already
        again = number == self.noted == signal.SIGINT
        if again and (time.monotonic() - self.noted_at > 1 or "TORCHELASTIC_RUN_ID" not in os.environ):
            os._exit(128 + number)
        self.noted, self.noted_at = number, time.monotonic()
        if self.speaks:
            also = "; once more ends it at once" if number == signal.SIGINT else ""
            text = f"\n{signal.Signals(number).name}: the run ends after this step, saved{also}\n"
            os.write(2, text.encode())  # print is not safe in a handler

    def after_step(self, trainer: Trainer, module: GPTModule, steps: int) -> None:
        noted = torch.tensor(self.noted, device=module.device)
        self.signal = int(trainer.strategy.reduce(noted, reduce_op="max"))
        if self.signal:
            trainer.should_stop = True


def stop_signal(trainer: Trainer) -> int:
    """The signal that the run is stopping for, or 0."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return max((callback.signal for callback in callbacks if isinstance(callback, StopOnSignal)), default=0)
